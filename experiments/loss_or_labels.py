"""Loss or labels: how much of an auxiliary task's gain is left if all losses are cross-entropies.

    python -m experiments.loss_or_labels                             # run what is missing, then draw
    python -m experiments.loss_or_labels --pairs 3-100 --seeds 0     # a part of it
    python -m experiments.loss_or_labels --quick                     # small runs on generated images

This tests one explanation of a gain: the focal loss (γ = 2) has a small gradient for images that are nearly right. If
the label is spread over many auxiliary classes, none is nearly right, so the auxiliary loss keeps its gradient, even if
the label says nothing. With γ = 0 both losses are cross-entropies and keep it. The runs with γ = 2 are Figure 3's.
"""

import functools
import sys

from experiments import pairs
from experiments.pairs import METHODS
from experiments.runner import drawing, report
from experiments.runner.main import Experiment

COMPARED = ("single", "uniform", "human", "maxl")
SHOWN = {name: METHODS[name] for name in COMPARED} | {
    f"{name}-ce": METHODS[name]._replace(
        label=f"{METHODS[name].label}, γ = 0", options=(*METHODS[name].options, "--focal-gamma", "0")
    )
    for name in COMPARED
}


def draw(runs, settings):
    """A panel for each pair, in it a column of dots for each method: γ = 2 filled, γ = 0 hollow."""
    figure, grid = drawing.grid_of(len(settings.pairs), min(2, len(settings.pairs)), (3.6, 3.2), (0.6, 1.0))
    for pair, axes in zip(settings.pairs, grid):
        columns = {}
        for name in COMPARED:
            finals = [list(report.finals(runs.get((pair, one), {})).values()) for one in (name, f"{name}-ce")]
            if any(finals):
                groups = zip(("γ = 2 (focal loss)", "γ = 0 (cross-entropy)"), finals, (True, False))
                columns[METHODS[name].label] = [(METHODS[name].colour, *group) for group in groups]
        drawing.draw_dots(axes, columns)
        axes.set(title="{} primary, {} auxiliary classes".format(*pair.split("-")), ylabel="test accuracy (%)")
    return figure


def make_report(settings):
    """The figure, and the table as rows and as text, both of the final epoch."""
    runs = pairs.read_runs(settings.out, SHOWN, settings.pairs, settings.seeds, task)
    described = report.describe(runs, lambda method: SHOWN[method].label)
    columns = {"accuracy": lambda run: run.accuracy[-1], "train": lambda run: 100 * run.column("train_primary_accuracy")[-1]}
    rows = [row for row in pairs.table(runs, SHOWN, settings, columns) if row["begun"]]
    figure = draw(runs, settings)
    drawing.caption(figure, f"{described}. A dot for each seed, a line for the mean.")
    columns = {"test accuracy (%)": ("accuracy", 2), "training accuracy (%)": ("train", 2)}
    text = (
        "Test accuracy in % in the final epoch with the focal loss (γ = 2) and with cross-entropy (γ = 0) as both "
        f"losses, mean ± standard deviation over n finished runs ({described}). Training accuracy: of the first "
        "pass.\n\n"
    ) + report.rows_as_markdown(rows, pairs.HEAD | columns | {"n": "n", "missing": "missing"})
    return figure, rows, text


task = functools.partial(pairs.task, methods=SHOWN)
experiment = Experiment(
    "loss_or_labels", __doc__, functools.partial(pairs.plan, task=task), make_report,
    functools.partial(pairs.add_options, methods=SHOWN, default=["all"], pairs="3-100 20-100"),
    full={"pairs": ["3-100", "20-100"], "methods": list(SHOWN), "seeds": pairs.SEEDS},
    quick={"pairs": ["3-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
