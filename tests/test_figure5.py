"""Figure 5, and what it shares with Figure 6: features from checkpoints, and numbers on features that are known."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, run_script

import create_dataset
import maxl
import utils
from experiments import figure5, trained
from harness import exits

pytestmark = pytest.mark.usefixtures("spared")
needs_scikit_learn = pytest.mark.skipif(
    not importlib.util.find_spec("sklearn"), reason="scikit-learn is not installed"
)
OF_3_10 = {
    "single": ("single-3-seed0", "model_vgg_single", []),
    "human": ("human-3-10-seed0", "model_vgg_human", ["--auxiliary-level", "1"]),
    "maxl": ("maxl-3-10-seed0", "model_vgg_maxl", ["--psi", ",".join(map(str, create_dataset.balanced_psi(3, 10)))]),
}


def tiny_run(method, *options):
    name, script, own = OF_3_10[method]
    few = [*TINY, "--train-images", "100", "--epochs", "1"]
    assert run_script(script, "--primary-level", "0", *own, *few, "--out", f"r/{name}", *options) == 0


def plot(*options):
    arguments = ["--plot", "--out", "r", "--pairs", "3-10", "--seeds", "0", *options]
    return exits.run_main(figure5.experiment.main, arguments)


def split_of(count):
    images, labels = create_dataset.make_synthetic(train=False)
    return create_dataset.Split(images[:count], labels[:count])


# --- the numbers ----------------------------------------------------------------------------------------


@needs_scikit_learn
def test_the_numbers_are_those_of_loops_over_all_pairs():
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=90)
    features = np.eye(3)[labels] + rng.standard_normal((90, 3))
    right, silhouettes = [], []
    for i in range(90):
        distance = np.sqrt(((features - features[i]) ** 2).sum(axis=1))
        distance[i] = np.inf  # left out
        near = labels[np.argsort(distance)[:20]]
        most = max(np.bincount(near))
        right.append(next(c for c in near if (near == c).sum() == most) == labels[i])  # a tie: the nearer
        to_class = [distance[(labels == c) & (np.arange(90) != i)].mean() for c in range(3)]
        own, other = to_class[labels[i]], min(d for c, d in enumerate(to_class) if c != labels[i])
        silhouettes.append((other - own) / max(own, other))
    numbers = figure5.measure(features, labels)
    assert numbers["knn_accuracy"] == pytest.approx(100 * np.mean(right))
    assert numbers["silhouette"] == pytest.approx(np.mean(silhouettes))


def test_features_are_the_trunks_output_with_running_statistics():
    torch.manual_seed(0)
    network, split = maxl.Network(utils.VGG16(0.05), 3, 10), split_of(130)
    network(next(split.test_batches())[0])  # moves the running statistics
    found = trained.trunk_features(network.train(), split)
    x = (split.padded[:, 4:-4, 4:-4].permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    for layer in network.trunk.layers:
        if isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, layer.weight, layer.bias, padding=1)
        elif isinstance(layer, nn.BatchNorm2d):
            shape = (1, -1, 1, 1)
            x = (x - layer.running_mean.view(shape)) / (layer.running_var.view(shape) + 1e-5).sqrt()
            x = x * layer.weight.view(shape) + layer.bias.view(shape)
        else:
            x = F.relu(x) if isinstance(layer, nn.ReLU) else F.max_pool2d(x, 2)
    torch.testing.assert_close(found, x.flatten(1).detach(), rtol=1e-4, atol=1e-5)


# --- from runs ------------------------------------------------------------------------------------------


@needs_scikit_learn
def test_figure_and_table_of_tiny_runs():
    for method in OF_3_10:
        tiny_run(method)
    tiny_run("maxl", "--epochs", "2", "--resume")
    assert plot("--seeds", "0", "1") == 2  # of other epochs
    for method in ("single", "human"):
        tiny_run(method, "--epochs", "2", "--max-minutes", "1000", "--resume")
    assert plot("--seeds", "0", "1") == 0
    (table,) = Path("r").glob("figure5*.csv")
    with open(table, newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert len(rows) == 3 and rows["MAXL"]["missing"] == "seed 1 not run"
    # the numbers are those of the network in the checkpoint
    saved = torch.load("r/human-3-10-seed0/checkpoint.pt", weights_only=True)
    network, split = maxl.Network(utils.VGG16(0.02), 3, 10), split_of(200)
    network.load_state_dict(saved["parts"]["network"])
    features = trained.trunk_features(network, split).numpy()
    for name, value in figure5.measure(features, split.labels[:, 0].numpy()).items():
        assert float(rows["Human"][f"{name}_mean"]) == pytest.approx(value)
    assert float(rows["Human"]["test_accuracy_mean"]) == 100 * saved["rows"][-1]["test_primary_accuracy"]


@needs_scikit_learn
def test_what_cannot_be_drawn_is_one_sentence(capsys):
    def said(*options):
        capsys.readouterr()
        assert plot(*options) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        return error

    assert "there are no runs" in said()
    tiny_run("maxl")
    path = Path("r/maxl-3-10-seed0/checkpoint.pt")
    whole = torch.load(path, weights_only=True)
    torch.save(whole | {"parts": {**whole["parts"], "network": {}}}, path)
    assert "does not fit this code" in said()
    torch.save(whole | {"settings": {**whole["settings"], "script": "model_vgg_human"}}, path)
    assert "is not the run that maxl-3-10-seed0 names (script was model_vgg_human" in said()
    path.unlink()
    assert "checkpoint.pt is not there" in said()


def test_without_scikit_learn_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert exits.run_main(figure5.experiment.main, ["--status", "--out", "r"]) == 0  # draws nothing
    for arguments in ([], ["--plot"]):
        assert exits.run_main(figure5.experiment.main, [*arguments, "--out", "r"]) == 2
        assert capsys.readouterr().err == "error: figure5 needs the package scikit-learn: pip install scikit-learn\n"
