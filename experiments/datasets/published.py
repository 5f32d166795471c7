"""MNIST, SVHN and CIFAR-10 from their official files, fetched by torchvision; and generated stand-ins for them."""

import numpy as np
from torchvision import datasets

import create_dataset

MNIST_FILES = {  # of torchvision's folder MNIST/raw, with their MD5
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def read_mnist(root):
    """MNIST: 28x28 digits in a border of 2 black pixels, images uint8 (N, 32, 32, 1); labels int64 (N,)."""
    create_dataset.missing_files(root / "MNIST/raw", MNIST_FILES, "MNIST")
    archives = {f"MNIST/raw/{name}": (datasets.MNIST.mirrors[0] + name, md5) for name, md5 in datasets.MNIST.resources}
    with create_dataset.getting("MNIST", root, archives, "MNIST/raw/"):
        splits = [datasets.MNIST(root, train=train, download=True) for train in (True, False)]
    return [(np.pad(split.data.numpy(), ((0, 0), (2, 2), (2, 2)))[..., None], split.targets) for split in splits]


def generate(root):
    """create_dataset.make_synthetic with the labels of its 10 classes; `root` is not looked at."""
    splits = [create_dataset.make_synthetic(train) for train in (True, False)]
    return [(images, labels[:, 1].contiguous()) for images, labels in splits]


def generate_grey(root):
    """The same, one channel."""
    return [(images[..., :1].copy(), labels) for images, labels in generate(root)]
