"""A split's batches against the torchvision transforms of the paper's runs."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

import create_dataset
from create_dataset import Split
from harness.exits import InputError


def random_images(count):
    return np.random.default_rng(7).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def numbered_labels(count):
    """Image i has the labels (4i, 4i + 1, 4i + 2, 4i + 3), so that a label tells its image."""
    return torch.arange(4 * count).view(count, 4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def paper_transform(image, top=4, left=4, mirrored=False):
    """RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor, Normalize, with their draws given."""
    image = tv.crop(tv.pad(Image.fromarray(image), 4), top, left, 32, 32)
    image = tv.hflip(image) if mirrored else image
    return tv.normalize(tv.to_tensor(image), mean=[0.5] * 3, std=[0.2] * 3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_training_batches_are_exactly_what_torchvision_makes_of_the_drawn_crops_and_flips(channels_last):
    count, size = 60, 20
    images, labels = random_images(count), numbered_labels(count)
    draws, before = seeded(5), torch.get_rng_state()
    order = torch.randperm(count, generator=draws).tolist()
    tops = torch.randint(9, (count, 1), generator=draws).tolist()
    lefts = torch.randint(9, (count, 1), generator=draws).tolist()
    mirrored = torch.randint(2, (count, 1), generator=draws).tolist()

    batches = list(Split(images, labels, channels_last=channels_last).train_batches(size, seeded(5)))
    assert len(batches) == 3 and torch.equal(torch.get_rng_state(), before)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch_images, batch_labels in batches:
        assert batch_images.dtype == torch.float32 and batch_images.is_contiguous(memory_format=layout)
        assert batch_labels.dtype == torch.int64
    for place, index in enumerate(order):
        batch_images, batch_labels = batches[place // size]
        expected = paper_transform(images[index], tops[place][0], lefts[place][0], mirrored[place][0])
        assert torch.equal(batch_images[place % size], expected), place
        assert torch.equal(batch_labels[place % size], labels[index]), place


def test_every_image_comes_exactly_once_a_pass_with_all_its_labels():
    labels = numbered_labels(60)
    batches = list(Split(random_images(60), labels).train_batches(15, seeded()))
    assert [len(batch) for _, batch in batches] == [15] * 4
    seen = torch.cat([batch for _, batch in batches])
    assert not torch.equal(seen, labels)  # shuffled
    assert torch.equal(seen[seen[:, 0].argsort()], labels)


def test_a_last_smaller_training_batch_is_left_out():
    split = Split(random_images(10), numbered_labels(10))
    labels = [batch for _, batch in split.train_batches(4, seeded())]
    assert len(split) == 10 and split.iterations(4) == 2
    assert [len(batch) for batch in labels] == [4, 4] and len(torch.cat(labels)[:, 0].unique()) == 8


def test_all_81_crops_come_equally_often_and_half_of_each_mirrored():
    """Chi-square over the 162 outcomes, read off images whose pixels hold their own row and column."""
    count = 16_200
    row, column = np.meshgrid(np.arange(32, dtype=np.uint8), np.arange(32, dtype=np.uint8), indexing="ij")
    images = np.stack([row, column, 0 * row], axis=-1)[None].repeat(count, axis=0)
    outcomes = torch.zeros(9, 9, 2, dtype=torch.int64)
    for batch, _ in Split(images, torch.zeros(count, 4, dtype=torch.int64)).train_batches(900, seeded(3)):
        pixels = ((batch * 0.2 + 0.5) * 255).round().long()
        mirrored = (pixels[:, 1, 16, 17] < pixels[:, 1, 16, 16]).long()
        top = pixels[:, 0, 16, 16] - 16 + 4
        left = pixels[:, 1, 16, 16] - 16 + 4 + mirrored  # column 16 of a mirrored crop is its column 15
        outcomes.index_put_((top, left, mirrored), torch.ones_like(top), accumulate=True)
    assert outcomes.sum() == count
    chi_square = ((outcomes - 100.0) ** 2 / 100).sum()
    assert 161 - 4.5 * 18 < chi_square < 161 + 4.5 * 18  # 161 degrees of freedom, standard deviation 18
    assert abs(outcomes[:, :, 1].sum() / count - 0.5) < 0.016  # 4 standard deviations


def test_the_seed_of_the_generator_fixes_the_batches_and_every_pass_differs():
    split, generator, same = Split(random_images(30), numbered_labels(30)), seeded(2), seeded(2)
    passes = [list(split.train_batches(10, g)) for g in (generator, generator, same, same, seeded(3))]
    for a, b in ((0, 2), (1, 3)):
        for batch, again in zip(passes[a], passes[b], strict=True):
            assert torch.equal(batch[0], again[0]) and torch.equal(batch[1], again[1])
    orders = {tuple(torch.cat([labels for _, labels in batches])[:, 0].tolist()) for batches in passes}
    assert len(orders) == 3


def test_test_batches_are_the_unaugmented_images_in_order_with_a_smaller_last_batch():
    images, labels = random_images(25), numbered_labels(25)
    batches = list(Split(images, labels).test_batches(10))
    assert [len(batch) for batch, _ in batches] == [10, 10, 5]
    for batch_images, batch_labels in batches:
        assert batch_images.dtype == torch.float32 and batch_images.is_contiguous()
        assert batch_labels.dtype == torch.int64
    assert torch.equal(torch.cat([batch for batch, _ in batches]), torch.stack(list(map(paper_transform, images))))
    assert torch.equal(torch.cat([batch for _, batch in batches]), labels)


def test_a_split_holds_its_images_as_uint8():
    split = Split(random_images(20), numbered_labels(20))
    held = [value for value in vars(split).values() if torch.is_tensor(value) and value.dim() == 4]
    assert held and all(images.dtype == torch.uint8 for images in held)
    assert sum(images.nbytes for images in held) <= 20 * 40 * 40 * 3


def test_a_batch_larger_than_the_split_is_refused():
    split = Split(random_images(20), numbered_labels(20))
    assert split.iterations(20) == 1
    with pytest.raises(InputError, match="--batch-size 21"):
        split.iterations(21)
    with pytest.raises(InputError, match="--batch-size 21"):
        next(split.train_batches(21, seeded()))


def test_load_takes_a_class_balanced_part_of_the_training_images_and_all_test_images(spared):
    def load(train_images, seed=4):
        settings = {"dataset": "synthetic", "data_root": "unused", "train_images": train_images, "seed": seed}
        return create_dataset.load(argparse.Namespace(**settings, channels_last=False), "cpu")

    def pixels_and_labels(split):
        """All images as uint8 (N, 32, 32, 3) and all labels, got back from the test batches."""
        images, labels = map(torch.cat, zip(*split.test_batches()))
        return ((images * 0.2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy(), labels

    train, test = load(300)
    assert (len(train), len(test), len(load(None)[0])) == (300, 200, 1000) and not Path("unused").exists()
    (images, labels), (whole_images, whole_labels) = pixels_and_labels(train), create_dataset.make_synthetic(train=True)
    assert torch.bincount(labels[:, 3], minlength=100).tolist() == [3] * 100
    place = {image.tobytes(): i for i, image in enumerate(whole_images)}
    assert torch.equal(labels, whole_labels[[place[image.tobytes()] for image in images]])
    again, other = (pixels_and_labels(load(300, seed)[0])[0] for seed in (4, 5))
    assert np.array_equal(images, again) and not np.array_equal(images, other)

    (images, labels), (whole_images, whole_labels) = pixels_and_labels(test), create_dataset.make_synthetic(train=False)
    assert np.array_equal(images, whole_images) and torch.equal(labels, whole_labels)


# --- on a GPU -----------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_gpu_gives_the_batches_of_the_cpu():
    images, labels = random_images(100), numbered_labels(100)
    cpu, gpu = Split(images, labels, "cpu"), Split(images, labels, "cuda")
    pairs = [*zip(cpu.train_batches(20, seeded()), gpu.train_batches(20, seeded()), strict=True)]
    pairs += zip(cpu.test_batches(30), gpu.test_batches(30), strict=True)
    assert len(pairs) == 9
    for (cpu_images, cpu_labels), (gpu_images, gpu_labels) in pairs:
        assert gpu_images.is_cuda and gpu_labels.is_cuda and gpu_images.is_contiguous()
        assert torch.allclose(gpu_images.cpu(), cpu_images, rtol=0, atol=1e-6)
        assert torch.equal(gpu_labels.cpu(), cpu_labels)


@pytest.mark.cuda
def test_no_batch_after_the_first_waits_for_the_gpu():
    split = Split(random_images(100), numbered_labels(100), "cuda")
    for batches in (split.train_batches(20, seeded()), split.test_batches(20)):
        next(batches)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert len(list(batches)) == 4
        finally:
            torch.cuda.set_sync_debug_mode(before)
