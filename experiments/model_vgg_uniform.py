"""Uniform: the multi-task network on labels that tell no more than the primary class, a control of ours.

    python -m experiments.model_vgg_uniform                                # 20 classes, psi[i] = 5
    python -m experiments.model_vgg_uniform --primary-level 0 --psi 3,3,4  # 3 classes into 10
    python -m experiments.model_vgg_uniform --quick                        # a first look on generated images

Every image's auxiliary label is uniform over the psi[i] auxiliary classes of its primary class. It has the second head
and a second gradient, as MAXL has, but no information beyond the primary class: what MAXL gains over it is due to the
labels. Not yet run at full length.
"""

import sys

import model_vgg_human
from experiments import model_vgg_random
from harness.exits import run_main
from model_vgg_maxl import hierarchy_mask

SETTINGS = model_vgg_random.SETTINGS


class UniformLabels(model_vgg_human.TrueLabels):
    """Auxiliary labels 1/ψ[i] on each auxiliary class of the image's primary class i: float (B, sum(psi))."""

    def __init__(self, split, primary_level, psi):
        super().__init__(primary_level)
        mask = hierarchy_mask(psi).to(split.labels.device)
        self.labels = mask / mask.sum(dim=1, keepdim=True)

    def __call__(self, images, labels):
        return self.labels[labels[:, self.level]]


def parse(argv=None):
    """The command line's settings. Raises InputError where ψ does not fit the primary level."""
    return model_vgg_random.parse(argv, __doc__, SETTINGS)


def main(argv=None):
    settings = parse(argv)
    level, psi = settings.primary_level, settings.psi
    model_vgg_human.train(
        "experiments.model_vgg_uniform", settings, argv, sum(psi),
        make_auxiliary_labels=lambda split: UniformLabels(split, level, psi), test_levels=[level],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
