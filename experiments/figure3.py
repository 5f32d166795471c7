"""Figure 3: test accuracy of five methods on six pairs of levels, three seeds; 81 runs.

    python -m experiments.figure3 --dry-run                        # the plan and how long it will take here
    python -m experiments.figure3                                  # run what is missing, then draw
    python -m experiments.figure3 --pairs 20-100 --seeds 0         # a part of it
    python -m experiments.figure3 --jobs 4                         # four at a time, spread over the visible GPUs
    python -m experiments.figure3 --status                         # how far each run is
    python -m experiments.figure3 --plot                           # figure and table of what is there, also meanwhile
    python -m experiments.figure3 --submitit slurm --submitit-parameters slurm_partition=gpu gpus_per_node=1
    python -m experiments.figure3 --quick                          # small runs on generated images, about 20 minutes

Each run is a process of its own. Options that are not the figure's go to the scripts that have them: --epochs, --width,
--device, --label-learning-rate ... The same command again continues what is unfinished and skips what is done. One run
that fails does not stop the others. --max-minutes limits each run. Single has no auxiliary task, so it runs once for
each primary level and seed.
"""

import functools
import itertools
import statistics
import sys

from experiments import pairs
from experiments.pairs import FIVE, METHODS
from experiments.runner import drawing, report
from experiments.runner.main import Experiment


def table(runs, methods, settings):
    """A dict a row: pair and method, accuracies in % over the finished runs, what is missing, time and device."""
    shown, generated = {method: METHODS[method] for method in methods}, report.generated(runs)
    columns = {"final": lambda run: run.accuracy[-1], "best": lambda run: max(run.accuracy)}
    rows = pairs.table(runs, shown, settings, columns)
    for row, (pair, method) in zip(rows, itertools.product(settings.pairs, methods)):
        found = runs.get((pair, method), {})
        finished = [run for run in found.values() if run.finished]
        gains = report.gains(found, runs.get((pair, "single"), {})) if method != "single" else []
        row |= report.spread_columns(gain=gains)
        row["paper_maxl"] = pairs.PAPER.get(pair) if method == "maxl" and not generated else None
        row["seconds_per_run"] = statistics.fmean(run.seconds for run in finished) if finished else None
        row["device"] = " / ".join(sorted({run.settings["device_name"] for run in finished}))
    return rows


def markdown(rows, described):
    """The table as Markdown, with what all the runs share."""
    columns = pairs.HEAD | {
        "final epoch": ("final", 2), "best epoch": ("best", 2),
        "above Single": lambda row: report.with_spread(row["gain_mean"], row["gain_std"]),
        "n": "n", "paper": lambda row: report.with_spread(row["paper_maxl"], None),
        "time of a run": lambda row: f"{row['seconds_per_run'] / 60:.1f} min" if row["seconds_per_run"] else "",
        "device": "device", "missing": "missing",
    }  # fmt: skip
    return (
        f"Test accuracy in %, mean ± standard deviation over n finished runs ({described}). Report the final epoch; "
        "the best epoch is chosen on the test set. Above Single: by how many points the final epoch is above that of "
        "Single's run with the same seed. Paper: MAXL in Table 3.\n\n"
    ) + report.rows_as_markdown(rows, columns)


def draw_dots(figure, runs, settings, methods):
    """Draw a single pair's final accuracies into the second panel: a dot for each seed, a line for the mean, n below.

    The same runs tested with settled statistics, in the folder settled/ of settings.out, stand beside the others.
    """
    (pair,), (_, axes), columns = settings.pairs, figure.axes, {}
    width = max(1.5, 0.62 * len(methods))
    figure.set_figwidth(4.2 + width)
    axes.get_gridspec().set_width_ratios([3.4, width])
    for method in methods:
        tasks = [pairs.task(method, pair, seed, settings.out / "settled") for seed in settings.seeds]
        repeated = {task.name: run for task in tasks if (run := report.run_of(task))}
        report.check_alike(runs | {(pair, f"{method}, settled"): repeated})
        column = columns[METHODS[method].label.replace(" (", "\n(")] = []
        for group in (runs.get((pair, method), {}), repeated):
            if finals := list(report.finals(group).values()):
                tested = next(iter(group.values())).settings.get("test_statistics", "running")
                column.append((METHODS[method].colour, f"{tested} statistics", finals, tested != "settled"))
    if len({kind for column in columns.values() for _, kind, *_ in column}) == 1:  # the caption says it
        columns = {label: [(colour, "", finals, True) for colour, _, finals, _ in column]
                   for label, column in columns.items()}  # fmt: skip
    drawing.draw_dots(axes, columns)
    axes.set(ylabel="test accuracy (%)")
    axes.set_title("final epoch", fontsize=10)


def make_report(settings):
    """The figure, and the table as rows and as text; what was not run is shown as such."""
    runs = pairs.read_runs(settings.out, METHODS, settings.pairs, settings.seeds)
    there = {method for _, method in runs}
    methods = [method for method in METHODS if method in settings.methods or method in there]
    rows, described = table(runs, methods, settings), pairs.describe(runs)
    shown = {method: METHODS[method] for method in methods}
    dots = functools.partial(draw_dots, runs=runs, settings=settings, methods=methods)
    second = dots if len(settings.pairs) == 1 else None
    figure = drawing.draw_curves(
        runs, settings.pairs, shown, "test accuracy (%)", lambda run: run.accuracy, second=second
    )
    drawing.caption(figure, f"{described}. {drawing.LINES}{' Dots: seeds.' if second else ''}")
    return figure, rows, markdown(rows, described)


experiment = Experiment(
    "figure3", __doc__, pairs.plan, make_report, pairs.add_options,
    full={"pairs": list(pairs.PAIRS), "methods": FIVE, "seeds": pairs.SEEDS},
    quick={"pairs": ["3-10", "20-100"], "seeds": [0]},
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
