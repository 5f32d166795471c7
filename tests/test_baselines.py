"""The baselines Random and K-Means, and the controls Uniform, Redrawn and Untrained."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_run, curves

import create_dataset
import maxl
import model_vgg_maxl
from experiments import pairs
from experiments.methods import controls, kmeans, random_labels
from harness import exits

BASELINES = {"random": (random_labels, []), "kmeans": (kmeans, [])}
BASELINES |= {name: (controls, ["--control", name]) for name in controls.CONTROLS}


def settings_of(**values):
    """Settings that are enough for an auxiliary-labels object."""
    return Namespace(**{"primary_level": 0, "seed": 0} | values)


def split_of(count, classes=3):
    """A Split of black images, classes in turns."""
    targets = (torch.arange(count) % classes)[:, None].expand(-1, 4).contiguous()
    return create_dataset.Split(torch.zeros(count, 32, 32, 3, dtype=torch.uint8), targets)


# --- Random ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("psi", [[5] * 20, [1, 7, 2]])
def test_random_labels_are_balanced_within_each_primary_class(psi):
    primary = torch.from_numpy(np.random.default_rng(0).integers(len(psi), size=5003))
    labels = random_labels.random_labels(primary, psi, seed=3)
    first = 0
    for primary_class, size in enumerate(psi):
        counts = torch.bincount(labels[primary == primary_class], minlength=sum(psi))
        own = counts[first : first + size]
        assert own.sum() == counts.sum() == (primary == primary_class).sum()
        assert own.max() - own.min() <= 1
        first += size
    assert torch.equal(labels, random_labels.random_labels(primary, psi, seed=3))
    assert not torch.equal(labels, random_labels.random_labels(primary, psi, seed=4))


def test_an_image_keeps_its_random_label():
    pixels = torch.arange(120, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    targets = (torch.arange(120) % 3)[:, None].expand(-1, 4)
    split = create_dataset.Split(pixels, targets.contiguous())
    auxiliary = random_labels.RandomLabels(split, settings_of(psi=[2, 3, 4]))
    expected = random_labels.random_labels(targets[:, 0], [2, 3, 4], seed=0)
    for seed in (1, 2):
        for images, labels in split.train_batches(40, torch.Generator().manual_seed(seed)):
            index = (images.amax(dim=(1, 2, 3)) * 0.2 + 0.5).mul(255).round().long()  # the pixels number the images
            assert torch.equal(auxiliary(images, labels), expected[index])


# --- K-Means --------------------------------------------------------------------------------------


def blobs(psi, count=3000, size=8, seed=0, shift=0.0):
    """Codes in well separated clusters, ψ[i] of them in primary class i: codes, primary class, true cluster."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(sum(psi), size, generator=torch.Generator().manual_seed(99))
    cluster = torch.randint(sum(psi), (count,), generator=generator)
    primary = torch.repeat_interleave(torch.arange(len(psi)), torch.tensor(psi))[cluster]
    return centres[cluster] + shift + torch.randn(count, size, generator=generator), primary, cluster


def purity(assigned, cluster, classes):
    """Share of the points that belong to the true cluster that is the commonest among those assigned alike."""
    return sum(torch.bincount(cluster[assigned == k], minlength=classes).max().item() for k in range(classes)) / len(
        cluster
    )


def test_clusters_are_the_known_ones_and_far_purer_than_chance():
    psi = [2, 3, 4]
    codes, primary, cluster = blobs(psi)
    clusters = kmeans.MiniBatchKMeans(psi, 8)
    clusters.start(codes, primary, torch.Generator().manual_seed(0))
    for batch in torch.arange(3000).split(100):
        clusters.update(codes[batch], primary[batch])
    assigned = clusters(codes, primary)
    assert purity(assigned, cluster, 9) > 0.99
    assert purity(random_labels.random_labels(primary, psi), cluster, 9) < 0.6
    assert maxl.hierarchy_mask(psi)[primary, assigned].all()
    centre = torch.stack([codes[assigned == k].mean(dim=0) for k in range(9)])
    assert (clusters.centroids - centre).norm(dim=1).max() < 0.5


