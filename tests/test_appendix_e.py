"""Appendix E: each variation against its formula or a double backward written here, and as a script."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, assert_same_run, curves, shortcuts

import create_dataset
import model_vgg_maxl as maxl
import utils
from experiments.methods import variations as maxl_variations
from experiments.methods import variations as model_vgg_maxl_variants
from harness import exits
from harness.run import Run

VARIANTS = model_vgg_maxl_variants.VARIANTS
PSI = [2, 3, 4]
FEW = [*TINY, "--epochs", "2", "--primary-level", "0", "--psi", "2,3,4"]  # 120 images in batches of 20


def run(*arguments):
    """main() of the script under exits.run_main, with a few generated images; returns the exit code."""
    with shortcuts():
        return exits.run_main(model_vgg_maxl_variants.main, [*FEW, *arguments])


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


def optimizers(network, label_generator):
    return torch.optim.SGD(network.parameters(), lr=0.3), torch.optim.SGD(label_generator.parameters(), lr=0.001)


# --- the double backward of these tests, every layer written out ----------------------------------------


def forward(theta, images):
    """Logits of both heads of utils.Network(Trunk(), ...) in training mode, from its parameters by name."""
    x = images.flatten(1) @ theta["trunk.linear.weight"].T + theta["trunk.linear.bias"]
    x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()
    x = (theta["trunk.norm.weight"] * x + theta["trunk.norm.bias"]).tanh()
    heads = []
    for head in ("heads.0", "heads.1"):
        hidden = (x @ theta[f"{head}.0.weight"].T + theta[f"{head}.0.bias"]).relu()
        heads.append(hidden @ theta[f"{head}.2.weight"].T + theta[f"{head}.2.bias"])
    return heads


def focal(logits, labels):
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    return -(labels * (1 - p) ** 2 * p.log()).sum() / len(logits)


def double_backward(network, label_generator, auxiliary_loss, batch, judged_on, alpha, entropy_weight=0.0):
    """∇_θ2 L_pri(θ1⁺) on `judged_on`, θ1⁺ a step on `batch`, + λ𝓗; L_pri(θ1⁺). auxiliary_loss: (outputs, labels)."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    hot = torch.eye(len(PSI), dtype=torch.float64)
    labels = label_generator(*batch)
    primary_logits, outputs = forward(theta, batch[0])
    loss = focal(primary_logits, hot[batch[1]]) + auxiliary_loss(outputs, labels)
    gradients = torch.autograd.grad(loss, theta.values(), create_graph=True)
    plus = {name: p - alpha * g for (name, p), g in zip(theta.items(), gradients)}
    lookahead = focal(forward(plus, judged_on[0])[0], hot[judged_on[1]])
    objective = lookahead
    if entropy_weight:
        mean = labels.sum(dim=0) / len(labels)
        objective = lookahead + entropy_weight * (mean * mean.log()).sum()
    return torch.autograd.grad(objective, label_generator.parameters()), lookahead


def assert_learned_by(label_generator, expected, before):
    """The step was plain SGD at 0.001 along the expected gradients."""
    whole = torch.cat([g.flatten() for g in expected]).norm()
    assert whole > 1e-6
    for parameter, gradient, old in zip(label_generator.parameters(), expected, before.parameters()):
        assert (parameter.grad - gradient).norm() <= 1e-9 * whole
        assert torch.equal(parameter, old - 0.001 * parameter.grad)


def assert_untouched_but_for_one_forward(network, before, images):
    """Weights as they were, no gradients; running statistics as after one forward on these images."""
    before(images)
    for (name, ours), theirs in zip(network.state_dict().items(), before.state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert all(p.grad is None for p in network.parameters())


# --- cross-entropy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_focal_loss_with_gamma_0_is_the_cross_entropy_to_the_bit_and_so_is_its_gradient(scale):
    torch.manual_seed(0)
    logits = (scale * torch.randn(40, 9)).requires_grad_()
    hard, soft = torch.arange(40) % 9, torch.rand(40, 9).softmax(dim=1)
    losses = utils.focal_losses(logits, gamma=0.0)
    ours, theirs = losses.gather(1, hard[:, None])[:, 0], F.cross_entropy(logits, hard, reduction="none")
    assert torch.equal(ours, theirs)
    for loss in (ours, theirs):
        loss.sum().backward(retain_graph=True)
    assert logits.grad.isfinite().all()
    gradients = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (ours, theirs)]
    assert torch.equal(*gradients)
    for labels in (hard, soft):
        assert torch.allclose(utils.focal_loss(logits, labels, 0.0), F.cross_entropy(logits, labels), rtol=1e-6)


