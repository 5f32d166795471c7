"""MAXL, as Table 1 has it: on any dataset, with any backbone; a single number as --psi is every class's ψ[i].

    python -m experiments.methods.table1_maxl --dataset mnist --psi 3        # psi[i] = 3 with the 4-layer ConvNet
    python -m experiments.methods.table1_maxl --dataset cifar10 --psi 5      # VGG-16
    python -m experiments.methods.table1_maxl --dataset mnist --psi '2*9,4'  # the last class into 4
    python -m experiments.methods.table1_maxl --quick                        # a first look on generated images

The multi-task network is trained with momentum, weight decay and a rate annealed to zero, as Single is; the label
generator with the plain SGD and weight decay that it has on CIFAR-100, its rate annealed alike. θ1⁺ is eq. 4's: one
plain gradient step at the present rate. Not yet run at full length.
"""

import sys

import torch

import model_vgg_maxl
from experiments.methods import table1_single as model_single
from experiments.datasets.registry import DATASETS, load
from experiments.methods.table1_single import annealed, make_optimizer, make_table1_parser, make_trunk, parse_table1
from harness.acceleration import Acceleration, select_device
from harness.exits import run_main
from harness.run import Run

OF_MAXL = ("label_learning_rate", "label_weight_decay", "entropy_weight", "meta_gradient")
SETTINGS = model_single.SETTINGS | {name: model_vgg_maxl.SETTINGS[name] for name in OF_MAXL} | {"psi": [3]}


def parse(argv=None):
    """The command line's settings; one number ψ[i] stands for all primary classes. Raises InputError for a bad ψ."""
    parser = make_table1_parser(__doc__, auxiliary_task=True)
    model_vgg_maxl.add_options(parser)
    settings = parse_table1(parser, SETTINGS, argv)
    classes = DATASETS[settings.dataset].classes
    if len(settings.psi) == 1:
        settings.psi = settings.psi * classes
    model_vgg_maxl.check(settings, classes, settings.dataset)
    return settings


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings.device)
    fast = Acceleration(device, settings.precision, settings.channels_last, settings.cuda_graphs)
    psi = settings.psi
    run = Run("experiments.methods.table1_maxl", f"{len(psi)}-{sum(psi)}", settings, argv)
    train, test = load(
        settings.dataset, settings.data_root, device, settings.train_images, settings.seed, settings.channels_last
    )

    networks = model_vgg_maxl.make_networks(lambda: make_trunk(settings), psi, settings.seed)
    network, label_generator = map(fast.place, networks)
    optimizer, scheduler = make_optimizer(network, settings)
    label_optimizer = torch.optim.SGD(
        label_generator.parameters(), settings.label_learning_rate, weight_decay=settings.label_weight_decay
    )
    model_vgg_maxl.fit(
        run, fast, train, test, settings, level=0,
        network=network, optimizer=optimizer, scheduler=scheduler, label_generator=label_generator,
        label_optimizer=label_optimizer, label_scheduler=annealed(label_optimizer, settings),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
