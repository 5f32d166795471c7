"""The datasets of Table 1 by name, and how one of them, or a reader's own, becomes the splits to train on."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import create_dataset
from experiments.datasets import extracted, published
from harness.exits import InputError


class Dataset(NamedTuple):
    """A dataset whose labels have one level."""

    title: str
    classes: int
    sizes: tuple  # training and test images
    read: Callable  # folder -> ((images, labels) of the training split, the same of the test split); see `read`
    backbone: str  # of experiments.methods.backbones, in Table 1
    channels: int = 3  # of an image
    mirror: bool = True  # whether training images are mirrored


DATASETS = {  # Table 1's six, in its order
    "mnist": Dataset("MNIST", 10, (60_000, 10_000), published.read_mnist, "conv4", channels=1, mirror=False),
    "svhn": Dataset("SVHN", 10, (73_257, 26_032), published.read_svhn, "conv4", mirror=False),
    "cifar10": Dataset("CIFAR-10", 10, (50_000, 10_000), published.read_cifar10, "vgg16"),
    "imagenet32": Dataset("ImageNet 32×32", 1000, (1_281_167, 50_000), extracted.read_imagenet, "vgg16"),
    "cinic10": Dataset("CINIC-10", 10, (90_000, 90_000), extracted.read_cinic10, "resnet32"),
    "ucf101": Dataset("UCF-101", 101, (95_370, 3_783), extracted.read_ucf101, "resnet32"),
    # stand-ins
    "synthetic": Dataset("generated images", 10, (10_000, 2_000), published.generate, "resnet32"),
    "synthetic-grey": Dataset(
        "generated grey images", 10, (10_000, 2_000), published.generate_grey, "conv4", channels=1, mirror=False
    ),
}
SIZES = {name: dataset.sizes for name, dataset in DATASETS.items()}


def read(name, data_root):
    """Return ((images, labels) of the training split, the same of the test split) of a dataset.

    images: uint8 array (N, 32, 32, channels); labels: int64 tensor (N,) of class ids from 0, every class there.
    Raises InputError where the data is not to be had, or is not this.
    """
    dataset = DATASETS[name]
    splits = [(images, torch.as_tensor(labels)) for images, labels in dataset.read(Path(os.path.expanduser(data_root)))]
    for split, (images, labels) in zip(("training", "test"), splits):
        if labels.dim() != 1 or not len(labels):
            raise InputError(f"{dataset.title}: the {split} labels have shape {tuple(labels.shape)}; expected (N,)")
        shape = (len(labels), create_dataset.IMAGE_SIZE, create_dataset.IMAGE_SIZE, dataset.channels)
        if images.shape != shape or str(images.dtype).rpartition(".")[2] != "uint8":
            raise InputError(
                f"{dataset.title}: the {split} images are {images.dtype} {tuple(images.shape)}; expected uint8 {shape}"
            )
        there = labels.unique()
        if labels.dtype != torch.int64 or not torch.equal(there, torch.arange(dataset.classes)):
            raise InputError(
                f"{dataset.title}: the {split} labels are {labels.dtype} of {len(there)} classes, "
                f"{there.min()} to {there.max()}; expected int64, all of the {dataset.classes} classes from 0"
            )
    return splits


def load(settings, device):
    """Return the training and the test Split of settings.dataset on `device`, labels (N, 1); as create_dataset.load."""
    (images, labels), (test_images, test_labels) = read(settings.dataset, settings.data_root)
    labels, test_labels = labels[:, None], test_labels[:, None]
    if settings.train_images is not None:
        subset = create_dataset.balanced_subset(labels, settings.train_images, settings.seed)
        images, labels = images[subset.numpy()], labels[subset]
    options = device, settings.channels_last, DATASETS[settings.dataset].mirror
    return create_dataset.Split(images, labels, *options), create_dataset.Split(test_images, test_labels, *options)
