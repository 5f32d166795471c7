"""MNIST, SVHN and CIFAR-10 from their official files, fetched by torchvision; and generated stand-ins.

Each function takes a folder, a Path, and returns ((images, labels) of the training split, the same of the test split):
images uint8 (N, 32, 32, channels), labels int64 (N,). They raise InputError where the data is not to be had.
"""

import importlib.util

import numpy as np
import torch
from torchvision import datasets

import create_dataset
from harness.downloads import fetch, getting, missing_files
from harness.exits import InputError

MNIST_FILES = {  # of torchvision's folder MNIST/raw, with their MD5
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class MNIST(datasets.MNIST):
    """torchvision's MNIST, but never from the unchecked copies in MNIST/processed that its old versions made."""

    def _check_legacy_exist(self):
        return False


def read_mnist(root):
    """The 28x28 digits in a border of 2 black pixels, one channel."""
    missing = missing_files(root / "MNIST/raw", MNIST_FILES, "MNIST")
    mirror = next(url for url in MNIST.mirrors if url.startswith("https"))
    archives = {f"MNIST/raw/{name}": (mirror + name, md5) for name, md5 in MNIST.resources}
    with getting("MNIST", root, archives, "MNIST/raw/"):
        if missing:
            fetch(root, archives, [f"MNIST/raw/{name}" for name in missing])
        splits = [MNIST(root, train=train) for train in (True, False)]
    return [(np.pad(split.data.numpy(), ((0, 0), (2, 2), (2, 2)))[..., None], split.targets) for split in splits]


def read_svhn(root):
    """The cropped digits, training split without "extra"; the digit 0 is class 0. Needs scipy."""
    if importlib.util.find_spec("scipy") is None:
        raise InputError("SVHN's .mat files need the package scipy: pip install scipy")
    sources = [datasets.SVHN.split_list[name] for name in ("train", "test")]
    missing = missing_files(root / "SVHN", {name: md5 for _, name, md5 in sources}, "SVHN")
    archives = {f"SVHN/{name}": (url, md5) for url, name, md5 in sources}
    with getting("SVHN", root, archives, "SVHN/"):
        if missing:
            missing = [f"SVHN/{name}" for name in missing]
            fetch(root, {name: archives[name] for name in missing}, missing)
        splits = [datasets.SVHN(root / "SVHN", name) for name in ("train", "test")]
    return [(split.data.transpose(0, 2, 3, 1).copy(), torch.from_numpy(split.labels)) for split in splits]


def read_cifar10(root):
    """CIFAR-10; its files' MD5 are checked before anything is unpickled."""
    official = datasets.CIFAR10
    files = [*official.train_list, *official.test_list, (official.meta["filename"], official.meta["md5"])]
    missing = missing_files(root / official.base_folder, dict(files), "CIFAR-10")
    archives = {official.filename: (official.url, official.tgz_md5)}
    with getting("CIFAR-10", root, archives, f"{official.base_folder}/"):
        if missing:
            fetch(root, archives, [f"{official.base_folder}/{name}" for name in missing])
        splits = [official(root, train=train) for train in (True, False)]
    return [(split.data, torch.tensor(split.targets)) for split in splits]


def generate(root):
    """create_dataset.make_synthetic with the labels of its 10 classes; `root` is not looked at."""
    splits = [create_dataset.make_synthetic(train) for train in (True, False)]
    return [(images, labels[:, 1].contiguous()) for images, labels in splits]


def generate_grey(root):
    """The same, one channel."""
    return [(images[..., :1].copy(), labels) for images, labels in generate(root)]
