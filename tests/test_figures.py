"""Figures 4 and 7, Table 3 and the controls, from made-up curves and from labels that are known."""

import csv
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import TINY, curves

import create_dataset
import model_vgg_maxl
from experiments import figure3, figure4, figure7, table3
from experiments import pairs as cifar100
from experiments.methods import controls
from experiments.runner import report
from harness import exits


def made_up_run(name, epochs=None, command="python a_script.py --resume", **columns):
    """A folder with the given columns of curves.csv; other settings are alike in all."""
    folder = Path("r") / name
    folder.mkdir(parents=True)
    length = len(next(iter(columns.values())))
    settings = dict.fromkeys(report.SAME) | {"epochs": epochs or length, "command": command, "device_name": "x"}
    (folder / "settings.json").write_text(json.dumps(settings))
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *columns])
        writer.writerows(zip(range(1, length + 1), *columns.values()))


def cosines(*values):
    return {"train_cosine_similarity": values, "train_trunk_cosine_similarity": [-value for value in values]}


def rows_of(name):
    with open(f"r/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- Figures 4 and 7 ------------------------------------------------------------------------------------


def test_the_cosine_table_has_the_known_means_over_the_last_epochs_and_seeds():
    made_up_run("maxl-3-10-seed0", **cosines(*[0.0] * 5, *[0.5] * 10))
    made_up_run("maxl-3-10-seed1", **cosines(*[0.9] * 5, *[0.7] * 10))
    made_up_run("human-3-10-seed0", **cosines(0.1, 0.2, 0.3), epochs=15)
    figure4.experiment.main(["--plot", "--out", "r", "--pairs", "3-10", "--seeds", "0", "1"])
    rows = {row["method"]: row for row in rows_of("figure4")}
    assert set(rows) == {"MAXL", "Human", "Random", "K-Means"}
    assert float(rows["MAXL"]["train_cosine_similarity_mean"]) == pytest.approx(0.6)
    assert float(rows["MAXL"]["train_cosine_similarity_std"]) == pytest.approx(0.2 / 2**0.5)
    assert float(rows["MAXL"]["train_trunk_cosine_similarity_mean"]) == pytest.approx(-0.6)
    assert float(rows["Human"]["train_cosine_similarity_mean"]) == pytest.approx(0.2)
    assert rows["Human"]["missing"] == "seed 0 at epoch 3 of 15, seed 1 not run" and rows["Random"]["n"] == "0"
    lines = Path("r/figure4.md").read_text().splitlines()
    assert "| 3 → 10 | MAXL | 0.600 ± 0.141 | -0.600 ± 0.141 | 2 |  |" in lines
    assert Path("r/figure4.png").read_bytes().startswith(b"\x89PNG") and Path("r/figure4.pdf").exists()


def test_the_cosine_figure_draws_the_mean_over_seeds_and_a_band():
    made_up_run("maxl-20-100-seed0", **cosines(0.2, 0.4))
    made_up_run("maxl-20-100-seed1", **cosines(0.4, 0.8))
    settings, _ = figure7.experiment.parse(["--plot", "--out", "r"])
    figure, *_ = figure7.experiment.report(settings)
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert len(panels) == 6
    (line,) = panels["20 primary, 100 auxiliary classes"].lines
    assert line.get_xydata().tolist() == [pytest.approx([1, 0.3]), pytest.approx([2, 0.6])]
    (band,) = panels["20 primary, 100 auxiliary classes"].collections
    top = max(y for x, y in band.get_paths()[0].vertices if x == 2)
    assert top == pytest.approx(0.6 + 0.4 / 2**0.5)
    assert not panels["3 primary, 10 auxiliary classes"].lines


def test_a_run_without_cosines_is_named_with_the_command_that_makes_it(capsys):
    made_up_run("maxl-3-10-seed0", **cosines(0.1))
    made_up_run("human-3-10-seed0", test_primary_accuracy=[0.5], command="python model_vgg_human.py --seed 0 --resume")
    assert exits.run_main(figure4.experiment.main, ["--plot", "--out", "r"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: r/human-3-10-seed0 was run without the cosine similarity")
    assert "python model_vgg_human.py --seed 0 --cosine-every 10 --overwrite" in error and error.count("\n") == 1


def test_the_plans_of_figures_4_and_7_are_figure_3s_runs_with_cosines():
    for module, pairs in ((figure4, 3), (figure7, 6)):
        settings, options = module.experiment.parse([])
        tasks = module.experiment.plan(settings, options)
        assert len(tasks) == pairs * 4 * 3 and settings.out == Path("runs/figure3")
        assert all(task.settings.cosine_every == 10 for task in tasks)
    settings, options = figure4.experiment.parse(["--cosine-every", "3", "--seeds", "0"])
    assert all(task.settings.cosine_every == 3 for task in figure4.experiment.plan(settings, options))


@pytest.mark.parametrize("given, every", [([], 10), (["--cosine-every", "3"], 3), (["--cosine-every=0"], 0)])
def test_figure_3s_runs_serve_figure_4_too_and_single_has_nothing_to_compare(given, every):
    settings, options = figure3.experiment.parse([*given, "--epochs", "7", "--seeds", "0", "--pairs", "3-10"])
    plan = {task.method: task.settings for task in figure3.experiment.tasks(settings, options)}
    assert {method: task.cosine_every for method, task in plan.items() if method != "single"} == dict.fromkeys(
        ["random", "kmeans", "human", "maxl"], every
    )
    assert "cosine_every" not in plan["single"] and all(task.epochs == 7 for task in plan.values())


# --- Table 3 --------------------------------------------------------------------------------------------


def test_table_3_has_the_known_numbers_beside_the_papers():
    for seed, (accuracy, used) in enumerate(((0.70, 1.0), (0.72, 0.98))):
        made_up_run(
            f"maxl-20-100-seed{seed}",
            test_primary_accuracy=[0.1, accuracy], train_auxiliary_classes_used=[0.5, used],
        )  # fmt: skip
    made_up_run("maxl0-20-100-seed0", test_primary_accuracy=[0.1, 0.6], train_auxiliary_classes_used=[0.9, 0.4])
    table3.experiment.main(["--plot", "--out", "r", "--pairs", "20-100", "--seeds", "0", "1"])
    lines = Path("r/table3.md").read_text().splitlines()
    assert "| 20 → 100 | 0.2 | 71.00 ± 1.41 | 74.27 | 0.99 ± 0.01 | 1.00 | 2 |  |" in lines
    assert "| 20 → 100 | 0.0 | 60.00 | 73.97 | 0.40 | 0.61 | 1 | seed 1 not run |" in lines


def test_table_3s_runs_differ_in_the_entropy_weight_alone():
    settings, options = table3.experiment.parse(["--seeds", "0", "--pairs", "10-20"])
    with_it, without = (vars(task.settings) for task in table3.experiment.plan(settings, options))
    assert (with_it["entropy_weight"], without["entropy_weight"]) == (0.2, 0.0)
    assert {name for name in with_it if with_it[name] != without[name]} == {"entropy_weight", "out"}


def test_table_3_takes_no_run_with_another_entropy_weight(capsys):
    made_up_run("maxl-20-100-seed0", test_primary_accuracy=[0.5], train_auxiliary_classes_used=[1.0])
    path = Path("r/maxl-20-100-seed0/settings.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"entropy_weight": 5.0}))
    assert exits.run_main(table3.experiment.main, ["--plot", "--out", "r"]) == 2
    error = capsys.readouterr().err
    assert "r/maxl-20-100-seed0 was run with λ = 5.0, and Table 3 is of 0.2 and 0" in error and error.count("\n") == 1


def test_the_papers_numbers_of_table_3():
    """As printed: rows 3-10, 3-20, 3-100, 10-20, 10-100, 20-100."""
    assert [table3.PAPER["maxl0"][pair][0] for pair in cifar100.PAIRS] == [90.26, 90.39, 90.22, 77.73, 78.20, 73.97]
    assert [table3.PAPER["maxl0"][pair][1] for pair in cifar100.PAIRS] == [1.00, 0.65, 0.35, 1.00, 0.57, 0.61]
    assert [table3.PAPER["maxl"][pair] for pair in cifar100.PAIRS] == [
        (90.50, 1), (90.65, 1), (90.66, 1), (78.40, 1), (78.46, 1), (74.27, 1)
    ]  # fmt: skip


# --- Uniform, Redrawn and Untrained --------------------------------------------------------------------


def test_uniform_labels_are_uniform_on_their_primary_class_and_sum_to_one():
    psi = [2, 1, 4]
    targets = (torch.arange(12) % 3)[:, None].expand(-1, 4).contiguous()
    split = create_dataset.Split(torch.zeros(12, 32, 32, 3, dtype=torch.uint8), targets)
    labels = controls.UniformLabels(split, Namespace(primary_level=0, psi=psi))(None, targets)
    expected = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0.25, 0.25, 0.25, 0.25]])
    assert torch.equal(labels, expected[targets[:, 0]])
    assert torch.equal(labels.sum(dim=1), torch.ones(12))


def test_untrained_keeps_the_label_generator_that_maxl_starts_from(monkeypatch):
    """Its labels are MAXL's where MAXL's label generator learns at a rate of zero."""
    monkeypatch.setitem(model_vgg_maxl.SETTINGS, "label_learning_rate", 0.0)
    few, saved = [*TINY, "--epochs", "2"], []
    for name, script, own in (("maxl", model_vgg_maxl, []), ("untrained", controls, ["--control", "untrained"])):
        assert exits.run_main(script.main, [*few, *own, "--out", name]) == 0
        saved.append(torch.load(f"{name}/checkpoint.pt", weights_only=True)["parts"]["label_generator"])
    weights = [name for name in saved[0] if "running" not in name and "batches" not in name]
    assert weights and all(torch.equal(saved[0][name], saved[1][name]) for name in weights)

    settings = controls.parse([*few, "--control", "untrained"])
    split, _ = create_dataset.load("synthetic", None, torch.device("cpu"), 120)
    labels = controls.UntrainedLabels(split, settings)
    images, targets = next(split.train_batches(20, torch.Generator().manual_seed(0)))
    generated = labels(images, targets)
    assert not generated.requires_grad and torch.allclose(generated.sum(dim=1), torch.ones(20))
    own = model_vgg_maxl.hierarchy_mask(settings.psi)[targets[:, 2]]
    assert (generated[~own] == 0).all() and generated[own].std() > 0  # these tell more than Uniform's


def test_redrawn_labels_are_uniform_within_their_primary_class_and_new_at_every_call():
    psi, count = [2, 1, 4], 20_000
    targets = (torch.arange(3 * count) % 3)[:, None].expand(-1, 4)
    split = create_dataset.Split(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), targets)
    labels = controls.RedrawnLabels(split, Namespace(primary_level=0, psi=psi, seed=0))
    first, second = labels(None, targets), labels(None, targets)
    shares = torch.bincount(first, minlength=7) / count
    assert len(shares) == 7 and shares.tolist() == pytest.approx([1 / 2, 1 / 2, 1, *[1 / 4] * 4], abs=0.02)
    assert model_vgg_maxl.hierarchy_mask(psi)[targets[:, 0], first].all()
    same = ((first == second)[targets[:, 0] == primary].double().mean().item() for primary in range(3))
    assert list(same) == pytest.approx([1 / 2, 1, 1 / 4], abs=0.02)
    assert torch.equal(controls.RedrawnLabels(split, Namespace(primary_level=0, psi=psi, seed=0))(None, targets), first)
    assert not torch.equal(controls.RedrawnLabels(split, Namespace(primary_level=0, psi=psi, seed=1))(None, targets), first)


@pytest.mark.parametrize("name", controls.CONTROLS)
def test_controls_train_and_are_in_figure_3_by_name_only(name):
    few = [*TINY, "--control", name, "--epochs", "1", "--cosine-every", "2", "--out", "u"]
    assert exits.run_main(controls.main, few) == 0
    (row,) = curves("u")
    assert "train_cosine_similarity" in row and "test_auxiliary_loss" not in row
    assert cifar100.METHODS[name].options == ("--control", name) and name not in cifar100.FIVE
