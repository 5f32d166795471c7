"""Three controls for MAXL: the multi-task network on auxiliary labels that hold less than MAXL's may hold.

    python -m experiments.methods.controls --control uniform                                # 20 classes, psi[i] = 5
    python -m experiments.methods.controls --control redrawn --primary-level 0 --psi 3,3,4  # 3 classes into 10
    python -m experiments.methods.controls --control untrained --quick                      # generated images

uniform    every label is uniform over the psi[i] auxiliary classes of the image's primary class. There is a second head
           and a second gradient, as in MAXL, but no information beyond the primary class: what MAXL gains over it is
           due to the labels.
redrawn    every time an image is seen, its label is one of these psi[i] classes, each with the same probability. The
           auxiliary loss is linear in the labels, so the mean gradient is uniform's: what redrawn gains over uniform is
           due to noise.
untrained  the labels are those of MAXL's label generator with its first weights, so this is MAXL without the second
           pass: what MAXL gains over it, both tested with settled statistics, is due to what the label generator learns.
"""

import sys

import torch

import create_dataset
import model_vgg_human
import utils
from experiments.methods import random_labels
from harness.command_line import add_psi, check_psi, make_parser, parse_settings
from harness.exits import run_main
from model_vgg_maxl import hierarchy_mask, make_networks

SETTINGS = random_labels.SETTINGS


class UniformLabels(model_vgg_human.TrueLabels):
    """Auxiliary labels 1/ψ[i] on each auxiliary class of the image's primary class i: float (B, sum(psi))."""

    def __init__(self, split, settings):
        super().__init__(settings.primary_level)
        mask = hierarchy_mask(settings.psi).to(split.labels.device)
        self.labels = mask / mask.sum(dim=1, keepdim=True)

    def __call__(self, images, labels):
        return self.labels[labels[:, self.level]]


class RedrawnLabels(model_vgg_human.TrueLabels):
    """Auxiliary labels within the ψ[i] classes of an image's primary class, drawn at every call: int64 (B,)."""

    def __init__(self, split, settings):
        super().__init__(settings.primary_level)
        self.sizes = torch.tensor(settings.psi, device=split.labels.device)
        self.first = self.sizes.cumsum(0) - self.sizes
        self.generator = torch.Generator().manual_seed(settings.seed + 12345)  # another stream than the batches'
        self.parts = {"redrawn": self.generator}

    def __call__(self, images, labels):
        primary = labels[:, self.level]
        drawn = torch.rand(primary.shape, generator=self.generator, dtype=torch.float64)
        drawn = drawn.to(primary.device, non_blocking=True)  # or the host would wait for a GPU at every batch
        return self.first[primary] + (drawn * self.sizes[primary]).long()


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


CONTROLS = {"uniform": UniformLabels, "redrawn": RedrawnLabels, "untrained": UntrainedLabels}


def parse(argv=None):
    """The command line's settings. Raises InputError where ψ does not fit the primary level."""
    parser = make_parser(__doc__)
    add_psi(parser)
    parser.add_argument("--control", required=True, choices=CONTROLS, help="which of the three, see above")
    settings = parse_settings(parser, SETTINGS, argv)
    level = settings.primary_level
    check_psi(settings.psi, create_dataset.LEVEL_CLASSES[level], f"primary level {level}")
    return settings


def main(argv=None):
    settings = parse(argv)
    model_vgg_human.train(
        "experiments.methods.controls", settings, argv, sum(settings.psi),
        make_auxiliary_labels=lambda split: CONTROLS[settings.control](split, settings),
        test_levels=[settings.primary_level],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
