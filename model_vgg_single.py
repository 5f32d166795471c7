"""Single: VGG-16 trained on the primary task alone (section 4.1), the baseline that MAXL has to beat.

    python model_vgg_single.py                    # 20 classes, the paper's settings
    python model_vgg_single.py --primary-level 0  # 3 classes
    python model_vgg_single.py --quick            # a first look on generated images
"""

import functools
import sys

import torch

import create_dataset
import maxl
import utils
from harness.acceleration import autocast, place, select_device
from harness.command_line import parse_settings
from harness.exits import run_main
from harness.run import Run

# ------------------------------------------------------------------------------------------------
# Settings: the paper's; each is an option of the command line, too
# ------------------------------------------------------------------------------------------------

SETTINGS = {
    "primary_level": 2,  # 0, 1, 2, 3: the 3, 10, 20 or 100 classes of 4-level CIFAR-100
    "epochs": 200,  # App. B
    "batch_size": 100,
    "width": 1.0,  # of VGG-16; 1.0 is the paper's network
    "learning_rate": 0.01,  # plain SGD: no momentum, no weight decay (App. B, section 4.3)
    "halve_every": 50,  # epochs after which the learning rate is halved (App. B)
    "focal_gamma": 2.0,  # γ, eq. 1
    "test_statistics": "running",  # of BatchNorm; "settled" to compare with MAXL on equal terms
}

# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def train_epoch(network, optimizer, batches, level, loss, meter):
    """One pass over the training data on the primary loss (eq. 1); returns its averages by column name."""
    network.train()
    for images, labels in batches:
        meter.add(maxl.multi_task_step(network, optimizer, images, labels[:, level], loss=loss))
    return meter.averages()


def make_networks(settings):
    """The network before the first epoch, by its name in a checkpoint."""
    torch.manual_seed(settings.seed)
    network = maxl.Network(utils.Backbone(settings.width), create_dataset.LEVEL_CLASSES[settings.primary_level])
    return {"network": utils.initialise(network, torch.nn.init.xavier_uniform_)}


def make_optimizers(networks, settings):
    """The optimizer and the schedule of its learning rate, by name."""
    optimizer = torch.optim.SGD(networks["network"].parameters(), lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.halve_every, gamma=0.5)
    return {"optimizer": optimizer, "scheduler": scheduler}


def fit(run, device, train, test, settings, parts, levels):
    """Train for what is left of settings.epochs on `train` and test after each; `run` keeps the parts and the curves.

    train, test: Splits. parts: network, optimizer and schedule by name. levels: [the level of the primary labels].
    """
    network, optimizer = parts["network"], parts["optimizer"]
    loss = functools.partial(maxl.multi_task_loss, gamma=settings.focal_gamma)
    generator = torch.Generator().manual_seed(settings.seed)
    for epoch in run.epochs(train.iterations(settings.batch_size), device, parts | {"generator": generator}):
        row = {"learning_rate": optimizer.param_groups[0]["lr"]}
        with autocast(device, settings):
            batches = train.train_batches(settings.batch_size, generator)
            row |= train_epoch(network, optimizer, batches, levels[0], loss, run.meter("train"))
            if settings.test_statistics == "settled":
                utils.settle_statistics(network, train, settings.batch_size, seed=settings.seed + epoch)
            row |= utils.evaluate(network, test, levels, settings.focal_gamma, settings.test_statistics)
        parts["scheduler"].step()
        run.end_epoch(row)


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    """The command line's settings. Raises InputError for what is out of range."""
    return parse_settings(__doc__, SETTINGS, argv, auxiliary_task=False)


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings)
    run = Run("model_vgg_single", settings, argv)
    train, test = create_dataset.load(settings, device)
    networks = place(make_networks(settings), device, settings)
    parts = networks | make_optimizers(networks, settings)
    fit(run, device, train, test, settings, parts, [settings.primary_level])


if __name__ == "__main__":
    sys.exit(run_main(main))
