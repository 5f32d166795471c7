"""The three scripts from the command line: end to end, the six pairs of Figure 3, and every kind of bad input."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, TINY, curves, run_script, script_process

import create_dataset
from harness import downloads


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
    what = {"model_vgg_single": "20", "model_vgg_human": "20-100", "model_vgg_maxl": "20-100"}[name]
    folder = Path(f"runs/{name}-synthetic-{what}-seed0")
    rows = curves(folder)
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["dataset"], settings["width"]) == ("synthetic", 0.125)
    first, *lines = output.splitlines()
    assert first.startswith(f"{name}: {what} classes of synthetic, seed 0; on ") and str(folder) in first
    assert len(lines) == len(rows) + 1 and "\r" not in output
    for line, row in zip(lines, rows):
        assert re.match(rf"epoch +{row['epoch']}/{len(rows)} \| train primary loss", line)
    final, best = float(rows[-1]["test_primary_accuracy"]), max(float(row["test_primary_accuracy"]) for row in rows)
    assert f"test accuracy {100 * final:.2f} % in the final epoch, {len(rows)}" in lines[-1]
    assert f"best {100 * best:.2f} %" in lines[-1] and str(folder) in lines[-1]
    assert final > 0.15 and final > float(rows[0]["test_primary_accuracy"])
    assert float(rows[-1]["train_primary_loss"]) < float(rows[0]["train_primary_loss"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_is_small_but_for_what_is_set_beside_it(name):
    settings = SCRIPTS[name].parse(["--quick"])
    assert (settings.dataset, settings.width, settings.epochs) == ("synthetic", 0.125, 10)
    assert (settings.train_images, settings.batch_size) == (4000, 100)
    settings = SCRIPTS[name].parse(["--quick", "--width", "0.5", "--dataset", "cifar100"])
    assert (settings.dataset, settings.width, settings.epochs) == ("cifar100", 0.5, 10)


@pytest.mark.parametrize("primary, auxiliary", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_the_six_pairs_of_figure_3(primary, auxiliary):
    few = [*TINY, "--epochs", 1, "--train-images", 100, "--primary-level", primary]
    classes = (3, 10, 20, 100)[primary], (3, 10, 20, 100)[auxiliary]
    assert run_script("model_vgg_human", *few, "--auxiliary-level", auxiliary) == 0
    psi = create_dataset.balanced_psi(*classes)
    assert run_script("model_vgg_maxl", *few, "--psi", ",".join(map(str, psi))) == 0
    for name in ("model_vgg_human", "model_vgg_maxl"):
        folder = Path(f"runs/{name}-synthetic-{classes[0]}-{classes[1]}-seed0")
        weights = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["network"]
        assert [len(weights[f"heads.{head}.2.bias"]) for head in (0, 1)] == list(classes)


@pytest.mark.parametrize(
    "text, psi", [("2,3,4", [2, 3, 4]), ("5*3", [5, 5, 5]), ("4*2,3", [4, 4, 3]), ("1,1,7", [1, 1, 7])]
)
@pytest.mark.parametrize("method", ["forward-mode", "double-backward"])
def test_any_psi_at_3_classes_by_every_gradient(text, psi, method):
    few = [*TINY, "--epochs", 1, "--train-images", 100, "--primary-level", 0, "--meta-gradient", method]
    assert run_script("model_vgg_maxl", *few, "--psi", text, "--out", "r") == 0
    assert json.loads(Path("r/settings.json").read_text())["psi"] == psi
    (row,) = curves("r")
    used = float(row["train_auxiliary_classes_used"]) * sum(psi)
    assert used == pytest.approx(round(used)) and 3 <= round(used) <= sum(psi)


def test_psi_edited_at_the_top_of_the_script_is_what_runs(monkeypatch):
    settings = SCRIPTS["model_vgg_maxl"].SETTINGS
    assert settings["primary_level"] == 2 and settings["psi"] == [5] * 20
    monkeypatch.setitem(settings, "primary_level", 0)
    monkeypatch.setitem(settings, "psi", [2, 3, 4])
    assert run_script("model_vgg_maxl", *TINY, "--epochs", 1, "--out", "r") == 0
    assert json.loads(Path("r/settings.json").read_text())["psi"] == [2, 3, 4]


@pytest.mark.parametrize("psi", [5, None, "5*3", [2.0, 3, 4]])
def test_psi_edited_to_what_is_none_is_one_sentence(psi, monkeypatch, capsys):
    monkeypatch.setitem(SCRIPTS["model_vgg_maxl"].SETTINGS, "primary_level", 0)
    monkeypatch.setitem(SCRIPTS["model_vgg_maxl"].SETTINGS, "psi", psi)
    code = run_script("model_vgg_maxl", *TINY, "--epochs", 1, "--out", "r")
    if psi == "5*3":  # as on the command line
        assert code == 0 and json.loads(Path("r/settings.json").read_text())["psi"] == [5, 5, 5]
    else:
        assert code == 2 and "must be a list of ints from 1 to 1000" in capsys.readouterr().err


def test_the_papers_settings_are_the_defaults():
    """App. B and facts of the published runs."""
    single, human, maxl = (SCRIPTS[f"model_vgg_{name}"].SETTINGS for name in ("single", "human", "maxl"))
    for settings in (single, human, maxl):
        assert (settings["epochs"], settings["batch_size"], settings["width"]) == (200, 100, 1.0)
        assert (settings["learning_rate"], settings["halve_every"], settings["focal_gamma"]) == (0.01, 50, 2.0)
        assert settings["primary_level"] == 2
    assert human["auxiliary_level"] == 3
    assert (maxl["label_learning_rate"], maxl["label_weight_decay"], maxl["entropy_weight"]) == (0.001, 5e-4, 0.2)
    assert maxl["meta_gradient"] == "forward-mode"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_option_with_its_default(name, capsys):
    assert run_script(name, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    options = ["data-root", "dataset", "primary-level", "epochs", "batch-size", "width", "train-images", "seed",
               "device", "precision", "channels-last", "cuda-graphs", "settle-statistics", "out",
               "resume", "overwrite", "max-minutes", "quick"]  # fmt: skip
    options += [] if name == "model_vgg_single" else ["cosine-every"]
    options += {"model_vgg_human": ["auxiliary-level"]}.get(name, [])
    options += {"model_vgg_maxl": ["psi", "entropy-weight", "meta-gradient"]}.get(name, [])
    body = text.split("options:", 1)[1]
    for option in options:
        assert f"--{option}" in body
    assert body.count("(default:") == len(options)
    assert "(default: 200)" in body and "(default: dataset)" in body and "None" not in body


BAD_INPUT = [
    ("model_vgg_maxl", ["--psi", "5,5"], "psi has 2 numbers, but primary level 2 has 20 classes"),
    ("model_vgg_maxl", ["--primary-level", 0], "psi has 20 numbers, but primary level 0 has 3 classes"),
    ("model_vgg_maxl", ["--psi", "5*19,0"], "must be a list of ints from 1 to 1000"),
    ("model_vgg_maxl", ["--psi", "-5*20"], "argument --psi: expected one argument"),
    ("model_vgg_maxl", ["--psi=5*19,-1"], "must be a list of ints from 1 to 1000"),
    ("model_vgg_maxl", ["--psi", "5*19,1000000000"], "not a list of whole numbers"),
    ("model_vgg_maxl", ["--psi", "5*19,100000000"], "must be a list of ints from 1 to 1000"),
    ("model_vgg_maxl", ["--psi", "5_0*20"], "not a list of whole numbers"),
    ("model_vgg_maxl", ["--psi", "5*"], "not a list of whole numbers"),
    ("model_vgg_single", ["--out", ""], "--out  is out of range"),
    ("model_vgg_maxl", ["--psi", "2.5*20"], "not a list of whole numbers"),
    ("model_vgg_maxl", ["--psi", "five"], "not a list of whole numbers"),
    ("model_vgg_maxl", ["--psi", ""], "not a list of whole numbers"),
    ("model_vgg_maxl", ["--psi", "5*999999999999"], "not a list of whole numbers"),
    ("model_vgg_maxl", ["--entropy-weight", "nan"], "--entropy-weight nan is out of range"),
    ("model_vgg_maxl", ["--entropy-weight", -1], "--entropy-weight -1.0 is out of range"),
    ("model_vgg_maxl", ["--meta-gradient", "finite-difference"], "invalid choice: 'finite-difference'"),
    ("model_vgg_maxl", ["--cosine-every", -1], "--cosine-every -1 is out of range"),
    ("model_vgg_human", ["--cosine-every", "0.5"], "invalid int value: '0.5'"),
    ("model_vgg_single", ["--precision", "fp16"], "invalid choice: 'fp16'"),
    ("model_vgg_maxl", ["--meta-gradient", "hessian"], "invalid choice: 'hessian'"),
    ("model_vgg_human", ["--auxiliary-level", 2], "auxiliary level 2 is not finer than primary level 2"),
    ("model_vgg_human", ["--auxiliary-level", 0], "auxiliary level 0 is not finer than primary level 2"),
    ("model_vgg_human", ["--primary-level", 3], "not finer than primary level 3"),
    ("model_vgg_human", ["--auxiliary-level", 4], "auxiliary level 4 is unknown"),
    ("model_vgg_single", ["--primary-level", 4], "--primary-level 4 is out of range"),
    ("model_vgg_single", ["--primary-level", -1], "--primary-level -1 is out of range"),
    ("model_vgg_single", ["--primary-level", "fine"], "invalid int value: 'fine'"),
    ("model_vgg_single", ["--epochs", 0], "--epochs 0 is out of range"),
    ("model_vgg_single", ["--batch-size", 0], "--batch-size 0 is out of range"),
    ("model_vgg_single", ["--batch-size", 1], "BatchNorm"),
    ("model_vgg_single", ["--batch-size", 121], "--batch-size 121 is larger than the 120 training images"),
    ("model_vgg_single", ["--width", 0], "--width 0.0 is out of range"),
    ("model_vgg_single", ["--width", "nan"], "--width nan is out of range"),
    ("model_vgg_single", ["--width", 1000], "--width 1000.0 is out of range"),
    ("model_vgg_single", ["--train-images", 99], "--train-images 99 is out of range"),
    ("model_vgg_single", ["--train-images", 10_001], "--train-images 10001 is out of range"),
    ("model_vgg_single", ["--seed", -1], "--seed -1 is out of range"),
    ("model_vgg_single", ["--max-minutes", 0], "--max-minutes 0.0 is out of range"),
    ("model_vgg_single", ["--resume", "--overwrite"], "not allowed with argument"),
    ("model_vgg_single", ["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ("model_vgg_single", ["--dataset", "cifar10"], "invalid choice: 'cifar10'"),
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


@pytest.mark.parametrize("psi", [[5] * 19 + [True], [5] * 19 + [2.0], [5] * 19 + ["5"], (5,) * 20])
def test_psi_edited_to_something_else_than_whole_numbers_is_refused(psi, monkeypatch, capsys):
    monkeypatch.setitem(SCRIPTS["model_vgg_maxl"].SETTINGS, "psi", psi)
    assert run_script("model_vgg_maxl", *TINY) == 2
    assert "must be a list of ints from 1 to 1000" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("meta_gradient", "double_backward"), ("dataset", "cifar10")])
def test_a_setting_edited_to_what_its_option_does_not_take_is_refused(name, value, monkeypatch, capsys):
    monkeypatch.setitem(SCRIPTS["model_vgg_maxl"].SETTINGS, name, value)
    assert run_script("model_vgg_maxl", "--epochs", "1") == 2
    out, error = capsys.readouterr()
    assert f"{value} is out of range; give one of " in error and error.count("\n") == 1 and out == ""


@pytest.mark.parametrize("option", [["--precision", "tf32"], ["--cuda-graphs"]])
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_only_a_gpu_has_is_refused_on_a_cpu(name, option, capsys):
    assert run_script(name, *TINY, "--device", "cpu", *option, "--out", "r") == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and option[0] in errors and "on a CPU" in errors
    assert not Path("r").exists()


def test_cuda_without_a_gpu_is_refused(capsys):
    assert run_script("model_vgg_single", *TINY, "--device", "cuda") == 2
    assert "torch sees no CUDA GPU (" in capsys.readouterr().err
    assert not Path("runs").exists()


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


@pytest.mark.cuda
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_train_on_the_gpu(name):
    assert run_script(name, "--quick", "--epochs", 2, "--out", "r") == 0
    assert "NVIDIA" in json.loads(Path("r/settings.json").read_text())["device_name"]
    assert float(curves("r")[-1]["test_primary_accuracy"]) > 0.08
