"""Whole trainings by the scripts against the algorithm written out plainly: every setting arrives where it belongs.

All settings are away from their defaults. `test_every_setting_matters` shows that the comparison sees each of them.
"""

import argparse
import functools
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, run_script
from reference import focal, reference_gradient

import create_dataset
import maxl

SHARED = {
    "primary_level": 0, "batch_size": 50, "epochs": 3, "width": 0.05, "learning_rate": 0.05, "halve_every": 2,
    "focal_gamma": 1.0, "seed": 3, "train_images": 100,
}  # fmt: skip
AUXILIARY = {"auxiliary_weight": 2.0}
OWN = {
    "model_vgg_single": {},
    "model_vgg_human": AUXILIARY | {"auxiliary_level": 1},
    "model_vgg_maxl": AUXILIARY | {
        "psi": [2, 3, 4], "label_learning_rate": 3.0, "label_weight_decay": 0.1, "entropy_weight": 2.0,
        "meta_gradient": "double-backward",
    },
}  # fmt: skip
CASES = [
    (name, statistics) for name in OWN for statistics in ("running", "settled", "batch")
    if (name, statistics) != ("model_vgg_maxl", "running")  # MAXL's are settled by its second pass
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_float64(spared, monkeypatch):
    """In fp32 two orders of the same sums end percents apart after twelve steps of so thin a network."""
    scale = create_dataset.scale
    monkeypatch.setattr(create_dataset, "scale", lambda images: scale(images).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def settings_of(name, statistics):
    return SHARED | OWN[name] | {"test_statistics": statistics}


def run(name, settings, out):
    """The script from the command line; the weights of its checkpoint, and the last row of its curves."""
    options = []
    for key, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        options += [f"--{key.replace('_', '-')}", text]
    assert run_script(name, "--dataset", "synthetic", *options, "--out", out) == 0
    checkpoint = torch.load(Path(out) / "checkpoint.pt", weights_only=True)
    return checkpoint["parts"], checkpoint["rows"]


def descend(parameters, gradients, rate, weight_decay=0.0):
    with torch.no_grad():
        for p, g in zip(parameters, gradients):
            p -= rate * (g + weight_decay * p)


def algorithm(name, settings, train, test):
    """The trained networks' state by name and the last test, by Algorithm 1 written out; Single and Human likewise."""
    s = argparse.Namespace(**settings)
    networks = SCRIPTS[name].make_networks(s)
    network, label_generator = networks["network"], networks.get("label_generator")
    order = torch.Generator().manual_seed(s.seed)
    for epoch in range(s.epochs):
        halved = 0.5 ** (epoch // s.halve_every)
        alpha = s.learning_rate * halved
        network.train()
        for images, labels in train.train_batches(s.batch_size, order):
            logits = network(images)
            loss = focal(logits[0], labels[:, s.primary_level], s.focal_gamma)
            if label_generator is not None:
                with torch.no_grad():
                    auxiliary = label_generator(images, labels[:, s.primary_level])
                loss = loss + s.auxiliary_weight * focal(logits[1], auxiliary, s.focal_gamma)
            elif len(logits) > 1:
                loss = loss + s.auxiliary_weight * focal(logits[1], labels[:, s.auxiliary_level], s.focal_gamma)
            descend(network.parameters(), torch.autograd.grad(loss, network.parameters()), alpha)
        if label_generator is not None:
            for images, labels in train.train_batches(s.batch_size, order):
                gradients = reference_gradient(
                    network, label_generator, images, labels[:, s.primary_level], alpha, s.entropy_weight,
                    s.focal_gamma, s.auxiliary_weight,
                )  # fmt: skip
                beta = s.label_learning_rate * halved
                descend(label_generator.parameters(), gradients, beta, s.label_weight_decay)
        elif s.test_statistics == "settled":
            with torch.no_grad():
                for images, _ in train.train_batches(s.batch_size, torch.Generator().manual_seed(s.seed + epoch + 1)):
                    network(images)
    trained = {part: {k: v.clone() for k, v in module.state_dict().items()} for part, module in networks.items()}
    network.train(s.test_statistics == "batch")
    losses, hits = [], []
    with torch.no_grad():
        for images, labels in test.test_batches(100):
            logits, primary = network(images)[0], labels[:, s.primary_level]
            losses += [focal(logits[i : i + 1], primary[i : i + 1], s.focal_gamma) for i in range(len(images))]
            hits.append(logits.argmax(dim=1) == primary)
    return trained, torch.stack(losses).mean().item(), torch.cat(hits).double().mean().item()


def distance(ours, theirs, name, settings):
    """How far two trainings ended from each other, as a share of how far they came; the largest over the networks."""
    start = SCRIPTS[name].make_networks(argparse.Namespace(**settings))

    def vector(state, part):
        return torch.cat([state[key].double().flatten() for key, _ in start[part].named_parameters()])

    return max(
        ((vector(ours[part], part) - vector(theirs[part], part)).norm()
         / (vector(theirs[part], part) - vector(start[part].state_dict(), part)).norm()).item()
        for part in start
    )  # fmt: skip


def data(settings):
    everything = {"dataset": "synthetic", "data_root": "", "channels_last": False} | settings
    return create_dataset.load(argparse.Namespace(**everything), "cpu")


@pytest.mark.parametrize("name, statistics", CASES)
def test_a_training_is_the_algorithm(name, statistics):
    settings = settings_of(name, statistics)
    parts, rows = run(name, settings, "r")
    trained, loss, accuracy = algorithm(name, settings, *data(settings))
    assert distance(parts, trained, name, settings) < 1e-7
    for key, value in trained["network"].items():  # running statistics, too
        assert torch.allclose(parts["network"][key], value, rtol=1e-6, atol=1e-9), key
    assert rows[-1]["test_primary_loss"] == pytest.approx(loss, rel=1e-6)
    assert rows[-1]["test_primary_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert [row["learning_rate"] for row in rows] == [0.05, 0.05, 0.025]
    if name == "model_vgg_maxl":
        assert [row["label_learning_rate"] for row in rows] == [3.0, 3.0, 1.5]


SETTINGS_THAT_TRAIN = [
    (name, setting) for name in OWN for setting in SHARED | OWN[name]
    if setting not in ("primary_level", "auxiliary_level", "psi", "width", "epochs", "meta_gradient", "train_images")
]  # fmt: skip


@functools.cache
def as_set(name):
    settings = settings_of(name, "settled")
    return algorithm(name, settings, *data(settings))[0]


@pytest.mark.parametrize("name, setting", SETTINGS_THAT_TRAIN)
def test_every_setting_matters(name, setting):
    """A training in which one setting did not arrive, and its default took its place, is told apart."""
    settings = settings_of(name, "settled")
    default = SCRIPTS[name].SETTINGS.get(setting, 0)
    if setting == "batch_size":
        default = 40  # the default is all of these few images
    theirs = algorithm(name, settings | {setting: default}, *data(settings))[0]
    ours = as_set(name)
    assert distance(theirs, ours, name, settings) > 1e-4


@pytest.mark.parametrize("method", maxl.META_GRADIENTS)
def test_the_method_of_the_meta_gradient_arrives(method):
    """Both give the same numbers, but only forward mode has an error to report."""
    run("model_vgg_maxl", settings_of("model_vgg_maxl", "settled") | {"meta_gradient": method, "epochs": 1}, "r")
    rows = torch.load("r/checkpoint.pt", weights_only=True)["rows"]
    assert ("meta_forward_mode_error" in rows[0]) == (method == "forward-mode")


@pytest.mark.parametrize("name", ["model_vgg_human", "model_vgg_maxl"])
def test_comparing_gradients_changes_nothing_in_the_training(name):
    settings = settings_of(name, "settled")
    (plain, rows), (compared, with_cosines) = (
        run(name, settings | {"cosine_every": every}, f"r{every}") for every in (0, 2)
    )  # fmt: skip
    assert "train_cosine_similarity" in with_cosines[0] and "train_cosine_similarity" not in rows[0]
    for part in ("network", "label_generator"):
        for key, value in plain.get(part, {}).items():
            assert torch.equal(value, compared[part][key]), key
