"""ImageNet, CINIC-10 and UCF-101, on files in their official layouts that the tests write."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Evil, one_sentence
from PIL import Image

from experiments.datasets import extract_ucf101, extracted, registry
from harness import exits
from harness.exits import InputError

RNG = np.random.default_rng(0)

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


def damage_a_byte(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


PIXELS = np.zeros((100, 3072), np.uint8)
LABELS = np.arange(100) + 1


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda: Path("dataset/ImageNet32/val_data.npz").unlink(), "lacks val_data.npz; get"),
        (lambda: damage_a_byte(Path("dataset/ImageNet32/val_data.npz"), 5000), "val_data.npz cannot be read"),
        (lambda: imagenet_file("val_data", data=PIXELS, labels=7), "labels int64 (); expected uint8 (N, 3072)"),
        (lambda: imagenet_file("val_data", data=PIXELS, labels=LABELS - 1), "of 100 classes, -1 to 98; expected int64"),
        (lambda: imagenet_file("val_data", data=PIXELS[1:], labels=LABELS[1:]), "99 validation images; expected 100"),
    ],
)
def test_imagenet_that_is_not_whole_is_refused_in_one_sentence(imagenet, damage, said):
    damage()
    with one_sentence(said):
        registry.read("imagenet32", "dataset")


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
        (lambda folder: damage_a_byte(folder / "n1-3.png", -20), "n1-3.png is damaged"),  # of the last checksum
        (lambda folder: Image.new("RGB", (32, 31)).save(folder / "n1-3.png"), "has 32x31 pixels; expected 32x32"),
    ],
)
def test_cinic10_that_is_not_whole_is_refused_in_one_sentence(cinic, damage, said):
    damage(Path("dataset/CINIC-10/test/cat"))
    with one_sentence(said):
        registry.read("cinic10", "dataset")


@pytest.mark.parametrize(
    "name, said", [("imagenet32", "npz"), ("cinic10", "CINIC-10.tar.gz"), ("ucf101", "UCF101.rar")]
)
def test_what_has_to_be_there_says_where_it_is_to_be_had(name, said):
    with one_sentence(said, "https://"):
        registry.read(name, "dataset")


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
    monkeypatch.setattr(extract_ucf101, "FRAMES", 4)


def extract():
    return exits.run_main(extract_ucf101.main, ["--videos", "v", "--splits", "lists"])


def test_frames_are_taken_at_even_distances_and_the_middle_one_of_a_test_video(split_1_of_three_videos, capsys):
    """The k-th frame is as grey as 5k, so that a frame tells its place."""
    write_lists()
    for name, count in (("Archery/a.avi", 40), ("Biking/b.avi", 20), ("Archery/c.avi", 21)):
        write_video(Path("v", name), [5 * k for k in range(count)])
    assert extract() == 0
    (images, labels), (test_images, test_labels) = extracted.read_ucf101(Path("dataset"))
    assert images.shape == (8, 32, 32, 3) and images.dtype == np.uint8 and test_images.shape == (1, 32, 32, 3)
    assert labels.tolist() == [0] * 4 + [1] * 4 and test_labels.tolist() == [0]
    places = [5, 15, 25, 35, 2, 7, 12, 17]  # the middles of four quarters
    assert np.abs(images.mean(axis=(1, 2, 3)) - 5.0 * np.array(places)).max() < 3
    assert abs(test_images.mean() - 5 * 10) < 3
    before = Path("dataset/UCF-101/frames.npz").read_bytes()
    assert extract() == 2 and "frames.npz is there already" in capsys.readouterr().err
    assert Path("dataset/UCF-101/frames.npz").read_bytes() == before


def test_videos_and_lists_that_are_not_right_are_refused_in_one_sentence(split_1_of_three_videos, capsys):
    pytest.importorskip("av")

    def refused(said):
        assert extract() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
        assert not Path("dataset/UCF-101/frames.npz").exists()

    refused("the lists in lists are not UCF-101's ([Errno 2]")
    write_lists(train="Archery/a.avi 2\n")
    refused("the lists in lists are not UCF-101's")
    write_lists(test="")
    refused("have 2 and 0 videos; expected 2 and 1, those of split 1")
    write_lists()
    refused("v lacks 3 of the lists' videos, Archery/a.avi for one")
    for name in ("Archery/a.avi", "Biking/b.avi", "Archery/c.avi"):
        write_video(Path("v", name), range(3))
    refused("has 3 frames, fewer than 4")
    write_video(Path("v/Archery/a.avi"), range(5))
    write_video(Path("v/Biking/b.avi"), range(40), codec="mpeg4")  # which decodes what is left
    path = Path("v/Biking/b.avi")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    refused("of its 40 frames; unpack")


def test_without_av_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(extract_ucf101.importlib.util, "find_spec", lambda name: None)
    assert extract() == 2 and "pip install av" in capsys.readouterr().err


def test_another_files_frames_are_refused():
    Path("dataset/UCF-101").mkdir(parents=True)
    arrays = {f"{split}_{what}": np.zeros(3, np.int64) for split in ("train", "test") for what in ("labels", "videos")}
    images = {f"{split}_images": np.zeros((3, 32, 32, 3), np.uint8) for split in ("train", "test")}
    np.savez("dataset/UCF-101/frames.npz", **(arrays | images))
    with one_sentence("has 3 frames with 3 labels of 1 training videos, and 3 test videos; expected as many"):
        registry.read("ucf101", "dataset")
