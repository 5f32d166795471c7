"""Files of a run that survive a crash: atomic writes, the lock of a folder, reading what may be damaged."""

import contextlib
import json
import os
import zipfile

import torch

from harness.exits import InputError, is_out_of_memory

LOCK = ".lock"


def lock(directory, create=True):
    """Lock a folder for this process: a descriptor to close, None where there are no such locks.

    The lock is on a file in it, since on NFS one on the folder itself would not be seen from other machines. Raises
    BlockingIOError where another process holds it, another OSError where the file cannot be opened.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(directory / LOCK, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def at_work(directory):
    """Whether a process holds the folder's lock."""
    try:
        descriptor = lock(directory, create=False)
    except BlockingIOError:
        return True
    except OSError:  # none was ever locked, or the file is another user's
        return False
    if descriptor is not None:
        os.close(descriptor)
    return False


def read_checkpoint(path):
    """The content of a checkpoint file, on the CPU.

    Raises InputError if it is damaged or not of these scripts, and as ever what says nothing about the file: that there
    is no memory for it, or an OSError of the disk.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums, zipfile does
            if archive.testzip() is not None:
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not {"settings", "rows", "parts", "torch_rng", "cuda_rng"} <= checkpoint.keys():
            raise ValueError
        return checkpoint
    except Exception as error:  # whatever a damaged file makes of zipfile, pickle and torch
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise InputError(
            f"{path} is damaged; run it anew with --overwrite, or in another folder with --out"
        ) from None


def read_settings(path):
    """The dict in a settings.json; an empty one where there is none that can be read."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def write_atomically(path, content):
    """Write bytes to `path` so that a crash leaves the old or the new file, never half of one.

    Raises InputError where the disk is full or the folder cannot be written; the old file stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"{path} could not be written ({error.strerror}); what was saved before is kept; "
            "make room and go on with --resume, or name another folder with --out"
        ) from None
