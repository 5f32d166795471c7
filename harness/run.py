"""A run's folder: the epoch loop, what is saved of it, and the way back from there."""

import contextlib
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import weakref
from pathlib import Path

import torch
import torch.nn as nn
import torchvision
from tqdm import tqdm

from harness.command_line import settles_anyway
from harness.curves import curves_text, epoch_line, plot_curves
from harness.exits import InputError, TimeLimit, raise_dropped
from harness.files import LOCK, at_work, lock, read_checkpoint, read_settings, write_atomically

# Settings that may differ between a run and its continuation: they change where and how long, not what.
FREE_ON_RESUME = {"out", "resume", "overwrite", "max_minutes", "epochs", "device", "data_root", "quick"}
FREE_ON_RESUME |= {"channels_last", "cuda_graphs"}


class Run:
    """A run's folder: settings.json, curves.csv, curves.png, checkpoint.pt, and the way back from them.

    script: the script's name. what: what is trained, for the default folder's name. settings: the Namespace of
    every setting. Making a Run writes nothing; it raises InputError where the folder holds another run, or
    where --resume finds a damaged checkpoint or one of another experiment.
    """

    def __init__(self, script, what, settings, argv=None):
        self.started = time.monotonic()
        self.script, self.what, self.settings = script, what, settings
        start = ["-m", script] if "." in script else [f"{script}.py"]  # experiments are started as modules
        self.command = shlex.join(["python", *start, *(sys.argv[1:] if argv is None else argv)])
        generated = "" if settings.dataset == "cifar100" else f"{settings.dataset}-"
        name = script.rpartition(".")[2]
        self.directory = Path(settings.out or f"runs/{name}-{generated}{what}-seed{settings.seed}")
        self.checkpoint_path = self.directory / "checkpoint.pt"
        self.previous_path = self.directory / "checkpoint.previous.pt"
        self.settings_path = self.directory / "settings.json"
        self.curves_path = self.directory / "curves.csv"
        self.plot_path = self.directory / "curves.png"
        self.rows, self.checkpoint, self.damaged = [], None, None
        self.saved, self.unsaved = 0, None  # epochs in the checkpoint; a later one, and its checkpoint, if there is any
        self.next_save = self.next_plot = 0.0

        self.locked = False
        if self.directory.exists():
            self._take_folder()

    # --- the epoch loop ---

    def epochs(self, iterations, device, **parts):
        """Yield the number of each epoch still to run, 1 to settings.epochs; restores `parts` first on --resume.

        iterations: batches of an epoch, all passes together. parts: everything that a checkpoint holds: modules,
        optimizers and schedulers (anything with a state_dict), and torch.Generators. Whatever ends the loop in the
        midst of an epoch (Ctrl-C, SIGTERM, an error), the epochs finished before it are saved.
        """
        self.parts, self.device = parts, device
        if not self.locked:  # new when this Run was made; another process may have been there since
            self._make_folder()
            self._take_folder()
        if self.checkpoint is not None:
            self._restore()
        self.first, total = len(self.rows) + 1, self.settings.epochs
        self._open()
        self.session_started = time.monotonic()
        done = (self.first - 1) * iterations
        with tqdm(total=total * iterations, initial=done, disable=None, smoothing=0, dynamic_ncols=True) as self.bar:
            try:
                for epoch in range(self.first, total + 1):
                    self.epoch, self.epoch_started = epoch, time.monotonic()
                    self.bar.set_description(f"epoch {epoch}/{total}")
                    yield epoch
            finally:  # also where the loop's body raised: that closes this generator
                self._save_what_is_finished()
        final, best = self.rows[-1], max(self.rows, key=lambda row: row["test_primary_accuracy"])
        print(
            f"finished: test accuracy {100 * final['test_primary_accuracy']:.2f} % in the final epoch, {total}; "
            f"best {100 * best['test_primary_accuracy']:.2f} % in epoch {best['epoch']} (chosen on the test set); "
            f"settings.json, curves.csv, curves.png and checkpoint.pt are in {self.directory}",
            flush=True,
        )

    def end_epoch(self, row):
        """Keep the epoch, on the disk unless that was done a moment ago; then print it, and stop if time is up.

        row: the epoch's numbers by column. Raises InputError where one, or any weight, is not finite; the last
        checkpoint stays as it was.
        """
        row = {"epoch": self.epoch} | row
        bad = [name for name, value in row.items() if not math.isfinite(value)] or self._modules_not_finite()
        if bad:
            raise InputError(f"{', '.join(bad)}: NaN or infinite at the end of epoch {self.epoch}; {self.last_good()}")
        self.rows.append(row)
        now, left = time.monotonic(), self.settings.epochs - self.epoch
        out_of_time = left > 0 and self._seconds_left() < now - self.epoch_started
        self.unsaved = len(self.rows), self._checkpoint()
        if left == 0 or out_of_time or now > self.next_save:
            self._save()
        if left == 0 or time.monotonic() > self.next_plot:
            self._plot()

        eta = left * (time.monotonic() - self.session_started) / (self.epoch - self.first + 1)
        with tqdm.external_write_mode():
            print(epoch_line(row, self.settings.epochs, eta), flush=True)
        if out_of_time:
            raise TimeLimit(f"stopped after epoch {self.epoch}: the next would not end in time; {self.last_good()}")

    def meter(self, name):
        """A Meter for one pass over the training data; "train" makes columns train_... and seconds_train."""
        return Meter(self, name)

    def tick(self):
        """Count one batch; raises TimeLimit in the midst of an epoch that outlasts --max-minutes."""
        self.bar.update()
        raise_dropped()
        if self._seconds_left() < 0:
            raise TimeLimit(f"stopped in epoch {self.epoch}: the time is over; {self.last_good()}")

    def last_good(self):
        """Save what is finished; says in words what is saved."""
        self._save_what_is_finished()
        return f"saved up to epoch {self.saved}" if self.saved else "no epoch was finished, so nothing is saved yet"

    def _seconds_left(self):
        limit = self.settings.max_minutes
        return math.inf if limit is None else 60 * limit - (time.monotonic() - self.started)

    def _modules_not_finite(self):
        modules = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
        sums = [torch.stack([p.detach().sum() for p in module.parameters()]).sum() for module in modules.values()]
        return [f"a weight of {name}" for name, ok in zip(modules, torch.stack(sums).isfinite().tolist()) if not ok]

    # --- files ---

    def _make_folder(self):
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_writable(error) from None

    def _not_writable(self, error):
        return InputError(
            f"{self.directory} cannot be made or written ({error.strerror}); name another folder with --out"
        )

    def _take_folder(self):
        """Lock the folder and, on --resume, load its checkpoint; raises InputError where it is not to be had."""
        if not self.directory.is_dir():
            raise InputError(f"--out {self.directory} is a file; name a folder")
        if not self._is_taken() or at_work(self.directory):  # a folder that is refused gets no lock file
            try:
                self._lock()
            except OSError as error:
                raise self._not_writable(error) from None
        if self._is_taken():
            raise InputError(
                f"{self.directory} is there already and is not overwritten; "
                "continue it with --resume, replace it with --overwrite, or name another folder with --out"
            )
        if self.settings.resume:
            self.checkpoint = self._load_checkpoint()

    def _is_taken(self):
        wanted = self.settings.resume or self.settings.overwrite
        return not wanted and any(path.name != LOCK for path in self.directory.iterdir())

    def _lock(self):
        """Hold the folder for this Run, so that no second process writes there; raises InputError where one does."""
        for attempt in range(5):  # who only looks whether the folder is free holds the lock for an instant
            with contextlib.suppress(BlockingIOError):
                descriptor = lock(self.directory)
                if descriptor is not None:
                    weakref.finalize(self, os.close, descriptor)
                self.locked = True
                return
            time.sleep(0.05 * attempt)
        raise InputError(f"another run is at work in {self.directory}; wait for it, or name another folder with --out")

    def _described(self):
        """Every setting, as it stands in settings.json and in a checkpoint."""
        return {"script": self.script} | vars(self.settings)

    def _open(self):
        """Clear the folder of an earlier run, write settings.json and the curves so far, and say what is trained."""
        sessions = []
        if self.rows:
            if self.damaged:  # or it would take the place of the good one at the next save
                os.replace(self.damaged, self.directory / "checkpoint.damaged.pt")
            if len(self.rows) == self.settings.epochs:  # a kill may have come between the last checkpoint and these
                self._write_curves(self.rows)
                self._plot()
                return
            before = read_settings(self.settings_path).get("sessions")
            sessions = before if isinstance(before, list) else []
        else:
            try:
                for path in (self.checkpoint_path, self.previous_path, self.curves_path, self.plot_path):
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise self._not_writable(error) from None
        session = {"command": self.command} | environment(self.device)
        threads = f", {session['threads']} threads" if self.device.type == "cpu" else ""
        print(
            f"{self.script}: {self.what} classes of {self.settings.dataset}, seed {self.settings.seed}; on "
            f"{session['device_name']} ({self.device.type}{threads}), {self.settings.precision}; in {self.directory}",
            flush=True,
        )
        sessions.append({"after_epoch": len(self.rows)} | session)
        settings = self._described() | session | {"sessions": sessions}
        write_atomically(self.settings_path, json.dumps(settings, indent=2).encode())
        self._write_curves(self.rows)

    def _write_curves(self, rows):
        if rows:
            write_atomically(self.curves_path, curves_text(rows).encode())

    def _plot(self):
        start, image = time.monotonic(), io.BytesIO()
        try:
            plot_curves(self.rows, self.directory.name, image)
            write_atomically(self.plot_path, image.getvalue())
        except Exception as error:  # whatever ails matplotlib or the disk here, a picture must not stop a training
            print(f"warning: {self.plot_path} could not be drawn ({error}); training goes on", file=sys.stderr)
        self.next_plot = _seldom(start)

    def _checkpoint(self):
        """A checkpoint's bytes, of everything as it is now: out of reach of what comes next, a fault of the GPU too."""
        content = io.BytesIO()
        state = {
            "settings": self._described(),
            "rows": self.rows,
            "parts": {
                name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
                for name, part in self.parts.items()
            },
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        torch.save(state, content)
        return content.getbuffer()

    def _save(self):
        """Write the checkpoint, then the curves, so that these never have an epoch that cannot be resumed from."""
        start, (count, content) = time.monotonic(), self.unsaved
        try:
            write_atomically(self.checkpoint_path, content, keep_previous_as=self.previous_path)
        except InputError:
            self.unsaved = None  # not tried again on the way out
            raise
        self.saved, self.unsaved = count, None
        if self.saved == self.settings.epochs:
            self.previous_path.unlink(missing_ok=True)  # there for a run that goes on
        self._write_curves(self.rows[:count])
        self.next_save = _seldom(start)

    def _save_what_is_finished(self):
        if self.unsaved is not None:
            try:
                self._save()
            except InputError as error:  # what ended the training is to be said, too
                print(f"warning: {error}", file=sys.stderr)

    def _load_checkpoint(self):
        """The newest whole checkpoint of the folder, or None where none was written yet (and says so)."""
        start_anew = "start anew with --overwrite, or in another folder with --out"
        damaged = []
        for path in (self.checkpoint_path, self.previous_path):
            if not path.exists():
                continue
            checkpoint = read_checkpoint(path)
            if checkpoint is None:
                damaged.append(str(path))
                continue
            self._same_experiment(checkpoint["settings"], path)
            epoch = len(checkpoint["rows"])
            if epoch > self.settings.epochs:
                raise InputError(f"{path} has {epoch} epochs already; give --epochs {epoch} or more")
            if damaged:
                self.damaged = damaged[0]
                print(f"warning: {self.damaged} is damaged; {path} is used in its place", file=sys.stderr)
            print(f"resuming {self.directory} after epoch {epoch}", flush=True)
            return checkpoint
        if damaged:
            raise InputError(f"{' and '.join(damaged)}: damaged, and no whole checkpoint is left; {start_anew}")
        if self.curves_path.exists():
            raise InputError(f"{self.directory} has curves but no checkpoint to resume from; {start_anew}")
        if theirs := read_settings(self.settings_path):
            self._same_experiment(theirs, self.settings_path)
        print(f"no checkpoint was written in {self.directory} yet; starting from the beginning", flush=True)
        return None

    def _same_experiment(self, theirs, path):
        details = differences(self._described(), theirs)
        if details:
            raise InputError(
                f"{path} is of another experiment ({details}); give its settings, or another folder with --out"
            )

    def _restore(self):
        try:
            for name, part in self.parts.items():
                state = self.checkpoint["parts"][name]
                part.set_state(state) if isinstance(part, torch.Generator) else part.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"the checkpoint in {self.directory} does not fit this code ({str(error).splitlines()[0]}); "
                "resume with the code that wrote it, or name another folder with --out"
            ) from None
        torch.set_rng_state(self.checkpoint["torch_rng"])
        if self.checkpoint["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(self.checkpoint["cuda_rng"], self.device)
        self.rows = self.checkpoint["rows"]
        self.saved = len(self.rows)


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
        """The means by column name, over the steps that had it, and the pass's seconds.

        Raises InputError where a number was not finite. This is where the host waits for the device, once a pass.
        """
        values, columns = iter(torch.cat(self.values).tolist()), {}
        for iteration, names in enumerate(self.names, start=1):
            for name, value in zip(names, values):
                if not math.isfinite(value):
                    raise InputError(
                        f"{name} became NaN or infinite in epoch {self.run.epoch}, iteration {iteration} "
                        f"of the {self.name} pass; {self.run.last_good()}; a smaller learning rate may help"
                    )
                columns.setdefault(name, []).append(value)
        means = {f"{self.name}_{name}": math.fsum(values) / len(values) for name, values in columns.items()}
        return means | {f"seconds_{self.name}": time.perf_counter() - self.start}


def _seldom(start):
    """When to do again what began at `start` and ends now, for it to take at most 5 % of the time."""
    now = time.monotonic()
    return now + 20 * (now - start)


def differences(ours, theirs):
    """What makes two runs different experiments, in words; empty where one may continue the other."""
    free = FREE_ON_RESUME | ({"settle_statistics"} if settles_anyway(theirs) else set())
    # off, and not there yet in an older run, are the same
    differ = [name for name in ours if name not in free and (ours[name] or None) != (theirs.get(name) or None)]
    return "; ".join(f"{name} was {theirs.get(name)}, now {ours[name]}" for name in differ)


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
    """The CPU's model name where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