def test_a_code_stays_with_its_primary_class_though_anothers_centroid_is_nearer():
    clusters = kmeans.MiniBatchKMeans([2, 1], 2)
    clusters.centroids.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0]]))
    clusters.counts.fill_(1.0)
    codes, primary = torch.zeros(4, 2), torch.tensor([1, 1, 0, 1])
    assert clusters(codes, primary).tolist() == [2, 2, 0, 2]
    clusters.update(codes, primary)
    assert clusters.centroids[0].tolist() == [0, 0] and clusters.centroids[2].norm() < 20


def test_a_step_is_the_mean_with_the_past_forgotten():
    clusters = kmeans.MiniBatchKMeans([2, 1], 2, forget=0.5)
    clusters.centroids.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [5.0, 5.0]]))
    clusters.counts.copy_(torch.tensor([4.0, 4.0, 4.0]))
    codes, primary = torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]]), torch.tensor([0, 0, 1])
    assert clusters(codes, primary).tolist() == [0, 0, 2]
    clusters.update(codes, primary)
    assert torch.allclose(clusters.centroids, torch.tensor([[1.0, 0.5], [10.0, 0.0], [19 / 3, 19 / 3]]))
    assert clusters.counts.tolist() == [4.0, 2.0, 3.0]


def test_an_empty_cluster_is_started_anew():
    psi = [2, 3, 4]
    codes, primary, cluster = blobs(psi)
    clusters = kmeans.MiniBatchKMeans(psi, 8, forget=0.9)
    clusters.start(codes, primary, torch.Generator().manual_seed(0))
    clusters.centroids[4] = 1e4  # nobody's nearest
    assert not (clusters(codes, primary) == 4).any()
    for batch in torch.arange(3000).split(50):
        clusters.update(codes[batch], primary[batch])
    assert len(clusters(codes, primary).unique()) == 9
    assert clusters.centroids.isfinite().all()


def test_centroids_start_from_few_or_equal_codes_too():
    clusters = kmeans.MiniBatchKMeans([3], 2)
    clusters.start(torch.ones(5, 2), torch.zeros(5, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert torch.equal(clusters.centroids, torch.ones(3, 2))
    clusters.update(torch.ones(5, 2), torch.zeros(5, dtype=torch.int64))
    assert clusters.centroids.isfinite().all()


def test_kmeans_starts_the_same_on_every_device_and_once_a_run(monkeypatch, spared):
    """A GPU has larger test batches; codes are taken under the statistics of a batch, which must not differ."""
    original, start, codes = create_dataset.Split.test_batches, kmeans.MiniBatchKMeans.start, []

    def spied(clusters, *arguments):
        codes.append(arguments[0].clone())
        start(clusters, *arguments)

    monkeypatch.setattr(kmeans.MiniBatchKMeans, "start", spied)
    few = [*TINY, "--train-images", "300"]
    assert exits.run_main(kmeans.main, [*few, "--epochs", "1", "--out", "r"]) == 0
    assert exits.run_main(kmeans.main, [*few, "--epochs", "2", "--out", "r", "--resume"]) == 0
    assert len(codes) == 1
    monkeypatch.setattr(create_dataset.Split, "test_batches", lambda split, size=1000: original(split, size))
    assert exits.run_main(kmeans.main, [*few, "--epochs", "1", "--out", "as-on-a-gpu"]) == 0
    assert torch.equal(*codes)


def test_the_auto_encoder_learns_to_give_images_back():
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(20, 3, 4, 4), size=32, mode="bilinear")
    autoencoder = kmeans.AutoEncoder(64)
    optimizer, losses = torch.optim.Adam(autoencoder.parameters(), lr=0.001), []
    for _ in range(60):
        loss = (autoencoder.decoder(autoencoder.encoder(images)) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * images.var().item() < losses[0]


# --- the controls ---------------------------------------------------------------------------------


def test_uniform_labels_are_uniform_on_their_primary_class():
    split = split_of(12)
    labels = controls.UniformLabels(split, settings_of(psi=[2, 1, 4]))(None, split.labels)
    expected = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0.25, 0.25, 0.25, 0.25]])
    assert torch.equal(labels, expected[split.labels[:, 0]])


