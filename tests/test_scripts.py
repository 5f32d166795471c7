"""The three scripts from the command line: end to end, every setting as an option, and bad input."""

import re
from pathlib import Path

import pytest
from conftest import SCRIPTS, TINY, curves, run_script, script_process

import utils
from harness.command_line import QUICK, format_psi, parse_psi, parse_settings


@pytest.mark.slow
def test_quick_run_end_to_end_in_a_process_of_its_own():
    """With few images it learns well above the 5 % of chance; piped output is plain lines."""
    name, folder = "model_vgg_maxl", "runs/model_vgg_maxl-synthetic-20x5-seed0"
    process = script_process(name, "--quick", "--epochs", 2, "--train-images", 1000, "--batch-size", 10)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and errors == ""
    rows = curves(folder)
    first, replaced, *lines = output.splitlines()
    assert first.startswith(f"{name}: synthetic, primary level 2, ") and folder in first
    assert replaced == "--quick: --dataset synthetic (the script has cifar100), --width 0.125 (the script has 1.0)"
    assert len(lines) == len(rows) + 1 and "\r" not in output
    for line, row in zip(lines, rows):
        assert re.match(rf"epoch +{row['epoch']}/{len(rows)} \| train primary loss", line)
    final = float(rows[-1]["test_primary_accuracy"])
    assert f"test accuracy {100 * final:.2f} % in the final epoch, {len(rows)}" in lines[-1] and folder in lines[-1]
    assert final > 0.15


# --- settings and options ---------------------------------------------------------------------------


