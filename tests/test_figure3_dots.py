"""Figure 3 of a single pair: a dot for each seed beside the curves, from made-up runs."""

import json
from pathlib import Path

from experiments import figure3
from harness import exits


def made_up_run(name, accuracies, **settings):
    folder = Path("r") / name
    folder.mkdir(parents=True)
    alike = {"dataset": "cifar100", "width": 1.0, "epochs": 2, "device_name": "a device"}
    (folder / "settings.json").write_text(json.dumps(alike | settings))
    rows = [f"{epoch},{accuracy},1" for epoch, accuracy in enumerate(accuracies, start=1)]
    (folder / "curves.csv").write_text("\n".join(["epoch,test_primary_accuracy,seconds_train", *rows]) + "\n")


def test_the_dots_are_the_finished_runs_last_accuracies_and_their_marker_says_how_they_were_tested():
    for seed, final in enumerate((0.5, 0.75)):
        made_up_run(f"single-20-seed{seed}", [0.25, final], test_statistics="running")
    made_up_run("single-20-seed2", [0.9], test_statistics="running")  # unfinished
    made_up_run("settled/single-20-seed0", [0.25, 0.375], test_statistics="settled")
    made_up_run("maxl-20-100-seed0", [0.25, 0.625], test_statistics="settled")
    settings, _ = figure3.experiment.parse(["--plot", "--out", "r", "--pairs", "20-100"])
    figure, *_ = figure3.make_report(settings)
    dots = figure.axes[1]
    drawn = [group.get_offsets().tolist() for group in dots.collections]
    assert [[y for _, y in group] for group in drawn] == [[50, 75], [37.5], [62.5]]
    assert drawn[0][0][0] < 0 < drawn[1][0][0] and drawn[2][0][0] == 4, "Single on both sides of its place, MAXL at its"
    hollow = [group.get_facecolor()[0].tolist() == [1, 1, 1, 1] for group in dots.collections]
    assert hollow == [False, True, True]
    (mean,) = dots.lines
    assert mean.get_ydata().tolist() == [62.5, 62.5]
    names = [label.get_text().split("\n") for label in dots.get_xticklabels()]
    assert names[0] == ["Single", "n = 2 + 1"] and names[4] == ["MAXL", "n = 1"] and names[1] == ["Random", "n = 0"]
    assert [text.get_text() for text in dots.get_legend().get_texts()] == ["running statistics", "settled statistics"]


def test_a_run_in_settled_of_another_width_is_refused(capsys):
    made_up_run("single-20-seed0", [0.25, 0.5], test_statistics="running")
    made_up_run("settled/single-20-seed0", [0.25, 0.5], test_statistics="settled", width=0.25)
    assert exits.run_main(figure3.experiment.main, ["--plot", "--out", "r", "--pairs", "20-100"]) == 2
    assert "differ in width" in capsys.readouterr().err
