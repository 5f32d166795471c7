"""Untrained: the multi-task network on the labels of a label generator that is never trained, a control of ours.

    python -m experiments.model_vgg_untrained                                # 20 classes, psi[i] = 5
    python -m experiments.model_vgg_untrained --primary-level 0 --psi 3,3,4  # 3 classes into 10
    python -m experiments.model_vgg_untrained --quick                        # a first look on generated images

The label generator keeps the weights that MAXL starts from with the same seed, so this is MAXL without the second
pass: what MAXL gains over it is due to the meta-gradient. Not yet run at full length.
"""

import sys

import torch
import torch.nn as nn

import model_vgg_human
import utils
from experiments import model_vgg_random
from harness.exits import run_main
from model_vgg_maxl import LabelGenerator

SETTINGS = model_vgg_random.SETTINGS


class UntrainedLabels(model_vgg_human.TrueLabels):
    """Auxiliary labels of a label generator with the weights drawn here: float (B, sum(psi))."""

    def __init__(self, split, settings):
        super().__init__(settings.primary_level)
        label_generator = LabelGenerator(utils.Backbone(settings.width), settings.psi)
        self.label_generator = utils.initialise(label_generator, nn.init.xavier_normal_).to(split.labels.device)
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
