"""The runs on 4-level CIFAR-100 that the paper's figures and tables are made of: methods, pairs of levels, seeds."""

import itertools
from typing import NamedTuple

import create_dataset
from experiments.runner import report
from experiments.runner.task import Task, shared_options

# Primary and auxiliary classes, and the levels that have as many; without an auxiliary level a pair has no Human.
PAIRS = {"3-10": (0, 1), "3-20": (0, 2), "3-100": (0, 3), "10-20": (1, 2), "10-100": (1, 3), "20-100": (2, 3)}
SEEDS = [0, 1, 2]
PAPER = {"3-10": 90.50, "3-20": 90.65, "3-100": 90.66, "10-20": 78.40, "10-100": 78.46, "20-100": 74.27}  # Table 3


class Method(NamedTuple):
    script: str
    label: str
    colour: str
    style: object  # of its line
    options: tuple = ()  # that make it this method


SINGLE, HUMAN, CONTROLS = "model_vgg_single", "model_vgg_human", "experiments.methods.controls"
# Okabe and Ito's colours, told apart by the colour-blind; with the line styles also in a grey print
METHODS = {
    "single": Method(SINGLE, "Single", "#000000", "--"),
    "random": Method("experiments.methods.random_labels", "Random", "#E69F00", "-."),
    "kmeans": Method("experiments.methods.kmeans", "K-Means", "#009E73", ":"),
    "human": Method(HUMAN, "Human", "#0072B2", (0, (5, 1))),
    "maxl": Method("model_vgg_maxl", "MAXL", "#D55E00", "-"),
    # not in Figure 3 of the paper: controls, and the other half of Table 3
    "uniform": Method(CONTROLS, "Uniform", "#CC79A7", (0, (1, 1)), ("--control", "uniform")),
    "redrawn": Method(CONTROLS, "Redrawn", "#8C510A", (0, (5, 1, 1, 1)), ("--control", "redrawn")),
    "untrained": Method(CONTROLS, "Untrained", "#888888", (0, (3, 1, 1, 1)), ("--control", "untrained")),
    "maxl0": Method("model_vgg_maxl", "MAXL (λ = 0)", "#56B4E9", (0, (8, 2)), ("--entropy-weight", "0")),
}
FIVE = ["single", "random", "kmeans", "human", "maxl"]  # of Figure 3
ORDER = ("maxl", "single", "human")  # these start first
DEFAULTS = [
    "--cosine-every", "10",  # Figures 4 and 7 need it
    "--test-statistics", "settled",  # MAXL's second pass settles its own, so this treats all methods alike
]  # fmt: skip


def title(pair):
    """Of a line: "20 → 100"."""
    return pair.replace("-", " → ")


# First columns of a table for report.rows_as_markdown
HEAD = {"primary → auxiliary": lambda row: title(row["pair"]), "method": "method"}


def class_names(pair):
    """CIFAR-100's names of the primary classes of a pair."""
    return create_dataset.CLASS_NAMES[PAIRS[pair][0]]


def describe(runs):
    """report.describe of the methods' runs."""
    return report.describe(runs, lambda method: METHODS[method].label)


def task(method, pair, seed, root, options=(), methods=METHODS):
    """The run of one of the methods on a pair of levels from a seed, as a Task.

    options: of all runs. A run gets those that its script knows, after DEFAULTS, over which they win.
    """
    chosen, (primary, auxiliary) = methods[method], PAIRS[pair]
    own = ["--primary-level", str(primary)]
    if chosen.script == HUMAN:
        own += ["--auxiliary-level", str(auxiliary)]
    elif chosen.script != SINGLE:
        # the seed says which classes get the larger shares, the same for all methods
        psi = create_dataset.balanced_psi(*map(int, pair.split("-")), seed=seed)
        own += ["--psi", ",".join(map(str, psi))]
    own += [*chosen.options, "--seed", str(seed)]
    scripts = [each.script for each in methods.values()]
    options = shared_options([*DEFAULTS, *options], chosen.script, scripts)
    # Single has no auxiliary task, so it stands once for all pairs of a primary level
    name = f"{method}-{pair.split('-')[0] if chosen.script == SINGLE else pair}-seed{seed}"
    return Task(name, method, chosen.script, tuple(own), root, options)


def plan(settings, options=(), task=task):
    """The runs of settings.methods, .pairs and .seeds: seed by seed, 20-100 first as the paper's main case."""
    methods = sorted(settings.methods, key=lambda method: ORDER.index(method) if method in ORDER else len(ORDER))
    return [
        one
        for seed in settings.seeds
        for pair in sorted(settings.pairs, key=lambda pair: pair != "20-100")
        for method in methods
        if (one := task(method, pair, seed, settings.out, options)).script != HUMAN or PAIRS[pair][1] is not None
    ]


def add_pairs(parser, default="all"):
    """Add --pairs."""
    parser.add_argument(
        "--pairs", nargs="+", choices=PAIRS, metavar="P-A", help=f"{', '.join(PAIRS)} (default: {default})"
    )  # fmt: skip


def add_options(parser, methods=METHODS, default=FIVE, pairs="all"):
    """Add --pairs and --methods; default, pairs: what stands for those not given."""
    add_pairs(parser, pairs)
    parser.add_argument(
        "--methods", nargs="+", choices=methods, metavar="M",
        help=f"{', '.join(methods)} (default: {', '.join(default)})",
    )  # fmt: skip


def table(runs, methods, settings, columns, unfinished=False):
    """A dict a row: pair and method, mean and standard deviation over n runs of each column, and what is missing.

    methods: {name: Method}. columns: {name: RunOnDisk -> a number}. unfinished: whether unfinished runs count.
    """
    rows = []
    for pair, (name, method) in itertools.product(settings.pairs, methods.items()):
        found = runs.get((pair, name), {})
        counted = [run for run in found.values() if run.finished or unfinished]
        row = {"pair": pair, "method": method.label, "begun": len(found), "n": len(counted)}
        row |= report.spread_columns(**{column: list(map(number, counted)) for column, number in columns.items()})
        rows.append(row | {"missing": report.missing(found, settings.seeds)})
    return rows


def read_runs(root, methods, pairs, seeds, task=task):
    """{(pair, method): {seed: RunOnDisk}} of all folders that have curves; Single's stand under every pair.

    task: (method, pair, seed, root) -> a Task. Raises InputError if there are none, if one is not what it is named, and
    if the runs' settings differ in more than method, levels and seed.
    """
    runs = report.read_runs(lambda pair, method, seed: task(method, pair, seed, root), root, pairs, methods, seeds)
    report.check_alike(runs)
    return runs
