"""The 4-level CIFAR-100 against Table 2 and the official files; the synthetic images; balanced ψ and subsets."""

import collections
import itertools
import os
import pickle
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import create_dataset
from create_dataset import CIFAR100, balanced_psi, balanced_subset, human_psi, load_cifar100, make_synthetic, parent_map
from harness.exits import InputError

# Table 2 as the paper prints it, one coarse class a line.
TABLE_2 = """
animals | large animals | reptiles | crocodile, dinosaur, lizard, snake, turtle
animals | large animals | large carnivores | bear, leopard, lion, tiger, wolf
animals | large animals | large omnivores and herbivores | camel, cattle, chimpanzee, elephant, kangaroo
animals | medium animals | aquatic mammals | beaver, dolphin, otter, seal, whale
animals | medium animals | medium-sized mammals | fox, porcupine, possum, raccoon, skunk
animals | small animals | small mammals | hamster, mouse, rabbit, shrew, squirrel
animals | small animals | fish | aquarium fish, flatfish, ray, shark, trout
animals | invertebrates | insects | bee, beetle, butterfly, caterpillar, cockroach
animals | invertebrates | non-insect invertebrates | crab, lobster, snail, spider, worm
animals | people | people | baby, boy, girl, man, woman
vegetations | vegetations | flowers | orchids, poppies, roses, sunflowers, tulips
vegetations | vegetations | fruit and vegetables | apples, mushrooms, oranges, pears, peppers
vegetations | vegetations | trees | maple, oak, palm, pine, willow
objects and scenes | household objects | food containers | bottles, bowls, cans, cups, plates
objects and scenes | household objects | household electrical devices | clock, keyboard, lamp, telephone, television
objects and scenes | household objects | household furniture | bed, chair, couch, table, wardrobe
objects and scenes | construction | large man-made outdoor things | bridge, castle, house, road, skyscraper
objects and scenes | natural scenes | large natural outdoor scenes | cloud, forest, mountain, plain, sea
objects and scenes | vehicles | vehicles 1 | bicycle, bus, motorcycle, pickup truck, train
objects and scenes | vehicles | vehicles 2 | lawn-mower, rocket, streetcar, tank, tractor
"""
# Where CIFAR-100 does not merely write "_" for a space.
OFFICIAL = {
    "medium-sized mammals": "medium_mammals",
    **{"orchids": "orchid", "poppies": "poppy", "roses": "rose", "sunflowers": "sunflower", "tulips": "tulip"},
    **{"apples": "apple", "mushrooms": "mushroom", "oranges": "orange", "pears": "pear", "peppers": "sweet_pepper"},
    **{"maple": "maple_tree", "oak": "oak_tree", "palm": "palm_tree", "pine": "pine_tree", "willow": "willow_tree"},
    **{"bottles": "bottle", "bowls": "bowl", "cans": "can", "cups": "cup", "plates": "plate"},
    "lawn-mower": "lawn_mower",
}


def read_table(text):
    """The 100 paths (level-0 name, ..., level-3 name) from the root to a fine class, in official spelling."""
    paths = []
    for line in text.strip().splitlines():
        *upper, fines = line.split(" | ")
        paths += [[*upper, fine] for fine in fines.split(", ")]
    return [tuple(OFFICIAL.get(name, name.replace(" ", "_")) for name in path) for path in paths]


PATHS = read_table(TABLE_2)
NAMES = [
    ["animals", "vegetations", "objects_and_scenes"],
    [
        *["large_animals", "medium_animals", "small_animals", "invertebrates", "people", "vegetations"],
        *["household_objects", "construction", "natural_scenes", "vehicles"],
    ],
    sorted({path[2] for path in PATHS}),
    sorted({path[3] for path in PATHS}),
]
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]

# ------------------------------------------------------------------------------------------------
# The hierarchy
# ------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("pair", [(1, 1), (2, 0), (3, 3), (0, 4), (-1, 2), (4, 5)])
def test_levels_that_are_unknown_or_not_finer_are_refused(function, pair):
    with pytest.raises(InputError, match="level"):
        function(*pair)


