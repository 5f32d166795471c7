"""MAXL with one thing changed: five of the variations that the paper reports as not successful (Appendix E).

    python -m experiments.methods.variations --variant no-mask           # 20 classes, psi[i] = 5
    python -m experiments.methods.variations --variant latent --latent-size 50
    python -m experiments.methods.variations --variant validation --quick

What is changed, and what the paper leaves open and is chosen here:

cross-entropy   in place of the focal loss, in all three losses: its γ is 0 (eq. 1).
no-mask         a plain SoftMax over all auxiliary classes in place of Mask SoftMax (eq. 6).
latent          the label generator gives a vector, which the auxiliary head regresses (mean squared error); as many
                numbers as auxiliary classes; no entropy loss, which is of a distribution.
same-iteration  an epoch is one pass, and each batch updates both networks, the multi-task network first; before the
                test BatchNorm's statistics settle in a pass that changes no weights, as they do in MAXL's second pass.
validation      the label generator is judged on a tenth of the training images, held out, augmented alike, on which the
                multi-task network never trains.

All else is model_vgg_maxl.py's, the initial weights from a seed too. Not yet run at full length.
"""

import copy
import functools
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import create_dataset
import model_vgg_human
import model_vgg_maxl
import utils
from harness.acceleration import Acceleration, in_fp32, select_device
from harness.command_line import add_psi, check_psi, make_parser, parse_settings
from harness.exits import InputError, run_main
from harness.run import Run
from model_vgg_maxl import (
    LabelGenerator,
    auxiliary_training_step,
    meta_epoch,
    meta_training_step,
    negative_entropy,
    train_epoch,
)

# ------------------------------------------------------------------------------------------------
# The label-generation network g_θ2
# ------------------------------------------------------------------------------------------------


class UnmaskedLabelGenerator(LabelGenerator):
    """Its labels are distributions over all sum(psi) classes: ψ is only their number, the primary class has no part."""

    def __init__(self, trunk, psi):
        super().__init__(trunk, psi)
        self.mask.fill_(True)


class LatentGenerator(nn.Module):
    """z = g_θ2(x): images (B, 3, 32, 32) -> vectors (B, size) of any numbers; the primary class has no part."""

    def __init__(self, trunk, size):
        super().__init__()
        self.trunk = trunk
        self.head = utils.make_head(trunk.feature_size, size)

    def forward(self, images, primary):
        return self.head(self.trunk(images))


# ------------------------------------------------------------------------------------------------
# The meta-gradient where the main script's does not fit: another auxiliary loss, or another batch to judge on
# ------------------------------------------------------------------------------------------------


def lookahead_loss(network, auxiliary_loss, batch, judged_on, step_length, gamma=2.0):
    """L_pri(θ1⁺) on one batch after a step on another (eqs. 3, 4), for a double backward: a 0-d tensor.

    auxiliary_loss: outputs of the auxiliary head -> 0-d tensor, through which θ2 enters. batch, judged_on: images
    (B, 3, H, W) and primary int64 (B,), the step's and the loss's. Running statistics take part once, at θ1.

    Forward mode would be exact here too: with v = ∇L_pri(θ1⁺), on whichever batch, all it needs is that ∇_θ1 L_aux is
    affine in what θ2 gives, and that of (f - z)² is, though the loss itself is not. But `model_vgg_maxl.meta_gradient`
    has the focal loss and one batch, and what is tried here once need not be fast.
    """
    images, primary = batch
    theta1 = {name: p for name, p in network.named_parameters() if p.requires_grad}
    primary_logits, auxiliary_outputs = network(images)
    loss = utils.focal_loss(primary_logits, primary, gamma) + auxiliary_loss(auxiliary_outputs)
    gradients = torch.autograd.grad(loss, theta1.values(), create_graph=True, materialize_grads=True)
    theta1_plus = {name: p - step_length * g for (name, p), g in zip(theta1.items(), gradients)}
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images, primary = judged_on
    return utils.focal_loss(functional_call(network, (theta1_plus, statistics), (images,))[0], primary, gamma)


