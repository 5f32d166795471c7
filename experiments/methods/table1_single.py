"""Single, as Table 1 has it: one network trained on the primary task alone, on any dataset, with any backbone.

    python -m experiments.methods.table1_single --dataset mnist              # the 4-layer ConvNet, as in Table 1
    python -m experiments.methods.table1_single --dataset cifar10            # VGG-16
    python -m experiments.methods.table1_single --dataset cifar10 --backbone resnet32
    python -m experiments.methods.table1_single --quick                      # a first look on generated images

Unlike on CIFAR-100, it is trained with momentum, weight decay and a rate annealed to zero. Not yet run at full length.
"""

import math
import sys

import torch

import model_vgg_single
import utils
from experiments.methods.backbones import BACKBONES
from experiments.datasets.registry import DATASETS, load
from harness.acceleration import Acceleration, select_device
from harness.command_line import QUICK, make_parser, parse_settings
from harness.exits import InputError, run_main
from harness.run import Run

# App. B, except where the paper says nothing and CIFAR-100's value is taken
SETTINGS = {
    "dataset": "cifar10",
    "epochs": 200,  # the paper trains "until convergence"
    "batch_size": 100,  # as on CIFAR-100
    "width": 1.0,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "focal_gamma": 2.0,  # γ, eq. 1
}


def make_table1_parser(description, auxiliary_task):
    """harness.command_line.make_parser with the datasets and backbones of Table 1."""
    parser = make_parser(description, auxiliary_task, datasets=list(DATASETS))
    parser.add_argument(
        "--backbone", choices=BACKBONES, help=f"{', '.join(BACKBONES)} (default: the dataset's in Table 1)"
    )
    add = parser.add_argument
    add("--learning-rate", type=float, metavar="F", help="at the start; annealed to 0 (default: %(default)s)")
    return parser


def parse_table1(parser, defaults, argv=None):
    """parse_settings, and what the dataset decides. Raises InputError as that does."""
    settings = parse_settings(parser, defaults, argv)
    if not (math.isfinite(settings.learning_rate) and settings.learning_rate > 0):
        raise InputError(f"--learning-rate {settings.learning_rate} is out of range; give a positive number")
    settings.backbone = settings.backbone or DATASETS[settings.dataset].backbone
    if settings.quick and settings.train_images == QUICK["train_images"]:  # which not every dataset has
        settings.train_images = min(settings.train_images, DATASETS[settings.dataset].sizes[0])
    settings.annealed_over = settings.epochs  # a run that is to go on for longer is another run
    return settings


def make_trunk(settings):
    """The backbone of the settings, for the dataset's images."""
    return BACKBONES[settings.backbone](settings.width, DATASETS[settings.dataset].channels)


def annealed(optimizer, settings):
    """The schedule of the optimizer's rate: along a cosine, to zero over all epochs (App. B)."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.annealed_over)


def make_optimizer(network, settings):
    """SGD with momentum and weight decay for f_θ1, and its schedule."""
    optimizer = torch.optim.SGD(
        network.parameters(), settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )
    return optimizer, annealed(optimizer, settings)


def parse(argv=None):
    """The command line's settings."""
    return parse_table1(make_table1_parser(__doc__, auxiliary_task=False), SETTINGS, argv)


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings.device)
    fast = Acceleration(device, settings.precision, settings.channels_last, settings.cuda_graphs)
    classes = DATASETS[settings.dataset].classes
    run = Run("experiments.methods.table1_single", f"{classes}", settings, argv)
    train, test = load(
        settings.dataset, settings.data_root, device, settings.train_images, settings.seed, settings.channels_last
    )

    torch.manual_seed(settings.seed)
    network = utils.Network(make_trunk(settings), classes)
    fast.place(utils.initialise(network, torch.nn.init.xavier_uniform_))
    optimizer, scheduler = make_optimizer(network, settings)
    model_vgg_single.fit(run, fast, train, test, settings, network, optimizer, scheduler)


if __name__ == "__main__":
    sys.exit(run_main(main))
