"""Label learning: on labels and weights that are known, and from tiny runs."""

import math

import pytest
import torch
from conftest import TINY, run_script

import create_dataset
from experiments import label_learning
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
    assert still["entropy_at_start_mean"] == moved["entropy_at_start_mean"]
    assert "seed 1 not run" in text
