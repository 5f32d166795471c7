"""The label generator's gradient (eqs. 3 to 5) on a toy, against a closed form written out here."""

import functools

import numpy as np
import pytest
import torch
import torch.nn as nn

import maxl


class ToyNetwork(nn.Module):
    """One shared weight w; the logits are w·x times fixed vectors, so that every derivative is elementary."""

    def __init__(self, w, to_primary, to_auxiliary):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.register_buffer("to_primary", torch.tensor(to_primary))
        self.register_buffer("to_auxiliary", torch.tensor(to_auxiliary))

    def forward(self, images):
        return self.w * images * self.to_primary, self.w * images * self.to_auxiliary


class ToyGenerator(nn.Module):
    """The same logits θ for every image, then Mask SoftMax."""

    def __init__(self, theta, psi):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))
        self.psi = psi

    def forward(self, images, primary):
        mask = maxl.hierarchy_mask(self.psi)[primary]
        return maxl.mask_softmax(self.theta.expand(len(images), -1), mask)


def focal_and_derivative(w, x, direction, gamma):
    """ℓ_nk of eq. 1 and dℓ_nk/dw at logits w·x_n·direction_k, by hand: (N, K) each."""
    z = w * x[:, None] * direction
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -((1 - p) ** gamma) * np.log(p)
    dloss_dp = gamma * (1 - p) ** (gamma - 1) * np.log(p) - (1 - p) ** gamma / p
    dz_dw = x[:, None] * direction
    dp_dw = p * (dz_dw - (p * dz_dw).sum(axis=1, keepdims=True))
    return loss, dloss_dp * dp_dw


@pytest.mark.parametrize("method", maxl.META_GRADIENTS)
@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.2])
def test_gradient_is_the_closed_form_on_a_toy(method, gamma, entropy_weight):
    rng = np.random.default_rng(1)
    psi, w, alpha, n = [2, 3], 0.7, 0.3, 12
    x, theta = rng.standard_normal(n), rng.standard_normal(5)
    to_primary, to_auxiliary = rng.standard_normal(2), rng.standard_normal(5)
    primary = np.arange(n) % 2
    rows = np.arange(n)

    mask = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])[primary]
    y = np.exp(theta) * mask
    y /= y.sum(axis=1, keepdims=True)
    _, d_primary = focal_and_derivative(w, x, to_primary, gamma)
    _, d_auxiliary = focal_and_derivative(w, x, to_auxiliary, gamma)
    w_plus = w - alpha * (d_primary[rows, primary].mean() + (y * d_auxiliary).sum(axis=1).mean())  # eq. 4
    loss_plus, d_plus = focal_and_derivative(w_plus, x, to_primary, gamma)
    v = d_plus[rows, primary].mean()  # ∇L_pri(θ1⁺)
    mean = y.mean(axis=0)
    by_label = -alpha / n * d_auxiliary * v + entropy_weight * (np.log(mean) + 1) / n  # d objective / d y_nk
    expected = (y * (by_label - (y * by_label).sum(axis=1, keepdims=True))).sum(axis=0)  # through the SoftMax

    network, generator = ToyNetwork(w, to_primary, to_auxiliary), ToyGenerator(theta, psi)
    images, labels = torch.tensor(x)[:, None], torch.tensor(primary)
    optimizer, loss = torch.optim.SGD(network.parameters(), lr=alpha), functools.partial(maxl.multi_task_loss, gamma=gamma)
    (gradient,), metrics = maxl.meta_gradient(
        network, generator, optimizer, images, labels, entropy_weight, loss, method
    )  # fmt: skip
    assert gradient.numpy() == pytest.approx(expected, rel=1e-10, abs=1e-14)
    assert metrics["lookahead_primary_loss"].item() == pytest.approx(loss_plus[rows, primary].mean(), rel=1e-12)
    assert metrics["mean_label_entropy"].item() == pytest.approx(-(mean * np.log(mean)).sum(), rel=1e-12)
