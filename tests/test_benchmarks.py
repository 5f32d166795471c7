"""The benchmark runs; the arithmetic it counts is that of the derivation; what bf16 does to the meta-gradient."""

import contextlib
import copy
import json
import platform
from unittest import mock

import pytest
import torch

import maxl
from benchmarks import step_cost
from harness.exits import InputError

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--width", "0.05", "--batch-size", "10", "--threads", "1"]


def test_step_cost_writes_its_table_as_json_and_markdown(tmp_path, capsys):
    options = ["--precision", "bf16", "--channels-last", "--backbone", "conv4"]
    step_cost.main([*TINY, *options, "--repeats", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "step_cost.json").read_text())
    table = (tmp_path / "step_cost.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
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


def test_bf16_spoils_the_meta_gradient_far_more_than_an_ordinary_one():
    """At initial weights, beside float64; the reason for the second pass to be in fp32."""
    bench = step_cost.Bench(CPU, width=1 / 16, batch_size=40)

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
