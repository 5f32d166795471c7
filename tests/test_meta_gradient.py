"""The gradient of eqs. 3 to 5 on VGG-16: both methods against a plain double backward, statistics, the step of θ2."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from reference import assert_gradients_equal, batch, networks, reference_gradient

import maxl
import model_vgg_maxl
from harness import run

METHODS = maxl.META_GRADIENTS


def sgd(network, rate=0.01):
    return torch.optim.SGD(network.parameters(), lr=rate)


def gradient(network, generator, images, primary, alpha=0.01, entropy_weight=0.0, **options):
    """meta_gradient on copies of the networks."""
    network, generator = copy.deepcopy(network), copy.deepcopy(generator)
    return maxl.meta_gradient(network, generator, sgd(network, alpha), images, primary, entropy_weight, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("psi", [[5] * 20, [2, 3, 4], [1, 4, 1]], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_the_meta_gradient_is_the_plain_double_backward(psi, trained, method):
    network, generator = networks(psi)
    images, primary = batch(len(psi), size=40)
    if trained:
        optimizer = sgd(network, 0.05)
        for _ in range(10):
            maxl.auxiliary_training_step(network, generator, optimizer, images, primary)
    for entropy_weight in (0.0, 0.7):
        expected = reference_gradient(*copy.deepcopy((network, generator)), images, primary, 0.01, entropy_weight)
        ours, numbers = gradient(network, generator, images, primary, 0.01, entropy_weight, method=method)
        assert_gradients_equal(ours, expected, relative=1e-9)
        assert numbers.get("forward_mode_error", torch.zeros(())).item() < 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_gamma_the_auxiliary_weight_and_the_batch_judged_on_are_in_the_gradient(method):
    network, generator = networks([2, 3, 4])
    images, primary = batch(3)
    judged_on = batch(3, size=10)
    loss = functools.partial(maxl.multi_task_loss, gamma=0.5, auxiliary_weight=3.0)
    ours, _ = gradient(network, generator, images, primary, 0.1, method=method, loss=loss, judged_on=judged_on)
    expected = reference_gradient(
        network, generator, images, primary, 0.1, gamma=0.5, auxiliary_weight=3.0, judged_on=judged_on
    )
    assert_gradients_equal(ours, expected, relative=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_primary_class_missing_from_the_batch_changes_nothing_but_itself(method):
    network, generator = networks([2, 3, 4])
    images, primary = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.arange(16) % 2
    ours, _ = gradient(network, generator, images, primary, entropy_weight=0.2, method=method)
    assert all(g.isfinite().all() for g in ours)
    assert (ours[-1][5:] == 0).all() and (ours[-1][:5] != 0).all()  # bias of the last layer


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_are_updated_exactly_once_and_weights_stay(method):
    network, generator = networks([2, 3, 4])
    images, primary = batch(3)
    expected_network, expected_generator = copy.deepcopy((network, generator))
    with torch.no_grad():  # one plain training-mode forward of each, at θ1 and at θ2, and nothing else
        expected_network(images)
        expected_generator(images, primary)
    maxl.meta_gradient(network, generator, sgd(network, 0.5), images, primary, method=method)
    for ours, expected in ((network, expected_network), (generator, expected_generator)):
        for (name, tensor), other in zip(ours.state_dict().items(), expected.state_dict().values()):
            assert torch.equal(tensor, other), name
    assert network.trunk.layers[1].num_batches_tracked == 1
    assert all(p.grad is None for p in [*network.parameters(), *generator.parameters()])


def test_the_step_is_sgd_with_weight_decay_at_the_scheduled_step_length():
    """Eq. 5 by hand, with α halved by the scheduler of the multi-task optimizer."""
    network, generator = networks([2, 3, 4])
    images, primary = batch(3)
    optimizer = sgd(network, 0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    label_optimizer = torch.optim.SGD(generator.parameters(), lr=0.1, weight_decay=5e-4)
    before = [p.detach().clone() for p in generator.parameters()]
    gradients = reference_gradient(*copy.deepcopy((network, generator)), images, primary, 0.01, 0.2)
    maxl.meta_training_step(network, generator, optimizer, label_optimizer, images, primary, entropy_weight=0.2)
    for old, expected, new in zip(before, gradients, generator.parameters()):
        assert torch.allclose(new, old - 0.1 * (expected + 5e-4 * old), rtol=1e-10, atol=1e-13)


class NoRun:
    """Stands for run.Run where only a Meter is wanted."""

    epoch = 1

    def tick(self):
        pass


def test_both_methods_train_the_same_label_generator_over_whole_passes():
    trained = []
    for method in METHODS:
        network, generator = networks([2, 3, 4])
        torch.manual_seed(1)
        batches = [(torch.randn(12, 3, 32, 32, dtype=torch.float64), (torch.arange(12) % 3)[:, None]) for _ in range(3)]
        optimizer = sgd(network)
        label_optimizer = torch.optim.SGD(generator.parameters(), lr=0.001, weight_decay=5e-4)
        theta2 = copy.deepcopy(dict(generator.named_parameters()))
        loss, meter = maxl.multi_task_loss, run.Meter(NoRun(), "train")
        model_vgg_maxl.train_epoch(network, generator, optimizer, batches, 0, loss, meter)
        assert all(torch.equal(p, theta2[name]) and p.grad is None for name, p in generator.named_parameters())
        theta1 = copy.deepcopy(dict(network.named_parameters()))
        parts, meter = (network, generator, optimizer, label_optimizer), run.Meter(NoRun(), "meta")
        model_vgg_maxl.meta_epoch(*parts, batches, 0, loss, meter, method=method)
        assert all(torch.equal(p, theta1[name]) for name, p in network.named_parameters())
        assert any(not torch.equal(p, theta2[name]) for name, p in generator.named_parameters())
        for module in (network, generator):  # three batches in each of the two passes
            assert module.trunk.layers[1].num_batches_tracked == 6
        trained.append((network, generator))
    for ours, theirs in zip(*trained):
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()):
            assert torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12)


def test_a_users_program_sees_no_warning_of_torch_about_itself():
    """In a process of its own, where forward-mode differentiation is used for the first time."""
    program = (
        "import torch, utils, maxl\n"
        "network, generator = maxl.Network(utils.VGG16(1 / 16), 2, 4), maxl.LabelGenerator(utils.VGG16(1 / 16), [2, 2])\n"
        "optimizer = torch.optim.SGD(network.parameters(), lr=0.1)\n"
        "maxl.meta_gradient(network, generator, optimizer, torch.randn(4, 3, 32, 32), torch.arange(4) % 2)\n"
    )
    command = [sys.executable, "-W", "error::FutureWarning", "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_an_unknown_method_is_named():
    network, generator = networks([1, 1])
    with pytest.raises(ValueError, match="'hessian'.*forward-mode, double-backward"):
        maxl.meta_gradient(network, generator, sgd(network), *batch(2), method="hessian")


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_gpu(method):
    network, generator = (module.cuda() for module in networks([2, 3, 4], dtype=torch.float32))
    images, primary = (t.cuda() for t in batch(3, dtype=torch.float32))
    optimizer, label_optimizer = sgd(network), sgd(generator, 0.001)

    def steps():
        maxl.auxiliary_training_step(network, generator, optimizer, images, primary)
        maxl.meta_training_step(network, generator, optimizer, label_optimizer, images, primary, method=method)

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
    cpu = reference_gradient(*copy.deepcopy((network, generator)), images, primary, 0.01)
    gpu, _ = gradient(network.cuda(), generator.cuda(), images.cuda(), primary.cuda(), method=method)
    assert_gradients_equal([g.cpu() for g in gpu], cpu, relative=1e-8)
