"""One run of a figure or table: the command that a person would type, and what its folder says of it."""

import dataclasses
import functools
import importlib
import os
import sys
from pathlib import Path

import create_dataset
from experiments.runner import process
from harness.curves import read_curves
from harness.exits import InputError
from harness.files import at_work, read_settings
from harness.run import differences

KILLED, TRACEBACK = "killed by signal ", "Traceback (most recent call last)"


@dataclasses.dataclass(frozen=True)
class Task:
    """A run of a script in a process of its own, in the folder root/name."""

    name: str
    method: str  # for messages
    script: str  # module with parse(argv) and main(argv), started as a file or, if it has a dot, with -m
    own: tuple  # arguments that make it this run: levels, psi, seed, ...
    root: Path
    options: tuple = ()  # arguments that all runs of the plan share
    cost: float = 1.0  # of an epoch, roughly and in epochs of Single, to weigh the time left
    networks: int = 1  # in a checkpoint, an optimizer's momentum counted as one
    data: object = create_dataset  # where its dataset comes from: has SIZES, and read(name, data_root)

    @property
    def folder(self):
        return self.root / self.name

    @property
    def log(self):
        return self.root / "logs" / f"{self.name}.log"

    @property
    def arguments(self):
        """What a person would type after the script's name."""
        return [*self.own, "--out", str(self.folder), *self.options]

    @property
    def command(self):
        start = (
            ["-m", self.script] if "." in self.script else [os.path.relpath(process.REPOSITORY / f"{self.script}.py")]
        )
        return [sys.executable, *start, *self.arguments, "--resume"]

    @property
    def script_module(self):
        return importlib.import_module(self.script)

    @functools.cached_property
    def settings(self):
        """As the script reads them; raises InputError where it would."""
        try:
            return self.script_module.parse(self.arguments)
        except InputError as error:
            raise InputError(f"{self.method}: {error}") from None

    def mismatch(self, theirs):
        """What in a run's settings contradicts this task's script and own arguments, in words; empty where nothing."""
        own = [argument[2:].replace("-", "_") for argument in self.own if argument.startswith("--")]
        ours = {"script": self.script} | {name: getattr(self.settings, name) for name in own}
        return differences({name: value for name, value in ours.items() if name in theirs}, theirs)

    def epochs_done(self):
        """Rows of its curves.csv."""
        return len(read_curves(self.folder))

    def state(self):
        """ "done", "at work", "unfinished" or "not begun"; raises InputError where the folder is of another run."""
        theirs = read_settings(self.folder / "settings.json")
        if not theirs:
            return "not begun"
        details = differences(vars(self.settings), theirs)
        if details:
            raise InputError(f"{self.folder} is of another experiment ({details}); give its settings, or another --out")
        done, epochs = self.epochs_done(), self.settings.epochs
        if done > epochs:
            raise InputError(f"{self.folder} has {done} epochs already; give --epochs {done}, or another --out")
        if at_work(self.folder):
            return "at work"
        return "done" if done == epochs else "unfinished"

    def failure(self):
        """Why the last process of an unfinished run ended badly, as its log tells; empty where it did not."""
        lines = self._log_of_the_last_process()
        if lines and (lines[-1].startswith(("error: ", KILLED)) or any(line.startswith(TRACEBACK) for line in lines)):
            return lines[-1]
        return ""

    def outcome(self, code):
        """What its ended process was: "done", "unfinished", or why it failed, which its log then says too."""
        if code == 0:
            return "done"
        if code == 3:
            return "unfinished"
        if code < 0:
            with open(self.log, "a") as file:
                file.write(f"{KILLED}{-code}\n")
        lines = self._log_of_the_last_process()
        return lines[-1] if lines else f"exit code {code}"

    def _log_of_the_last_process(self):
        """The lines with anything in them."""
        try:
            text = self.log.read_text(errors="replace").rpartition(process.START)[2]
        except OSError:
            return []
        return [line for line in text.split("\n")[1:] if line.strip()]
