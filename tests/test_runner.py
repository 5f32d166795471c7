"""The runner of experiments/: plan, states, running here and with submitit; on Figure 3."""

import argparse
import contextlib
import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY, assert_same_run, curves, forked, run_script, shortcuts

import create_dataset
from experiments import appendix_e, cifar100, figure3, generalisation
from experiments.runner import cluster, here, progress
from experiments.runner import process as runs_process
from harness import exits, files


def plan(root, pairs=tuple(cifar100.PAIRS), methods=tuple(cifar100.FIVE), seeds=(0, 1, 2), options=()):
    return cifar100.plan(argparse.Namespace(out=Path(root), pairs=pairs, methods=methods, seeds=seeds), options)


@pytest.fixture
def spared():
    with shortcuts():
        yield


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_is_81_runs():
    tasks = plan("runs/figure3")
    assert len(tasks) == len({task.folder for task in tasks}) == 81
    count = {method: sum(task.method == method for task in tasks) for method in cifar100.FIVE}
    assert count == {"single": 9, "random": 18, "kmeans": 18, "human": 18, "maxl": 18}
    pairs = {task.name.split("-", 1)[1].rsplit("-seed", 1)[0] for task in tasks if task.method != "single"}
    assert pairs == {"3-10", "3-20", "3-100", "10-20", "10-100", "20-100"}
    assert [task.name for task in tasks[:3]] == ["maxl-20-100-seed0", "single-20-seed0", "human-20-100-seed0"]


def test_every_run_of_the_plan_has_the_papers_settings_and_its_levels():
    psis = {}
    for task in plan("runs/figure3"):
        settings = task.settings
        assert (settings.epochs, settings.batch_size, settings.width, settings.train_images) == (200, 100, 1.0, None)
        method, *sizes, seed = task.name.split("-")
        sizes = [int(size) for size in sizes]
        assert task.method == method and seed == f"seed{settings.seed}" and settings.dataset == "cifar100"
        assert create_dataset.LEVEL_CLASSES[settings.primary_level] == sizes[0]
        if task.method == "human":
            assert create_dataset.LEVEL_CLASSES[settings.auxiliary_level] == sizes[1]
        elif task.method != "single":
            assert [len(settings.psi), sum(settings.psi)] == sizes and max(settings.psi) - min(settings.psi) <= 1
            psis.setdefault((*sizes, seed), settings.psi)
            assert psis[(*sizes, seed)] == settings.psi, "the same for all methods"
    psis = {tuple(task.settings.psi) for task in plan("r", ["3-10"], ["maxl"], range(10))}
    assert len(psis) == 3, "which class gets the larger share is drawn at random"


def test_quick_and_the_options_narrow_the_plan():
    settings, options = figure3.experiment.parse(["--quick", "--epochs", "2"])
    assert (settings.pairs, settings.seeds, options) == (["3-10", "20-100"], [0], ["--epochs", "2", "--quick"])
    tasks = plan("r", settings.pairs, settings.methods, settings.seeds, options)
    assert len(tasks) == 10 and all(task.settings.epochs == 2 and task.settings.width == 0.125 for task in tasks)
    settings, _ = figure3.experiment.parse(["--methods", "maxl", "single", "--pairs", "10-20", "--seeds", "4", "5"])
    assert len(plan("r", settings.pairs, settings.methods, settings.seeds)) == 4


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seed", "1"], "--seed is set by figure3"),
        (["--psi=5,5"], "--psi=5,5 is set by figure3"),
        (["--resume"], "--resume is set by figure3"),
        (["--pairs", "3-11"], "invalid choice: '3-11'"),
        (["--methods", "darts"], "invalid choice: 'darts'"),
        (["--jobs", "0"], "--jobs 0 is out of range"),
        (["--seeds", "0", "-1"], "--seeds -1 is out of range"),
        (["--plot", "--bogus", "3"], "unrecognized arguments: --bogus 3"),
        (["--width", "0"], "maxl: --width 0.0 is out of range"),
        (["--entropy-weight", "0"], "unrecognized arguments: --entropy-weight"),
        (["--submitit", "local", "--submitit-parameters", "timeout"], "expected NAME=VALUE"),
        (["--plot"], "there are no runs"),
        (["--plot", "--status"], "not allowed with argument"),
    ],
)
def test_the_runners_bad_input_is_one_sentence_and_starts_nothing(arguments, said, capsys):
    assert exits.run_main(figure3.experiment.main, arguments) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error and out == ""
    assert not Path("runs").exists()


