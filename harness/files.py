"""Files of a run that survive a crash: atomic writes, the lock of a folder, reading what may be damaged."""

import contextlib
import json
import os
import zipfile

import torch

from harness.exits import InputError


def lock(directory):
    """Lock a folder for this process: a descriptor to close, None where there are no such locks.

    Raises BlockingIOError where another process holds it.
    """
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except (ImportError, OSError) as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None


def at_work(directory):
    """Whether a process holds the folder's lock."""
    try:
        descriptor = lock(directory)
    except BlockingIOError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


def read_checkpoint(path):
    """The content of a checkpoint file, on the CPU; None where it is damaged, half written or not of these scripts."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums, zipfile does
            if archive.testzip() is not None:
                return None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"settings": dict, "rows": list, "parts": dict, "torch_rng": torch.Tensor}
        whole = all(isinstance(checkpoint[name], kind) for name, kind in kinds.items()) and "cuda_rng" in checkpoint
        return checkpoint if whole else None
    except PermissionError:
        raise
    except Exception:  # whatever a damaged file makes of zipfile, pickle and torch
        return None


def read_settings(path):
    """The dict in a settings.json; an empty one where there is none that can be read."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def write_atomically(path, content, keep_previous_as=None):
    """Write bytes to `path` so that a crash leaves the old or the new file, never half of one.

    Raises InputError where the disk is full or the folder cannot be written; the old file stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous_as and path.exists():
            os.replace(path, keep_previous_as)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"{path} could not be written ({error.strerror}); what was saved before is kept; "
            "make room and go on with --resume, or name another folder with --out"
        ) from None
