"""What figures and tables are made of: runs read from their folders, means with their spread, the files to write."""

import csv
import functools
import itertools
import math
import statistics

from experiments.datasets.registry import DATASETS
from harness.command_line import FREE_ON_RESUME
from harness.curves import read_curves, row_seconds
from harness.exits import InputError
from harness.files import read_settings

# Settings in which runs that are compared may differ, beside those that a task's own arguments set
MAY_DIFFER = (FREE_ON_RESUME - {"epochs"}) | {"cosine_every", "meta_gradient", "script", "sessions"}
TITLES = {"cifar100": "4-level CIFAR-100"} | {name: dataset.title for name, dataset in DATASETS.items()}


class RunOnDisk:
    """What a run's folder says: settings, and curves, epoch by epoch. Raises InputError for curves without settings.

    own: names of the settings that make it this run.
    """

    def __init__(self, folder, own=()):
        self.folder, self.settings, self.rows = folder, read_settings(folder / "settings.json"), read_curves(folder)
        self.own = own
        self.measured = {}  # what a figure has measured of the run's networks, by name
        if not self.settings and (folder / "curves.csv").exists():
            raise InputError(f"{folder} has curves, but no settings.json that can be read; put it back or move it away")
        self.seconds = sum(map(row_seconds, self.rows))
        self.finished = len(self.rows) == self.settings.get("epochs")

    def column(self, name):
        """An epoch's value of one column of curves.csv, as a list over the epochs; empty if no run wrote it."""
        return [row[name] for row in self.rows if name in row]

    @functools.cached_property
    def accuracy(self):
        """Test accuracies in %, epoch by epoch."""
        return [100 * accuracy for accuracy in self.column("test_primary_accuracy")]


def measured(names):
    """{name: RunOnDisk -> the number of that name among its measured ones}."""
    return {name: lambda run, name=name: run.measured[name] for name in names}


def run_of(task):
    """The RunOnDisk of a Task; None without curves. Raises InputError if the folder is not of the run it names."""
    if not (task.folder / "curves.csv").exists():
        return None
    run = RunOnDisk(task.folder, task.own_names)
    if details := task.mismatch(run.settings):
        raise InputError(f"{task.folder} is not the run that its name says ({details}); move it away, or rename it")
    return run


def read_runs(task_of, root, groups, methods, seeds):
    """{(group, method): {seed: RunOnDisk}} of all runs in the folder `root` that have curves.

    task_of: (group, method, seed) -> a Task. groups: pairs or datasets. Raises InputError as run_of does, and if there
    are none.
    """
    runs = {}
    for group, method, seed in itertools.product(groups, methods, seeds):
        run = run_of(task_of(group, method, seed))
        if run is not None:
            runs.setdefault((group, method), {})[seed] = run
    if not runs:
        raise InputError(f"there are no runs of {', '.join(groups)} with these seeds in {root} yet; start them first")
    return runs


def listed(runs):
    """The runs of {key: {seed: RunOnDisk}}."""
    return [run for found in runs.values() for run in found.values()]


def generated(runs):
    """Whether any of {key: {seed: RunOnDisk}} is on generated images, beside which no number of the paper belongs."""
    return any(run.settings["dataset"].startswith("synthetic") for run in listed(runs))


# --- what makes runs comparable ---


def difference(described):
    """A setting in which runs differ that are to be compared: (name, (who, value), (who, value)), or None.

    described: (who, method, settings, own) of each run. Every setting that two runs have has to be the same, but for
    those that either's own arguments set and MAY_DIFFER; test_statistics within a method only.
    """
    first = {}
    for who, method, settings, own in described:
        session = (settings.get("sessions") or [{}])[-1]  # where it ran, which stands among its settings too
        for name in settings.keys() - MAY_DIFFER - set(own) - session.keys():
            key = (name, method) if name == "test_statistics" else name
            other, value = first.setdefault(key, (who, settings[name]))
            if value != settings[name]:
                return name, (other, value), (who, settings[name])
    return None


def check_alike(runs):
    """Raise InputError if runs, {(levels or dataset, method): {seed: RunOnDisk}}, are not comparable."""
    described = (
        (run.folder, method, run.settings, run.own) for (_, method), found in runs.items() for run in found.values()
    )
    if found := difference(described):
        name, (one, value), (other, another) = found
        raise InputError(
            f"{one} and {other} differ in {name} ({value} and {another}) and cannot stand in one figure; name another "
            "folder with --out, or move one away"
        )


