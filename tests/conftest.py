"""Shared by the tests: tiny runs of the real scripts, in this process or in one of their own."""

import csv
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import create_dataset
import model_vgg_human
import model_vgg_maxl
import model_vgg_single
from harness import exits, run

# Several tests at once, or a test and its subprocess, would fight for the cores with more threads than there are;
# and results to the bit need the same number of threads in every process.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = {"model_vgg_single": model_vgg_single, "model_vgg_human": model_vgg_human, "model_vgg_maxl": model_vgg_maxl}
TINY = ["--dataset", "synthetic", "--width", "0.02", "--train-images", "300", "--batch-size", "50", "--epochs", "3"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Every test starts in a folder of its own, so default paths (runs/, dataset/) touch nothing real."""
    monkeypatch.chdir(tmp_path)


generate_once = functools.cache(create_dataset.make_synthetic)


def run_script(name, *arguments):
    """main() of a script under exits.run_main, as its __main__ block has it; returns the exit code.

    The synthetic images are generated once for all runs of this process, to save time.
    """
    with mock.patch.object(create_dataset, "make_synthetic", generate_once):
        return exits.run_main(SCRIPTS[name].main, [str(a) for a in arguments])


def script_process(name, *arguments, **options):
    """The script as a person starts it, in a process of its own, output piped."""
    command = [sys.executable, str(REPOSITORY / f"{name}.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A test run in the background ignores Ctrl-C, and what it starts would inherit that.
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **(pipes | options))


def curves(directory, with_seconds=False):
    """The rows of curves.csv as text, without the columns of seconds, which no two runs share."""
    with open(Path(directory) / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if with_seconds or not k.startswith("seconds_")} for row in rows]


def flatten(value, prefix=""):
    """A nested checkpoint as {path: leaf}."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flatten(item, f"{prefix}/{key}").items()}
    return {prefix: value}


def assert_same_run(directory, other):
    """Curves and everything in the checkpoint are the same to the last bit (but for seconds and run control)."""
    assert curves(directory) == curves(other)
    checkpoints = [torch.load(Path(d) / "checkpoint.pt", weights_only=True) for d in (directory, other)]
    ours, theirs = ({k: v for k, v in flatten(c).items() if "/seconds_" not in k} for c in checkpoints)
    free = {f"/settings/{name}" for name in run.FREE_ON_RESUME}
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - free:
        same = torch.equal(ours[name], theirs[name]) if torch.is_tensor(ours[name]) else ours[name] == theirs[name]
        assert same, name
