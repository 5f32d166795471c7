"""A run's folder: lock, settings.json, checkpoint.pt, curves.csv; what makes two runs the same experiment."""

import contextlib
import hashlib
import io
import json
import os
import re
import time
import weakref
from pathlib import Path

import torch

from harness.command_line import FREE_ON_RESUME, format_psi, show
from harness.curves import curves_text
from harness.exits import InputError
from harness.files import LOCK, lock, read_checkpoint, read_settings, write_atomically

START_ANEW = "start anew with --overwrite, or in another folder with --out"


def default_folder(script, settings):
    """runs/<script>-<dataset>-<classes or ψ>-seed<seed>. Runs with different levels or ψ never share a folder."""
    values = vars(settings)
    names = [script.rpartition(".")[2]]
    if settings.dataset != "cifar100":
        names.append(settings.dataset)
    names += [values[name] for name in ("backbone", "variant", "control") if values.get(name)]
    if "psi" in values:
        psi = re.sub(r"(\d+)\*(\d+)", r"\2x\1", format_psi(settings.psi))  # * is not for names of files
        if len(psi) > 24:
            psi = f"{len(settings.psi)}-{sum(settings.psi)}-{hashlib.sha256(psi.encode()).hexdigest()[:8]}"
        names.append(psi)
    else:
        levels = (values[name] for name in ("primary_level", "auxiliary_level") if name in values)
        names += [str((3, 10, 20, 100)[level]) for level in levels]
    return Path("runs", "-".join([*names, f"seed{settings.seed}"]))


def differences(ours, theirs):
    """What makes two runs different experiments, in words; empty if one may continue the other.

    Both: settings by name, and `script`. Compared is what is in `ours`, all but FREE_ON_RESUME.
    """
    unset = object()
    differ = [name for name in ours if name not in FREE_ON_RESUME and ours[name] != theirs.get(name, unset)]
    return "; ".join(f"{name} was {show(theirs.get(name, 'not set'))}, now {show(ours[name])}" for name in differ)


def refuse_other(ours, theirs, path):
    """Raise InputError if `theirs`, which stands in `path`, has differences from `ours`."""
    if details := differences(ours, theirs):
        raise InputError(
            f"{path} is of another experiment ({details}); give its settings, or another folder with --out"
        )


class Folder:
    """The files of a run. `path`: the folder. `checkpoint`: what --resume goes on from, or None.

    settings: every setting by name, and `script`. Making a Folder writes nothing. It raises InputError if the folder
    holds another run, or if --resume finds a damaged checkpoint or one of another experiment.
    """

    def __init__(self, path, settings):
        self.path, self.settings = path, settings
        self.checkpoint_path, self.settings_path = path / "checkpoint.pt", path / "settings.json"
        self.curves_path, self.plot_path = path / "curves.csv", path / "curves.png"
        self.checkpoint, self.locked, self.descriptor = None, False, None
        if path.exists():
            self._take()

    def take(self):
        """Make and lock the folder if it was not there when this Folder was made. Another process may be there now."""
        if not self.locked:
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
            self._take()

    def begin(self, rows, session):
        """Write settings.json, with one more session. A run without rows first deletes what is left of an earlier one.

        rows: of the epochs so far. session: where and how the run goes on, a dict.
        """
        sessions = []
        if rows:
            before = read_settings(self.settings_path).get("sessions")
            sessions = before if isinstance(before, list) else []
        else:
            with self._writing():
                for path in (self.checkpoint_path, self.curves_path, self.plot_path):
                    path.unlink(missing_ok=True)
        sessions.append({"after_epoch": len(rows)} | session)
        settings = self.settings | session | {"sessions": sessions}
        write_atomically(self.settings_path, json.dumps(settings, indent=2).encode())
        self.write_curves(rows)

    def save(self, state):
        """Write a checkpoint, then the curves, so that these never have an epoch that cannot be resumed from.

        state: as Run makes it. Raises InputError if the disk is full; the earlier checkpoint stays.
        """
        self._require_the_locked_folder()
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(self.checkpoint_path, content.getbuffer())
        self.write_curves(state["rows"])

    def write_curves(self, rows):
        """Write curves.csv, if there are rows."""
        if rows:
            write_atomically(self.curves_path, curves_text(rows).encode())

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be made or written ({error.strerror}); name another folder with --out"
            ) from None

    def _take(self):
        """Lock the folder and, with --resume, load its checkpoint; raises InputError if it is not for this run."""
        if not self.path.is_dir():
            raise InputError(f"--out {self.path} is a file; name a folder")
        self._refuse_if_taken()  # before a lock file is made in it
        self._lock()
        self._refuse_if_taken()  # another process may have run there meanwhile
        if self.settings["resume"]:
            self.checkpoint = self._load()

    def _refuse_if_taken(self):
        wanted = self.settings["resume"] or self.settings["overwrite"]
        if not wanted and any(path.name != LOCK for path in self.path.iterdir()):
            raise InputError(
                f"{self.path} is there already and is not overwritten; "
                "continue it with --resume, replace it with --overwrite, or name another folder with --out"
            )

    def _lock(self):
        """Hold the folder for this Folder, so that no second process writes there; raises InputError if one does."""
        for attempt in range(5):  # a process that only looks whether the folder is free holds the lock for an instant
            with self._writing(), contextlib.suppress(BlockingIOError):
                self.descriptor = lock(self.path)
                if self.descriptor is not None:
                    weakref.finalize(self, os.close, self.descriptor)
                self.locked = True
                return
            time.sleep(0.05 * attempt)
        raise InputError(f"another run is at work in {self.path}; wait for it, or name another folder with --out")

    def _require_the_locked_folder(self):
        """Raise InputError if the folder was removed or replaced meanwhile: another run may be at work there now."""
        if self.descriptor is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.descriptor), os.stat(self.path / LOCK)):
                return
        raise InputError(f"{self.path} was removed or replaced while this run was at work in it; nothing more is saved")

    def _load(self):
        """The checkpoint, or None if none was written yet (and says so)."""
        if self.checkpoint_path.exists():
            checkpoint = read_checkpoint(self.checkpoint_path)
            if "part_types" not in checkpoint:
                raise InputError(f"{self.checkpoint_path} is of an earlier version of this code; {START_ANEW}")
            refuse_other(self.settings, checkpoint["settings"], self.checkpoint_path)
            epoch = len(checkpoint["rows"])
            if epoch > self.settings["epochs"]:
                raise InputError(f"{self.checkpoint_path} has {epoch} epochs already; give --epochs {epoch} or more")
            print(f"resuming {self.path} after epoch {epoch}", flush=True)
            return checkpoint
        if self.curves_path.exists():
            raise InputError(f"{self.path} has curves but no checkpoint to resume from; {START_ANEW}")
        if theirs := read_settings(self.settings_path):
            refuse_other(self.settings, theirs, self.settings_path)
        elif any(path.name != LOCK and path.suffix != ".tmp" for path in self.path.iterdir()):
            raise InputError(f"{self.path} holds other files and no run to resume; name the run's folder with --out")
        print(f"no checkpoint was written in {self.path} yet; starting from the beginning", flush=True)
        return None
