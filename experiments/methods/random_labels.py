"""Random: the multi-task network of Human on random auxiliary labels (section 4.3), a baseline of Figure 3.

    python -m experiments.methods.random_labels                                # 20 classes, psi[i] = 5
    python -m experiments.methods.random_labels --primary-level 0 --psi 3,3,4  # 3 classes into 10
    python -m experiments.methods.random_labels --quick                        # a first look on generated images

Each training image gets one of the psi[i] auxiliary classes of its primary class, once, from the seed, as evenly as
the counts allow. Not yet run at full length.
"""

import sys

import numpy as np
import torch

import create_dataset
import model_vgg_human
from harness.command_line import add_psi, check_psi, make_parser, parse_settings
from harness.exits import run_main

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
        # dealt out in turn to the classes in a random order, so that chance says which get one more
        dealt = first + rng.permutation(size)[np.arange(len(members)) % size]
        labels[members] = torch.from_numpy(rng.permutation(dealt)).to(labels)
        first += size
    return labels


class RandomLabels(model_vgg_human.TrueLabels):
    """Auxiliary labels drawn once for all images of `split`, which carries them from then on as one more level."""

    def __init__(self, split, primary_level, psi, seed):
        drawn = random_labels(split.labels[:, primary_level], psi, seed)
        super().__init__(level=split.labels.shape[1])
        split.labels = torch.cat([split.labels, drawn[:, None]], dim=1)


def parse(argv=None, doc=__doc__, settings=SETTINGS):
    """The command line's settings. Raises InputError where ψ does not fit the primary level."""
    parser = make_parser(doc)
    add_psi(parser)
    settings = parse_settings(parser, settings, argv)
    level = settings.primary_level
    check_psi(settings.psi, create_dataset.LEVEL_CLASSES[level], f"primary level {level}")
    return settings


def main(argv=None):
    settings = parse(argv)
    level, psi = settings.primary_level, settings.psi
    model_vgg_human.train(
        "experiments.methods.random_labels", settings, argv, sum(psi),
        make_auxiliary_labels=lambda split: RandomLabels(split, level, psi, settings.seed), test_levels=[level],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