def test_cross_entropy_sets_gamma_to_0_and_the_others_leave_it_at_2():
    gammas = {variant: model_vgg_maxl_variants.parse(["--variant", variant]).focal_gamma for variant in VARIANTS}
    assert gammas == dict.fromkeys(VARIANTS, 2.0) | {"cross-entropy": 0.0}


def test_every_loss_of_the_cross_entropy_variation_has_gamma_0(monkeypatch):
    original, gammas = utils.focal_losses, set()
    monkeypatch.setattr(utils, "focal_losses", lambda logits, gamma=2.0: gammas.add(gamma) or original(logits, gamma))
    assert run("--variant", "cross-entropy", "--epochs", "1", "--out", "r") == 0
    assert gammas == {0.0}


# --- no-mask --------------------------------------------------------------------------------------------


def test_without_mask_a_label_is_the_softmax_over_all_classes():
    torch.manual_seed(0)
    generator = maxl_variations.UnmaskedLabelGenerator(Trunk(), PSI).double()
    images, primary = batch()
    labels = generator(images, primary)
    logits = generator.head(generator.trunk(images))
    assert torch.allclose(labels, logits.exp() / logits.exp().sum(dim=1, keepdim=True), rtol=1e-12)
    outside = labels.masked_fill(maxl.hierarchy_mask(PSI)[primary], 0).sum(dim=1)
    assert (outside > 0.1).all() and (labels > 0).all()
    assert torch.allclose(labels.sum(dim=1), torch.ones(12, dtype=torch.float64))
    assert torch.equal(labels, generator(images, primary.flip(0)))


def test_without_mask_the_forward_mode_gradient_is_a_double_backward():
    torch.manual_seed(0)
    network = utils.Network(Trunk(), 3, 9).double()
    generator = maxl_variations.UnmaskedLabelGenerator(Trunk(), PSI).double()
    before = copy.deepcopy(generator)
    expected, _ = double_backward(network, copy.deepcopy(generator), focal, *[b := batch(), b], 0.3, 0.2)
    maxl.meta_training_step(network, generator, *optimizers(network, generator), *b, entropy_weight=0.2)
    assert_learned_by(generator, expected, before)


# --- latent ---------------------------------------------------------------------------------------------


def test_the_latent_variations_gradient_is_a_double_backward():
    torch.manual_seed(0)
    network = utils.Network(Trunk(), 3, 7).double()
    generator = maxl_variations.LatentGenerator(Trunk(), 7).double()
    images, primary = batch()
    before = copy.deepcopy(network), copy.deepcopy(generator)

    def mean_squared_error(outputs, latents):
        return ((outputs - latents) ** 2).sum() / (12 * 7)

    both = (images, primary), (images, primary)
    expected, lookahead = double_backward(network, copy.deepcopy(generator), mean_squared_error, *both, 0.3)
    metrics = maxl_variations.latent_meta_step(network, generator, *optimizers(network, generator), images, primary)
    assert_learned_by(generator, expected, before[1])
    assert_untouched_but_for_one_forward(network, before[0], images)
    assert metrics["lookahead_primary_loss"].item() == pytest.approx(lookahead.item(), rel=1e-12)
    assert metrics.keys() == {"lookahead_primary_loss"}


@pytest.mark.parametrize("cosine", [False, True])
def test_the_latent_variations_multi_task_step_is_sgd_on_focal_loss_and_squared_error(cosine):
    torch.manual_seed(0)
    network = utils.Network(Trunk(), 3, 7).double()
    (images, primary), latents = batch(), torch.randn(12, 7, dtype=torch.float64)
    theta = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    logits, outputs = forward(theta, images)
    error = ((outputs - latents) ** 2).sum() / (12 * 7)
    loss = focal(logits, torch.eye(3, dtype=torch.float64)[primary]) + error
    gradients = torch.autograd.grad(loss, theta.values())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    metrics = maxl_variations.latent_training_step(network, optimizer, images, primary, latents, cosine=cosine)
    for ours, old, gradient in zip(network.parameters(), theta.values(), gradients):
        assert torch.allclose(ours, old - 0.3 * gradient, rtol=1e-10, atol=1e-12)
    assert metrics["auxiliary_squared_error"].item() == pytest.approx(error.item(), rel=1e-12)
    assert ("trunk_cosine_similarity" in metrics) == cosine