# ------------------------------------------------------------------------------------------------
# Well-balanced ψ
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("primary, auxiliary", [(3, 10), (3, 20), (3, 100), (10, 20), (10, 100), (20, 100), (7, 7)])
def test_balanced_psi_shares_out_all_classes_in_sizes_that_differ_by_at_most_one(primary, auxiliary):
    for seed in range(10):
        psi = balanced_psi(primary, auxiliary, seed)
        assert len(psi) == primary and all(type(size) is int for size in psi)
        assert sum(psi) == auxiliary
        assert max(psi) - min(psi) <= (0 if auxiliary % primary == 0 else 1)


def test_balanced_psi_is_drawn_from_its_seed():
    assert balanced_psi(10, 25, seed=3) == balanced_psi(10, 25, seed=3)
    assert len({tuple(balanced_psi(10, 25, seed)) for seed in range(20)}) > 15  # of 252 possible


def test_balanced_psi_gives_every_class_the_larger_share_about_equally_often():
    larger = collections.Counter(balanced_psi(3, 10, seed).index(4) for seed in range(300))
    assert all(70 <= larger[i] <= 130 for i in range(3)), larger  # 100 +- 3.7 standard deviations


@pytest.mark.parametrize("primary, auxiliary", [(3, 2), (10, 0), (0, 5)])
def test_balanced_psi_refuses_fewer_auxiliary_than_primary_classes(primary, auxiliary):
    with pytest.raises(InputError, match="cannot be shared"):
        balanced_psi(primary, auxiliary)


# ------------------------------------------------------------------------------------------------
# The real CIFAR-100
# ------------------------------------------------------------------------------------------------

FOLDER = "cifar-100-python"
FILES = ("train", "test", "meta")


@pytest.fixture(scope="module")
def data_root():
    """The folder that holds cifar-100-python/: $MAXL_DATA, else dataset/ of the repository."""
    root = Path(os.environ.get("MAXL_DATA") or Path(__file__).parents[1] / "dataset")
    if not all((root / FOLDER / name).is_file() for name in FILES):
        pytest.skip(f"no CIFAR-100 in {root}; name its folder in MAXL_DATA")
    return root.resolve()


@pytest.fixture(scope="module")
def official(data_root):
    """The official files, unpickled with nothing of the code under test."""
    return {name: pickle.loads((data_root / FOLDER / name).read_bytes(), encoding="latin1") for name in FILES}


@pytest.fixture(scope="module")
def splits(data_root):
    return {name: CIFAR100(data_root, train=name == "train") for name in ("train", "test")}


def copy_data(data_root, root, altered=None, change=None, left_out=()):
    """A CIFAR-100 folder of links to the data, but for the file `altered`, which gets change(its path)."""
    (root / FOLDER).mkdir(parents=True)
    for name in set(FILES) - set(left_out):
        source, target = data_root / FOLDER / name, root / FOLDER / name
        if name == altered:
            target.write_bytes(change(source))
        else:
            target.symlink_to(source)
    return root