def test_the_papers_settings_are_the_defaults():
    """App. B and facts of the published runs."""
    single, human, maxl = (SCRIPTS[f"model_vgg_{name}"].SETTINGS for name in ("single", "human", "maxl"))
    for settings in (single, human, maxl):
        assert (settings["epochs"], settings["batch_size"], settings["width"]) == (200, 100, 1.0)
        assert (settings["learning_rate"], settings["halve_every"], settings["focal_gamma"]) == (0.01, 50, 2.0)
        assert settings["primary_level"] == 2
    assert human["auxiliary_level"] == 3 and maxl["psi"] == [5] * 20
    assert (maxl["label_learning_rate"], maxl["label_weight_decay"], maxl["entropy_weight"]) == (0.001, 5e-4, 0.2)
    assert maxl["meta_gradient"] == "forward-mode"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_is_an_option_that_help_explains_with_its_default(name, capsys):
    assert run_script(name, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    options = [*SCRIPTS[name].SETTINGS, "data_root", "dataset", "train_images", "seed", "device", "precision",
               "channels_last", "out", "resume", "overwrite", "max_minutes", "quick"]  # fmt: skip
    options += [] if name == "model_vgg_single" else ["cosine_every"]
    body = text.split("options:", 1)[1]
    for option in options:
        assert f"--{option.replace('_', '-')} " in body
    assert body.count("(default:") == len(options)
    assert "(default: 200)" in body and "None" not in body
    assert ("(default: 5*20)" in body) == (name == "model_vgg_maxl")


def test_the_command_line_wins_over_quick_and_quick_over_the_script():
    defaults = {"epochs": 200, "batch_size": 100, "width": 0.125, "learning_rate": 0.01}
    settings = parse_settings("", defaults, ["--quick", "--epochs", "3", "--batch-size", "7"])
    assert (settings.epochs, settings.batch_size, settings.learning_rate) == (3, 7, 0.01)
    assert (settings.dataset, settings.width, settings.train_images) == ("synthetic", 0.125, 4000)
    assert settings.quick == {"dataset": "cifar100", "train_images": None}  # what it replaced, and what by
    assert parse_settings("", defaults, []).quick == {}
    assert QUICK.keys() <= vars(settings).keys()


@pytest.mark.parametrize("psi, text", [([5] * 20, "5*20"), ([3, 3, 4], "3,3,4"), ([5] * 19 + [4], "5*19,4")])
def test_psi_is_shown_as_short_as_it_is_read(psi, text):
    assert format_psi(psi) == text and parse_psi(text) == psi


def test_one_number_of_psi_stands_for_all_classes():
    assert SCRIPTS["model_vgg_maxl"].parse(["--primary-level", "0", "--psi", "4"]).psi == [4, 4, 4]


# --- bad input --------------------------------------------------------------------------------------

BAD_INPUT = [
    ("model_vgg_maxl", ["--psi", "5,5"], "psi has 2 numbers, but primary level 2 has 20 classes"),
    ("model_vgg_maxl", ["--psi", "2", "3", "4"], "separate the numbers of --psi with commas, such as 2,3,4"),
    ("model_vgg_maxl", ["--psi", "2.5*20"], "not a list of whole numbers"),
    ("model_vgg_maxl", ["--psi", "5*9999"], "has to repeat 1 to 1000 times"),
    ("model_vgg_maxl", ["--entropy-weight", "nan"], "--entropy-weight nan is out of range; give 0 or a positive"),
    ("model_vgg_maxl", ["--label-learning-rate", "inf"], "--label-learning-rate inf is out of range"),
    ("model_vgg_maxl", ["--meta-gradient", "hessian"], "invalid choice: 'hessian'"),
    ("model_vgg_human", ["--auxiliary-level", 2], "auxiliary level 2 is not finer than primary level 2"),
    ("model_vgg_human", ["--auxiliary-level", 4], "--auxiliary-level 4 is out of range"),
    ("model_vgg_single", ["--learning-rate", -1], "--learning-rate -1.0 is out of range"),
    ("model_vgg_single", ["--epochs", 0], "--epochs 0 is out of range; give 1 or more"),
    ("model_vgg_single", ["--batch-size", 1], "BatchNorm"),
    ("model_vgg_single", ["--batch-size", 121], "--batch-size 121 is larger than the 120 training images"),
    ("model_vgg_single", ["--width", 1000], "--width 1000.0 is out of range"),
    ("model_vgg_single", ["--train-images", 99], "--train-images 99 is out of range"),
    ("model_vgg_single", ["--max-minutes", 0], "--max-minutes 0.0 is out of range"),
    ("model_vgg_single", ["--resume", "--overwrite"], "--resume is not allowed with --overwrite"),
    ("model_vgg_single", ["--lr", "0.1"], "unrecognized arguments: --lr 0.1; did you mean --learning-rate?"),
    ("model_vgg_single", ["--device", "cuda"], "torch sees no CUDA GPU ("),
    ("model_vgg_single", ["--precision", "tf32"], "--precision tf32 is a format of CUDA GPUs; on a CPU"),
    ("model_vgg_single", ["--out", "file/r"], "file/r cannot be made or written"),
    ("model_vgg_single", ["--out", "file"], "--out file is a file; name a folder"),
]  # fmt: skip


def assert_refused(name, arguments, said, capsys):
    Path("file").write_text("")
    assert run_script(name, *TINY, *arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert [p.name for p in Path(".").iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name, arguments, said", BAD_INPUT, ids=lambda v: " ".join(map(str, v)) if type(v) is list else ""
)
def test_bad_input_is_one_sentence_and_nothing_is_written(name, arguments, said, capsys):
    assert_refused(name, arguments, said, capsys)


@pytest.mark.parametrize("name, value, expected", [
    ("psi", [5] * 19 + [2.0], "must be a list of ints from 1 to 1000"),
    ("meta_gradient", "double_backward", "give one of forward-mode, double-backward"),
    ("halve_every", 2.5, "--halve-every 2.5 is out of range"),
    ("learning_rate", "0.1", "--learning-rate 0.1 is out of range"),
])  # fmt: skip
def test_a_setting_edited_to_what_its_option_does_not_take_is_refused(name, value, expected, monkeypatch, capsys):
    monkeypatch.setitem(SCRIPTS["model_vgg_maxl"].SETTINGS, name, value)
    assert_refused("model_vgg_maxl", [], expected, capsys)


def test_bad_input_in_a_process_of_its_own_shows_no_traceback():
    for process in [script_process(name, "--epochs", 0) for name in SCRIPTS]:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 2 and output == ""
        assert errors.startswith("error: --epochs 0 is out of range") and errors.count("\n") == 1


class Counting(utils.VGG16):
    """Does not do the same twice."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images) * (1 + 0.05 * self.calls)


def test_a_network_in_which_forward_mode_is_not_exact_stops_the_run(monkeypatch, capsys):
    monkeypatch.setattr(utils, "Backbone", Counting)
    few = [*TINY, "--epochs", 1, "--train-images", 100, "--batch-size", 50]
    assert run_script("model_vgg_maxl", *few, "--out", "r") == 2
    error = capsys.readouterr().err
    assert "forward mode is not exact" in error and "--meta-gradient double-backward" in error
    assert run_script("model_vgg_maxl", *few, "--meta-gradient", "double-backward", "--out", "d") == 0
