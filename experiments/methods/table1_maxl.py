"""MAXL as in Table 1: on any dataset, with any backbone. One number as --psi is every class's ψ[i].

    python -m experiments.methods.table1_maxl --dataset mnist --psi 3        # psi[i] = 3 with the 4-layer ConvNet
    python -m experiments.methods.table1_maxl --dataset cifar10 --psi 5      # VGG-16
    python -m experiments.methods.table1_maxl --dataset mnist --psi '2*9,4'  # the last class into 4
    python -m experiments.methods.table1_maxl --quick                        # a first look on generated images

The multi-task network is trained as Single is, with momentum, weight decay and a rate annealed to zero. The label
generator has the plain SGD and weight decay that it has on CIFAR-100; its rate is annealed along the same cosine. θ1⁺
is one plain gradient step at the present rate, as in eq. 4.
"""

import sys

import torch

import model_vgg_maxl
from experiments.datasets.registry import DATASETS, load
from experiments.methods import table1_single
from harness.acceleration import place, select_device
from harness.command_line import fit_psi
from harness.exits import run_main
from harness.run import Run

OF_MAXL = (
    "label_learning_rate", "label_weight_decay", "entropy_weight", "auxiliary_weight", "meta_gradient",
    "test_statistics",
)  # fmt: skip
SETTINGS = table1_single.SETTINGS | {name: model_vgg_maxl.SETTINGS[name] for name in OF_MAXL} | {"psi": [3]}


def make_networks(settings):
    """The multi-task network and the label generator with their first weights, by their names in a checkpoint."""
    return model_vgg_maxl.make_networks(settings, lambda: table1_single.make_trunk(settings))


def make_optimizers(networks, settings):
    """The multi-task network's SGD with momentum, the label generator's without, and their schedules."""
    parameters, rate = networks["label_generator"].parameters(), settings.label_learning_rate
    label_optimizer = torch.optim.SGD(parameters, rate, weight_decay=settings.label_weight_decay)
    return table1_single.make_optimizers(networks, settings) | {
        "label_optimizer": label_optimizer,
        "label_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(label_optimizer, settings.annealed_over),
    }


def parse(argv=None):
    """The command line's settings; one number ψ[i] stands for all primary classes. Raises InputError for a bad ψ."""
    settings = table1_single.parse(argv, __doc__, SETTINGS, auxiliary_task=True)
    fit_psi(settings, DATASETS[settings.dataset].classes, settings.dataset)
    return settings


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings)
    run = Run("experiments.methods.table1_maxl", settings, argv)
    train, test = load(settings, device)
    networks = place(make_networks(settings), device, settings)
    parts = networks | make_optimizers(networks, settings)
    model_vgg_maxl.fit(run, device, train, test, settings, parts, levels=[0])


if __name__ == "__main__":
    sys.exit(run_main(main))
