"""One run of a figure or table: the command that a person would type, and what its folder says of it."""

import dataclasses
import functools
import importlib
import os
import sys
from pathlib import Path

import create_dataset
from experiments.runner.here import REPOSITORY
from experiments.runner.report import difference
from harness.curves import read_curves
from harness.exits import InputError
from harness.files import at_work, read_settings
from harness.folder import differences


def name_of(argument):
    """The setting of an option: "--focal-gamma=2" -> "focal_gamma"."""
    return argument.split("=")[0].removeprefix("--").replace("-", "_")


@functools.cache
def settings_of(script):
    """The names of all settings of a script."""
    return frozenset(vars(importlib.import_module(script).parse([])))


def shared_options(options, script, scripts):
    """Of the options of a plan those that `script` has, as a tuple; --label-learning-rate is MAXL's alone.

    An option that none of `scripts` has stays, for the script to refuse.
    """
    known = frozenset().union(*map(settings_of, scripts))
    taken, keep = [], True
    for argument in options:
        if argument.startswith("--"):
            keep = name_of(argument) in settings_of(script) or name_of(argument) not in known
        if keep:
            taken.append(argument)
    return tuple(taken)


@dataclasses.dataclass(frozen=True)
class Task:
    """A run of a script in a process of its own, in the folder root/name."""

    name: str
    method: str  # for messages
    script: str  # module with parse(argv) and main(argv), started as a file or, if it has a dot, with -m
    own: tuple  # arguments that make it this run: levels, psi, seed, ...
    root: Path
    options: tuple = ()  # arguments that all runs of the plan share
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
        file = os.path.relpath(REPOSITORY / f"{self.script}.py")
        start = ["-m", self.script] if "." in self.script else [file]
        return [sys.executable, *start, *self.arguments, "--resume"]

    @property
    def script_module(self):
        return importlib.import_module(self.script)

    @functools.cached_property
    def settings(self):
        """As the script reads them; raises InputError if it would."""
        try:
            return self.script_module.parse(self.arguments)
        except InputError as error:
            raise InputError(f"{self.method}: {error}") from None

    @property
    def own_names(self):
        """The settings that make it this run."""
        return {name_of(argument) for argument in self.own if argument.startswith("--")}

    def mismatch(self, theirs):
        """What in a run's settings contradicts this task's script and own arguments, in words; empty if nothing."""
        ours = {"script": self.script} | {name: getattr(self.settings, name) for name in self.own_names}
        return differences({name: value for name, value in ours.items() if name in theirs}, theirs)

    def epochs_done(self):
        """Rows of its curves.csv."""
        return len(read_curves(self.folder))

    def state(self):
        """ "done", "at work", "unfinished" or "not begun"; raises InputError if the folder is of another run."""
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

    def outcome(self, code):
        """What the exit code of its process means: "done", "unfinished", or why it failed, its log's last line."""
        if code == 0:
            return "done"
        if code == 3:
            return "unfinished"
        if code < 0:
            return f"killed by signal {-code}"
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-1]


def check_plan(tasks, options):
    """The tasks of a plan, each once. options: those given for all of them.

    Raises InputError for an option that sets what the plan sets, or that no task takes, and if runs on one dataset
    differ in more than their own arguments, since they could not stand in one figure.
    """
    tasks = list(dict.fromkeys(tasks))
    for option in (option for option in options if option.startswith("--")):
        if name_of(option) in {"resume", "overwrite", "out"}.union(*(task.own_names for task in tasks)):
            raise InputError(f"{option} is set for each run by the figure; choose runs with its own options (--help)")
        if not any(option in task.options for task in tasks):
            raise InputError(f"{option} is a setting of other methods; choose one of them, or leave it out")
    for dataset in dict.fromkeys(task.settings.dataset for task in tasks):
        chosen = [task for task in tasks if task.settings.dataset == dataset]
        if found := difference((task.method, task.method, vars(task.settings), task.own_names) for task in chosen):
            name, (one, value), (other, another) = found
            raise InputError(
                f"{name} is to be the same for all methods, but {one}'s is {value} and {other}'s is {another}; "
                f"give --{name.replace('_', '-')}, or set it alike in each script"
            )
    return tasks
