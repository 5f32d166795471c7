"""The curves of a run: an epoch's row as a printed line, all rows as curves.csv and as a picture."""

import csv
import io
import math

from tqdm import tqdm


def curves_text(rows):
    """The content of curves.csv: a line per epoch; columns of all rows, in order of appearance, blank if missing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_curves(directory):
    """The rows of a folder's curves.csv: floats by column, without blanks. Empty if there is no whole file."""
    try:
        with open(directory / "curves.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return [{name: float(value) for name, value in row.items() if value != ""} for row in rows]
    except (OSError, ValueError, TypeError):
        return []


def row_seconds(row):
    """The wall time of an epoch's passes."""
    return sum(value for name, value in row.items() if name.startswith("seconds_"))


def epoch_line(row, epochs, eta):
    """One readable line of an epoch's row of curves.csv; `eta` is in seconds."""
    parts = [f"epoch {row['epoch']:3d}/{epochs}"]
    for stage, task in (("train", "primary"), ("train", "auxiliary"), ("test", "primary"), ("test", "auxiliary")):
        loss, share = row.get(f"{stage}_{task}_loss"), row.get(f"{stage}_{task}_accuracy")
        numbers = f" loss {loss:.3f}" if loss is not None else ""
        numbers += f" acc {100 * share:5.2f} %" if share is not None else ""
        parts += [f"{stage} {task}{numbers}"] if numbers else []
    if "train_auxiliary_classes_used" in row:
        parts.append(f"classes used {100 * row['train_auxiliary_classes_used']:.0f} %")
    return " | ".join([*parts, f"{row_seconds(row):.1f} s, {tqdm.format_interval(eta)} left"])


# What curves.png shows: heading, ending of the columns.
PANELS = {
    "accuracy (%)": "_accuracy",
    "focal loss": "_loss",
    "entropy of the generated labels (nats)": "_entropy",
    "auxiliary classes used (%)": "_used",
    "cosine similarity of the tasks' gradients": "_similarity",
}
# Line, and colours of primary and auxiliary task, by the beginning of a column's name.
LINES = {
    "train": ("--", "tab:orange", "tab:red"),
    "test": ("-", "tab:blue", "tab:cyan"),
    "meta": (":", "tab:purple", "tab:green"),
}


def plot_curves(rows, title, file):
    """Draw curves.png, a panel for each kind of number that the rows have, at most three in a row, over the epochs."""
    from matplotlib.figure import Figure

    columns = dict.fromkeys(name for row in rows for name in row)
    panels = {heading: [name for name in columns if name.endswith(ending)] for heading, ending in PANELS.items()}
    panels = {heading: names for heading, names in panels.items() if names}
    wide = min(3, len(panels)) or 1
    high = math.ceil(len(panels) / wide) or 1
    figure = Figure(figsize=(5 * wide, 3.8 * high), layout="constrained")
    figure.suptitle(title, parse_math=False)
    epochs = [row["epoch"] for row in rows]
    marker = "." if len(rows) <= 30 else ""
    places = figure.subplots(high, wide, squeeze=False).flatten()
    for axes, (heading, names) in zip(places, panels.items()):
        factor = 100 if "%" in heading else 1
        for name in names:
            auxiliary = any(word in name for word in ("auxiliary", "mean", "trunk"))
            style, *colours = LINES.get(name.split("_")[0], ("-", "tab:gray", "tab:brown"))
            values = [factor * row.get(name, math.nan) for row in rows]
            line = {"color": colours[auxiliary], "marker": marker, "linewidth": 1.2}
            axes.plot(epochs, values, style, label=name.replace("_", " "), **line)
        axes.set(xlabel="epoch", ylabel=heading)
        if "similarity" not in heading:
            axes.set_ylim(bottom=0, top=102 if "used" in heading else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in places[len(panels) :]:
        axes.remove()
    figure.savefig(file, format="png", dpi=120)
