"""Redrawn: the multi-task network on random auxiliary labels that are drawn anew for every batch, a control of ours.

    python -m experiments.model_vgg_redrawn                                # 20 classes, psi[i] = 5
    python -m experiments.model_vgg_redrawn --primary-level 0 --psi 3,3,4  # 3 classes into 10
    python -m experiments.model_vgg_redrawn --quick                        # a first look on generated images

Each time an image is seen, its label is one of the psi[i] auxiliary classes of its primary class, all as likely. The
auxiliary loss is linear in the labels, so the mean gradient is Uniform's: what this gains over Uniform is due to noise.
Not yet run at full length.
"""

import sys

import torch

import model_vgg_human
from experiments import model_vgg_random
from harness.exits import run_main

SETTINGS = model_vgg_random.SETTINGS


class RedrawnLabels(model_vgg_human.TrueLabels):
    """Auxiliary labels within the ψ[i] classes of an image's primary class, drawn at every call: int64 (B,)."""

    def __init__(self, split, primary_level, psi, seed):
        super().__init__(primary_level)
        self.sizes = torch.tensor(psi, device=split.labels.device)
        self.first = self.sizes.cumsum(0) - self.sizes
        self.generator = torch.Generator().manual_seed(seed + 12345)  # another stream than the batches'
        self.parts = {"redrawn": self.generator}

    def __call__(self, images, labels):
        primary = labels[:, self.level]
        drawn = torch.rand(primary.shape, generator=self.generator, dtype=torch.float64)
        drawn = drawn.to(primary.device, non_blocking=True)  # or the host would wait for a GPU at every batch
        return self.first[primary] + (drawn * self.sizes[primary]).long()


def parse(argv=None):
    """The command line's settings. Raises InputError where ψ does not fit the primary level."""
    return model_vgg_random.parse(argv, __doc__, SETTINGS)


def main(argv=None):
    settings = parse(argv)
    level, psi = settings.primary_level, settings.psi
    model_vgg_human.train(
        "experiments.model_vgg_redrawn", settings, argv, sum(psi),
        make_auxiliary_labels=lambda split: RedrawnLabels(split, level, psi, settings.seed), test_levels=[level],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
