"""--precision, --channels-last and --cuda-graphs: what they change, and that they change nothing else."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import SCRIPTS, TINY, curves, forked, run_script

import model_vgg_maxl as maxl
import utils
from harness import acceleration
from model_vgg_single import single_step

CPU = torch.device("cpu")
CLASSES = 4, 12


def network(width=0.125, seed=0):
    torch.manual_seed(seed)
    return utils.initialise(utils.Network(utils.VGG16(width), *CLASSES), nn.init.xavier_uniform_)


def batches(count, size=40, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(size, 3, 32, 32, generator=generator)
        primary, auxiliary = (torch.randint(n, (size,), generator=generator) for n in CLASSES)
        yield images.to(device), primary.to(device), auxiliary.to(device)


def cosine(ours, theirs):
    return torch.cosine_similarity(*(torch.cat([t.flatten() for t in g]).double() for g in (ours, theirs)), dim=0)


def optimizer_of(net, rate=0.01, momentum=0.0):
    return torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)


# --- precision ----------------------------------------------------------------------------------


def test_fp32_changes_nothing():
    fast, net = acceleration.Acceleration(CPU), network()
    assert fast.lower(net) is net and fast.place(net) is net and fast.capture(single_step) is single_step
    assert all(p.is_contiguous() for p in net.parameters())
    assert acceleration.tf32_allowed() == (False, False)


def test_bf16_lowers_convolutions_and_linear_layers_but_no_loss_and_no_softmax():
    net = network()
    low = acceleration.Acceleration(CPU, "bf16").lower(net)
    ((images, primary, auxiliary),) = batches(1)
    dtypes = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda module, _, output, name=name: dtypes.update({name: output}))
    logits, auxiliary_logits = low(images)
    assert logits.dtype == auxiliary_logits.dtype == torch.bfloat16
    assert all(
        dtypes[name].dtype == torch.bfloat16
        for name, module in net.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    )
    assert utils.focal_losses(logits).dtype == utils.focal_loss(logits, primary).dtype == torch.float32
    labels = maxl.mask_softmax(auxiliary_logits, maxl.hierarchy_mask([3] * 4)[primary])
    assert labels.dtype == torch.float32
    assert torch.allclose(labels.sum(dim=1), torch.ones(len(images)), atol=1e-6)
    assert network()(images)[0].dtype == net(images)[0].dtype == torch.float32, "the network itself is as it was"
    assert utils.focal_losses(logits.double()).dtype == torch.float64


def test_the_lowered_network_shares_weights_statistics_and_mode():
    net = network()
    low = acceleration.Acceleration(CPU, "bf16").lower(net)
    assert all(a is b for a, b in zip(low.parameters(), net.parameters(), strict=True))
    ((images, primary, auxiliary),) = batches(1)
    before = net.trunk.layers[1].running_mean.clone()
    low.eval()
    low(images)
    assert torch.equal(net.trunk.layers[1].running_mean, before) and not net.trunk.training
    low.train()
    weight = net.heads[0][0].weight.clone()
    utils.multi_task_step(low, optimizer_of(net), images, primary, auxiliary)
    assert net.trunk.training and not torch.equal(net.trunk.layers[1].running_mean, before)
    assert not torch.equal(net.heads[0][0].weight, weight) and net.heads[0][0].weight.dtype == torch.float32


def test_the_bf16_gradient_of_a_multi_task_step_points_along_the_fp32_one():
    """After some steps of training; at initial weights rounding weighs more (about 0.9)."""
    net = network(width=0.25)
    optimizer = optimizer_of(net)
    low = acceleration.Acceleration(CPU, "bf16").lower(net)
    for images, primary, auxiliary in batches(20):
        utils.multi_task_step(net, optimizer, images, primary, auxiliary)
    gradients = {}
    for name, view in (("fp32", net), ("bf16", low)):
        logits, auxiliary_logits = view(images)
        loss = utils.focal_loss(logits, primary) + utils.focal_loss(auxiliary_logits, auxiliary)
        gradients[name] = torch.autograd.grad(loss, net.parameters())
    assert all(g.dtype == torch.float32 for g in gradients["bf16"])
    assert 0.9 < cosine(gradients["bf16"], gradients["fp32"]) < 1 - 1e-9


def test_bf16_is_for_the_first_pass_and_the_test_of_maxl_not_for_the_second(monkeypatch):
    seen = []

    def spy(module, name, kind):
        function = getattr(module, name)

        def spied(net, *arguments, **options):
            images = (
                next(a for a in arguments if torch.is_tensor(a)) if name != "evaluate" else torch.zeros(2, 3, 32, 32)
            )
            with torch.no_grad():
                seen.append((kind, net(images)[0].dtype))
            return function(net, *arguments, **options)

        monkeypatch.setattr(module, name, spied)

    spy(maxl, "auxiliary_training_step", "first")
    spy(maxl, "meta_training_step", "second")
    spy(utils, "evaluate", "test")
    assert run_script("model_vgg_maxl", *TINY, "--epochs", 1, "--precision", "bf16", "--out", "r") == 0
    assert set(seen) == {("first", torch.bfloat16), ("second", torch.float32), ("test", torch.bfloat16)}
    assert json.loads(Path("r/settings.json").read_text())["precision"] == "bf16"


def test_another_precision_is_another_experiment(capsys):
    few = [*TINY, "--epochs", 1, "--out", "r"]
    assert run_script("model_vgg_single", *few) == 0
    assert run_script("model_vgg_single", *few, "--precision", "bf16", "--resume") == 2
    assert "precision was fp32, now bf16" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model_vgg_single", "model_vgg_human"])
def test_learns_in_bf16_as_in_fp32(name):
    """Test accuracy over the epochs on the synthetic images, chance 5 %: the curves stay together."""
    accuracies = {}
    few = ["--quick", "--epochs", 2, "--train-images", 1500, "--batch-size", 10]
    runs = {}
    for precision in ("fp32", "bf16"):  # side by side
        arguments = [*few, "--precision", precision, "--out", precision]
        runs[precision] = forked(run_script, name, *arguments, test_images=1000)
    for precision, process in runs.items():
        process.join(300)
        assert process.exitcode == 0
        accuracies[precision] = [float(row["test_primary_accuracy"]) for row in curves(precision)]
    assert accuracies["bf16"] != accuracies["fp32"]
    assert accuracies["bf16"][-1] > 0.15 and abs(accuracies["bf16"][-1] - accuracies["fp32"][-1]) < 0.1


# --- memory layout ------------------------------------------------------------------------------


def test_channels_last_is_the_same_up_to_rounding():
    weights = {}
    for channels_last in (False, True):
        net = acceleration.Acceleration(CPU, channels_last=channels_last).place(network().double())
        assert net.trunk.layers[3].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        optimizer = optimizer_of(net)
        for images, primary, auxiliary in batches(3):
            utils.multi_task_step(net, optimizer, images.double(), primary, auxiliary)
        weights[channels_last] = [p.detach() for p in net.parameters()]
    for plain, laid_out in zip(weights[False], weights[True]):
        assert torch.allclose(plain, laid_out, rtol=1e-9, atol=1e-12)


# --- CUDA graphs --------------------------------------------------------------------------------


class ReplayedOnCPU(acceleration.CapturedStep):
    """The same bookkeeping; a recording runs the step on the recorded inputs and fills the recorded outputs."""

    def __init__(self, step):
        super().__init__(step)
        self.recordings = []

    def _on_a_side_stream(self, args, options):
        return self.step(*args, **options)

    def _record(self, args, options):
        rates = [group["lr"] for group in args[1].param_groups]
        self.recordings.append((rates, options))
        outputs = {}

        def replay():
            now = [group["lr"] for group in args[1].param_groups]
            for group, rate in zip(args[1].param_groups, rates):
                group["lr"] = rate  # a graph knows the rate it was captured with
            outputs.update(self.step(*args, **options))
            for group, rate in zip(args[1].param_groups, now):
                group["lr"] = rate

        return replay, outputs


def train(step, device="cpu", iterations=24, momentum=0.0):
    """Some steps with a change of the learning rate and, now and then, another option: weights and losses."""
    net = network(width=1 / 16).to(device)
    optimizer = optimizer_of(net, momentum=momentum)
    losses = []
    for iteration, batch in enumerate(batches(iterations, device=device)):
        if iteration == iterations // 2:
            optimizer.param_groups[0]["lr"] /= 2
        metrics = step(net, optimizer, *batch, cosine=iteration % 3 == 0)
        assert ("cosine_similarity" in metrics) == (iteration % 3 == 0)
        losses.append(metrics["primary_loss"].clone())
    return [p.detach() for p in net.parameters()] + losses


def test_a_captured_step_makes_one_update_a_call_with_that_calls_batch_rate_and_options():
    captured = ReplayedOnCPU(utils.multi_task_step)
    for ours, theirs in zip(train(captured), train(utils.multi_task_step), strict=True):
        assert torch.equal(ours, theirs)
    wanted = [([rate], {"cosine": cosine}) for rate in (0.01, 0.005) for cosine in (False, True)]
    assert sorted(captured.recordings, key=str) == sorted(wanted, key=str)


def test_a_captured_step_records_anew_for_another_shape():
    captured, net = ReplayedOnCPU(single_step_of_two), network(width=1 / 16)
    optimizer = optimizer_of(net)
    for size in [10] * 5 + [12] * 5:
        ((images, primary, _),) = batches(1, size=size)
        captured(net, optimizer, images, primary)
    assert len(captured.recordings) == 2


def test_a_captured_step_takes_no_number_for_another_that_is_gone():
    """A positional number is part of the graph; a fresh one may lie where an earlier one lay, and have its id()."""

    def step(net, optimizer, images, gamma):
        return {"gamma": images.sum() * 0 + gamma}

    captured, net = ReplayedOnCPU(step), network(width=1 / 16)
    optimizer, images = optimizer_of(net), torch.zeros(2)
    for call in range(200):
        gamma = float(f"{call % 7}.5")
        assert captured(net, optimizer, images, gamma)["gamma"].item() == gamma
    assert len(captured.recordings) == 7


def test_a_step_that_draws_at_random_is_never_captured():
    """A graph would draw the same, or in the meta-gradient's second forward at θ1 something else, at every call."""

    def trained(step):
        net = network(width=1 / 16)
        net.trunk = nn.Sequential(net.trunk, nn.Dropout(0.5))
        optimizer = optimizer_of(net)
        for batch in batches(6):
            step(net, optimizer, *batch)
        return list(net.parameters())

    captured = ReplayedOnCPU(utils.multi_task_step)
    for ours, theirs in zip(trained(captured), trained(utils.multi_task_step), strict=True):
        assert torch.equal(ours, theirs)
    assert captured.recordings == []


