"""MNIST, SVHN and CIFAR-10, on files in their official formats that the tests write; the real MNIST where it is."""

import gzip
import hashlib
import http.client
import os
import pickle
import shutil
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from conftest import Evil, one_sentence
from torchvision.datasets.utils import check_integrity, extract_archive

from experiments.datasets import published, registry
from harness import downloads
from harness.exits import InputError

RNG = np.random.default_rng(0)


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(downloads, "download_and_extract_archive", fail)
    monkeypatch.setattr(downloads, "download_url", fail)


@pytest.fixture
def server(monkeypatch, tmp_path_factory):
    """A folder that holds what can be fetched, by its name; a file that is not whole is cut off on the way."""
    folder = tmp_path_factory.mktemp("server")

    def download_url(url, root, filename, md5):
        place = Path(root, filename)
        if not check_integrity(place, md5):
            shutil.copy(folder / filename, place)
        if not check_integrity(place, md5):
            raise http.client.IncompleteRead(b"")

    def download_and_extract_archive(url, download_root, extract_root, filename, md5):
        download_url(url, download_root, filename, md5)
        extract_archive(Path(download_root, filename), extract_root)

    monkeypatch.setattr(downloads, "download_url", download_url)
    monkeypatch.setattr(downloads, "download_and_extract_archive", download_and_extract_archive)
    return folder


# --- MNIST ----------------------------------------------------------------------------------------------