@pytest.fixture
def no_unpickling(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("a file was unpickled before it was checked")

    monkeypatch.setattr(torchvision.datasets.cifar.pickle, "load", fail)


@pytest.fixture
def no_download(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("a download was tried")

    monkeypatch.setattr(create_dataset, "download_and_extract_archive", fail)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)


def test_class_names_are_those_of_the_official_meta_file(official):
    assert list(create_dataset.CLASS_NAMES[2]) == official["meta"]["coarse_label_names"]
    assert list(create_dataset.CLASS_NAMES[3]) == official["meta"]["fine_label_names"]


@pytest.mark.parametrize("name, count", [("train", 50_000), ("test", 10_000)])
def test_levels_2_and_3_of_all_images_are_the_official_coarse_and_fine_labels(splits, official, name, count):
    labels = torch.stack(list(splits[name].targets))
    assert labels.dtype == torch.int64 and labels.shape == (count, 4)
    assert labels[:, 2].tolist() == official[name]["coarse_labels"]
    assert labels[:, 3].tolist() == official[name]["fine_labels"]


@pytest.mark.parametrize("name", ["train", "test"])
def test_an_item_is_the_official_image_with_the_four_ids_of_its_row_of_table_2(splits, official, name):
    path_of = {path[3]: path for path in PATHS}
    for index in (0, 1, 4321, len(splits[name]) - 1):
        image, label = splits[name][index]
        pixels = np.asarray(official[name]["data"][index]).reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(np.asarray(image), pixels)
        assert isinstance(label, torch.Tensor) and label.dtype == torch.int64 and label.shape == (4,)
        path = path_of[official["meta"]["fine_label_names"][official[name]["fine_labels"][index]]]
        assert [NAMES[level][label[level]] for level in range(4)] == list(path)


def test_a_data_loader_hands_out_the_labels_of_level_k_in_column_k(data_root, official, no_download):
    split = CIFAR100(data_root, train=False, transform=torchvision.transforms.ToTensor())
    images, train_label = next(iter(torch.utils.data.DataLoader(split, batch_size=256)))
    assert images.dtype == torch.float32 and images.shape == (256, 3, 32, 32)
    assert torch.equal((images * 255).round().flatten(1).byte(), torch.from_numpy(official["test"]["data"][:256]))
    assert train_label.dtype == torch.int64 and train_label.shape == (256, 4)
    fine_names = [official["meta"]["fine_label_names"][fine] for fine in official["test"]["fine_labels"][:256]]
    path_of = {path[3]: path for path in PATHS}
    for k in range(4):
        assert train_label[:, k].tolist() == [NAMES[k].index(path_of[name][k]) for name in fine_names]


def one_bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    return content


def last_byte_lost(path):
    return path.read_bytes()[:-1]


def half_a_megabyte_of_it(path):
    with open(path, "rb") as file:
        return file.read(2**19)


def emptied(path):
    return b""


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "name, change",
    [
        ("train", half_a_megabyte_of_it),
        ("test", one_bit_flipped),
        ("test", last_byte_lost),
        ("meta", one_bit_flipped),
        ("meta", last_byte_lost),
        ("meta", emptied),
    ],
)
def test_a_damaged_file_is_refused_by_name_before_anything_is_unpickled(
    data_root, tmp_path, no_unpickling, no_download, name, change, train
):
    root = copy_data(data_root, tmp_path / "data", name, change)
    try:
        with pytest.raises(InputError) as error:
            CIFAR100(root, train=train, download=True)
        assert str(root / FOLDER / name) in str(error.value)
    finally:
        shutil.rmtree(root)  # pytest would keep it


def test_a_damaged_file_is_refused_by_load_cifar100_too(data_root, tmp_path, no_unpickling, no_download):
    root = copy_data(data_root, tmp_path, "meta", one_bit_flipped)
    with pytest.raises(InputError) as error:
        load_cifar100(root)
    assert str(root / FOLDER / "meta") in str(error.value)


