"""Label learning: on labels and weights that are known, against a double backward, and from tiny runs."""

import math

import pytest
import torch
from conftest import TINY, run_script

import create_dataset
import maxl
import model_vgg_maxl
from experiments import label_learning, trained
from experiments.runner import report

NAN = math.nan
pytestmark = pytest.mark.usefixtures("spared")


def tiny_run(name, *options):
    few = [*TINY, "--train-images", "300", "--epochs", "1"]
    assert run_script("model_vgg_maxl", *few, "--out", f"r/{name}", *options) == 0


def test_entropy_and_agreement_by_hand():
    labels = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0, 0.5, 0.5, 0], [NAN] * 4])
    assert label_learning.entropy(labels) == pytest.approx((math.log(4) + 0 + math.log(2)) / 3)
    one = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.9, 0.1], [NAN, NAN], [0.9, 0.1]])
    other = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.9, 0.1], [NAN, NAN]])
    assert label_learning.agreement(one, other) == pytest.approx(100 * 2 / 3)


class Brightest(torch.nn.Module):
    """A label of its own for each grey: one-hot at the image's greatest value."""

    mask = torch.zeros(1, 250)

    def forward(self, images, primary):
        values = ((images.flatten(1).amax(dim=1) * 0.2 + 0.5) * 255).round().long()
        return torch.nn.functional.one_hot(values, 250).float()


def test_each_label_is_its_images_own_and_those_of_a_smaller_last_batch_are_unknown():
    grey = torch.arange(250, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    train = create_dataset.Split(grey, torch.arange(250)[:, None])
    labels = label_learning.generated(Brightest(), train, 0, seed=0)
    known = ~labels.isnan().any(dim=1)
    assert known.sum() == 200 and torch.equal(labels[known].argmax(dim=1), torch.arange(250)[known])


def test_pulls_are_those_of_a_double_backward_in_float64(monkeypatch):
    """∇_θ2 L_pri(θ1⁺) and λ ∇_θ2 Σ_k ȳ_k log ȳ_k on three batches, multiplied pair by pair; weight decay times θ2."""
    monkeypatch.setattr(label_learning, "BATCH_SIZE", 6)
    monkeypatch.setattr(label_learning, "BATCHES", 3)
    monkeypatch.setattr(create_dataset, "scale", lambda images: images.double() / 255)
    images = torch.randint(256, (20, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train = create_dataset.Split(images, (torch.arange(20) % 2)[:, None])
    settings = model_vgg_maxl.parse(["--width", "0.0625", "--entropy-weight", "0.7", "--seed", "1"])
    settings.primary_level, settings.psi, settings.label_weight_decay = 0, [2, 3], 0.01
    networks = [network.double() for network in model_vgg_maxl.make_networks(settings).values()]
    found = label_learning.pulls(trained.Trained(*networks, settings), train, step_length=0.1, seed=5)

    generator, optimizer = networks[1], torch.optim.SGD(networks[0].parameters(), lr=0.1)
    theta2, seen = list(generator.parameters()), {"pull_meta": [], "pull_entropy": []}
    for batch, targets in train.train_batches(6, torch.Generator().manual_seed(5)):
        meta, _ = maxl.meta_gradient(
            *networks, optimizer, batch, targets[:, 0], entropy_weight=None, method="double-backward"
        )  # fmt: skip
        mean = generator(batch, targets[:, 0]).mean(dim=0)
        spread = torch.autograd.grad(0.7 * (mean * mean.log()).sum(), theta2)
        for name, gradients in (("pull_meta", meta), ("pull_entropy", spread)):
            seen[name].append(torch.cat([g.flatten() for g in gradients]))
    for name, (a, b, c) in seen.items():
        assert found[name] == pytest.approx(math.sqrt(max(0.0, (a @ b + b @ c + c @ a).item() / 3)), rel=1e-8)
        assert found[name] > 0
    assert found["one_batch_meta"] ** 2 == pytest.approx(sum((g @ g).item() for g in seen["pull_meta"]) / 3)
    assert found["pull_decay"] == pytest.approx(0.01 * torch.cat([p.flatten() for p in theta2]).norm().item())


def test_how_far_the_weights_have_moved_by_hand():
    """Three steps of rate 0.1 and decay 0.5 leave 0.95³ of (3, 4); the rest of the way to (2, 4)."""
    first, now = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    for module, weights in ((first, [3.0, 4.0]), (now, [2.0, 4.0])):
        module.weight.data = torch.tensor([weights], dtype=torch.float64)
    found = label_learning.moved(now, first, rates=[0.1], iterations=3, weight_decay=0.5)
    left = 0.95**3
    assert found["moved_by_decay"] == pytest.approx(5 * (1 - left))
    assert found["moved_else"] == pytest.approx(math.hypot(2 - 3 * left, 4 - 4 * left))


def test_a_label_generator_that_learns_nothing_is_as_at_the_start(monkeypatch):
    """And one that learns at a great rate is not."""
    monkeypatch.setattr(label_learning, "BATCH_SIZE", 20)
    tiny_run("maxl-20-100-seed0", "--label-learning-rate", "0")
    tiny_run("maxl0-20-100-seed0", "--entropy-weight", "0", "--label-learning-rate", "3")
    monkeypatch.setattr(report, "MAY_DIFFER", report.MAY_DIFFER | {"label_learning_rate"})
    settings, _ = label_learning.experiment.parse(["--plot", "--out", "r", "--seeds", "0", "1"])
    _, (still, moved), text = label_learning.make_report(settings)
    assert (still["method"], moved["method"]) == ("MAXL", "MAXL (λ = 0)")
    assert float(still["as_at_start_mean"]) == 100 and still["entropy_mean"] == still["entropy_at_start_mean"]
    assert float(moved["as_at_start_mean"]) < 95 and moved["entropy_mean"] != moved["entropy_at_start_mean"]
    assert float(moved["pull_entropy_mean"]) == 0 < float(still["pull_entropy_mean"])
    assert still["entropy_at_start_mean"] == moved["entropy_at_start_mean"]
    assert float(still["moved_else_mean"]) < 1e-4 < float(moved["moved_else_mean"])
    assert "seed 1 not run" in text
