"""MAXL: VGG-16 trained on the primary task and on auxiliary labels that a second network learns to generate.

    python model_vgg_maxl.py                                   # 20 classes, psi[i] = 5, the paper's settings
    python model_vgg_maxl.py --primary-level 0 --psi 2,3,4     # 3 classes split into 2, 3 and 4
    python model_vgg_maxl.py --quick                           # a first look on generated images

The method is maxl.py; here are its settings and the loop around it (Algorithm 1).
"""

import functools
import sys

import torch

import create_dataset
import maxl
import utils
from harness.acceleration import autocast, place, select_device
from harness.command_line import fit_psi, parse_settings
from harness.exits import InputError, run_main
from harness.run import Run

# ------------------------------------------------------------------------------------------------
# Settings: the paper's; each is an option of the command line, too
# ------------------------------------------------------------------------------------------------

SETTINGS = {
    "primary_level": 2,  # 0, 1, 2, 3: the 3, 10, 20 or 100 classes of 4-level CIFAR-100
    "psi": [5] * 20,  # ψ: auxiliary classes of each primary class, so len(psi) primary and sum(psi) auxiliary classes
    "epochs": 200,  # App. B
    "batch_size": 100,
    "width": 1.0,  # of both VGG-16; 1.0 is the paper's network
    "learning_rate": 0.01,  # α of eq. 4: plain SGD, no momentum, no weight decay (App. B, section 4.3)
    "label_learning_rate": 0.001,  # β of eq. 5; small, against the collapse of the labels (App. B)
    "label_weight_decay": 5e-4,  # App. B
    "halve_every": 50,  # epochs after which both rates are halved (α: App. B; β: the authors' code)
    "focal_gamma": 2.0,  # γ, eq. 1
    "auxiliary_weight": 1.0,  # of the auxiliary loss in eq. 2
    "entropy_weight": 0.2,  # λ, eq. 5 (App. B)
    "meta_gradient": "forward-mode",  # or "double-backward", the same gradient
    "test_statistics": "settled",  # of BatchNorm: during the second pass θ1 is fixed, so they settle before each test
}

# ------------------------------------------------------------------------------------------------
# Training: an epoch is one pass of auxiliary-training steps, then one of meta-training steps (Algorithm 1)
# ------------------------------------------------------------------------------------------------


def train_epoch(network, label_generator, optimizer, batches, level, loss, meter, cosine_every=0):
    """First pass: auxiliary-training steps; returns its averages by column name.

    cosine_every: compare the tasks' gradients at every so many iterations, 0 for never.
    """
    network.train()
    label_generator.train()
    used = None
    for iteration, (images, labels) in enumerate(batches):
        compare = utils.cosine_similarities if cosine_every and iteration % cosine_every == 0 else None
        numbers, auxiliary = maxl.auxiliary_training_step(
            network, label_generator, optimizer, images, labels[:, level], loss, compare
        )
        used = torch.zeros_like(label_generator.mask[0]) if used is None else used
        used.index_fill_(0, auxiliary, True)
        meter.add(numbers)
    return meter.averages() | {"train_auxiliary_classes_used": used.double().mean().item()}


def meta_epoch(network, label_generator, optimizer, label_optimizer, batches, level, loss, meter, **options):
    """Second pass: meta-training steps, with their options; returns its averages by column name.

    Raises InputError where forward mode is not exact in this network.
    """
    network.train()
    label_generator.train()
    largest = None  # error of forward mode; kept on the device until the pass ends
    for images, labels in batches:
        try:
            numbers = maxl.meta_training_step(
                network, label_generator, optimizer, label_optimizer, images, labels[:, level], loss=loss, **options
            )
        except (ValueError, maxl.ForwardModeError) as error:
            raise InputError(f"{error} (--meta-gradient chooses the method)") from None
        error = numbers.pop("forward_mode_error", None)
        largest = error if largest is None else torch.maximum(largest, error)
        meter.add(numbers)
    averages = meter.averages()
    if largest is not None:
        averages["meta_forward_mode_error"] = largest.item()
        if not averages["meta_forward_mode_error"] < 1e-4:
            raise InputError(
                f"forward mode is not exact in this network (relative error {averages['meta_forward_mode_error']:.1e}, "
                "expected below 1e-4): its forward does not do the same twice; use --meta-gradient double-backward"
            )
    return averages


