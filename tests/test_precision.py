"""What lower precision does to the gradients, by the emulation in benchmarks/; MAXL's second pass is spared it."""

import numpy as np
import pytest
import torch
from conftest import TINY, run_script

import create_dataset
import maxl
from benchmarks import precision, step_cost


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


def test_the_emulation_rounds_to_ten_bits_of_mantissa():
    """Against arithmetic: a number's mantissa times 2¹⁰, rounded half to even."""
    x = torch.tensor(np.random.default_rng(0).standard_normal(10_000) * 10.0 ** np.arange(-5, 5).repeat(1000)).float()
    mantissa, exponent = np.frexp(x.double().numpy())  # 0.5 <= mantissa < 1: 11 bits with the leading one
    expected = np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent)
    assert np.array_equal(precision.round_to_tf32(x).double().numpy(), expected)
    few = torch.tensor([0.0, 1.0, -1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-11)])
    assert precision.round_to_tf32(few).tolist() == [0.0, 1.0, -1.0, 1 + 2**-10, 1.0, 1 + 2 * 2**-10, -1.0]


def test_every_product_is_rounded_forwards_backwards_and_along_v_and_no_sum():
    a, b = (torch.randn(5, 5, requires_grad=True) for _ in range(2))
    with precision.RoundedToTF32():
        product = a @ b
        (gradient,) = torch.autograd.grad(product, a, torch.ones(5, 5) / 3)
        total = a + b
    rounded = precision.round_to_tf32
    assert torch.equal(product, rounded(a) @ rounded(b)) and not torch.equal(product, a @ b)
    # summed in another order perhaps, since b is read transposed
    assert torch.allclose(gradient, rounded(torch.ones(5, 5) / 3) @ rounded(b).T, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(gradient, torch.ones(5, 5) / 3 @ b.T, rtol=1e-6, atol=1e-6)
    assert torch.equal(total, a + b)
    images, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    with precision.RoundedToTF32():
        output = torch.nn.functional.conv2d(images, weight, bias)
    assert torch.equal(output, torch.nn.functional.conv2d(rounded(images), rounded(weight), bias))
    layer = torch.nn.Linear(5, 3)
    with precision.RoundedToTF32():
        directional = torch.func.jvp(layer, (a.detach(),), (b.detach(),))[1]
    assert torch.allclose(directional, rounded(b) @ rounded(layer.weight).T, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(directional, b @ layer.weight.T, rtol=1e-5, atol=1e-6)


def test_lower_precision_spoils_the_meta_gradient_far_more_than_an_ordinary_one():
    """At initial weights; the reason for the second pass to be in fp32."""
    bench = step_cost.Bench(torch.device("cpu"), width=1 / 16, batch_size=40)
    ordinary, meta = {}, {}
    found = precision.errors(bench.network, bench.generator, bench.images, bench.primary)
    for errors, gradient in ((meta, "meta-gradient"), (ordinary, "gradient of a multi-task step")):
        errors |= {name: error["relative_error"] for name, error in found[gradient].items()}
    for errors in (meta, ordinary):
        assert errors["fp32"] < 1e-3 < errors["TF32, emulated"] < errors["bf16"]
    assert all(meta[name] > 1.5 * ordinary[name] for name in ("TF32, emulated", "bf16"))
    assert tf32_allowed() == (False, False)


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
