"""Label learning: how far MAXL's label generator has come from the weights it started with, and what moves it.

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
from maxl import meta_gradient, multi_task_loss, negative_entropy

BOTH = ["maxl", "maxl0"]
BATCH_SIZE = 100
BATCHES = 100  # whose gradients are taken

COLUMNS = {  # heading of the table, and digits
    "entropy_at_start": ("entropy of a label: at the start", 3),
    "entropy": ("now", 3),
    "as_at_start": ("class as at the start (%)", 1),
    "both_crops": ("same class in two crops (%)", 1),
    "moved_by_decay": ("θ2 moved by weight decay", 3),
    "moved_else": ("by all else", 3),
    "pull_decay": ("pull of weight decay", 4),
    "pull_entropy": ("of the entropy loss", 4),
    "pull_meta": ("of the meta-gradient", 4),
    "one_batch_meta": ("the latter's on one batch", 4),
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


def norm(tensors):
    """Of several tensors as one vector, in float64."""
    return math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors))


def moved(label_generator, first, rates, iterations, weight_decay):
    """How far θ2 is from its first weights: what weight decay alone makes of them, and the rest of the way, as norms.

    rates: β in each epoch, of so many iterations.
    """
    shrunk = math.prod((1 - rate * weight_decay) ** iterations for rate in rates)
    start = list(first.parameters())
    rest = norm([p - shrunk * q for p, q in zip(label_generator.parameters(), start)])
    return {"moved_by_decay": (1 - shrunk) * norm(start), "moved_else": rest}


def norm_of_mean(total, squares, count):
    """Norm of the gradient that `count` noisy ones g_i have in the mean; 0 where noise hides it, NaN of a single one.

    total: norm of Σ g_i. squares: Σ |g_i|². The mean of g_i · g_j over all pairs i ≠ j has no bias, where the norm of
    the mean of the g_i would have their noise in it.
    """
    pairs = count * (count - 1)
    return math.sqrt(max(0.0, total**2 - squares) / pairs) if pairs else math.nan


def pulls(one, train, step_length, seed):
    """Norms of what the second pass adds up for θ2, each of the expected gradient, from the first batches of a pass.

    one: Trained. step_length: α. Returns those of the meta-gradient, of λ𝓗 (eq. 7) and of weight decay by the table's
    columns, and the root mean square norm of the meta-gradient on a batch.
    """
    network, label_generator, settings = one
    network.train()
    label_generator.train()
    loss = functools.partial(
        multi_task_loss, gamma=settings.focal_gamma, auxiliary_weight=settings.auxiliary_weight
    )  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), lr=step_length)
    theta2, sums, squares = list(label_generator.parameters()), {}, {"pull_meta": 0.0, "pull_entropy": 0.0}
    for count, (images, targets) in enumerate(train.train_batches(BATCH_SIZE, torch.Generator().manual_seed(seed)), 1):
        primary = targets[:, settings.primary_level]
        meta, _ = meta_gradient(
            network, label_generator, optimizer, images, primary, entropy_weight=None, loss=loss
        )  # fmt: skip
        spread = settings.entropy_weight * negative_entropy(label_generator(images, primary))
        for name, gradients in (("pull_meta", meta), ("pull_entropy", torch.autograd.grad(spread, theta2))):
            sums[name] = [g + s for g, s in zip(gradients, sums.get(name, [0.0] * len(theta2)))]
            squares[name] += norm(gradients) ** 2
        if count == BATCHES:
            break
    found = {name: norm_of_mean(norm(total), squares[name], count) for name, total in sums.items()}
    found["one_batch_meta"] = math.sqrt(squares["pull_meta"] / count)
    return found | {"pull_decay": settings.label_weight_decay * norm(theta2)}


def measure(run, task, train, device):
    """The numbers of one run, by the table's columns."""
    one = trained.load_trained(run, task, device)
    first, level = trained.first_label_generator(task, one.settings, device), one.settings.primary_level
    at_start, now, other_crop = (
        generated(label_generator, train, level, seed)
        for label_generator, seed in ((first, 0), (one.label_generator, 0), (one.label_generator, 1))
    )
    numbers = {
        "entropy_at_start": entropy(at_start),
        "entropy": entropy(now),
        "as_at_start": agreement(at_start, now),
        "both_crops": agreement(now, other_crop),
    }
    rates, iterations = run.column("label_learning_rate"), train.iterations(one.settings.batch_size)
    numbers |= moved(one.label_generator, first, rates, iterations, one.settings.label_weight_decay)
    return numbers | pulls(one, train, run.rows[-1]["learning_rate"], seed=2)


def table(runs, settings, device):
    """A dict a row: pair and λ, means and spreads over the seeds of each column."""
    rows = []
    for (pair, method), found in runs.items():
        numbers = []
        for seed, run in found.items():
            train, _ = trained.load_data(run, settings.data_root, device)
            train.labels = torch.cat([train.labels, torch.arange(len(train), device=device)[:, None]], dim=1)
            numbers.append(measure(run, pairs.task(method, pair, seed, settings.out), train, device))
        row = {"pair": pair, "method": pairs.METHODS[method].label, "n": len(found)}
        row |= report.spread_columns(**{column: [one[column] for one in numbers] for column in COLUMNS})
        rows.append(row | {"missing": report.missing(found, settings.seeds)})
    return rows


def markdown(rows, described):
    """The table as Markdown, with how its columns came about."""
    columns = {heading: (name, digits) for name, (heading, digits) in COLUMNS.items()}
    return (
        f"The label generator as its run left it, beside the weights it started with, on the training images, cropped "
        f"and mirrored as in training; mean ± standard deviation over n runs ({described}). "
        "Entropy of a label: the mean of each image's own, in nats. Class: the most probable of an image's label. "
        "Moved: norm of the difference to the first weights, what weight decay alone makes of these, and the rest. "
        "Pull: norm of each gradient that the second pass adds up for θ2, before the learning rate, with the last "
        f"epoch's α in θ1⁺; of the expected one, estimated from all pairs of {BATCHES} batches of {BATCH_SIZE} at "
        "most, 0 where noise hides it; beside it the root mean square of a single batch's.\n\n"
    ) + report.rows_as_markdown(rows, pairs.HEAD | columns | {"n": "n", "missing": "missing"})


def make_report(settings):
    """The entropy of a label over the epochs as a figure, and the table."""
    device = select_device(argparse.Namespace(device="auto"))
    runs = pairs.read_runs(settings.out, BOTH, settings.pairs, settings.seeds)
    shown, described = {method: pairs.METHODS[method] for method in BOTH}, pairs.describe(runs)
    figure = drawing.draw_curves(
        runs, settings.pairs, shown, "entropy of a label", lambda run: run.column("train_label_entropy")
    )
    drawing.caption(figure, f"{described}. {drawing.LINES}")
    rows = table(runs, settings, device)
    return figure, rows, markdown(rows, described)


def plan(settings, options=()):
    """MAXL with both weights of the entropy loss."""
    settings.methods = BOTH
    return pairs.plan(settings, trained.with_data_root(settings, options))


def add_options(parser):
    """Add --pairs and --data-root."""
    pairs.add_pairs(parser, default="20-100")
    trained.add_data_root(parser)


experiment = Experiment(
    "label_learning", __doc__, plan, make_report, add_options,
    full={"pairs": ["20-100"], "seeds": pairs.SEEDS}, quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
