"""The baselines of experiments/, Random and K-Means, and of the controls the one that draws labels as it goes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_run, curves

import create_dataset
import model_vgg_maxl
from experiments.methods import controls
from experiments.methods import kmeans as model_vgg_kmeans
from experiments.methods import random_labels as model_vgg_random
from harness import exits

BASELINES = {
    "random": (model_vgg_random, []),
    "kmeans": (model_vgg_kmeans, []),
    "redrawn": (controls, ["--control", "redrawn"]),
}


# --- Random ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("psi", [[5] * 20, create_dataset.balanced_psi(3, 10, 1), [1, 7, 2], [4]])
def test_random_labels_are_balanced_within_each_primary_class(psi):
    primary = torch.from_numpy(np.random.default_rng(0).integers(len(psi), size=5003))
    labels = model_vgg_random.random_labels(primary, psi, seed=3)
    first = 0
    for primary_class, size in enumerate(psi):
        counts = torch.bincount(labels[primary == primary_class], minlength=sum(psi))
        own = counts[first : first + size]
        assert own.sum() == counts.sum() == (primary == primary_class).sum()
        assert own.max() - own.min() <= 1
        first += size
    assert torch.equal(labels, model_vgg_random.random_labels(primary, psi, seed=3))
    if max(psi) > 1:
        assert not torch.equal(labels, model_vgg_random.random_labels(primary, psi, seed=4))


def test_random_labels_do_not_follow_the_order_of_the_images():
    labels = model_vgg_random.random_labels(torch.zeros(6000, dtype=torch.int64), [3])
    pairs = torch.bincount(3 * labels[:-1] + labels[1:], minlength=9)
    assert pairs.min() > 500 and pairs.max() < 850  # 667 each by chance


def test_an_image_keeps_its_random_label():
    pixels = torch.arange(120).remainder(256).to(torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    targets = (torch.arange(120) % 3)[:, None].expand(-1, 4)
    split = create_dataset.Split(pixels, targets.contiguous())
    auxiliary = model_vgg_random.RandomLabels(split, 0, [2, 3, 4], seed=0)
    expected = model_vgg_random.random_labels(targets[:, 0], [2, 3, 4], seed=0)
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
    kmeans = model_vgg_kmeans.MiniBatchKMeans(psi, 8)
    kmeans.start(codes, primary, torch.Generator().manual_seed(0))
    for batch in torch.arange(3000).split(100):
        kmeans.update(codes[batch], primary[batch])
    assigned = kmeans(codes, primary)
    assert purity(assigned, cluster, 9) > 0.99
    assert purity(model_vgg_random.random_labels(primary, psi), cluster, 9) < 0.6
    assert model_vgg_maxl.hierarchy_mask(psi)[primary, assigned].all()
    centre = torch.stack([codes[assigned == k].mean(dim=0) for k in range(9)])
    assert (kmeans.centroids - centre).norm(dim=1).max() < 0.5


def test_a_code_stays_with_its_primary_class_though_anothers_centroid_is_nearer():
    kmeans = model_vgg_kmeans.MiniBatchKMeans([2, 1], 2)
    kmeans.centroids.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0]]))
    kmeans.counts.fill_(1.0)
    codes, primary = torch.zeros(4, 2), torch.tensor([1, 1, 0, 1])
    assert kmeans(codes, primary).tolist() == [2, 2, 0, 2]
    kmeans.update(codes, primary)
    assert kmeans.centroids[0].tolist() == [0, 0] and kmeans.centroids[2].norm() < 20


def test_a_step_is_the_mean_with_the_past_forgotten():
    kmeans = model_vgg_kmeans.MiniBatchKMeans([2, 1], 2, forget=0.5)
    kmeans.centroids.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [5.0, 5.0]]))
    kmeans.counts.copy_(torch.tensor([4.0, 4.0, 4.0]))
    codes, primary = torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]]), torch.tensor([0, 0, 1])
    assert kmeans(codes, primary).tolist() == [0, 0, 2]
    kmeans.update(codes, primary)
    assert torch.allclose(kmeans.centroids, torch.tensor([[1.0, 0.5], [10.0, 0.0], [19 / 3, 19 / 3]]))
    assert kmeans.counts.tolist() == [4.0, 2.0, 3.0]


def test_centroids_follow_codes_that_drift():
    psi = [2, 3, 4]
    codes, primary, _ = blobs(psi)
    kmeans = model_vgg_kmeans.MiniBatchKMeans(psi, 8, forget=0.9)
    kmeans.start(codes, primary, torch.Generator().manual_seed(0))
    for step in range(200):
        codes, primary, cluster = blobs(psi, count=100, seed=step, shift=0.1 * step)
        kmeans.update(codes, primary)
    assert purity(kmeans(codes, primary), cluster, 9) > 0.95


def test_a_step_returns_the_labels_from_before_it():
    codes, primary, _ = blobs([2, 3, 4])
    kmeans = model_vgg_kmeans.MiniBatchKMeans([2, 3, 4], 8, forget=0.1)
    kmeans.start(codes, primary, torch.Generator().manual_seed(2))
    before = kmeans(codes, primary)
    assert torch.equal(kmeans.update(codes, primary), before)


@pytest.mark.cuda
def test_no_step_of_kmeans_waits_for_the_gpu():
    pixels = torch.randint(256, (60, 32, 32, 3), dtype=torch.uint8)
    split = create_dataset.Split(pixels, (torch.arange(60) % 3)[:, None].expand(-1, 4).contiguous(), "cuda")
    settings = model_vgg_kmeans.parse(["--primary-level", "0", "--psi", "2,3,4"])
    labels = model_vgg_kmeans.ClusterLabels(split, settings)
    batch = next(split.train_batches(30, torch.Generator().manual_seed(0)))
    labels(*batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_empty_cluster_is_started_anew():
    psi = [2, 3, 4]
    codes, primary, cluster = blobs(psi)
    kmeans = model_vgg_kmeans.MiniBatchKMeans(psi, 8, forget=0.9)
    kmeans.start(codes, primary, torch.Generator().manual_seed(0))
    kmeans.centroids[4] = 1e4  # nobody's nearest
    assert not (kmeans(codes, primary) == 4).any()
    for batch in torch.arange(3000).split(50):
        kmeans.update(codes[batch], primary[batch])
    assert len(kmeans(codes, primary).unique()) == 9
    assert kmeans.centroids.isfinite().all()


def test_centroids_start_from_few_or_equal_codes_too():
    kmeans = model_vgg_kmeans.MiniBatchKMeans([3], 2)
    kmeans.start(torch.ones(5, 2), torch.zeros(5, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert torch.equal(kmeans.centroids, torch.ones(3, 2))
    kmeans.update(torch.ones(5, 2), torch.zeros(5, dtype=torch.int64))
    assert kmeans.centroids.isfinite().all()


def test_kmeans_starts_the_same_on_every_device_and_once_a_run(monkeypatch, spared):
    """A GPU has larger test batches; codes are taken under the statistics of a batch, which must not differ."""
    original, start, codes = create_dataset.Split.test_batches, model_vgg_kmeans.MiniBatchKMeans.start, []

    def spied(clusters, *arguments):
        codes.append(arguments[0].clone())
        start(clusters, *arguments)

    monkeypatch.setattr(model_vgg_kmeans.MiniBatchKMeans, "start", spied)
    few = [*TINY, "--train-images", "300"]
    assert exits.run_main(model_vgg_kmeans.main, [*few, "--epochs", "1", "--out", "r"]) == 0
    assert exits.run_main(model_vgg_kmeans.main, [*few, "--epochs", "2", "--out", "r", "--resume"]) == 0
    assert len(codes) == 1
    monkeypatch.setattr(create_dataset.Split, "test_batches", lambda split, size=1000: original(split, size))
    assert exits.run_main(model_vgg_kmeans.main, [*few, "--epochs", "1", "--out", "as-on-a-gpu"]) == 0
    assert torch.equal(*codes)


def test_the_auto_encoder_learns_to_give_images_back():
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(20, 3, 4, 4), size=32, mode="bilinear")
    autoencoder = model_vgg_kmeans.AutoEncoder(64)
    assert autoencoder.encoder(images).shape == (20, 64)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=0.001)
    losses = []
    for _ in range(60):
        loss = (autoencoder.decoder(autoencoder.encoder(images)) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * images.var().item() < losses[0]


# --- both as scripts ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("primary, auxiliary", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_the_baselines_run_on_the_six_pairs(name, primary, auxiliary, spared):
    classes = create_dataset.LEVEL_CLASSES[primary], create_dataset.LEVEL_CLASSES[auxiliary]
    psi = ",".join(map(str, create_dataset.balanced_psi(*classes)))
    few = [*TINY, "--epochs", "1", "--train-images", "100", "--primary-level", str(primary), "--psi", psi]
    script, own = BASELINES[name]
    assert exits.run_main(script.main, [*own, *few]) == 0
    script = script.__name__
    folder = Path(f"runs/{script.rpartition('.')[2]}-synthetic-{classes[0]}-{classes[1]}-seed0")
    assert len(curves(folder)) == 1
    command = json.loads((folder / "settings.json").read_text())["command"]
    assert command.startswith(f"python -m {script} --")
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["network"]
    assert [len(weights[f"heads.{head}.2.bias"]) for head in (0, 1)] == list(classes)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_stopped_and_resumed_is_the_same_to_the_bit(name, spared):
    script, own = BASELINES[name]

    def main(arguments):
        script.main([*own, *arguments])

    assert exits.run_main(main, [*TINY, "--out", "whole"]) == 0
    assert exits.run_main(main, [*TINY, "--out", "parts", "--epochs", "1"]) == 0
    torch.manual_seed(123)
    assert exits.run_main(main, [*TINY, "--out", "parts", "--resume"]) == 0
    assert_same_run("whole", "parts")
    assert exits.run_main(main, [*TINY, "--out", "other", "--seed", "1"]) == 0
    assert curves("other") != curves("whole")


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--psi", "5,5"], "psi has 2 numbers, but primary level 2 has 20 classes"),
        (["--auxiliary-level", "3"], "unrecognized arguments"),
        (["--width", "0"], "--width 0.0 is out of range"),
    ],
)
def test_a_baselines_bad_input_is_one_sentence(name, arguments, said, capsys):
    script, own = BASELINES[name]
    assert exits.run_main(script.main, [*own, *TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not Path("runs").exists()
