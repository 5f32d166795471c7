"""What every dataset of Table 1 has to be, a reader's own among them, and its batches from the host's memory."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import TINY, one_sentence, curves

import create_dataset
from experiments.methods import table1_maxl, table1_single
from experiments.datasets import host_split, registry
from harness import exits

RNG = np.random.default_rng(0)


def own_dataset(channels=3, classes=4, **changed):
    """A dataset of a reader: a function that makes arrays, and a line."""

    def read(root):
        splits = []
        for count in (120, 40):
            labels = torch.arange(count) % classes
            images = RNG.integers(0, 256, (count, 32, 32, channels), np.uint8)
            splits.append((images, labels))
        return changed.get("splits", splits)

    return registry.Dataset("Mine", classes, (120, 40), read, "conv4", channels=channels)


@pytest.mark.parametrize("script, channels", [(table1_single, 1), (table1_maxl, 3)])
def test_a_dataset_of_the_readers_own_is_a_function_and_a_line(monkeypatch, script, channels):
    monkeypatch.setitem(registry.DATASETS, "mine", own_dataset(channels))
    few = [*TINY[2:4], "--batch-size", "20", "--epochs", "2", "--dataset", "mine", "--out", "r"]
    assert exits.run_main(script.main, few) == 0
    assert [float(row["learning_rate"]) for row in curves("r")] == pytest.approx([0.1, 0.05])


def test_quick_takes_what_a_small_dataset_has(monkeypatch):
    monkeypatch.setitem(registry.DATASETS, "mine", own_dataset())
    for script in (table1_single, table1_maxl):
        assert script.parse(["--quick"]).train_images == 4000  # of the generated images
        assert script.parse(["--quick", "--dataset", "mine"]).train_images == 120
        assert script.parse(["--quick", "--dataset", "mine", "--train-images", "50"]).train_images == 50


GOOD = np.zeros((40, 32, 32, 3), np.uint8), torch.arange(40) % 4


@pytest.mark.parametrize(
    "test, said",
    [
        ((GOOD[0].astype(np.float32), GOOD[1]), "the test images are float32 (40, 32, 32, 3); expected uint8 (40, 32"),
        ((GOOD[0], GOOD[1] + 1), "the test labels are torch.int64 of 4 classes, 1 to 4; expected int64, all of the 4"),
        ((GOOD[0], GOOD[1][:, None]), "the test labels have shape (40, 1); expected (N,)"),
    ],
)
def test_what_no_dataset_may_be_is_refused_in_one_sentence(monkeypatch, test, said):
    monkeypatch.setitem(registry.DATASETS, "mine", own_dataset(splits=[GOOD, test]))
    with one_sentence("Mine: ", said):
        registry.read("mine", "dataset")


@pytest.mark.parametrize("name", registry.DATASETS)
def test_a_datasets_training_images_are_augmented_as_the_paper_has_it(monkeypatch, name):
    """Digits, and the grey stand-in for them, are not mirrored; all are cropped after padding."""
    dataset = registry.DATASETS[name]
    images = np.arange(32, dtype=np.uint8)[None, None, :, None].repeat(400, 0).repeat(32, 1)
    rising = images.repeat(dataset.channels, 3), torch.arange(400) % 2
    monkeypatch.setitem(registry.DATASETS, name, dataset._replace(classes=2, read=lambda root: [rising, rising]))
    settings = Namespace(dataset=name, data_root="dataset", train_images=None, seed=0, channels_last=False)
    train, _ = registry.load(settings, "cpu")
    (batch, _), *_ = train.train_batches(400, torch.Generator().manual_seed(0))
    share = (batch[:, 0, 16, 20] > batch[:, 0, 16, 10]).double().mean().item()
    assert share == 1 if name in ("mnist", "svhn", "synthetic-grey") else 0.35 < share < 0.65
    assert len(batch[:, 0, 16, 16].unique()) >= 9, "cropped at 9 places"


@pytest.mark.parametrize("mirror, channels", [(True, 3), (False, 1)])
def test_images_kept_on_the_host_make_the_same_batches_to_the_bit(mirror, channels):
    images, labels = RNG.integers(0, 256, (130, 32, 32, channels), np.uint8), torch.arange(130)[:, None] % 7
    splits = [kind(images, labels, mirror=mirror) for kind in (create_dataset.Split, host_split.HostSplit)]
    for pass_over in (
        lambda split: split.train_batches(20, torch.Generator().manual_seed(3)),
        lambda split: split.test_batches(50),
    ):
        ours, theirs = (list(pass_over(split)) for split in splits)
        assert len(ours) == len(theirs)
        for pair, other in zip(ours, theirs):
            assert all(map(torch.equal, pair, other))
    assert torch.equal(splits[0].images, splits[1].images) and len(splits[1]) == 130


def test_images_stay_on_the_host_where_the_device_has_no_room_for_them(monkeypatch):
    images, labels = np.zeros((10, 32, 32, 3), np.uint8), torch.zeros(10, 1, dtype=torch.int64)
    for free, kind in ((2 * 10 * 40 * 40 * 3, create_dataset.Split), (2 * 10 * 40 * 40 * 3 - 1, host_split.HostSplit)):
        monkeypatch.setattr(host_split, "free_memory", lambda device, free=free: free)
        assert type(host_split.split_for(images, labels, "cpu")) is kind


def test_a_subset_of_unequal_classes_takes_turns_until_a_class_is_empty():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 10)[:, None]
    subset = create_dataset.balanced_subset(labels, 20, seed=0)
    assert labels[subset, 0].bincount().tolist() in ([9, 3, 8], [8, 3, 9])
    assert subset.tolist() == sorted(set(subset.tolist()))
