"""Figure 6: the test images with MAXL's largest label probabilities, for three auxiliary classes of a primary class.

    python -m experiments.figure6                                      # run what is missing, then draw
    python -m experiments.figure6 --plot --classes fish people trees   # other primary classes
    python -m experiments.figure6 --quick                              # a small run on generated images

The runs are Figure 3's, and their checkpoints are read. The first run of --seeds is drawn. The paper leaves the rest to
the eye; here it is measured, too: how much the generated classes have in common with the true fine classes, as
normalised mutual information, beside that of random labels. Needs scikit-learn (pip install scikit-learn). The lower
half of the figure, on MNIST, is python -m experiments.figure6_mnist.
"""

import argparse
import sys
import textwrap

import numpy as np

from experiments import pairs, trained
from experiments.methods.random_labels import random_labels
from experiments.runner import drawing, report
from experiments.runner.main import Experiment
from harness.acceleration import select_device
from harness.exits import InputError

# Of level 2, under the paper's "aquatic mammals", "household furnitures", "invertebrates", "nature scenes", "flowers"
CLASSES = ["aquatic_mammals", "household_furniture", "insects", "large_natural_outdoor_scenes", "flowers"]
AUXILIARY, IMAGES = 3, 5  # classes of each primary class, and images of each of these
RANDOM_DRAWS = 100  # of random labels


def chosen_classes(wanted, names):
    """Ids of the primary classes to draw, by their names. Raises InputError for one that is not among `names`."""
    for name in wanted:
        if name not in names:
            raise InputError(f"--classes {name} is not among the {len(names)} primary classes: {', '.join(names)}")
    return [names.index(name) for name in wanted]


def chosen_of(settings):
    """chosen_classes of settings.classes or, if that is empty, of the paper's, as far as the level has them."""
    names = pairs.class_names(settings.pairs[0])
    default = CLASSES if set(CLASSES) <= set(names) else names[: len(CLASSES)]
    return chosen_classes(settings.classes or default, names)


def top_images(labels, primary, psi, primary_class, seed=0):
    """Some of a primary class's auxiliary classes, from a seed, with the images of highest probability in each.

    labels: float (N, sum(psi)); primary: int64 (N,). Returns {auxiliary class: indices of images, the highest first}.
    """
    members = (primary == primary_class).nonzero().flatten()
    rng = np.random.default_rng([seed, primary_class])  # whatever other classes are drawn
    own = rng.permutation(psi[primary_class])[:AUXILIARY] + sum(psi[:primary_class])
    return {k: members[labels[members, k].argsort(descending=True, stable=True)][:IMAGES].tolist() for k in own}


# --- the number ---


def shared_information(auxiliary, labels, primary_level):
    """Normalised mutual information of auxiliary and true fine classes within each primary class: floats, 0 to 1.

    auxiliary: int64 (N,); labels: int64 (N, 4). Divided by the arithmetic mean of the two entropies.
    """
    from sklearn.metrics import normalized_mutual_info_score

    primary, fine = labels[:, primary_level], labels[:, -1]
    members = [primary == c for c in range(int(primary.max()) + 1)]
    return [float(normalized_mutual_info_score(fine[m], auxiliary[m], average_method="arithmetic")) for m in members]


def random_information(psi, labels, primary_level, draws=RANDOM_DRAWS):
    """The same of random labels, as the baseline Random has them, by primary class: mean over the draws."""
    drawn = (random_labels(labels[:, primary_level], psi, seed) for seed in range(draws))
    return np.mean([shared_information(auxiliary, labels, primary_level) for auxiliary in drawn], axis=0).tolist()


# --- the figure ---


def draw(pixels, captions, labels, psi, primary, classes, names, described):
    """A row a primary class, a block an auxiliary class; under an image its probability and its caption.

    pixels: uint8 (N, 32, 32, C). captions: N texts. labels, primary: as in top_images. names: of all primary classes.
    """
    from matplotlib.figure import Figure

    margin, height = 1.1, 1.02  # inches: the names on the left, a row
    figure = Figure(figsize=(margin + 0.72 * (AUXILIARY * IMAGES + 1), 0.8 + height * len(classes)))
    widths = ([1.0] * IMAGES + [0.35]) * AUXILIARY
    grid = figure.add_gridspec(
        len(classes), len(widths), width_ratios=widths, left=margin / figure.get_figwidth(), right=0.999, wspace=0.06,
        bottom=0.6 / figure.get_figheight(), top=1 - 0.35 / figure.get_figheight(), hspace=0.5,
    )  # fmt: skip
    for line, primary_class in enumerate(classes):
        tops = top_images(labels, primary, psi, primary_class)
        for block, (k, images) in enumerate(tops.items()):
            for column, image in enumerate(images):
                axes = figure.add_subplot(grid[line, block * (IMAGES + 1) + column])
                axes.imshow(pixels[image].cpu().numpy(), cmap="gray", vmin=0, vmax=255, interpolation="lanczos")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(linewidth=0.4, color="lightgray")  # an edge for what lies on white
                for place, words in ((-0.14, f"{labels[image, k]:.2f}"), (-0.28, captions[image])):
                    axes.text(0.5, place, words, transform=axes.transAxes, fontsize=6.5, ha="center", va="baseline")
                if column == 0:
                    axes.set_ylabel(f"class {k}", fontsize=6, labelpad=1.5)
                if column == IMAGES // 2 and line == 0:
                    axes.set_title(f"auxiliary class #{block + 1}", fontsize=9, pad=5)
                if column == block == 0:
                    words = textwrap.fill(names[primary_class], 13)
                    style = {"fontsize": 8, "ha": "right", "va": "center", "linespacing": 1.1}
                    axes.text(-0.28, 0.5, words, transform=axes.transAxes, **style)
    drawing.caption(figure, f"{described}; under each image its probability of the auxiliary class")
    return figure