def test_redrawn_labels_are_uniform_within_their_primary_class_and_new_at_every_call():
    psi, count = [2, 1, 4], 20_000
    targets = (torch.arange(3 * count) % 3)[:, None].expand(-1, 4)
    labels = controls.RedrawnLabels(split_of(3), settings_of(psi=psi))
    first, second = labels(None, targets), labels(None, targets)
    shares = torch.bincount(first, minlength=7) / count
    assert len(shares) == 7 and shares.tolist() == pytest.approx([1 / 2, 1 / 2, 1, *[1 / 4] * 4], abs=0.02)
    assert maxl.hierarchy_mask(psi)[targets[:, 0], first].all()
    same = ((first == second)[targets[:, 0] == primary].double().mean().item() for primary in range(3))
    assert list(same) == pytest.approx([1 / 2, 1, 1 / 4], abs=0.02)
    assert torch.equal(controls.RedrawnLabels(split_of(3), settings_of(psi=psi))(None, targets), first)
    assert not torch.equal(controls.RedrawnLabels(split_of(3), settings_of(psi=psi, seed=1))(None, targets), first)


def test_untrained_keeps_the_label_generator_that_maxl_starts_from(spared):
    """Its labels are MAXL's where MAXL's label generator learns at a rate of zero."""
    few, saved = [*TINY, "--epochs", "2"], []
    for name, script, own in (
        ("maxl", model_vgg_maxl, ["--label-learning-rate", "0"]), ("untrained", controls, ["--control", "untrained"]),
    ):  # fmt: skip
        assert exits.run_main(script.main, [*few, *own, "--out", name]) == 0
        saved.append(torch.load(f"{name}/checkpoint.pt", weights_only=True)["parts"]["label_generator"])
    weights = [name for name in saved[0] if "running" not in name and "batches" not in name]
    assert weights and all(torch.equal(saved[0][name], saved[1][name]) for name in weights)
    settings = controls.parse([*few, "--control", "untrained"])
    split, _ = create_dataset.load(settings, torch.device("cpu"))
    images, targets = next(split.train_batches(20, torch.Generator().manual_seed(0)))
    generated = controls.UntrainedLabels(split, settings)(images, targets)
    own = maxl.hierarchy_mask(settings.psi)[targets[:, 2]]
    assert not generated.requires_grad and (generated[~own] == 0).all() and generated[own].std() > 0


# --- as scripts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_the_classes_of_its_levels(name, spared):
    script, own = BASELINES[name]
    few = [*TINY, "--epochs", "1", "--train-images", "100", "--primary-level", "0", "--psi", "3,3,4"]
    assert exits.run_main(script.main, [*own, *few, "--cosine-every", "2", "--out", "r"]) == 0
    weights = torch.load("r/checkpoint.pt", weights_only=True)["parts"]["network"]
    assert [len(weights[f"heads.{head}.2.bias"]) for head in (0, 1)] == [3, 10]
    (row,) = curves("r")
    assert "train_cosine_similarity" in row and "test_auxiliary_loss" not in row
    assert pairs.METHODS[name].script == script.__name__ and pairs.METHODS[name].options == tuple(own)


@pytest.mark.parametrize("name", ["random", "kmeans", "redrawn"])
def test_a_baseline_stopped_and_resumed_is_the_same_to_the_bit(name, spared):
    script, own = BASELINES[name]

    def run(*arguments):
        assert exits.run_main(script.main, [*own, *TINY, *arguments]) == 0

    run("--out", "whole")
    run("--out", "parts", "--epochs", "1")
    torch.manual_seed(123)
    run("--out", "parts", "--resume")
    assert_same_run("whole", "parts")


@pytest.mark.parametrize("name, arguments, said", [
    ("random", ["--psi", "5,5"], "psi has 2 numbers, but primary level 2 has 20 classes"),
    ("uniform", ["--control", "none"], "invalid choice: 'none'"),
])  # fmt: skip
def test_a_baselines_bad_input_is_one_sentence(name, arguments, said, capsys):
    script, own = BASELINES[name]
    assert exits.run_main(script.main, [*own, *TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not Path("runs").exists()
