"""Three controls for MAXL: the multi-task network on auxiliary labels that nothing was learned for.

    python -m experiments.methods.controls --control uniform                                # 20 classes, psi[i] = 5
    python -m experiments.methods.controls --control redrawn --primary-level 0 --psi 3,3,4  # 3 classes into 10
    python -m experiments.methods.controls --control untrained --quick                      # on generated images

uniform    Every label is uniform over the psi[i] auxiliary classes of the image's primary class. There is a second head
           and a second gradient, as in MAXL, but no information beyond the primary class. What MAXL gains over uniform
           is due to the labels.
redrawn    Each time an image is seen, its label is one of these psi[i] classes, each with the same probability. The
           auxiliary loss is linear in the labels, so the mean gradient is that of uniform. What redrawn gains over
           uniform is due to noise.
untrained  The labels are those of MAXL's label generator with its first weights. This is MAXL without the second pass.
           What MAXL gains over it, both tested with settled statistics, is due to what the label generator learns.
"""

import functools
import sys

import torch

import maxl
import model_vgg_human
import model_vgg_maxl
from experiments.methods import random_labels
from harness.exits import run_main

SETTINGS = random_labels.SETTINGS | {"control": "uniform"}


class UniformLabels(model_vgg_human.TrueLabels):
    """Auxiliary labels 1/ψ[i] on each auxiliary class of the image's primary class i: float (B, sum(psi))."""

    def __init__(self, split, settings):
        super().__init__(settings.primary_level)
        mask = maxl.hierarchy_mask(settings.psi).to(split.labels.device)
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
        self.label_generator = model_vgg_maxl.make_networks(settings)["label_generator"].to(split.labels.device)
        self.parts = {"label_generator": self.label_generator}

    @torch.no_grad()
    def __call__(self, images, labels):
        return self.label_generator(images, labels[:, self.level])  # in training mode, as in MAXL's first pass


CONTROLS = {"uniform": UniformLabels, "redrawn": RedrawnLabels, "untrained": UntrainedLabels}
OPTIONS = {"control": (tuple(CONTROLS), "which of the three, see above", None, None)}

make_networks = model_vgg_human.make_networks
parse = functools.partial(random_labels.parse, doc=__doc__, defaults=SETTINGS, options=OPTIONS)


def main(argv=None):
    settings = parse(argv)
    random_labels.train("experiments.methods.controls", settings, argv, CONTROLS[settings.control])


if __name__ == "__main__":
    sys.exit(run_main(main))
