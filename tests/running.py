"""What the tests of experiments/ share: made-up runs, the plan of Figure 3, its runner as a process of its own."""

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY

from experiments import pairs

FEW = ["--pairs", "3-10", "--seeds", "0", "--out", "r", *TINY]
ALIKE = {"dataset": "cifar100", "width": 1.0, "batch_size": 100, "learning_rate": 0.01, "device_name": "a device"}


def made_up_run(name, accuracies=None, epochs=None, seconds=60.0, columns=None, **settings):
    """The folder r/NAME with settings.json and the given columns of curves.csv; accuracies: of the test."""
    folder = Path("r") / name
    folder.mkdir(parents=True)
    columns = {} if columns is None else dict(columns)
    if accuracies is not None:
        columns["test_primary_accuracy"] = accuracies
    length = len(next(iter(columns.values())))
    (folder / "settings.json").write_text(json.dumps(ALIKE | {"epochs": epochs or length} | settings))
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *columns, "seconds_train"])
        writer.writerows(zip(range(1, length + 1), *columns.values(), [seconds] * length))


def rows_of(name):
    """The rows of r/NAME.csv."""
    with open(f"r/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def plan(root, shown=tuple(pairs.PAIRS), methods=tuple(pairs.FIVE), seeds=(0, 1, 2), options=()):
    return pairs.plan(argparse.Namespace(out=Path(root), pairs=shown, methods=methods, seeds=seeds), options)


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
