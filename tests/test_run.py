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
import torch.nn.functional as F
import toy as toy_script
from conftest import PNG, SCRIPTS, TINY, assert_same_run, curves, flatten, generated, run_script
from toy import epochs_saved, toy

import create_dataset
from harness import run
from harness.curves import curves_text, plot_curves, read_curves

# --- what the three scripts train and write ---------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_writes_settings_curves_picture_and_checkpoint(name, whole_run):
    folder = whole_run / name
    files = {".lock", "settings.json", "curves.csv", "curves.png", "checkpoint.pt"}
    assert {p.name for p in folder.iterdir()} == files
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["script"] == name and settings["seed"] == 0 and settings["width"] == 0.02
    assert settings["learning_rate"] == 0.01 and settings["halve_every"] == 50 and settings["focal_gamma"] == 2.0
    assert settings["torch_version"] == torch.__version__ and settings["device_name"]
    assert settings["command"].startswith(f"python {name}.py --dataset synthetic --width 0.02")
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    rows = curves(folder, with_seconds=True)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    expected = {"epoch", "learning_rate", "train_primary_loss", "train_primary_accuracy", "seconds_train",
                "test_primary_loss", "test_primary_accuracy", "seconds_test"}  # fmt: skip
    parts = {"network": "Network on VGG16", "optimizer": "SGD", "scheduler": "StepLR", "generator": "Generator"}
    if name != "model_vgg_single":
        expected |= {"train_auxiliary_loss", "train_auxiliary_accuracy"}
    if name == "model_vgg_human":
        expected |= {"test_auxiliary_loss", "test_auxiliary_accuracy"}
    if name == "model_vgg_maxl":
        expected |= {"label_learning_rate", "train_label_entropy", "train_auxiliary_classes_used",
                     "meta_lookahead_primary_loss", "meta_mean_label_entropy", "seconds_meta"}  # fmt: skip
        parts |= {"label_generator": "LabelGenerator on VGG16", "label_optimizer": "SGD", "label_scheduler": "StepLR"}
    assert expected <= rows[0].keys()
    assert parts.items() <= settings["part_types"].items()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["parts"].keys() == settings["part_types"].keys()


def test_the_test_columns_are_the_checkpoints_accuracy_and_loss(whole_run):
    """Recomputed here from the saved weights, image by image."""
    checkpoint = torch.load(whole_run / "model_vgg_human/checkpoint.pt", weights_only=True)
    settings = SCRIPTS["model_vgg_human"].parse(TINY)
    network = SCRIPTS["model_vgg_human"].make_networks(settings)["network"].eval()
    network.load_state_dict(checkpoint["parts"]["network"])
    images, labels = generated(train=False, seed=0, count=200)
    x = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    with torch.no_grad():
        p = [logits.double().softmax(dim=1) for logits in network(x)]
    row = curves(whole_run / "model_vgg_human")[-1]
    for task, level, q in (("primary", 2, p[0]), ("auxiliary", 3, p[1])):
        target = labels[:, level]
        assert float(row[f"test_{task}_accuracy"]) == pytest.approx((q.argmax(1) == target).double().mean().item())
        q = q[torch.arange(len(q)), target]
        assert float(row[f"test_{task}_loss"]) == pytest.approx((-((1 - q) ** 2) * q.log()).mean().item(), rel=1e-4)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole_run):
    assert run_script("model_vgg_single", *TINY, "--out", "again") == 0
    assert_same_run("again", whole_run / "model_vgg_single")
    assert run_script("model_vgg_single", *TINY, "--out", "other", "--seed", 1) == 0
    assert curves("other") != curves(whole_run / "model_vgg_single")


def test_learning_rates_are_halved_from_the_papers_values():
    few = [*TINY, "--batch-size", 60, "--epochs", 5, "--halve-every", 2]
    assert run_script("model_vgg_maxl", *few, "--out", "r") == 0
    rates = [(float(row["learning_rate"]), float(row["label_learning_rate"])) for row in curves("r")]
    assert rates == [(0.01, 0.001)] * 2 + [(0.005, 0.0005)] * 2 + [(0.0025, 0.00025)]


def test_optimizers_and_initial_weights_are_the_published_ones():
    """Plain SGD; Xavier uniform for the multi-task network, Xavier normal and weight decay for the label generator."""
    still = ["--learning-rate", 0, "--label-learning-rate", 0]  # so that the saved weights are the initial ones
    few = [*TINY, "--width", 0.1, "--batch-size", 60, "--epochs", 1]
    assert run_script("model_vgg_maxl", *few, *still, "--out", "r") == 0
    parts = torch.load("r/checkpoint.pt", weights_only=True)["parts"]
    for name, weight_decay in (("optimizer", 0), ("label_optimizer", 5e-4)):
        (group,) = parts[name]["param_groups"]
        assert (group["momentum"], group["dampening"], group["nesterov"]) == (0, 0, False)
        assert group["weight_decay"] == weight_decay
    for name, uniform in (("network", True), ("label_generator", False)):
        weight = parts[name]["trunk.layers.34.weight"]  # a convolution of 51 to 51 channels
        std = math.sqrt(2 / (2 * 51 * 9))
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert (weight.abs().max().item() <= math.sqrt(3) * std) == uniform


@pytest.fixture
def added(monkeypatch):
    """What the steps of a run report: the pass and the names of the numbers."""
    found, original = [], run.Meter.add

    def add(meter, metrics):
        found.append((meter.name, metrics))
        original(meter, metrics)

    monkeypatch.setattr(run.Meter, "add", add)
    return found


