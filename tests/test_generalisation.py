"""Generalisation: windows and equal fit, from made-up curves whose answers are known."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from test_figures import made_up_run

from experiments import generalisation
from experiments.runner.report import RunOnDisk
from harness import exits


def run_of(name, train, test, **options):
    """A run with these accuracies in %."""
    columns = {f"{split}_primary_accuracy": [value / 100 for value in values] for split, values in
               (("train", train), ("test", test))}  # fmt: skip
    made_up_run(name, **columns, **options)
    return RunOnDisk(Path("r") / name)


def test_at_equal_fit_a_line_is_a_line_however_fast_it_is_walked():
    """Test accuracy 10 + train / 2: the mean of what lies evenly around a level is the level's own."""
    for step in (0.5, 1):
        train = np.arange(0, 90, step)
        run = run_of(f"maxl-20-100-seed{int(10 * step)}", train, 10 + train / 2)
        found = generalisation.at_equal_fit(run, [20, 50.5, 70])
        assert found == pytest.approx([20, 35.25, 45], abs=1e-3)


def test_at_equal_fit_the_nearest_epochs_count_most_and_there_is_nothing_beyond_the_curve():
    """Two epochs 2 and 1 points from the level have weights exp(-d²/2σ²), σ = 1.5."""
    run = run_of("maxl-20-100-seed0", [48, 51, 90], [30, 40, 99])
    near, far = math.exp(-(1**2) / 4.5), math.exp(-(2**2) / 4.5)
    below, at_50, beyond = generalisation.at_equal_fit(run, [47, 50, 91])
    assert at_50 == pytest.approx((40 * near + 30 * far) / (near + far))
    assert math.isnan(below) and math.isnan(beyond)
    (lonely,) = generalisation.at_equal_fit(run_of("maxl-20-100-seed1", [0, 100], [1, 2]), [49])
    assert lonely == pytest.approx(1)  # though every epoch is far away


def test_the_tables_have_the_known_means_over_windows_and_seeds():
    epochs = np.arange(1, 21)  # in ten windows of two
    run_of("maxl-20-100-seed0", 20 + epochs, 30 + 0 * epochs)
    run_of("maxl-20-100-seed1", 22 + epochs, 32 + 0 * epochs)
    run_of("maxl-20-100-seed2", [20, 21], [90, 90], epochs=20)
    run_of("single-20-seed0", 40 + epochs, 50 + epochs)
    run_of("random-20-100-seed0", [], [], epochs=20)  # curves that cannot be read
    run_of("human-20-100-seed0", [20, 21], [90, 90], epochs=20)
    generalisation.experiment.main(["--plot", "--out", "r"])
    with open("r/generalisation.csv", newline="") as file:
        rows = {(row["method"], row["epochs"] or float(row["train_mean"])): row for row in csv.DictReader(file)}
    last = rows["MAXL", "19 to 20"]
    assert [float(last[f"{split}_mean"]) for split in ("test", "train")] == pytest.approx([31, 40.5])
    assert [float(last[f"{split}_std"]) for split in ("test", "train")] == pytest.approx([2**0.5] * 2)
    assert float(rows["Single", "1 to 2"]["test_mean"]) == pytest.approx(51.5)
    assert {at for method, at in rows if method == "MAXL"} == {
        *(f"{first} to {first + 1}" for first in range(1, 20, 2)),
        *(25, 30, 35, 40),
    }  # 20 and 45 were not reached by both
    assert not any(method == "Human" for method, _ in rows)
    lines = Path("r/generalisation.md").read_text().splitlines()
    assert "| 20 → 100, test / training accuracy | Single | Random | Human | MAXL |" in lines
    assert "| epochs 19 to 20 | 69.5 / 59.5 |  |  | 31.0 ± 1.4 / 40.5 |" in lines
    assert "| n | 1 | 0 | 0 | 2 |" in lines and "| training accuracy 25 |  |  |  | 31.0 ± 1.4 |" in lines
    missing = "seed 1 not run, seed 2 not run"
    cells = [missing, *(f"seed 0 at epoch {epoch} of 20, {missing}" for epoch in (0, 2)), "seed 2 at epoch 2 of 20"]
    assert f"| missing | {' | '.join(cells)} |" in lines


def test_where_no_run_is_finished_one_sentence_says_so(capsys):
    run_of("maxl-20-100-seed0", [20, 21], [90, 90], epochs=20)
    assert exits.run_main(generalisation.experiment.main, ["--plot", "--out", "r"]) == 2
    assert capsys.readouterr().err == "error: none of the runs of these pairs and seeds in r is finished yet\n"


def test_the_figure_has_the_training_accuracy_below_and_no_line_where_a_run_never_was():
    train = np.arange(20.0, 40)
    run_of("maxl-20-100-seed0", train, [30] * 20)
    run_of("maxl-20-100-seed1", train + 5, [34] * 20)
    settings, _ = generalisation.experiment.parse(["--plot", "--out", "r"])
    figure, *_ = generalisation.experiment.report(settings)
    (axes,) = figure.axes
    (line,) = axes.lines
    drawn = {x: y for x, y in line.get_xydata() if not math.isnan(y)}
    assert (min(drawn), max(drawn)) == (25, 39) and list(drawn.values()) == pytest.approx([32] * len(drawn))
    assert axes.get_xlabel() == "training accuracy (%)" and axes.get_ylabel() == "test accuracy (%)"


def test_the_plan_is_figure_3s_runs():
    settings, options = generalisation.experiment.parse(["--seeds", "0"])
    names = {task.name for task in generalisation.experiment.tasks(settings, options)}
    methods = ("random", "kmeans", "human", "maxl")
    assert names == {"single-20-seed0", *(f"{method}-20-100-seed0" for method in methods)}
    assert settings.out == Path("runs/figure3")
