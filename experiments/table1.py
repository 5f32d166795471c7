"""Table 1: Single and MAXL, every primary class split into 2, 3, 5 or 10, on six datasets with three backbones.

    python -m experiments.table1                                    # run what is missing, then draw
    python -m experiments.table1 --datasets mnist --psi 3 --seeds 0 # a part: Single and psi[i] = 3
    python -m experiments.table1 --jobs 4                           # four at a time, spread over the visible GPUs
    python -m experiments.table1 --plot                             # the table of what is there, also meanwhile
    python -m experiments.table1 --quick                            # four small runs on generated images, in minutes

Options that are not its own go to the scripts as they are: --epochs, --channels-last, --precision, --data-root ...
MNIST, SVHN and CIFAR-10 are downloaded; the other three have to be there, or it says where to get them.
"""

import itertools
import statistics
import sys

from experiments.datasets import registry
from experiments.datasets.registry import DATASETS
from experiments.runner import report
from experiments.runner.main import Experiment
from experiments.runner.task import Task, shared_options, with_defaults
from harness.exits import InputError

PSI = [2, 3, 5, 10]
SEEDS = [0, 1, 2]
SINGLE = "single"
SCRIPTS = {name: f"experiments.methods.table1_{name}" for name in (SINGLE, "maxl")}
DEFAULTS = {"--test-statistics": "settled"}  # MAXL's second pass settles its own, so this treats both alike
SIX = ["mnist", "svhn", "cifar10", "imagenet32", "cinic10", "ucf101"]
TITLES = {"conv4": "4-layer ConvNet", "vgg16": "VGG-16", "resnet32": "ResNet-32"}
PAPER = {  # mean, ± in %
    "mnist": {SINGLE: (99.57, 0.02), 2: (99.56, 0.04), 3: (99.71, 0.02), 5: (99.59, 0.03), 10: (99.57, 0.02)},
    "svhn": {SINGLE: (94.05, 0.07), 2: (94.39, 0.08), 3: (94.38, 0.07), 5: (94.59, 0.12), 10: (94.41, 0.09)},
    "cifar10": {SINGLE: (92.77, 0.13), 2: (93.27, 0.09), 3: (93.47, 0.08), 5: (93.49, 0.05), 10: (93.10, 0.08)},
    "imagenet32": {SINGLE: (46.67, 0.12), 2: (46.82, 0.14), 3: (46.97, 0.10), 5: (47.02, 0.11), 10: (46.85, 0.11)},
    "cinic10": {SINGLE: (85.12, 0.08), 2: (85.66, 0.07), 3: (85.72, 0.07), 5: (85.83, 0.08), 10: (85.80, 0.10)},
    "ucf101": {SINGLE: (53.15, 0.12), 2: (54.19, 0.18), 3: (55.39, 0.16), 5: (54.70, 0.12), 10: (54.32, 0.18)},
}


def run_name(dataset, method, seed):
    """The name of a run's folder; method: SINGLE, or MAXL's ψ[i]."""
    return f"single-{dataset}-seed{seed}" if method == SINGLE else f"maxl-{dataset}-psi{method}-seed{seed}"


def task(dataset, method, seed, root, options=()):
    """The run of a method on a dataset from a seed, as a Task."""
    own = ["--dataset", dataset, "--backbone", DATASETS[dataset].backbone, "--seed", str(seed)]
    own += [] if method == SINGLE else ["--psi", str(method)]
    kind = SINGLE if method == SINGLE else "maxl"
    options = shared_options(with_defaults(options, DEFAULTS), SCRIPTS[kind], SCRIPTS.values())
    name = run_name(dataset, method, seed)
    return Task(name, f"{kind} on {dataset}", SCRIPTS[kind], tuple(own), root, options, registry)


def plan(settings, options=()):
    """The runs, seed by seed, dataset by dataset. Raises InputError for a ψ[i] that cannot be."""
    if not all(1 <= size <= 1000 for size in settings.psi):
        raise InputError(f"--psi {' '.join(map(str, settings.psi))} is out of range; give whole numbers from 1 to 1000")
    return [
        task(dataset, method, seed, settings.out, options)
        for seed in settings.seeds
        for dataset in settings.datasets
        for method in [SINGLE, *settings.psi]
    ]


# --- the table ---


def read_runs(root, datasets, methods, seeds):
    """{(dataset, method): {seed: RunOnDisk}} of all folders that have curves.

    Raises InputError if there are none, and if runs on one dataset differ in more than method, ψ and seed.
    """
    runs = {}
    for dataset in datasets:
        for method, seed in itertools.product(methods, seeds):
            run = report.run_of(task(dataset, method, seed, root))
            if run is not None:
                runs.setdefault((dataset, method), {})[seed] = run
        report.check_alike(runs_on(dataset, runs))
    if not runs:
        raise InputError(f"there are no runs of these datasets and seeds in {root} yet; start them without --plot")
    return runs