def write_idx(path, array):
    """Big-endian: two zero bytes, 8 for unsigned bytes, the number of dimensions, the dimensions, the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def mnist(monkeypatch):
    """A small MNIST in dataset/, its files taken for the official ones."""
    arrays = {}
    for name, count in (("train", 30), ("t10k", 20)):
        arrays[f"{name}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{name}-labels-idx1-ubyte"] = RNG.permutation(np.arange(count, dtype=np.uint8) % 10)
    for name, array in arrays.items():
        write_idx(Path("dataset/MNIST/raw", name), array)
        monkeypatch.setitem(published.MNIST_FILES, name, md5(f"dataset/MNIST/raw/{name}"))
    return arrays


def test_mnist_lies_in_a_border_of_two_black_pixels(mnist):
    for (images, labels), name in zip(registry.read("mnist", "dataset"), ("train", "t10k")):
        digits = mnist[f"{name}-images-idx3-ubyte"]
        assert images.shape == (len(digits), 32, 32, 1) and images.dtype == np.uint8
        assert np.array_equal(images[:, 2:30, 2:30, 0], digits)
        assert images.sum(dtype=int) == digits.sum(dtype=int)  # so the border is 0
        assert labels.tolist() == mnist[f"{name}-labels-idx1-ubyte"].tolist() and labels.dtype == torch.int64


def test_a_damaged_mnist_file_is_named(mnist):
    path = Path("dataset/MNIST/raw/t10k-labels-idx1-ubyte")
    path.write_bytes(path.read_bytes()[:-1])
    with one_sentence(str(path), "not the official MNIST file", "delete it"):
        registry.read("mnist", "dataset")


def test_mnist_that_cannot_be_had_names_the_ways_out():
    said = "MNIST is not in dataset", "train-images-idx3-ubyte.gz is not there", "no network in tests", "Three ways out"
    with one_sentence(*said, "--data-root", "--dataset synthetic", lines=4):
        registry.read("mnist", "dataset")
    assert not Path("dataset").exists()


def test_mnist_is_fetched_and_unpacked(mnist, server, monkeypatch):
    raw, resources = Path("dataset/MNIST/raw"), []
    for name in mnist:
        archive = server / f"{name}.gz"
        archive.write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
        resources.append((archive.name, md5(archive)))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    (images, _), (test_images, _) = registry.read("mnist", "dataset")
    assert np.array_equal(images[:, 2:30, 2:30, 0], mnist["train-images-idx3-ubyte"]) and len(test_images) == 20
    assert sorted(os.listdir("dataset")) == ["MNIST"]
    assert sorted(os.listdir(raw)) == sorted([*mnist, *(name for name, _ in resources)])


def test_an_inner_folder_is_refused_with_the_right_one_named(mnist):
    with one_sentence("dataset/MNIST/raw is the inner folder of the data; name the one it lies in, dataset"):
        registry.read("mnist", "dataset/MNIST/raw")


def test_unchecked_copies_of_mnist_are_not_read(mnist):
    """Old versions of torchvision made them, and the new ones prefer them."""
    Path("dataset/MNIST/processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save(
            (torch.zeros(50, 28, 28, dtype=torch.uint8), torch.arange(50) % 10), f"dataset/MNIST/processed/{name}"
        )
    (images, _), _ = registry.read("mnist", "dataset")
    assert len(images) == 30 and images.any()


def test_the_real_mnist_has_the_counts_that_its_page_gives():
    root = Path(os.environ.get("MAXL_DATA") or Path(__file__).parents[1] / "dataset")
    if not (root / "MNIST/raw/train-images-idx3-ubyte").is_file():
        pytest.skip(f"no MNIST in {root}; name its folder in MAXL_DATA")
    (images, labels), (test_images, test_labels) = registry.read("mnist", root)
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4] and len(images) == 60_000
    assert images[:, 2:30, 2:30].mean() / 255 == pytest.approx(0.1307, abs=5e-5) and len(test_images) == 10_000


# --- SVHN -----------------------------------------------------------------------------------------------


@pytest.fixture
def svhn(monkeypatch):
    """A small SVHN in dataset/: X (32, 32, 3, N), y (N, 1) from 1 to 10, 10 for the digit 0."""
    io = pytest.importorskip("scipy.io")
    arrays, sources = {}, {}
    Path("dataset/SVHN").mkdir(parents=True)
    for name, count in (("train", 30), ("test", 20)):
        images = RNG.integers(0, 256, (count, 32, 32, 3), np.uint8)
        digits = RNG.permutation(np.arange(count) % 10)
        path = f"dataset/SVHN/{name}_32x32.mat"
        io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.where(digits == 0, 10, digits)[:, None]})
        arrays[name], sources[name] = (images, digits), ["https://x", f"{name}_32x32.mat", md5(path)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", sources)
    return arrays


def test_svhn_has_its_images_upright_and_0_for_the_digit_0(svhn):
    for (images, labels), (expected, digits) in zip(registry.read("svhn", "dataset"), svhn.values()):
        assert np.array_equal(images, expected) and labels.tolist() == digits.tolist()


def test_a_fetch_of_svhn_that_was_cut_off_leaves_nothing_in_the_way_of_the_next(svhn, server):
    folder, name = Path("dataset/SVHN"), "test_32x32.mat"
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    (server / name).write_bytes(whole[:-1])
    with one_sentence(f"{name} is not there", "IncompleteRead", "Three ways out", lines=4):
        registry.read("svhn", "dataset")
    assert os.listdir(folder) == ["train_32x32.mat"] and os.listdir("dataset") == ["SVHN"]
    (server / name).write_bytes(whole)
    _, (images, _) = registry.read("svhn", "dataset")
    assert np.array_equal(images, svhn["test"][0])


def test_without_scipy_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install scipy"):
        registry.read("svhn", "dataset")


# --- CIFAR-10 -------------------------------------------------------------------------------------------


@pytest.fixture
def cifar10(monkeypatch):
    """A small CIFAR-10 in dataset/: pickled batches of rows of 1024 red, 1024 green and 1024 blue pixels."""
    folder, official = Path("dataset/cifar-10-batches-py"), torchvision.datasets.CIFAR10
    folder.mkdir(parents=True)
    names, arrays, files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], {}, {}
    for name in names:
        data, labels = RNG.integers(0, 256, (20, 3072), np.uint8), [int(c) for c in RNG.permutation(20) % 10]
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
        arrays[name], files[name] = (data, labels), md5(folder / name)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(official, "train_list", [[name, files[name]] for name in names[:-1]])
    monkeypatch.setattr(official, "test_list", [[names[-1], files[names[-1]]]])
    meta = official.meta | {"md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(official, "meta", meta)
    return arrays


def test_cifar10_has_its_images_and_labels_in_order(cifar10):
    (images, labels), (test_images, test_labels) = registry.read("cifar10", "dataset")
    assert images.shape == (100, 32, 32, 3) and test_images.shape == (20, 32, 32, 3)
    for index in (0, 37, 99):
        data, theirs = cifar10[f"data_batch_{1 + index // 20}"]
        for channel in range(3):
            plane = data[index % 20][1024 * channel : 1024 * (channel + 1)].reshape(32, 32)
            assert np.array_equal(images[index, :, :, channel], plane)
        assert labels[index] == theirs[index % 20]
    assert test_labels.tolist() == cifar10["test_batch"][1]


def test_a_missing_file_of_cifar10_comes_from_its_archive(cifar10, server, monkeypatch):
    official, path = torchvision.datasets.CIFAR10, Path("dataset/cifar-10-batches-py/data_batch_2")
    shutil.make_archive("dataset/cifar-10-python", "gztar", "dataset", "cifar-10-batches-py")
    monkeypatch.setattr(official, "tgz_md5", md5("dataset/cifar-10-python.tar.gz"))
    path.unlink()
    registry.read("cifar10", "dataset")
    assert path.is_file()


def test_what_is_not_the_official_cifar10_is_never_unpickled(cifar10):
    path = Path("dataset/cifar-10-batches-py/data_batch_3")
    path.write_bytes(pickle.dumps(Evil()))
    with one_sentence(str(path), "not the official CIFAR-10 file"):
        registry.read("cifar10", "dataset")
    assert not Path("evil").exists()
