"""Human: VGG-16 trained on the primary task and, as auxiliary task, on the true finer labels (section 4.1).

    python model_vgg_human.py                                          # 20 classes with 100, the paper's settings
    python model_vgg_human.py --primary-level 0 --auxiliary-level 1    # 3 classes with 10
    python model_vgg_human.py --quick                                  # a first look on generated images
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
    "auxiliary_level": 3,  # a finer level than the primary
    "epochs": 200,  # App. B
    "batch_size": 100,
    "width": 1.0,  # of VGG-16; 1.0 is the paper's network
    "learning_rate": 0.01,  # plain SGD: no momentum, no weight decay (App. B, section 4.3)
    "halve_every": 50,  # epochs after which the learning rate is halved (App. B)
    "focal_gamma": 2.0,  # γ, eq. 1
    "auxiliary_weight": 1.0,  # of the auxiliary loss in eq. 2
    "test_statistics": "running",  # of BatchNorm; "settled" to compare with MAXL on equal terms
}

# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


class TrueLabels:
    """Human's auxiliary labels: the true labels of a finer level. Called with a batch, returns int64 (B,).

    start() is called before a run's first epoch, not where it is resumed.
    """

    parts = {}  # what a checkpoint has to hold

    def __init__(self, level):
        self.level = level

    def start(self):
        pass

    def __call__(self, images, labels):
        return labels[:, self.level]


def train_epoch(network, optimizer, batches, level, auxiliary_labels, loss, meter, cosine_every=0):
    """One pass over the training data (eq. 2 with given auxiliary labels); returns its averages by column name.

    cosine_every: compare the tasks' gradients at every so many iterations, 0 for never.
    """
    network.train()
    for iteration, (images, labels) in enumerate(batches):
        primary, auxiliary = labels[:, level], auxiliary_labels(images, labels)
        compare = utils.cosine_similarities if cosine_every and iteration % cosine_every == 0 else None
        meter.add(maxl.multi_task_step(network, optimizer, images, primary, auxiliary, loss, compare))
    return meter.averages()


def make_networks(settings):
    """The multi-task network before the first epoch, by its name in a checkpoint.

    Its auxiliary classes are those of settings.auxiliary_level or, for other auxiliary labels, of settings.psi.
    """
    torch.manual_seed(settings.seed)
    levels = create_dataset.LEVEL_CLASSES
    auxiliary_classes = sum(settings.psi) if "psi" in settings else levels[settings.auxiliary_level]
    network = maxl.Network(utils.Backbone(settings.width), levels[settings.primary_level], auxiliary_classes)
    return {"network": utils.initialise(network, torch.nn.init.xavier_uniform_)}


def make_optimizers(networks, settings):
    """The optimizer and the schedule of its learning rate, by name."""
    optimizer = torch.optim.SGD(networks["network"].parameters(), lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.halve_every, gamma=0.5)
    return {"optimizer": optimizer, "scheduler": scheduler}


def fit(run, device, train, test, settings, parts, auxiliary_labels, levels):
    """Train for what is left of settings.epochs on `train` and test after each; `run` keeps the parts and the curves.

    train, test: Splits. parts: network, optimizer and schedule by name. auxiliary_labels: an object like TrueLabels.
    levels: those to test on, of the primary task and, where the auxiliary labels are true ones, of the auxiliary task.
    """
    network, optimizer = parts["network"], parts["optimizer"]
    loss = functools.partial(
        maxl.multi_task_loss, gamma=settings.focal_gamma, auxiliary_weight=settings.auxiliary_weight
    )
    generator = torch.Generator().manual_seed(settings.seed)
    parts = parts | {"generator": generator} | auxiliary_labels.parts
    for epoch in run.epochs(train.iterations(settings.batch_size), device, parts):
        if epoch == 1:
            auxiliary_labels.start()
        row = {"learning_rate": optimizer.param_groups[0]["lr"]}
        with autocast(device, settings):
            row |= train_epoch(
                network, optimizer, train.train_batches(settings.batch_size, generator), levels[0],
                auxiliary_labels, loss, run.meter("train"), settings.cosine_every,
            )  # fmt: skip
            if settings.test_statistics == "settled":
                utils.settle_statistics(network, train, settings.batch_size, seed=settings.seed + epoch)
            row |= utils.evaluate(network, test, levels, settings.focal_gamma, settings.test_statistics)
        parts["scheduler"].step()
        run.end_epoch(row)


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    """The command line's settings. Raises InputError unless the auxiliary level is finer than the primary."""
    settings = parse_settings(__doc__, SETTINGS, argv)
    create_dataset.parent_map(settings.primary_level, settings.auxiliary_level)
    return settings


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings)
    run = Run("model_vgg_human", settings, argv)
    train, test = create_dataset.load(settings, device)
    networks = place(make_networks(settings), device, settings)
    parts = networks | make_optimizers(networks, settings)
    levels = settings.primary_level, settings.auxiliary_level
    fit(run, device, train, test, settings, parts, TrueLabels(levels[1]), levels)


if __name__ == "__main__":
    sys.exit(run_main(main))
