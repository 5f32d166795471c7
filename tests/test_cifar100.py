"""The real CIFAR-100 against Table 2 and the official files; damaged, missing and downloaded data."""

import os
import pickle
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from table2 import NAMES, PATHS

import create_dataset
from create_dataset import CIFAR100, load_cifar100
from harness import downloads
from harness.exits import InputError

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

    monkeypatch.setattr(downloads, "download_and_extract_archive", fail)


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


def one_bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    return content


def last_byte_lost(path):
    return path.read_bytes()[:-1]


def half_a_megabyte_of_it(path):
    with open(path, "rb") as file:
        return file.read(2**19)


@pytest.mark.parametrize("name, change, train", [
    ("train", half_a_megabyte_of_it, False),
    ("test", one_bit_flipped, True),
    ("meta", last_byte_lost, False),
])  # fmt: skip
def test_a_damaged_file_is_refused_by_name_before_anything_is_unpickled(
    data_root, tmp_path, no_unpickling, no_download, name, change, train
):
    root = copy_data(data_root, tmp_path / "data", name, change)
    try:
        for read in (lambda: CIFAR100(root, train=train, download=True), lambda: load_cifar100(root)):
            with pytest.raises(InputError) as error:
                read()
            assert str(root / FOLDER / name) in str(error.value)
    finally:
        shutil.rmtree(root)  # pytest would keep it


def test_data_that_is_missing_is_not_downloaded_unasked(tmp_path, no_download):
    with pytest.raises(InputError, match="train, test, meta"):
        CIFAR100(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_single_missing_file_is_named(data_root, tmp_path, no_unpickling, no_download):
    root = copy_data(data_root, tmp_path, left_out=["meta"])
    with pytest.raises(InputError, match="lacks meta;"):
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


@pytest.mark.parametrize("others", [0, 1])
def test_missing_data_is_fetched_as_the_official_archive_while_others_do_so_too(
    data_root, official, tmp_path, monkeypatch, others
):
    """Another process begins when this one has the archive, and ends before it: neither sees half of a file."""
    root, calls = tmp_path / "new" / "data", []

    def fake_download(url, download_root, extract_root, filename=None, md5=None):
        calls.append((url, filename, md5))
        Path(download_root, filename).write_text("an archive")
        if len(calls) <= others:
            load_cifar100(root)
        copy_data(data_root, Path(extract_root))

    monkeypatch.setattr(downloads, "download_and_extract_archive", fake_download)
    (images, _), (test_images, test_labels) = load_cifar100(root)
    archive, md5 = "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"
    assert calls == [(f"https://www.cs.toronto.edu/~kriz/{archive}", archive, md5)] * (1 + others)
    assert sorted(path.name for path in root.iterdir()) == ["cifar-100-python", archive]
    assert images.shape == (50_000, 32, 32, 3) and test_images.shape == (10_000, 32, 32, 3)
    assert test_labels[:, 3].tolist() == official["test"]["fine_labels"]


@pytest.mark.parametrize("was_there", [False, True])
def test_a_failed_download_names_the_three_ways_out_and_leaves_what_was_there(was_there, tmp_path, monkeypatch):
    def fail(url, download_root, *_, **__):
        Path(download_root, "half of the archive").write_text("half")
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(downloads, "download_and_extract_archive", fail)
    root = tmp_path / "new" / "data"
    if was_there:
        root.mkdir(parents=True)
    with pytest.raises(InputError) as error:
        load_cifar100(root)
    text = str(error.value)
    assert "Name or service not known" in text
    assert str(root / "cifar-100-python.tar.gz") in text and "https://www.cs.toronto.edu/~kriz/" in text
    assert "--data-root" in text and "--dataset synthetic" in text
    assert list(tmp_path.rglob("*")) == ([root.parent, root] if was_there else [])
