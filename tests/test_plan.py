"""The plan of experiments/'s runner: its runs, their settings, bad input, the estimate; on Figure 3."""

import importlib
import os
from pathlib import Path

import pytest
from conftest import TINY, run_script
from running import FEW, plan

import create_dataset
import model_vgg_maxl
from experiments import appendix_e, figure3
from experiments import pairs as cifar100
from experiments.runner import progress
from harness import exits


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


def test_a_rate_edited_in_one_script_alone_is_named_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setitem(model_vgg_maxl.SETTINGS, "learning_rate", 0.02)
    assert exits.run_main(figure3.experiment.main, ["--out", "r"]) == 2
    out, error = capsys.readouterr()
    assert "learning_rate is to be the same" in error and "0.02" in error and "0.01" in error and out == ""
    assert error.count("\n") == 1 and not Path("r").exists()
    assert exits.run_main(figure3.experiment.main, ["--out", "r", "--methods", "maxl", "--dry-run"]) != 2


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
