"""The 4-level hierarchy against Table 2; balanced ψ and subsets; the synthetic images."""

import numpy as np
import pytest
import torch
from table2 import NAMES, PAIRS, PATHS

import create_dataset
from create_dataset import balanced_psi, balanced_subset, human_psi, make_synthetic, parent_map
from harness.exits import InputError

# --- the hierarchy --------------------------------------------------------------------------------------


def test_the_transcribed_table_has_3_10_20_and_100_classes():
    assert [len({path[level] for path in PATHS}) for level in range(4)] == [3, 10, 20, 100]
    assert len(PATHS) == 100
    assert create_dataset.LEVEL_CLASSES == (3, 10, 20, 100)


@pytest.mark.parametrize("level", range(4))
def test_class_names_are_in_the_order_of_table_2_above_and_alphabetical_below(level):
    assert list(create_dataset.CLASS_NAMES[level]) == NAMES[level]


def test_labels_of_every_fine_class_are_those_of_its_row_of_table_2():
    labels = create_dataset.LABELS_OF_FINE_CLASS
    assert labels.dtype == torch.int64 and labels.shape == (100, 4)
    for path in PATHS:
        fine = NAMES[3].index(path[3])
        assert labels[fine].tolist() == [NAMES[level].index(path[level]) for level in range(4)], path


@pytest.mark.parametrize("primary, auxiliary", PAIRS)
def test_parent_map_of_every_pair_follows_table_2(primary, auxiliary):
    parent_of = {path[auxiliary]: path[primary] for path in PATHS}
    parents = parent_map(primary, auxiliary)
    assert parents.dtype == torch.int64
    assert [NAMES[primary][parent] for parent in parents.tolist()] == [parent_of[name] for name in NAMES[auxiliary]]


PSI_BY_HAND = {
    (0, 1): [5, 1, 4],
    (0, 2): [10, 3, 7],
    (0, 3): [50, 15, 35],
    (1, 2): [3, 2, 2, 2, 1, 3, 3, 1, 1, 2],
    (1, 3): [15, 10, 10, 10, 5, 15, 15, 5, 5, 10],
    (2, 3): [5] * 20,
}


@pytest.mark.parametrize("pair", PAIRS)
def test_human_psi_is_the_count_made_by_hand(pair):
    assert human_psi(*pair) == PSI_BY_HAND[pair]


@pytest.mark.parametrize("function", [parent_map, human_psi])
@pytest.mark.parametrize("pair", [(1, 1), (2, 0), (0, 4), (-1, 2)])
def test_levels_that_are_unknown_or_not_finer_are_refused(function, pair):
    with pytest.raises(InputError, match="level"):
        function(*pair)


# --- well-balanced ψ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("primary, auxiliary", [(3, 10), (10, 20), (20, 100)])
def test_balanced_psi_shares_out_all_classes_in_sizes_that_differ_by_at_most_one(primary, auxiliary):
    for seed in range(10):
        psi = balanced_psi(primary, auxiliary, seed)
        assert len(psi) == primary and all(type(size) is int for size in psi)
        assert sum(psi) == auxiliary
        assert max(psi) - min(psi) <= (0 if auxiliary % primary == 0 else 1)


@pytest.mark.parametrize("primary, auxiliary", [(3, 2), (0, 5)])
def test_balanced_psi_refuses_fewer_auxiliary_than_primary_classes(primary, auxiliary):
    with pytest.raises(InputError, match="cannot be shared"):
        balanced_psi(primary, auxiliary)


# --- the synthetic images -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthetic():
    return {"train": make_synthetic(train=True), "test": make_synthetic(train=False)}


@pytest.mark.parametrize("name, count", [("train", 10_000), ("test", 2_000)])
def test_synthetic_images_have_the_form_of_cifar100_and_as_many_of_each_class_in_no_order(synthetic, name, count):
    images, labels = synthetic[name]
    assert isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape == (count, 32, 32, 3)
    assert labels.dtype == torch.int64 and labels.shape == (count, 4)
    assert torch.bincount(labels[:, 3], minlength=100).tolist() == [count // 100] * 100


def test_synthetic_images_depend_on_the_seed_and_the_split_alone(synthetic):
    images, labels = synthetic["test"]
    again, labels_again = make_synthetic(train=False)
    assert images.tobytes() == again.tobytes() and torch.equal(labels, labels_again)
    assert images.tobytes() != make_synthetic(train=False, seed=1)[0].tobytes()
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in synthetic["train"][0]}


@pytest.fixture(scope="module")
def flat(synthetic):
    return {name: (torch.from_numpy(x).reshape(len(x), -1).float(), y) for name, (x, y) in synthetic.items()}


def class_means(images, classes):
    return torch.stack([images[classes == k].mean(dim=0) for k in range(int(classes.max()) + 1)])


@pytest.mark.parametrize("level, chance", [(3, 0.01), (2, 0.05)])
def test_synthetic_test_images_are_nearest_to_the_training_mean_of_their_class(flat, level, chance):
    (train, train_labels), (test, test_labels) = flat["train"], flat["test"]
    nearest = torch.cdist(test, class_means(train, train_labels[:, level])).argmin(dim=1)
    assert (nearest == test_labels[:, level]).float().mean() > 10 * chance


# --- class-balanced subsets -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels_of_1000():
    """Ten images of each fine class, shuffled; the other levels do not matter here."""
    fine = torch.arange(1000)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))] % 100
    return torch.stack([torch.zeros_like(fine), torch.zeros_like(fine), torch.zeros_like(fine), fine], dim=1)


@pytest.mark.parametrize("count", [100, 250, 999, 1000])
def test_a_subset_has_equally_many_images_of_every_fine_class_to_within_one(labels_of_1000, count):
    sizes = torch.bincount(labels_of_1000[balanced_subset(labels_of_1000, count), 3], minlength=100)
    assert len(sizes) == 100 and sizes.sum() == count and sizes.max() - sizes.min() == (count % 100 > 0)


def test_the_seed_draws_which_classes_have_one_more(labels_of_1000):
    """Each of 100 classes about half of the time: 200 draws of 150 images, 100 ± 7 standard."""
    sizes = [torch.bincount(labels_of_1000[balanced_subset(labels_of_1000, 150, seed), 3]) for seed in range(200)]
    larger = (torch.stack(sizes) == 2).sum(dim=0)
    assert 70 < larger.min() and larger.max() < 130


def test_a_subset_is_ascending_without_repeats_and_drawn_from_its_seed(labels_of_1000):
    first, again, other = (balanced_subset(labels_of_1000, 250, seed) for seed in (0, 0, 1))
    assert (first.diff() > 0).all() and first[0] >= 0 and first[-1] < 1000
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("count", [-1, 99, 1001])
def test_a_subset_out_of_range_is_refused(labels_of_1000, count):
    with pytest.raises(InputError, match="--train-images"):
        balanced_subset(labels_of_1000, count)
