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
    """Test accuracy 10 + train / 2, from epochs half a point apart or further than the average reaches."""
    for step in (0.5, 1, 7, 45):
        train = np.arange(0, 91, step)
        run = run_of(f"maxl-20-100-seed{int(10 * step)}", train, 10 + train / 2)
        found = generalisation.at_equal_fit(run, [2, 20, 50.5, 70])
        assert found == pytest.approx([11, 20, 35.25, 45], abs=1e-3)


def test_at_equal_fit_the_nearest_epochs_count_most_and_there_is_nothing_beyond_the_curve():
    """Around 50, epochs that are 1, 0 and 2 points away have weights exp(-d²/2σ²), σ = 1.5."""
    train, test = [49, 50, 52, 90], [30, 40, 35, 99]
    run, weights = run_of("maxl-20-100-seed0", train, test), [math.exp(-(d**2) / 4.5) for d in (1, 0, 2)]
    level, expected = (sum(w * x for w, x in zip(weights, values)) / sum(weights) for values in (train, test))
    below, at_level, beyond = generalisation.at_equal_fit(run, [47, level, 91])
    assert at_level == pytest.approx(expected, abs=0.01)
    assert math.isnan(below) and math.isnan(beyond)


@pytest.mark.parametrize("epochs, expected", [
    (119, ["1 to 12", "13 to 24", "25 to 36", "37 to 48", "49 to 60", "61 to 72", "73 to 84", "85 to 96", "97 to 108",
           "109 to 119"]),
    (12, ["1 to 2", "3 to 4", "5", "6", "7", "8", "9", "10", "11", "12"]),
    (3, ["1", "2", "3"]),
])  # fmt: skip
def test_no_epoch_is_outside_the_windows(epochs, expected):
    run = run_of("maxl-20-100-seed0", np.arange(epochs) / 2, np.arange(epochs) / 2)
    rows = [row for row in generalisation.table({("20-100", "maxl"): {0: run}}) if row["epochs"]]
    assert [row["epochs"] for row in rows] == expected
    first, last = (int(number) for number in (expected[-1].split()[0], expected[-1].split()[-1]))
    assert rows[-1]["test_mean"] == pytest.approx((first + last - 2) / 4)  # epoch e has (e - 1) / 2


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
    axes, _ = figure.axes
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
