"""The curves of a run: an epoch's row as a printed line, all rows as curves.csv and as a picture."""

import csv
import io

from tqdm import tqdm


def curves_text(rows):
    """The content of curves.csv: a line an epoch, the columns of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_curves(directory):
    """The rows of a folder's curves.csv, numbers as floats by column; none where there is no whole file."""
    try:
        with open(directory / "curves.csv", newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError):
        return []


def row_seconds(row):
    """The wall time of an epoch's passes."""
    return sum(value for name, value in row.items() if name.startswith("seconds_"))


def epoch_line(row, epochs, eta):
    """One readable line of an epoch's row of curves.csv; `eta` is in seconds."""
    parts = [f"epoch {row['epoch']:3d}/{epochs}"]
    for stage, task in (("train", "primary"), ("train", "auxiliary"), ("test", "primary"), ("test", "auxiliary")):
        if f"{stage}_{task}_loss" in row:
            loss, share = row[f"{stage}_{task}_loss"], row[f"{stage}_{task}_accuracy"]
            parts.append(f"{stage} {task} loss {loss:.3f} acc {100 * share:5.2f} %")
    if "train_auxiliary_classes_used" in row:
        parts.append(f"classes used {100 * row['train_auxiliary_classes_used']:.0f} %")
    return " | ".join([*parts, f"{row_seconds(row):.1f} s, {tqdm.format_interval(eta)} left"])


def plot_curves(rows, title, file):
    """Draw curves.png: accuracies, losses and, where there are any, labels and cosine similarities, over the epochs."""
    from matplotlib.figure import Figure

    panels = {"accuracy (%)": "_accuracy", "focal loss": "_loss"}
    panels |= {"entropy of the generated labels (nats)": "_entropy", "auxiliary classes used (%)": "_used"}
    panels |= {"cosine similarity of the tasks' gradients": "_similarity"}
    panels = {heading: [name for name in rows[0] if name.endswith(ending)] for heading, ending in panels.items()}
    panels = {heading: names for heading, names in panels.items() if names}
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    epochs = [row["epoch"] for row in rows]
    for axes, (heading, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name in names:
            colour = "tab:orange" if any(word in name for word in ("auxiliary", "mean", "trunk")) else "tab:blue"
            style = {"test": "-", "train": "--", "meta": ":"}[name.split("_")[0]]
            values = [100 * row[name] if "%" in heading else row[name] for row in rows]
            axes.plot(epochs, values, style, color=colour, label=name.replace("_", " "), marker=".", markersize=3)
        axes.set(xlabel="epoch", ylabel=heading)
        if "similarity" not in heading:
            axes.set_ylim(bottom=0, top=102 if "used" in heading else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(file, format="png", dpi=120)