# --- from the runs ---


def draw_and_measure(found, task_of, device, test, level, classes, names, captions, described, measure):
    """The figure of the first of {seed: RunOnDisk}, and the table's rows as dicts: a primary class, and their mean.

    task_of: seed -> the run's Task. test: a Split; level: of the primary classes; classes, names, captions: as in
    draw. measure: (Trained, labels) -> {column: a list of one number a class}; the rows are means over the seeds.
    """
    figure, measured, primary = None, [], test.labels[:, level].cpu()
    for seed, run in found.items():
        one = trained.load_trained(run, task_of(seed), device)
        labels = trained.generated_labels(one.label_generator, test, level)
        measured.append(measure(one, labels))
        if figure is None:
            words = f"{described}; drawn: seed {seed}"
            figure = draw(test.images, captions, labels, one.settings.psi, primary, classes, names, words)
    rows = []
    for index, name in enumerate([*names, "mean over classes"]):
        row = {"primary_class": name, "n": len(measured)}
        for column in measured[0]:
            values = [np.mean(one[column]) if index == len(names) else one[column][index] for one in measured]
            row |= report.spread_columns(**{column: map(float, values)})
        rows.append(row)
    return figure, rows


COLUMNS = {
    "NMI": ("nmi", 3), "of the first weights": ("nmi_first", 3), "of random labels": ("nmi_random", 3),
    "classes used": ("used", 1),
}  # fmt: skip


def make_report(settings):
    """The figure, and the table as rows and as text."""
    classes, pair = chosen_of(settings), settings.pairs[0]
    device, level = select_device(argparse.Namespace(device="auto")), pairs.PAIRS[pair][0]
    runs = pairs.read_runs(settings.out, ["maxl"], [pair], settings.seeds)
    found, described = runs[pair, "maxl"], pairs.describe(runs)
    test = trained.load_test(runs, settings.data_root, device)
    targets, names, fine = test.labels.cpu(), trained.class_names(runs, level), trained.class_names(runs, 3)

    def measure(one, labels):
        largest = labels.argmax(dim=1)
        at_first = trained.generated_labels(one.first_label_generator, test, level, trained=False).argmax(dim=1)
        return {
            "nmi": shared_information(largest, targets, level),
            "nmi_first": shared_information(at_first, targets, level),
            "nmi_random": random_information(one.settings.psi, targets, level),
            "used": [len(largest[targets[:, level] == c].unique()) for c in range(len(names))],
        }

    figure, rows = draw_and_measure(
        found, lambda seed: pairs.task("maxl", pair, seed, settings.out), device, test, level, classes, names,
        [fine[c] for c in targets[:, -1]], described, measure,
    )  # fmt: skip
    missing = report.missing(found, settings.seeds)
    text = (
        f"MAXL, {pairs.title(pair)} ({described}). NMI: normalised mutual information (over the arithmetic mean of the "
        "two entropies) of the auxiliary class with the largest probability and the true fine class, over the test "
        "images of each primary class. It is 1 if the two are the same, and not quite 0 if they are unrelated; so the "
        f"mean of {RANDOM_DRAWS} random, balanced assignments stands beside it, and what the label generator's first "
        f"weights give. Mean ± standard deviation over {rows[0]['n']} run(s)"
        + (f", unfinished ones included as far as they are ({missing})" if missing else "")
        + ". Classes used: auxiliary classes that are the largest for some test image.\n\n"
        f"Figure: for {AUXILIARY} auxiliary classes of each primary class, drawn at random, the {IMAGES} test images "
        "of the highest probability, with the probability and the true fine class. The paper's \"invertebrates\" and "
        "\"nature scenes\" are taken for CIFAR-100's insects and large natural outdoor scenes.\n\n"
    ) + report.rows_as_markdown(rows, {"primary class": "primary_class"} | COLUMNS)
    return figure, rows, text


def plan(settings, options=()):
    """MAXL's runs; a class that there is not is said before they start."""
    chosen_of(settings)
    return pairs.plan(settings, options)


def add_options(parser):
    """Add --pairs, which takes one here, and what is drawn."""
    add = parser.add_argument
    add("--pairs", nargs=1, choices=pairs.PAIRS, metavar="P-A", help="one pair (default: 20-100)")
    add("--classes", nargs="+", metavar="NAME", help=f"primary classes (default, of 20: {' '.join(CLASSES)})")


experiment = Experiment(
    "figure6", __doc__, plan, make_report, add_options,
    full={"pairs": ["20-100"], "methods": ["maxl"], "seeds": pairs.SEEDS},
    quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3", needs_scikit_learn=True,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
