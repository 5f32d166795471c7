"""Generalisation: test accuracy at equal training accuracy.

    python -m experiments.generalisation                   # run what is missing, then draw
    python -m experiments.generalisation --quick           # small runs on generated images

Drawn from the curves of Figure 3's runs. If networks overfit, a method that fits its images more slowly may end higher
for that reason alone; at the same training accuracy it has no such advantage.
"""

import functools
import sys

import numpy as np

from experiments import pairs
from experiments.pairs import METHODS
from experiments.runner import drawing, report
from experiments.runner.main import Experiment
from harness.exits import InputError

LEVELS = np.arange(5, 100, 5)  # training accuracies in % of the table
GRID = np.arange(0, 100.5, 0.5)  # and of the figure
NEAR = 1.5  # points of training accuracy over which epochs are averaged there


def at_equal_fit(run, levels):
    """Test accuracies in % where the training accuracy is each of `levels` (%); NaN beyond what it reaches.

    Both accuracies are averaged over the epochs with the weights exp(-d² / 2 NEAR²), d the distance of an epoch's
    training accuracy to a point that runs over all of them; where the one mean is the level, the other is what is
    returned. A run without an epoch has none.
    """
    train, test = (100 * np.array(run.column(f"{split}_primary_accuracy")) for split in ("train", "test"))
    if not len(train):
        return []
    points = np.arange(train.min() - 10 * NEAR, train.max() + 10 * NEAR, NEAR / 10)
    exponents = -0.5 * ((points[:, None] - train) / NEAR) ** 2
    weights = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    mean_train, mean_test = (weights @ values / weights.sum(axis=1) for values in (train, test))
    reached = (train.min() <= levels) & (levels <= train.max())
    return np.where(reached, np.interp(levels, mean_train, mean_test), np.nan).tolist()


def table(runs):
    """A dict a row: pair, training accuracy, method, test accuracy in % over the finished runs if all got there."""
    rows = []
    for (pair, method), found in runs.items():
        curves = [at_equal_fit(run, LEVELS) for run in found.values() if run.finished]
        for level, *values in zip(LEVELS.tolist(), *curves):
            if curves and not np.isnan(values).any():
                row = {"pair": pair, "training_accuracy": level, "method": METHODS[method].label, "n": len(curves)}
                rows.append(row | report.spread_columns(test=values))
    return sorted(rows, key=lambda row: (row["pair"], row["training_accuracy"]))


def make_report(settings):
    """Test accuracy over training accuracy as a figure, unfinished runs included, and the tables."""
    runs = pairs.read_runs(settings.out, METHODS, settings.pairs, settings.seeds)
    rows, described = table(runs), pairs.describe(runs)
    if not rows:
        raise InputError(f"none of the runs of these pairs and seeds in {settings.out} is finished yet")
    figure = drawing.draw_curves(
        runs, settings.pairs, METHODS, "test accuracy (%)", lambda run: at_equal_fit(run, GRID),
        over=("training accuracy (%)", GRID),
    )  # fmt: skip
    drawing.caption(figure, f"{described}. {drawing.LINES}")
    columns = {"training accuracy (%)": "training_accuracy", "test accuracy (%)": ("test", 1), "n": "n"}
    text = (
        "Test accuracy of the primary task at a training accuracy, mean ± standard deviation over n finished runs "
        f"({described}). The training accuracy is that of the first pass, on augmented batches while the weights "
        "change. Both accuracies are means over epochs of about the same training accuracy, weighted by "
        f"exp(-d² / 2·{NEAR}²), d in points; a halving of the learning rate lifts both accuracies, so compare where it "
        "is still to come for all, or past for all.\n\n"
    ) + report.rows_as_markdown(rows, pairs.HEAD | columns)
    return figure, rows, text


experiment = Experiment(
    "generalisation", __doc__, pairs.plan, make_report, functools.partial(pairs.add_options, pairs="20-100"),
    full={"pairs": ["20-100"], "methods": pairs.FIVE, "seeds": pairs.SEEDS},
    quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
