"""Appendix E: five variations of MAXL that the paper found not to help, beside MAXL and Single.

    python -m experiments.appendix_e                                  # run what is missing, then draw
    python -m experiments.appendix_e --methods no-mask --seeds 0      # a part of it
    python -m experiments.appendix_e --methods latent --latent-size 50 --out runs/latent50
    python -m experiments.appendix_e --quick                          # small runs on generated images

The variations are those of experiments.methods.variations and differ from MAXL in one thing each; MAXL and Single are
Figure 3's runs. Not here: semantic segmentation, and other designs of the label-generation network, which the paper
does not name.
"""

import dataclasses
import functools
import sys

from experiments import pairs
from experiments.pairs import METHODS, Method
from experiments.runner import drawing, report
from experiments.runner.main import Experiment

SCRIPT = "experiments.methods.variations"
VARIATIONS = {  # the colours are Tol's, none of a method of Figure 3
    "cross-entropy": Method(SCRIPT, "cross-entropy loss", "#332288", "-.", ("--focal-gamma", "0")),
    "no-mask": Method(SCRIPT, "no Mask SoftMax", "#117733", ":"),
    "latent": Method(SCRIPT, "latent vector", "#88CCEE", (0, (5, 1))),
    "same-iteration": Method(SCRIPT, "same iteration", "#882255", (0, (1, 1))),
    "validation": Method(SCRIPT, "validation", "#DDCC77", (0, (3, 1, 1, 1))),
}
VARIATIONS = {
    name: method._replace(options=("--variant", name, *method.options)) for name, method in VARIATIONS.items()
}
SHOWN = {"maxl": METHODS["maxl"], "single": METHODS["single"], **VARIATIONS}
PAPER = {  # in words; Appendix E has no numbers
    "cross-entropy": "worse than the focal loss",
    "no-mask": "similar to Single",
    "latent": "similar to Single",
    "same-iteration": "worse than MAXL",
    "validation": "not as beneficial as MAXL",
}


def task(method, pair, seed, root, options=()):
    """The run of MAXL, Single or a variation on a pair of levels from a seed, as a Task; maxl-no-mask-20-100-seed0."""
    one = pairs.task(method, pair, seed, root, options, methods=SHOWN)
    return dataclasses.replace(one, name=f"maxl-{one.name}") if method in VARIATIONS else one


def make_report(settings):
    """The figure, and the table as rows and as text; what was not run is shown as such."""
    runs = pairs.read_runs(settings.out, SHOWN, settings.pairs, settings.seeds, task)
    described = report.describe(runs, lambda method: SHOWN[method].label)
    rows = pairs.table(runs, SHOWN, settings, {"accuracy": lambda run: run.accuracy[-1]})
    figure = drawing.draw_curves(runs, settings.pairs, SHOWN, "test accuracy (%)", lambda run: run.accuracy)
    drawing.caption(figure, f"{described}. {drawing.LINES}")
    found = {method.label: PAPER.get(name, "") for name, method in SHOWN.items()}
    columns = {"test accuracy (%)": ("accuracy", 2), "n": "n", "in the paper": lambda row: found[row["method"]]}
    text = (
        "Variations of MAXL (Appendix E): test accuracy in % in the final epoch, mean ± standard deviation over n "
        f"finished runs ({described}).\n\n"
    ) + report.rows_as_markdown(rows, pairs.HEAD | columns | {"missing": "missing"})
    return figure, rows, text


experiment = Experiment(
    "appendix_e", __doc__, functools.partial(pairs.plan, task=task), make_report,
    functools.partial(pairs.add_options, methods=SHOWN, default=["all"], pairs="20-100"),
    full={"pairs": ["20-100"], "methods": list(SHOWN), "seeds": pairs.SEEDS},
    quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
