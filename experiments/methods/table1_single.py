"""Single as in Table 1: one network trained on the primary task alone, on any dataset, with any backbone.

    python -m experiments.methods.table1_single --dataset mnist              # the 4-layer ConvNet, as in Table 1
    python -m experiments.methods.table1_single --dataset cifar10            # VGG-16
    python -m experiments.methods.table1_single --dataset cifar10 --backbone resnet32
    python -m experiments.methods.table1_single --quick                      # a first look on generated images

Unlike on CIFAR-100, it is trained with momentum, weight decay and a rate annealed to zero.
"""

import sys

import torch

import maxl
import model_vgg_single
import utils
from experiments.datasets.registry import DATASETS, load
from experiments.methods.backbones import BACKBONES
from harness.acceleration import place, select_device
from harness.command_line import parse_settings
from harness.exits import run_main
from harness.run import Run

# App. B; where the paper does not give a value, CIFAR-100's is taken
SETTINGS = {
    "dataset": "cifar10",
    "backbone": None,  # the dataset's in Table 1
    "epochs": 200,  # the paper trains "until convergence"
    "batch_size": 100,  # as on CIFAR-100
    "width": 1.0,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "focal_gamma": 2.0,  # γ, eq. 1
    "test_statistics": "running",
}
OPTIONS = {"backbone": (tuple(BACKBONES), "trunk of every network (default: the dataset's in Table 1)", None, None)}


def make_trunk(settings):
    """The backbone of the settings, for the dataset's images."""
    return BACKBONES[settings.backbone](settings.width, DATASETS[settings.dataset].channels)


def make_networks(settings):
    """The network with its first weights, by its name in a checkpoint."""
    torch.manual_seed(settings.seed)
    network = maxl.Network(make_trunk(settings), DATASETS[settings.dataset].classes)
    return {"network": utils.initialise(network, torch.nn.init.xavier_uniform_)}


def make_optimizers(networks, settings):
    """SGD with momentum and weight decay, and its schedule: along a cosine to zero over all epochs (App. B)."""
    parameters, rate = networks["network"].parameters(), settings.learning_rate
    optimizer = torch.optim.SGD(parameters, rate, settings.momentum, weight_decay=settings.weight_decay)
    return {
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.annealed_over),
    }


def parse(argv=None, doc=__doc__, defaults=SETTINGS, auxiliary_task=False):
    """The command line's settings, with those that the dataset decides. Raises InputError for a bad value."""
    settings = parse_settings(doc, defaults, argv, auxiliary_task, datasets=DATASETS, options=OPTIONS)
    dataset = DATASETS[settings.dataset]
    settings.backbone = settings.backbone or dataset.backbone
    if "train_images" in settings.quick:  # a small dataset does not have that many
        settings.train_images = min(settings.train_images, dataset.sizes[0])
    settings.annealed_over = settings.epochs  # a run that goes on for longer would be another run
    return settings


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings)
    run = Run("experiments.methods.table1_single", settings, argv)
    train, test = load(settings, device)
    networks = place(make_networks(settings), device, settings)
    parts = networks | make_optimizers(networks, settings)
    model_vgg_single.fit(run, device, train, test, settings, parts, levels=[0])


if __name__ == "__main__":
    sys.exit(run_main(main))
