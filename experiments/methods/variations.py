"""MAXL with one thing changed: five of the variations that the paper reports as not successful (Appendix E).

    python -m experiments.methods.variations --variant no-mask           # 20 classes, psi[i] = 5
    python -m experiments.methods.variations --variant latent --latent-size 50
    python -m experiments.methods.variations --variant validation --quick

What is changed, and what the paper leaves open and is chosen here:

cross-entropy   in place of the focal loss, in all losses: γ is 0 (eq. 1).
no-mask         a plain SoftMax over all auxiliary classes in place of Mask SoftMax (eq. 6).
latent          the label generator gives a vector, and the auxiliary head regresses it (mean squared error). It has as
                many numbers as there would be auxiliary classes. There is no entropy loss, as there is no distribution.
same-iteration  an epoch is one pass, and each batch updates both networks, the multi-task network first. Before the
                test there is a pass without weight updates, so that BatchNorm's running statistics catch up, as they do
                in MAXL's second pass.
validation      the label generator is judged on held-out training images (a tenth), augmented like the others, on which
                the multi-task network never trains.

All else is MAXL's, the first weights for a seed too.
"""

import copy
import functools
import sys

import numpy as np
import torch
import torch.nn as nn

import create_dataset
import maxl
import model_vgg_maxl
import utils
from harness.acceleration import autocast, place, select_device
from harness.command_line import AT_LEAST_1, fit_psi, parse_settings
from harness.exits import InputError, run_main
from harness.run import Run

VARIANTS = ("cross-entropy", "no-mask", "latent", "same-iteration", "validation")
SETTINGS = model_vgg_maxl.SETTINGS | {
    "variant": "no-mask",
    "latent_size": None,  # of latent's vector; as many numbers as there would be auxiliary classes
    "validation_share": 0.1,  # of the training images, which validation holds out; the paper does not say how many
}
OPTIONS = {
    "variant": (VARIANTS, "what is changed, see above", None, None),
    "latent_size": (int, "numbers of latent's vector (default: as many as auxiliary classes)", *AT_LEAST_1),
    "validation_share": (float, "share of the training images that validation holds out", lambda share: 0 < share < 1,
                         "a number between 0 and 1, such as 0.1"),
}  # fmt: skip

# --- latent: a vector as label, and another auxiliary loss ---


class LatentGenerator(nn.Module):
    """z = g_θ2(x): images (B, 3, 32, 32) -> vectors (B, size) of any numbers; the primary class has no part in them."""

    def __init__(self, trunk, size):
        super().__init__()
        self.trunk = trunk
        self.head = maxl.make_head(trunk.feature_size, size)

    def forward(self, images, primary):
        return self.head(self.trunk(images))


def latent_loss(network, images, primary, labels=None, gamma=2.0, auxiliary_weight=1.0):
    """maxl.multi_task_loss with the mean squared error as auxiliary loss. labels: float (B, size), or None."""
    logits, outputs = network(images)
    loss = primary_loss = maxl.focal_loss(logits, primary, gamma)
    numbers = {"primary_loss": primary_loss, "primary_accuracy": maxl.accuracy(logits, primary)}
    if labels is not None:
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        # not F.mse_loss, which torch cannot differentiate in forward mode if only one argument has a tangent
        numbers["auxiliary_loss"] = (outputs.to(dtype) - labels.to(dtype)).square().mean()
        loss = primary_loss + auxiliary_weight * numbers["auxiliary_loss"]
    return loss, numbers


# --- validation: the look-ahead is judged on held-out images ---


def hold_out(train, share, seed):
    """The training Split in two, the second of `share` of its images: of each fine class as many, to within one."""
    rng, fine = np.random.default_rng(seed), train.labels[:, -1].cpu().numpy()
    turn = np.empty(len(fine))  # each class's images in a random order, and the classes in a random order by turns
    for members in (np.flatnonzero(fine == c) for c in np.unique(fine)):
        turn[members] = rng.permutation(len(members)) + rng.random()
    parts, count = (copy.copy(train), copy.copy(train)), round(share * len(train))
    for part, chosen in zip(parts, (turn.argsort()[count:], turn.argsort()[:count])):
        index = torch.from_numpy(np.sort(chosen)).to(train.labels.device)
        part.padded, part.labels = train.padded[index], train.labels[index]
    return parts


def endless_batches(split, batch_size, generator):
    """Augmented batches as in training, pass after pass; of a split smaller than a batch, all its images."""
    while True:
        yield from split.train_batches(min(batch_size, len(split)), generator)


# --- training ---


