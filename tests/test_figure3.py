"""Figure 3 and its table, from made-up curves."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import figure3
from experiments import pairs as cifar100
from experiments.runner import drawing, report
from harness import exits


def draw(root, pairs, seeds):
    pairs, seeds = ["--pairs", *pairs], ["--seeds", *map(str, seeds)]
    figure3.experiment.main(["--plot", "--out", str(root), *pairs, *seeds])


def made_up_run(root, name, accuracies, epochs=None, seconds=60.0, **settings):
    folder = Path(root) / name
    folder.mkdir(parents=True)
    same = dict.fromkeys(report.SAME) | {"epochs": epochs or len(accuracies), "device_name": "a device"}
    (folder / "settings.json").write_text(json.dumps(same | settings))
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "test_primary_accuracy", "seconds_train", "seconds_test"])
        writer.writerows([e, a, seconds / 2, seconds / 2] for e, a in enumerate(accuracies, start=1))


def test_the_table_has_the_known_means_and_says_what_is_missing(capsys):
    for seed, final in enumerate((0.70, 0.72, 0.74)):
        made_up_run("r", f"maxl-20-100-seed{seed}", [0.2, 0.75, final])
    made_up_run("r", "single-20-seed0", [0.1, 0.2, 0.3])
    made_up_run("r", "single-20-seed1", [0.1, 0.2, 0.26])
    made_up_run("r", "single-20-seed2", [0.9], epochs=3)
    made_up_run("r", "human-20-100-seed0", [0.1, 0.2], epochs=3)
    made_up_run("r", "random-20-100-seed1", [0.1, 0.4, 0.3])
    draw("r", ["20-100"], [0, 1, 2])
    rows = {row["method"]: row for row in csv.DictReader(open("r/figure3.csv", newline=""))}
    maxl = rows["MAXL"]
    assert float(maxl["final_mean"]) == pytest.approx(72) and float(maxl["final_std"]) == pytest.approx(2)
    assert float(maxl["best_mean"]) == pytest.approx(75) and float(maxl["best_std"]) == pytest.approx(0, abs=1e-9)
    assert maxl["n"] == "3" and maxl["missing"] == "" and float(maxl["paper_maxl"]) == 74.27
    assert float(maxl["seconds_per_run"]) == pytest.approx(180) and maxl["device"] == "a device"
    assert rows["Single"]["final_mean"] == "28.0" and rows["Single"]["missing"] == "seed 2 at epoch 1 of 3"
    assert [float(maxl[f"gain_{what}"]) for what in ("n", "mean", "std")] == pytest.approx([2, 43, 3 * 2**0.5])
    assert float(rows["Random"]["gain_mean"]) == pytest.approx(4) and rows["Random"]["gain_std"] == ""
    assert rows["Single"]["gain_n"] == rows["Human"]["gain_n"] == "0" and rows["Single"]["gain_mean"] == ""
    assert rows["Human"]["n"] == "0" and rows["Human"]["final_mean"] == ""
    assert rows["Human"]["missing"] == "seed 0 at epoch 2 of 3, seed 1 not run, seed 2 not run"
    assert rows["Random"]["n"] == "1" and float(rows["Random"]["best_mean"]) == pytest.approx(40)
    lines = Path("r/figure3.md").read_text().splitlines()
    maxl = "MAXL | 72.00 ± 2.00 | 75.00 ± 0.00 | 43.00 ± 4.24 | 3 | 74.27 | 3.0 min | a device |  |"
    for start in (maxl, "Human | unfinished | unfinished |  | 0 |", "K-Means | not run | not run |  | 0 |"):
        assert any(line.startswith(f"| 20 → 100 | {start}") for line in lines)
    assert Path("r/figure3.png").read_bytes().startswith(b"\x89PNG")
    assert Path("r/figure3.pdf").read_bytes().startswith(b"%PDF")


def test_no_number_of_the_paper_stands_beside_generated_images_not_even_where_maxl_was_not_run():
    made_up_run("r", "single-20-seed0", [0.3], dataset="synthetic")
    draw("r", ["20-100"], [0])
    assert "74.27" not in Path("r/figure3.md").read_text()


def test_a_band_is_mean_and_spread_over_the_runs_that_got_there():
    for seed, accuracies in enumerate(([0.1, 0.2, 0.3], [0.3, 0.4])):
        made_up_run("r", f"maxl-3-10-seed{seed}", accuracies, epochs=3)
    runs = cifar100.read_runs(Path("r"), ["maxl"], ["3-10"], [0, 1])["3-10", "maxl"]
    means, spreads = drawing.band([run.accuracy for run in runs.values()])
    assert means == pytest.approx([20, 30, 30])
    assert spreads == pytest.approx([np.std([10, 30], ddof=1), np.std([20, 40], ddof=1), 0])


def test_a_single_pair_is_shown_once_more_from_the_middle_on_at_a_larger_scale():
    made_up_run("r", "single-3-seed0", [0.1, 0.2, 0.3, 0.5, 0.4])
    made_up_run("r", "maxl-3-10-seed0", [0.1, 0.5, 0.6, 0.6, 0.7])
    settings, _ = figure3.experiment.parse(["--plot", "--out", "r", "--pairs", "3-10", "--seeds", "0"])
    figure, *_ = figure3.make_report(settings)
    whole, closer = figure.axes
    assert [line.get_xydata().tolist() for line in whole.lines] == [line.get_xydata().tolist() for line in closer.lines]
    assert closer.get_xlim() == (3, 5) and closer.get_ylim() == pytest.approx((30 - 4, 70 + 4))
    settings, _ = figure3.experiment.parse(["--plot", "--out", "r", "--pairs", "3-10", "3-20", "--seeds", "0"])
    figure, *_ = figure3.make_report(settings)
    assert len(figure.axes) == 2


def test_a_single_run_stands_in_every_panel_of_its_level(monkeypatch):
    made_up_run("r", "single-3-seed0", [0.5, 0.6])
    for pair in ("3-10", "3-20", "3-100"):
        made_up_run("r", f"maxl-{pair}-seed0", [0.5, 0.7])
    runs = cifar100.read_runs(Path("r"), cifar100.METHODS, cifar100.PAIRS, [0])
    assert {pair for pair, method in runs if method == "single"} == {"3-10", "3-20", "3-100"}


def test_the_papers_numbers_are_table_3s():
    assert cifar100.PAPER.keys() == cifar100.PAIRS.keys()
    assert list(cifar100.PAPER.values()) == [90.50, 90.65, 90.66, 78.40, 78.46, 74.27]


@pytest.mark.parametrize("name, other", [
    ("maxl-3-10-seed0", {"width": 0.25}),
    ("maxl-3-100-seed1", {"label_learning_rate": 0.01}),  # of MAXL's own settings, on whatever pair
    ("maxl-3-10-seed1", {"entropy_weight": 5.0}),
])  # fmt: skip
def test_runs_of_different_settings_are_not_drawn_together(name, other, capsys):
    made_up_run("r", "single-3-seed0", [0.5, 0.6], width=1.0)
    of_maxl = {"label_learning_rate": 0.001, "entropy_weight": 0.2}
    made_up_run("r", "maxl-3-20-seed0", [0.5, 0.6], width=1.0, **of_maxl)
    made_up_run("r", "maxl0-3-20-seed0", [0.5, 0.6], width=1.0, **of_maxl | {"entropy_weight": 0.0})
    made_up_run("r", name, [0.5, 0.6], **{"width": 1.0} | of_maxl | other)
    (setting,) = other
    assert exits.run_main(figure3.experiment.main, ["--plot", "--out", "r"]) == 2
    error = capsys.readouterr().err
    assert f"differ in {setting} and cannot stand in one figure" in error and error.count("\n") == 1


def test_a_folder_without_settings_is_named(capsys):
    made_up_run("r", "single-3-seed0", [0.5, 0.6])
    Path("r/single-3-seed0/settings.json").unlink()
    assert exits.run_main(figure3.experiment.main, ["--plot", "--out", "r"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: r/single-3-seed0 has curves, but no settings.json") and error.count("\n") == 1


MAXLS = {"script": "model_vgg_maxl", "primary_level": 2, "psi": [5] * 20, "seed": 0, "entropy_weight": 0.2}


@pytest.mark.parametrize(
    "name, changed, said",
    [
        ("maxl-20-100-seed1", {}, "seed was 0, now 1"),
        ("maxl-10-100-seed0", {}, "primary_level was 2, now 1"),
        ("maxl0-20-100-seed0", {}, "entropy_weight was 0.2, now 0.0"),
        ("single-20-seed0", {}, "script was model_vgg_maxl, now model_vgg_single"),
        ("human-20-100-seed0", {"script": "model_vgg_human", "auxiliary_level": 1}, "auxiliary_level was 1, now 3"),
    ],
)
def test_a_run_that_is_not_what_its_folder_is_named_is_refused(name, changed, said, capsys):
    made_up_run("r", "maxl-20-100-seed0", [0.5], **MAXLS)
    made_up_run("r", name, [0.5], **(MAXLS | changed))
    assert exits.run_main(figure3.experiment.main, ["--plot", "--out", "r"]) == 2
    assert f"r/{name} is not the run that its name says ({said}" in capsys.readouterr().err


def test_maxl_stands_beside_runs_with_settled_statistics_since_its_second_pass_settles_them(capsys):
    made_up_run("r", "maxl-20-100-seed0", [0.5], **MAXLS)
    made_up_run("r", "single-20-seed0", [0.4], settle_statistics=True)
    draw("r", ["20-100"], [0])
    assert "settled statistics" in Path("r/figure3.md").read_text()
    made_up_run("r", "human-20-100-seed0", [0.4])
    assert exits.run_main(figure3.experiment.main, ["--plot", "--out", "r"]) == 2
    assert "differ in settle_statistics" in capsys.readouterr().err
    few = ["--pairs", "20-100", "--seeds", "0", "--epochs", "1", "--settle-statistics"]
    for method, code in (("maxl", 0), ("human", 2)):  # a folder of MAXL's is not of another experiment for it
        task = cifar100.task(method, "20-100", 0, Path("q"), few[4:])
        settings = vars(task.settings) | {"settle_statistics": False, "device_name": "x"}
        made_up_run("q", f"{method}-20-100-seed0", [0.5], **{k: v for k, v in settings.items() if k != "epochs"})
        assert exits.run_main(figure3.experiment.main, [*few, "--methods", method, "--out", "q", "--status"]) == code