def runs_on(dataset, runs):
    """Those of {(dataset, method): ...} on one dataset."""
    return {key: found for key, found in runs.items() if key[0] == dataset}


def describe(runs):
    """report.describe of runs on one dataset."""
    return report.describe(runs, lambda method: "Single" if method == SINGLE else "MAXL")


def table(runs, settings):
    """A dict a cell: dataset and method, test accuracy in % of the final epoch, the gain over Single, the paper's."""
    rows = []
    for dataset, method in itertools.product(settings.datasets, [SINGLE, *settings.psi]):
        found, values = runs.get((dataset, method), {}), report.finals(runs.get((dataset, method), {}))
        row = {"dataset": dataset, "backbone": DATASETS[dataset].backbone, "method": str(method)}
        row |= {"begun": len(found), "n": len(values)}
        row["mean"], row["std"] = report.mean_and_spread(list(values.values()))
        gains = report.gains(found, runs.get((dataset, SINGLE), {})) if method != SINGLE else []
        row |= {"gain_n": len(gains)} | report.spread_columns(gain=gains)
        row["paper_mean"], row["paper_std"] = PAPER.get(dataset, {}).get(method, (None, None))
        row["seconds_per_run"] = statistics.fmean(found[seed].seconds for seed in values) if values else None
        rows.append(row | {"missing": report.missing(found, settings.seeds)})
    return rows


def titles(dataset):
    """Of a dataset and of its backbone."""
    return DATASETS[dataset].title, TITLES.get(DATASETS[dataset].backbone, DATASETS[dataset].backbone)


def markdown(rows, runs):
    """Two lines a dataset, ours and the paper's, a column a method, the best of each line in bold; what is missing."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    headings = ["Single" if name == SINGLE else f"MAXL, ψ[i] = {name}" for name in names]
    lines, notes = [], []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        cells = [row for row in rows if row["dataset"] == dataset]
        title, backbone = titles(dataset)
        lines.append([title, backbone, "ours", *line(cells)])
        if dataset in PAPER:
            lines.append(["", "", "paper", *line(cells, "paper_")])
        alike = [describe(found) for found in [runs_on(dataset, runs)] if found]
        missing = [f"{name}: {row['missing']}" for name, row in zip(headings, cells) if row["missing"] and row["begun"]]
        marked = ["the paper itself has 54.70 in bold"] if dataset == "ucf101" else []
        notes.append(f"- {title}: " + "; ".join([*(alike or ["not run"]), *missing, *marked]) + ".\n")
    return (
        "Test accuracy in % in the final epoch, mean ± standard deviation, in brackets the number of finished runs; "
        "the best of a line in bold, of however many runs it is the mean.\n\n"
    ) + "\n".join([report.markdown_table(["dataset", "backbone", "", *headings], lines), "".join(notes)])


def line(cells, whose=""):
    """A line's cells as text, the best in bold; whose: "" or "paper_"."""
    best, texts = max(row[f"{whose}mean"] or 0.0 for row in cells), []
    for row in cells:
        mean, spread = row[f"{whose}mean"], row[f"{whose}std"]
        if mean is None:
            texts.append("" if whose else "not finished" if row["begun"] else "not run")
            continue
        text = report.with_spread(mean, spread)
        texts.append((f"**{text}**" if mean == best else text) + ("" if whose else f" ({row['n']})"))
    return texts


def make_report(settings):
    """No figure, and the table as rows and as text; what was not run is shown as such."""
    runs = read_runs(settings.out, settings.datasets, [SINGLE, *settings.psi], settings.seeds)
    rows = table(runs, settings)
    return None, rows, markdown(rows, runs)


def add_options(parser):
    """Add --datasets and --psi."""
    add = parser.add_argument
    add(
        "--datasets", nargs="+", choices=DATASETS, metavar="NAME",
        help=f"{', '.join(DATASETS)} (default: the first six)",
    )  # fmt: skip
    add("--psi", nargs="+", type=int, metavar="N", help=f"classes of each primary class (default: {PSI})")


experiment = Experiment(
    "table1", __doc__, plan, make_report, add_options,
    full={"datasets": SIX, "psi": PSI, "seeds": SEEDS},
    quick={"datasets": ["synthetic-grey", "synthetic"], "psi": [3], "seeds": [0]},
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