def single_step_of_two(net, optimizer, images, primary):
    return utils.multi_task_step(net, optimizer, images, primary, primary)


@pytest.mark.cuda
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_captured_step_on_the_gpu_trains_as_the_plain_one(momentum):
    steps = acceleration.CapturedStep(utils.multi_task_step), utils.multi_task_step
    results = [train(step, "cuda", momentum=momentum) for step in steps]
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("method", maxl.META_GRADIENTS)
def test_captured_maxl_steps_on_the_gpu_train_as_the_plain_ones(method):
    psi, weights = [3] * 4, []
    for capture in (True, False):
        fast = acceleration.Acceleration(torch.device("cuda"), cuda_graphs=capture)
        net = fast.place(network(width=1 / 16))
        generator = maxl.LabelGenerator(utils.VGG16(1 / 16), psi)
        fast.place(utils.initialise(generator, nn.init.xavier_normal_))
        optimizer, label_optimizer = optimizer_of(net), optimizer_of(generator, 0.001)
        steps = fast.capture(maxl.auxiliary_training_step), fast.capture(maxl.meta_training_step)
        for images, primary, _ in batches(8, device="cuda"):
            steps[0](net, generator, optimizer, images, primary)
            steps[1](net, generator, optimizer, label_optimizer, images, primary, method=method)
        weights.append([p.detach() for module in (net, generator) for p in module.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [["--cuda-graphs"], ["--precision", "bf16", "--channels-last", "--cuda-graphs"]])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_learn_on_the_gpu_with_every_acceleration(name, options):
    assert run_script(name, "--quick", "--epochs", 4, "--precision", "tf32", *options, "--out", "r") == 0
    assert float(curves("r")[-1]["test_primary_accuracy"]) > 0.15
