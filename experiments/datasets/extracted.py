"""ImageNet at 32x32, CINIC-10 and UCF-101's frames from folders that the user has put there.

Each function takes a folder, a Path, and returns ((images, labels) of the training split, the same of the test split):
images uint8 (N, 32, 32, 3), labels int64 (N,). They raise InputError, with where to get the data and how it must lie,
where it is not there, and with the file where one is damaged or missing. Nothing is unpickled.
"""

import concurrent.futures

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from harness.exits import InputError


def open_arrays(path, *names):
    """Arrays of an npz file, by name; raises InputError where it is damaged or has no such arrays."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes of zipfile and numpy
        why = " ".join(str(error).split())  # on one line
        raise InputError(
            f"{path} cannot be read ({why}); it was cut short, or is another file: put the whole one there"
        ) from None


# --- ImageNet ---

IMAGENET_TRAIN, IMAGENET_TEST = 1_281_167, 50_000  # images


def read_imagenet(root):
    """The 32x32 set of Chrabaszcz et al. (2017): ten training batches, and the validation images as test split."""
    folder = root / "ImageNet32"
    files = [*(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val_data.npz"]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f'{folder} lacks {", ".join(missing)}; get "ImageNet downsampled, 32x32 (npz)" from '
            "https://image-net.org/download-images (it asks for a login), unzip both archives, and put the "
            f"{len(files)} files there, or name the folder that holds ImageNet32/ with --data-root"
        )
    # one array for all, filled file by file: a list of parts would need the memory twice
    images = np.empty((IMAGENET_TRAIN, 32, 32, 3), np.uint8)
    labels, count = [], 0
    for name in tqdm(files[:-1], desc="reading ImageNet", disable=None):
        part, part_labels = read_imagenet_file(folder / name)
        if count + len(part) <= IMAGENET_TRAIN:
            images[count : count + len(part)] = part
        count += len(part)
        labels.append(part_labels)
    test, test_labels = read_imagenet_file(folder / files[-1])
    for split, found, expected in (("training", count, IMAGENET_TRAIN), ("validation", len(test), IMAGENET_TEST)):
        if found != expected:
            raise InputError(f"{folder} has {found} {split} images; expected {expected}: put official files there")
    return (images, torch.cat(labels)), (test, test_labels)


def read_imagenet_file(path):
    """Images uint8 (N, 32, 32, 3) and labels int64 (N,), 0 to 999, of one of the npz files."""
    data, labels = open_arrays(path, "data", "labels")
    whole = labels.size and labels.dtype.kind in "iu"
    if not whole or data.dtype != np.uint8 or data.shape != (labels.size, 3 * 32 * 32):
        raise InputError(
            f"{path}: data is {data.dtype} {data.shape}, labels {labels.dtype} {labels.shape}; expected uint8 "
            "(N, 3072) and whole numbers (N,)"
        )
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), torch.from_numpy(labels.astype(np.int64)) - 1


# --- CINIC-10 ---

CINIC_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CINIC_IMAGES = 9_000  # of each class in each split


def read_cinic10(root):
    """CINIC-10 (Darlow et al., 2018): trained on train/, tested on test/, valid/ left aside."""
    folder = root / "CINIC-10"
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not there; get CINIC-10.tar.gz from https://datashare.ed.ac.uk/handle/10283/3192, unpack it "
            "into that folder, so that it holds train/, valid/ and test/, or name the folder that holds CINIC-10/ "
            "with --data-root"
        )
    return [read_cinic10_split(folder / split) for split in ("train", "test")]


def read_cinic10_split(folder):
    """The images of a split, class by class, files by name."""
    files = []
    for name in CINIC_CLASSES:
        found = sorted((folder / name).glob("*.png"))
        if len(found) != CINIC_IMAGES:
            raise InputError(
                f"{folder / name} has {len(found)} images; expected {CINIC_IMAGES}: unpack CINIC-10.tar.gz anew"
            )
        files += found
    with concurrent.futures.ThreadPoolExecutor() as pool:
        progress = tqdm(
            pool.map(read_png, files), desc=f"reading CINIC-10 {folder.name}", total=len(files), disable=None
        )
        images = np.stack(list(progress))
    return images, torch.arange(len(CINIC_CLASSES)).repeat_interleave(CINIC_IMAGES)


def read_png(path):
    """An image file as uint8 (32, 32, 3); a grey one's channel three times."""
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums, which decoding leaves out; the file has to be opened again after it
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's own are among these
        raise InputError(f"{path} is damaged ({error}); unpack the archive anew") from None
    if pixels.shape != (32, 32, 3):
        raise InputError(f"{path} has {pixels.shape[1]}x{pixels.shape[0]} pixels; expected 32x32")
    return pixels


# --- UCF-101 ---

UCF101_TRAIN, UCF101_TEST = 9_537, 3_783  # videos of split 1
EXTRACT = "python -m experiments.datasets.extract_ucf101"


def read_ucf101(root):
    """UCF-101, split 1, from the frames that experiments.datasets.extract_ucf101 has taken from its videos."""
    path = root / "UCF-101/frames.npz"
    if not path.is_file():
        raise InputError(
            f"{path} is not there; get UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip from "
            "https://www.crcv.ucf.edu/data/UCF101.php, unpack them, and make it once with "
            f"{EXTRACT} --data-root {root}"
        )
    names = ("train_images", "train_labels", "train_videos", "test_images", "test_labels")
    arrays = open_arrays(path, *names)
    if any(array.dtype.kind not in "iu" for array in arrays):
        raise InputError(f"{path} holds other than whole numbers: make it anew with {EXTRACT}")
    images, labels, videos, test_images, test_labels = arrays
    if len(images) != len(labels) or len(np.unique(videos)) != UCF101_TRAIN or len(test_images) != UCF101_TEST:
        raise InputError(
            f"{path} has {len(images)} frames with {len(labels)} labels of {len(np.unique(videos))} training videos, "
            f"and {len(test_images)} test videos; expected as many labels as frames, of {UCF101_TRAIN} and "
            f"{UCF101_TEST} videos: make it anew with {EXTRACT}"
        )
    labels, test_labels = (torch.from_numpy(array.astype(np.int64)) for array in (labels, test_labels))
    return (images, labels), (test_images, test_labels)
