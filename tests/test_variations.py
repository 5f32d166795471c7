"""Appendix E's variations: each against its formula or a plain double backward, and as a script."""

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, assert_same_run, curves, shortcuts
from reference import focal, reference_gradient

import create_dataset
import maxl
import model_vgg_maxl
import utils
from experiments.methods import variations
from harness import exits

PSI = [2, 3, 4]
FEW = [*TINY, "--epochs", "2", "--primary-level", "0", "--psi", "2,3,4"]  # 120 images in batches of 20


def run(*arguments):
    """main() of the script under exits.run_main, with a few generated images; returns the exit code."""
    with shortcuts():
        return exits.run_main(variations.main, [*FEW, *arguments])


class Trunk(nn.Module):
    """A smooth one with BatchNorm: images (B, 3, 4, 4) -> features (B, 5)."""

    feature_size = 5

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(48, 5), nn.BatchNorm1d(5)

    def forward(self, images):
        return self.norm(self.linear(images.flatten(1))).tanh()


def batch(size=12):
    return torch.randn(size, 3, 4, 4, dtype=torch.float64), torch.arange(size) % len(PSI)


def squared_error(outputs, latents):
    return ((outputs - latents) ** 2).sum() / outputs.numel()


@pytest.mark.parametrize("method", maxl.META_GRADIENTS)
@pytest.mark.parametrize("variant", ["no-mask", "latent", "same-iteration", "validation"])
def test_the_meta_gradient_is_a_double_backward(variant, method):
    """In the step that the script makes of its settings; same-iteration's at θ1 as its first update left it."""
    torch.manual_seed(0)
    latent = variant == "latent"
    network = maxl.Network(Trunk(), 3, 9).double()
    generator = (variations.LatentGenerator(Trunk(), 9) if latent else maxl.LabelGenerator(Trunk(), PSI)).double()
    if variant == "no-mask":
        generator.mask.fill_(True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    label_optimizer = torch.optim.SGD(generator.parameters(), lr=0.001)
    settings = variations.parse([*FEW, "--variant", variant, "--meta-gradient", method, "--entropy-weight", "0.5"])
    training, held_out = batch(), batch(8)
    held_labels = held_out[1][:, None].expand(-1, 4)
    steps = variations.make_steps(
        settings, network, generator, optimizer, label_optimizer, iter([(held_out[0], held_labels)])
    )
    at_first = copy.deepcopy(network)
    if variant == "same-iteration":
        steps[0](*training, 0)
        assert not torch.equal(network.heads[0][2].weight, at_first.heads[0][2].weight)
    before = copy.deepcopy(network), copy.deepcopy(generator)
    judged_on = held_out if variant == "validation" else training
    other = {"auxiliary": squared_error, "entropy_weight": 0.0} if latent else {"entropy_weight": 0.5}
    networks = copy.deepcopy(before)
    expected = reference_gradient(*networks, *training, alpha=0.3, judged_on=judged_on, **other)
    numbers = steps[1](*training, 0)
    whole = torch.cat([g.flatten() for g in expected]).norm()
    assert whole > 1e-6
    for parameter, gradient, old in zip(generator.parameters(), expected, before[1].parameters()):
        assert (parameter.grad - gradient).norm() <= 1e-9 * whole
        assert torch.equal(parameter, old - 0.001 * parameter.grad)
    before[0](training[0])  # running statistics are those after one forward on the training batch
    for (name, ours), theirs in zip(network.state_dict().items(), before[0].state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert ("mean_label_entropy" in numbers) == (not latent)


def test_the_focal_loss_with_gamma_0_is_the_cross_entropy():
    """With logits so far apart that many a SoftMax is 0 or 1."""
    torch.manual_seed(0)
    logits = (100 * torch.randn(40, 9)).requires_grad_()
    for labels in (torch.arange(40) % 9, torch.rand(40, 9).softmax(dim=1)):
        losses = maxl.focal_loss(logits, labels, 0.0), F.cross_entropy(logits, labels)
        assert torch.allclose(*losses, rtol=1e-6)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
        assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)
    gammas = {variant: variations.parse(["--variant", variant]).focal_gamma for variant in variations.VARIANTS}
    assert gammas == dict.fromkeys(variations.VARIANTS, 2.0) | {"cross-entropy": 0.0}


def test_without_mask_a_label_is_the_softmax_over_all_classes():
    settings = variations.parse([*FEW, "--variant", "no-mask"])
    generator = variations.make_networks(settings)["label_generator"]
    images, primary = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    labels, logits = generator(images, primary), generator.head(generator.trunk(images))
    assert torch.allclose(labels, logits.softmax(dim=1)) and torch.equal(labels, generator(images, primary.flip(0)))


def test_the_latent_variations_multi_task_step_is_sgd_on_focal_loss_and_squared_error():
    torch.manual_seed(0)
    network = maxl.Network(Trunk(), 3, 7).double()
    (images, primary), latents = batch(), torch.randn(12, 7, dtype=torch.float64)
    logits, outputs = network(images)
    loss = focal(logits, primary, gamma=2.0) + 0.5 * squared_error(outputs, latents)
    gradients, before = torch.autograd.grad(loss, list(network.parameters())), copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    loss = functools.partial(variations.latent_loss, auxiliary_weight=0.5)
    maxl.multi_task_step(network, optimizer, images, primary, latents, loss)
    for ours, old, gradient in zip(network.parameters(), before.parameters(), gradients):
        assert torch.allclose(ours, old - 0.3 * gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options, size", [([], 9), (["--latent-size", "4"], 4)])
def test_a_latent_vector_is_as_long_as_there_are_auxiliary_classes_or_as_asked(options, size):
    networks = variations.make_networks(variations.parse([*FEW, "--variant", "latent", *options]))
    assert networks["network"].heads[1][2].out_features == networks["label_generator"].head[2].out_features == size


# --- same-iteration and validation: what an epoch does with the batches ---------------------------------


def numbered_images(count=200):
    """A Split: image n is of the grey value n + 1 all over, which no crop, mirror or black border hides."""
    grey = torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    return create_dataset.Split(grey, create_dataset.LABELS_OF_FINE_CLASS[torch.arange(count) % 100])


def numbers_of(images):
    return (images.amax(dim=(1, 2, 3)) * 0.2 + 0.5).mul(255).round().long().tolist()


@pytest.fixture
def seen(monkeypatch):
    """[(step, images' numbers, numbers of held-out images)] of a run on numbered images, and the passes that settle."""
    steps, settled = [], []
    originals = {name: getattr(maxl, name) for name in ("multi_task_step", "meta_training_step")}

    def multi_task_step(network, optimizer, images, *arguments):
        steps.append(("multi-task", numbers_of(images), []))
        return originals["multi_task_step"](network, optimizer, images, *arguments)

    def meta_training_step(*arguments, judged_on=None, **options):
        held = [] if judged_on is None else numbers_of(judged_on[0])
        if held:
            expected = create_dataset.LABELS_OF_FINE_CLASS[(torch.tensor(held) - 1) % 100][:, 0]
            assert torch.equal(judged_on[1], expected)
        steps.append(("meta", numbers_of(arguments[4]), held))
        return originals["meta_training_step"](*arguments, judged_on=judged_on, **options)

    monkeypatch.setattr(maxl, "multi_task_step", multi_task_step)
    monkeypatch.setattr(maxl, "meta_training_step", meta_training_step)
    monkeypatch.setattr(create_dataset, "load", lambda *_: (numbered_images(), numbered_images()))
    monkeypatch.setattr(utils, "settle_statistics", lambda *_, **__: settled.append(len(steps)))
    return steps, settled


def test_same_iteration_updates_both_networks_on_each_batch_and_settles_before_the_test(seen):
    assert run("--variant", "same-iteration", "--epochs", "1", "--out", "r") == 0
    steps, settled = seen
    assert [name for name, *_ in steps] == ["multi-task", "meta"] * 10 and settled == [20]
    assert all(one[1] == other[1] for one, other in zip(steps[::2], steps[1::2])) and steps[0][1] != steps[2][1]
    (row,) = curves("r", with_seconds=True)
    assert "seconds_meta" not in row and "train_lookahead_primary_loss" in row


def test_the_multi_task_network_never_learns_a_validation_image(seen):
    options = ["--train-images", "200", "--batch-size", "30", "--validation-share", "0.4", "--seed", "2"]
    assert run("--variant", "validation", *options, "--out", "r") == 0
    steps, _ = seen
    held_out = set(numbers_of(next(variations.hold_out(numbered_images(), 0.4, seed=2)[1].test_batches(200))[0]))
    used = [number for name, images, _ in steps for number in images]
    judged_on = [number for _, _, held in steps for number in held]
    assert len(held_out) == 80 and set(judged_on) <= held_out and not held_out & set(used)
    assert len(used) == 2 * len(judged_on) == 2 * 2 * 120  # 2 epochs of 4 batches of 30 of 120 images
    assert len(set(judged_on[:60])) == 60, "no image again before the pass over them is through"


@pytest.mark.parametrize("share, each", [(0.5, [1, 1]), (0.25, [0, 1]), (0.8, [1, 2])])
def test_held_out_images_are_balanced_from_the_seed_and_no_others(share, each):
    split = numbered_images()
    train, held_out = variations.hold_out(split, share, seed=3)
    counts = torch.bincount(held_out.labels[:, 3], minlength=100)
    assert len(held_out) == 200 * share and [counts.min(), counts.max()] == each
    ours, theirs = (numbers_of(next(part.test_batches(200))[0]) for part in (train, held_out))
    assert sorted(ours + theirs) == list(range(1, 201))
    for part, grey in ((train, ours), (held_out, theirs)):  # each image kept its labels
        assert torch.equal(part.labels, split.labels[torch.tensor(grey) - 1])
    again, other = (variations.hold_out(split, share, seed)[1].padded for seed in (3, 4))
    assert torch.equal(again, held_out.padded) and not torch.equal(other, held_out.padded)


# --- as a script ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["latent", "validation"])
def test_a_variant_stopped_and_resumed_is_the_same_to_the_bit(variant):
    assert run("--variant", variant, "--out", "whole") == 0
    assert run("--variant", variant, "--out", "parts", "--epochs", "1") == 0
    torch.manual_seed(123)
    assert run("--variant", variant, "--out", "parts", "--resume") == 0
    assert_same_run("whole", "parts")


def test_what_a_variant_does_not_change_is_maxls_to_the_bit(monkeypatch):
    """The first pass of the first epoch, where validation holds out none of the images that it trains on."""
    monkeypatch.setattr(variations, "hold_out", lambda split, share, seed: (split, split))
    assert run("--variant", "validation", "--epochs", "1", "--out", "r") == 0
    with shortcuts():
        assert exits.run_main(model_vgg_maxl.main, [*FEW, "--epochs", "1", "--out", "maxl"]) == 0
    (ours,), (theirs,) = curves("r"), curves("maxl")
    for column in ours:
        assert ours[column] == theirs[column] or column.startswith("meta_"), column


@pytest.mark.parametrize("arguments, said", [
    (["--variant", "latent", "--latent-size", "0"], "--latent-size 0 is out of range; give 1 or more"),
    (["--variant", "validation", "--validation-share", "1"], "--validation-share 1.0 is out of range"),
    (["--variant", "validation", "--validation-share", "0.9"], "parts 120 training images into 12 and 108"),
])  # fmt: skip
def test_a_variants_bad_input_is_one_sentence_and_nothing_is_written(arguments, said, capsys):
    assert run(*arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert list(Path(".").iterdir()) == []
