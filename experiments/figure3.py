"""All of Figure 3: five methods, six pairs of levels, three seeds, as 81 runs of the scripts in processes of their own.

    python -m experiments.figure3 --dry-run                        # the plan and how long it will take here
    python -m experiments.figure3                                  # run what is missing, then draw
    python -m experiments.figure3 --pairs 20-100 --seeds 0         # a part of it
    python -m experiments.figure3 --jobs 4                         # four at a time, spread over the visible GPUs
    python -m experiments.figure3 --status                         # how far each run is
    python -m experiments.figure3 --plot                           # figure and table of what is there, also meanwhile
    python -m experiments.figure3 --submitit slurm --submitit-parameters slurm_partition=gpu gpus_per_node=1
    python -m experiments.figure3 --quick                          # ten small runs on generated images, in minutes

Options that are not its own go to the scripts as they are: --epochs, --width, --train-images, --precision, --device ...
The same command again continues what is unfinished and skips what is done. One run that fails does not stop the
others. --max-minutes limits each run. Single has no auxiliary task, so it runs once for each primary level and seed.
"""

import statistics
import sys

from experiments import pairs as cifar100
from experiments.pairs import METHODS
from experiments.runner import report
from experiments.runner.drawing import draw_curves
from experiments.runner.main import Experiment


def table(runs, pairs, methods, seeds):
    """A dict a row: pair and method, accuracies in % over the finished runs, what is missing, time and device."""
    rows, generated = [], report.generated(runs)
    for pair in pairs:
        for method in methods:
            found = runs.get((pair, method), {})
            finished = [run for run in found.values() if run.finished]
            row = {"pair": pair, "method": METHODS[method].label, "begun": len(found), "n": len(finished)}
            for name, accuracy in (("final", lambda run: run.accuracy[-1]), ("best", lambda run: max(run.accuracy))):
                mean, spread = report.mean_and_spread([accuracy(run) for run in finished])
                row |= {f"{name}_mean": mean, f"{name}_std": spread}
            gains = report.gains(found, runs.get((pair, "single"), {})) if method != "single" else []
            row["gain_n"] = len(gains)
            row["gain_mean"], row["gain_std"] = report.mean_and_spread(gains)
            row["paper_maxl"] = cifar100.PAPER.get(pair) if method == "maxl" and not generated else None
            row["seconds_per_run"] = statistics.fmean(run.seconds for run in finished) if finished else None
            row["device"] = " / ".join(sorted({run.settings["device_name"] for run in finished}))
            row["missing"] = report.missing(found, seeds)
            rows.append(row)
    return rows


def markdown(rows, runs):
    """The table as Markdown, with what all the runs share."""
    shared, lines = report.alike(runs), []
    for row in rows:
        cells = [row["pair"].replace("-", " → "), row["method"]]
        for name in ("final", "best"):
            mean, spread = row[f"{name}_mean"], row[f"{name}_std"]
            unknown = "unfinished" if row["begun"] else "not run"
            cells.append(unknown if mean is None else report.with_spread(mean, spread))
        cells.append(report.with_spread(row["gain_mean"], row["gain_std"]) if row["gain_n"] else "")
        cells += [str(row["n"]), f"{row['paper_maxl']:.2f}" if row["paper_maxl"] else ""]
        cells += [f"{row['seconds_per_run'] / 60:.1f} min" if row["seconds_per_run"] else "", row["device"]]
        lines.append([*cells, row["missing"]])
    heading = ["primary → auxiliary", "method", "final epoch", "best epoch", "above Single", "n", "paper"]
    return (
        f"Test accuracy in %, mean ± standard deviation over n finished runs ({shared}). The final epoch "
        "is the number to report; the best epoch is chosen on the test set. Above Single: by how many points "
        "the final epoch is above that of Single's run with the same seed. Paper: MAXL in Table 3.\n\n"
    ) + report.markdown_table([*heading, "time of a run", "device", "missing"], lines)


def make_report(settings):
    """The figure, and the table as rows and as text; what was not run is shown as such."""
    runs = cifar100.read_runs(settings.out, METHODS, settings.pairs, settings.seeds)
    there = {method for _, method in runs}
    methods = [method for method in METHODS if method in cifar100.FIVE or method in there]
    rows = table(runs, settings.pairs, methods, settings.seeds)
    shown = {method: METHODS[method] for method in methods}
    figure = draw_curves(runs, settings.pairs, shown, "test accuracy (%)", lambda run: run.accuracy)
    return figure, rows, markdown(rows, runs)


experiment = Experiment(
    "figure3", __doc__, cifar100.plan, make_report, cifar100.add_options,
    full={"pairs": list(cifar100.PAIRS), "methods": cifar100.FIVE, "seeds": cifar100.SEEDS},
    quick={"pairs": ["3-10", "20-100"], "seeds": [0]},
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
