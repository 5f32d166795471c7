"""A run as a process of its own."""

import contextlib
import datetime
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from signal import SIGINT, SIGTERM

START = "\n--- "  # before the line that names a process in its log
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def environment(**changed):
    """This process's environment with the repository on Python's path."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path} | changed


def start(command, log, **changed):
    """Start a command; what it prints is appended to the file `log`. changed: variables of its environment."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.write(f"{START}{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(command)}\n")
        file.flush()
        # in a session of its own, so that Ctrl-C reaches it through this process alone
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(**changed),
            start_new_session=True,
        )  # fmt: skip


@contextlib.contextmanager
def signals_held():
    """Ctrl-C and SIGTERM wait for the end of this block, so that no process is started and then not known of."""
    caught = []
    handlers = {each: signal.signal(each, lambda number, _: caught.append(number)) for each in (SIGINT, SIGTERM)}
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler or signal.SIG_DFL)
        for number in caught:
            signal.raise_signal(number)


def stop(processes, patience=60):
    """SIGTERM, which the scripts end on cleanly; SIGKILL for what is still there after `patience` seconds."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
