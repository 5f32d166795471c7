"""Figure 6, lower half: the test digits with MAXL's largest label probabilities, for the auxiliary classes of a digit.

    python -m experiments.figure6_mnist                        # run what is missing, then draw
    python -m experiments.figure6_mnist --classes 2 4 7        # some digits
    python -m experiments.figure6_mnist --quick                # a small run on generated images

The runs are Table 1's on MNIST with psi[i] = 3, and their checkpoints are read. The first run of --seeds is drawn.
MNIST has no finer classes to compare with, so the table says how the digits are spread over the generated classes.
"""

import argparse
import sys

from experiments import figure6, table1, trained
from experiments.datasets import registry
from experiments.datasets.registry import DATASETS
from experiments.runner import report
from experiments.runner.main import Experiment
from harness.acceleration import select_device

PSI = 3
COLUMNS = {
    "auxiliary classes used": ("used", 1), "share of the most frequent": ("largest_share", 2),
    "mean of the largest probability": ("surest", 2),
}  # fmt: skip


def spread(labels, primary, classes):
    """How each class's images are spread over its auxiliary classes: {column: a list of one number a class}.

    labels: float (N, sum(psi)); primary: int64 (N,). "used": auxiliary classes that are some image's largest;
    "largest_share": of the images whose largest it is, the most frequent one's; "surest": mean of the images' largest
    probabilities.
    """
    found = {"used": [], "largest_share": [], "surest": []}
    for c in range(classes):
        probability, largest = labels[primary == c].max(dim=1)
        counts = largest.bincount()
        found["used"].append(int((counts > 0).sum()))
        found["largest_share"].append(float(counts.max() / counts.sum()))
        found["surest"].append(float(probability.mean()))
    return found


def chosen_of(settings):
    """figure6.chosen_classes of settings.classes or, if that is empty, of the first ten."""
    names = list(map(str, range(DATASETS[settings.datasets[0]].classes)))
    return figure6.chosen_classes(settings.classes or names[:10], names)


def make_report(settings):
    """The figure, and the table as rows and as text."""
    shown = chosen_of(settings)
    (dataset,), device = settings.datasets, select_device(argparse.Namespace(device="auto"))
    runs = table1.read_runs(settings.out, [dataset], [PSI], settings.seeds)
    found, described, classes = runs[dataset, PSI], table1.describe(runs), DATASETS[dataset].classes
    few = {"train_images": classes}  # which are not needed: the fewest that there can be
    _, test = trained.load_data(next(iter(found.values())), settings.data_root, device, registry.load, **few)
    figure, rows = figure6.draw_and_measure(
        found, lambda seed: table1.task(dataset, PSI, seed, settings.out), device, test, 0, shown,
        [f"{c}" for c in range(classes)], [""] * len(test), described,
        lambda one, labels: spread(labels, test.labels[:, 0].cpu(), classes),
    )  # fmt: skip
    missing = report.missing(found, settings.seeds)
    text = (
        f"MAXL, ψ[i] = {PSI} ({described}), test images; mean ± standard deviation over {rows[0]['n']} run(s)"
        + (f", unfinished ones included as far as they are ({missing})" if missing else "")
        + ".\n\n"
    ) + report.rows_as_markdown(rows, {"class": "primary_class"} | COLUMNS)
    return figure, rows, text


def plan(settings, options=()):
    """Table 1's runs of MAXL with ψ[i] = 3."""
    chosen_of(settings)
    return [table1.task(settings.datasets[0], PSI, seed, settings.out, options) for seed in settings.seeds]


def add_options(parser):
    """Add --datasets, which takes one here, and what is drawn."""
    add = parser.add_argument
    add("--datasets", nargs=1, choices=DATASETS, metavar="NAME", help="one dataset (default: mnist)")
    add("--classes", nargs="+", metavar="N", help="primary classes to draw (default: the first ten)")


experiment = Experiment(
    "figure6_mnist", __doc__, plan, make_report, add_options,
    full={"datasets": ["mnist"], "classes": [], "seeds": table1.SEEDS},
    quick={"datasets": ["synthetic-grey"], "classes": ["0", "1", "2"], "seeds": [0]}, folder="table1",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
