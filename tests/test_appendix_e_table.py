"""Appendix E's runs, its table and its figure, from made-up curves."""

import csv
import json
from pathlib import Path

import pytest

import create_dataset
from experiments import appendix_e
from experiments.methods import variations as model_vgg_maxl_variants
from experiments.runner import report
from harness import exits

VARIANTS = model_vgg_maxl_variants.VARIANTS


def made_up_run(name, accuracies, epochs=None, **changed):
    folder = Path("r") / name
    folder.mkdir(parents=True)
    settings = dict.fromkeys(report.SAME) | {"epochs": epochs or len(accuracies), "focal_gamma": 2.0} | changed
    (folder / "settings.json").write_text(json.dumps(settings))
    rows = [f"{epoch},{accuracy}" for epoch, accuracy in enumerate(accuracies, start=1)]
    (folder / "curves.csv").write_text("\n".join(["epoch,test_primary_accuracy", *rows, ""]))


def test_the_plan_is_the_variations_beside_figure_3s_maxl_and_single():
    settings, options = appendix_e.experiment.parse(["--width", "0.25"])
    tasks = {task.name: task for task in appendix_e.experiment.tasks(settings, options)}
    assert settings.out == Path("runs/figure3") and len(tasks) == 7 * 3
    expected = {f"maxl-{variant}-20-100-seed{seed}" for variant in VARIANTS for seed in range(3)}
    assert set(tasks) == expected | {f"{m}-seed{seed}" for m in ("maxl-20-100", "single-20") for seed in range(3)}
    maxl_settings = vars(tasks["maxl-20-100-seed1"].settings)
    for variant in VARIANTS:
        task = tasks[f"maxl-{variant}-20-100-seed1"]
        assert task.settings.variant == variant and "experiments.methods.variations" in task.command
        theirs = vars(task.settings)
        differ = {name for name in maxl_settings if name in theirs and maxl_settings[name] != theirs[name]}
        assert differ == {"out"} | ({"focal_gamma"} if variant == "cross-entropy" else set())
    settings, options = appendix_e.experiment.parse(
        ["--pairs", "3-10", "3-20", "--methods", "single", "latent", "--seeds", "5", "--latent-size", "7"]
    )
    tasks = appendix_e.plan(settings, [])
    assert [task.name for task in tasks] == [
        "single-3-seed5", "maxl-latent-3-10-seed5", "maxl-latent-3-20-seed5"
    ]  # fmt: skip
    assert tasks[1].settings.psi == create_dataset.balanced_psi(3, 10, seed=5) and options == ["--latent-size", "7"]


def test_the_table_and_the_figure_from_made_up_curves():
    made_up_run("maxl-20-100-seed0", [0.5, 0.70])
    made_up_run("maxl-20-100-seed1", [0.5, 0.74])
    made_up_run("single-20-seed0", [0.4, 0.66])
    made_up_run("maxl-cross-entropy-20-100-seed0", [0.4, 0.68], focal_gamma=0.0)
    made_up_run("maxl-latent-20-100-seed1", [0.1], epochs=2)
    assert exits.run_main(appendix_e.experiment.main, ["--plot", "--out", "r", "--seeds", "0", "1"]) == 0
    lines = Path("r/appendix_e.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| 20")] == [
        "| 20 → 100 | MAXL | 72.00 ± 2.83 | 2 |  |  |",
        "| 20 → 100 | Single | 66.00 | 1 |  | seed 1 not run |",
        "| 20 → 100 | cross-entropy loss | 68.00 | 1 | worse than the focal loss | seed 1 not run |",
        "| 20 → 100 | no Mask SoftMax | not run | 0 | similar to Single | seed 0 not run, seed 1 not run |",
        "| 20 → 100 | latent vector | unfinished | 0 | similar to Single | seed 0 not run, seed 1 at epoch 1 of 2 |",
        "| 20 → 100 | same iteration | not run | 0 | worse than MAXL | seed 0 not run, seed 1 not run |",
        "| 20 → 100 | validation | not run | 0 | not as beneficial as MAXL | seed 0 not run, seed 1 not run |",
    ]
    with open("r/appendix_e.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["MAXL"]["mean"]) == pytest.approx(72) and rows["no Mask SoftMax"]["mean"] == ""
    assert Path("r/appendix_e.png").read_bytes().startswith(b"\x89PNG") and Path("r/appendix_e.pdf").exists()

    settings, _ = appendix_e.experiment.parse(["--plot", "--out", "r", "--seeds", "0", "1"])
    figure, *_ = appendix_e.experiment.report(settings)
    axes, _ = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert set(drawn) == {"MAXL", "Single", "cross-entropy loss", "latent vector"} and len(axes.collections) == 4
    assert drawn["MAXL"] == [pytest.approx([1, 50]), pytest.approx([2, 72])]


def test_latent_vectors_are_as_long_as_the_levels_of_a_pair_ask_for(capsys):
    made_up_run("maxl-latent-3-10-seed0", [0.5], latent_size=10)
    made_up_run("maxl-latent-20-100-seed0", [0.5], latent_size=100)
    arguments = ["--plot", "--out", "r", "--pairs", "3-10", "20-100", "--seeds", "0", "1"]
    assert exits.run_main(appendix_e.experiment.main, arguments) == 0
    made_up_run("maxl-latent-20-100-seed1", [0.5], latent_size=50)
    assert exits.run_main(appendix_e.experiment.main, arguments) == 2
    assert "differ in latent_size" in capsys.readouterr().err


def test_runs_that_differ_in_more_than_the_variation_are_not_compared(capsys):
    made_up_run("maxl-20-100-seed0", [0.5])
    made_up_run("maxl-no-mask-20-100-seed0", [0.5], width=0.5)
    assert exits.run_main(appendix_e.experiment.main, ["--plot", "--out", "r"]) == 2
    assert "differ in width" in capsys.readouterr().err
    assert exits.run_main(appendix_e.experiment.main, ["--plot", "--out", "elsewhere"]) == 2
    assert "there are no runs" in capsys.readouterr().err
