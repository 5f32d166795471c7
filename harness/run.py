"""A run: the loop over its epochs, what is saved of them and when, the averages of a pass, the time limit."""

import contextlib
import copy
import io
import math
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torchvision
from tqdm import tqdm

from harness.command_line import flag, show
from harness.curves import epoch_line, plot_curves
from harness.exits import InputError, TimeLimit
from harness.files import write_atomically
from harness.folder import Folder, default_folder, refuse_other


class Run:
    """The loop over the epochs of a script, saved in a Folder.

    script: "model_vgg_maxl", or with dots, "experiments.methods.uniform", if it is started with python -m. settings:
    the Namespace of every setting. argv: the arguments for settings.json, by default the process's. Making a Run
    writes nothing; raises InputError as Folder does.
    """

    def __init__(self, script, settings, argv=None):
        self.started = time.monotonic()
        self.script, self.settings = script, settings
        start = ["-m", script] if "." in script else [f"{script}.py"]
        self.command = shlex.join(["python", *start, *(sys.argv[1:] if argv is None else map(str, argv))])
        path = Path(settings.out) if settings.out else default_folder(script, settings)
        self.folder = Folder(path, {"script": script} | vars(settings))
        self.rows, self.saved = [], 0  # of all finished epochs; how many of them are in the checkpoint
        self.unsaved = None  # the state after the last finished epoch, if it is not in the checkpoint
        self.next_save = self.next_plot = 0.0

    def epochs(self, iterations, device, parts):
        """Yield the number of each epoch still to run, 1 to settings.epochs; first restores `parts` with --resume.

        iterations: batches of an epoch, all passes together. parts: everything that a checkpoint holds, by name:
        modules, optimizers and schedulers (anything with a state_dict), and torch.Generators. Whatever ends the loop
        in the midst of an epoch (Ctrl-C, SIGTERM, an error), the epochs finished before it are saved.
        """
        self.parts, self.device = parts, device
        self.part_types = {name: type_name(part) for name, part in parts.items()}
        self.folder.take()
        if self.folder.checkpoint is not None:
            self._restore(self.folder.checkpoint)
        self.first, total = len(self.rows) + 1, self.settings.epochs
        if self.first > total:  # a kill may have come between the last checkpoint and these
            self.folder.write_curves(self.rows)
            self._plot()
        else:
            session = {"command": self.command, "part_types": self.part_types} | environment(device)
            self.folder.begin(self.rows, session)
            print(self._opening_lines(session), flush=True)
        self.session_started = time.monotonic()
        done = len(self.rows) * iterations
        with tqdm(total=total * iterations, initial=done, disable=None, smoothing=0, dynamic_ncols=True) as self.bar:
            try:
                for epoch in range(self.first, total + 1):
                    self.epoch, self.epoch_started = epoch, time.monotonic()
                    self.bar.set_description(f"epoch {epoch}/{total}")
                    yield epoch
            finally:  # also if the loop's body raised, which closes this generator
                self._save_what_is_finished()
        print(self._closing_line(), flush=True)

    def end_epoch(self, row):
        """Finish the epoch: keep its state, save it unless that was done a moment ago, print it, stop if time is up.

        row: the epoch's numbers by column of curves.csv. Raises InputError if one of them, or a weight, is not finite;
        the last checkpoint then stays as it was.
        """
        row = {"epoch": self.epoch} | row
        bad = [name for name, value in row.items() if not math.isfinite(value)] or self._modules_not_finite()
        if bad:
            raise InputError(f"{', '.join(bad)}: NaN or infinite at the end of epoch {self.epoch}; {self.save_now()}")
        self.rows.append(row)
        now, left = time.monotonic(), self.settings.epochs - self.epoch
        out_of_time = left > 0 and self._seconds_left() < now - self.epoch_started
        self.unsaved = self._state()
        if left == 0 or out_of_time or now > self.next_save:
            self._save()
        if left == 0 or time.monotonic() > self.next_plot:
            self._plot()

        eta = left * (time.monotonic() - self.session_started) / (self.epoch - self.first + 1)
        with tqdm.external_write_mode():
            print(epoch_line(row, self.settings.epochs, eta), flush=True)
        if out_of_time:
            raise TimeLimit(f"stopped after epoch {self.epoch}: the next would not end in time; {self.save_now()}")

    def meter(self, name):
        """A Meter for one pass over the training data; "train" makes columns train_... and seconds_train."""
        return Meter(self, name)

    def tick(self):
        """Count one batch; raises TimeLimit in an epoch that outlasts --max-minutes."""
        self.bar.update()
        if self._seconds_left() < 0:
            raise TimeLimit(f"stopped in epoch {self.epoch}: the time is over; {self.save_now()}")

    def save_now(self):
        """Save what is finished; returns in words what is saved."""
        self._save_what_is_finished()
        return f"saved up to epoch {self.saved}" if self.saved else "no epoch was finished, so nothing is saved yet"

    def _opening_lines(self, session):
        names = ("primary_level", "auxiliary_level", "psi", "variant", "control", "backbone", "seed")
        values = {name: getattr(self.settings, name, None) for name in names}
        what = "".join(f", {name.replace('_', ' ')} {show(v)}" for name, v in values.items() if v is not None)
        threads = f", {session['threads']} threads" if self.device.type == "cpu" else ""
        where = f"{session['device_name']} ({self.device.type}{threads}), {self.settings.precision}"
        line = f"{self.script}: {self.settings.dataset}{what}; on {where}; in {self.folder.path}"
        if self.settings.quick:
            replaced = (
                f"{flag(name)} {getattr(self.settings, name)} (the script has {value or 'all'})"
                for name, value in self.settings.quick.items()
            )
            line += f"\n--quick: {', '.join(replaced)}"
        return line

    def _closing_line(self):
        tested = [(row["test_primary_accuracy"], row["epoch"]) for row in self.rows if "test_primary_accuracy" in row]
        line = "finished: "
        if tested:
            (final, last), (best, epoch) = tested[-1], max(tested, key=lambda pair: pair[0])
            line += f"test accuracy {100 * final:.2f} % in the final epoch, {last}; "
            line += f"best {100 * best:.2f} % in epoch {epoch} (chosen on the test set); "
        return line + f"settings.json, curves.csv, curves.png and checkpoint.pt are in {self.folder.path}"

    def _seconds_left(self):
        limit = self.settings.max_minutes
        return math.inf if limit is None else 60 * limit - (time.monotonic() - self.started)

    def _modules_not_finite(self):
        modules = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
        sums = {
            name: sum(t.detach().sum() for t in module.state_dict().values() if t.is_floating_point())
            for name, module in modules.items()
        }
        return [f"a weight or statistic of {name}" for name, total in sums.items() if not math.isfinite(total)]

    def _state(self):
        """A checkpoint of everything as it is now, in copies on the CPU: neither training nor a GPU fault reach it."""
        return copied_to_cpu({
            "settings": self.folder.settings,
            "rows": self.rows,
            "part_types": self.part_types,
            "parts": {
                name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
                for name, part in self.parts.items()
            },
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        })  # fmt: skip

    def _save(self):
        start, state = time.monotonic(), self.unsaved
        try:
            self.folder.save(state)
        except InputError:
            self.unsaved = None  # not tried again on the way out
            raise
        self.unsaved, self.saved = None, len(state["rows"])
        self.next_save = earliest_repetition(start)

    def _save_what_is_finished(self):
        if self.unsaved is not None:
            try:
                self._save()
            except InputError as error:  # must not hide what ended the training
                print(f"warning: {error}", file=sys.stderr)

    def _restore(self, checkpoint):
        theirs = checkpoint["part_types"]
        ours = dict.fromkeys(theirs, "not there") | self.part_types
        refuse_other(ours, theirs, f"the checkpoint in {self.folder.path}")
        try:
            for name, part in self.parts.items():
                state = checkpoint["parts"][name]
                part.set_state(state) if isinstance(part, torch.Generator) else part.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"the checkpoint in {self.folder.path} does not fit this code ({str(error).splitlines()[0]}); "
                "resume with the code that wrote it, or name another folder with --out"
            ) from None
        torch.set_rng_state(checkpoint["torch_rng"])
        if checkpoint["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], self.device)
        self.rows = checkpoint["rows"]
        self.saved = len(self.rows)

    def _plot(self):
        start, image, path = time.monotonic(), io.BytesIO(), self.folder.plot_path
        try:
            plot_curves(self.rows, self.folder.path.name, image)
            write_atomically(path, image.getvalue())
        except Exception as error:  # whatever fails in matplotlib or on the disk, a picture must not stop a training
            print(f"warning: {path} could not be drawn ({error}); training goes on", file=sys.stderr)
        self.next_plot = earliest_repetition(start)


class Meter:
    """Averages over one pass of the numbers that its steps return, kept on the device until the pass ends."""

    def __init__(self, run, name):
        self.run, self.name, self.names, self.values = run, name, [], []
        self.start = time.perf_counter()

    def add(self, metrics):
        """Add one step's numbers: 0-d tensors by name. Not every step need have the same."""
        self.names.append(list(metrics))
        self.values.append(torch.stack(list(metrics.values())))
        self.run.tick()

    def averages(self):
        """The means by column name, over the steps that had the number, and the pass's seconds.

        Raises InputError if a number is not finite. This is where the host waits for the device, once a pass.
        """
        values, columns = iter(torch.cat(self.values).tolist()), {}
        for iteration, names in enumerate(self.names, start=1):
            for name, value in zip(names, values):
                if not math.isfinite(value):
                    raise InputError(
                        f"{name} became NaN or infinite in epoch {self.run.epoch}, iteration {iteration} "
                        f"of the {self.name} pass; {self.run.save_now()}; a smaller learning rate may help"
                    )
                columns.setdefault(name, []).append(value)
        means = {f"{self.name}_{name}": math.fsum(values) / len(values) for name, values in columns.items()}
        return means | {f"seconds_{self.name}": time.perf_counter() - self.start}


def type_name(part):
    """The class of a part of a checkpoint, and what else must not change: of a network the trunk's class, of an
    optimizer and a schedule its constants. "SGD with momentum 0.9", "Network on VGG16"."""
    name, trunk = type(part).__name__, getattr(part, "trunk", None)
    if trunk is not None:
        return f"{name} on {type(trunk).__name__}"
    if isinstance(part, torch.optim.Optimizer):
        constants = {key: value for key, value in part.defaults.items() if key != "lr" and value}
    elif isinstance(part, torch.optim.lr_scheduler.LRScheduler):
        constants = {key: value for key, value in part.state_dict().items() if key in ("step_size", "gamma", "T_max")}
    else:
        return name
    return name + (f" with {', '.join(f'{key} {value}' for key, value in constants.items())}" if constants else "")


def copied_to_cpu(value):
    """The same nested dicts, lists and tuples, with a copy on the CPU of each tensor."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # a state_dict has attributes, too
        copied.update((name, copied_to_cpu(item)) for name, item in value.items())
        return copied
    if type(value) in (list, tuple):
        return type(value)(map(copied_to_cpu, value))
    return value


def earliest_repetition(start):
    """When to repeat what began at `start` and ends now, so that it takes at most 5 % of the time."""
    now = time.monotonic()
    return now + 20 * (now - start)


def environment(device):
    """Where a run takes place: git commit (None outside a repository, "-dirty" if changed), versions, device."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    git += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "git_commit": commit,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "torchvision_version": torchvision.__version__,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def processor_name():
    """The CPU's model name if the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