def test_a_latent_vector_is_as_long_as_there_are_auxiliary_classes_or_as_asked():
    parse = model_vgg_maxl_variants.parse
    assert parse(["--variant", "latent"]).latent_size == 100
    assert parse(["--variant", "latent", "--primary-level", "0", "--psi", "2,3,4"]).latent_size == 9
    assert run("--variant", "latent", "--latent-size", "4", "--epochs", "1", "--out", "r") == 0
    parts = torch.load("r/checkpoint.pt", weights_only=True)["parts"]
    assert len(parts["network"]["heads.1.2.bias"]) == len(parts["label_generator"]["head.2.bias"]) == 4


# --- same-iteration -------------------------------------------------------------------------------------


def test_each_batch_updates_the_multi_task_network_and_then_the_label_generator_at_its_new_weights():
    """Against the two steps made by hand, one after the other."""
    torch.manual_seed(0)
    parts = utils.Network(Trunk(), 3, 9).double(), maxl.LabelGenerator(Trunk(), PSI).double()
    by_hand, at_the_old_weights = copy.deepcopy(parts), copy.deepcopy(parts)
    (images, primary), options = batch(), {"gamma": 2.0, "entropy_weight": 0.2}
    optimizer, label_optimizer = optimizers(*parts)
    step = maxl_variations.both_steps(
        maxl.auxiliary_training_step, maxl.meta_training_step, *parts, label_optimizer, **options
    )
    metrics, auxiliary = step(*parts, optimizer, images, primary, gamma=2.0, cosine=False)

    with torch.no_grad():
        labels = by_hand[1](images, primary)
    theirs = optimizers(*by_hand)
    utils.multi_task_step(by_hand[0], theirs[0], images, primary, labels)
    expected, _ = double_backward(by_hand[0], by_hand[1], focal, (images, primary), (images, primary), 0.3, 0.2)
    for ours, other in zip(parts[0].parameters(), by_hand[0].parameters()):
        assert torch.equal(ours, other)
    assert_learned_by(parts[1], expected, by_hand[1])
    other, _ = double_backward(*at_the_old_weights, focal, (images, primary), (images, primary), 0.3, 0.2)
    assert not all(torch.allclose(p.grad, g, rtol=1e-3) for p, g in zip(parts[1].parameters(), other))
    assert {"primary_loss", "label_entropy", "lookahead_primary_loss", "mean_label_entropy"} <= metrics.keys()
    assert torch.equal(auxiliary, labels.argmax(dim=1))


def test_an_epoch_is_one_pass_of_both_steps_on_the_same_batch(monkeypatch):
    seen, weights, iterations, epochs = [], [], [], Run.epochs
    monkeypatch.setattr(Run, "epochs", lambda self, n, *a, **k: iterations.append(n) or epochs(self, n, *a, **k))

    def spy(name, step):
        def spied(network, label_generator, *parts, **options):
            seen.append((name, next(part for part in parts if torch.is_tensor(part)).clone()))
            result = step(network, label_generator, *parts, **options)
            weights.append([copy.deepcopy(module.state_dict()) for module in (network, label_generator)])
            return result

        return spied

    for name in ("auxiliary_training_step", "meta_training_step"):
        monkeypatch.setattr(model_vgg_maxl_variants, name, spy(name, getattr(maxl, name)))
    settled = []
    monkeypatch.setattr(utils, "settle_statistics", lambda *parts, **options: settled.append(len(seen)))
    assert run("--variant", "same-iteration", "--epochs", "1", "--out", "r") == 0
    names, images = zip(*seen)
    assert iterations == [6] and settled == [12], "before the test, as MAXL's second pass does"
    assert names == ("auxiliary_training_step", "meta_training_step") * 6
    assert all(torch.equal(a, b) for a, b in zip(images[::2], images[1::2]))
    assert not torch.equal(images[0], images[2])
    head, label_head = "heads.0.2.weight", "head.2.weight"
    for before, after in zip(weights[1::2], weights[2::2]):  # of a multi-task step
        assert not torch.equal(before[0][head], after[0][head])
        assert torch.equal(before[1][label_head], after[1][label_head])
    for before, after in zip(weights[::2], weights[1::2]):  # of a meta-training step
        assert torch.equal(before[0][head], after[0][head])
        assert not torch.equal(before[1][label_head], after[1][label_head])
    (row,) = curves("r", with_seconds=True)
    assert "seconds_meta" not in row and "train_lookahead_primary_loss" in row


