"""The runner of experiments/ on Figure 3: its plan, runs side by side, failed, killed, stopped and continued."""

import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY, assert_same_run, curves, forked, run_script
from running import FEW, children, needs_proc, plan, runner, wait_for

import create_dataset
import model_vgg_maxl
from experiments import (
    appendix_e, figure3, figure4, figure5, figure6, label_learning, loss_or_labels, pairs, table1, table3,
)  # fmt: skip
from experiments.methods.variations import VARIANTS
from experiments.runner import cluster, here, progress
from harness import exits, files

# --- the plans ------------------------------------------------------------------------------------------


def tasks(module, *arguments):
    """The checked plan of a figure by the name of each run's folder."""
    settings, options = module.experiment.parse(list(arguments))
    return {task.name: task for task in module.experiment.tasks(settings, options)}


def test_figure_3_is_81_runs_with_the_papers_settings():
    found, psis = list(tasks(figure3).values()), {}
    assert len({task.folder for task in found}) == len(found) == 81
    count = {method: sum(task.method == method for task in found) for method in pairs.FIVE}
    assert count == {"single": 9, "random": 18, "kmeans": 18, "human": 18, "maxl": 18}
    assert [task.name for task in found[:3]] == ["maxl-20-100-seed0", "single-20-seed0", "human-20-100-seed0"]
    for task in found:
        settings = task.settings
        assert (settings.epochs, settings.batch_size, settings.width, settings.train_images) == (200, 100, 1.0, None)
        assert settings.test_statistics == "settled", "all methods alike"
        method, *sizes, seed = task.name.split("-")
        sizes = [int(size) for size in sizes]
        assert task.method == method and seed == f"seed{settings.seed}" and settings.dataset == "cifar100"
        assert create_dataset.LEVEL_CLASSES[settings.primary_level] == sizes[0]
        if task.method == "human":
            assert create_dataset.LEVEL_CLASSES[settings.auxiliary_level] == sizes[1]
        elif task.method != "single":
            assert [len(settings.psi), sum(settings.psi)] == sizes and max(settings.psi) - min(settings.psi) <= 1
            assert psis.setdefault((*sizes, seed), settings.psi) == settings.psi, "the same for all methods"
    psis = {tuple(task.settings.psi) for task in plan("r", ["3-10"], ["maxl"], range(10))}
    assert len(psis) == 3, "which class gets the larger share is drawn at random"


def test_the_other_plans_are_figure_3s_runs():
    whole = {name: vars(task.settings) for name, task in tasks(figure3).items()}
    counts = {figure4: 36, figure5: 18, figure6: 3, table3: 36, label_learning: 18, loss_or_labels: 48}
    for module, count in counts.items():
        found = tasks(module)
        assert len(found) == count
        own = re.compile("maxl0-|beta|uniform-|.*-ce-")
        shared = [name for name in found if not own.match(name)]
        assert shared and all(vars(found[name].settings) == whole[name] for name in shared)
    with_it, without = (vars(task.settings) for task in tasks(table3, "--pairs", "10-20", "--seeds", "0").values())
    assert {name for name in with_it if with_it[name] != without[name]} == {"entropy_weight", "out"}
    assert tasks(figure5, "--data-root", "d", "--seeds", "0")["single-3-seed0"].settings.data_root == "d"


def test_appendix_es_variations_differ_from_maxl_in_the_variant_alone():
    found = tasks(appendix_e, "--width", "0.25")
    assert len(found) == 7 * 3
    maxl = vars(found["maxl-20-100-seed1"].settings)
    for variant in VARIANTS:
        theirs = vars(found[f"maxl-{variant}-20-100-seed1"].settings)
        differ = {name for name in maxl if maxl[name] != theirs[name]}
        assert theirs["variant"] == variant
        assert differ == {"out"} | ({"focal_gamma"} if variant == "cross-entropy" else set())


