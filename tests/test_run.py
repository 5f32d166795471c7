"""A run: what it writes, how an epoch goes, when it stops. The loop with the toy, training with the scripts."""

import errno
import io
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import toy as toy_script
from conftest import PNG, SCRIPTS, TINY, assert_same_run, curves, flatten, run_script
from toy import epochs_saved, toy

from harness import run
from harness.curves import read_curves

# --- what the three scripts train and write ---------------------------------------------------------

STEPS = "StepLR with step_size 50, gamma 0.5"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A folder for each script with the run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for name in SCRIPTS:
        assert run_script(name, *TINY, "--out", folder / name, picture=True) == 0
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_writes_settings_curves_picture_and_checkpoint(name, whole_run):
    folder = whole_run / name
    assert {p.name for p in folder.iterdir()} == {".lock", "settings.json", "curves.csv", "curves.png", "checkpoint.pt"}
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["script"] == name and settings["seed"] == 0 and settings["width"] == 0.02
    assert settings["torch_version"] == torch.__version__ and settings["device_name"]
    assert settings["command"].startswith(f"python {name}.py --dataset synthetic --width 0.02")
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    rows = curves(folder, with_seconds=True)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    expected = {"epoch", "learning_rate", "train_primary_loss", "train_primary_accuracy", "seconds_train",
                "test_primary_loss", "test_primary_accuracy", "seconds_test"}  # fmt: skip
    parts = {"network": "Network on VGG16", "optimizer": "SGD", "scheduler": STEPS, "generator": "Generator"}
    if name != "model_vgg_single":
        expected |= {"train_auxiliary_loss", "train_auxiliary_accuracy"}
    if name == "model_vgg_human":
        expected |= {"test_auxiliary_loss", "test_auxiliary_accuracy"}
    if name == "model_vgg_maxl":
        expected |= {"label_learning_rate", "train_label_entropy", "train_auxiliary_classes_used",
                     "meta_lookahead_primary_loss", "meta_mean_label_entropy", "seconds_meta"}  # fmt: skip
        parts |= {"label_generator": "LabelGenerator on VGG16", "label_scheduler": STEPS}
        parts["label_optimizer"] = "SGD with weight_decay 0.0005"
    assert expected <= rows[0].keys() and parts.items() <= settings["part_types"].items()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_shorter_run_resumed_is_bit_identical_to_the_longer_run(name, whole_run):
    assert run_script(name, *TINY, "--epochs", 1, "--out", "r") == 0
    assert run_script(name, *TINY, "--resume", "--out", "r") == 0
    assert_same_run("r", whole_run / name)


def test_the_cosine_similarity_is_taken_at_every_nth_iteration_and_averaged_over_these(monkeypatch):
    original, steps = run.Meter.add, []

    def add(meter, metrics):
        if meter.name == "train":
            steps.append(metrics)
        original(meter, metrics)

    monkeypatch.setattr(run.Meter, "add", add)
    assert run_script("model_vgg_human", *TINY, "--epochs", 1, "--cosine-every", 4, "--out", "r") == 0
    assert ["cosine_similarity" in metrics for metrics in steps] == [True, False, False, False, True, False]
    mean = (steps[0]["cosine_similarity"] + steps[4]["cosine_similarity"]).item() / 2
    (row,) = curves("r")
    assert float(row["train_cosine_similarity"]) == pytest.approx(mean)


# --- the loop ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_epoch_and_iteration(monkeypatch, capsys):
    original, calls = toy_script.step, []

    def broken(*arguments):
        calls.append(1)
        metrics = original(*arguments)
        return {name: value * (math.nan if len(calls) == 6 + 4 else 1) for name, value in metrics.items()}

    monkeypatch.setattr(toy_script, "step", broken)
    assert toy("--out", "r") == 2
    said = "primary_loss became NaN or infinite in epoch 2, iteration 4 of the train pass; saved up to epoch 1"
    assert said in capsys.readouterr().err
    assert len(curves("r")) == epochs_saved(Path("r")) == 1


