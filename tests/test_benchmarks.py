"""The benchmark runs, and its counts of arithmetic are those of the derivation."""

import json

import pytest
import torch
from conftest import REPOSITORY

from benchmarks import step_cost

CPU = torch.device("cpu")


def test_the_benchmark_writes_its_table_as_json_markdown_and_chart(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
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
    steps, epochs = results["steps"], results["epoch_seconds_from_the_medians"]
    first, second = (steps[f"MAXL {row}"]["seconds"] for row in ("first pass", "second pass, forward-mode"))
    expected = 12_500 * (first + second + 2 * results["data_seconds_per_batch"]) + results["test_seconds"]
    assert epochs["MAXL, forward-mode"] == pytest.approx(expected)
    assert set(results["scaling"]) == {"batch size", "width", "auxiliary classes", "precision and layout"}
    assert set(results["scaling"]["precision and layout"]) >= {"fp32", "fp32, channels last", "bf16"}


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


def test_rows_are_interleaved_and_the_first_round_is_not_counted():
    bench = step_cost.Bench(CPU, width=0.05, batch_size=4)
    order = []
    bench.rows = {row: lambda row=row: order.append(row) for row in "ab"}
    times = step_cost.measure(bench, ["a", "b"], repeats=2)
    assert order == ["a", "b"] * 3 and [len(seconds) for seconds in times.values()] == [2, 2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_benchmark_runs_on_the_gpu(tmp_path):
    step_cost.main(["--device", "cuda", "--width", "0.25", "--repeats", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "step_cost.json").read_text())["steps"]["Single step"]["memory_bytes"] > 0
