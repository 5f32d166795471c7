"""Label learning: how far MAXL's label generator has come from the weights it started with.

    python -m experiments.label_learning                   # run what is missing, then draw
    python -m experiments.label_learning --quick           # small runs on generated images

The runs are Figure 3's, and Table 3's with λ = 0; their checkpoints are read. If most images still have the auxiliary
class that the first weights gave them, the labels are those of a random network.
"""

import argparse
import functools
import math
import sys

import torch

from experiments import pairs, trained
from experiments.runner import drawing, report
from experiments.runner.main import Experiment
from harness.acceleration import select_device

SHOWN = {method: pairs.METHODS[method] for method in ("maxl", "maxl0")}
BATCH_SIZE = 100
COLUMNS = {  # of the table: heading, and digits
    "entropy_at_start": ("entropy of a label: at the start", 3),
    "entropy": ("now", 3),
    "as_at_start": ("class as at the start (%)", 1),
    "both_crops": ("same class in two crops (%)", 1),
}


@torch.no_grad()
def generated(label_generator, train, level, seed):
    """The labels of all training images, cropped and mirrored from `seed` as in training: float (N, sum(psi)).

    train: a Split whose last level is the image's number. Batch statistics are used, as in training; the images of the
    last, smaller batch, which training leaves out, have NaN.
    """
    label_generator.train()
    labels = torch.full((len(train), len(label_generator.mask[0])), math.nan, device=train.labels.device)
    for images, targets in train.train_batches(BATCH_SIZE, torch.Generator().manual_seed(seed)):
        labels[targets[:, -1]] = label_generator(images, targets[:, level])
    return labels


def entropy(labels):
    """Mean over the images of a label's own entropy -Σ_k y_k log y_k, in nats; log ψ[i] where it is uniform."""
    return -torch.xlogy(labels, labels).sum(dim=1).nanmean().item()


def agreement(one, other):
    """Share in % of the images whose most probable class is the same in both labels (N, K)."""
    known = ~(one + other).isnan().any(dim=1)
    return 100 * (one.argmax(dim=1) == other.argmax(dim=1))[known].double().mean().item()


def measure(run, task, settings, device):
    """The numbers of a RunOnDisk, the run of a Task, by the table's columns."""
    one, (train, _) = trained.load_trained(run, task, device), trained.load_data(run, settings.data_root, device)
    train.labels = torch.cat([train.labels, torch.arange(len(train), device=device)[:, None]], dim=1)
    first, last, level = one.first_label_generator, one.label_generator, one.settings.primary_level
    at_start, now = (generated(label_generator, train, level, seed=0) for label_generator in (first, last))
    other_crop = generated(last, train, level, seed=1)
    return {
        "entropy_at_start": entropy(at_start),
        "entropy": entropy(now),
        "as_at_start": agreement(at_start, now),
        "both_crops": agreement(now, other_crop),
    }


def make_report(settings):
    """The entropy of a label over the epochs as a figure, and the table."""
    device = select_device(argparse.Namespace(device="auto"))
    runs = pairs.read_runs(settings.out, SHOWN, settings.pairs, settings.seeds)
    described = pairs.describe(runs)
    figure = drawing.draw_curves(
        runs, settings.pairs, SHOWN, "entropy of a label", lambda run: run.column("train_label_entropy")
    )
    drawing.caption(figure, f"{described}. {drawing.LINES}")
    for (pair, method), found in runs.items():
        for seed, run in found.items():
            run.measured = measure(run, pairs.task(method, pair, seed, settings.out), settings, device)
    rows = pairs.table(runs, SHOWN, settings, report.measured(COLUMNS), unfinished=True)
    columns = {heading: (name, digits) for name, (heading, digits) in COLUMNS.items()}
    text = (
        "The label generator as its run left it, beside the weights it started with, on the training images, cropped "
        f"and mirrored as in training; mean ± standard deviation over n runs ({described}). Entropy of a label: the "
        "mean of each image's own, in nats. Class: the most probable of an image's label.\n\n"
    ) + report.rows_as_markdown(rows, pairs.HEAD | columns | {"n": "n", "missing": "missing"})
    return figure, rows, text


experiment = Experiment(
    "label_learning", __doc__, pairs.plan, make_report, functools.partial(pairs.add_pairs, default="20-100"),
    full={"pairs": ["20-100"], "methods": list(SHOWN), "seeds": pairs.SEEDS},
    quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