# --- validation -----------------------------------------------------------------------------------------


def test_the_validation_variations_gradient_is_a_double_backward_judged_on_the_other_batch():
    torch.manual_seed(0)
    network, generator = utils.Network(Trunk(), 3, 9).double(), maxl.LabelGenerator(Trunk(), PSI).double()
    training, held_out = batch(), batch(8)
    before = copy.deepcopy(network), copy.deepcopy(generator)
    expected, lookahead = double_backward(network, copy.deepcopy(generator), focal, training, held_out, 0.3, 0.2)
    same, _ = double_backward(network, copy.deepcopy(generator), focal, training, training, 0.3, 0.2)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(expected, same))
    step = maxl_variations.validation_meta_step
    metrics = step(network, generator, *optimizers(network, generator), *training, *held_out, entropy_weight=0.2)
    assert_learned_by(generator, expected, before[1])
    assert_untouched_but_for_one_forward(network, before[0], training[0])
    assert metrics["lookahead_primary_loss"].item() == pytest.approx(lookahead.item(), rel=1e-12)
    mean = before[1](*training).mean(dim=0)
    assert metrics["mean_label_entropy"].item() == pytest.approx(-(mean * mean.log()).sum().item(), rel=1e-12)


def numbered_images(train=True, count=200):
    """Image n is of the grey value n + 1 all over, which no crop, mirror or black border hides."""
    grey = torch.arange(1, count + 1).to(torch.uint8)[:, None, None, None]
    return grey.expand(-1, 32, 32, 3).numpy(), create_dataset.LABELS_OF_FINE_CLASS[torch.arange(count) % 100]


def numbers(images):
    return (images.amax(dim=(1, 2, 3)) * 0.2 + 0.5).mul(255).round().long().tolist()


@pytest.mark.parametrize("share, each", [(0.5, [1, 1]), (0.25, [0, 1]), (0.8, [1, 2])])
def test_held_out_images_are_balanced_from_the_seed_and_no_others(share, each):
    split = create_dataset.Split(*numbered_images())
    train, held_out = maxl_variations.hold_out(split, share, seed=3)
    assert len(held_out) == 200 * share and len(split) == 200
    counts = torch.bincount(held_out.labels[:, 3], minlength=100)
    assert [counts.min(), counts.max()] == each
    ours, theirs = (numbers(next(part.test_batches(200))[0]) for part in (train, held_out))
    assert sorted(ours + theirs) == list(range(1, 201))
    for part, grey in ((train, ours), (held_out, theirs)):  # each image kept its labels
        assert torch.equal(part.labels, split.labels[torch.tensor(grey) - 1])
    again, other = (maxl_variations.hold_out(split, share, seed)[1].padded for seed in (3, 4))
    assert torch.equal(again, held_out.padded) and not torch.equal(other, held_out.padded)


