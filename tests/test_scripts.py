"""The three scripts from the command line: end to end, every setting as an option, and bad input."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, TINY, curves, run_script, script_process

import create_dataset
import utils
from harness import downloads
from harness.command_line import OPTIONS, QUICK, format_psi, parse_psi, parse_settings
from harness.exits import InputError


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory):
    """A process for each script, all started at once in an empty folder: --quick, but with few images and epochs."""
    folder, processes = tmp_path_factory.mktemp("quick"), {}
    for name in reversed(SCRIPTS):  # MAXL takes longest
        images = 1200 if name == "model_vgg_maxl" else 1500  # in small batches, which make more of them
        few = "--quick", "--epochs", 2, "--train-images", images, "--batch-size", 10
        processes[name] = script_process(name, *few, cwd=folder)
    yield folder, processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_run_end_to_end_in_a_process_of_its_own(name, quick_runs, monkeypatch):
    """Learns well above the 5 % of chance; piped output is plain lines."""
    start, processes = quick_runs
    monkeypatch.chdir(start)
    process = processes[name]
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and errors == ""
    what = {"model_vgg_single": "20", "model_vgg_human": "20-100", "model_vgg_maxl": "20x5"}[name]
    folder = Path(f"runs/{name}-synthetic-{what}-seed0")
    rows = curves(folder)
    first, replaced, *lines = output.splitlines()
    assert first.startswith(f"{name}: synthetic, primary level 2, ") and str(folder) in first
    assert replaced == "--quick: --dataset synthetic (the script has cifar100), --width 0.125 (the script has 1.0)"
    assert len(lines) == len(rows) + 1 and "\r" not in output
    for line, row in zip(lines, rows):
        assert re.match(rf"epoch +{row['epoch']}/{len(rows)} \| train primary loss", line)
    final, best = float(rows[-1]["test_primary_accuracy"]), max(float(row["test_primary_accuracy"]) for row in rows)
    assert f"test accuracy {100 * final:.2f} % in the final epoch, {len(rows)}" in lines[-1]
    assert f"best {100 * best:.2f} %" in lines[-1] and str(folder) in lines[-1]
    assert final > 0.15 and final > float(rows[0]["test_primary_accuracy"])
    assert float(rows[-1]["train_primary_loss"]) < float(rows[0]["train_primary_loss"])


@pytest.mark.parametrize("primary, auxiliary", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_the_six_pairs_of_figure_3(primary, auxiliary):
    few = [*TINY, "--epochs", 1, "--train-images", 100, "--primary-level", primary]
    classes = (3, 10, 20, 100)[primary], (3, 10, 20, 100)[auxiliary]
    psi = ",".join(map(str, create_dataset.balanced_psi(*classes)))
    own = {"model_vgg_human": ["--auxiliary-level", auxiliary], "model_vgg_maxl": ["--psi", psi]}
    for name, options in own.items():
        assert run_script(name, *few, *options, "--out", name) == 0
        weights = torch.load(f"{name}/checkpoint.pt", weights_only=True)["parts"]["network"]
        assert [len(weights[f"heads.{head}.2.bias"]) for head in (0, 1)] == list(classes)


@pytest.mark.parametrize("text, psi", [("2,3,4", [2, 3, 4]), ("4", [4, 4, 4]), ("4*2,3", [4, 4, 3])])
@pytest.mark.parametrize("method", ["forward-mode", "double-backward"])
def test_any_psi_at_3_classes_by_every_gradient(text, psi, method):
    few = [*TINY, "--epochs", 1, "--train-images", 100, "--primary-level", 0, "--meta-gradient", method]
    assert run_script("model_vgg_maxl", *few, "--psi", text, "--out", "r") == 0
    assert json.loads(Path("r/settings.json").read_text())["psi"] == psi
    (row,) = curves("r")
    used = float(row["train_auxiliary_classes_used"]) * sum(psi)
    assert used == pytest.approx(round(used)) and 3 <= round(used) <= sum(psi)


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


def test_an_experiment_adds_options_of_its_own():
    own = {"latent_size": (int, "(default: ψ's)", lambda n: n > 0, "1 or more"), "kind": (("a", "b"), "", None, None)}
    defaults = {"epochs": 1, "latent_size": None, "kind": "a", "dataset": "mnist"}

    def parse(*argv):
        return parse_settings("", defaults, argv, datasets=["mnist", "svhn"], auxiliary_task=False, options=own)

    settings = parse("--kind", "b")
    assert (settings.kind, settings.latent_size, settings.dataset) == ("b", None, "mnist")
    assert "cosine_every" not in settings and "latent_size" not in OPTIONS
    for argv, said in ((["--latent-size", "0"], "out of range; give 1 or more"), (["--dataset", "cifar100"], "choice")):
        with pytest.raises(InputError, match=said):
            parse(*argv)


@pytest.mark.parametrize("psi, text", [([5] * 20, "5*20"), ([3, 3, 4], "3,3,4"), ([5] * 19 + [4], "5*19,4")])
def test_psi_is_shown_as_short_as_it_is_read(psi, text):
    assert format_psi(psi) == text and parse_psi(text) == psi


# --- bad input --------------------------------------------------------------------------------------

BAD_INPUT = [
    ("model_vgg_maxl", ["--psi", "5,5"], "psi has 2 numbers, but primary level 2 has 20 classes"),
    ("model_vgg_maxl", ["--primary-level", 0], "psi has 20 numbers, but primary level 0 has 3 classes"),
    ("model_vgg_maxl", ["--psi", "2", "3", "4"], "separate the numbers of --psi with commas, such as 2,3,4"),
    ("model_vgg_maxl", ["--psi", "5*19,100000000"], "must be a list of ints from 1 to 1000"),
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
    ("model_vgg_single", ["--epoch=3"], "did you mean --epochs?"),
    ("model_vgg_single", ["--primary_level", 1], "did you mean --primary-level?"),
    ("model_vgg_single", ["--frobnicate"], "unrecognized arguments: --frobnicate (--help"),
    ("model_vgg_single", ["--device", "cuda"], "torch sees no CUDA GPU ("),
    ("model_vgg_single", ["--precision", "tf32"], "--precision tf32 is a format of CUDA GPUs; on a CPU"),
    ("model_vgg_single", ["--out", ""], "--out  is out of range; give a folder, or leave it out"),
    ("model_vgg_single", ["--out", "file/r"], "file/r cannot be made or written"),
    ("model_vgg_single", ["--out", "file"], "--out file is a file; name a folder"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, arguments, said", BAD_INPUT, ids=lambda v: " ".join(map(str, v)) if type(v) is list else ""
)
def test_bad_input_is_one_sentence_and_nothing_is_written(name, arguments, said, capsys):
    Path("file").write_text("")
    assert run_script(name, *TINY, *arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert [p.name for p in Path(".").iterdir()] == ["file"]


@pytest.mark.parametrize("name, value, expected", [
    ("psi", [5] * 19 + [2.0], "must be a list of ints from 1 to 1000"),
    ("psi", None, "must be a list of ints from 1 to 1000"),
    ("meta_gradient", "double_backward", "give one of forward-mode, double-backward"),
    ("epochs", None, "--epochs None is out of range; give 1 or more"),
    ("epochs", 2.5, "--epochs 2.5 is out of range"),
    ("learning_rate", "0.1", "--learning-rate 0.1 is out of range"),
])  # fmt: skip
def test_a_setting_edited_to_what_its_option_does_not_take_is_refused(name, value, expected, monkeypatch, capsys):
    monkeypatch.setitem(SCRIPTS["model_vgg_maxl"].SETTINGS, name, value)
    assert run_script("model_vgg_maxl", "--dataset", "synthetic") == 2
    out, error = capsys.readouterr()
    assert expected in error and error.count("\n") == 1 and out == ""


def test_no_data_and_no_network_names_the_three_ways_out(monkeypatch, capsys):
    def no_network(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(downloads, "download_and_extract_archive", no_network)
    assert run_script("model_vgg_single", "--epochs", 1) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: CIFAR-100 is not in dataset") and error.count("\n") == 1
    for way_out in ("cifar-100-python.tar.gz", "--data-root", "--dataset synthetic"):
        assert way_out in error
    assert list(Path(".").iterdir()) == []


def test_bad_input_in_a_process_of_its_own_shows_no_traceback():
    process = script_process("model_vgg_maxl", "--psi", "5,5")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and output == ""
    assert errors.startswith("error: psi has 2 numbers") and errors.count("\n") == 1


class Counting(utils.VGG16):
    """Does not do the same twice."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images) * (1 + 0.05 * self.calls)


def test_a_network_in_which_forward_mode_is_not_exact_stops_the_run(monkeypatch, capsys):
    monkeypatch.setattr(utils, "Backbone", Counting)
    few = [*TINY, "--epochs", 1, "--train-images", 100]
    assert run_script("model_vgg_maxl", *few, "--out", "r") == 2
    error = capsys.readouterr().err
    assert "forward mode is not exact" in error and "--meta-gradient double-backward" in error
    assert run_script("model_vgg_maxl", *few, "--meta-gradient", "double-backward", "--out", "d") == 0


@pytest.mark.cuda
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_train_on_the_gpu(name):
    assert run_script(name, "--quick", "--epochs", 2, "--out", "r") == 0
    assert "NVIDIA" in json.loads(Path("r/settings.json").read_text())["device_name"]
    assert float(curves("r")[-1]["test_primary_accuracy"]) > 0.08
