"""The meta-gradient on networks that users bring: right, or refused with what to do."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from reference import assert_gradients_equal, batch, networks, reference_gradient
from torch.utils.checkpoint import checkpoint

import maxl
import utils

METHODS = maxl.META_GRADIENTS
OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6)  # seen in 2.3


def pair(make_trunk, dtype=torch.float64):
    """Both networks with trunks of one kind, ψ = [2, 3, 4]."""
    torch.manual_seed(0)
    network = maxl.Network(make_trunk(), 3, 9)
    return network.to(dtype), maxl.LabelGenerator(make_trunk(), [2, 3, 4]).to(dtype)


def gradient(network, generator, images, primary, alpha=0.3, method="forward-mode", optimizer=None):
    """meta_gradient on copies of the networks, as meta_training_step takes it, from a known state of the generator."""
    if optimizer is None:
        network, generator = copy.deepcopy((network, generator))
        optimizer = torch.optim.SGD(network.parameters(), lr=alpha)
    torch.manual_seed(5)
    with maxl.exact_arithmetic(images.device):
        return maxl.meta_gradient(network, generator, optimizer, images, primary, 0.0, method=method)


def expected(network, generator, images, primary, alpha=0.3, **options):
    torch.manual_seed(5)
    with maxl.exact_arithmetic(images.device):
        return reference_gradient(*copy.deepcopy((network, generator)), images, primary, alpha, **options)


# --- right ---------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Other layers than VGG-16's: no bias, activations in place behind convolutions, a sum, SiLU, a fixed filter."""

    feature_size = 12

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.third = nn.Conv2d(8, 12, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("blur", torch.ones(8, 1, 3, 3) / 9)

    def forward(self, images):
        x = F.leaky_relu_(self.first(images), 0.3)  # not idempotent: in place once is not in place twice
        x = F.conv2d(x, self.blur, groups=8, padding=1)
        x = x + F.silu(self.norm(self.second(x)))
        return F.leaky_relu_(F.conv2d(x, self.third.weight), 0.3).mean(dim=(2, 3))


class RandomBackbone(nn.Module):
    """Draws at random in its forward: dropout, of whole channels too, and stochastic depth."""

    feature_size = 6

    def __init__(self):
        super().__init__()
        self.first, self.branch = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 3, padding=1)
        self.dropout, self.channels = nn.Dropout(0.5), nn.Dropout2d(0.3)
        self.depth = torchvision.ops.StochasticDepth(0.5, "row")

    def forward(self, images):
        x = self.channels(self.first(images).tanh())
        x = x + self.depth(self.branch(x).sin())
        return self.dropout(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    """Patches of the image as tokens, one layer of attention, their mean."""

    feature_size = 8

    def __init__(self):
        super().__init__()
        self.patches, self.qkv = nn.Conv2d(3, 8, 8, stride=8), nn.Linear(8, 24)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return (tokens + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(dim=1)


class Counting(nn.Module):
    """Its forward depends on a buffer that it changes itself."""

    feature_size = 12

    def __init__(self):
        super().__init__()
        self.trunk = Backbone()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return self.trunk(images) * self.calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trunk", [Backbone, RandomBackbone, Attention, Counting])
def test_backbones_of_ones_own(trunk, method):
    parts, data = pair(trunk), batch(3)
    ours, numbers = gradient(*parts, *data, method=method)
    assert_gradients_equal(ours, expected(*parts, *data), 1e-9)
    assert numbers.get("forward_mode_error", torch.zeros(())).item() < 1e-12


def test_what_is_drawn_next_does_not_depend_on_the_method():
    states = []
    for method in METHODS:
        gradient(*pair(RandomBackbone), *batch(3), method=method)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


class Checkpointed(nn.Module):
    """Two blocks whose layers run again when a gradient is taken."""

    feature_size = 8

    def __init__(self, checkpointing):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout(0.2))
        self.checkpointing = checkpointing

    def forward(self, images):
        x = images
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x.mean(dim=(2, 3))


def densenet(memory_efficient):
    trunk = torchvision.models.DenseNet(8, (2, 2), 8, memory_efficient=memory_efficient, num_classes=1)
    trunk.feature_size, trunk.classifier = trunk.classifier.in_features, nn.Identity()
    return trunk


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trunk", [Checkpointed, densenet])
def test_gradient_checkpointing_changes_neither_the_gradient_nor_the_statistics(trunk, method):
    plain, checkpointed = (pair(lambda on=on: trunk(on)) for on in (False, True))
    data = batch(3)
    theirs = expected(*plain, *data)
    optimizer = torch.optim.SGD(checkpointed[0].parameters(), lr=0.3)
    try:
        ours, _ = gradient(*checkpointed, *data, method=method, optimizer=optimizer)
    except RuntimeError as error:
        if OLD_TORCH and "You must implement the jvp function" in str(error):
            pytest.skip("this torch has no forward mode through checkpointing, and the error says what to do")
        raise
    assert_gradients_equal(ours, theirs, 1e-9)
    torch.manual_seed(5)
    for network, once, inputs in zip(checkpointed, plain, (data[:1], data)):
        once(*inputs)
        for name, buffer in network.named_buffers():
            assert torch.equal(buffer, once.get_buffer(name)), name


class Shared(nn.Module):
    """One block under three names, and a weight tied to another layer's."""

    feature_size = 12

    def __init__(self):
        super().__init__()
        self.first, block = nn.Conv2d(3, 12, 3, stride=2), nn.Conv2d(12, 12, 3, padding=1)
        self.blocks, self.again = nn.ModuleList([block, block]), block
        self.tied = nn.Conv2d(12, 12, 3, padding=1)
        self.tied.weight = block.weight

    def forward(self, images):
        x = self.first(images).tanh()
        for block in (*self.blocks, self.again, self.tied):
            x = x + block(x).sin()
        return x.mean(dim=(2, 3))


def by_real_steps(network, generator, images, primary, alpha):
    """∇_θ2 L_pri(θ1⁺) with v taken on a copy of the network that makes the step: no weights are swapped."""
    labels = generator(images, primary)
    total, _ = maxl.multi_task_loss(network, images, primary, labels)
    gradient = torch.autograd.grad(total, tuple(network.parameters()), create_graph=True)
    ahead = copy.deepcopy(network)
    with torch.no_grad():
        for weight, g in zip(ahead.parameters(), gradient):
            weight -= alpha * g
    loss, _ = maxl.multi_task_loss(ahead, images, primary)
    v = torch.autograd.grad(loss, tuple(ahead.parameters()), materialize_grads=True)
    return torch.autograd.grad(gradient, tuple(generator.parameters()), [-alpha * direction for direction in v])


@pytest.mark.parametrize("method", METHODS)
def test_shared_modules_and_tied_weights_are_right_and_stay_what_they_are(method):
    network, generator = pair(Shared)[0], pair(Backbone)[1]
    data, before = batch(3), list(network.parameters())
    theirs = by_real_steps(*copy.deepcopy((network, generator)), *data, 0.3)
    optimizer = torch.optim.SGD(before, lr=0.3)
    ours, numbers = gradient(network, generator, *data, method=method, optimizer=optimizer)
    assert_gradients_equal(ours, theirs, 1e-9)
    assert numbers.get("forward_mode_error", torch.zeros(())).item() < 1e-12
    assert all(ours is theirs for ours, theirs in zip(network.parameters(), before))
    assert network.trunk.blocks[0].weight is network.trunk.tied.weight


@pytest.mark.parametrize("method", METHODS)
def test_theta1_is_what_the_optimizer_holds(method):
    """Weights left out of the optimizer do not move in the look-ahead step either."""
    network, generator = pair(Backbone)
    data = batch(3)
    held = [name for name, _ in network.named_parameters() if name.startswith(("heads", "trunk.third"))]
    optimizer = torch.optim.SGD([network.get_parameter(name) for name in held], lr=0.3)
    theirs = expected(network, generator, *data, theta1=held)
    assert_gradients_equal(gradient(network, generator, *data, method=method, optimizer=optimizer)[0], theirs, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_and_unused_weights_are_left_out(method):
    network, generator = pair(Backbone)
    network.trunk.second.weight.requires_grad_(False)
    network.trunk.unused = nn.Parameter(torch.zeros(1))
    generator.trunk.first.weight.requires_grad_(False)
    frozen, data = generator.trunk.first.weight.clone(), batch(3)
    theirs = expected(network, generator, *data)
    assert_gradients_equal(gradient(network, generator, *data, method=method)[0], theirs, 1e-9)
    optimizers = torch.optim.SGD(network.parameters(), lr=0.1), torch.optim.SGD(generator.parameters(), lr=0.1)
    maxl.meta_training_step(network, generator, *optimizers, *data, method=method)
    assert torch.equal(generator.trunk.first.weight, frozen)


def test_equal_rates_given_as_tensors_are_one_step_length():
    network, generator = pair(Backbone)
    data = batch(3)
    groups = [{"params": part.parameters(), "lr": torch.tensor(0.25)} for part in (network.trunk, network.heads)]
    ours, _ = gradient(network, generator, *data, optimizer=torch.optim.SGD(groups, lr=0.1))
    assert_gradients_equal(ours, expected(network, generator, *data, alpha=0.25), 1e-9)


def test_the_users_autocast_around_the_step_does_not_reach_it():
    network, generator = pair(Backbone, torch.float32)
    data = batch(3, dtype=torch.float32)
    theirs = expected(network, generator, *data)
    optimizers = torch.optim.SGD(network.parameters(), lr=0.3), torch.optim.SGD(generator.parameters(), lr=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        maxl.meta_training_step(network, generator, *optimizers, *data, entropy_weight=0.0)
    ours, theirs = (torch.cat([g.flatten() for g in each]) for each in ([p.grad for p in generator.parameters()], theirs))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_ignores_the_labels_gives_no_gradient(method):
    def alone(network, images, primary, labels=None):
        return maxl.multi_task_loss(network, images, primary)

    network, generator = pair(Backbone)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    ours, _ = maxl.meta_gradient(network, generator, optimizer, *batch(3), 0.0, loss=alone, method=method)
    assert all((g == 0).all() for g in ours)


# --- not exact, and said ---------------------------------------------------------------------------


class CountsCalls(Backbone):
    """A Python counter that nothing can put back."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images) * (1 + 0.02 * self.calls)


class OwnGenerator(Backbone):
    """Noise from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.draws = torch.Generator().manual_seed(0)

    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        x = super().forward(images)
        return x * (1 + 0.1 * torch.randn(x.shape, generator=self.draws, dtype=x.dtype))


class NoGradGate(Backbone):
    """no_grad() stops forward mode where detach() would not have to."""

    def forward(self, images):
        x = super().forward(images)
        with torch.no_grad():
            gate = torch.sigmoid(3 * x)
        return x * gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trunk", [CountsCalls, OwnGenerator, NoGradGate])
def test_a_forward_that_does_not_do_the_same_twice_shows_in_the_error(trunk, dtype):
    _, numbers = gradient(*pair(trunk, dtype), *batch(3, dtype=dtype))
    assert numbers["forward_mode_error"].item() > 1e-4


def test_the_error_of_right_gradients_in_fp32_is_rounding():
    for trunk in (Backbone, RandomBackbone, lambda: utils.VGG16(1 / 8)):
        _, numbers = gradient(*pair(trunk, torch.float32), *batch(3, dtype=torch.float32), alpha=0.01)
        assert numbers["forward_mode_error"].item() < 1e-6


# --- refused ---------------------------------------------------------------------------------------


def refused(match, network, generator, data=None, optimizer=None, error=ValueError, updated=None, **options):
    data = data or batch(3, dtype=next(network.parameters()).dtype)
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.1)
    label_optimizer = torch.optim.SGD((updated or generator).parameters(), lr=0.1)
    with pytest.raises(error, match=match):
        maxl.meta_training_step(network, generator, optimizer, label_optimizer, *data, **options)


def test_one_trunk_in_both_networks_is_refused():
    network, generator = pair(Backbone)
    generator.trunk, other = network.trunk, generator.head
    refused("share weights", network, generator, updated=other)
    network, generator = pair(Backbone)
    generator.trunk.norm = network.trunk.norm = nn.BatchNorm2d(8, affine=False).double()
    refused("share weights", network, generator)


def test_an_optimizer_of_other_weights_is_refused_for_the_label_generator():
    network, generator = pair(Backbone)
    for other in (network, copy.deepcopy(generator), nn.ModuleList([network, generator])):
        refused("label_optimizer has to hold weights of the label generator", network, generator, updated=other)


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_cannot_be_replaced_are_refused(method):
    class InAList(Backbone):
        def __init__(self):
            super().__init__()
            self.weights = [self.third.weight]

        def forward(self, images):
            return super().forward(images) + F.conv2d(images[:, :1].repeat(1, 8, 1, 1), self.weights[0]).mean((2, 3))

    torch.manual_seed(0)
    network = maxl.Network(InAList(), 3, 9)
    network.trunk.weights = [network.trunk.third.weight]
    refused("weights that it does not look up in its modules", network, pair(Backbone, torch.float32)[1],
            batch(3, dtype=torch.float32), method=method)  # fmt: skip


def test_low_precision_is_refused_wherever_it_comes_from():
    class Autocast(Backbone):
        def forward(self, images):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(images)

    network, generator = pair(Backbone, torch.float32)
    data = batch(3, dtype=torch.float32)
    lowered = maxl.Network(Autocast(), 3, 9)

    class AutocastLSTM(Backbone):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(12, 12)

        def forward(self, images):
            with torch.autocast("cpu", torch.bfloat16):
                return self.lstm(super().forward(images)[None])[0][0].to(images.dtype)

    refused("a forward computes in torch.bfloat16", maxl.Network(AutocastLSTM(), 3, 9), generator, data)
    refused("a forward computes in torch.bfloat16", lowered, generator, data)
    refused("a forward computes in torch.bfloat16", network, maxl.LabelGenerator(Autocast(), [2, 3, 4]), data)
    refused("weights of type torch.bfloat16", network.bfloat16(), generator, data)


def wrapped_trunk():
    trunk = nn.DataParallel(Backbone())
    trunk.feature_size = 12
    return trunk


def test_wrapped_networks_are_refused_with_what_to_do():
    network, generator = pair(Backbone)
    refused(r"DataParallel; give the network in it \(.module\)", nn.DataParallel(network), generator)
    refused(r"average the gradients", network, nn.DataParallel(generator))
    refused(r"average the gradients", maxl.Network(wrapped_trunk(), 3, 9).double(), generator)


def test_optimizers_that_do_not_fit_equation_4_are_refused():
    network, generator = pair(Backbone)
    groups = [{"params": network.trunk.parameters()}, {"params": network.heads.parameters(), "lr": 0.1}]
    refused("several learning rates", network, generator, optimizer=torch.optim.SGD(groups, lr=0.01))
    maximizing = torch.optim.SGD(network.parameters(), lr=0.1, maximize=True)
    refused("maximize=True", network, generator, optimizer=maximizing)
    refused("holds no trainable weight", network, generator, optimizer=torch.optim.SGD(generator.parameters(), lr=0.1))


def test_a_shared_trunk_is_named_before_the_label_optimizer_that_holds_it():
    network, generator = pair(Backbone)
    generator.trunk = network.trunk
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (network, generator)]
    with pytest.raises(ValueError, match="give each a trunk of its own"):
        maxl.meta_training_step(network, generator, *optimizers, *batch(3)[:2])


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


class Custom(Backbone):
    def forward(self, images):
        return NoForwardMode.apply(super().forward(images))


class WeightNorm(Backbone):
    def __init__(self):
        super().__init__()
        self.second = nn.utils.parametrizations.spectral_norm(self.second)


@pytest.mark.parametrize("trunk", [Custom, WeightNorm])
def test_what_fails_in_forward_mode_says_what_to_do_and_double_backward_is_right(trunk):
    network, generator = pair(trunk)
    refused('use method="double-backward"', network, generator, error=RuntimeError)
    data = batch(3)
    ours, _ = gradient(network, generator, *data, method="double-backward")
    assert_gradients_equal(ours, expected(network, generator, *data), 1e-9)


def test_images_of_another_size_are_named():
    for size in ((64, 64), (28, 28), (32, 48)):
        with pytest.raises(ValueError, match=f"32x32 pixels, these have {size[0]}x{size[1]}"):
            utils.VGG16(1 / 16)(torch.zeros(2, 3, *size))
    assert networks([1, 1])[0](torch.zeros(2, 3, 32, 32, dtype=torch.float64))[0].shape == (2, 2)
