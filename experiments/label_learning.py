"""Label learning: what MAXL's label generator learns, by its learning rate β and the weight λ of the entropy loss.

    python -m experiments.label_learning                                     # run what is missing, then draw
    python -m experiments.label_learning --methods beta1-lambda0 --seeds 0   # a part of it
    python -m experiments.label_learning --quick                             # small runs on generated images

β = 0.001 and λ = 0.2 are the paper's; these runs are Figure 3's, those with λ = 0 are Table 3's. The table is made from
the checkpoints. If most images still have the auxiliary class that the first weights gave them, the labels are those of
a random network. The push of a meta-gradient on the labels is measured twice: how much is the same in another batch?
"""

import argparse
import functools
import math
import sys

import torch

import maxl
from experiments import pairs, trained
from experiments.pairs import METHODS, Method
from experiments.runner import drawing, report
from experiments.runner.main import Experiment
from harness.acceleration import select_device


def at_rate(beta, weight, colour, style):
    """MAXL with other β and λ, a Method."""
    options = ("--label-learning-rate", f"{beta:g}", "--entropy-weight", f"{weight:g}")
    return Method("model_vgg_maxl", f"β = {beta:g}, λ = {weight:g}", colour, style, options)


SHOWN = {
    "maxl": METHODS["maxl"]._replace(label="β = 0.001, λ = 0.2"),
    "maxl0": METHODS["maxl0"]._replace(label="β = 0.001, λ = 0"),
    "beta0.1-lambda0": at_rate(0.1, 0, "#009E73", ":"),
    "beta1-lambda0.2": at_rate(1, 0.2, "#E69F00", (0, (5, 1))),
    "beta1-lambda0.02": at_rate(1, 0.02, "#0072B2", "-."),
    "beta1-lambda0": at_rate(1, 0, "#000000", "--"),
}
BATCH_SIZE = 100
COLUMNS = {  # of the table: heading, and digits
    "entropy_at_start": ("entropy of a label: at the start", 3),
    "entropy": ("now", 3),
    "as_at_start": ("class as at the start (%)", 1),
    "both_crops": ("same class in two crops (%)", 1),
    "repeated_mean": ("push repeated: mean of a primary class", 3),
    "repeated_rest": ("an image's own", 3),
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


class GivenLabels(torch.nn.Module):
    """A label generator whose weights are the labels of one batch, so that its gradient is ∂L_pri(θ1⁺)/∂y."""

    def __init__(self, labels):
        super().__init__()
        self.labels = torch.nn.Parameter(labels)

    def forward(self, images, primary):
        return self.labels


def pushes(one, labels, train, learning_rate, seed):
    """Where a meta-gradient pushes each training image's label: float (N, sum(psi)).

    −∂L_pri(θ1⁺)/∂y of a Trained, less its mean over the classes of the image's primary class (which a label cannot
    follow), 0 on all other classes. labels: `generated` from the same `train` and `seed`. learning_rate: α.
    """
    network, mask, level = one.network.train(), one.label_generator.mask, one.settings.primary_level
    optimizer = torch.optim.SGD(network.parameters(), learning_rate)
    loss = functools.partial(
        maxl.multi_task_loss, gamma=one.settings.focal_gamma, auxiliary_weight=one.settings.auxiliary_weight
    )
    pushes = torch.full_like(labels, math.nan)
    for images, targets in train.train_batches(BATCH_SIZE, torch.Generator().manual_seed(seed)):
        primary, numbers = targets[:, level], targets[:, -1]
        with maxl.exact_arithmetic(images.device):
            (gradient,), _ = maxl.meta_gradient(
                network, GivenLabels(labels[numbers]), optimizer, images, primary, entropy_weight=None, loss=loss
            )
        own = mask[primary].to(gradient.dtype)
        mean = (gradient * own).sum(dim=1, keepdim=True) / own.sum(dim=1, keepdim=True)
        pushes[numbers] = own * (mean - gradient)
    return pushes


def repeated(one, other, primary):
    """Correlations of two measurements of the pushes (N, K): of the means of the primary classes, and of the rest."""
    known = ~(one + other).isnan().any(dim=1)
    primary = primary[known]
    members = torch.nn.functional.one_hot(primary).double()
    means, rests = [], []
    for pushes in (one[known].double(), other[known].double()):
        means.append(members.T @ pushes / members.sum(dim=0)[:, None].clamp_min(1))
        rests.append(pushes - means[-1][primary])
    return tuple(((a * b).sum() / (a.norm() * b.norm())).item() for a, b in (means, rests))


def measure(run, task, settings, device):
    """The numbers of a RunOnDisk, the run of a Task, by the table's columns."""
    one, (train, _) = trained.load_trained(run, task, device), trained.load_data(run, settings.data_root, device)
    train.labels = torch.cat([train.labels, torch.arange(len(train), device=device)[:, None]], dim=1)
    first, last, level = one.first_label_generator, one.label_generator, one.settings.primary_level
    at_start, now = (generated(label_generator, train, level, seed=0) for label_generator in (first, last))
    other_crop = generated(last, train, level, seed=1)
    rate = run.column("learning_rate")[-1]
    measured = (pushes(one, labels, train, rate, seed) for seed, labels in enumerate((now, other_crop)))
    mean, rest = repeated(*measured, train.labels[:, level])
    return {
        "entropy_at_start": entropy(at_start),
        "entropy": entropy(now),
        "as_at_start": agreement(at_start, now),
        "both_crops": agreement(now, other_crop),
        "repeated_mean": mean,
        "repeated_rest": rest,
    }


PANELS = {  # label of the vertical axes: RunOnDisk -> its numbers over the epochs
    "entropy of a label": lambda run: run.column("train_label_entropy"),
    "classes used (%)": lambda run: [100 * share for share in run.column("train_auxiliary_classes_used")],
    "test accuracy (%)": lambda run: run.accuracy,
}


def draw(runs, settings):
    """A row of panels for each pair: the curves of PANELS, and at the end the classes as the first weights had them."""
    figure, grid = drawing.grid_of(4 * len(settings.pairs), 4, (3.2, 2.9), (0.6, 1.3))
    lines = {}
    for pair, axes in zip(settings.pairs, grid.reshape(-1, 4)):
        found = {method: list(runs.get((pair, method), {}).values()) for method in SHOWN}
        for panel, (what, curve) in zip(axes, PANELS.items()):
            for (method, shown), of_seeds in zip(SHOWN.items(), found.values()):
                if of_seeds:
                    curves = [curve(run) for run in of_seeds]
                    lines[method] = drawing.draw_band(panel, curves, shown.label, shown.colour, shown.style)
            panel.set(xlabel="epoch", ylabel=what)
            panel.grid(alpha=0.3)
            panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        primary, auxiliary = map(int, pair.split("-"))
        axes[0].axhline(math.log(auxiliary / primary), color="gray", linewidth=0.8)
        axes[0].text(1, math.log(auxiliary / primary), "uniform", color="gray", fontsize=8, va="bottom")
        axes[0].set_title(f"{primary} primary, {auxiliary} auxiliary classes", fontsize=10)
        drawing.draw_dots(axes[3], {
            SHOWN[method].label.replace(", ", "\n"): [
                (SHOWN[method].colour, "", [run.measured["as_at_start"] for run in of_seeds], True)
            ]
            for method, of_seeds in found.items() if of_seeds
        })  # fmt: skip
        axes[3].set(ylabel="class as at the start (%)", ylim=(-4, 104))
    drawing.legend(figure, SHOWN, lines)
    return figure


def make_report(settings):
    """The figure, and the table as rows and as text."""
    device = select_device(argparse.Namespace(device="auto"))
    runs = pairs.read_runs(settings.out, SHOWN, settings.pairs, settings.seeds, task)
    described = report.describe(runs, lambda method: SHOWN[method].label)
    for (pair, method), found in runs.items():
        for seed, run in found.items():
            run.measured = measure(run, task(method, pair, seed, settings.out), settings, device)
    columns = {"accuracy": lambda run: run.accuracy[-1]} | report.measured(COLUMNS)
    rows = [row for row in pairs.table(runs, SHOWN, settings, columns, unfinished=True) if row["begun"]]
    figure = draw(runs, settings)
    drawing.caption(figure, f"{described}. {drawing.LINES}")
    columns = {"test accuracy (%)": ("accuracy", 2)} | {
        heading: (name, digits) for name, (heading, digits) in COLUMNS.items()
    }
    text = (
        "The label generator as its run left it, beside the weights it started with, on the training images, cropped "
        f"and mirrored as in training; mean ± standard deviation over n runs ({described}). Entropy of a label: the "
        "mean of each image's own, in nats. Class: the most probable of an image's label. Push: minus the gradient of "
        "the primary loss after the step with respect to an image's label. It was measured twice, on other batches and "
        "crops. Repeated: the correlation of both measurements, of the mean push of each primary class, and of what is "
        "left of each image's own.\n\n"
    ) + report.rows_as_markdown(rows, pairs.HEAD | columns | {"n": "n", "missing": "missing"})
    return figure, rows, text


task = functools.partial(pairs.task, methods=SHOWN)
experiment = Experiment(
    "label_learning", __doc__, functools.partial(pairs.plan, task=task), make_report,
    functools.partial(pairs.add_options, methods=SHOWN, default=["all"], pairs="20-100"),
    full={"pairs": ["20-100"], "methods": list(SHOWN), "seeds": pairs.SEEDS},
    quick={"pairs": ["20-100"], "seeds": [0]}, folder="figure3",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
