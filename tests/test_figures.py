"""Figures 3, 4 and 7, Table 3, Appendix E's table and Generalisation, from made-up curves whose answers are known."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from running import made_up_run, rows_of

from experiments import appendix_e, figure3, figure4, generalisation, pairs, table3
from experiments.runner.report import RunOnDisk
from harness import exits


def draw(module, *options):
    """What --plot of a figure writes: the matplotlib Figure, and the lines of its Markdown."""
    settings, _ = module.experiment.parse(["--plot", "--out", "r", *options])
    figure, _, text = module.experiment.report(settings)
    return figure, text.splitlines()


def refused(module, capsys, *options):
    """The one sentence with which --plot ends."""
    assert exits.run_main(module.experiment.main, ["--plot", "--out", "r", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# --- Figure 3 -------------------------------------------------------------------------------------------


def test_figure_3s_table_has_the_known_means_and_says_what_is_missing():
    for seed, final in enumerate((0.70, 0.72, 0.74)):
        made_up_run(f"maxl-20-100-seed{seed}", [0.2, 0.75, final])
    made_up_run("single-20-seed0", [0.1, 0.2, 0.3])
    made_up_run("single-20-seed1", [0.1, 0.2, 0.26])
    made_up_run("single-20-seed2", [0.9], epochs=3)
    made_up_run("human-20-100-seed0", [0.1, 0.2], epochs=3)
    made_up_run("random-20-100-seed1", [0.1, 0.4, 0.3])
    _, lines = draw(figure3, "--pairs", "20-100")
    for start in (
        "MAXL | 72.00 ± 2.00 | 75.00 ± 0.00 | 43.00 ± 4.24 | 3 | 74.27 | 3.0 min | a device |  |",
        "Single | 28.00 ± 2.83 | 28.00 ± 2.83 |  | 2 |  | 3.0 min | a device | seed 2 at epoch 1 of 3 |",
        "Random | 30.00 | 40.00 | 4.00 | 1 |",
        "Human | unfinished | unfinished |  | 0 |",
        "K-Means | not run | not run |  | 0 |",
    ):
        assert any(line.startswith(f"| 20 → 100 | {start}") for line in lines), start
    assert any("seed 0 at epoch 2 of 3, seed 1 not run, seed 2 not run" in line for line in lines)
    _, lines = draw(figure3, "--pairs", "20-100", "--methods", "single", "uniform")  # those asked for, and those there
    assert [line.split(" | ")[1] for line in lines[-5:]] == ["Single", "Random", "Human", "MAXL", "Uniform"]


def test_a_part_is_drawn_under_a_name_of_its_own_and_says_what_it_shows():
    made_up_run("single-20-seed0", [0.3], dataset="synthetic", test_statistics="running")
    made_up_run("maxl-20-100-seed0", [0.3], dataset="synthetic", test_statistics="settled")
    figure3.experiment.main(["--plot", "--out", "r", "--pairs", "20-100", "--seeds", "0"])
    suffixes = {path.suffix for path in Path("r").glob("figure3-20-100-seed0.*")}
    assert suffixes == {".png", ".pdf", ".csv", ".md"} and len(rows_of("figure3-20-100-seed0")) == 5
    text = Path("r/figure3-20-100-seed0.md").read_text()
    for part in ("generated images", "VGG-16 of width 1.0", "all training images", "1 epoch;", "seed 0",
                 "Single tested with running statistics", "MAXL tested with settled statistics"):  # fmt: skip
        assert part in text, part
    assert "74.27" not in text, "no number of the paper beside generated images"
    assert figure3.experiment.parse([])[0].drawn_as == figure3.experiment.parse(["--quick"])[0].drawn_as == "figure3"


# --- what is not drawn together -------------------------------------------------------------------------


@pytest.mark.parametrize("name, other", [
    ("maxl-3-10-seed0", {"width": 0.25}),
    ("maxl-3-100-seed1", {"label_learning_rate": 0.01}),  # on whatever pair
    ("maxl-3-10-seed1", {"test_statistics": "running"}),
])  # fmt: skip
def test_runs_of_different_settings_are_not_drawn_together(name, other, capsys):
    of_maxl = {"label_learning_rate": 0.001, "entropy_weight": 0.2, "test_statistics": "settled"}
    made_up_run("single-3-seed0", [0.5, 0.6], test_statistics="running")
    made_up_run("maxl-3-20-seed0", [0.5, 0.6], **of_maxl)
    made_up_run("maxl0-3-20-seed0", [0.5, 0.6], **of_maxl | {"entropy_weight": 0.0})
    draw(figure3)
    made_up_run(name, [0.5, 0.6], **(of_maxl if name.startswith("maxl") else {}) | other)
    (setting,) = other
    assert f"differ in {setting}" in refused(figure3, capsys)


MAXLS = {"script": "model_vgg_maxl", "primary_level": 2, "psi": [5] * 20, "seed": 0, "entropy_weight": 0.2}


@pytest.mark.parametrize("name, changed, said", [
    ("maxl-20-100-seed1", {}, "seed was 0, now 1"),
    ("maxl0-20-100-seed0", {}, "entropy_weight was 0.2, now 0.0"),
    ("human-20-100-seed0", {"script": "model_vgg_human", "auxiliary_level": 1}, "auxiliary_level was 1, now 3"),
    ("uniform-20-100-seed0", {"script": pairs.CONTROLS, "control": "redrawn"}, "control was redrawn, now uniform"),
])  # fmt: skip
def test_a_run_that_is_not_what_its_folder_is_named_is_refused(name, changed, said, capsys):
    made_up_run("maxl-20-100-seed0", [0.5], **MAXLS)
    made_up_run(name, [0.5], **(MAXLS | changed))
    assert f"r/{name} is not the run that its name says ({said}" in refused(figure3, capsys)


# --- Figures 4 and 7, Table 3, Appendix E ---------------------------------------------------------------


def cosines(*values):
    return {"train_cosine_similarity": values, "train_trunk_cosine_similarity": [-value for value in values]}


def test_the_cosine_table_has_the_known_means_over_the_last_epochs_and_seeds():
    made_up_run("maxl-3-10-seed0", columns=cosines(*[0.0] * 5, *[0.5] * 10))
    made_up_run("maxl-3-10-seed1", columns=cosines(*[0.9] * 5, *[0.7] * 10))
    made_up_run("human-3-10-seed0", columns=cosines(0.1, 0.2, 0.3), epochs=15)
    _, lines = draw(figure4, "--pairs", "3-10", "--seeds", "0", "1")
    assert "| 3 → 10 | MAXL | 0.600 ± 0.141 | -0.600 ± 0.141 | 2 |  |" in lines
    assert "| 3 → 10 | Human | 0.200 | -0.200 | 1 | seed 0 at epoch 3 of 15, seed 1 not run |" in lines


def test_a_run_without_cosines_is_named(capsys):
    made_up_run("human-3-10-seed0", [0.5])
    assert "r/human-3-10-seed0 was run without the cosine similarity; move it away" in refused(figure4, capsys)


def test_table_3_has_the_known_numbers_beside_the_papers():
    for seed, (accuracy, used) in enumerate(((0.70, 1.0), (0.72, 0.98))):
        made_up_run(f"maxl-20-100-seed{seed}", [0.1, accuracy], columns={table3.USED: [0.5, used]})
    made_up_run("maxl0-20-100-seed0", [0.1, 0.6], columns={table3.USED: [0.9, 0.4]})
    _, lines = draw(table3, "--pairs", "20-100", "--seeds", "0", "1")
    assert "| 20 → 100 | MAXL | 71.00 ± 1.41 | 74.27 | 0.99 ± 0.01 | 1.00 | 2 |  |" in lines
    assert "| 20 → 100 | MAXL (λ = 0) | 60.00 | 73.97 | 0.40 | 0.61 | 1 | seed 1 not run |" in lines


def test_the_papers_numbers_of_table_3():
    """As printed: rows 3-10, 3-20, 3-100, 10-20, 10-100, 20-100."""
    assert list(pairs.PAPER) == list(pairs.PAIRS)
    assert list(pairs.PAPER.values()) == [90.50, 90.65, 90.66, 78.40, 78.46, 74.27]
    assert [table3.PAPER["maxl0"][pair][0] for pair in pairs.PAIRS] == [90.26, 90.39, 90.22, 77.73, 78.20, 73.97]
    assert [table3.PAPER["maxl0"][pair][1] for pair in pairs.PAIRS] == [1.00, 0.65, 0.35, 1.00, 0.57, 0.61]
    assert [table3.PAPER["maxl"][pair][1] for pair in pairs.PAIRS] == [1] * 6


def test_appendix_es_table():
    made_up_run("maxl-20-100-seed0", [0.5, 0.70], focal_gamma=2.0)
    made_up_run("maxl-20-100-seed1", [0.5, 0.74], focal_gamma=2.0)
    made_up_run("single-20-seed0", [0.4, 0.66], focal_gamma=2.0)
    made_up_run("maxl-cross-entropy-20-100-seed0", [0.4, 0.68], focal_gamma=0.0)
    made_up_run("maxl-latent-20-100-seed1", [0.1], epochs=2)
    _, lines = draw(appendix_e, "--seeds", "0", "1")
    assert [line for line in lines if line.startswith("| 20")][:5] == [
        "| 20 → 100 | MAXL | 72.00 ± 2.83 | 2 |  |  |",
        "| 20 → 100 | Single | 66.00 | 1 |  | seed 1 not run |",
        "| 20 → 100 | cross-entropy loss | 68.00 | 1 | worse than the focal loss | seed 1 not run |",
        "| 20 → 100 | no Mask SoftMax | not run | 0 | similar to Single | seed 0 not run, seed 1 not run |",
        "| 20 → 100 | latent vector | unfinished | 0 | similar to Single | seed 0 not run, seed 1 at epoch 1 of 2 |",
    ]


# --- Generalisation -------------------------------------------------------------------------------------


def run_of(name, train, test, **options):
    """A run with these accuracies in %."""
    train, test = ([value / 100 for value in values] for values in (train, test))
    made_up_run(name, test, columns={"train_primary_accuracy": train}, **options)
    return RunOnDisk(Path("r") / name)


def test_at_equal_fit_the_nearest_epochs_count_most_and_there_is_nothing_beyond_the_curve():
    """Around 50, epochs that are 1, 0 and 2 points away have weights exp(-d²/2σ²), σ = 1.5."""
    train, test = [49, 50, 52, 90], [30, 40, 35, 99]
    run, weights = run_of("maxl-20-100-seed0", train, test), [math.exp(-(d**2) / 4.5) for d in (1, 0, 2)]
    level, expected = (sum(w * x for w, x in zip(weights, values)) / sum(weights) for values in (train, test))
    below, at_level, beyond = generalisation.at_equal_fit(run, [47, level, 91])
    assert at_level == pytest.approx(expected, abs=0.01)
    assert math.isnan(below) and math.isnan(beyond)


def test_the_table_has_the_known_means_where_all_runs_got_to(capsys):
    epochs = np.arange(1, 21)
    run_of("maxl-20-100-seed2", [20, 21], [90, 90], epochs=20)
    assert "none of the runs of these pairs and seeds in r is finished yet" in refused(generalisation, capsys)
    shutil.rmtree("r/maxl-20-100-seed2")
    run_of("maxl-20-100-seed0", 20 + epochs, 30 + 0 * epochs)
    run_of("maxl-20-100-seed1", 22 + epochs, 32 + 0 * epochs)
    run_of("single-20-seed0", 40 + epochs, 50 + epochs)
    _, lines = draw(generalisation)
    assert "| 20 → 100 | MAXL | 30 | 31.0 ± 1.4 | 2 |" in lines
    levels = [int(line.split()[7]) for line in lines if "| MAXL |" in line]
    assert levels == [25, 30, 35, 40], "20 and 45 were not reached by both"