def describe(runs, label=str):
    """What all of {(..., method): {seed: RunOnDisk}} share, in words: data, network, length, seeds, test statistics.

    label: method -> its name in a figure.
    """
    settings = listed(runs)[0].settings
    images = settings.get("train_images")
    seeds = sorted({seed for found in runs.values() for seed in found})
    words = [
        TITLES.get(settings["dataset"], settings["dataset"]),
        f"{settings.get('backbone') or 'VGG-16'} of width {settings.get('width')}",
        f"{images} training images" if images else "all training images",
        f"{settings['epochs']} epoch{'s' * (settings['epochs'] > 1)}",
        f"batches of {settings.get('batch_size')}",
        f"learning rate {settings.get('learning_rate')}",
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
    ]
    if settings.get("precision", "fp32") != "fp32":
        words.append(settings["precision"])
    statistics_of = {}
    for (*_, method), found in runs.items():
        for run in found.values():
            statistics_of.setdefault(run.settings.get("test_statistics"), {})[label(method)] = None
    for name, names in statistics_of.items():
        who = f"{', '.join(names)} " if len(statistics_of) > 1 else ""
        words.append(f"{who}tested with {name} statistics")
    return "; ".join(words)


# --- numbers ---


def finals(runs):
    """{seed: test accuracy in % of the final epoch} of the finished ones among {seed: RunOnDisk}."""
    return {seed: run.accuracy[-1] for seed, run in runs.items() if run.finished}


def gains(runs, others):
    """By how many points the finished ones of {seed: RunOnDisk} end above those of `others` with the same seed."""
    theirs = finals(others)
    return [accuracy - theirs[seed] for seed, accuracy in finals(runs).items() if seed in theirs]


def mean_and_spread(values):
    """Mean and sample standard deviation, the latter None for a single value; two times None for no values.

    Both are NaN if a value is NaN.
    """
    if not values:
        return None, None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, math.nan if math.isnan(mean) else statistics.stdev(values)  # stdev itself fails on NaN


def spread_columns(**columns):
    """Of lists of numbers by name: {name_mean: ..., name_std: ...}, for a table's row."""
    found = {name: mean_and_spread(list(values)) for name, values in columns.items()}
    return {f"{name}_{what}": value for name, pair in found.items() for what, value in zip(("mean", "std"), pair)}


def with_spread(mean, spread, digits=2):
    """ "72.00 ± 2.00", the mean alone if there is no spread, nothing if there is no mean."""
    if mean is None:
        return ""
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


# --- files ---


def rows_as_markdown(rows, columns):
    """A table's rows, dicts, as a table in Markdown.

    columns: {heading: what}, what being a key of the row, a function of the row, or (name, digits) for a mean with its
    spread, whose place says "not run" or "unfinished" if there is none.
    """

    def cell(row, what):
        if isinstance(what, tuple):
            mean, spread = row[f"{what[0]}_mean"], row[f"{what[0]}_std"]
            return with_spread(mean, spread, what[1]) if mean is not None else NOTHING[bool(row.get("begun"))]
        value = what(row) if callable(what) else row[what]
        return "" if value is None else str(value)

    return markdown_table(list(columns), [[cell(row, what) for what in columns.values()] for row in rows])


NOTHING = {False: "not run", True: "unfinished"}  # in place of a mean


def markdown_table(heading, lines):
    """A heading and lines, all lists of cells, as a table in Markdown."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in [heading, *lines])
    return "\n".join([head, "|---" * len(heading) + "|", *body]) + "\n"


def write(root, name, figure, rows, text):
    """Write NAME.png and NAME.pdf, unless figure is None, NAME.md and NAME.csv into `root`, and say so.

    rows: dicts with the same keys.
    """
    root.mkdir(parents=True, exist_ok=True)
    endings = ["png", "pdf"] if figure else []
    for ending in endings:
        figure.savefig(root / f"{name}.{ending}", dpi=200)
    (root / f"{name}.md").write_text(text, encoding="utf-8")
    with open(root / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{', '.join(f'{name}.{ending}' for ending in [*endings, 'md', 'csv'])} are in {root}")
