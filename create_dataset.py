"""The 4-level CIFAR-100 of MAXL (Appendix A, Table 2), and how a training step gets its batches.

Three parts, top to bottom: the hierarchy; the two datasets (CIFAR-100, and a synthetic stand-in with
the same labels); a split held on the training device that hands out augmented, scaled batches.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from harness.downloads import fetch, getting, missing_files
from harness.exits import InputError

# ------------------------------------------------------------------------------------------------
# The hierarchy: 3 -> 10 -> 20 -> 100 classes
# ------------------------------------------------------------------------------------------------

# Table 2, in its order, in CIFAR-100's own spelling of the 20 coarse and 100 fine classes.
HIERARCHY = {
    "animals": {
        "large_animals": {
            "reptiles": ["crocodile", "dinosaur", "lizard", "snake", "turtle"],
            "large_carnivores": ["bear", "leopard", "lion", "tiger", "wolf"],
            "large_omnivores_and_herbivores": ["camel", "cattle", "chimpanzee", "elephant", "kangaroo"],
        },
        "medium_animals": {
            "aquatic_mammals": ["beaver", "dolphin", "otter", "seal", "whale"],
            "medium_mammals": ["fox", "porcupine", "possum", "raccoon", "skunk"],
        },
        "small_animals": {
            "small_mammals": ["hamster", "mouse", "rabbit", "shrew", "squirrel"],
            "fish": ["aquarium_fish", "flatfish", "ray", "shark", "trout"],
        },
        "invertebrates": {
            "insects": ["bee", "beetle", "butterfly", "caterpillar", "cockroach"],
            "non-insect_invertebrates": ["crab", "lobster", "snail", "spider", "worm"],
        },
        "people": {
            "people": ["baby", "boy", "girl", "man", "woman"],
        },
    },
    "vegetations": {
        "vegetations": {
            "flowers": ["orchid", "poppy", "rose", "sunflower", "tulip"],
            "fruit_and_vegetables": ["apple", "mushroom", "orange", "pear", "sweet_pepper"],
            "trees": ["maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"],
        },
    },
    "objects_and_scenes": {
        "household_objects": {
            "food_containers": ["bottle", "bowl", "can", "cup", "plate"],
            "household_electrical_devices": ["clock", "keyboard", "lamp", "telephone", "television"],
            "household_furniture": ["bed", "chair", "couch", "table", "wardrobe"],
        },
        "construction": {
            "large_man-made_outdoor_things": ["bridge", "castle", "house", "road", "skyscraper"],
        },
        "natural_scenes": {
            "large_natural_outdoor_scenes": ["cloud", "forest", "mountain", "plain", "sea"],
        },
        "vehicles": {
            "vehicles_1": ["bicycle", "bus", "motorcycle", "pickup_truck", "train"],
            "vehicles_2": ["lawn_mower", "rocket", "streetcar", "tank", "tractor"],
        },
    },
}


def _class_names_and_labels(hierarchy):
    """Derive the class names of the four levels and the (100, 4) table fine class id -> ids at levels 0..3.

    Levels 0 and 1 are numbered in Table 2's order; levels 2 and 3 alphabetically, as CIFAR-100 numbers
    its `coarse_labels` and `fine_labels`.
    """
    paths = [
        (top, middle, coarse, fine)
        for top, middles in hierarchy.items()
        for middle, coarses in middles.items()
        for coarse, fines in coarses.items()
        for fine in fines
    ]
    names = [list(dict.fromkeys(path[level] for path in paths)) for level in range(4)]
    names[2].sort()
    names[3].sort()
    paths.sort(key=lambda path: path[3])
    table = [[names[level].index(path[level]) for level in range(4)] for path in paths]
    return tuple(map(tuple, names)), torch.tensor(table, dtype=torch.int64)


CLASS_NAMES, LABELS_OF_FINE_CLASS = _class_names_and_labels(HIERARCHY)
LEVEL_CLASSES = tuple(map(len, CLASS_NAMES))  # 3, 10, 20, 100
IMAGE_SIZE = 32


def parent_map(primary_level, auxiliary_level):
    """The primary class of every auxiliary class: int64 tensor of LEVEL_CLASSES[auxiliary_level] ids.

    Raises InputError unless the auxiliary level is finer than the primary level.
    """
    for task, level in (("primary", primary_level), ("auxiliary", auxiliary_level)):
        if level not in range(len(LEVEL_CLASSES)):
            raise InputError(
                f"{task} level {level} is unknown; the levels are 0, 1, 2 and 3 (3, 10, 20 and 100 classes)"
            )
    if auxiliary_level <= primary_level:
        raise InputError(
            f"auxiliary level {auxiliary_level} is not finer than primary level {primary_level}; "
            "give an auxiliary level above the primary level (0 < 1 < 2 < 3, that is 3, 10, 20, 100 classes)"
        )
    parents = torch.empty(LEVEL_CLASSES[auxiliary_level], dtype=torch.int64)
    parents[LABELS_OF_FINE_CLASS[:, auxiliary_level]] = LABELS_OF_FINE_CLASS[:, primary_level]
    return parents


def human_psi(primary_level, auxiliary_level):
    """ψ of the human hierarchy between two levels, a list of ints; human_psi(0, 1) is [5, 1, 4]."""
    return torch.bincount(parent_map(primary_level, auxiliary_level)).tolist()


def balanced_psi(primary_classes, auxiliary_classes, seed=0):
    """A well-balanced ψ (section 4.3), a list of `primary_classes` ints that sum to `auxiliary_classes`.

    Where the sizes cannot be equal they differ by one, and `seed` draws which classes get the larger.
    Raises InputError where there are fewer auxiliary than primary classes.
    """
    if not 1 <= primary_classes <= auxiliary_classes:
        raise InputError(
            f"{auxiliary_classes} auxiliary classes cannot be shared among {primary_classes} primary classes; "
            "every primary class needs at least one of its own"
        )
    smaller, larger_shares = divmod(auxiliary_classes, primary_classes)
    psi = np.full(primary_classes, smaller)
    psi[np.random.default_rng(seed).permutation(primary_classes)[:larger_shares]] += 1
    return psi.tolist()


# ------------------------------------------------------------------------------------------------
# The two datasets
# ------------------------------------------------------------------------------------------------


class CIFAR100(torchvision.datasets.CIFAR100):
    """torchvision's CIFAR-100 with the labels of all four levels.

    An item is (image, label): label is an int64 tensor of 4 class ids, so that on a batch
    `train_label[:, k]`, k = 0..3, holds the 3-, 10-, 20- and 100-class labels.

    Raises InputError where a file has not the official MD5 (checked before anything is unpickled),
    or where the files are missing and `download` is False.
    """

    def __init__(self, root, train=True, transform=None, download=False):
        root = Path(os.path.expanduser(root))
        files = [*self.train_list, *self.test_list, (self.meta["filename"], self.meta["md5"])]
        missing = missing_files(root / self.base_folder, dict(files), "CIFAR-100")
        if missing and download:
            archives = {self.filename: (self.url, self.tgz_md5)}
            fetch(root, archives, [f"{self.base_folder}/{name}" for name in missing])
        elif missing:
            raise InputError(
                f"{root / self.base_folder} lacks {', '.join(missing)}; "
                "pass download=True or put the CIFAR-100 files there"
            )
        super().__init__(root, train, transform)
        self.targets = LABELS_OF_FINE_CLASS[torch.tensor(self.targets)]


def load_cifar100(root):
    """Return ((images, labels) of the training split, the same of the test split), downloading if need be.

    images: uint8 array (N, 32, 32, 3); labels: int64 tensor (N, 4). Raises InputError with the ways out
    where the data is neither there nor to be had.
    """
    root = Path(os.path.expanduser(root))
    archives = {CIFAR100.filename: (CIFAR100.url, CIFAR100.tgz_md5)}
    with getting("CIFAR-100", root, archives, f"{CIFAR100.base_folder}/"):
        splits = [CIFAR100(root, train=train, download=True) for train in (True, False)]
    return [(split.data, split.targets) for split in splits]


SIZES = {"cifar100": (50_000, 10_000), "synthetic": (10_000, 2_000)}  # training and test images


def make_synthetic(train=True, seed=0):
    """Generate a stand-in for 4-level CIFAR-100: images uint8 (N, 32, 32, 3), labels int64 (N, 4).

    Truly hierarchical: every class of every level has a smooth random pattern, and an image is the sum of
    the patterns of its four classes, of smooth noise of its own and of pixel noise. So finer labels tell
    more about an image than coarser ones. Each fine class has N / 100 images, in a random order.
    """
    patterns = np.random.default_rng(seed)
    rng = np.random.default_rng([seed, 1 if train else 2])
    count = SIZES["synthetic"][0 if train else 1]

    def smooth(generator, n):
        coarse = torch.from_numpy(generator.standard_normal((n, 3, 5, 5), dtype=np.float32))
        return F.interpolate(coarse, size=IMAGE_SIZE, mode="bilinear", align_corners=True)

    labels = LABELS_OF_FINE_CLASS[torch.from_numpy(rng.permutation(np.arange(count) % LEVEL_CLASSES[-1]))]
    images = 0.6 * smooth(rng, count)
    images += 0.3 * torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    for level, strength in enumerate((0.3, 0.3, 0.4, 0.8)):
        images += strength * smooth(patterns, LEVEL_CLASSES[level])[labels[:, level]]
    images = (127.5 + 40 * images).round_().clamp_(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).numpy(), labels


def balanced_subset(labels, count, seed=0):
    """Indices (int64, ascending) of `count` images, the same number (to within one) of every class at the last level.

    labels: int64 (N, levels), class ids without a gap. Of a class that has fewer images than its share, all are taken.
    Raises InputError unless `count` is between one image of each class and all images.
    """
    fine = labels[:, -1].numpy()
    classes = int(fine.max()) + 1
    if not classes <= count <= len(fine):
        raise InputError(
            f"--train-images {count} is out of range; give {classes} (one of each class) to {len(fine)} (all)"
        )
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(fine == c)) for c in range(classes)]
    # in turns: the first image of each class, the second, ...; the seed draws which class begins
    turn = np.random.default_rng(seed).permutation(classes).argsort()
    order = np.lexsort([np.repeat(turn, list(map(len, members))), np.concatenate([np.arange(len(m)) for m in members])])
    return torch.from_numpy(np.sort(np.concatenate(members)[order[:count]]))


# ------------------------------------------------------------------------------------------------
# Batches, made on the training device
# ------------------------------------------------------------------------------------------------

PADDING = 4  # of the random crop


def pad(images):
    """uint8 (N, 32, 32, C) -> (N, 40, 40, C), in a black border."""
    return F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))


def scale(images):
    """uint8 pixels -> float32, (x/255 - 0.5) / 0.2 (ToTensor and Normalize of the authors' code)."""
    return images.to(torch.float32).div_(255).sub_(0.5).div_(0.2)


class Split:
    """A whole split as uint8 on `device`; batches are cut, augmented and scaled there.

    images: uint8 array (N, 32, 32, C); labels: int64 tensor (N, levels). channels_last: memory layout of the batches.
    mirror: whether training images are mirrored, which makes another sign of a digit.
    """

    def __init__(self, images, labels, device="cpu", channels_last=False, mirror=True):
        self.padded = pad(torch.as_tensor(images).to(device))
        self.labels, self.mirror = labels.to(device), mirror
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __len__(self):
        return len(self.labels)

    @property
    def images(self):
        """uint8 (N, 32, 32, C)."""
        return self.padded[:, PADDING:-PADDING, PADDING:-PADDING]

    def iterations(self, batch_size):
        """Batches in a pass of `train_batches`. Raises InputError where a batch is larger than the split."""
        if batch_size > len(self):
            raise InputError(
                f"--batch-size {batch_size} is larger than the {len(self)} training images; give {len(self)} or less"
            )
        return len(self) // batch_size

    def train_batches(self, batch_size, generator):
        """Yield (images float32 (B, C, 32, 32), labels int64 (B, levels)) once over the split in a random order.

        Each image is cropped at a random place after padding by 4 black pixels and, with `mirror`, mirrored with
        probability 1/2. `generator` is a CPU torch.Generator: everything random is drawn here, once a pass, so the same
        seed gives the same batches on every device and no batch waits for the host. A last, smaller batch is left out
        (the order differs in every pass; the paper's 50,000 images in batches of 100 leave none).
        """
        device, count = self.labels.device, len(self)
        order = torch.randperm(count, generator=generator).to(self.images.device)
        labels = self.labels[order.to(device)]
        top = torch.randint(2 * PADDING + 1, (count, 1), generator=generator).to(device)
        left = torch.randint(2 * PADDING + 1, (count, 1), generator=generator).to(device)
        mirrored = torch.randint(2 if self.mirror else 1, (count, 1), generator=generator).bool().to(device)
        line = torch.arange(IMAGE_SIZE, device=device)
        for i in range(self.iterations(batch_size)):
            batch = slice(i * batch_size, (i + 1) * batch_size)
            rows = top[batch] + line
            columns = left[batch] + torch.where(mirrored[batch], line.flip(0), line)
            yield self._finish(self._crop(order[batch], rows, columns)), labels[batch]

    def test_batches(self, batch_size=None):
        """Yield (images, labels) as above, in order, unaugmented, the last batch as small as it comes.

        batch_size: by default what is fast, 1000 on a GPU; a CPU's caches hold 100.
        """
        batch_size = batch_size or (100 if self.labels.device.type == "cpu" else 1000)
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size)):
            yield self._finish(images.to(labels.device)), labels

    def _crop(self, index, rows, columns):
        """The rows and columns, int64 (B, 32), of each of some padded images."""
        return self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _finish(self, images):
        """uint8 (B, 32, 32, C) -> what a network takes; they lie in memory channels last already."""
        return scale(images.permute(0, 3, 1, 2)).contiguous(memory_format=self.memory_format)


def read(dataset, data_root):
    """Return ((images, labels) of the training split, the same of the test split) of "cifar100" or "synthetic"."""
    if dataset == "synthetic":
        return [make_synthetic(train=True), make_synthetic(train=False)]
    return load_cifar100(data_root)


def load(settings, device):
    """Return the training and the test Split of settings.dataset ("cifar100" or "synthetic") on `device`.

    settings.train_images: size of a class-balanced subset of the training split, drawn from settings.seed; None is all
    of it. settings.channels_last: memory layout of the batches. The synthetic images are the same for every seed.
    """
    (images, labels), test = read(settings.dataset, settings.data_root)
    if settings.train_images is not None:
        subset = balanced_subset(labels, settings.train_images, settings.seed)
        images, labels = images[subset.numpy()], labels[subset]
    return Split(images, labels, device, settings.channels_last), Split(*test, device, settings.channels_last)