def test_data_that_is_missing_is_not_downloaded_unasked(tmp_path, no_download):
    with pytest.raises(InputError, match="train, test, meta"):
        CIFAR100(tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_single_missing_file_is_named(data_root, tmp_path, no_unpickling, no_download, name):
    root = copy_data(data_root, tmp_path, left_out=[name])
    with pytest.raises(InputError, match=f"lacks {name};"):
        CIFAR100(root)


def test_the_inner_folder_given_as_the_root_is_refused_with_the_right_one_named(data_root, no_download):
    with pytest.raises(InputError, match=f"name the one it lies in, {data_root}"):
        load_cifar100(data_root / FOLDER)


def test_data_in_place_is_loaded_without_a_download(data_root, official, no_download):
    (images, labels), (test_images, test_labels) = load_cifar100(str(data_root))
    assert images.dtype == test_images.dtype == np.uint8
    assert np.array_equal(images.transpose(0, 3, 1, 2).reshape(50_000, -1), official["train"]["data"])
    assert np.array_equal(test_images.transpose(0, 3, 1, 2).reshape(10_000, -1), official["test"]["data"])
    assert labels[:, 3].tolist() == official["train"]["fine_labels"]
    assert test_labels[:, 3].tolist() == official["test"]["fine_labels"]


def test_missing_data_is_fetched_once_as_the_official_archive(data_root, official, tmp_path, monkeypatch):
    root, calls = tmp_path / "new" / "data", []

    def fake_download(url, download_root, filename=None, md5=None, **_):
        calls.append((url, Path(download_root), filename, md5))
        copy_data(data_root, Path(download_root))

    monkeypatch.setattr(create_dataset, "download_and_extract_archive", fake_download)
    (images, _), (test_images, test_labels) = load_cifar100(root)
    archive, md5 = "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"
    assert calls == [(f"https://www.cs.toronto.edu/~kriz/{archive}", root, archive, md5)]
    assert images.shape == (50_000, 32, 32, 3) and test_images.shape == (10_000, 32, 32, 3)
    assert test_labels[:, 3].tolist() == official["test"]["fine_labels"]


def test_a_failed_download_names_the_three_ways_out_and_leaves_no_folder(tmp_path, monkeypatch):
    def fail(url, download_root, **_):
        Path(download_root).mkdir(parents=True)  # as torchvision's does before it asks the network
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(create_dataset, "download_and_extract_archive", fail)
    root = tmp_path / "new" / "data"
    with pytest.raises(InputError) as error:
        load_cifar100(root)
    text = str(error.value)
    assert "Name or service not known" in text
    assert str(root / "cifar-100-python.tar.gz") in text and "https://www.cs.toronto.edu/~kriz/" in text
    assert "--data-root" in text and "--dataset synthetic" in text
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_leaves_a_folder_that_was_there(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(create_dataset, "download_and_extract_archive", fail)
    with pytest.raises(InputError):
        load_cifar100(tmp_path)
    assert tmp_path.is_dir()


# ------------------------------------------------------------------------------------------------
# The synthetic images
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthetic():
    return {"train": make_synthetic(train=True), "test": make_synthetic(train=False)}


@pytest.mark.parametrize("name, count", [("train", 10_000), ("test", 2_000)])
def test_synthetic_images_have_the_form_of_cifar100_and_as_many_of_each_class(synthetic, name, count):
    images, labels = synthetic[name]
    assert isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape == (count, 32, 32, 3)
    assert labels.dtype == torch.int64 and labels.shape == (count, 4)
    assert torch.bincount(labels[:, 3], minlength=100).tolist() == [count // 100] * 100


@pytest.mark.parametrize("name", ["train", "test"])
def test_synthetic_labels_follow_table_2(synthetic, name):
    rows = {tuple(NAMES[level].index(path[level]) for level in range(4)) for path in PATHS}
    assert set(map(tuple, synthetic[name][1].tolist())) == rows


@pytest.mark.parametrize("name", ["train", "test"])
def test_synthetic_images_are_in_no_order_and_seldom_clipped(synthetic, name):
    images, labels = synthetic[name]
    assert len(set(labels[:100, 3].tolist())) < 90  # all 100 were the classes in turn, about 63 at random
    assert 100 < images.mean() < 155 and images.std() > 20
    black, nearly_black, nearly_white, white = (np.mean(images == value) for value in (0, 1, 254, 255))
    assert nearly_black < black < 0.01 and nearly_white < white < 0.01  # clipped, not wrapped round


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


def test_synthetic_fine_classes_are_the_further_apart_the_less_of_the_tree_they_share(flat):
    means = class_means(flat["train"][0], flat["train"][1][:, 3])
    apart = torch.cdist(means, means)
    path_of = {NAMES[3].index(path[3]): path[:3] for path in PATHS}
    distances = collections.defaultdict(list)
    for a, b in itertools.combinations(range(100), 2):
        shared = sum(x == y for x, y in zip(path_of[a], path_of[b]))
        distances[shared].append(apart[a, b].item())
    siblings, same_level_1, same_level_0, strangers = (np.mean(distances[shared]) for shared in (3, 2, 1, 0))
    assert siblings * 1.02 < same_level_1 and same_level_1 * 1.02 < same_level_0 and same_level_0 * 1.02 < strangers


@pytest.mark.parametrize("level, chance", [(3, 0.01), (2, 0.05)])
def test_synthetic_test_images_are_nearest_to_the_training_mean_of_their_class(flat, level, chance):
    (train, train_labels), (test, test_labels) = flat["train"], flat["test"]
    nearest = torch.cdist(test, class_means(train, train_labels[:, level])).argmin(dim=1)
    assert (nearest == test_labels[:, level]).float().mean() > 10 * chance


def test_synthetic_fine_classes_can_be_told_apart_within_their_coarse_class(flat):
    (train, train_labels), (test, test_labels) = flat["train"], flat["test"]
    coarse_of = {NAMES[3].index(path[3]): NAMES[2].index(path[2]) for path in PATHS}
    coarse = torch.tensor([coarse_of[fine] for fine in range(100)])
    distances = torch.cdist(test, class_means(train, train_labels[:, 3]))
    distances[coarse[test_labels[:, 3], None] != coarse] = torch.inf
    assert (distances.argmin(dim=1) == test_labels[:, 3]).float().mean() > 0.6  # chance is 0.2


# ------------------------------------------------------------------------------------------------
# Class-balanced subsets
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels_of_1000():
    """Ten images of each fine class, shuffled; the other levels do not matter here."""
    fine = torch.arange(1000)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))] % 100
    return torch.stack([torch.zeros_like(fine), torch.zeros_like(fine), torch.zeros_like(fine), fine], dim=1)