def test_options_reach_the_runs_that_have_them():
    few = "--seeds", "0", "--pairs", "3-10", "--epochs", "7"
    found = tasks(figure3, *few, "--label-learning-rate", "1", "--test-statistics", "running")
    found = {task.method: vars(task.settings) for task in found.values()}
    assert all(task["epochs"] == 7 and task["test_statistics"] == "running" for task in found.values())
    assert found["maxl"]["label_learning_rate"] == 1
    for options, every in (([], 10), (["--cosine-every=0"], 0)):
        found = tasks(figure3, *few, *options).values()
        cosines = {task.method: vars(task.settings).get("cosine_every") for task in found}
        assert cosines == dict.fromkeys(pairs.FIVE, every) | {"single": None}
    quick = tasks(figure3, "--quick", "--epochs", "2", "--methods", "maxl", "single")
    assert len(quick) == 4 and all((t.settings.epochs, t.settings.width) == (2, 0.125) for t in quick.values())


@pytest.mark.parametrize("arguments, said", [
    (["--seed", "1"], "--seed is set for each run by the figure"),
    (["--pairs", "3-11"], "invalid choice: '3-11'"),
    (["--seeds", "0", "-1"], "--seeds -1 is out of range"),
    (["--plot", "--bogus", "3"], "unrecognized arguments: --bogus 3"),
    (["--width", "0"], "maxl: --width 0.0 is out of range"),
    (["--methods", "single", "--entropy-weight", "0"], "--entropy-weight is a setting of other methods"),
    (["--submitit", "local", "--submitit-parameters", "timeout"], "expected NAME=VALUE"),
    (["--plot"], "there are no runs"),
])  # fmt: skip
def test_the_runners_bad_input_is_one_sentence_and_starts_nothing(arguments, said, capsys):
    assert exits.run_main(figure3.experiment.main, arguments) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error and out == ""
    assert not Path("runs").exists()


