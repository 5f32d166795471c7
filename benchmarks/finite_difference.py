"""The meta-gradient by a finite difference, as in DARTS (Liu, Simonyan, Yang 2019), to compare the exact one with.

Not exact: ReLU and max-pooling have kinks between the two points that the difference is taken of.
"""

import torch
from torch.func import functional_call

import utils
from model_vgg_maxl import negative_entropy


def meta_gradient(network, label_generator, images, primary, step_length, entropy_weight=0.2, gamma=2.0, step=0.01):
    """As model_vgg_maxl.meta_gradient, with its D_v ℓ_nk(θ1) replaced by (ℓ_nk(θ1 + εv) - ℓ_nk(θ1 - εv)) / 2ε.

    step: ε‖v‖, the distance of the two points from θ1. It needs fp32: the difference drowns in TF32's rounding.
    Returns the gradients, a tuple in the order of the label generator's trainable parameters.
    """
    labels = label_generator(images, primary)
    theta1 = {name: p for name, p in network.named_parameters() if p.requires_grad}
    primary_logits, auxiliary_logits = network(images)
    loss = utils.focal_loss(primary_logits, primary, gamma)
    loss = loss + utils.focal_loss(auxiliary_logits, labels.detach(), gamma)
    gradient = torch.autograd.grad(loss, theta1.values())
    theta1_plus = {name: p - step_length * g for (name, p), g in zip(theta1.items(), gradient)}
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def logits(theta):
        return functional_call(network, (theta, statistics), (images,))

    lookahead_loss = utils.focal_loss(logits(theta1_plus)[0], primary, gamma)
    v = torch.autograd.grad(lookahead_loss, theta1_plus.values(), materialize_grads=True)
    with torch.no_grad():
        epsilon = step / torch.stack([t.norm() for t in v]).norm()
        ahead, behind = (
            utils.focal_losses(
                logits({name: p + sign * epsilon * t for (name, p), t in zip(theta1.items(), v)})[1], gamma
            )
            for sign in (1, -1)
        )
        directional = (ahead - behind) / (2 * epsilon)
    objective = -step_length / len(images) * (labels * directional).sum() + entropy_weight * negative_entropy(labels)
    return torch.autograd.grad(objective, [p for p in label_generator.parameters() if p.requires_grad])