def update(label_generator, label_optimizer, objective):
    """One update of θ2 on its objective (eq. 5), which leaves no gradients at θ1."""
    parameters = [p for p in label_generator.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(objective, parameters, materialize_grads=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    label_optimizer.step()


# ------------------------------------------------------------------------------------------------
# latent: a vector is regressed
# ------------------------------------------------------------------------------------------------


def squared_error(outputs, latents):
    """Mean over batch and numbers of (f - z)², worked in fp32 at least: a 0-d tensor. Both: (B, size)."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return F.mse_loss(outputs.to(dtype), latents.to(dtype))


def latent_training_step(network, optimizer, images, primary, latents, gamma=2.0, cosine=False):
    """utils.multi_task_step with the squared error as auxiliary loss. latents: (B, size)."""
    primary_logits, auxiliary_outputs = network(images)
    primary_loss = utils.focal_loss(primary_logits, primary, gamma)
    auxiliary_loss = squared_error(auxiliary_outputs, latents)
    optimizer.zero_grad()
    if cosine:
        cosines = utils.backward_by_task(network, primary_loss, auxiliary_loss)
    else:
        (primary_loss + auxiliary_loss).backward()
        cosines = {}
    optimizer.step()
    metrics = {"primary_loss": primary_loss.detach(), "primary_accuracy": utils.accuracy(primary_logits, primary)}
    return metrics | {"auxiliary_squared_error": auxiliary_loss.detach()} | cosines


def latent_meta_step(network, label_generator, optimizer, label_optimizer, images, primary, gamma=2.0):
    """One update of θ2 on L_pri(θ1⁺) alone: 𝓗 (eq. 7) is of a distribution over classes, and a vector is none."""
    to_latents = functools.partial(squared_error, latents=label_generator(images, primary))
    batch, step_length = (images, primary), optimizer.param_groups[0]["lr"]
    loss = lookahead_loss(network, to_latents, batch, batch, step_length, gamma)
    update(label_generator, label_optimizer, loss)
    return {"lookahead_primary_loss": loss.detach()}


# ------------------------------------------------------------------------------------------------
# validation: the look-ahead is judged on held-out images
# ------------------------------------------------------------------------------------------------


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
    """Augmented batches as of training, pass after pass; of all images of a split that has fewer than a batch."""
    while True:
        yield from split.train_batches(min(batch_size, len(split)), generator)


def validation_meta_step(
    network, label_generator, optimizer, label_optimizer, images, primary, held_images, held_primary,
    entropy_weight=0.2, gamma=2.0,
):  # fmt: skip
    """One update of θ2 (eq. 5): labels and θ1⁺ are of the training batch, L_pri(θ1⁺) of the held-out one."""
    labels = label_generator(images, primary)
    to_labels = functools.partial(utils.focal_loss, labels=labels, gamma=gamma)
    batch, judged_on, step_length = (images, primary), (held_images, held_primary), optimizer.param_groups[0]["lr"]
    loss, entropy = lookahead_loss(network, to_labels, batch, judged_on, step_length, gamma), negative_entropy(labels)
    update(label_generator, label_optimizer, loss + entropy_weight * entropy)
    return {"lookahead_primary_loss": loss.detach(), "mean_label_entropy": -entropy.detach()}


def on_held_out(step, held_batches, primary_level):
    """validation_meta_step as a step of `meta_epoch`, with the next of the held-out batches at each call."""

    def step_on_both(*parts, **options):
        images, targets = next(held_batches)
        return step(*parts, images, targets[:, primary_level], **options)

    return step_on_both


# ------------------------------------------------------------------------------------------------
# same-iteration: both networks learn from each batch
# ------------------------------------------------------------------------------------------------


def both_steps(auxiliary_step, meta_step, network, label_generator, label_optimizer, **options):
    """A step of `train_epoch`: on the same batch θ1 is updated (eq. 2), then θ2, judged from the new θ1 (eq. 5).

    network, label_generator, options: the meta-training step's; it bears no low precision, the first step may.
    """

    def step(low, low_generator, optimizer, images, primary, gamma, cosine):
        metrics, auxiliary = auxiliary_step(low, low_generator, optimizer, images, primary, gamma=gamma, cosine=cosine)
        parts = network, label_generator, optimizer, label_optimizer, images, primary
        return metrics | meta_step(*parts, **options), auxiliary

    return step


# ------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------

VARIANTS = ("cross-entropy", "no-mask", "latent", "same-iteration", "validation")
SETTINGS = {name: value for name, value in model_vgg_maxl.SETTINGS.items() if name != "meta_gradient"}
OWN = {"latent_size": "latent", "validation_share": "validation"}  # settings of one variant alone
VALIDATION_SHARE = 0.1  # of the training images; the paper does not say how many
STEPS = {  # for θ1 and θ2, where they are not MAXL's
    "latent": (latent_training_step, latent_meta_step),
    "validation": (auxiliary_training_step, validation_meta_step),
}


def make_label_generator(variant, trunk, psi, latent_size):
    """g_θ2 of the variant."""
    if variant == "latent":
        return LatentGenerator(trunk, latent_size)
    return (UnmaskedLabelGenerator if variant == "no-mask" else LabelGenerator)(trunk, psi)


def parse(argv=None):
    """The command line's settings. Raises InputError where ψ does not fit, and for an option of another variant."""
    parser = make_parser(__doc__)
    add_psi(parser)
    add = parser.add_argument
    add("--variant", required=True, choices=VARIANTS, help="what is changed, see above")
    add("--latent-size", type=int, metavar="N", help="numbers of latent's vector (default: sum(psi))")
    add(
        "--validation-share", type=float, metavar="F",
        help=f"share of the training images that validation holds out (default: {VALIDATION_SHARE})",
    )  # fmt: skip
    settings = parse_settings(parser, SETTINGS, argv)
    level = settings.primary_level
    check_psi(settings.psi, create_dataset.LEVEL_CLASSES[level], f"primary level {level}")
    for name, variant in OWN.items():
        if getattr(settings, name) is not None and settings.variant != variant:
            raise InputError(f"--{name.replace('_', '-')} is an option of --variant {variant} alone; leave it out")
    if settings.variant == "cross-entropy":
        settings.focal_gamma = 0.0  # -y (1 - p)^0 log p
    if settings.variant == "latent":
        check_latent_size(settings)
    if settings.variant == "validation":
        check_validation_share(settings)
    return settings


def check_latent_size(settings):
    """Set it where it is not given: the auxiliary heads are then as large as MAXL's."""
    if settings.latent_size is None:
        settings.latent_size = sum(settings.psi)
    if not 1 <= settings.latent_size <= 10_000:
        raise InputError(f"--latent-size {settings.latent_size} is out of range; give 1 to 10000")


def check_validation_share(settings):
    """Set it where it is not given; raises InputError where one of the two parts has too few images for a batch."""
    if settings.validation_share is None:
        settings.validation_share = VALIDATION_SHARE
    share, count = settings.validation_share, settings.train_images or create_dataset.SIZES[settings.dataset][0]
    if not 0 < share < 1:
        raise InputError(f"--validation-share {share} is out of range; give a number between 0 and 1, such as 0.1")
    held, least = round(share * count), settings.batch_size
    if held < 2 or count - held < least:
        raise InputError(
            f"--validation-share {share} parts {count} training images into {count - held} and {held}; "
            f"at least {least} have to be left to train on and 2 to be held out"
        )


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings.device)
    fast = Acceleration(device, settings.precision, settings.channels_last, settings.cuda_graphs)
    variant, level, psi, gamma = settings.variant, settings.primary_level, settings.psi, settings.focal_gamma
    run = Run("experiments.methods.variations", f"{variant}-{len(psi)}-{sum(psi)}", settings, argv)
    train, test = create_dataset.load(
        settings.dataset, settings.data_root, device, settings.train_images, settings.seed, settings.channels_last
    )
    if variant == "validation":
        train, held_out = hold_out(train, settings.validation_share, settings.seed)
    passes = 1 if variant == "same-iteration" else 2

    torch.manual_seed(settings.seed)
    size = settings.latent_size or sum(psi)  # of the auxiliary head's output
    network = utils.Network(utils.Backbone(settings.width), len(psi), size)
    fast.place(utils.initialise(network, nn.init.xavier_uniform_))
    label_generator = make_label_generator(variant, utils.Backbone(settings.width), psi, size)
    fast.place(utils.initialise(label_generator, nn.init.xavier_normal_))
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.learning_rate)
    label_optimizer = torch.optim.SGD(
        label_generator.parameters(), lr=settings.label_learning_rate, weight_decay=settings.label_weight_decay
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.halve_every, gamma=0.5)
    label_scheduler = torch.optim.lr_scheduler.StepLR(label_optimizer, settings.halve_every, gamma=0.5)
    generator = torch.Generator().manual_seed(settings.seed)
    low, low_generator = fast.lower(network), fast.lower(label_generator)
    auxiliary_step, meta_step = STEPS.get(variant, (auxiliary_training_step, meta_training_step))
    auxiliary_step, meta_step = fast.capture(auxiliary_step), fast.capture(in_fp32(device)(meta_step))
    options = {"gamma": gamma} | ({} if variant == "latent" else {"entropy_weight": settings.entropy_weight})

    @torch.no_grad()
    def latents(images, targets):
        return low_generator(images, targets[:, level])

    for epoch in run.epochs(
        passes * train.iterations(settings.batch_size), device,
        network=network, optimizer=optimizer, scheduler=scheduler,
        label_generator=label_generator, label_optimizer=label_optimizer, label_scheduler=label_scheduler,
        generator=generator,
    ):  # fmt: skip
        row = {
            "learning_rate": optimizer.param_groups[0]["lr"],
            "label_learning_rate": label_optimizer.param_groups[0]["lr"],
        }
        batches, meter = train.train_batches(settings.batch_size, generator), run.meter("train")
        if variant == "latent":
            row |= model_vgg_human.train_epoch(
                low, optimizer, batches, level, latents, gamma, meter, auxiliary_step, settings.cosine_every
            )
        else:
            step = auxiliary_step
            if variant == "same-iteration":
                step = both_steps(auxiliary_step, meta_step, network, label_generator, label_optimizer, **options)
            row |= train_epoch(
                low, low_generator, optimizer, batches, level, meter,
                gamma=gamma, cosine_every=settings.cosine_every, step=step,
            )  # fmt: skip
        if variant != "same-iteration":
            batches, step = train.train_batches(settings.batch_size, generator), meta_step
            if variant == "validation":
                step = on_held_out(meta_step, endless_batches(held_out, settings.batch_size, generator), level)
            parts = network, label_generator, optimizer, label_optimizer
            row |= meta_epoch(*parts, batches, level, run.meter("meta"), step, **options)
        else:  # as all others' second pass does
            utils.settle_statistics(low, train, settings.batch_size, seed=settings.seed + epoch)
        row |= utils.evaluate(low, test, [level], gamma)
        scheduler.step()
        label_scheduler.step()
        run.end_epoch(row)


if __name__ == "__main__":
    sys.exit(run_main(main))