def make_networks(settings):
    """The multi-task network and the label generator with their first weights, by their names in a checkpoint."""
    if settings.variant != "latent":
        networks = model_vgg_maxl.make_networks(settings)
        if settings.variant == "no-mask":
            networks["label_generator"].mask.fill_(True)
        return networks
    torch.manual_seed(settings.seed)
    size = settings.latent_size or sum(settings.psi)
    network = maxl.Network(utils.Backbone(settings.width), len(settings.psi), size)
    utils.initialise(network, nn.init.xavier_uniform_)
    label_generator = LatentGenerator(utils.Backbone(settings.width), size)
    return {"network": network, "label_generator": utils.initialise(label_generator, nn.init.xavier_normal_)}


def make_steps(settings, network, label_generator, optimizer, label_optimizer, held_batches=None):
    """The updates of θ1 and of θ2 on a batch: functions of images, primary labels and the iteration's number."""
    latent = settings.variant == "latent"
    loss = functools.partial(
        latent_loss if latent else maxl.multi_task_loss,
        gamma=settings.focal_gamma, auxiliary_weight=settings.auxiliary_weight,
    )  # fmt: skip
    options = {"entropy_weight": None if latent else settings.entropy_weight, "method": settings.meta_gradient}

    def update_network(images, primary, iteration):
        with torch.no_grad():
            labels = label_generator(images, primary)
        compared = settings.cosine_every and iteration % settings.cosine_every == 0
        compare = utils.cosine_similarities if compared else None
        return maxl.multi_task_step(network, optimizer, images, primary, labels, loss, compare)

    def update_label_generator(images, primary, iteration):
        judged_on = None
        if settings.variant == "validation":
            held_images, held_labels = next(held_batches)
            judged_on = held_images, held_labels[:, settings.primary_level]
        networks = network, label_generator, optimizer, label_optimizer
        return maxl.meta_training_step(*networks, images, primary, loss=loss, judged_on=judged_on, **options)

    return update_network, update_label_generator


def fit(run, device, train, test, settings, parts):
    """Train both networks for what is left of settings.epochs on `train` and test after each; `run` keeps them."""
    level, size, held_batches = settings.primary_level, settings.batch_size, None
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.variant == "validation":
        train, held_out = hold_out(train, settings.validation_share, settings.seed)
    names = "network", "label_generator", "optimizer", "label_optimizer"
    network, label_generator, optimizer, label_optimizer = trained = [parts[name] for name in names]
    one_pass = settings.variant == "same-iteration"
    for epoch in run.epochs((2 - one_pass) * train.iterations(size), device, parts | {"generator": generator}):
        if settings.variant == "validation":  # anew in each epoch, so that a resumed run has the same ones
            held_batches = endless_batches(held_out, size, generator)
        first, second = make_steps(settings, *trained, held_batches)
        row = {
            "learning_rate": optimizer.param_groups[0]["lr"],
            "label_learning_rate": label_optimizer.param_groups[0]["lr"],
        }
        network.train()
        label_generator.train()
        with autocast(device, settings):  # updates of θ2 turn it off
            passes = {"train": [first, second]} if one_pass else {"train": [first], "meta": [second]}
            for name, steps in passes.items():
                meter = run.meter(name)
                for iteration, (images, labels) in enumerate(train.train_batches(size, generator)):
                    numbers = {}
                    for step in steps:
                        numbers |= step(images, labels[:, level], iteration)
                    meter.add(numbers)
                row |= meter.averages()
            if one_pass and settings.test_statistics == "settled":
                utils.settle_statistics(network, train, size, seed=settings.seed + epoch)
            row |= utils.evaluate(network, test, [level], settings.focal_gamma, settings.test_statistics)
        parts["scheduler"].step()
        parts["label_scheduler"].step()
        run.end_epoch(row)


def parse(argv=None):
    """The command line's settings. Raises InputError if ψ does not fit, or if a held-out part would be too small."""
    settings = parse_settings(__doc__, SETTINGS, argv, options=OPTIONS)
    level, share = settings.primary_level, settings.validation_share
    fit_psi(settings, create_dataset.LEVEL_CLASSES[level], f"primary level {level}")
    if settings.variant == "cross-entropy":
        settings.focal_gamma = 0.0  # -y (1 - p)^0 log p
    count, least = settings.train_images or create_dataset.SIZES[settings.dataset][0], settings.batch_size
    held = round(share * count)
    if settings.variant == "validation" and (held < 2 or count - held < least):
        raise InputError(
            f"--validation-share {share} parts {count} training images into {count - held} and {held}; "
            f"at least {least} have to be left to train on and 2 to be held out"
        )
    return settings


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings)
    run = Run("experiments.methods.variations", settings, argv)
    train, test = create_dataset.load(settings, device)
    networks = place(make_networks(settings), device, settings)
    parts = networks | model_vgg_maxl.make_optimizers(networks, settings)
    fit(run, device, train, test, settings, parts)


if __name__ == "__main__":
    sys.exit(run_main(main))
