"""Untrained: the multi-task network on the labels of a label generator that is never trained, a control of ours.

    python -m experiments.model_vgg_untrained                                # 20 classes, psi[i] = 5
    python -m experiments.model_vgg_untrained --primary-level 0 --psi 3,3,4  # 3 classes into 10
    python -m experiments.model_vgg_untrained --quick                        # a first look on generated images

The label generator keeps the weights that MAXL starts from with the same seed, so this is MAXL without the second
pass. With --settle-statistics, what MAXL gains over it is due to what the label generator learns; without, also to the
second pass's part in BatchNorm's running statistics. Not yet run at full length.
"""

import sys

import torch

import model_vgg_human
import utils
from experiments import model_vgg_random
from harness.exits import run_main
from model_vgg_maxl import make_networks

SETTINGS = model_vgg_random.SETTINGS


class UntrainedLabels(model_vgg_human.TrueLabels):
    """Auxiliary labels of a label generator with MAXL's first weights: float (B, sum(psi))."""

    def __init__(self, split, settings):
        super().__init__(settings.primary_level)
        _, label_generator = make_networks(lambda: utils.Backbone(settings.width), settings.psi, settings.seed)
        self.label_generator = label_generator.to(split.labels.device)
        self.parts = {"label_generator": self.label_generator}

    @torch.no_grad()
    def __call__(self, images, labels):
        return self.label_generator(images, labels[:, self.level])  # in training mode, as in MAXL's first pass


def parse(argv=None):
    """The command line's settings. Raises InputError where ψ does not fit the primary level."""
    return model_vgg_random.parse(argv, __doc__, SETTINGS)


def main(argv=None):
    settings = parse(argv)
    model_vgg_human.train(
        "experiments.model_vgg_untrained", settings, argv, sum(settings.psi),
        make_auxiliary_labels=lambda split: UntrainedLabels(split, settings), test_levels=[settings.primary_level],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
