"""The runner of experiments/ as the tests of it use it: its plan, a process of its own, and waiting for one."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY

from experiments import pairs as cifar100

FEW = ["--pairs", "3-10", "--seeds", "0", "--out", "r", *TINY]


def plan(root, pairs=tuple(cifar100.PAIRS), methods=tuple(cifar100.FIVE), seeds=(0, 1, 2), options=()):
    return cifar100.plan(argparse.Namespace(out=Path(root), pairs=pairs, methods=methods, seeds=seeds), options)


def runner(*arguments):
    """The runner as a person starts it; its own process."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.figure3", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def children(process):
    """Process ids of its living children (Linux)."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return []


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
