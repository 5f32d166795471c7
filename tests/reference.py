"""The meta-gradient of eqs. 3 to 5 once more, for tests: a plain double backward through θ1⁺."""

import torch
import torch.nn as nn
from torch.func import functional_call

import maxl
import utils


def networks(psi, width=1 / 16, dtype=torch.float64, seed=0):
    """A multi-task network and a label generator with small VGG-16 trunks."""
    torch.manual_seed(seed)
    network = maxl.Network(utils.VGG16(width), len(psi), sum(psi))
    generator = maxl.LabelGenerator(utils.VGG16(width), psi)
    utils.initialise(network, nn.init.xavier_uniform_)
    utils.initialise(generator, nn.init.xavier_normal_)
    return network.to(dtype), generator.to(dtype)


def batch(primary_classes, size=24, dtype=torch.float64):
    return torch.randn(size, 3, 32, 32, dtype=dtype), torch.arange(size) % primary_classes


def focal(logits, labels, gamma):
    """Eq. 1 as printed, mean over the batch."""
    p = logits.softmax(dim=1)
    if labels.dim() == 1:
        labels = nn.functional.one_hot(labels, logits.shape[1]).to(logits)
    return (-labels * (1 - p) ** gamma * p.log()).sum(dim=1).mean()


def reference_gradient(
    network, generator, images, primary, alpha, entropy_weight=0.0, gamma=2.0, auxiliary_weight=1.0, judged_on=None,
    theta1=None, auxiliary=None,
):  # fmt: skip
    """∇_θ2 of L_pri(θ1⁺) + λ𝓗(y). theta1: names of the weights that move; auxiliary: another auxiliary loss."""
    names = theta1 or [name for name, p in network.named_parameters() if p.requires_grad]
    weights = {name: p for name, p in network.named_parameters() if name in names}
    labels = generator(images, primary)
    primary_logits, auxiliary_logits = network(images)
    auxiliary_loss = auxiliary(auxiliary_logits, labels) if auxiliary else focal(auxiliary_logits, labels, gamma)
    loss = focal(primary_logits, primary, gamma) + auxiliary_weight * auxiliary_loss
    gradients = torch.autograd.grad(loss, weights.values(), create_graph=True, materialize_grads=True)
    plus = {name: p - alpha * g for (name, p), g in zip(weights.items(), gradients)}
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images, primary = judged_on or (images, primary)
    objective = focal(functional_call(network, (plus, buffers), (images,))[0], primary, gamma)
    if entropy_weight:
        mean = labels.mean(dim=0)
        objective = objective + entropy_weight * torch.special.xlogy(mean, mean).sum()
    theta2 = [p for p in generator.parameters() if p.requires_grad]
    return torch.autograd.grad(objective, theta2, materialize_grads=True)


def assert_gradients_equal(ours, theirs, relative):
    """Tensor by tensor; a tensor whose true gradient is zero (a bias before BatchNorm) against the whole gradient."""
    whole = torch.cat([g.flatten() for g in theirs]).norm()
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        floor = 1e-6 * whole if b.norm() < 1e-12 * whole else 0.0
        assert (a - b).norm() <= relative * max(b.norm(), floor), (a.shape, a.norm(), b.norm())