def make_networks(settings, make_trunk=None):
    """The multi-task network and the label generator before the first epoch, by their names in a checkpoint.

    make_trunk: () -> a module as utils.VGG16 is; by default utils.Backbone in settings.width.
    """
    make_trunk = make_trunk or functools.partial(utils.Backbone, settings.width)
    torch.manual_seed(settings.seed)
    network = maxl.Network(make_trunk(), len(settings.psi), sum(settings.psi))
    utils.initialise(network, torch.nn.init.xavier_uniform_)
    label_generator = maxl.LabelGenerator(make_trunk(), settings.psi)
    utils.initialise(label_generator, torch.nn.init.xavier_normal_)
    return {"network": network, "label_generator": label_generator}


def make_optimizers(networks, settings):
    """The optimizers of both networks and the schedules of their learning rates, by name."""
    optimizer = torch.optim.SGD(networks["network"].parameters(), lr=settings.learning_rate)
    label_optimizer = torch.optim.SGD(
        networks["label_generator"].parameters(), lr=settings.label_learning_rate,
        weight_decay=settings.label_weight_decay,
    )  # fmt: skip
    scheduler, label_scheduler = (
        torch.optim.lr_scheduler.StepLR(each, settings.halve_every, gamma=0.5) for each in (optimizer, label_optimizer)
    )
    return {
        "optimizer": optimizer, "scheduler": scheduler,
        "label_optimizer": label_optimizer, "label_scheduler": label_scheduler,
    }  # fmt: skip


def fit(run, device, train, test, settings, parts, levels):
    """Train for what is left of settings.epochs on `train` and test after each; `run` keeps the parts and the curves.

    train, test: Splits. parts: networks, optimizers and schedules by name. levels: [the level of the primary labels].
    """
    network, label_generator = parts["network"], parts["label_generator"]
    optimizer, label_optimizer = parts["optimizer"], parts["label_optimizer"]
    loss = functools.partial(
        maxl.multi_task_loss, gamma=settings.focal_gamma, auxiliary_weight=settings.auxiliary_weight
    )
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in run.epochs(2 * train.iterations(settings.batch_size), device, parts | {"generator": generator}):
        row = {
            "learning_rate": optimizer.param_groups[0]["lr"],
            "label_learning_rate": label_optimizer.param_groups[0]["lr"],
        }
        with autocast(device, settings):  # the second pass turns it off
            row |= train_epoch(
                network, label_generator, optimizer, train.train_batches(settings.batch_size, generator), levels[0],
                loss, run.meter("train"), settings.cosine_every,
            )  # fmt: skip
            row |= meta_epoch(
                network, label_generator, optimizer, label_optimizer,
                train.train_batches(settings.batch_size, generator), levels[0], loss, run.meter("meta"),
                entropy_weight=settings.entropy_weight, method=settings.meta_gradient,
            )  # fmt: skip
            row |= utils.evaluate(network, test, levels, settings.focal_gamma, settings.test_statistics)
        parts["scheduler"].step()
        parts["label_scheduler"].step()
        run.end_epoch(row)


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    """The command line's settings. Raises InputError where ψ does not fit the primary level."""
    settings = parse_settings(__doc__, SETTINGS, argv)
    level = settings.primary_level
    fit_psi(settings, create_dataset.LEVEL_CLASSES[level], f"primary level {level}")
    return settings


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings)
    run = Run("model_vgg_maxl", settings, argv)
    train, test = create_dataset.load(settings, device)
    networks = place(make_networks(settings), device, settings)
    parts = networks | make_optimizers(networks, settings)
    fit(run, device, train, test, settings, parts, [settings.primary_level])


if __name__ == "__main__":
    sys.exit(run_main(main))
