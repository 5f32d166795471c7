"""The benchmark runs, and its counts of arithmetic are those of the derivation."""

import argparse
import contextlib
import copy
import io
import json
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_closed_form import ToyGenerator, ToyNetwork
from test_meta_gradient import batch, networks

import model_vgg_maxl
from benchmarks import finite_difference, step_cost

CPU = torch.device("cpu")


def in_this_process(command, **options):
    """subprocess.check_output of a row's memory, without the seconds that a new Python takes to load torch."""
    assert command[:3] == [sys.executable, "-m", "benchmarks.step_cost"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        step_cost.main(command[3:])
    return said.getvalue()


def test_the_benchmark_writes_its_table_as_json_markdown_and_chart(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(step_cost.subprocess, "check_output", in_this_process)
    make_bench, benches = step_cost.make_bench, weakref.WeakSet()

    def counted(*arguments, **options):
        assert len(benches) <= 2, "those of earlier settings still hold their networks"
        benches.add(bench := make_bench(*arguments, **options))
        return bench

    monkeypatch.setattr(step_cost, "make_bench", counted)
    settings = ["--device", "cpu", "--width", "0.05", "--batch-size", "4", "--repeats", "1"]
    step_cost.main([*settings, "--scaling", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "step_cost.json").read_text())
    table = (tmp_path / "step_cost.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert (tmp_path / "step_cost.png").read_bytes().startswith(b"\x89PNG")
    assert results["environment"]["torch_version"] == torch.__version__
    for row, cost in results["steps"].items():
        assert row in table
        assert 0 < cost["fastest"] <= cost["seconds"] <= cost["slowest"]
        assert cost["memory_bytes"] is None or cost["memory_bytes"] >= 0
    steps, epochs = results["steps"], results["epoch_seconds_from_the_medians"]
    first, second = (steps[f"MAXL {row}"]["seconds"] for row in ("first pass", "second pass, forward-mode"))
    expected = 12_500 * (first + second + 2 * results["data_seconds_per_batch"]) + results["test_seconds"]
    assert epochs["MAXL, forward-mode"] == pytest.approx(expected)
    assert set(results["scaling"]) == {"batch size", "width", "auxiliary classes", "precision and layout"}
    assert set(results["scaling"]["precision and layout"]) >= {"fp32", "fp32, channels last", "bf16"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_the_memory_of_a_row_is_measured_in_a_process_of_its_own():
    arguments = {"width": 0.25, "batch_size": 20, "precision": "fp32", "channels_last": True, "cuda_graphs": False}
    arguments = argparse.Namespace(**arguments, backbone="vgg16", psi=[5] * 20)
    bench = step_cost.Bench(CPU, arguments.width, arguments.batch_size)
    (memory,) = step_cost.memory_of_rows(bench, arguments, ["Single step"]).values()
    outputs = 20 * 4 * 32 * 32 * (2 * 16 + 2 * 32 / 4 + 3 * 64 / 16 + 3 * 128 / 64 + 3 * 128 / 256)  # of convolutions
    assert outputs < memory < 20 * outputs


def test_with_cuda_graphs_arithmetic_and_memory_are_those_of_the_step_as_it_is(monkeypatch):
    """A replayed graph dispatches nothing; here it does nothing at all."""

    class Graphs(step_cost.Acceleration):
        def __init__(self, device, precision="fp32", channels_last=False, cuda_graphs=False):
            super().__init__(device, precision, channels_last)
            self.cuda_graphs = cuda_graphs

        def capture(self, step):
            return (lambda *arguments, **options: {}) if self.cuda_graphs else step

    monkeypatch.setattr(step_cost, "Acceleration", Graphs)
    monkeypatch.setattr(step_cost.subprocess, "check_output", in_this_process)
    settings = {"width": 0.05, "batch_size": 4, "precision": "fp32", "channels_last": False, "cuda_graphs": True}
    settings |= {"backbone": "vgg16", "psi": [5] * 20}
    results = step_cost.step_costs(argparse.Namespace(repeats=1, **settings), CPU)
    for row, forward_passes in (("Single step", 3), ("MAXL second pass, forward-mode", 11)):
        cost = results["steps"][row]
        assert forward_passes - 0.5 < cost["forward_passes"] < forward_passes and cost["times_single"] > 0


@pytest.mark.parametrize(
    "row, forward_passes",
    [
        ("Single step", 3),
        ("Human step", 3),
        ("MAXL first pass", 3 + 1),
        ("MAXL first pass with cosine similarity", 1 + 2 + 2 + 1),  # a backward pass for each task
        ("MAXL second pass, forward-mode", 3 + 3 + 2 + 3),  # at θ1, at θ1⁺, along v, the label generator
        ("MAXL second pass, finite-difference", 3 + 3 + 2 + 3),
    ],
)
def test_the_arithmetic_of_a_step_is_that_of_the_derivation_but_for_the_first_layer(row, forward_passes):
    """The first layer has no gradient for the images, and no derivative of theirs along v."""
    bench = step_cost.Bench(CPU, width=0.25, batch_size=8)
    with torch.no_grad(), step_cost.FlopCounterMode(display=False) as counter:
        bench.network(bench.images)
    counted = bench.operations(row) / counter.get_total_flops()
    assert forward_passes - 0.12 < counted < forward_passes
    assert counted < bench.operations("MAXL second pass, double-backward") / counter.get_total_flops()


@pytest.mark.parametrize("row, forward_passes, of_the_first_layer", [
    ("Single step", 3, 1), ("MAXL first pass", 4, 1), ("MAXL second pass, forward-mode", 11, 4),
])  # fmt: skip
def test_the_arithmetic_of_conv4_is_that_of_the_derivation(row, forward_passes, of_the_first_layer):
    """In a narrow network the first layer counts: each pass but a plain forward spares its product with the images."""
    bench = step_cost.Bench(CPU, width=0.25, batch_size=8, backbone="conv4", psi=[3] * 10)
    layers = [32**2 * 27 * 16, *(side**2 * 9 * 16 * 16 for side in (16, 8, 4))]
    heads = [2 * 64 * 64, 64 * (10 + 30)]
    forward = 8 * 2 * (sum(layers) + sum(heads))
    expected = forward_passes * forward - of_the_first_layer * 8 * 2 * layers[0]
    assert bench.operations(row) == pytest.approx(expected, rel=0.01)  # Single and the generator have one head


def test_rows_are_interleaved_and_the_first_round_is_not_counted(monkeypatch):
    bench = step_cost.Bench(CPU, width=0.05, batch_size=4)
    order = []
    monkeypatch.setattr(step_cost.Bench, "rows", {row: lambda row=row: order.append(row) for row in "ab"})
    times = step_cost.measure(bench, ["a", "b"], repeats=2)
    assert order == ["a", "b"] * 3 and [len(seconds) for seconds in times.values()] == [2, 2]


def test_finite_difference_closes_in_on_the_exact_gradient_where_the_loss_is_smooth():
    """Second order: a tenth of the step, a hundredth of the error, on the toy, which has no kinks."""
    rng = np.random.default_rng(1)
    toy = 0.7, rng.standard_normal(2), rng.standard_normal(5)
    network, generator = ToyNetwork(*toy), ToyGenerator(rng.standard_normal(5), [2, 3])
    images, primary = torch.tensor(rng.standard_normal((12, 1))), torch.arange(12) % 2

    parts = network, generator, images, primary, 0.3
    exact = model_vgg_maxl.meta_gradient(*parts, method="double-backward")[0][0]
    coarse, fine = (finite_difference.meta_gradient(*parts, step=e)[0] - exact for e in (0.1, 0.01))
    assert 0 < coarse.norm() < 0.1 * exact.norm()
    assert fine.norm().item() == pytest.approx(coarse.norm().item() / 100, rel=0.05)


def test_finite_difference_keeps_the_entropy_term_and_points_the_exact_gradients_way():
    network, generator = networks([2, 3, 4], width=1 / 8)
    images, primary = batch(3)

    def flat(gradients):
        return torch.cat([g.flatten() for g in gradients])

    exact, approximate = (
        [
            flat(gradient(copy.deepcopy(network), copy.deepcopy(generator), images, primary, 0.01, entropy_weight))
            for entropy_weight in (0.0, 5.0)
        ]
        for gradient in (lambda *parts: model_vgg_maxl.meta_gradient(*parts)[0], finite_difference.meta_gradient)
    )
    assert 0 < (approximate[0] - exact[0]).norm() < exact[0].norm()
    assert torch.cosine_similarity(exact[0], approximate[0], dim=0) > 0.8
    entropy = [gradient[1] - gradient[0] for gradient in (exact, approximate)]
    assert torch.allclose(*entropy, rtol=1e-9, atol=1e-12 * entropy[0].norm().item())


@pytest.mark.cuda
def test_the_benchmark_runs_on_the_gpu(tmp_path):
    step_cost.main(["--device", "cuda", "--width", "0.25", "--repeats", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "step_cost.json").read_text())["steps"]["Single step"]["memory_bytes"] > 0
