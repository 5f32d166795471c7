"""Appendix E: five variations of MAXL that the paper found not to help, beside MAXL and Single.

    python -m experiments.appendix_e --dry-run                        # the runs, and how long they will take here
    python -m experiments.appendix_e                                  # run what is missing, then draw
    python -m experiments.appendix_e --methods no-mask --seeds 0      # a part of it
    python -m experiments.appendix_e --methods latent --latent-size 50 --out runs/latent50
    python -m experiments.appendix_e --plot --out DIR                 # from runs that are there
    python -m experiments.appendix_e --quick                          # small runs on generated images

The variations are experiments.methods.variations' and differ from MAXL in one thing each; MAXL and Single are
Figure 3's runs. Not here: semantic segmentation, and other designs of the label-generation network, which the paper
does not name.
"""

import dataclasses
import itertools
import sys

import model_vgg_maxl
from experiments import pairs as cifar100
from experiments.pairs import METHODS, Method
from experiments.runner import report
from experiments.runner.drawing import draw_curves
from experiments.runner.main import Experiment

SCRIPT = "experiments.methods.variations"
VARIATIONS = {  # latent and validation have the dearer gradient; the colours are Tol's, none of a method of Figure 3
    "cross-entropy": Method(SCRIPT, "cross-entropy loss", "#332288", "-.", 4.7),
    "no-mask": Method(SCRIPT, "no Mask SoftMax", "#117733", ":", 4.7),
    "latent": Method(SCRIPT, "latent vector", "#88CCEE", (0, (5, 1)), 7.0),
    "same-iteration": Method(SCRIPT, "same iteration", "#882255", (0, (1, 1)), 4.7),
    "validation": Method(SCRIPT, "validation", "#DDCC77", (0, (3, 1, 1, 1)), 6.3),
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
    """cifar100.read_runs of the variations beside MAXL and Single."""
    runs = cifar100.find_runs(root, SHOWN, pairs, seeds, task)
    for (_, method), found in runs.items():
        for run in found.values():
            if method == "cross-entropy":  # γ = 0 is what makes it this variation, and no other difference
                run.settings["focal_gamma"] = model_vgg_maxl.SETTINGS["focal_gamma"]
    report.check_alike(runs)
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
    shared, lines = report.alike(runs), []
    for row in rows:
        unknown = "unfinished" if row["begun"] else "not run"
        accuracy = unknown if row["mean"] is None else report.with_spread(row["mean"], row["std"])
        cells = [row["pair"].replace("-", " → "), row["method"], accuracy, str(row["n"])]
        lines.append([*cells, row["paper"], row["missing"]])
    return (
        "Variations of MAXL (Appendix E): test accuracy in % in the final epoch, mean ± standard deviation over n "
        f"finished runs ({shared}; the cross-entropy loss has γ = 0).\n\n"
    ) + report.markdown_table(
        ["primary → auxiliary", "method", "test accuracy (%)", "n", "in the paper", "missing"], lines
    )


def make_report(settings):
    """The figure, and the table as rows and as text; what was not run is shown as such."""
    runs = read_runs(settings.out, settings.pairs, settings.seeds)
    rows = table(runs, settings.pairs, settings.seeds)
    figure = draw_curves(runs, settings.pairs, SHOWN, "test accuracy (%)", lambda run: run.accuracy)
    return figure, rows, markdown(rows, runs)


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
