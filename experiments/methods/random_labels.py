"""Random: the multi-task network on random auxiliary labels (section 4.3), a baseline of Figure 3.

    python -m experiments.methods.random_labels                                # 20 classes, psi[i] = 5
    python -m experiments.methods.random_labels --primary-level 0 --psi 3,3,4  # 3 classes into 10
    python -m experiments.methods.random_labels --quick                        # a first look on generated images

Each training image gets one of the psi[i] auxiliary classes of its primary class, drawn once from the seed. The images
of a primary class are spread over its auxiliary classes evenly, to within one.
"""

import sys

import numpy as np
import torch

import create_dataset
import model_vgg_human
from harness.acceleration import place, select_device
from harness.command_line import fit_psi, parse_settings
from harness.exits import run_main
from harness.run import Run

SETTINGS = {name: value for name, value in model_vgg_human.SETTINGS.items() if name != "auxiliary_level"}
SETTINGS["psi"] = [5] * 20  # ψ: auxiliary classes of each primary class


def random_labels(primary, psi, seed=0):
    """A random, well-balanced auxiliary label for each image: int64 (N,), within the ψ[i] classes of its primary class.

    primary: int64 (N,). The auxiliary classes of a primary class get the same number of its images, to within one.
    """
    rng = np.random.default_rng(seed)
    labels, first = torch.empty_like(primary), 0
    for primary_class, size in enumerate(psi):
        members = (primary == primary_class).nonzero().flatten()
        # dealt out in turn to the classes in a random order, so that chance decides which classes get one more
        dealt = first + rng.permutation(size)[np.arange(len(members)) % size]
        labels[members] = torch.from_numpy(rng.permutation(dealt)).to(labels)
        first += size
    return labels


class RandomLabels(model_vgg_human.TrueLabels):
    """Auxiliary labels drawn once for all images of `split`, which carries them from then on as one more level."""

    def __init__(self, split, settings):
        drawn = random_labels(split.labels[:, settings.primary_level], settings.psi, settings.seed)
        super().__init__(level=split.labels.shape[1])
        split.labels = torch.cat([split.labels, drawn[:, None]], dim=1)


make_networks = model_vgg_human.make_networks  # with sum(psi) auxiliary classes


def parse(argv=None, doc=__doc__, defaults=SETTINGS, options=None):
    """The command line's settings. Raises InputError if ψ does not fit the primary level."""
    settings = parse_settings(doc, defaults, argv, options=options)
    level = settings.primary_level
    fit_psi(settings, create_dataset.LEVEL_CLASSES[level], f"primary level {level}")
    return settings


def train(script, settings, argv, make_labels):
    """Train the multi-task network on the labels that make_labels(training split, settings) returns."""
    device = select_device(settings)
    run = Run(script, settings, argv)
    train, test = create_dataset.load(settings, device)
    networks = place(make_networks(settings), device, settings)
    parts = networks | model_vgg_human.make_optimizers(networks, settings)
    labels = make_labels(train, settings)
    model_vgg_human.fit(run, device, train, test, settings, parts, labels, [settings.primary_level])


def main(argv=None):
    train("experiments.methods.random_labels", parse(argv), argv, RandomLabels)


if __name__ == "__main__":
    sys.exit(run_main(main))
