"""What lower precision does to the gradients; MAXL's second pass is spared it."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from conftest import TINY, run_script

import create_dataset
import maxl
from benchmarks import step_cost


def tf32_allowed():
    """Of matrix products and of convolutions."""
    if not hasattr(torch.backends.cudnn, "conv"):  # torch before 2.9
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return tuple(kind.fp32_precision == "tf32" for kind in (torch.backends.cuda.matmul, torch.backends.cudnn.conv))


@pytest.mark.parametrize("name, allowed", [("auxiliary_training_step", True), ("meta_gradient", False)])
def test_tf32_is_off_in_the_second_pass_alone(name, allowed, monkeypatch):
    """--precision bf16 allows TF32 for what autocast leaves; the flags can be set and read without a GPU."""
    original, seen = getattr(maxl, name), set()

    def spied(*arguments, **options):
        seen.add(tf32_allowed())
        return original(*arguments, **options)

    monkeypatch.setattr(maxl, name, spied)
    assert run_script("model_vgg_maxl", *TINY, "--epochs", 1, "--precision", "bf16", "--out", "r") == 0
    assert seen == {(allowed, allowed)}


def test_bf16_spoils_the_meta_gradient_far_more_than_an_ordinary_one():
    """At initial weights, beside float64; the reason for the second pass to be in fp32."""
    bench = step_cost.Bench(torch.device("cpu"), width=1 / 16, batch_size=40)

    def ordinary(network, generator, images):
        labels = generator(images, bench.primary).detach()
        loss, _ = maxl.multi_task_loss(network, images, bench.primary, labels)
        return torch.autograd.grad(loss, list(network.parameters()))

    def meta(network, generator, images):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        return maxl.meta_gradient(network, generator, optimizer, images, bench.primary, entropy_weight=None)[0]

    def gradient(function, dtype=torch.float32):
        networks = (copy.deepcopy(module).to(dtype) for module in (bench.network, bench.generator))
        return torch.cat([g.flatten() for g in function(*networks, bench.images.to(dtype))]).double()

    errors = {}
    for function in (ordinary, meta):
        exact = gradient(function, torch.float64)
        assert (gradient(function) - exact).norm() < 1e-3 * exact.norm()
        with mock.patch.object(maxl, "RefuseLowPrecision", contextlib.nullcontext):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                errors[function] = (gradient(function) - exact).norm() / exact.norm()
    assert errors[meta] > 1.5 * errors[ordinary] > 1e-2


def test_images_stay_channels_last_from_the_gather_on():
    """Scaling leaves them as they lie, so that for channels last nothing is copied after it."""
    pixels = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8)
    labels = torch.zeros(20, 4, dtype=torch.int64)
    assert create_dataset.scale(pixels.permute(0, 3, 1, 2)).is_contiguous(memory_format=torch.channels_last)
    batches = {}
    for channels_last in (False, True):
        split = create_dataset.Split(pixels, labels, channels_last=channels_last)
        train = next(split.train_batches(10, torch.Generator().manual_seed(0)))[0]
        test = next(split.test_batches(10))[0]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert train.is_contiguous(memory_format=layout) and test.is_contiguous(memory_format=layout)
        batches[channels_last] = train, test
    assert all(torch.equal(plain, laid_out) for plain, laid_out in zip(batches[False], batches[True]))
