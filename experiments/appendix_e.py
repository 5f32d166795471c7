"""Appendix E: five variations of MAXL that the paper found not to help, beside MAXL and Single.

    python -m experiments.appendix_e --dry-run                        # the runs, and how long they will take here
    python -m experiments.appendix_e                                  # run what is missing, then draw
    python -m experiments.appendix_e --methods no-mask --seeds 0      # a part of it
    python -m experiments.appendix_e --methods latent --latent-size 50 --out runs/latent50
    python -m experiments.appendix_e --plot --out DIR                 # from runs that are there
    python -m experiments.appendix_e --quick                          # small runs on generated images

The variations are experiments.model_vgg_maxl_variants' and differ from MAXL in one thing each; MAXL and Single are
Figure 3's runs. Not here: semantic segmentation, and other designs of the label-generation network, which the paper
does not name.
"""

import collections
import dataclasses
import itertools
import sys

import model_vgg_maxl
from experiments import cifar100
from experiments.cifar100 import METHODS, Method
from experiments.runner import report
from experiments.runner.main import Experiment
from harness.exits import InputError

SCRIPT = "experiments.model_vgg_maxl_variants"
VARIATIONS = {  # latent and validation have the dearer gradient
    "cross-entropy": Method(SCRIPT, "cross-entropy loss", "#E69F00", "-.", 4.7),
    "no-mask": Method(SCRIPT, "no Mask SoftMax", "#009E73", ":", 4.7),
    "latent": Method(SCRIPT, "latent vector", "#0072B2", (0, (5, 1)), 7.0),
    "same-iteration": Method(SCRIPT, "same iteration", "#CC79A7", (0, (1, 1)), 4.7),
    "validation": Method(SCRIPT, "validation", "#56B4E9", (0, (3, 1, 1, 1)), 6.3),
}
SHOWN = {"maxl": METHODS["maxl"], "single": METHODS["single"], **VARIATIONS}
PAPER = {  # in words; Appendix E has no numbers
    "cross-entropy": "worse than the focal loss",
    "no-mask": "similar to Single",
    "latent": "similar to Single",
    "same-iteration": "worse than MAXL",
    "validation": "not as beneficial as MAXL",
}


def run_name(method, pair, seed):
    """The name of a run's folder: maxl-no-mask-20-100-seed0; MAXL's and Single's are Figure 3's."""
    return cifar100.run_name(f"maxl-{method}" if method in VARIATIONS else method, pair, seed)


def task(method, pair, seed, root, options=()):
    """The run of MAXL, Single or a variation on a pair of levels from a seed, as a Task."""
    if method not in VARIATIONS:
        return cifar100.task(method, pair, seed, root, options)
    maxl = cifar100.task("maxl", pair, seed, root, options)
    return dataclasses.replace(
        maxl, name=run_name(method, pair, seed), method=method, script=SCRIPT,
        own=("--variant", method, *maxl.own), cost=VARIATIONS[method].cost,
    )  # fmt: skip


def plan(settings, options=()):
    """The runs of settings.methods, .pairs and .seeds, seed by seed; Single's once for each primary level."""
    parts = itertools.product(settings.seeds, settings.pairs, settings.methods)
    return list(dict.fromkeys(task(method, pair, seed, settings.out, options) for seed, pair, method in parts))


def read_runs(root, pairs, seeds):
    """{(pair, method): {seed: RunOnDisk}} of all folders that have curves; Single's stand under every pair.

    Raises InputError where there are none, and where they differ in more than method, levels and seed.
    """
    runs = collections.defaultdict(dict)
    for pair, method, seed in itertools.product(pairs, SHOWN, seeds):
        folder = root / run_name(method, pair, seed)
        if (folder / "curves.csv").exists():
            runs[pair, method][seed] = report.RunOnDisk(folder)
            if method == "cross-entropy":  # γ = 0 is what makes it this variation, and no other difference
                runs[pair, method][seed].settings["focal_gamma"] = model_vgg_maxl.SETTINGS["focal_gamma"]
    if not runs:
        raise InputError(f"there are no runs of these pairs and seeds in {root} yet; start them without --plot")
    report.check_alike([run for found in runs.values() for run in found.values()])
    return runs


def table(runs, pairs, seeds):
    """A dict a row: pair and method, accuracy in % in the final epoch over the finished runs, the paper's finding."""
    rows = []
    for pair, (method, (_, label, *_)) in itertools.product(pairs, SHOWN.items()):
        found = runs.get((pair, method), {})
        finished = [run for run in found.values() if run.finished]
        mean, spread = report.mean_and_spread([run.accuracy[-1] for run in finished])
        row = {"pair": pair, "method": label, "begun": len(found), "n": len(finished), "mean": mean, "std": spread}
        rows.append(row | {"paper": PAPER.get(method, ""), "missing": report.missing(found, seeds)})
    return rows


def markdown(rows, runs):
    """The table as Markdown, with what all the runs share."""
    first = next(iter(next(iter(runs.values())).values()))
    lines = []
    for row in rows:
        unknown = "unfinished" if row["begun"] else "not run"
        accuracy = unknown if row["mean"] is None else report.with_spread(row["mean"], row["std"])
        cells = [row["pair"].replace("-", " → "), row["method"], accuracy, str(row["n"])]
        lines.append([*cells, row["paper"], row["missing"]])
    return (
        "Variations of MAXL (Appendix E): test accuracy in % in the final epoch, mean ± standard deviation over n "
        f"finished runs ({report.alike(first)}; the cross-entropy loss has γ = 0).\n\n"
    ) + report.markdown_table(
        ["primary → auxiliary", "method", "test accuracy (%)", "n", "in the paper", "missing"], lines
    )


def draw(runs, pairs):
    """Test accuracy over the epochs, a panel a pair: means over seeds as lines, ± a standard deviation as bands."""
    figure, grid = cifar100.panels(pairs)
    lines = {}
    for pair, axes in grid.items():
        for method, (_, label, colour, style, *_) in SHOWN.items():
            curves = [run.accuracy for run in runs.get((pair, method), {}).values() if run.accuracy]
            if curves:
                lines[label] = report.draw_band(axes, curves, label, colour, style)
        if not axes.lines:
            axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes, color="gray")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    columns = 2 if len(pairs) == 1 else 4
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=columns, frameon=False, handlelength=3)
    return figure


def make_report(settings):
    """The figure, and the table as rows and as text; what was not run is shown as such."""
    runs = read_runs(settings.out, settings.pairs, settings.seeds)
    rows = table(runs, settings.pairs, settings.seeds)
    return draw(runs, settings.pairs), rows, markdown(rows, runs)


def add_options(parser):
    """Add --pairs and --methods."""
    cifar100.add_pairs(parser, default="20-100")
    parser.add_argument(
        "--methods", nargs="+", choices=SHOWN, metavar="M", help=f"{', '.join(SHOWN)} (default: all)"
    )  # fmt: skip


experiment = Experiment(
    "appendix_e", __doc__, plan, make_report, add_options,
    full={"pairs": ["20-100"], "methods": list(SHOWN), "seeds": cifar100.SEEDS},
    quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
