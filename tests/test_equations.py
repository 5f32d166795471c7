"""The paper's equations 1, 6 and 7, the network and its initial weights, each against its formula in plain numpy."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import maxl
import model_vgg_maxl
import utils
from maxl import Network
from utils import VGG16


def focal_by_the_formula(logits, labels, gamma):
    """Eq. 1 as printed: -y (1 - p)^γ log p with p the SoftMax, summed over classes, mean over the batch."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    return (-labels * (1 - p) ** gamma * np.log(p)).sum(axis=1).mean()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_focal_loss_is_equation_1_for_hard_and_soft_labels(gamma):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((16, 7))
    hard = rng.integers(7, size=16)
    soft = rng.dirichlet(np.ones(7), size=16)
    for labels, weights in ((hard, np.eye(7)[hard]), (soft, soft)):
        ours = maxl.focal_loss(torch.tensor(logits), torch.tensor(labels), gamma).item()
        assert ours == pytest.approx(focal_by_the_formula(logits, weights, gamma), rel=1e-12)


@pytest.mark.parametrize("shape", [(8, 1), (5,), (8, 5, 1), ()])
def test_labels_of_a_shape_that_would_broadcast_are_refused(shape):
    with pytest.raises(ValueError, match=r"for logits of shape \(8, 5\); give class ids"):
        maxl.focal_loss(torch.randn(8, 5), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_class_ids_of_any_integer_type_are_taken_and_floats_refused(dtype):
    """A uint8 index would be taken for a mask."""
    ids, logits = torch.tensor([1, 0, 1]), torch.randn(3, 2)
    assert torch.equal(maxl.focal_loss(logits, ids.to(dtype)), maxl.focal_loss(logits, ids))
    generator, images = maxl.LabelGenerator(VGG16(1 / 16), [2, 3]), torch.randn(3, 3, 32, 32)
    assert torch.equal(generator(images, ids.to(dtype)), generator(images, ids))
    for refuses in (
        lambda: maxl.focal_loss(logits, ids.float()), lambda: generator(images, ids.float()),
        lambda: generator(images, torch.eye(2, dtype=dtype)[ids]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="give class ids, integers"):
            refuses()


def test_labels_without_an_auxiliary_task_are_refused():
    single = maxl.Network(VGG16(1 / 16), 2)
    with pytest.raises(ValueError, match="the network has no auxiliary task"):
        maxl.multi_task_loss(single, torch.randn(3, 3, 32, 32), torch.tensor([1, 0, 1]), torch.tensor([3, 0, 4]))


@pytest.mark.parametrize("gamma", [0.5, 1.5, 2.0])
@pytest.mark.parametrize("wrong, right", [(0.0, 200.0), (0.0, 18.0), (200.0, 0.0), (1e4, -1e4)])
def test_focal_loss_and_its_derivatives_stay_finite_where_a_softmax_is_0_or_1(wrong, right, gamma):
    logits = torch.tensor([[right, wrong]], requires_grad=True)
    loss = maxl.focal_loss(logits, torch.tensor([0]), gamma)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient[0, 0], logits)
    assert loss.isfinite() and gradient.isfinite().all() and second.isfinite().all()
    # (1 - p)^γ log p with p = 1 / (1 + e^gap): 0 where the class is certain, about the gap where it is missed
    assert loss.item() == pytest.approx(max(0.0, wrong - right), abs=1e-6)
    if wrong > right:  # still pulls at full strength: dℓ/dlogit = -1 for the class that was missed
        assert gradient[0].tolist() == pytest.approx([-1.0, 1.0])


def test_hierarchy_mask_is_the_papers_example():
    assert maxl.hierarchy_mask([2, 2]).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert maxl.hierarchy_mask([1, 3]).int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]


def test_a_primary_class_without_an_auxiliary_class_is_refused():
    """Its label would have no class to be on, and its SoftMax be NaN."""
    with pytest.raises(ValueError, match=r"psi \[0, 3\] must hold numbers from 1 on"):
        maxl.LabelGenerator(VGG16(width=0.02), [0, 3])


def test_mask_softmax_is_a_softmax_over_the_classes_of_the_primary_alone():
    logits = torch.tensor([[1.0, 2.0, 50.0, -3.0, 0.5]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False, True]])
    e = [math.exp(v) for v in (1.0, 2.0, 0.5)]
    expected = [e[0] / sum(e), e[1] / sum(e), 0.0, 0.0, e[2] / sum(e)]
    assert maxl.mask_softmax(logits, mask)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_mask_softmax_gives_no_gradient_and_no_nan_to_other_classes():
    logits = torch.tensor([[1e4, -1e4, 3.0, 2.0]], requires_grad=True)
    labels = maxl.mask_softmax(logits, torch.tensor([[False, False, True, True]]))
    (labels * torch.tensor([5.0, 7.0, 1.0, 2.0])).sum().backward()
    p = 1 / (1 + math.exp(-1.0))
    assert logits.grad[0].tolist() == pytest.approx([0, 0, -p * (1 - p), p * (1 - p)], rel=1e-5)


def test_entropy_loss_is_equation_7_and_its_ends_are_uniform_and_collapsed():
    labels = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]], dtype=torch.float64)
    mean = [0.35, 0.35, 0.3]
    expected = sum(p * math.log(p) for p in mean)
    assert maxl.negative_entropy(labels).item() == pytest.approx(expected, rel=1e-12)
    assert maxl.negative_entropy(torch.eye(4)).item() == pytest.approx(-math.log(4))
    assert maxl.negative_entropy(torch.tensor([[0.0, 1.0]]).repeat(9, 1)).item() == 0


