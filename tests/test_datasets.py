"""Table 1's datasets, on files in their official formats that the tests write; MNIST's own bytes where they are."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, curves
from PIL import Image

import create_dataset
from experiments import model_maxl, model_single
from experiments.datasets import extract_ucf101, extracted, host_split, published, registry
from harness import exits
from harness.exits import InputError

RNG = np.random.default_rng(0)


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network in tests")

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)
    monkeypatch.setattr(torchvision.datasets.svhn, "download_url", fail)


def assert_one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


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
    with pytest.raises(InputError) as error:
        registry.read("mnist", "dataset")
    assert_one_sentence(error, str(path), "not the official MNIST file", "delete it")


def test_mnist_that_cannot_be_had_names_the_ways_out():
    with pytest.raises(InputError) as error:
        registry.read("mnist", "dataset")
    assert_one_sentence(
        error, "MNIST is not in dataset", "train-images-idx3-ubyte.gz is not there", "no network in tests",
        "Three ways out", "--data-root", "--dataset synthetic",
    )  # fmt: skip
    assert not Path("dataset").exists()


def test_a_whole_archive_of_mnist_is_not_called_missing(monkeypatch):
    """One archive is there and whole; the first that is not is the one named."""
    path = Path("dataset/MNIST/raw/train-images-idx3-ubyte.gz")
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b"x"))
    first, *others = torchvision.datasets.MNIST.resources
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", [(first[0], md5(path)), *others])
    with pytest.raises(InputError) as error:
        registry.read("mnist", "dataset")
    assert_one_sentence(error, "train-labels-idx1-ubyte.gz is not there")


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


def test_a_damaged_svhn_file_is_named(svhn):
    path = Path("dataset/SVHN/test_32x32.mat")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError) as error:
        registry.read("svhn", "dataset")
    assert_one_sentence(error, str(path), "not the official SVHN file")


def test_svhn_that_cannot_be_had_names_the_ways_out():
    pytest.importorskip("scipy")
    with pytest.raises(InputError) as error:
        registry.read("svhn", "dataset")
    assert_one_sentence(error, "SVHN/train_32x32.mat is not there", "Three ways out")
    assert not Path("dataset").exists()


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


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_cifar10_that_cannot_be_had_names_the_ways_out():
    with pytest.raises(InputError) as error:
        registry.read("cifar10", "dataset")
    assert_one_sentence(error, "CIFAR-10 is not in dataset", "cifar-10-python.tar.gz is not there", "Three ways out")
    assert not Path("dataset").exists()


def test_what_is_not_the_official_cifar10_is_never_unpickled(cifar10):
    path = Path("dataset/cifar-10-batches-py/data_batch_3")
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError) as error:
        registry.read("cifar10", "dataset")
    assert_one_sentence(error, str(path), "not the official CIFAR-10 file")
    assert not Path("evil").exists()


# --- ImageNet -------------------------------------------------------------------------------------------


@pytest.fixture
def imagenet(monkeypatch):
    """A small downsampled ImageNet in dataset/: ten training files and val_data.npz, labels from 1."""
    folder, arrays = Path("dataset/ImageNet32"), {}
    folder.mkdir(parents=True)
    for name in [*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"]:
        data, labels = RNG.integers(0, 256, (100, 3072), np.uint8), RNG.permutation(100) + 1
        arrays[name] = data, labels
        np.savez(folder / f"{name}.npz", data=data, labels=labels, mean=data.mean(axis=0))
    monkeypatch.setattr(extracted, "IMAGENET_TRAIN", 1000)
    monkeypatch.setattr(extracted, "IMAGENET_TEST", 100)
    monkeypatch.setitem(registry.DATASETS, "imagenet32", registry.DATASETS["imagenet32"]._replace(classes=100))
    return arrays


def test_imagenet_has_its_images_and_labels_from_0_in_order(imagenet):
    (images, labels), (test_images, test_labels) = registry.read("imagenet32", "dataset")
    assert images.shape == (1000, 32, 32, 3) and test_images.shape == (100, 32, 32, 3)
    for index in (0, 99, 100, 999):
        data, theirs = imagenet[f"train_data_batch_{1 + index // 100}"]
        assert np.array_equal(images[index], data[index % 100].reshape(3, 32, 32).transpose(1, 2, 0))
        assert labels[index] == theirs[index % 100] - 1
    assert test_labels.tolist() == (imagenet["val_data"][1] - 1).tolist()


def imagenet_file(name, **arrays):
    np.savez(f"dataset/ImageNet32/{name}.npz", **arrays)


def cut_short(name):
    path = Path(f"dataset/ImageNet32/{name}.npz")
    path.write_bytes(path.read_bytes()[:5000])


def npy_in_the_place_of(name):
    with open(f"dataset/ImageNet32/{name}.npz", "wb") as file:
        np.save(file, PIXELS)


def flip(name, mark, behind):
    """Another byte some way behind a mark of the file."""
    path = Path(f"dataset/ImageNet32/{name}.npz")
    content = bytearray(path.read_bytes())
    content[content.index(mark) + behind] ^= 255
    path.write_bytes(content)


PIXELS = np.zeros((100, 3072), np.uint8)
LABELS = np.arange(100) + 1


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda: cut_short("train_data_batch_3"), "train_data_batch_3.npz cannot be read"),
        (lambda: Path("dataset/ImageNet32/val_data.npz").unlink(), "lacks val_data.npz; get"),
        (lambda: imagenet_file("val_data", data=PIXELS), "val_data.npz cannot be read"),
        (lambda: npy_in_the_place_of("val_data"), "val_data.npz cannot be read"),
        (lambda: flip("val_data", b"PK\x01\x02", 10), "val_data.npz cannot be read"),  # the way of compression
        (lambda: flip("val_data", b"PK", 5000), "val_data.npz cannot be read"),
        (lambda: imagenet_file("val_data", data=PIXELS, labels=7), "labels are int64 (); expected whole numbers (N,)"),
        (lambda: imagenet_file("val_data", data=PIXELS, labels=LABELS[:, None]), "labels are int64 (100, 1)"),
        (lambda: imagenet_file("val_data", data=PIXELS[:0], labels=LABELS[:0]), "labels are int64 (0,)"),
        (lambda: imagenet_file("val_data", data=PIXELS, labels=LABELS.astype(str)), "expected whole numbers (N,)"),
        (lambda: imagenet_file("val_data", data=PIXELS.astype(float), labels=LABELS), "data is float64 (100, 3072)"),
        (lambda: imagenet_file("val_data", data=PIXELS[:, :9], labels=LABELS), "data is uint8 (100, 9); expected"),
        (lambda: imagenet_file("val_data", data=PIXELS, labels=LABELS - 1), "from 0 to 99; expected 1 to 1000"),
        (lambda: imagenet_file("val_data", data=PIXELS[1:], labels=LABELS[1:]), "99 validation images; expected 100"),
        (
            lambda: imagenet_file("train_data_batch_9", data=PIXELS[1:], labels=LABELS[1:]),
            "999 training images; expected 1000",
        ),
        (
            lambda: imagenet_file("train_data_batch_9", data=PIXELS.repeat(3, 0), labels=LABELS.repeat(3)),
            "1200 training images; expected 1000",
        ),
    ],
)
def test_imagenet_that_is_not_whole_is_refused_in_one_sentence(imagenet, damage, said):
    damage()
    with pytest.raises(InputError) as error:
        registry.read("imagenet32", "dataset")
    assert_one_sentence(error, said)


def test_nothing_in_an_imagenet_file_is_unpickled(imagenet):
    imagenet_file("val_data", data=np.array([Evil()]), labels=LABELS)
    with pytest.raises(InputError, match="cannot be read"):
        registry.read("imagenet32", "dataset")
    assert not Path("evil").exists()


# --- CINIC-10 -------------------------------------------------------------------------------------------


@pytest.fixture
def cinic(monkeypatch):
    """Three images of each class in each split; one is grey, as some of the real ones are."""
    monkeypatch.setattr(extracted, "CINIC_IMAGES", 3)
    for split in ("train", "valid", "test"):
        for c, name in enumerate(extracted.CINIC_CLASSES):
            folder = Path("dataset/CINIC-10", split, name)
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = np.full((32, 32, 3), (c, i, len(split)), np.uint8)
                Image.fromarray(pixels[:, :, 0] if c == i == 1 else pixels).save(folder / f"n{i}-{c}.png")


def test_cinic10_is_its_train_and_test_folders_class_by_class(cinic):
    for (images, labels), split in zip(registry.read("cinic10", "dataset"), ("train", "test")):
        assert labels.tolist() == [c for c in range(10) for _ in range(3)]
        for index, pixel in enumerate(images[:, 5, 7].tolist()):
            c, i = divmod(index, 3)
            assert pixel == ([1, 1, 1] if c == i == 1 else [c, i, len(split)])


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: (folder / "n1-3.png").unlink(), "cat has 2 images; expected 3: unpack"),
        (lambda folder: (folder / "n1-3.png").write_bytes(b"no image"), "n1-3.png is damaged"),
        (lambda folder: (folder / "n1-3.png").write_bytes((folder / "n1-3.png").read_bytes()[:60]), "is damaged"),
        (lambda folder: Image.new("RGB", (32, 31)).save(folder / "n1-3.png"), "has 32x31 pixels; expected 32x32"),
    ],
)
def test_cinic10_that_is_not_whole_is_refused_in_one_sentence(cinic, damage, said):
    damage(Path("dataset/CINIC-10/test/cat"))
    with pytest.raises(InputError) as error:
        registry.read("cinic10", "dataset")
    assert_one_sentence(error, said)


@pytest.mark.parametrize(
    "name, said", [("imagenet32", "npz"), ("cinic10", "CINIC-10.tar.gz"), ("ucf101", "UCF101.rar")]
)
def test_what_has_to_be_there_says_where_it_is_to_be_had(name, said):
    with pytest.raises(InputError) as error:
        registry.read(name, "dataset")
    assert_one_sentence(error, said, "https://")


# --- UCF-101 --------------------------------------------------------------------------------------------


def write_video(path, frames, codec="ffv1"):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as video:
        stream = video.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for grey in frames:
            frame = av.VideoFrame.from_ndarray(np.full((240, 320, 3), grey, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())


def write_lists(classes="1 Archery\n2 Biking\n", train="Archery/a.avi 1\nBiking/b.avi 2\n", test="Archery/c.avi\n"):
    Path("lists").mkdir(exist_ok=True)
    for name, text in zip(extract_ucf101.LISTS, (classes, train, test)):
        Path("lists", name).write_text(text)


@pytest.fixture
def split_1_of_three_videos(monkeypatch):
    for module in (extracted, extract_ucf101):
        monkeypatch.setattr(module, "UCF101_TRAIN", 2)
        monkeypatch.setattr(module, "UCF101_TEST", 1)


def extract(*options):
    return exits.run_main(extract_ucf101.main, ["--videos", "v", "--splits", "lists", "--jobs", "2", *options])


def test_frames_are_taken_at_even_distances_and_the_middle_one_of_a_test_video(split_1_of_three_videos):
    """The k-th frame is as grey as 5k, so that a frame tells its place."""
    write_lists()
    for name, count in (("Archery/a.avi", 40), ("Biking/b.avi", 20), ("Archery/c.avi", 21)):
        write_video(Path("v", name), [5 * k for k in range(count)])
    assert extract("--frames", "4") == 0
    (images, labels), (test_images, test_labels) = extracted.read_ucf101(Path("dataset"))
    assert images.shape == (8, 32, 32, 3) and images.dtype == np.uint8 and test_images.shape == (1, 32, 32, 3)
    assert labels.tolist() == [0] * 4 + [1] * 4 and test_labels.tolist() == [0]
    places = [5, 15, 25, 35, 2, 7, 12, 17]  # the middles of four quarters
    assert np.abs(images.mean(axis=(1, 2, 3)) - 5.0 * np.array(places)).max() < 3
    assert abs(test_images.mean() - 5 * 10) < 3


def test_videos_and_lists_that_are_not_right_are_refused_in_one_sentence(split_1_of_three_videos, capsys):
    pytest.importorskip("av")

    def refused(said, *options):
        assert extract(*options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
        assert not Path("dataset/UCF-101/frames.npz").exists()

    refused("classInd.txt cannot be read")
    write_lists(train="Archery/a.avi one\n")
    refused("the lists in lists are not UCF-101's")
    write_lists(train="Archery/a.avi 2\n")
    refused("Archery/a.avi is not of a class that classInd.txt has, or of another than its number")
    write_lists(classes="1 Archery\n3 Biking\n", train="Archery/a.avi 1\n")
    refused("does not number its classes from 1")
    write_lists(test="")
    refused("have 2 and 0 videos; expected 2 and 1, those of split 1")
    write_lists()
    refused("v lacks 3 of the lists' videos, Archery/a.avi for one")
    for name in ("Archery/a.avi", "Biking/b.avi", "Archery/c.avi"):
        write_video(Path("v", name), range(5))
    refused("has 5 frames, fewer than 6", "--frames", "6")
    refused("--frames 0 is out of range", "--frames", "0")
    Path("v/Biking/b.avi").write_bytes(b"no video")
    refused("b.avi cannot be read", "--frames", "2")
    write_video(Path("v/Biking/b.avi"), range(40), codec="mpeg4")  # which decodes what is left
    path = Path("v/Biking/b.avi")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    refused("of its 40 frames; unpack", "--frames", "2")


def test_without_av_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(extract_ucf101.importlib.util, "find_spec", lambda name: None)
    assert extract() == 2 and "pip install av" in capsys.readouterr().err


def test_frames_of_too_few_videos_are_refused():
    Path("dataset/UCF-101").mkdir(parents=True)
    arrays = {f"{split}_{what}": np.zeros(3, np.int64) for split in ("train", "test") for what in ("labels", "videos")}
    images = {f"{split}_images": np.zeros((3, 32, 32, 3), np.uint8) for split in ("train", "test")}
    np.savez("dataset/UCF-101/frames.npz", **arrays, **images)
    with pytest.raises(InputError) as error:
        registry.read("ucf101", "dataset")
    assert_one_sentence(error, "frames of 1 training and 3 test videos; expected 9537 and 3783: make it anew")


# --- what all have to be, and a reader's own ------------------------------------------------------------


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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("script", [model_single, model_maxl])
def test_a_dataset_of_the_readers_own_is_a_function_and_a_line(monkeypatch, script, channels):
    monkeypatch.setitem(registry.DATASETS, "mine", own_dataset(channels))
    few = [*TINY[2:4], "--batch-size", "20", "--epochs", "2", "--dataset", "mine", "--out", "r"]
    assert exits.run_main(script.main, few) == 0
    assert [float(row["learning_rate"]) for row in curves("r")] == pytest.approx([0.1, 0.05])


GOOD = np.zeros((40, 32, 32, 3), np.uint8), torch.arange(40) % 4


@pytest.mark.parametrize(
    "test, said",
    [
        ((GOOD[0].astype(np.float32), GOOD[1]), "the test images are float32 (40, 32, 32, 3); expected uint8 (40, 32"),
        ((GOOD[0][:, :, :, :1], GOOD[1]), "the test images are uint8 (40, 32, 32, 1); expected uint8 (40, 32, 32, 3)"),
        ((GOOD[0][1:], GOOD[1]), "the test images are uint8 (39, 32, 32, 3)"),
        ((GOOD[0], GOOD[1] + 1), "the test labels are torch.int64 of 4 classes, 1 to 4; expected int64, all of the 4"),
        ((GOOD[0], GOOD[1].clamp_max(2)), "of 3 classes, 0 to 2; expected int64, all of the 4 classes"),
        ((GOOD[0], GOOD[1].int()), "the test labels are torch.int32 of 4 classes"),
        ((GOOD[0], GOOD[1][:, None]), "the test labels have shape (40, 1); expected (N,)"),
        ((GOOD[0][:0], GOOD[1][:0]), "the test labels have shape (0,); expected (N,)"),
    ],
)
def test_what_no_dataset_may_be_is_refused_in_one_sentence(monkeypatch, test, said):
    monkeypatch.setitem(registry.DATASETS, "mine", own_dataset(splits=[GOOD, test]))
    with pytest.raises(InputError) as error:
        registry.read("mine", "dataset")
    assert_one_sentence(error, "Mine: ", said)


def test_digits_are_cropped_but_not_mirrored():
    """An image whose columns rise from left to right does so in every batch; with mirror, in about half of it."""
    images = np.arange(32, dtype=np.uint8)[None, None, :, None].repeat(400, 0).repeat(32, 1)
    for mirror, least, most in ((False, 400, 400), (True, 140, 260)):
        split = create_dataset.Split(images, torch.zeros(400, 1, dtype=torch.int64), mirror=mirror)
        (batch, _), *others = split.train_batches(400, torch.Generator().manual_seed(0))
        rising = (batch[:, 0, 16, 20] > batch[:, 0, 16, 10]).sum().item()
        assert least <= rising <= most and not others
    assert [registry.DATASETS[name].mirror for name in ("mnist", "svhn", "cifar10", "ucf101")] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
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
