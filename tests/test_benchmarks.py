"""The benchmarks run; the arithmetic they count is that of the derivation, and their TF32 is TF32."""

import json
import platform

import numpy as np
import pytest
import torch
from conftest import PNG, in_new_torch, tf32_allowed
from test_closed_form import ToyGenerator, ToyNetwork

import create_dataset
import maxl
from benchmarks import precision, step_cost
from harness.exits import InputError

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--width", "0.05", "--batch-size", "10", "--threads", "1"]


@in_new_torch
def test_step_cost_writes_its_table_as_json_markdown_and_chart(tmp_path, capsys):
    options = ["--precision", "bf16", "--channels-last", "--backbone", "conv4"]
    step_cost.main([*TINY, *options, "--repeats", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "step_cost.json").read_text())
    table = (tmp_path / "step_cost.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert (tmp_path / "step_cost.png").read_bytes().startswith(PNG)
    where, steps = results["environment"], results["steps"]
    assert where["torch_version"] == torch.__version__ and where["threads"] == 1
    assert all(f"{name.replace('_', ' ')} {value}" in table for name, value in where.items())
    for row, cost in steps.items():
        assert f"| {row} | {cost['seconds']:.4f}" in table
        assert 0 < cost["fastest"] <= cost["seconds"] <= cost["slowest"]
        assert cost["times_single"] == pytest.approx(cost["seconds"] / steps["Single step"]["seconds"])
    rows = "data and augmentation", "test", "MAXL first pass", "MAXL second pass, forward-mode"
    data, test, *passes = (steps[row]["seconds"] for row in rows)
    epoch = results["epoch_seconds"]["MAXL, forward-mode"]
    assert epoch == pytest.approx(5000 * (sum(passes) + 2 * data) + 1000 * test)  # batches of 10


@pytest.mark.parametrize("option", ["--batch-size=1", "--repeats=0", "--width=nan"])
def test_an_option_out_of_range_is_one_sentence(option):
    with pytest.raises(InputError, match=option.partition("=")[0]):
        step_cost.main([*TINY, option])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc")
def test_the_memory_of_a_step_is_a_few_times_the_outputs_of_its_convolutions():
    bench = step_cost.Bench(CPU, width=0.25, batch_size=20)
    outputs = 20 * 4 * 32 * 32 * (2 * 16 + 2 * 32 / 4 + 3 * 64 / 16 + 3 * 128 / 64 + 3 * 128 / 256)
    assert 2 * outputs < step_cost.peak_memory(bench, "Single step") < 6 * outputs


@in_new_torch
@pytest.mark.parametrize("row, forward_passes, of_the_first_layer", [
    ("data and augmentation", 0, 0),
    ("test", 1, 0),
    ("Human step", 3, 1),
    ("MAXL first pass", 3 + 1, 1),
    ("MAXL second pass, forward-mode", 3 + 3 + 3 + 3, 3),  # at θ1, at θ1⁺, along v, the label generator
])  # fmt: skip
def test_the_arithmetic_of_a_step_is_that_of_the_derivation(row, forward_passes, of_the_first_layer):
    """Of Conv-4. Its first layer is spared one of the products in every backward pass: the images need no gradient."""
    bench = step_cost.Bench(CPU, width=0.25, batch_size=8, backbone="conv4")
    layers = [32**2 * 27 * 16, *(side**2 * 9 * 16 * 16 for side in (16, 8, 4))]
    heads = 2 * 64 * 64 + 64 * (20 + 100)
    expected = 2 * 8 * (forward_passes * (sum(layers) + heads) - of_the_first_layer * layers[0])
    counted = step_cost.operations(bench.run, row)
    assert counted == pytest.approx(expected, rel=0.01)  # Single and the label generator have one head
    assert counted < step_cost.operations(bench.run, "MAXL second pass, double-backward")


@in_new_torch
def test_precision_writes_its_table(tmp_path, monkeypatch):
    monkeypatch.setitem(create_dataset.SIZES, "synthetic", (100, 100))
    precision.main([*TINY, "--train-steps", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "precision.json").read_text())
    assert results["images"] == "synthetic" and len(results["at"]) == 2
    assert (tmp_path / "precision.md").read_text().count("| meta-gradient | initial weights | ") == 4


def test_the_finite_difference_closes_in_on_the_exact_gradient_where_the_loss_is_smooth():
    """Second order: a tenth of the distance, a hundredth of the error, on the toy, which has no kinks."""
    rng = np.random.default_rng(1)
    network = ToyNetwork(0.7, rng.standard_normal(2), rng.standard_normal(5))
    images, primary = torch.tensor(rng.standard_normal((12, 1))), torch.arange(12) % 2
    labels = ToyGenerator(rng.standard_normal(5), [2, 3])(images, primary).detach().requires_grad_()
    v = {"w": torch.tensor(-0.4, dtype=torch.float64)}
    parts = (lambda network: maxl.multi_task_loss(network, images, primary, labels)[0]), network, {}, labels, v
    coarse, fine = (precision.by_finite_difference(*parts, distance=distance) for distance in (0.1, 0.01))
    for right, rough, near in zip(maxl.by_forward_mode(*parts), coarse, fine):
        assert 0 < (rough - right).norm() < 0.1 * right.norm()
        assert (near - right).norm().item() == pytest.approx((rough - right).norm().item() / 100, rel=0.05)


# --- the emulation of lower precision ------------------------------------------------------------------


def test_the_emulation_rounds_to_ten_bits_of_mantissa():
    """Against arithmetic: a number's mantissa times 2¹⁰, rounded half to even."""
    x = torch.tensor(np.random.default_rng(0).standard_normal(10_000) * 10.0 ** np.arange(-5, 5).repeat(1000)).float()
    mantissa, exponent = np.frexp(x.double().numpy())  # 0.5 <= mantissa < 1: 11 bits with the leading one
    expected = np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent)
    assert np.array_equal(precision.round_to_tf32(x).double().numpy(), expected)


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


@in_new_torch
def test_lower_precision_spoils_the_meta_gradient_far_more_than_an_ordinary_one():
    """At initial weights; the reason for the second pass to be in fp32."""
    bench = step_cost.Bench(CPU, width=1 / 16, batch_size=40)
    ordinary, meta = {}, {}
    found = precision.errors(bench.network, bench.generator, bench.images, bench.primary)
    for errors, gradient in ((meta, "meta-gradient"), (ordinary, "gradient of a multi-task step")):
        errors |= {name: error["relative_error"] for name, error in found[gradient].items()}
    for errors in (meta, ordinary):
        assert errors["fp32"] < 1e-3 < errors["TF32, emulated"] < errors["bf16"]
    assert all(meta[name] > 1.5 * ordinary[name] for name in ("TF32, emulated", "bf16"))
    assert tf32_allowed() == (False, False)