def test_a_folder_of_another_experiment_is_named_before_anything_starts(capsys, spared):
    assert run_script("model_vgg_single", *TINY, "--primary-level", 0, "--out", "r/single-3-seed0") == 0
    capsys.readouterr()
    few = ["--pairs", "3-10", "--seeds", "0", "--out", "r", *TINY]
    assert exits.run_main(figure3.experiment.main, [*few, "--width", "0.03"]) == 2
    assert "r/single-3-seed0 is of another experiment (width was 0.02, now 0.03)" in capsys.readouterr().err
    assert sorted(os.listdir("r")) == ["single-3-seed0"]
    assert exits.run_main(figure3.experiment.main, [*few, "--status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "single-3-seed0           done       epoch 3 of 3" in lines
    assert lines[-1].startswith("1 done, 4 not begun; about ")


def test_dry_run_shows_commands_and_an_estimate(capsys, spared):
    assert exits.run_main(figure3.experiment.main, ["--dry-run", *FEW]) == 0
    out = capsys.readouterr().out
    assert out.count("not begun") == 5 and "5 runs; about" in out
    assert "--primary-level 0 --auxiliary-level 1 --seed 0 --out r/human-3-10-seed0" in out
    assert not Path("r").exists()


@pytest.fixture
def measured(monkeypatch):
    """measured(script, train=2.0, ...): the script's main() only says that its passes took so many seconds.

    Returns a list of the --train-images that it was called with.
    """

    def replace(script, **seconds):
        counts = []

        def main(arguments):
            given = dict(argument.split("=") for argument in arguments if "=" in argument)
            counts.append(int(given["--train-images"]))
            Path(given["--out"]).mkdir()
            lines = ",".join(f"seconds_{name}" for name in seconds), ",".join(map(str, seconds.values()))
            (Path(given["--out"]) / "curves.csv").write_text("\n".join(lines) + "\n")

        monkeypatch.setattr(importlib.import_module(script), "main", main)
        return counts

    return replace


@pytest.mark.parametrize("method, passes", [("single", {"train": 2.0}), ("maxl", {"train": 2.0, "meta": 4.0})])
def test_the_estimate_is_the_measured_time_of_what_an_epoch_has(method, passes, measured):
    """From 2 iterations and 2000 test images to 100 and 10,000; a settling pass of 10,000 images for Single alone."""
    measured(f"model_vgg_{method}", **passes, test=3.0)
    options = ["--train-images", "10000", "--device", "cpu"]
    for more, settled in (([], 0), (["--settle-statistics"], 15 if method == "single" else 0)):
        seconds = progress.estimate(plan("r", ["20-100"], [method], [0], [*options, *more]))
        assert seconds == {method: pytest.approx(sum(passes.values()) / 2 * 100 + 15 + settled)}


def test_the_estimate_counts_the_batches_that_there_are(measured):
    """One of 6000 in the 10,000 generated images, and 8 in CIFAR-100; with 60 % held out, 2 of 100, and 200."""
    counts = measured("model_vgg_single", train=2.0, test=3.0)
    seconds = progress.estimate(plan("r", ["20-100"], ["single"], [0], ["--batch-size", "6000", "--device", "cpu"]))
    assert seconds == {"single": pytest.approx(2 * 8 + 15)} and counts == [10_000]
    counts = measured(appendix_e.SCRIPT, train=2.0, meta=4.0, test=3.0)
    options = ["--validation-share", "0.6", "--device", "cpu"]
    seconds = progress.estimate([appendix_e.task("validation", "20-100", 0, Path("r"), options)])
    assert seconds == {"validation": pytest.approx(6 / 2 * 200 + 15)}
    (count,) = counts
    assert 200 <= count - round(0.6 * count) < 300


# --- running --------------------------------------------------------------------------------------

FEW = ["--pairs", "3-10", "--seeds", "0", "--out", "r", *TINY]


def runner(*arguments):
    """The runner as a person starts it; its own process."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.figure3", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


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


@pytest.mark.slow
def test_the_runner_runs_all_methods_skips_what_is_done_and_draws(forked_runs, capsys):
    """A script and a module of experiments/ are started as ever, in a Python of their own."""
    forked_runs += ["model_vgg_maxl", "model_vgg_kmeans"]
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


# --- submitit -------------------------------------------------------------------------------------


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
