"""Figure 4: cosine similarity of the auxiliary and the primary task's gradient on the shared trunk, 3 primary classes.

    python -m experiments.figure4                          # run what is missing, then draw
    python -m experiments.figure4 --quick                  # small runs on generated images

The runs are Figure 3's. With --cosine-every N, here 10 if not given, the curves hold the mean over every N-th
iteration. Human, Random, K-Means and MAXL have an auxiliary task; the controls are drawn if they were run. Options that
are not the figure's go to the scripts, as with Figure 3. python -m experiments.figure7 has all six pairs.
"""

import statistics
import sys

from experiments import pairs
from experiments.pairs import METHODS
from experiments.runner import drawing, report
from experiments.runner.main import Experiment
from harness.exits import InputError

WITH_AUXILIARY_TASK = ["human", "random", "kmeans", "maxl"]
OTHERS = ["uniform", "redrawn", "untrained", "maxl0"]  # drawn if they were run
COLUMNS = {  # of curves.csv
    "train_cosine_similarity": "by filter, mean over filters and convolutions",
    "train_trunk_cosine_similarity": "of the trunk's whole gradient",
}
BY_FILTER = "train_cosine_similarity"  # our reading
LAST_EPOCHS = 10  # of the table


def read_runs(settings):
    """Figure 3's runs but Single's; raises InputError, with the way out, if one has no cosine similarity."""
    runs = pairs.read_runs(settings.out, [*WITH_AUXILIARY_TASK, *OTHERS], settings.pairs, settings.seeds)
    for run in report.listed(runs):
        if not run.column(BY_FILTER):
            raise InputError(
                f"{run.folder} was run without the cosine similarity; move it away and run it anew with --cosine-every"
            )
    return runs


def make_report(settings):
    """The figure (by filter), and the table of both measures."""
    runs = read_runs(settings)
    there, described = {method for _, method in runs}.union(WITH_AUXILIARY_TASK), pairs.describe(runs)
    shown = {name: method for name, method in METHODS.items() if name in there}

    def mean_of(column):
        return lambda run: statistics.fmean(run.column(column)[-LAST_EPOCHS:])

    rows = pairs.table(runs, shown, settings, {name: mean_of(name) for name in COLUMNS}, unfinished=True)
    figure = drawing.draw_curves(runs, settings.pairs, shown, "cosine similarity", lambda run: run.column(BY_FILTER))
    drawing.caption(figure, f"{described}. {drawing.LINES}")
    columns = pairs.HEAD | {heading: (name, 3) for name, heading in COLUMNS.items()} | {"n": "n", "missing": "missing"}
    text = (
        f"Cosine similarity of the auxiliary and the primary gradient on the shared trunk, mean over the last "
        f"{LAST_EPOCHS} epochs of each run, then mean ± standard deviation over n runs, unfinished ones included "
        f"({described}).\n\n"
    ) + report.rows_as_markdown(rows, columns)
    return figure, rows, text


def similarity(name, doc, shown):
    """The Experiment of Figure 4 or of Figure 7, which differ in the pairs that they show."""

    def add_options(parser):
        pairs.add_options(parser, [*WITH_AUXILIARY_TASK, *OTHERS], WITH_AUXILIARY_TASK, ", ".join(shown))

    return Experiment(
        name, doc, pairs.plan, make_report, add_options,
        full={"pairs": shown, "methods": WITH_AUXILIARY_TASK, "seeds": pairs.SEEDS},
        quick={"pairs": shown[:1], "seeds": [0]}, folder="figure3",
    )  # fmt: skip


experiment = similarity("figure4", __doc__, ["3-10", "3-20", "3-100"])

if __name__ == "__main__":
    sys.exit(experiment())
