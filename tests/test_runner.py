"""The runner of experiments/ at work: runs side by side, failed, killed, stopped and continued; on Figure 3."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_run, curves, forked, run_script
from running import FEW, children, needs_proc, plan, runner, wait_for

from experiments import figure3, generalisation
from experiments.runner import here
from experiments.runner import process as runs_process
from harness import exits, files


def forked_runner(*arguments):
    """The same in a copy of this process."""

    def start():
        sys.argv = ["figure3", *map(str, arguments)]
        return figure3.experiment()

    return forked(start)


class ForkedRun:
    """The Popen of a run's command, in a copy of this process."""

    def __init__(self, command, stdout, **options):
        module, *arguments = command[2:] if command[1] == "-m" else (Path(command[1]).stem, *command[2:])
        log = open(os.dup(stdout.fileno()), "a", buffering=1)
        self.process = forked(exits.run_main, importlib.import_module(module).main, arguments, log=log)
        log.close()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("run", timeout)

    def terminate(self):
        self.process.terminate()

    def kill(self):
        self.process.kill()


@pytest.fixture
def forked_runs(spared, monkeypatch):
    """The runner's runs are copies of this process, but for those of the methods in the list that this is."""
    as_ever = []

    def start(command, **options):
        as_it_is = any(method in argument for argument in command[:3] for method in as_ever)
        return (subprocess.Popen if as_it_is else ForkedRun)(command, **options)

    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    monkeypatch.setattr(runs_process, "subprocess", types.SimpleNamespace(Popen=start, **names))
    return as_ever


@pytest.mark.slow
def test_the_runner_runs_all_methods_skips_what_is_done_and_draws(forked_runs, capsys):
    """A script and a module of experiments/ are started as ever, in a Python of their own."""
    forked_runs += ["model_vgg_maxl", "methods.kmeans"]
    few = [*TINY, "--epochs", "2"]
    command = [*FEW, *few, "--jobs", "2"]
    assert exits.run_main(figure3.experiment.main, command) == 0
    out, error = capsys.readouterr()
    assert error == "" and out.count(": done") == 5
    for task in plan("r", ["3-10"], seeds=[0], options=few):
        assert task.state() == "done" and len(curves(task.folder)) == 2
    rows = list(csv.DictReader(open("r/figure3.csv", newline="")))
    assert [row["method"] for row in rows] == ["Single", "Random", "K-Means", "Human", "MAXL"]
    final = 100 * float(curves("r/maxl-3-10-seed0")[-1]["test_primary_accuracy"])
    assert float(rows[-1]["final_mean"]) == pytest.approx(final)
    logs = {path: path.read_text() for path in Path("r/logs").iterdir()}
    (task,) = plan("by-hand", ["3-10"], ["maxl"], [0], few)
    assert run_script("model_vgg_maxl", *task.arguments, test_images=2000) == 0  # what a person would type
    assert_same_run("r/maxl-3-10-seed0", "by-hand/maxl-3-10-seed0")

    Path("r/maxl-3-10-seed0/curves.csv").unlink()  # as a kill between checkpoint and curves leaves it
    capsys.readouterr()
    forked_runs.clear()
    assert exits.run_main(figure3.experiment.main, command) == 0
    out = capsys.readouterr().out
    assert "4 of 5 runs are done already" in out and out.count("started") == 1
    changed = {path.name for path in logs if path.read_text() != logs[path]}
    assert changed == {"maxl-3-10-seed0.log"} and len(curves("r/maxl-3-10-seed0")) == 2


def test_one_run_that_fails_is_named_at_the_end_and_does_not_stop_the_others(forked_runs):
    Path("r").mkdir()
    Path("r/random-3-10-seed0").write_text("a file where a folder should be")
    few = [*FEW, "--methods", "random", "single", "--epochs", "1"]
    process = forked_runner(*few)
    process.join(120)
    assert process.exitcode == 2
    out, error = Path("said").read_text(), Path("errors").read_text()
    assert "1 of 2 runs did not end well: random-3-10-seed0 (error: --out r/random-3-10-seed0 is a file" in error
    assert error.count("\n") == 1 and "single-3-seed0: done" in out
    assert Path("r/figure3.md").exists()
    process = runner(*few, "--status")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == ""
    assert (
        "failed     epoch 0 of 1 error: --out r/random-3-10-seed0 is a file" in out and "1 done, 1 failed; about" in out
    )


