"""Figure 3 and its table from the runs of experiments.figure3: figure3.png, figure3.pdf, figure3.md, figure3.csv."""

import collections
import csv
import statistics
from pathlib import Path

import utils

# Okabe and Ito's colours, told apart by the colour-blind; with the line styles also in a grey print
STYLES = {
    "single": ("Single", "#000000", "--"),
    "random": ("Random", "#E69F00", "-."),
    "kmeans": ("K-Means", "#009E73", ":"),
    "human": ("Human", "#0072B2", (0, (5, 1))),
    "maxl": ("MAXL", "#D55E00", "-"),
}
PAPER = {"3-10": 90.50, "3-20": 90.65, "3-100": 90.66, "10-20": 78.40, "10-100": 78.46, "20-100": 74.27}  # Table 3
SAME = (
    "dataset",
    "epochs",
    "width",
    "batch_size",
    "train_images",
    "learning_rate",
    "halve_every",
    "focal_gamma",
    "precision",
)


class RunOnDisk:
    """What a run's folder says: its settings and test accuracies in %, epoch by epoch."""

    def __init__(self, folder):
        self.folder, self.settings = folder, utils.read_settings(folder / "settings.json")
        with open(folder / "curves.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        self.accuracy = [100 * float(row["test_primary_accuracy"]) for row in rows]
        self.seconds = sum(float(v) for row in rows for name, v in row.items() if name.startswith("seconds_"))
        self.finished = len(rows) == self.settings.get("epochs")


def read_runs(root, pairs, seeds):
    """{(pair, method): {seed: RunOnDisk}} of all folders that have curves; Single's stand under every pair.

    Raises InputError where there are none, and where the runs' settings differ in more than method, levels and seed.
    """
    runs, reference = collections.defaultdict(dict), None
    for pair in pairs:
        for method in STYLES:
            for seed in seeds:
                folder = Path(root) / f"{method}-{pair.split('-')[0] if method == 'single' else pair}-seed{seed}"
                if not (folder / "curves.csv").exists():
                    continue
                run = RunOnDisk(folder)
                reference = reference or run
                differ = [name for name in SAME if run.settings.get(name) != reference.settings.get(name)]
                if differ:
                    raise utils.InputError(
                        f"{folder} and {reference.folder} differ in {', '.join(differ)} and cannot stand in one "
                        "figure; name another folder with --out, or move one away"
                    )
                runs[pair, method][seed] = run
    if not runs:
        raise utils.InputError(f"there are no runs of these pairs and seeds in {root} yet; start them without --plot")
    return runs


def mean_and_spread(values):
    """Mean and sample standard deviation, the latter None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def band(runs):
    """By epoch: means and standard deviations (0 for one run) of the accuracies of the runs that got there."""
    curves = [run.accuracy for run in runs.values()]
    points = [[curve[epoch] for curve in curves if epoch < len(curve)] for epoch in range(max(map(len, curves)))]
    means, spreads = zip(*map(mean_and_spread, points))
    return list(means), [spread or 0.0 for spread in spreads]


def draw(runs, pairs, root):
    """A panel a pair: test accuracy over the epochs, lines for means over seeds, bands for ± a standard deviation."""
    from matplotlib.figure import Figure

    columns = min(3, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 0.9 + 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    shown = {}
    for axes, pair in zip(panels, pairs):
        for method, (label, colour, style) in STYLES.items():
            if (pair, method) not in runs:
                continue
            means, spreads = band(runs[pair, method])
            epochs = range(1, len(means) + 1)
            (shown[label],) = axes.plot(epochs, means, linestyle=style, color=colour, linewidth=1.6, label=label)
            low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
        if not axes.lines:
            axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes, color="gray")
        primary, auxiliary = pair.split("-")
        axes.set(title=f"{primary} primary, {auxiliary} auxiliary classes", xlabel="epoch", ylabel="test accuracy (%)")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[len(pairs) :]:
        axes.axis("off")
    ordered = [label for label, *_ in STYLES.values() if label in shown]
    legend = {"loc": "outside upper center", "ncols": 5 if columns > 1 else 3, "frameon": False, "handlelength": 3}
    figure.legend([shown[label] for label in ordered], ordered, **legend)
    for ending in ("png", "pdf"):
        figure.savefig(Path(root) / f"figure3.{ending}", dpi=200)


def table(runs, pairs, seeds):
    """A dict a row: pair and method, accuracies in % over the finished runs, what is missing, time and device."""
    rows = []
    for pair in pairs:
        for method, (label, *_) in STYLES.items():
            found = runs.get((pair, method), {})
            finished = [run for run in found.values() if run.finished]
            missing = []
            for seed in seeds:
                run = found.get(seed)
                if run is None:
                    missing.append(f"seed {seed} not run")
                elif not run.finished:
                    missing.append(f"seed {seed} at epoch {len(run.accuracy)} of {run.settings['epochs']}")
            row = {"pair": pair, "method": label, "begun": len(found), "n": len(finished)}
            for name, accuracy in (("final", lambda run: run.accuracy[-1]), ("best", lambda run: max(run.accuracy))):
                values = [accuracy(run) for run in finished]
                mean, spread = mean_and_spread(values) if values else (None, None)
                row |= {f"{name}_mean": mean, f"{name}_std": spread}
            generated = any(run.settings["dataset"] == "synthetic" for run in found.values())  # nothing of the paper's
            row["paper_maxl"] = PAPER[pair] if method == "maxl" and not generated else None
            row["seconds_per_run"] = statistics.fmean(run.seconds for run in finished) if finished else None
            row["device"] = " / ".join(sorted({run.settings["device_name"] for run in finished}))
            row["missing"] = ", ".join(missing)
            rows.append(row)
    return rows


def markdown(rows, runs):
    """The table as Markdown, with what all the runs share."""
    settings = next(iter(next(iter(runs.values())).values())).settings
    shared = ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in SAME)
    lines = [
        f"Test accuracy in %, mean ± standard deviation over n finished runs ({shared}). The final epoch is the number "
        "to report; the best epoch is chosen on the test set. Paper: MAXL in Table 3.",
        "",
        "| primary → auxiliary | method | final epoch | best epoch | n | paper | time of a run | device | missing |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["pair"].replace("-", " → "), row["method"]]
        for name in ("final", "best"):
            mean, spread = row[f"{name}_mean"], row[f"{name}_std"]
            spread = "" if spread is None else f" ± {spread:.2f}"
            cells.append(f"{mean:.2f}{spread}" if mean is not None else "unfinished" if row["begun"] else "not run")
        cells += [str(row["n"]), f"{row['paper_maxl']:.2f}" if row["paper_maxl"] else ""]
        cells += [
            f"{row['seconds_per_run'] / 60:.1f} min" if row["seconds_per_run"] else "",
            row["device"],
            row["missing"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(root, pairs, seeds):
    """Draw the figure and write the table of the runs in `root`; what was not run is shown as such."""
    runs = read_runs(root, pairs, seeds)
    draw(runs, pairs, root)
    rows = table(runs, pairs, seeds)
    root = Path(root)
    (root / "figure3.md").write_text(markdown(rows, runs))
    with open(root / "figure3.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"figure3.png, figure3.pdf, figure3.md and figure3.csv are in {root}")
