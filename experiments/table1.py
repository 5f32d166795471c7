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
from experiments.runner.task import Task, shared_options
from harness.exits import InputError

PSI = [2, 3, 5, 10]
SEEDS = [0, 1, 2]
SINGLE = "single"
SCRIPTS = {name: f"experiments.methods.table1_{name}" for name in (SINGLE, "maxl")}
DEFAULTS = ["--test-statistics", "settled"]  # MAXL's second pass settles its own, so this treats both alike
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


def task(dataset, method, seed, root, options=()):
    """The run of a method, SINGLE or MAXL's ψ[i], on a dataset from a seed, as a Task."""
    own = ["--dataset", dataset, "--backbone", DATASETS[dataset].backbone, "--seed", str(seed)]
    kind, name = SINGLE, f"single-{dataset}-seed{seed}"
    if method != SINGLE:
        kind, name = "maxl", f"maxl-{dataset}-psi{method}-seed{seed}"
        own += ["--psi", str(method)]
    options = shared_options([*DEFAULTS, *options], SCRIPTS[kind], SCRIPTS.values())
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
    runs = report.read_runs(
        lambda dataset, method, seed: task(dataset, method, seed, root), root, datasets, methods, seeds
    )
    for dataset in datasets:
        report.check_alike(runs_on(dataset, runs))
    return runs


def runs_on(dataset, runs):
    """Those of {(dataset, method): ...} on one dataset."""
    return {key: found for key, found in runs.items() if key[0] == dataset}


def describe(runs):
    """report.describe of runs on one dataset."""
    return report.describe(runs, lambda method: "Single" if method == SINGLE else "MAXL")


def table(runs, settings):
    """A dict a row: dataset and method, test accuracy in % of the final epoch, the gain over Single, the paper's."""
    rows = []
    for dataset, method in itertools.product(settings.datasets, [SINGLE, *settings.psi]):
        found, single = runs.get((dataset, method), {}), runs.get((dataset, SINGLE), {})
        values, gains = report.finals(found), report.gains(found, single) if method != SINGLE else []
        row = {"dataset": dataset, "backbone": DATASETS[dataset].backbone, "method": str(method)}
        row |= {"begun": len(found), "n": len(values)} | report.spread_columns(accuracy=values.values(), gain=gains)
        row["paper_mean"], row["paper_std"] = PAPER.get(dataset, {}).get(method, (None, None))
        row["seconds_per_run"] = statistics.fmean(found[seed].seconds for seed in values) if values else None
        rows.append(row | {"missing": report.missing(found, settings.seeds)})
    return rows


def markdown(rows, runs):
    """The table as Markdown, and what the runs on each dataset share."""
    columns = {
        "dataset": lambda row: DATASETS[row["dataset"]].title,
        "backbone": lambda row: TITLES.get(row["backbone"], row["backbone"]),
        "method": lambda row: "Single" if row["method"] == SINGLE else f"MAXL, ψ[i] = {row['method']}",
        "test accuracy (%)": ("accuracy", 2),
        "in the paper (%)": lambda row: report.with_spread(row["paper_mean"], row["paper_std"]),
        "above Single": lambda row: report.with_spread(row["gain_mean"], row["gain_std"]),
        "n": "n", "missing": "missing",
    }  # fmt: skip
    described = dict.fromkeys(describe(runs_on(dataset, runs)) for dataset, _ in runs)
    return (
        "Test accuracy in % in the final epoch, mean ± standard deviation over n finished runs. Above Single: the gain "
        "over Single's run with the same seed.\n\n"
        + report.rows_as_markdown(rows, columns)
        + "".join(f"\n- {words}." for words in described)
        + "\n"
    )


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