def test_weights_that_are_not_finite_are_never_saved(monkeypatch, capsys):
    """After the very last update of epoch 2, which no loss of the epoch has seen."""
    original, calls = toy_script.step, []

    def broken(network, *arguments):
        calls.append(1)
        metrics = original(network, *arguments)
        if len(calls) == 12:
            next(network.parameters()).data.fill_(math.inf)
        return metrics

    monkeypatch.setattr(toy_script, "step", broken)
    assert toy("--out", "r") == 2
    assert "a weight or statistic of network: NaN or infinite at the end of epoch 2" in capsys.readouterr().err
    saved = flatten(torch.load("r/checkpoint.pt", weights_only=True)["parts"])
    assert all(torch.isfinite(v).all() for v in saved.values() if torch.is_tensor(v)) and epochs_saved(Path("r")) == 1


def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(monkeypatch, capsys):
    with monkeypatch.context() as patch:

        def full(descriptor):
            """The disk is full when the second checkpoint is written."""
            if Path("r/checkpoint.pt").exists() and Path("r/checkpoint.pt.tmp").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        assert toy("--out", "r") == 2
    error = capsys.readouterr().err
    assert "checkpoint.pt could not be written (No space left on device)" in error and error.count("\n") == 1
    assert epochs_saved(Path("r")) == 1 and not list(Path("r").glob("*.tmp"))
    assert toy("--out", "r", "--resume") == 0
    assert toy("--out", "whole") == 0
    assert_same_run("r", "whole")


def test_a_picture_that_fails_does_not_stop_the_training(monkeypatch, capsys):
    original = os.replace

    def fail(source, target):
        if str(target).endswith("curves.png"):  # held open elsewhere, on some systems
            raise PermissionError(errno.EACCES, "Permission denied")
        original(source, target)

    monkeypatch.setattr(os, "replace", fail)
    assert toy("--out", "r") == 0
    assert "warning: r/curves.png could not be drawn" in capsys.readouterr().err
    assert len(curves("r")) == 3


def test_what_a_terminal_cannot_print_is_no_traceback(monkeypatch):
    said = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", said)
    assert toy("--epochs", 1, "--out", "läufe→$5_1", picture=True) == 0
    said.flush()
    assert r"läufe\u2192$5_1".encode("cp1252") in said.buffer.getvalue()
    assert Path("läufe→$5_1/curves.png").read_bytes().startswith(PNG)


# --- curves -----------------------------------------------------------------------------------------


def test_a_column_may_appear_late_and_be_missing_now_and_then(monkeypatch, capsys):
    """In the file it is blank, and read as missing; the line of an epoch and the picture leave it out."""
    original, calls = toy_script.evaluate, []

    def seldom(network):
        calls.append(1)
        tested = original(network) | {"test_primary_loss": 1.0}
        return tested if len(calls) == 2 else {"seconds_test": 0.0}

    monkeypatch.setattr(toy_script, "evaluate", seldom)
    assert toy("--epochs", 2, "--out", "r", picture=True) == 0
    assert toy("--epochs", 3, "--out", "r", "--resume", picture=True) == 0
    output = capsys.readouterr()
    assert output.err == "" and output.out.count("test primary loss 1.000") == 1
    rows = read_curves(Path("r"))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row.get("test_primary_loss") for row in rows] == [None, 1.0, None]
    assert curves("r")[0]["test_primary_loss"] == ""
    assert list(rows[1]) == [*rows[0], "test_primary_accuracy", "test_primary_loss"]


@pytest.mark.parametrize("content", ["", "epoch,loss\n1,2,3\n", "epoch,loss\n1,x\n", None])
def test_a_damaged_curves_file_has_no_rows(content):
    if content is not None:
        Path("curves.csv").write_text(content)
    assert read_curves(Path(".")) == []
