"""Table 1's backbones: their parameters counted by hand, the residual block written out, and the meta-gradient."""

import functools
import importlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, shortcuts
from reference import assert_gradients_equal, batch

import maxl
import utils
from experiments.appendix_e import VARIATIONS
from experiments.methods.backbones import BACKBONES, BasicBlock, Conv4, ResNet32
from experiments.pairs import METHODS
from harness.exits import run_main

def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("image_channels", [1, 3])
def test_conv4_has_four_convolutions_of_64_filters(image_channels):
    convolutions = 9 * 64 * (image_channels + 3 * 64) + 4 * 64  # weights and biases
    assert parameters(Conv4(image_channels=image_channels)) == convolutions + 4 * 2 * 64
    assert Conv4().feature_size == 256


def test_resnet32_has_the_0_46_million_parameters_of_he_et_al():
    """31 convolutions without biases, BatchNorm's two numbers a channel; the 32nd layer is the classifier."""
    first, *stages = 9 * 3 * 16, 10 * 16 * 16 * 9, (16 + 9 * 32) * 32 * 9, (32 + 9 * 64) * 64 * 9
    batch_norm = 2 * (11 * 16 + 10 * 32 + 10 * 64)
    network = ResNet32()
    assert parameters(network) == first + sum(stages) + batch_norm == 463_504
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 31
    assert parameters(network) + 64 * 10 + 10 == 464_154  # "0.46M" of their Table 6, with its linear classifier


@pytest.mark.parametrize("name, features", [("conv4", 128), ("resnet32", 32), ("vgg16", 256)])
@pytest.mark.parametrize("image_channels", [1, 3])
def test_features_are_as_many_as_the_trunk_says(name, features, image_channels):
    trunk = BACKBONES[name](0.5, image_channels)
    assert trunk(torch.randn(2, image_channels, 32, 32)).shape == (2, trunk.feature_size) == (2, features)


@pytest.mark.parametrize("channels_in, channels, stride", [(4, 4, 1), (4, 8, 2)])
def test_a_residual_block_is_what_he_et_al_write(channels_in, channels, stride):
    """relu(F(x) + shortcut), the shortcut every second pixel, its new channels zero on both sides."""
    torch.manual_seed(0)
    block, x = BasicBlock(channels_in, channels, stride), torch.randn(5, channels_in, 8, 8)
    first, _, _, second, _ = block.layers

    def batch_norm(z):
        mean, variance = z.mean(dim=(0, 2, 3), keepdim=True), z.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
        return (z - mean) / (variance + 1e-5).sqrt()

    expected = batch_norm(F.conv2d(x, first.weight, stride=stride, padding=1)).clamp_min(0)
    expected = batch_norm(F.conv2d(expected, second.weight, padding=1))
    before = (channels - channels_in) // 2
    expected[:, before : before + channels_in] += x[:, :, ::stride, ::stride]
    assert torch.allclose(block(x), expected.clamp_min(0), atol=1e-5)


@pytest.mark.parametrize("name", ["conv4", "resnet32"])
def test_forward_mode_equals_double_backward(name):
    """θ1⁺'s step is long enough for the networks' curvature to count."""
    found = {}
    for method in maxl.META_GRADIENTS:
        torch.manual_seed(0)
        trunk = functools.partial(BACKBONES[name], 1 / 8)
        network, generator = maxl.Network(trunk(), 2, 5).double(), maxl.LabelGenerator(trunk(), [2, 3]).double()
        images, primary = batch(2, size=12)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        found[method], _ = maxl.meta_gradient(network, generator, optimizer, images, primary, method=method)
    assert_gradients_equal(found["forward-mode"], found["double-backward"], relative=1e-9)


SCRIPTS = {method.script: method.options for method in [*METHODS.values(), VARIATIONS["latent"]]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_backbone_is_that_of_every_network(script, monkeypatch):
    """As the README says: utils.Backbone is the one place to change."""
    monkeypatch.setattr(utils, "Backbone", Conv4)
    arguments = [*SCRIPTS[script], *TINY, "--epochs", "1", "--out", "r"]
    with shortcuts():
        assert run_main(importlib.import_module(script).main, arguments) == 0
    parts = torch.load("r/checkpoint.pt", weights_only=True)["parts"]
    for name in parts.keys() & {"network", "label_generator"}:
        convolutions = [weights for weights in parts[name].values() if weights.dim() == 4]
        assert len(convolutions) == 4, name
