"""The runs on 4-level CIFAR-100 that the paper's figures and tables are made of: methods, pairs of levels, seeds."""

import collections
import itertools
from typing import NamedTuple

import create_dataset
from experiments.runner.report import SAME, check_alike, run_of
from experiments.runner.task import Task
from harness.exits import InputError

# Primary and auxiliary classes, and the levels that have as many; without an auxiliary level a pair has no Human.
PAIRS = {"3-10": (0, 1), "3-20": (0, 2), "3-100": (0, 3), "10-20": (1, 2), "10-100": (1, 3), "20-100": (2, 3)}
SEEDS = [0, 1, 2]
PAPER = {"3-10": 90.50, "3-20": 90.65, "3-100": 90.66, "10-20": 78.40, "10-100": 78.46, "20-100": 74.27}  # Table 3


class Method(NamedTuple):
    script: str
    label: str
    colour: str
    style: object  # of its line
    cost: float  # of an epoch in epochs of Single, roughly, to weigh the time left
    networks: int = 1  # that it trains and keeps in a checkpoint
    options: tuple = ()  # that make it this method


# Okabe and Ito's colours, told apart by the colour-blind; with the line styles also in a grey print
METHODS = {
    "single": Method("model_vgg_single", "Single", "#000000", "--", 1.0),
    "random": Method("experiments.methods.random_labels", "Random", "#E69F00", "-.", 1.0),
    "kmeans": Method("experiments.methods.kmeans", "K-Means", "#009E73", ":", 1.1),
    "human": Method("model_vgg_human", "Human", "#0072B2", (0, (5, 1)), 1.0),
    "maxl": Method("model_vgg_maxl", "MAXL", "#D55E00", "-", 4.7, 2),
    # not in Figure 3 of the paper: controls of ours, and the other half of Table 3
    "uniform": Method("experiments.methods.controls", "Uniform", "#CC79A7", (0, (1, 1)), 1.0, 1, ("--control", "uniform")),
    "redrawn": Method("experiments.methods.controls", "Redrawn", "#8C510A", (0, (5, 1, 1, 1)), 1.0, 1, ("--control", "redrawn")),
    "untrained": Method("experiments.methods.controls", "Untrained", "#888888", (0, (3, 1, 1, 1)), 1.3, 2, ("--control", "untrained")),
    "maxl0": Method("model_vgg_maxl", "MAXL, λ = 0", "#56B4E9", (0, (8, 2)), 4.7, 2, ("--entropy-weight", "0")),
}
FIVE = ["single", "random", "kmeans", "human", "maxl"]  # of Figure 3
ORDER = ("maxl", "single", "human")  # these start first


def run_name(method, pair, seed):
    """The name of a run's folder; Single has no auxiliary task, so it stands once for all pairs of a primary level."""
    return f"{method}-{pair.split('-')[0] if method == 'single' else pair}-seed{seed}"


def compared(method, options):
    """The options for a method: gradients compared at every 10th iteration, as Figures 4 and 7 need it, if not given.

    Single has no two to compare, and no such option.
    """
    given = [i for i, option in enumerate(options) if option.split("=")[0] == "--cosine-every"]
    if method != "single":
        return options if given else [*options, "--cosine-every", "10"]
    left_out = {place for i in given for place in (range(i, i + 2) if options[i] == "--cosine-every" else [i])}
    return [option for i, option in enumerate(options) if i not in left_out]


def task(method, pair, seed, root, options=()):
    """The run of a method on a pair of levels from a seed, as a Task."""
    primary, auxiliary = PAIRS[pair]
    own = ["--primary-level", str(primary)]
    if method == "human":
        own += ["--auxiliary-level", str(auxiliary)]
    elif method != "single":
        # the placement of larger shares is the seed's, for all methods
        psi = create_dataset.balanced_psi(*map(int, pair.split("-")), seed=seed)
        own += ["--psi", ",".join(map(str, psi))]
    own += [*METHODS[method].options, "--seed", str(seed)]
    chosen, options = METHODS[method], tuple(compared(method, options))
    name = run_name(method, pair, seed)
    return Task(name, method, chosen.script, tuple(own), root, options, chosen.cost, chosen.networks)


def plan(settings, options=()):
    """The runs of settings.methods, .pairs and .seeds: seed by seed, 20-100 first as the paper's main case.

    Raises InputError where the scripts have other settings from each other with which runs cannot stand in one figure.
    """
    methods = sorted(settings.methods, key=lambda method: ORDER.index(method) if method in ORDER else len(ORDER))
    tasks = [
        task(method, pair, seed, settings.out, options)
        for seed in settings.seeds
        for pair in sorted(settings.pairs, key=lambda pair: pair != "20-100")
        for method in methods
        if method != "human" or PAIRS[pair][1] is not None
    ]
    given = {option.split("=")[0].removeprefix("--").replace("-", "_") for option in options}
    for name in SAME:
        values = {repr(task.script_module.SETTINGS.get(name)): task.method for task in tasks if name not in given}
        if len(values) > 1:
            differ = ", ".join(f"{method}'s is {value}" for value, method in values.items())
            raise InputError(f"{name} is to be the same for all methods, but {differ}; set it alike in each script")
    return list(dict.fromkeys(tasks))


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


def find_runs(root, methods, pairs, seeds, task=task):
    """{(pair, method): {seed: RunOnDisk}} of all folders that have curves; Single's stand under every pair.

    task: (method, pair, seed, root) -> a Task. Raises InputError where there are none, or one is not what it is named.
    """
    runs = collections.defaultdict(dict)
    for pair, method, seed in itertools.product(pairs, methods, seeds):
        run = run_of(task(method, pair, seed, root))
        if run is not None:
            runs[pair, method][seed] = run
    if not runs:
        raise InputError(f"there are no runs of these pairs and seeds in {root} yet; start them without --plot")
    return runs


def read_runs(root, methods, pairs, seeds):
    """find_runs; raises InputError where the runs' settings differ in more than method, levels and seed, too."""
    runs = find_runs(root, methods, pairs, seeds)
    check_alike(runs)
    return runs
