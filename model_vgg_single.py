"""Single: VGG-16 trained on the primary task alone (section 4.1), the baseline that MAXL has to beat.

    python model_vgg_single.py                    # 20 classes, the paper's settings
    python model_vgg_single.py --primary-level 0  # 3 classes
    python model_vgg_single.py --quick            # a first look on generated images

Not yet run at full length.
"""

import sys

import torch

import create_dataset
import utils
from harness.acceleration import Acceleration, select_device
from harness.command_line import make_parser, parse_settings
from harness.exits import run_main
from harness.run import Run

# ------------------------------------------------------------------------------------------------
# Settings: the paper's; those with an option can be set on the command line too
# ------------------------------------------------------------------------------------------------

SETTINGS = {
    "primary_level": 2,  # 0, 1, 2, 3: the 3, 10, 20 or 100 classes of 4-level CIFAR-100
    "epochs": 200,  # App. B
    "batch_size": 100,
    "width": 1.0,  # of VGG-16; 1.0 is the paper's network
    "learning_rate": 0.01,  # plain SGD: no momentum, no weight decay (App. B, section 4.3)
    "halve_every": 50,  # epochs after which the learning rate is halved (App. B)
    "focal_gamma": 2.0,  # γ, eq. 1
}

# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def single_step(network, optimizer, images, primary, gamma=2.0):
    """One update on the primary loss (eq. 1) alone. images: (B, 3, 32, 32); primary: int64 (B,)."""
    (logits,) = network(images)
    loss = utils.focal_loss(logits, primary, gamma)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"primary_loss": loss.detach(), "primary_accuracy": utils.accuracy(logits, primary)}


def train_epoch(network, optimizer, batches, primary_level, gamma, meter, step=single_step):
    """One pass over the training data; returns its averages by column name."""
    network.train()
    for images, labels in batches:
        meter.add(step(network, optimizer, images, labels[:, primary_level], gamma))
    return meter.averages()


def fit(run, fast, train, test, settings, network, optimizer, scheduler, level=0):
    """Train for what is left of settings.epochs on `train` and test after each; `run` keeps them.

    train, test: Splits. fast: an Acceleration, whose device the network is on. level: of the primary labels.
    """
    gamma, generator = settings.focal_gamma, torch.Generator().manual_seed(settings.seed)
    step, low = fast.capture(single_step), fast.lower(network)
    for epoch in run.epochs(
        train.iterations(settings.batch_size), fast.device,
        network=network, optimizer=optimizer, scheduler=scheduler, generator=generator,
    ):  # fmt: skip
        row = {"learning_rate": optimizer.param_groups[0]["lr"]}
        batches = train.train_batches(settings.batch_size, generator)
        row |= train_epoch(low, optimizer, batches, level, gamma, run.meter("train"), step)
        if settings.settle_statistics:
            utils.settle_statistics(low, train, settings.batch_size, seed=settings.seed + epoch)
        row |= utils.evaluate(low, test, [level], gamma)
        scheduler.step()
        run.end_epoch(row)


def parse(argv=None):
    """The command line's settings."""
    return parse_settings(make_parser(__doc__, auxiliary_task=False), SETTINGS, argv)


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings.device)
    fast = Acceleration(device, settings.precision, settings.channels_last, settings.cuda_graphs)
    level = settings.primary_level
    classes = create_dataset.LEVEL_CLASSES[level]
    run = Run("model_vgg_single", f"{classes}", settings, argv)
    train, test = create_dataset.load(
        settings.dataset, settings.data_root, device, settings.train_images, settings.seed, settings.channels_last
    )

    torch.manual_seed(settings.seed)
    network = utils.Network(utils.Backbone(settings.width), classes)
    fast.place(utils.initialise(network, torch.nn.init.xavier_uniform_))
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.halve_every, gamma=0.5)
    fit(run, fast, train, test, settings, network, optimizer, scheduler, level)


if __name__ == "__main__":
    sys.exit(run_main(main))
