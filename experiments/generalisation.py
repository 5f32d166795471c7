"""Generalisation: test accuracy beside training accuracy, as the epochs go by and where the fit is the same.

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

WINDOWS = 10  # of epochs, in a run
LEVELS = np.arange(5, 100, 5)  # training accuracies in % of the table
GRID = np.arange(0, 100.5, 0.5)  # and of the figure
NEAR = 1.5  # points of training accuracy over which epochs are averaged there


def accuracies(run):
    """Training and test accuracy in %, epoch by epoch."""
    return (100 * np.array(run.column(f"{split}_primary_accuracy")) for split in ("train", "test"))


def windows(values):
    """The values in WINDOWS parts, as equal as can be; each for itself where there are fewer."""
    return np.array_split(values, min(WINDOWS, len(values)))


def by_window(run):
    """Training and test accuracies in %, means over successive windows."""
    return (np.array([part.mean() for part in windows(values)]) for values in accuracies(run))


def at_equal_fit(run, levels):
    """Test accuracies in % where the training accuracy is each of `levels` (%); NaN beyond what it reaches.

    Both accuracies are averaged over the epochs with the weights exp(-d² / 2 NEAR²), d the distance of an epoch's
    training accuracy to a point that runs over all of them; where the one mean is the level, the other is what is
    returned. A run without an epoch has none.
    """
    train, test = accuracies(run)
    if not len(train):
        return []
    points = np.arange(train.min() - 10 * NEAR, train.max() + 10 * NEAR, NEAR / 10)
    exponents = -0.5 * ((points[:, None] - train) / NEAR) ** 2
    weights = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    mean_train, mean_test = (weights @ values / weights.sum(axis=1) for values in (train, test))
    reached = (train.min() <= levels) & (levels <= train.max())
    return np.where(reached, np.interp(levels, mean_train, mean_test), np.nan).tolist()


def table(runs):
    """A dict a cell: pair and method, n finished runs, the epochs (none at equal fit), accuracies in %."""
    rows = []
    for (pair, method), found in runs.items():
        finished = [run for run in found.values() if run.finished]
        if not finished:
            continue
        train, test = (np.transpose(values) for values in zip(*map(by_window, finished)))  # (windows, runs)
        parts = windows(range(1, finished[0].settings["epochs"] + 1))
        names = [f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]
        cells = list(zip(names, test, train))
        equal = zip(LEVELS, *(at_equal_fit(run, LEVELS) for run in finished))
        cells += [("", values, [level] * len(values)) for level, *values in equal if not np.isnan(values).any()]
        for epochs, *values in cells:
            row = {"pair": pair, "method": METHODS[method].label, "n": len(finished), "epochs": epochs}
            columns = {split: map(float, of_runs) for split, of_runs in zip(("test", "train"), values)}
            rows.append(row | report.spread_columns(**columns))
    return rows


def markdown(rows, runs, described, settings):
    """Two tables a pair as Markdown, over the epochs and at equal training accuracy; a column a method."""
    text = (
        "Accuracy of the primary task in %, mean ± standard deviation over n finished runs "
        f"({described}). The training accuracy is that of the first pass, on augmented "
        "batches while the weights change. At a training accuracy: both accuracies are means over epochs of about "
        f"the same training accuracy, weighted by exp(-d² / 2·{NEAR}²), d in points; a halving of the learning rate "
        "lifts both accuracies, so compare where it is still to come for all, or past for all.\n"
    )
    for pair in settings.pairs:
        begun = {METHODS[method].label: found for (p, method), found in runs.items() if p == pair}
        over_epochs, at_level = {}, {}
        for row in (row for row in rows if row["pair"] == pair):
            lines = over_epochs if row["epochs"] else at_level
            lines.setdefault(row["epochs"] or row["train_mean"], {})[row["method"]] = cell(row)
        over_epochs = {f"epochs {epochs}": cells for epochs, cells in over_epochs.items()}
        over_epochs["n"] = {label: str(sum(run.finished for run in found.values())) for label, found in begun.items()}
        over_epochs["missing"] = {label: report.missing(found, settings.seeds) for label, found in begun.items()}
        at_level = {f"training accuracy {level:.0f}": at_level[level] for level in sorted(at_level)}
        for what, lines in (("test / training accuracy", over_epochs), ("test accuracy", at_level)):
            heading = [f"{pairs.title(pair)}, {what}", *begun]
            lines = [[name, *(cells.get(label, "") for label in begun)] for name, cells in lines.items()]
            text += "\n" + report.markdown_table(heading, lines)
    return text


def cell(row):
    """A mean with its spread as text; over the epochs, with the training accuracy."""
    text = report.with_spread(row["test_mean"], row["test_std"], digits=1)
    return f"{text} / {row['train_mean']:.1f}" if row["epochs"] else text


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
    return figure, rows, markdown(rows, runs, described, settings)


experiment = Experiment(
    "generalisation", __doc__, pairs.plan, make_report, functools.partial(pairs.add_options, pairs="20-100"),
    full={"pairs": ["20-100"], "methods": pairs.FIVE, "seeds": pairs.SEEDS},
    quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