def test_a_folder_of_another_experiment_is_named_before_anything_starts(capsys, spared):
    arguments = [*TINY, "--primary-level", 0, "--test-statistics", "settled", "--out", "r/single-3-seed0"]
    assert run_script("model_vgg_single", *arguments) == 0
    capsys.readouterr()
    assert exits.run_main(figure3.experiment.main, [*FEW, "--width", "0.03"]) == 2
    assert "r/single-3-seed0 is of another experiment (width was 0.02, now 0.03)" in capsys.readouterr().err
    assert sorted(os.listdir("r")) == ["single-3-seed0"]
    assert exits.run_main(figure3.experiment.main, [*FEW, "--status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "single-3-seed0           done       epoch 3 of 3" in lines and lines[-1].startswith("1 done, 4 not begun")


def test_a_rate_edited_in_one_script_alone_is_named_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setitem(model_vgg_maxl.SETTINGS, "learning_rate", 0.02)
    assert exits.run_main(figure3.experiment.main, ["--out", "r"]) == 2
    out, error = capsys.readouterr()
    assert "learning_rate is to be the same" in error and "0.02" in error and "0.01" in error and out == ""
    assert tasks(figure3, "--learning-rate", "0.05") and tasks(figure3, "--methods", "maxl")


def test_a_script_started_as_a_file_says_how_it_is_started():
    command = [sys.executable, str(REPOSITORY / "experiments/figure3.py")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and "as python -m experiments.figure3\n" in process.stderr
    assert process.stderr.count("\n") == 1
    listing = subprocess.run([sys.executable, "-m", "experiments"], cwd=REPOSITORY, capture_output=True, text=True)
    assert "figure3" in listing.stdout and "methods.controls" in listing.stdout


# --- before the first run -------------------------------------------------------------------------------


def test_dry_run_shows_commands_and_an_estimate(capsys, spared):
    assert exits.run_main(figure3.experiment.main, ["--dry-run", *FEW]) == 0
    out = capsys.readouterr().out
    assert out.count("not begun") == 5 and "5 runs; about" in out
    assert "--primary-level 0 --auxiliary-level 1 --seed 0 --out r/human-3-10-seed0" in out
    assert not Path("r").exists()


@pytest.mark.parametrize("method, passes", [("single", {"train": 2.0}), ("maxl", {"train": 2.0, "meta": 4.0})])
def test_the_estimate_is_the_measured_time_of_what_an_epoch_has(method, passes, monkeypatch):
    """From 5 iterations and 2000 test images to 100 and 10,000; a settling pass of 10,000 images for Single alone."""

    def main(arguments):
        folder = Path(dict(argument.split("=") for argument in arguments if "=" in argument)["--out"])
        folder.mkdir()
        seconds = passes | {"test": 3.0}
        header = ",".join(f"seconds_{name}" for name in seconds)
        (folder / "curves.csv").write_text(f"{header}\n{','.join(map(str, seconds.values()))}\n")

    monkeypatch.setattr(importlib.import_module(f"model_vgg_{method}"), "main", main)
    options = ["--train-images", "10000", "--device", "cpu"]
    (task,) = plan("r", ["20-100"], [method], [0], options)
    settled = 15 if method == "single" else 0
    assert progress.estimate(task) == pytest.approx(sum(passes.values()) / 5 * 100 + 15 + settled)


class Done:
    """A process that has ended well."""

    def poll(self):
        return 0


def test_the_data_is_fetched_once_before_the_first_run_starts(monkeypatch, capsys):
    happened, few = [], ["--pairs", "3-10", "--seeds", "0", "--methods", "single", "human", "--out", "r"]
    monkeypatch.setattr(create_dataset, "load_cifar100", lambda root: happened.append(f"data in {root}"))
    monkeypatch.setattr(here, "start", lambda command, log, **changed: happened.append("run") or Done())
    monkeypatch.setattr(here.Here, "pause", 0)
    exits.run_main(figure3.experiment.main, [*few, "--jobs", "2", "--data-root", "d"])
    assert happened == ["data in d", "run", "run"]
    parts = ["--datasets", "imagenet32", "synthetic", "cinic10", "--seeds", "0", "--data-root", "d", "--out", "q"]
    capsys.readouterr()
    assert exits.run_main(table1.experiment.main, parts) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("error: d/ImageNet32 lacks") and second.startswith("d/CINIC-10 is not there")
    assert third == "What is there can be run without the rest: --datasets synthetic" and not Path("q").exists()


@pytest.mark.parametrize("printed, code, outcome", [
    ("epoch 1/3 | ...\nerror: out of memory (x)", 2, "error: out of memory (x)"),
    ("Traceback (most recent call last):\n  File x\nKeyError: 'y'", 1, "KeyError: 'y'"),
    ("epoch 1/3 | ...\nstopped after epoch 1: the next would not end in time", 3, "unfinished"),
])  # fmt: skip
def test_the_outcome_says_why_a_run_failed(printed, code, outcome):
    (task,) = tasks(figure3, *FEW, "--methods", "single").values()
    task.log.parent.mkdir(parents=True)
    task.log.write_text(f"--- an earlier start\nerror: of an earlier start\n\n--- 2026-01-01\n{printed}\n\n")
    assert task.outcome(code) == outcome


# --- at work --------------------------------------------------------------------------------------------


def forked_runner(*arguments):
    """The runner in a copy of this process."""

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
        self.terminate, self.kill = self.process.terminate, self.process.kill
        log.close()

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("run", timeout)


@pytest.fixture
def forked_runs(spared, monkeypatch):
    """The runner's runs are copies of this process, but for those of the methods in the list that this is."""
    as_ever = []

    def start(command, **options):
        as_it_is = any(method in argument for argument in command[:3] for method in as_ever)
        return (subprocess.Popen if as_it_is else ForkedRun)(command, **options)

    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    monkeypatch.setattr(here, "subprocess", types.SimpleNamespace(Popen=start, **names))
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
    rows = list(csv.DictReader(open("r/figure3-3-10-seed0.csv", newline="")))
    assert [row["method"] for row in rows] == ["Single", "Random", "K-Means", "Human", "MAXL"]
    final = 100 * float(curves("r/maxl-3-10-seed0")[-1]["test_primary_accuracy"])
    assert float(rows[-1]["final_mean"]) == pytest.approx(final)
    (task,) = plan("by-hand", ["3-10"], ["maxl"], [0], few)
    assert run_script("model_vgg_maxl", *task.arguments, images=(10_000, 2000)) == 0  # what a person would type
    assert_same_run("r/maxl-3-10-seed0", "by-hand/maxl-3-10-seed0")

    Path("r/maxl-3-10-seed0/curves.csv").unlink()  # as a kill between checkpoint and curves leaves it
    capsys.readouterr()
    forked_runs.clear()
    assert exits.run_main(figure3.experiment.main, command) == 0
    out = capsys.readouterr().out
    assert "4 of 5 runs are done already" in out and out.count("started") == 1
    assert len(curves("r/maxl-3-10-seed0")) == 2


def test_one_run_that_fails_is_named_at_the_end_and_does_not_stop_the_others(forked_runs):
    Path("r").mkdir()
    Path("r/random-3-10-seed0").write_text("a file where a folder should be")
    process = forked_runner(*FEW, "--methods", "random", "single", "--epochs", "1")
    process.join(120)
    assert process.exitcode == 2
    out, error = Path("said").read_text(), Path("errors").read_text()
    assert "1 of 2 runs did not end well: random-3-10-seed0 (error: --out r/random-3-10-seed0 is a file" in error
    assert error.count("\n") == 1 and "single-3-seed0: done" in out
    assert Path("r/figure3-3-10-seed0.md").exists()


@needs_proc
def test_killed_runs_and_a_killed_runner_are_continued_by_the_same_command(forked_runs):
    epochs = ["--train-images", "100", "--batch-size", "50", "--epochs", "30"]
    few = [*FEW, "--methods", "single", *epochs]
    whole = [*TINY, "--primary-level", 0, *epochs, "--test-statistics", "settled", "--out", "whole"]
    assert run_script("model_vgg_single", *whole) == 0
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


def test_max_minutes_leaves_runs_unfinished_with_exit_code_3(forked_runs):
    process = forked_runner(*FEW, "--methods", "single", "--epochs", 10_000, "--max-minutes", 0.03)
    process.join(60)
    assert process.exitcode == 3 and Path("errors").read_text() == ""
    assert "1 of 1 runs are unfinished, the same command goes on: single-3-seed0" in Path("said").read_text()


def test_gpus_and_cores_are_shared_among_the_jobs(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    environments = [here.share_of_machine(slot, 4) for slot in range(4)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0", "1", "0", "1"]
    assert {e["OMP_NUM_THREADS"] for e in environments} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [here.share_of_machine(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["5", "7"]


# --- as submitit's jobs ---------------------------------------------------------------------------------


def test_without_submitit_or_without_slurm_one_sentence_says_so(monkeypatch, capsys, spared):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        assert exits.run_main(figure3.experiment.main, [*FEW, "--submitit", "local"]) == 2
    assert capsys.readouterr().err == "error: --submitit needs the package submitit: pip install submitit\n"
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    assert exits.run_main(figure3.experiment.main, [*FEW, "--submitit", "slurm"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --submitit slurm") and "srun" in error and error.count("\n") == 1


def test_a_job_has_its_gpu_whatever_submitit_sets(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as submitit sets it for local jobs
    report = "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])"
    assert cluster.Job([sys.executable, "-c", report], Path("log"), {"CUDA_VISIBLE_DEVICES": "3"})() == 0
    assert "sees 3" in Path("log").read_text()


@pytest.mark.slow
def test_the_runner_submits_a_run_as_a_job():
    pytest.importorskip("submitit")
    out, error = runner(*FEW, "--methods", "single", "--submitit", "local").communicate(timeout=600)
    assert out.count("submitted") == 1 and out.count(": done") == 1, (out, error)
    assert len(curves("r/single-3-seed0")) == 3


@needs_proc
def test_a_preempted_job_stops_its_run_and_is_queued_again(monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (task,) = plan(Path("r").absolute(), ["3-10"], ["single"], [0], [*TINY, "--epochs", "30"])
    executor = submitit.LocalExecutor(folder="jobs")
    executor.update_parameters(timeout_min=5, signal_delay_s=3)
    job = executor.submit(cluster.Job(task.command, task.log, {}))
    wait_for(lambda: task.epochs_done() > 0)
    (worker,) = children(job._process)
    os.kill(worker, signal.SIGUSR2)  # as Slurm preempts
    wait_for(job.done)
    assert job.result() == 0 and len(curves(task.folder)) == 30
    assert len(json.loads((task.folder / "settings.json").read_text())["sessions"]) == 2