def test_entropy_loss_has_a_finite_gradient_where_a_class_cannot_occur():
    """A batch without an image of some primary class: its auxiliary classes have mean label 0."""
    logits = torch.randn(6, 4, requires_grad=True)
    mask = maxl.hierarchy_mask([2, 2])[torch.zeros(6, dtype=torch.int64)]
    maxl.negative_entropy(maxl.mask_softmax(logits, mask)).backward()
    assert logits.grad.isfinite().all() and (logits.grad[:, 2:] == 0).all() and (logits.grad[:, :2] != 0).any()


def test_label_generator_gives_each_image_a_label_on_its_primary_class_only():
    generator = maxl.LabelGenerator(VGG16(1 / 16), psi=[2, 3, 4])
    primary = torch.tensor([0, 1, 2, 1])
    labels = generator(torch.randn(4, 3, 32, 32), primary)
    assert labels.shape == (4, 9)
    assert torch.allclose(labels.sum(dim=1), torch.ones(4))
    for label, (start, stop) in zip(labels, [(0, 2), (2, 5), (5, 9), (2, 5)]):
        assert label[start:stop].sum().item() == pytest.approx(1.0)
        assert (label[start:stop] > 0).all()


def test_vgg16_is_the_papers_network():
    """Counted by hand: 13 convolutions with bias and BatchNorm, channels 64-64-128-128-256x3-512x6, and two heads."""
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    trunk = sum(9 * a * b + b + 2 * b for a, b in zip(channels, channels[1:]))
    head = 512 * 512 + 512
    expected = trunk + 2 * head + (512 + 1) * 20 + (512 + 1) * 100
    network = Network(VGG16(), 20, 100)
    assert sum(p.numel() for p in network.parameters()) == expected
    assert sum(isinstance(m, torch.nn.Conv2d) for m in network.modules()) == 13
    primary, auxiliary = network(torch.zeros(2, 3, 32, 32))
    assert primary.shape == (2, 20) and auxiliary.shape == (2, 100)


def test_width_multiplies_the_channels():
    trunk = VGG16(0.25)
    convolutions = [m for m in trunk.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128]
    assert trunk(torch.zeros(2, 3, 32, 32)).shape == (2, trunk.feature_size) == (2, 128)


@pytest.mark.parametrize("name, bounded", [("network", True), ("label_generator", False)])
def test_initial_weights_are_xavier_with_zero_biases(name, bounded):
    """Uniform, so bounded, for the multi-task network; normal for the label generator."""
    network = model_vgg_maxl.make_networks(model_vgg_maxl.parse(["--width", "0.5"]))[name]
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            area = module.weight[0, 0].numel() if module.weight.dim() == 4 else 1
            fan_in, fan_out = module.weight.shape[1] * area, module.weight.shape[0] * area
            std = math.sqrt(2 / (fan_in + fan_out))
            assert module.weight.std().item() == pytest.approx(std, rel=0.06)
            limit = math.sqrt(3) * std  # of the uniform distribution with this variance
            assert (module.weight.abs().max() <= limit) == bounded
            assert (module.bias == 0).all()
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_accuracy_counts_hits_for_hard_and_soft_labels():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert maxl.accuracy(logits, torch.tensor([0, 1, 0])).item() == pytest.approx(2 / 3)
    assert maxl.accuracy(logits, torch.tensor([[0.4, 0.6], [0.3, 0.7], [0.1, 0.9]])).item() == pytest.approx(2 / 3)


def test_cosine_similarity_is_the_mean_over_filters_then_over_the_13_convolutions():
    """Of the gradients of the two tasks (section 4.4, Figs. 4 and 7); beside it, that of the whole trunk."""
    torch.manual_seed(0)
    network = utils.initialise(Network(VGG16(1 / 16), 3, 5), torch.nn.init.xavier_uniform_).double()
    images, primary, auxiliary = torch.randn(20, 3, 32, 32).double(), torch.randint(3, (20,)), torch.randint(5, (20,))
    gradients = []
    for task, labels in enumerate((primary, auxiliary)):
        copied = copy.deepcopy(network)
        p = F.softmax(copied(images)[task], dim=1)[torch.arange(20), labels]
        (-((1 - p) ** 2) * p.log()).mean().backward()
        gradients.append({name: q.grad.numpy() for name, q in copied.trunk.named_parameters()})

    def cosine(a, b):
        return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())

    convolutions = [name for name, gradient in gradients[0].items() if gradient.ndim == 4]
    assert len(convolutions) == 13
    layers = [np.mean([cosine(a, b) for a, b in zip(*(g[name] for g in gradients))]) for name in convolutions]
    whole = [np.concatenate([g[name].ravel() for name in g]) for g in gradients]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    metrics = maxl.multi_task_step(network, optimizer, images, primary, auxiliary, compare=utils.cosine_similarities)
    assert metrics["cosine_similarity"].item() == pytest.approx(np.mean(layers), rel=1e-6)
    assert metrics["trunk_cosine_similarity"].item() == pytest.approx(cosine(*whole), rel=1e-6)
    assert abs(np.mean(layers)) < 0.999
