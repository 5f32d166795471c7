"""Table 3: MAXL with the entropy loss (λ = 0.2) and without (λ = 0): auxiliary classes used, and test accuracy.

    python -m experiments.table3                           # run what is missing, then write the table
    python -m experiments.table3 --quick                   # small runs on generated images

The runs with λ = 0.2 are Figure 3's. A class counts as used if it is the largest in the label of some image of the
training set, over the first pass of the final epoch.
"""

import itertools
import sys

from experiments import pairs
from experiments.runner import report
from experiments.runner.main import Experiment

SHOWN = {method: pairs.METHODS[method] for method in ("maxl", "maxl0")}
USED = "train_auxiliary_classes_used"
PAPER = {  # test accuracy in %, share of the classes used
    "maxl": {pair: (accuracy, 1.00) for pair, accuracy in pairs.PAPER.items()},
    "maxl0": {
        "3-10": (90.26, 1.00), "3-20": (90.39, 0.65), "3-100": (90.22, 0.35),
        "10-20": (77.73, 1.00), "10-100": (78.20, 0.57), "20-100": (73.97, 0.61),
    },
}  # fmt: skip


def make_report(settings):
    """No figure, and the table as rows and as text, both of the final epoch."""
    runs = pairs.read_runs(settings.out, SHOWN, settings.pairs, settings.seeds)
    numbers = {"accuracy": lambda run: run.accuracy[-1], "used": lambda run: run.column(USED)[-1]}
    rows, paper = pairs.table(runs, SHOWN, settings, numbers), {} if report.generated(runs) else PAPER
    for row, (pair, method) in zip(rows, itertools.product(settings.pairs, SHOWN)):
        row["paper_accuracy"], row["paper_used"] = paper.get(method, {}).get(pair, (None, None))
    columns = pairs.HEAD | {
        "test accuracy (%)": ("accuracy", 2),
        "in the paper (%)": lambda row: report.with_spread(row["paper_accuracy"], None),
        "classes used": ("used", 2),
        "in the paper": lambda row: report.with_spread(row["paper_used"], None),
        "n": "n", "missing": "missing",
    }  # fmt: skip
    text = (
        "MAXL with and without the entropy loss, final epoch, mean ± standard deviation over n finished runs "
        f"({pairs.describe(runs)}).\n\n"
    ) + report.rows_as_markdown(rows, columns)
    return None, rows, text


experiment = Experiment(
    "table3", __doc__, pairs.plan, make_report, pairs.add_pairs,
    full={"pairs": list(pairs.PAIRS), "methods": list(SHOWN), "seeds": pairs.SEEDS},
    quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
