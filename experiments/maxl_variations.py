"""What the variations of Appendix E change in MAXL: label generators, meta-gradient and steps, one section each.

cross-entropy needs nothing of its own: it is the focal loss with γ = 0. Its gradient, no-mask's and same-iteration's
are model_vgg_maxl.meta_gradient in forward mode; latent and validation have a double backward, `lookahead_loss`.
"""

import copy
import functools

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import utils
from model_vgg_maxl import LabelGenerator, negative_entropy

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
