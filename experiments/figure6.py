"""Figure 6: the test images that MAXL's label generator is surest of, for three auxiliary classes of a primary class.

    python -m experiments.figure6 --dry-run                            # the runs, and their time on this machine
    python -m experiments.figure6                                      # run what is missing, then draw
    python -m experiments.figure6 --plot --out DIR                     # from runs that are there
    python -m experiments.figure6 --plot --classes fish people trees   # other primary classes
    python -m experiments.figure6 --quick                              # a small run on generated images

The runs are Figure 3's, and their checkpoints are read. The first run of --seeds is drawn. What the paper leaves to the
eye is measured too: how much the generated classes have in common with the true fine classes, as normalised mutual
information, beside what random labels have. Needs scikit-learn (pip install scikit-learn).
"""

import sys
import textwrap

import numpy as np

import create_dataset
from experiments import pairs as cifar100
from experiments import trained as checkpoints
from experiments.methods import random_labels as model_vgg_random
from experiments.runner import report
from experiments.runner.main import Experiment
from harness.acceleration import select_device
from harness.exits import InputError

# Of level 2, under the paper's "aquatic mammals", "household furnitures", "invertebrates", "nature scenes", "flowers"
CLASSES = ["aquatic_mammals", "household_furniture", "insects", "large_natural_outdoor_scenes", "flowers"]
AUXILIARY, IMAGES = 3, 5  # classes of each primary class, and images of each of these
RANDOM_DRAWS = 100  # of random labels


def chosen_classes(settings):
    """Ids of the primary classes to draw. Raises InputError for a name that the level does not have."""
    level = cifar100.PAIRS[settings.pairs[0]][0]
    names = create_dataset.CLASS_NAMES[level]
    wanted = settings.classes or (CLASSES if set(CLASSES) <= set(names) else names[: len(CLASSES)])
    for name in wanted:
        if name not in names:
            raise InputError(f"--classes {name} is not among the {len(names)} primary classes: {', '.join(names)}")
    return [names.index(name) for name in wanted]