@needs_proc
def test_killed_runs_and_a_killed_runner_are_continued_by_the_same_command(forked_runs):
    epochs = ["--train-images", "100", "--batch-size", "50", "--epochs", "30"]
    few = [*FEW, "--methods", "single", *epochs]
    assert run_script("model_vgg_single", *TINY, "--primary-level", 0, *epochs, "--out", "whole") == 0
    folder = Path("r/single-3-seed0")

    process = forked_runner(*few)  # kill -9 of a run
    wait_for(lambda: (folder / "curves.csv").exists())
    os.kill(wait_for(lambda: children(process))[0], signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 2 and "single-3-seed0 (killed by signal 9)" in Path("errors").read_text()
    assert 0 < len(curves(folder)) < 30

    process = forked_runner(*few)  # kill -9 of the runner; its run goes on
    pid = wait_for(lambda: children(process))[0]
    done = len(curves(folder))
    wait_for(lambda: len(curves(folder)) > done)
    process.kill()
    process.join()
    assert files.at_work(folder)
    process = forked_runner(*few)  # waits for that run
    process.join(120)
    assert process.exitcode == 0, Path("errors").read_text()
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())
    assert len(curves(folder)) == 30
    assert_same_run(folder, "whole")


@needs_proc
@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_runner_stops_its_runs_first(signum, code, forked_runs):
    process = forked_runner(*FEW, "--methods", "single", "--epochs", "1000")
    wait_for(lambda: Path("r/single-3-seed0/curves.csv").exists())
    (pid,) = children(process)
    os.kill(process.pid, signum)
    process.join(60)
    error = Path("errors").read_text()
    assert process.exitcode == code and "the same command goes on" in error and error.count("\n") <= 2
    assert not Path(f"/proc/{pid}").exists()
    assert plan("r", ["3-10"], ["single"], [0], [*TINY, "--epochs", "1000"])[0].state() == "unfinished"


def test_a_signal_that_comes_within_a_finalizer_stops_the_runner_all_the_same(forked_runs, monkeypatch, capsys):
    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def sleep(seconds):
        Finalized()
        time.sleep(seconds)

    monkeypatch.setattr(here, "time", types.SimpleNamespace(sleep=sleep))
    assert exits.run_main(figure3.experiment.main, [*FEW, "--methods", "single", "--epochs", "3"]) == 130
    error = capsys.readouterr().err
    assert "stopped by Ctrl-C" in error and "ignored" not in error
    assert not files.at_work(Path("r/single-3-seed0"))


def test_max_minutes_leaves_runs_unfinished_with_exit_code_3(forked_runs):
    process = forked_runner(*FEW, "--methods", "single", "--epochs", 10_000, "--max-minutes", 0.03)
    process.join(60)
    assert process.exitcode == 3 and Path("errors").read_text() == ""
    assert "1 of 1 runs are unfinished, the same command goes on: single-3-seed0" in Path("said").read_text()


def test_what_cannot_be_drawn_hides_no_unfinished_run_and_a_tilde_is_the_home_folder(forked_runs, monkeypatch, capsys):
    monkeypatch.setenv("HOME", os.getcwd())
    few = ["--pairs", "3-10", "--seeds", "0", "--methods", "single", *TINY, "--epochs", "10000", "--out=~/r"]
    assert exits.run_main(generalisation.experiment.main, [*few, "--max-minutes", "0.05"]) == 3
    out, error = capsys.readouterr()
    nothing = f"none of the runs of these pairs and seeds in {os.getcwd()}/r is finished yet"
    assert error == f"warning: nothing was drawn: {nothing}\n"
    assert "1 of 1 runs are unfinished" in out and curves("r/single-3-seed0")


def test_gpus_and_cores_are_shared_among_the_jobs(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environments = [here.share_of_machine(slot, 4) for slot in range(4)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0", "1", "0", "1"]
    assert {e["OMP_NUM_THREADS"] for e in environments} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [here.share_of_machine(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["5", "7"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert here.share_of_machine(0, 1) == {"CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert here.share_of_machine(0, 1) == {}
