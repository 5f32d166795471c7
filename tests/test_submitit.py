"""The runner's runs as submitit's jobs; on Figure 3."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY, assert_same_run, curves, run_script
from running import FEW, children, needs_proc, plan, runner, wait_for

from experiments import figure3
from experiments.runner import cluster
from harness import exits


def test_without_submitit_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert exits.run_main(figure3.experiment.main, [*FEW, "--submitit", "local"]) == 2
    assert capsys.readouterr().err == "error: --submitit needs the package submitit: pip install submitit\n"


def test_where_there_is_no_slurm_one_sentence_says_so(monkeypatch, capsys, spared):
    pytest.importorskip("submitit", reason="needs submitit")
    monkeypatch.setenv("PATH", "")
    assert exits.run_main(figure3.experiment.main, [*FEW, "--submitit", "slurm"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --submitit slurm") and "srun" in error and error.count("\n") == 1


def test_a_job_has_its_gpu_whatever_submitit_sets(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as submitit sets it for local jobs
    report = "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])"
    assert cluster.Job([sys.executable, "-c", report], Path("log"), {"CUDA_VISIBLE_DEVICES": "3"})() == 0
    assert "sees 3" in Path("log").read_text()


def test_submitits_local_executor_hands_every_job_its_share_of_the_machine(monkeypatch):
    pytest.importorskip("submitit", reason="needs submitit")
    jobs = []

    class Executor:
        def __init__(self, **options):
            self.update_parameters = lambda **parameters: None
            self.batch = contextlib.nullcontext

        def submit(self, job):
            jobs.append(job.variables)
            raise KeyboardInterrupt

    monkeypatch.setattr("submitit.AutoExecutor", Executor)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # which run_on_cluster sets
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for kind in ("local", "slurm"):
        with pytest.raises(KeyboardInterrupt):
            cluster.run_on_cluster(plan("r", ["3-10"], ["single"], [0], TINY), kind, 1, {})
    assert jobs == [{"CUDA_VISIBLE_DEVICES": "0"}, {}]


def test_submitits_local_executor_runs_the_plan():
    pytest.importorskip("submitit", reason="needs submitit")
    process = runner(*FEW, "--methods", "single", "random", "--jobs", 2, "--submitit", "local")
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert out.count(": done") == 2 and Path("r/figure3.png").exists()
    assert len(curves("r/single-3-seed0")) == len(curves("r/random-3-10-seed0")) == 3


def test_a_job_out_of_max_minutes_is_submitted_again_until_its_run_is_done():
    pytest.importorskip("submitit", reason="needs submitit")
    few = [*FEW, "--methods", "single", "--epochs", 150, "--submitit", "local"]
    out, error = runner(*few, "--max-minutes", 0.15).communicate(timeout=600)
    assert out.count("submitted") == 1 + out.count(": unfinished") > 1 and out.count(": done") == 1, (out, error)
    assert len(curves("r/single-3-seed0")) == 150
    out, error = runner(*few, "--epochs", 10**6, "--max-minutes", 0.0001).communicate(timeout=60)
    assert out.count("submitted") == 1 and "1 of 1 runs are unfinished" in out, (out, error)


@needs_proc
def test_a_preempted_job_stops_its_run_and_is_queued_again(monkeypatch):
    submitit = pytest.importorskip("submitit", reason="needs submitit")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    whole = [*TINY, "--primary-level", 0, "--epochs", 30, "--out", "whole"]
    assert run_script("model_vgg_single", *whole, test_images=2000) == 0
    (task,) = plan(Path("r").absolute(), ["3-10"], ["single"], [0], [*TINY, "--epochs", "30"])
    executor = submitit.LocalExecutor(folder="jobs")
    executor.update_parameters(timeout_min=5, signal_delay_s=3)
    job = executor.submit(cluster.Job(task.command, task.log, {}))
    wait_for(lambda: task.epochs_done() > 0)
    (worker,) = children(job._process)
    os.kill(worker, signal.SIGUSR2)  # as Slurm preempts
    wait_for(job.done)
    assert job.result() == 0
    assert len(curves(task.folder)) == 30
    assert len(json.loads((task.folder / "settings.json").read_text())["sessions"]) == 2
    assert_same_run(task.folder, "whole")