@pytest.mark.parametrize("count", [100, 300, 1000])
def test_a_subset_has_equally_many_images_of_every_fine_class(labels_of_1000, count):
    subset = balanced_subset(labels_of_1000, count)
    assert subset.dtype == torch.int64 and len(subset) == count
    assert torch.bincount(labels_of_1000[subset, 3], minlength=100).tolist() == [count // 100] * 100


@pytest.mark.parametrize("count", [101, 250, 999])
def test_a_subset_that_cannot_be_equal_is_so_to_within_one(labels_of_1000, count):
    sizes = torch.bincount(labels_of_1000[balanced_subset(labels_of_1000, count), 3], minlength=100)
    assert sizes.sum() == count and sizes.max() - sizes.min() == 1


def test_the_seed_draws_which_classes_have_one_more(labels_of_1000):
    """Each of 100 classes about half of the time: 200 draws of 150 images, 100 ± 7 standard."""
    sizes = [torch.bincount(labels_of_1000[balanced_subset(labels_of_1000, 150, seed), 3]) for seed in range(200)]
    larger = (torch.stack(sizes) == 2).sum(dim=0)
    assert 70 < larger.min() and larger.max() < 130


def test_a_subset_is_ascending_without_repeats_and_drawn_from_its_seed(labels_of_1000):
    first, again, other = (balanced_subset(labels_of_1000, 250, seed) for seed in (0, 0, 1))
    assert (first.diff() > 0).all() and first[0] >= 0 and first[-1] < 1000
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_image_is_in_the_subset_of_some_seed(labels_of_1000):
    seen = torch.cat([balanced_subset(labels_of_1000, 500, seed) for seed in range(30)]).unique()
    assert seen.tolist() == list(range(1000))


@pytest.mark.parametrize("count", [-1, 0, 99, 1001])
def test_a_subset_out_of_range_is_refused(labels_of_1000, count):
    with pytest.raises(InputError, match="--train-images"):
        balanced_subset(labels_of_1000, count)