def test_an_epoch_is_a_pass_of_multi_task_steps_then_one_of_meta_steps(added):
    """Algorithm 1, with 120 images in batches of 20."""
    assert run_script("model_vgg_maxl", *TINY, "--epochs", 2, "--out", "r") == 0
    assert [name for name, _ in added] == (["train"] * 6 + ["meta"] * 6) * 2
    for name, metrics in added:
        assert ("auxiliary_loss" in metrics) == (name == "train")
        assert ("lookahead_primary_loss" in metrics) == (name == "meta")


@pytest.mark.parametrize("name", ["model_vgg_human", "model_vgg_maxl"])
def test_the_cosine_similarity_is_taken_at_every_nth_iteration_and_averaged_over_these(name, added):
    assert run_script(name, *TINY, "--epochs", 2, "--cosine-every", 4, "--out", "r") == 0
    steps = [metrics for stage, metrics in added if stage == "train"]
    assert ["cosine_similarity" in metrics for metrics in steps] == [True, False, False, False, True, False] * 2
    values = [metrics["cosine_similarity"].item() for metrics in steps if "cosine_similarity" in metrics]
    found = [float(row["train_cosine_similarity"]) for row in curves("r")]
    assert found == pytest.approx([sum(values[:2]) / 2, sum(values[2:]) / 2])
    assert run_script(name, *TINY, "--epochs", 1, "--out", "without") == 0
    assert not any("cosine" in column for column in curves("without")[0])


def test_settled_statistics_are_the_moving_average_over_a_pass_at_the_final_weights(whole_run):
    """By BatchNorm's rule, 9 parts of what was there to 1 of the batch. The training itself stays bit-identical."""
    few = [*TINY, "--epochs", 1]
    assert run_script("model_vgg_single", *few, "--out", "plain") == 0
    assert run_script("model_vgg_single", *few, "--test-statistics", "settled", "--out", "settled") == 0
    plain, settled = (
        torch.load(f"{name}/checkpoint.pt", weights_only=True)["parts"]["network"] for name in ("plain", "settled")
    )
    split, _ = create_dataset.load(SCRIPTS["model_vgg_single"].parse(few), torch.device("cpu"))
    mean = plain["trunk.layers.1.running_mean"]
    for images, _ in split.train_batches(20, torch.Generator().manual_seed(0 + 1)):  # seed 0, epoch 1
        maps = F.conv2d(images, plain["trunk.layers.0.weight"], plain["trunk.layers.0.bias"], padding=1)
        mean = 0.9 * mean + 0.1 * maps.mean(dim=(0, 2, 3))
    torch.testing.assert_close(settled["trunk.layers.1.running_mean"], mean)
    assert not torch.allclose(plain["trunk.layers.1.running_mean"], mean)
    assert all(torch.equal(plain[key], settled[key]) for key in plain if key.endswith(("weight", "bias")))
    (row,), (settled_row,) = curves("plain"), curves("settled")
    assert {column for column in row if row[column] != settled_row[column]} <= {c for c in row if c.startswith("test_")}
    assert row["test_primary_loss"] != settled_row["test_primary_loss"]


# --- the loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [4, 6])
def test_a_loss_that_is_not_finite_stops_with_epoch_and_iteration(batch, monkeypatch, capsys):
    """In epoch 2. Its NaN is in the weights, too, which are not saved."""
    original, calls = toy_script.step, []

    def broken(*arguments):
        calls.append(1)
        metrics = original(*arguments)
        return {name: value * (math.nan if len(calls) == 6 + batch else 1) for name, value in metrics.items()}

    monkeypatch.setattr(toy_script, "step", broken)
    assert toy("--out", "r") == 2
    said = f"primary_loss became NaN or infinite in epoch 2, iteration {batch} of the train pass; saved up to epoch 1"
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
    assert "a weight of network: NaN or infinite at the end of epoch 2" in capsys.readouterr().err
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


@pytest.mark.parametrize("broken", ["drawn", "written"])
def test_a_picture_that_fails_does_not_stop_the_training(broken, monkeypatch, capsys):
    original = os.replace

    def fail(*arguments):
        if broken == "drawn" or str(arguments[1]).endswith("curves.png"):  # held open elsewhere, on some systems
            raise PermissionError(errno.EACCES, "Permission denied")
        original(*arguments)

    monkeypatch.setattr(*((run, "plot_curves") if broken == "drawn" else (os, "replace")), fail)
    assert toy("--out", "r", picture=True) == 0
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


@pytest.mark.parametrize("content", ["", "epoch,loss\n1", "epoch,loss\n1,2,3\n", "epoch,loss\n1,x\n", None])
def test_a_damaged_curves_file_has_no_rows(content):
    if content is not None:
        Path("curves.csv").write_text(content)
    assert read_curves(Path(".")) == []


@pytest.mark.parametrize("epochs, markers", [(30, True), (31, False)])
def test_the_picture_of_many_epochs_has_no_markers_and_its_panels_wrap(epochs, markers, monkeypatch):
    from matplotlib.figure import Figure

    names = ["train_primary_accuracy", "test_primary_accuracy", "train_primary_loss", "test_primary_loss",
             "train_label_entropy", "train_auxiliary_classes_used", "train_cosine_similarity"]  # fmt: skip
    rows = [{"epoch": epoch} | dict.fromkeys(names, 1 / epoch) for epoch in range(1, epochs + 1)]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: figures.append(figure))
    plot_curves(rows, "title", io.BytesIO())
    axes = figures[0].axes
    assert len(axes) == 5 and len({round(place.get_position().y0, 2) for place in axes}) == 2
    train, test = axes[0].lines
    assert train.get_color() != test.get_color() and train.get_linestyle() != test.get_linestyle()
    assert (train.get_marker() not in ("", "None")) == markers
    assert curves_text(rows).count("\n") == epochs + 1
