"""Generalisation: test accuracy beside training accuracy, as the epochs go by and where the fit is the same.

    python -m experiments.generalisation --dry-run         # the runs, and how long they will take on this machine
    python -m experiments.generalisation                   # run what is missing, then draw
    python -m experiments.generalisation --plot --out DIR  # from runs that are there
    python -m experiments.generalisation --quick           # small runs on generated images

A check of ours on the curves of Figure 3's runs. Where networks overfit, a method that fits its images more slowly may
end higher for that alone; at the same training accuracy it has no such advantage.
"""

import sys

import numpy as np

from experiments import cifar100
from experiments.cifar100 import METHODS
from experiments.runner import report
from experiments.runner.main import Experiment
from harness.exits import InputError

WINDOWS = 10  # of epochs, in a run
LEVELS = range(5, 100, 5)  # training accuracies in % of the table
GRID = np.arange(0, 100.5, 0.5)  # and of the figure
NEAR = 1.5  # to these, in points


def accuracies(run):
    """Training and test accuracy in %, epoch by epoch."""
    return (100 * np.array(run.column(f"{split}_primary_accuracy")) for split in ("train", "test"))


def window_of(run):
    """Epochs over which accuracies are averaged."""
    return max(1, run.settings["epochs"] // WINDOWS)


def by_window(run):
    """Training and test accuracies in %, means over successive windows."""
    window = window_of(run)
    return (values[: len(values) // window * window].reshape(-1, window).mean(axis=1) for values in accuracies(run))


def at_equal_fit(run, levels):
    """Test accuracies in % where the training accuracy is each of `levels` (%); NaN beyond what it reaches.

    A mean over the epochs, weighted by how near their training accuracy is to the level: exp(-d² / 2 NEAR²). A run
    without an epoch has none.
    """
    train, test = accuracies(run)
    if not len(train):
        return []
    levels = np.array(levels)
    within = levels.clip(train.min(), train.max())
    weights = np.exp(-0.5 * ((within[:, None] - train) / NEAR) ** 2)
    return np.where(within == levels, weights @ test / weights.sum(axis=1), np.nan).tolist()


def table(runs):
    """A dict a cell: pair and method, n finished runs, the epochs (none at equal fit), accuracies in %."""
    rows = []
    for (pair, method), found in runs.items():
        finished = [run for run in found.values() if run.finished]
        if not finished:
            continue
        window = window_of(finished[0])
        train, test = (np.transpose(values) for values in zip(*map(by_window, finished)))  # (windows, runs)
        names = [f"{i * window + 1} to {(i + 1) * window}" if window > 1 else str(i + 1) for i in range(len(test))]
        cells = list(zip(names, test, train))
        equal = zip(LEVELS, *(at_equal_fit(run, LEVELS) for run in finished))
        cells += [("", values, [level] * len(values)) for level, *values in equal if not np.isnan(values).any()]
        for epochs, *values in cells:
            row = {"pair": pair, "method": METHODS[method].label, "n": len(finished), "epochs": epochs}
            for split, of_runs in zip(("test", "train"), values):
                row[f"{split}_mean"], row[f"{split}_std"] = report.mean_and_spread(list(map(float, of_runs)))
            rows.append(row)
    return rows


def markdown(rows, runs, pairs, seeds):
    """Two tables a pair as Markdown, over the epochs and at equal training accuracy; a column a method."""
    text = (
        "Accuracy of the primary task in %, mean ± standard deviation over n finished runs "
        f"({report.alike(report.listed(runs)[0])}). The training accuracy is that of the first pass, on augmented "
        "batches while the weights change. At a training accuracy: mean over epochs, weighted by their training "
        f"accuracy's distance d to it, exp(-d² / 2·{NEAR}²); a halving of the learning rate lifts both accuracies, so "
        "compare where all have it before them, or all behind.\n"
    )
    for pair in pairs:
        begun = {METHODS[method].label: found for (p, method), found in runs.items() if p == pair}
        over_epochs, at_level = {}, {}
        for row in (row for row in rows if row["pair"] == pair):
            lines = over_epochs if row["epochs"] else at_level
            lines.setdefault(row["epochs"] or row["train_mean"], {})[row["method"]] = cell(row)
        over_epochs = {f"epochs {epochs}": cells for epochs, cells in over_epochs.items()}
        over_epochs["n"] = {label: str(sum(run.finished for run in found.values())) for label, found in begun.items()}
        over_epochs["missing"] = {label: report.missing(found, seeds) for label, found in begun.items()}
        at_level = {f"training accuracy {level:.0f}": at_level[level] for level in sorted(at_level)}
        for what, lines in (("test / training accuracy", over_epochs), ("test accuracy", at_level)):
            heading = [f"{pair.replace('-', ' → ')}, {what}", *begun]
            lines = [[name, *(cells.get(label, "") for label in begun)] for name, cells in lines.items()]
            text += "\n" + report.markdown_table(heading, lines)
    return text


def cell(row):
    """A mean with its spread as text; over the epochs, with the training accuracy."""
    text = report.with_spread(row["test_mean"], row["test_std"], digits=1)
    return f"{text} / {row['train_mean']:.1f}" if row["epochs"] else text


def make_report(settings):
    """Test accuracy over training accuracy as a figure, unfinished runs included, and the tables."""
    runs = cifar100.read_runs(settings.out, METHODS, settings.pairs, settings.seeds)
    rows = table(runs)
    if not rows:
        raise InputError(f"none of the runs of these pairs and seeds in {settings.out} is finished yet")
    figure = cifar100.draw_curves(
        runs, settings.pairs, METHODS, "test accuracy (%)", lambda run: at_equal_fit(run, GRID),
        over=("training accuracy (%)", GRID),
    )  # fmt: skip
    return figure, rows, markdown(rows, runs, settings.pairs, settings.seeds)


experiment = Experiment(
    "generalisation", __doc__, cifar100.plan, make_report, cifar100.add_options,
    full={"pairs": ["20-100"], "methods": cifar100.FIVE, "seeds": cifar100.SEEDS},
    quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
