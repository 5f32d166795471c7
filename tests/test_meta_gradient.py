"""The gradient of eqs. 3 to 5 on real networks: both methods against each other, running statistics, own layers."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import REPOSITORY
from torch.utils.flop_counter import FlopCounterMode

import model_vgg_maxl as maxl
import utils
from harness import run

METHODS = maxl.META_GRADIENTS
EXACT = ("forward-mode", "double-backward")


def networks(psi, width=1 / 16, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    network = utils.Network(utils.VGG16(width), len(psi), sum(psi))
    generator = maxl.LabelGenerator(utils.VGG16(width), psi)
    utils.initialise(network, nn.init.xavier_uniform_)
    utils.initialise(generator, nn.init.xavier_normal_)
    return network.to(dtype), generator.to(dtype)


def batch(primary_classes, size=24, dtype=torch.float64):
    return torch.randn(size, 3, 32, 32, dtype=dtype), torch.arange(size) % primary_classes


def assert_gradients_equal(ours, theirs, relative):
    """Tensor by tensor; a tensor whose true gradient is zero (a bias before BatchNorm) against the whole gradient."""
    whole = torch.cat([g.flatten() for g in theirs]).norm()
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        floor = 1e-6 * whole if b.norm() < 1e-12 * whole else 0.0
        assert (a - b).norm() <= relative * max(b.norm(), floor), (a.shape, a.norm(), b.norm())


@pytest.mark.parametrize("psi", [[5] * 20, [2, 3, 4], [1, 4, 1]], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_forward_mode_is_double_backward_in_float64(psi, trained):
    network, generator = networks(psi)
    images, primary = batch(len(psi), size=40)
    if trained:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(10):
            with torch.no_grad():
                labels = generator(images, primary)
            utils.multi_task_step(network, optimizer, images, primary, labels)
    results = {}
    for method in EXACT:
        parts = copy.deepcopy(network), copy.deepcopy(generator)
        results[method] = maxl.meta_gradient(*parts, images, primary, 0.01, 0.2, 2.0, method)
    (forward, forward_metrics), (backward, backward_metrics) = results.values()
    assert_gradients_equal(forward, backward, relative=1e-9)
    for name in forward_metrics:
        assert forward_metrics[name].item() == pytest.approx(backward_metrics[name].item(), rel=1e-12)


def test_a_primary_class_missing_from_the_batch_changes_nothing_but_itself():
    network, generator = networks([2, 3, 4])
    images, primary = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.arange(16) % 2
    gradients = [
        maxl.meta_gradient(copy.deepcopy(network), copy.deepcopy(generator), images, primary, 0.01, method=method)[0]
        for method in EXACT
    ]
    assert all(g.isfinite().all() for g in gradients[0])
    assert_gradients_equal(*gradients, relative=1e-9)
    assert (gradients[0][-1][5:] == 0).all() and (gradients[0][-1][:5] != 0).all()  # bias of the last layer


def test_the_entropy_term_is_its_own_gradient_times_its_weight():
    network, generator = networks([2, 3, 4])
    images, primary = batch(3)

    def gradient(entropy_weight, method):
        parts = copy.deepcopy(network), copy.deepcopy(generator)
        return maxl.meta_gradient(*parts, images, primary, 0.01, entropy_weight, method=method)[0]

    alone = torch.autograd.grad(maxl.negative_entropy(generator(images, primary)), generator.parameters())
    for method in METHODS:
        both, without = gradient(0.7, method), gradient(0.0, method)
        assert_gradients_equal([(a - b) / 0.7 for a, b in zip(both, without)], alone, relative=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_take_part_once_and_weights_stay(method):
    network, generator = networks([2, 3, 4])
    images, primary = batch(3)
    expected_network, expected_generator = copy.deepcopy(network), copy.deepcopy(generator)
    with torch.no_grad():  # one plain training-mode forward of each, at θ1 and at θ2, and nothing else
        expected_network(images)
        expected_generator(images, primary)
    maxl.meta_gradient(network, generator, images, primary, 0.5, method=method)
    for ours, expected in ((network, expected_network), (generator, expected_generator)):
        for (name, tensor), other in zip(ours.state_dict().items(), expected.state_dict().values()):
            assert torch.equal(tensor, other), name
    assert network.trunk.layers[1].num_batches_tracked == 1
    assert all(p.grad is None for p in [*network.parameters(), *generator.parameters()])


def test_the_step_is_sgd_with_weight_decay_at_the_scheduled_step_length():
    """Eq. 5 by hand, with α halved by the scheduler of the multi-task optimizer."""
    network, generator = networks([2, 3, 4])
    images, primary = batch(3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    label_optimizer = torch.optim.SGD(generator.parameters(), lr=0.1, weight_decay=5e-4)
    before = [p.detach().clone() for p in generator.parameters()]
    parts = copy.deepcopy(network), copy.deepcopy(generator)
    gradients, _ = maxl.meta_gradient(*parts, images, primary, 0.01, 0.2, 2.0, "double-backward")
    step = network, generator, optimizer, label_optimizer, images, primary
    maxl.meta_training_step(*step, entropy_weight=0.2, gamma=2.0, method="double-backward")
    for old, gradient, new in zip(before, gradients, generator.parameters()):
        assert torch.allclose(new, old - 0.1 * (gradient + 5e-4 * old), rtol=1e-12, atol=1e-14)


class NoRun:
    """Stands for run.Run where only a Meter is wanted."""

    epoch = 1

    def tick(self):
        pass


def test_both_methods_train_the_same_label_generator_over_whole_passes():
    trained = []
    for method in EXACT:
        network, generator = networks([2, 3, 4])
        torch.manual_seed(1)
        batches = [(torch.randn(12, 3, 32, 32, dtype=torch.float64), (torch.arange(12) % 3)[:, None]) for _ in range(3)]
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        label_optimizer = torch.optim.SGD(generator.parameters(), lr=0.001, weight_decay=5e-4)
        theta2 = copy.deepcopy(dict(generator.named_parameters()))
        maxl.train_epoch(network, generator, optimizer, batches, 0, run.Meter(NoRun(), "train"))
        assert all(torch.equal(p, theta2[name]) and p.grad is None for name, p in generator.named_parameters())
        theta1 = copy.deepcopy(dict(network.named_parameters()))
        meter = run.Meter(NoRun(), "meta")
        maxl.meta_epoch(network, generator, optimizer, label_optimizer, batches, 0, meter, method=method)
        assert all(torch.equal(p, theta1[name]) for name, p in network.named_parameters())
        assert any(not torch.equal(p, theta2[name]) for name, p in generator.named_parameters())
        for module in (network, generator):  # three batches in each of the two passes
            assert module.trunk.layers[1].num_batches_tracked == 6
        trained.append((network, generator))
    for ours, theirs in zip(*trained):
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()):
            assert torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12)


class Backbone(nn.Module):
    """Other layers than VGG-16's: no bias, an activation in place behind a convolution, a sum, SiLU, a fixed filter."""

    feature_size = 12

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.third = nn.Conv2d(8, 12, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("blur", torch.ones(8, 1, 3, 3) / 9)

    def forward(self, images):
        x = nn.functional.relu_(self.first(images))
        x = nn.functional.conv2d(x, self.blur, groups=8, padding=1)
        x = x + nn.functional.silu(self.norm(self.second(x)))
        x = nn.functional.conv2d(x, self.blur, None, 1, 1, 1, 8)
        return nn.functional.conv2d(x, self.third.weight).mean(dim=(2, 3))


def test_forward_mode_is_exact_for_a_backbone_of_ones_own():
    torch.manual_seed(0)
    network = utils.Network(Backbone(), 3, 9).double()
    generator = maxl.LabelGenerator(Backbone(), [2, 3, 4]).double()
    images, primary = batch(3)
    gradients = [
        maxl.meta_gradient(copy.deepcopy(network), copy.deepcopy(generator), images, primary, 0.5, method=method)[0]
        for method in EXACT
    ]
    assert_gradients_equal(*gradients, relative=1e-9)


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


def test_forward_mode_is_exact_for_a_network_that_draws_at_random():
    """The two methods from the same state of the generator; every forward has its own draws."""
    torch.manual_seed(0)
    network = utils.Network(RandomBackbone(), 3, 9)
    generator = maxl.LabelGenerator(utils.VGG16(1 / 16), [2, 3, 4])
    utils.initialise(network, nn.init.xavier_uniform_)
    images, primary = batch(3)
    gradients, after = [], []
    for method in EXACT:
        torch.manual_seed(5)
        parts = copy.deepcopy(network).double(), copy.deepcopy(generator).double()
        gradients.append(maxl.meta_gradient(*parts, images, primary, 0.3, method=method)[0])
        after.append(torch.get_rng_state())
    assert_gradients_equal(*gradients, 1e-9)
    assert torch.equal(*after), "what is drawn next does not depend on the method"


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


def test_attention_has_both_gradients_by_the_kernels_that_readme_names():
    torch.manual_seed(0)
    network = utils.Network(Attention(), 3, 9).double()
    generator = maxl.LabelGenerator(Attention(), [2, 3, 4]).double()
    images, primary = batch(3)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradients = [maxl.meta_gradient(network, generator, images, primary, 0.3, method=m)[0] for m in EXACT]
    assert_gradients_equal(*gradients, 1e-9)


def test_layers_without_bias_are_initialised_and_images_of_another_size_are_named():
    layer = nn.Conv2d(3, 4, 3, bias=False)
    before = layer.weight.clone()
    utils.initialise(layer, nn.init.xavier_uniform_)
    assert not torch.equal(layer.weight, before)
    for size in ((64, 64), (28, 28), (32, 48)):
        with pytest.raises(ValueError, match=f"32x32 pixels, these have {size[0]}x{size[1]}"):
            utils.VGG16(1 / 16)(torch.zeros(2, 3, *size))


def test_a_users_program_sees_no_warning_of_torch_about_itself():
    """In a process of its own, where forward-mode differentiation is used for the first time."""
    program = (
        "import torch, utils, model_vgg_maxl as maxl\n"
        "parts = utils.Network(utils.VGG16(1 / 16), 2, 4), maxl.LabelGenerator(utils.VGG16(1 / 16), [2, 2])\n"
        "maxl.meta_gradient(*parts, torch.randn(4, 3, 32, 32), torch.arange(4) % 2, 0.01)\n"
    )
    command = [sys.executable, "-W", "error::FutureWarning", "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_frozen_and_unused_weights_are_left_out():
    torch.manual_seed(0)
    network = utils.Network(Backbone(), 3, 9).double()
    network.trunk.second.weight.requires_grad_(False)
    network.trunk.unused = nn.Parameter(torch.zeros(1))
    generator = maxl.LabelGenerator(Backbone(), [2, 3, 4]).double()
    generator.trunk.first.weight.requires_grad_(False)
    frozen = generator.trunk.first.weight.clone()
    images, primary = batch(3)
    gradients = [
        maxl.meta_gradient(copy.deepcopy(network), copy.deepcopy(generator), images, primary, 0.5, method=method)[0]
        for method in EXACT
    ]
    assert_gradients_equal(*gradients, relative=1e-9)
    optimizers = torch.optim.SGD(network.parameters(), lr=0.1), torch.optim.SGD(generator.parameters(), lr=0.1)
    maxl.meta_training_step(network, generator, *optimizers, images, primary)
    assert torch.equal(generator.trunk.first.weight, frozen)


def test_an_optimizer_with_two_learning_rates_is_refused():
    network, generator = networks([1, 1])
    groups = [{"params": network.trunk.parameters()}, {"params": network.heads.parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    with pytest.raises(ValueError, match="several learning rates"):
        maxl.meta_training_step(network, generator, optimizer, None, *batch(2))


def test_the_pass_along_v_redoes_no_convolution_of_the_forward():
    """Counted: 13 convolutions at θ1, 13 at θ1⁺, and along v two for each one, but one for the first."""
    network, generator = networks([2, 3, 4])
    images, primary = batch(3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    forward = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    first_layer = 2 * 9 * 3 * 4 * 32 * 32 * len(images)  # multiplications and additions, 3 to 4 channels
    with FlopCounterMode(display=False) as counter:
        maxl.meta_gradient(network, generator, images, primary, 0.01)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert counted == (1 + 1 + 2) * forward - first_layer + forward  # and the label generator's own forward


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="'hessian'.*forward-mode, double-backward"):
        maxl.meta_gradient(*networks([1, 1]), *batch(2), 0.01, method="hessian")


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_gpu(method):
    network, generator = networks([2, 3, 4], dtype=torch.float32)
    network, generator = network.cuda(), generator.cuda()
    images, primary = (t.cuda() for t in batch(3, dtype=torch.float32))
    optimizers = torch.optim.SGD(network.parameters(), lr=0.01), torch.optim.SGD(generator.parameters(), lr=0.001)

    def steps():
        maxl.auxiliary_training_step(network, generator, optimizers[0], images, primary, cosine=True)
        maxl.meta_training_step(network, generator, *optimizers, images, primary, method=method)

    steps()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_on_the_gpu_is_the_cpus(method):
    network, generator = networks([2, 3, 4])
    images, primary = batch(3)
    cpu, _ = maxl.meta_gradient(copy.deepcopy(network), copy.deepcopy(generator), images, primary, 0.01, method=method)
    gpu, _ = maxl.meta_gradient(network.cuda(), generator.cuda(), images.cuda(), primary.cuda(), 0.01, method=method)
    assert_gradients_equal([g.cpu() for g in gpu], cpu, relative=1e-8)
