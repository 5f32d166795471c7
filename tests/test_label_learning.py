"""Label learning: on labels and weights that are known, and from tiny runs."""

import argparse
import copy
import math

import pytest
import torch
from conftest import TINY, run_script

import create_dataset
import maxl
from experiments import label_learning
from experiments.trained import Trained

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


class Means(torch.nn.Module):
    """A smooth trunk in float64: a weighted sum of the image's four quarters."""

    feature_size = 6

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Linear(12, self.feature_size, dtype=torch.float64)

    def forward(self, images):
        return torch.tanh(self.weights(torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)))


def test_a_push_is_how_a_real_step_on_other_labels_lowers_the_primary_loss(monkeypatch):
    """By central differences of the primary loss after a plain step of gradient descent."""
    torch.manual_seed(0)
    psi, alpha, step, size = [2, 3, 2], 0.5, 1e-4, 8
    network = maxl.Network(Means(), len(psi), sum(psi)).double()
    label_generator = maxl.LabelGenerator(Means(), psi).double()
    images = torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8)
    numbers = torch.arange(size)
    train = create_dataset.Split(images, torch.stack([numbers % len(psi), numbers], dim=1))
    monkeypatch.setattr(label_learning, "BATCH_SIZE", size)
    settings = argparse.Namespace(primary_level=0, focal_gamma=2.0, auxiliary_weight=0.7)
    ((batch, targets),) = train.train_batches(size, torch.Generator().manual_seed(3))
    primary, order = targets[:, 0], targets[:, 1]
    with torch.no_grad():
        labels = label_generator(batch, primary)
    one = Trained(network, label_generator, None, settings)
    pushes = label_learning.pushes(one, labels[order.argsort()], train, alpha, seed=3)

    def loss_after_a_step(labels):
        other = copy.deepcopy(network)
        first, second = (torch.log_softmax(logits, 1) for logits in other(batch))

        def focal(log_p):
            return -((1 - log_p.exp()) ** 2) * log_p

        one = focal(first).gather(1, primary[:, None]).mean()
        (one + 0.7 * (labels * focal(second)).sum(1).mean()).backward()
        with torch.no_grad():
            for weight in other.parameters():
                weight -= alpha * weight.grad
            return focal(torch.log_softmax(other(batch)[0], 1)).gather(1, primary[:, None]).mean()

    for n in range(size):
        expected = torch.zeros(sum(psi), dtype=torch.float64)
        own = slice(sum(psi[: primary[n]]), sum(psi[: primary[n] + 1]))
        for k in range(own.start, own.stop):
            change = torch.zeros_like(labels)
            change[n, k] = step
            difference = loss_after_a_step(labels + change) - loss_after_a_step(labels - change)
            expected[k] = -difference.item() / (2 * step)
        expected[own] -= expected[own].mean()
        assert torch.allclose(pushes[order[n]], expected, rtol=1e-4, atol=1e-9)


def test_repeated_tells_what_is_the_same_for_a_class_from_what_is_the_same_for_an_image():
    """Pushes of a class's part, an image's part and noise, of known variances."""
    torch.manual_seed(0)
    primary = torch.arange(20_000) % 50
    of_class, of_image = torch.randn(50, 8), torch.randn(20_000, 8)

    def measured(image):
        return of_class[primary] + image * of_image + torch.randn(20_000, 8)

    mean, rest = label_learning.repeated(measured(0), measured(0), primary)
    assert mean == pytest.approx(1, abs=0.01) and rest == pytest.approx(0, abs=0.01)
    one, other = measured(1), measured(1)
    one[3] = other[5] = NAN
    assert label_learning.repeated(one, other, primary)[1] == pytest.approx(1 / 2, abs=0.01)


def test_a_label_generator_that_learns_nothing_is_as_at_the_start(monkeypatch):
    """And one that learns at a great rate is not."""
    monkeypatch.setattr(label_learning, "BATCH_SIZE", 20)
    shown = {name: label_learning.at_rate(beta, 0, "k", "-") for name, beta in (("still", 0), ("moved", 3))}
    monkeypatch.setattr(label_learning, "SHOWN", shown)
    monkeypatch.setitem(label_learning.task.keywords, "methods", shown)
    for name, method in shown.items():
        tiny_run(f"{name}-20-100-seed0", *method.options)
    settings, _ = label_learning.experiment.parse(["--plot", "--out", "r", "--seeds", "0", "1"])
    figure, (still, moved), text = label_learning.make_report(settings)
    assert (still["method"], moved["method"]) == ("β = 0, λ = 0", "β = 3, λ = 0")
    assert float(still["as_at_start_mean"]) == 100 and still["entropy_mean"] == still["entropy_at_start_mean"]
    assert float(moved["as_at_start_mean"]) < 95 and moved["entropy_mean"] != moved["entropy_at_start_mean"]
    assert still["entropy_at_start_mean"] == moved["entropy_at_start_mean"]
    assert "seed 1 not run" in text and len(figure.axes) == 4