def test_the_multi_task_network_never_learns_a_validation_image(monkeypatch):
    monkeypatch.setattr(create_dataset, "load", lambda *_: [create_dataset.Split(*numbered_images())] * 2)
    seen = {"auxiliary": [], "meta": [], "held out": []}

    def auxiliary_step(network, label_generator, optimizer, images, primary, **options):
        seen["auxiliary"] += numbers(images)
        return maxl.auxiliary_training_step(network, label_generator, optimizer, images, primary, **options)

    def meta_step(*parts, **options):
        *_, images, primary, held_images, held_primary = parts
        seen["meta"] += numbers(images)
        seen["held out"] += numbers(held_images)
        levels = create_dataset.LABELS_OF_FINE_CLASS[(torch.tensor(numbers(held_images)) - 1) % 100]
        assert torch.equal(held_primary, levels[:, 0])
        return maxl_variations.validation_meta_step(*parts, **options)

    monkeypatch.setitem(model_vgg_maxl_variants.STEPS, "validation", (auxiliary_step, meta_step))
    arguments = ["--train-images", "200", "--batch-size", "30", "--validation-share", "0.4", "--seed", "2"]
    assert run("--variant", "validation", *arguments, "--out", "r") == 0
    split = create_dataset.Split(*numbered_images())
    held_out = set(numbers(next(maxl_variations.hold_out(split, 0.4, seed=2)[1].test_batches(200))[0]))
    assert len(held_out) == 80 and set(seen["held out"]) <= held_out
    assert not held_out & {*seen["auxiliary"], *seen["meta"]}
    assert all(len(images) == 2 * 120 for images in seen.values())  # 2 epochs of 4 batches of 30 of 120 images
    assert len(set(seen["held out"][:60])) == 60, "no image again before the pass over them is through"


# --- as a script ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_runs_and_stopped_and_resumed_is_the_same_to_the_bit(variant):
    assert run("--variant", variant, "--out", "whole") == 0
    assert run("--variant", variant, "--out", "parts", "--epochs", "1") == 0
    torch.manual_seed(123)
    assert run("--variant", variant, "--out", "parts", "--resume") == 0
    assert_same_run("whole", "parts")
    settings = json.loads(Path("whole/settings.json").read_text())
    assert settings["variant"] == variant
    for row in curves("whole"):  # nats; a masked label has at most log 4
        assert variant == "latent" or (float(row["train_label_entropy"]) > 1.387) == (variant == "no-mask")
    assert settings["command"].startswith("python -m experiments.methods.variations --dataset synthetic")
    assert run("--variant", "no-mask" if variant == "latent" else "latent", "--out", "parts", "--resume") == 2


def test_what_a_variant_does_not_change_is_maxls_to_the_bit(monkeypatch):
    """The first pass of the first epoch, where validation holds out none of the images that it trains on."""
    monkeypatch.setattr(model_vgg_maxl_variants, "hold_out", lambda split, share, seed: (split, split))
    assert run("--variant", "validation", "--epochs", "1", "--out", "r") == 0
    with shortcuts():
        assert exits.run_main(maxl.main, [*FEW, "--epochs", "1", "--out", "maxl"]) == 0
    (ours,), (theirs,) = curves("r"), curves("maxl")
    assert ours.keys() == theirs.keys()
    for column in ours:
        assert ours[column] == theirs[column] or column.startswith("meta_"), column


BAD = [
    ([], "the following arguments are required: --variant"),
    (["--variant", "focal"], "invalid choice: 'focal'"),
    (["--variant", "latent", "--latent-size", "0"], "--latent-size 0 is out of range; give 1 to 10000"),
    (["--variant", "latent", "--latent-size", "2.5"], "invalid int value: '2.5'"),
    (["--variant", "no-mask", "--latent-size", "9"], "--latent-size is an option of --variant latent alone"),
    (["--variant", "latent", "--validation-share", "0.1"], "--validation-share is an option of --variant validation"),
    (["--variant", "validation", "--validation-share", "nan"], "--validation-share nan is out of range"),
    (["--variant", "validation", "--validation-share", "1"], "--validation-share 1.0 is out of range"),
    (["--variant", "validation", "--validation-share", "0.9"], "parts 120 training images into 12 and 108"),
    (["--variant", "validation", "--validation-share", "0.001"], "parts 120 training images into 120 and 0"),
    (["--variant", "latent", "--psi", "5,5"], "psi has 2 numbers, but primary level 0 has 3 classes"),
    (["--variant", "no-mask", "--meta-gradient", "forward-mode"], "unrecognized arguments: --meta-gradient"),
]


@pytest.mark.parametrize("arguments, said", BAD, ids=lambda v: " ".join(v) if type(v) is list else "")
def test_a_variants_bad_input_is_one_sentence_and_nothing_is_written(arguments, said, capsys):
    assert run(*arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert list(Path(".").iterdir()) == []
