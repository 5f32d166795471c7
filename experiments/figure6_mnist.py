"""Figure 6, lower half: the test digits that MAXL's label generator is surest of, for the auxiliary classes of a digit.

    python -m experiments.figure6_mnist --dry-run              # the runs, and their time on this machine
    python -m experiments.figure6_mnist                        # run what is missing, then draw
    python -m experiments.figure6_mnist --plot --out DIR       # from runs that are there
    python -m experiments.figure6_mnist --classes 2 4 7        # some digits
    python -m experiments.figure6_mnist --quick                # a small run on generated images

The runs are Table 1's on MNIST with psi[i] = 3, and their checkpoints are read. The first run of --seeds is drawn.
MNIST has no finer classes to compare with, so the table says how the digits are spread over the generated classes.
"""

import sys

from experiments import figure6, table1
from experiments import trained as checkpoints
from experiments.datasets import registry
from experiments.datasets.registry import DATASETS
from experiments.runner import report
from experiments.runner.main import Experiment
from harness.acceleration import select_device
from harness.exits import InputError

PSI = 3


def spread(labels, primary, classes):
    """How each class's images are spread over its auxiliary classes: a dict a class.

    labels: float (N, sum(psi)); primary: int64 (N,). "used": auxiliary classes that are some image's largest;
    "largest_share": of the images whose largest it is, the most frequent one's; "surest": mean of the images' largest
    probabilities.
    """
    rows = []
    for c in range(classes):
        probability, largest = labels[primary == c].max(dim=1)
        counts = largest.bincount()
        rows.append(
            {
                "used": int((counts > 0).sum()),
                "largest_share": float(counts.max() / counts.sum()),
                "surest": float(probability.mean()),
            }
        )
    return rows


def table(spreads, names):
    """A dict a primary class: means over the seeds of {seed: rows of `spread`}, and ± where there are several."""
    rows = []
    for index, name in enumerate(names):
        row = {"primary_class": name, "n": len(spreads)}
        for column in ("used", "largest_share", "surest"):
            values = [float(found[index][column]) for found in spreads.values()]
            row[f"{column}_mean"], row[f"{column}_std"] = report.mean_and_spread(values)
        rows.append(row)
    return rows


def markdown(rows, found, settings):
    """The table as Markdown, with how it and the picture came about."""
    columns = (("used", 1), ("largest_share", 2), ("surest", 2))
    lines = [
        [
            row["primary_class"],
            *(report.with_spread(row[f"{c}_mean"], row[f"{c}_std"], digits) for c, digits in columns),
        ]
        for row in rows
    ]
    missing, (dataset,) = report.missing(found, settings.seeds), settings.datasets
    return (
        f"MAXL on {DATASETS[dataset].title}, ψ[i] = {PSI} ({report.alike({dataset: found})}), test images; "
        f"mean ± standard deviation over {len(found)} run(s)"
        + (f", unfinished ones included as far as they are ({missing})" if missing else "")
        + f". Figure: run of seed {min(found, key=settings.seeds.index)}, auxiliary classes in an order drawn from "
        f"seed {settings.draw_seed}.\n\n"
    ) + report.markdown_table(
        ["class", "auxiliary classes used", "share of the most frequent", "mean of the largest probability"], lines
    )


def chosen_classes(settings):
    """Ids of the primary classes to draw. Raises InputError for one that the dataset does not have."""
    names = list(map(str, range(DATASETS[settings.datasets[0]].classes)))
    for name in settings.classes:
        if name not in names:
            raise InputError(f"--classes {name} is not among the {len(names)} classes, 0 to {names[-1]}")
    return [names.index(name) for name in settings.classes or names[:10]]


def make_report(settings):
    """The figure, and the table as rows and as text."""
    shown = chosen_classes(settings)
    (dataset,), device = settings.datasets, select_device("auto")
    runs = table1.read_runs(settings.out, [dataset], [PSI], settings.seeds)
    found = runs[dataset, PSI]
    root = settings.data_root or next(iter(found.values())).settings["data_root"]
    few = DATASETS[dataset].classes  # training images, which are not needed: the fewest that there can be
    _, test = registry.load(dataset, root, device, train_images=few)
    primary, classes = test.labels[:, 0].cpu(), DATASETS[dataset].classes
    names, figure, spreads = list(map(str, range(classes))), None, {}
    for seed, run in found.items():
        trained = checkpoints.load_trained(run, table1.task(dataset, PSI, seed, settings.out), device)
        labels = checkpoints.generated_labels(trained.label_generator, test, 0)
        spreads[seed] = spread(labels, primary, classes)
        if figure is None:
            captions, psi = [""] * len(primary), trained.settings["psi"]
            figure = figure6.draw(test.images, captions, labels, psi, primary, shown, names, settings.draw_seed)
    rows = table(spreads, names)
    return figure, rows, markdown(rows, found, settings)


def plan(settings, options=()):
    """Table 1's runs of MAXL with ψ[i] = 3."""
    chosen_classes(settings)
    (dataset,) = settings.datasets
    options = checkpoints.with_data_root(settings, options)
    return [table1.task(dataset, PSI, seed, settings.out, options) for seed in settings.seeds]


def add_options(parser):
    """Add --datasets, which takes one here, and what is drawn."""
    add = parser.add_argument
    add("--datasets", nargs=1, choices=DATASETS, metavar="NAME", help="one dataset (default: mnist)")
    add("--classes", nargs="+", metavar="N", help="primary classes to draw (default: the first ten)")
    figure6.add_draw_seed(parser)
    checkpoints.add_data_root(parser)


experiment = Experiment(
    "figure6_mnist", __doc__, plan, make_report, add_options,
    full={"datasets": ["mnist"], "classes": [], "seeds": table1.SEEDS},
    quick={"datasets": ["synthetic-grey"], "classes": ["0", "1", "2"], "seeds": [0]}, folder="table1",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