def top_images(labels, primary, psi, primary_class, seed):
    """Some of a primary class's auxiliary classes, from a seed, with the images of highest probability in each.

    labels: float (N, sum(psi)); primary: int64 (N,). Returns {auxiliary class: indices of images, the surest first}.
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
    members = [primary == c for c in range(create_dataset.LEVEL_CLASSES[primary_level])]
    return [float(normalized_mutual_info_score(fine[m], auxiliary[m], average_method="arithmetic")) for m in members]


def random_information(psi, labels, primary_level, draws=RANDOM_DRAWS):
    """The same of random labels, as the baseline Random deals them out, by primary class: mean over the draws."""
    drawn = (model_vgg_random.random_labels(labels[:, primary_level], psi, seed) for seed in range(draws))
    return np.mean([shared_information(auxiliary, labels, primary_level) for auxiliary in drawn], axis=0).tolist()


# --- the figure ---


def draw(pixels, captions, labels, psi, primary, classes, names, seed):
    """A row a primary class, a block an auxiliary class; under an image its probability and its caption.

    pixels: uint8 (N, 32, 32, C). captions: N texts. labels, primary: as in top_images. names: of all primary classes.
    """
    from matplotlib.figure import Figure

    margin, height = 1.1, 1.02  # inches: the names on the left, a row
    figure = Figure(figsize=(margin + 0.72 * (AUXILIARY * IMAGES + 1), 0.5 + height * len(classes)))
    widths = ([1.0] * IMAGES + [0.35]) * AUXILIARY
    grid = figure.add_gridspec(
        len(classes), len(widths), width_ratios=widths, left=margin / figure.get_figwidth(), right=0.999, wspace=0.06,
        bottom=0.3 / figure.get_figheight(), top=1 - 0.35 / figure.get_figheight(), hspace=0.5,
    )  # fmt: skip
    for line, primary_class in enumerate(classes):
        tops = top_images(labels, primary, psi, primary_class, seed)
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
                    words = textwrap.fill(names[primary_class].replace("_", " "), 13)
                    axes.text(
                        -0.28, 0.5, words, transform=axes.transAxes, fontsize=8, ha="right", va="center",
                        linespacing=1.1,
                    )  # fmt: skip
    return figure


# --- the table ---


def table(generated, first, random, names, used):
    """A dict a primary class, and one of the means over them, with the numbers of each seed and over the seeds.

    generated, first, random: {seed: a number for each class}, first of the label generator's first weights. used:
    {seed: auxiliary classes that are some image's largest}.
    """
    rows = []
    for index, name in enumerate([*names, "mean over classes"]):

        def pick(numbers, index=index):
            return sum(numbers) / len(numbers) if index == len(names) else numbers[index]

        row = {"primary_class": name, "n": len(generated)}
        row["nmi_mean"], row["nmi_std"] = report.mean_and_spread([pick(numbers) for numbers in generated.values()])
        row["nmi_first"], _ = report.mean_and_spread([pick(numbers) for numbers in first.values()])
        row["nmi_random"], _ = report.mean_and_spread([pick(numbers) for numbers in random.values()])
        row["classes_used"], _ = report.mean_and_spread([float(pick(numbers)) for numbers in used.values()])
        rows.append(row | {f"nmi_seed{seed}": pick(numbers) for seed, numbers in generated.items()})
    return rows


def markdown(rows, runs, settings, drawn):
    """The table as Markdown, with how it and the picture came about."""
    pair, (found,) = settings.pairs[0], runs.values()
    lines = [
        [
            row["primary_class"].replace("_", " "), report.with_spread(row["nmi_mean"], row["nmi_std"], 3),
            f"{row['nmi_first']:.3f}", f"{row['nmi_random']:.3f}", *(f"{row[f'nmi_seed{seed}']:.3f}" for seed in found),
            f"{row['classes_used']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    heading = [
        "primary class",
        "NMI",
        "of the first weights",
        "of random labels",
        *(f"seed {seed}" for seed in found),
        "classes used",
    ]
    missing = report.missing(found, settings.seeds)
    return (
        f"MAXL, {pair.replace('-', ' → ')} ({report.alike(runs)}). Normalised mutual information "
        "(over the arithmetic mean of the two entropies) of the auxiliary class that the label generator gives the "
        "highest probability, and the true fine class, over the test images of each primary class: 1 where they are "
        "the same, not quite 0 where they are unrelated, which is why the mean of "
        f"{RANDOM_DRAWS} random, balanced assignments stands beside it, and what the label generator's first weights "
        f"give. Mean ± standard deviation over {len(found)} run(s)"
        + (f", unfinished ones included as far as they are ({missing})" if missing else "")
        + ". Classes used: auxiliary classes that are the largest for some test image.\n\n"
        f"Figure: run of seed {drawn}; for {AUXILIARY} auxiliary classes of each primary class, drawn from seed "
        f"{settings.draw_seed}, the {IMAGES} test images of the highest probability, with the probability and the true "
        'fine class. The paper\'s "invertebrates" and "nature scenes" are taken for CIFAR-100\'s insects and large '
        "natural outdoor scenes.\n\n"
    ) + report.markdown_table(heading, lines)


def make_report(settings):
    """The figure, and the table as rows and as text."""
    checkpoints.require_scikit_learn("figure6")
    classes, pair, device = chosen_classes(settings), settings.pairs[0], select_device("auto")
    runs = cifar100.read_runs(settings.out, ["maxl"], [pair], settings.seeds)
    test, level = checkpoints.load_test(runs, settings.data_root, device), cifar100.PAIRS[pair][0]
    targets, names = test.labels.cpu(), create_dataset.CLASS_NAMES[level]
    figure, generated, first, random, used, by_psi = None, {}, {}, {}, {}, {}
    for seed, run in runs[pair, "maxl"].items():
        trained = checkpoints.load_trained(run, cifar100.task("maxl", pair, seed, settings.out), device)
        psi = trained.settings["psi"]
        labels = checkpoints.generated_labels(trained.label_generator, test, level)
        largest = labels.argmax(dim=1)
        if figure is None:
            fine = [create_dataset.CLASS_NAMES[-1][c].replace("_", " ") for c in targets[:, -1]]
            figure = draw(test.images, fine, labels, psi, targets[:, level], classes, names, settings.draw_seed)
            drawn = seed
        generated[seed] = shared_information(largest, targets, level)
        untrained = checkpoints.make_networks(trained.settings)["label_generator"].to(device)
        at_first = checkpoints.generated_labels(untrained, test, level, trained=False)
        first[seed] = shared_information(at_first.argmax(dim=1), targets, level)
        if tuple(psi) not in by_psi:
            by_psi[tuple(psi)] = random_information(psi, targets, level)
        random[seed] = by_psi[tuple(psi)]
        used[seed] = [len(largest[targets[:, level] == c].unique()) for c in range(len(names))]
    rows = table(generated, first, random, names, used)
    return figure, rows, markdown(rows, runs, settings, drawn)


def plan(settings, options=()):
    """MAXL's runs; what the figure will need is asked for before they start."""
    checkpoints.require_scikit_learn("figure6")
    chosen_classes(settings)
    settings.methods = ["maxl"]
    return cifar100.plan(settings, checkpoints.with_data_root(settings, options))


def add_draw_seed(parser):
    """Add --draw-seed."""
    parser.add_argument(
        "--draw-seed", type=checkpoints.seed_number, default=0, metavar="N",
        help="of the auxiliary classes shown (default: %(default)s)",
    )  # fmt: skip


def add_options(parser):
    """Add --pairs, which takes one here, and what is drawn."""
    add = parser.add_argument
    add("--pairs", nargs=1, choices=cifar100.PAIRS, metavar="P-A", help="one pair (default: 20-100)")
    add("--classes", nargs="+", metavar="NAME", help=f"primary classes (default, of 20: {' '.join(CLASSES)})")
    add_draw_seed(parser)
    checkpoints.add_data_root(parser)


experiment = Experiment(
    "figure6", __doc__, plan, make_report, add_options,
    full={"pairs": ["20-100"], "seeds": cifar100.SEEDS}, quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
