"""What the runner sees to before the first run starts, and what it says of runs that failed."""

import argparse
import shutil
import signal
from pathlib import Path

import pytest
from conftest import TINY

import create_dataset
from experiments import figure3, table1
from experiments import pairs as cifar100
from experiments.runner import here, process, ready
from harness import downloads, exits

FEW = ["--pairs", "3-10", "--seeds", "0", "--methods", "single", "human", "--out", "r"]


def tasks(*options, methods=("single",), pairs=("3-10",)):
    settings = argparse.Namespace(out=Path("r"), pairs=pairs, methods=methods, seeds=[0])
    return cifar100.plan(settings, [*TINY, *options])


# --- the data -------------------------------------------------------------------------------------------


def test_the_data_is_fetched_once_before_the_first_run_starts(monkeypatch):
    happened = []
    monkeypatch.setattr(create_dataset, "load_cifar100", lambda root: happened.append(f"data in {root}"))
    monkeypatch.setattr(process, "start", lambda command, log, **changed: happened.append("run") or Done())
    monkeypatch.setattr(here.time, "sleep", lambda seconds: None)
    exits.run_main(figure3.experiment.main, [*FEW, "--jobs", "2", "--data-root", "d"])
    assert happened == ["data in d", "run", "run"]


class Done:
    """A process that has ended well."""

    def poll(self):
        return 0


def test_where_the_data_is_not_to_be_had_no_run_starts(monkeypatch, capsys):
    def no_network(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(downloads, "download_and_extract_archive", no_network)
    assert exits.run_main(figure3.experiment.main, [*FEW, "--jobs", "2", "--data-root", "d"]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: CIFAR-100 is not in d") and error.count("\n") == 1 and out == ""
    assert not Path("r").exists()


def test_all_datasets_that_are_not_to_be_had_are_named_at_once(capsys):
    parts = ["--datasets", "imagenet32", "synthetic", "cinic10", "--seeds", "0", "--data-root", "d", "--out", "r"]
    assert exits.run_main(table1.experiment.main, parts) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("error: d/ImageNet32 lacks") and second.startswith("d/CINIC-10 is not there")
    assert third == "What is there can be run without the rest: --datasets synthetic"
    assert not Path("r").exists()


# --- the disk -------------------------------------------------------------------------------------------


def test_a_disk_too_small_for_what_the_runs_leave_is_named(monkeypatch, capsys):
    plan = tasks("--width", "1.0", methods=("maxl", "single"))
    needed = ready.room_needed(plan, 1)
    assert 390e6 < needed < 440e6  # 117 MiB and 57 MiB, and two more of MAXL's while it is at work
    usage = shutil.disk_usage(".")
    for free, warned in ((needed - 1, True), (needed + 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage._replace(free=free))
        ready.get_ready(plan, 1)
        error = capsys.readouterr().err
        assert ("warning: the 2 runs to come will leave about 0.4 GiB in r" in error) == warned


def test_figure_3_leaves_what_readme_says():
    settings = argparse.Namespace(out=Path("r"), pairs=cifar100.PAIRS, methods=cifar100.FIVE, seeds=[0, 1, 2])
    plan = cifar100.plan(settings)
    assert sum(map(ready.checkpoint_bytes, plan)) / 2**30 == pytest.approx(5.6, abs=0.1)


# --- what is said of runs that failed ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "printed, code, state, outcome",
    [
        ("epoch 1/3 | ...\nerror: out of memory (x)", 2, "failed", "error: out of memory (x)"),
        ("Traceback (most recent call last):\n  File x\nKeyError: 'y'", 1, "failed", "KeyError: 'y'"),
        ("epoch 1/3 | ...", -9, "failed", "killed by signal 9"),
        ("epoch 1/3 | ...\nstopped after epoch 1: the next would not end in time", 3, "not begun", "unfinished"),
        (
            "epoch 1/3 | ...\n\nstopped by SIGTERM; --resume goes on",
            143,
            "not begun",
            "stopped by SIGTERM; --resume goes on",
        ),
    ],
)
def test_the_status_says_why_a_run_failed(printed, code, state, outcome, capsys):
    (task,) = tasks()
    task.log.parent.mkdir(parents=True)
    with open(task.log, "w") as log:
        log.write(f"{process.START}an earlier start\nerror: of an earlier start\n")
        log.write(f"{process.START}2026-01-01 00:00:00 python model_vgg_single.py\n{printed}\n")
    assert task.outcome(code) == outcome
    assert exits.run_main(figure3.experiment.main, [*FEW, "--methods", "single", *TINY, "--status"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"single-3-seed0           {state}")
    assert (outcome in line) == (state == "failed")
    assert "earlier start" not in line


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_while_a_run_is_started_is_heeded_once_the_run_is_known_of(number, code):
    known, before = [], signal.getsignal(number)

    def start(argv):
        with process.signals_held():
            signal.raise_signal(number)
            known.append("a run")
        known.append("too late")

    assert exits.run_main(start) == code
    assert known == ["a run"] and signal.getsignal(number) == before
