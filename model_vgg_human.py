"""Human: VGG-16 trained on the primary task and, as auxiliary task, on the true finer labels (section 4.1).

    python model_vgg_human.py                                          # 20 classes with 100, the paper's settings
    python model_vgg_human.py --primary-level 0 --auxiliary-level 1    # 3 classes with 10
    python model_vgg_human.py --quick                                  # a first look on generated images

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
    "auxiliary_level": 3,  # a finer level than the primary
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


def train_epoch(network, optimizer, batches, primary_level, auxiliary_labels, gamma, meter, step, cosine_every=0):
    """One pass over the training data (eq. 2 with given auxiliary labels); returns its averages by column name.

    step: utils.multi_task_step. cosine_every: compare the tasks' gradients at every so many iterations, 0 for never.
    """
    network.train()
    for iteration, (images, labels) in enumerate(batches):
        primary, auxiliary = labels[:, primary_level], auxiliary_labels(images, labels)
        cosine = cosine_every > 0 and iteration % cosine_every == 0
        meter.add(step(network, optimizer, images, primary, auxiliary, gamma, cosine=cosine))
    return meter.averages()


def train(script, settings, argv, auxiliary_classes, make_auxiliary_labels, test_levels):
    """Train the multi-task network on the primary level and on auxiliary labels from anywhere, experiments/ too.

    make_auxiliary_labels: called with the training Split, returns an object like TrueLabels. test_levels: the levels
    to test on, that of the primary task and, where the auxiliary labels are true ones, theirs.
    """
    device = select_device(settings.device)
    fast = Acceleration(device, settings.precision, settings.channels_last, settings.cuda_graphs)
    level, gamma = settings.primary_level, settings.focal_gamma
    classes = create_dataset.LEVEL_CLASSES[level], auxiliary_classes
    run = Run(script, f"{classes[0]}-{classes[1]}", settings, argv)
    train, test = create_dataset.load(
        settings.dataset, settings.data_root, device, settings.train_images, settings.seed, settings.channels_last
    )
    iterations = train.iterations(settings.batch_size)

    torch.manual_seed(settings.seed)
    network = utils.Network(utils.Backbone(settings.width), *classes)
    fast.place(utils.initialise(network, torch.nn.init.xavier_uniform_))
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.halve_every, gamma=0.5)
    generator = torch.Generator().manual_seed(settings.seed)
    auxiliary_labels = make_auxiliary_labels(train)
    step, low = fast.capture(utils.multi_task_step), fast.lower(network)

    for epoch in run.epochs(
        iterations, device,
        network=network, optimizer=optimizer, scheduler=scheduler, generator=generator, **auxiliary_labels.parts,
    ):  # fmt: skip
        if epoch == 1:
            auxiliary_labels.start()
        row = {"learning_rate": optimizer.param_groups[0]["lr"]}
        batches, meter = train.train_batches(settings.batch_size, generator), run.meter("train")
        row |= train_epoch(low, optimizer, batches, level, auxiliary_labels, gamma, meter, step, settings.cosine_every)
        if settings.settle_statistics:
            utils.settle_statistics(low, train, settings.batch_size, seed=settings.seed + epoch)
        row |= utils.evaluate(low, test, test_levels, gamma)
        scheduler.step()
        run.end_epoch(row)


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    """The command line's settings. Raises InputError unless the auxiliary level is finer than the primary."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--auxiliary-level", type=int, metavar="K",
        help="level of the auxiliary task, finer than the primary: 1, 2, 3 for 10, 20, 100 classes "
        "(default: %(default)s)",
    )  # fmt: skip
    settings = parse_settings(parser, SETTINGS, argv)
    create_dataset.parent_map(settings.primary_level, settings.auxiliary_level)
    return settings


def main(argv=None):
    settings = parse(argv)
    level = settings.auxiliary_level
    train(
        "model_vgg_human", settings, argv, create_dataset.LEVEL_CLASSES[level],
        make_auxiliary_labels=lambda split: TrueLabels(level), test_levels=(settings.primary_level, level),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
