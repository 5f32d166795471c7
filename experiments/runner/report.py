"""What figures and tables are made of: runs read from their folders, means with their spread, the files to write."""

import csv
import functools
import math
import statistics

from harness.command_line import settles_anyway
from harness.curves import read_curves, row_seconds
from harness.exits import InputError
from harness.files import read_settings

# Settings in which runs that are compared have to be alike,
SAME = (
    "dataset", "backbone", "epochs", "width", "batch_size", "train_images", "learning_rate", "momentum",
    "weight_decay", "halve_every", "focal_gamma", "precision",
)  # fmt: skip
SAME_WITHOUT_SECOND_PASS = ("settle_statistics",)  # beside them, the runs whose statistics are not settled anyway,
SAME_OF_A_METHOD = (  # the runs of one method,
    "label_learning_rate", "label_weight_decay", "entropy_weight", "validation_share",
    "code_size", "autoencoder_learning_rate", "forget", "starved",
)  # fmt: skip
SAME_OF_A_CELL = ("latent_size",)  # and those of one method on the same levels or dataset


class RunOnDisk:
    """What a run's folder says: settings, and curves, epoch by epoch. Raises InputError for curves without settings."""

    def __init__(self, folder):
        self.folder, self.settings, self.rows = folder, read_settings(folder / "settings.json"), read_curves(folder)
        if not self.settings and (folder / "curves.csv").exists():
            raise InputError(f"{folder} has curves, but no settings.json that can be read; put it back or move it away")
        self.seconds = sum(map(row_seconds, self.rows))
        self.finished = len(self.rows) == self.settings.get("epochs")
        self.settles_anyway = settles_anyway(self.settings)

    def column(self, name):
        """An epoch's value of one column of curves.csv, as a list over the epochs; empty where no run wrote it."""
        return [row[name] for row in self.rows if name in row]

    @functools.cached_property
    def accuracy(self):
        """Test accuracies in %, epoch by epoch."""
        return [100 * accuracy for accuracy in self.column("test_primary_accuracy")]


def run_of(task):
    """The RunOnDisk of a Task; None without curves. Raises InputError where the folder is not of the run it names."""
    if not (task.folder / "curves.csv").exists():
        return None
    run = RunOnDisk(task.folder)
    if details := task.mismatch(run.settings):
        raise InputError(f"{task.folder} is not the run that its name says ({details}); move it away, or rename it")
    return run


def listed(runs):
    """The runs of {key: {seed: RunOnDisk}}."""
    return [run for found in runs.values() for run in found.values()]


def generated(runs):
    """Whether any of {key: {seed: RunOnDisk}} is on generated images, beside which no number of the paper belongs."""
    return any(run.settings["dataset"] == "synthetic" for run in listed(runs))


def check_alike(runs):
    """Raise InputError where settings differ in more than method, levels or dataset, and seed.

    runs: {(levels or dataset, method): {seed: RunOnDisk}}.
    """
    by_method = {method: [] for _, method in runs}
    for (_, method), found in runs.items():
        by_method[method] += found.values()
    groups = [(listed(runs), SAME)]
    groups += [([run for run in listed(runs) if not run.settles_anyway], SAME_WITHOUT_SECOND_PASS)]
    groups += [(group, SAME_OF_A_METHOD) for group in by_method.values()]
    groups += [(list(found.values()), SAME_OF_A_CELL) for found in runs.values()]
    for group, names in groups:
        for run in group:
            ours, theirs = run.settings, group[0].settings
            differ = [name for name in names if (ours.get(name) or None) != (theirs.get(name) or None)]
            if differ:
                raise InputError(
                    f"{run.folder} and {group[0].folder} differ in {', '.join(differ)} and cannot stand in one "
                    "figure; name another folder with --out, or move one away"
                )


def alike(runs):
    """The settings that all of {key: {seed: RunOnDisk}} share, in words."""
    everyone = listed(runs)
    settings = everyone[0].settings
    words = [f"{name.replace('_', ' ')} {settings[name]}" for name in SAME if settings.get(name) is not None]
    if "train_images" in settings and settings["train_images"] is None:
        words.append("all training images")
    if any(run.settings.get("settle_statistics") for run in everyone):
        words.append("settled statistics")
    return ", ".join(words)


def finals(runs):
    """{seed: test accuracy in % of the final epoch} of the finished ones among {seed: RunOnDisk}."""
    return {seed: run.accuracy[-1] for seed, run in runs.items() if run.finished}


def gains(runs, others):
    """By how many points the finished ones of {seed: RunOnDisk} end above those of `others` with the same seed."""
    theirs = finals(others)
    return [accuracy - theirs[seed] for seed, accuracy in finals(runs).items() if seed in theirs]


def mean_and_spread(values):
    """Mean and sample standard deviation, the latter None for a single value; two times None for no values.

    Both are NaN where a value is NaN.
    """
    if not values:
        return None, None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, math.nan if math.isnan(mean) else statistics.stdev(values)  # stdev itself fails on NaN


def with_spread(mean, spread, digits=2):
    """ "72.00 ± 2.00", or the mean alone where there is no spread."""
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def missing(runs, seeds):
    """What is not there yet of {seed: RunOnDisk}, in words."""
    words = []
    for seed in seeds:
        run = runs.get(seed)
        if run is None:
            words.append(f"seed {seed} not run")
        elif not run.finished:
            words.append(f"seed {seed} at epoch {len(run.rows)} of {run.settings['epochs']}")
    return ", ".join(words)


def markdown_table(heading, lines):
    """A heading and lines, all lists of cells, as a table in Markdown."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in [heading, *lines])
    return "\n".join([head, "|---" * len(heading) + "|", *body]) + "\n"


def write(root, name, figure, rows, text):
    """Write NAME.png, NAME.pdf, NAME.md and NAME.csv into `root`, and say so. rows: dicts with the same keys."""
    root.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "pdf"):
        figure.savefig(root / f"{name}.{ending}", dpi=200)
    (root / f"{name}.md").write_text(text, encoding="utf-8")
    with open(root / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{name}.png, {name}.pdf, {name}.md and {name}.csv are in {root}")
