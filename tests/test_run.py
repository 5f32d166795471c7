"""A run's folder: what is written, how an epoch goes, full disks, NaN, other experiments."""

import errno
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    PNG,
    SCRIPTS,
    TINY,
    assert_same_run,
    curves,
    flatten,
    forked,
    generated,
    run_script,
    wait_for_an_epoch,
)

import create_dataset
import utils
from harness import run


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_writes_settings_curves_plot_and_checkpoint(name, whole_run):
    folder = whole_run / name
    assert {p.name for p in folder.iterdir()} == {
        ".lock", "settings.json", "curves.csv", "curves.png", "checkpoint.pt",
    }  # fmt: skip
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
    if name != "model_vgg_single":
        expected |= {"train_auxiliary_loss", "train_auxiliary_accuracy"}
    if name == "model_vgg_human":
        expected |= {"test_auxiliary_loss", "test_auxiliary_accuracy"}
    if name == "model_vgg_maxl":
        expected |= {"label_learning_rate", "train_label_entropy", "train_auxiliary_classes_used",
                     "meta_lookahead_primary_loss", "meta_mean_label_entropy", "seconds_meta"}  # fmt: skip
    assert rows[0].keys() == expected
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    for part in {"network", "optimizer", "scheduler", "generator"}:
        assert part in checkpoint["parts"]
    if name == "model_vgg_maxl":
        assert {"label_generator", "label_optimizer", "label_scheduler"} <= checkpoint["parts"].keys()


def test_the_test_columns_are_the_checkpoints_accuracy_and_loss(whole_run):
    """Recomputed here from the saved weights, image by image."""
    checkpoint = torch.load(whole_run / "model_vgg_human/checkpoint.pt", weights_only=True)
    network = utils.Network(utils.VGG16(0.02), 20, 100).eval()
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


def test_learning_rates_are_halved_after_every_50_epochs_from_the_papers_values(monkeypatch):
    monkeypatch.setitem(SCRIPTS["model_vgg_maxl"].SETTINGS, "halve_every", 2)
    assert run_script("model_vgg_maxl", *TINY, "--batch-size", 60, "--epochs", 5, "--out", "r") == 0
    rates = [(float(row["learning_rate"]), float(row["label_learning_rate"])) for row in curves("r")]
    assert rates == [(0.01, 0.001)] * 2 + [(0.005, 0.0005)] * 2 + [(0.0025, 0.00025)]


def test_optimizers_and_initial_weights_are_the_published_ones(monkeypatch):
    """Plain SGD; Xavier uniform for the multi-task network, Xavier normal and weight decay for the label generator."""
    for rate in ("learning_rate", "label_learning_rate"):  # with rates of 0 the saved weights are the initial ones
        monkeypatch.setitem(SCRIPTS["model_vgg_maxl"].SETTINGS, rate, 0.0)
    assert run_script("model_vgg_maxl", *TINY, "--width", 0.1, "--batch-size", 60, "--epochs", 1, "--out", "r") == 0
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


def test_an_epoch_is_a_pass_of_multi_task_steps_then_one_of_meta_steps(monkeypatch):
    """Algorithm 1, with 120 images in batches of 20."""
    maxl, order = SCRIPTS["model_vgg_maxl"], []
    for module, name in ((utils, "multi_task_step"), (maxl, "meta_training_step")):
        original = getattr(module, name)

        def logged(*arguments, original=original, name=name, **options):
            order.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, logged)
    assert run_script("model_vgg_maxl", *TINY, "--epochs", 2, "--out", "r") == 0
    assert order == (["multi_task_step"] * 6 + ["meta_training_step"] * 6) * 2


@pytest.mark.parametrize("name", ["model_vgg_human", "model_vgg_maxl"])
def test_the_cosine_similarity_is_taken_at_every_nth_iteration_and_averaged_over_these(name, monkeypatch):
    original, asked, values = utils.multi_task_step, [], []

    def logged(*arguments, cosine=False):
        *arguments, cosine = (*arguments, cosine) if len(arguments) == 6 else arguments
        metrics = original(*arguments, cosine=cosine)
        asked.append(cosine)
        if cosine:
            values.append(metrics["cosine_similarity"].item())
        return metrics

    monkeypatch.setattr(utils, "multi_task_step", logged)
    assert run_script(name, *TINY, "--epochs", 2, "--cosine-every", 4, "--out", "r") == 0
    assert asked == [True, False, False, False, True, False] * 2
    found = [float(row["train_cosine_similarity"]) for row in curves("r")]
    assert found == pytest.approx([sum(values[:2]) / 2, sum(values[2:]) / 2])
    assert run_script(name, *TINY, "--epochs", 3, "--cosine-every", 4, "--out", "r", "--resume") == 0
    assert run_script(name, *TINY, "--epochs", 2, "--out", "without") == 0
    (row, *_) = curves("without")
    assert not any("cosine" in column for column in row)


def test_settled_statistics_are_the_moving_average_over_a_pass_at_the_final_weights():
    """By BatchNorm's rule, 9 parts of what was there to 1 of the batch, from the run's without that pass."""
    few = [*TINY, "--epochs", 1]
    assert run_script("model_vgg_single", *few, "--out", "plain") == 0
    assert run_script("model_vgg_single", *few, "--settle-statistics", "--out", "settled") == 0
    plain, settled = (
        torch.load(f"{name}/checkpoint.pt", weights_only=True)["parts"]["network"] for name in ("plain", "settled")
    )
    split, _ = create_dataset.load("synthetic", None, torch.device("cpu"), 120)
    mean, count = plain["trunk.layers.1.running_mean"], 0
    for images, _ in split.train_batches(20, torch.Generator().manual_seed(0 + 1)):  # seed 0, epoch 1
        maps = F.conv2d(images, plain["trunk.layers.0.weight"], plain["trunk.layers.0.bias"], padding=1)
        mean, count = 0.9 * mean + 0.1 * maps.mean(dim=(0, 2, 3)), count + 1
    assert count == 6
    torch.testing.assert_close(settled["trunk.layers.1.running_mean"], mean)
    assert not torch.allclose(plain["trunk.layers.1.running_mean"], mean)


@pytest.mark.parametrize("name", ["model_vgg_single", "model_vgg_human"])
def test_settled_statistics_change_the_test_and_not_the_training(name, whole_run):
    assert run_script(name, *TINY, "--settle-statistics", "--out", "r") == 0
    both = [
        torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["network"]
        for folder in (Path("r"), whole_run / name)
    ]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0] if key.endswith(("weight", "bias")))
    for row, plain in zip(curves("r"), curves(whole_run / name), strict=True):
        assert all(value == plain[column] for column, value in row.items() if not column.startswith("test_"))
        assert row["test_primary_loss"] != plain["test_primary_loss"]


def test_a_run_from_before_an_option_was_there_is_continued(whole_run):
    shutil.copytree(whole_run / "model_vgg_single", "r")
    saved = torch.load("r/checkpoint.pt", weights_only=True)
    del saved["settings"]["settle_statistics"]
    torch.save(saved, "r/checkpoint.pt")
    more = [*TINY, "--epochs", 4, "--out", "r", "--resume"]
    assert run_script("model_vgg_single", *more, "--settle-statistics") == 2
    assert run_script("model_vgg_single", *more) == 0


def test_a_second_process_in_the_same_folder_is_refused(whole_run, capsys):
    process = forked(run_script, "model_vgg_single", *TINY, "--epochs", 10_000, "--out", "r")
    wait_for_an_epoch(process)
    for word in ("--resume", "--overwrite"):
        assert run_script("model_vgg_single", *TINY, "--epochs", 10_000, "--out", "r", word) == 2
        assert "another run is at work in r" in capsys.readouterr().err
    process.kill()
    process.join()
    done = len(curves("r"))
    assert run_script("model_vgg_single", *TINY, "--epochs", done + 1, "--out", "r", "--resume") == 0


def test_a_run_that_ends_as_another_asks_for_its_folder_is_not_written_over(whole_run, monkeypatch, capsys):
    shutil.copytree(whole_run / "model_vgg_single", "r")
    monkeypatch.setattr(run, "at_work", lambda directory: True)  # it was, an instant ago
    assert run_script("model_vgg_single", *TINY, "--out", "r") == 2
    assert "r is there already and is not overwritten" in capsys.readouterr().err
    assert_same_run("r", whole_run / "model_vgg_single")


def test_a_folder_that_is_refused_is_left_as_it_was(capsys):
    Path("mine").mkdir()
    Path("mine/notes").touch()
    assert run_script("model_vgg_single", *TINY, "--out", "mine") == 2
    assert "mine is there already and is not overwritten" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["notes"]


def test_the_lock_is_one_that_other_machines_see():
    """On a file opened for writing, which NFS takes to its server; not on the folder."""
    fcntl = pytest.importorskip("fcntl")
    process = forked(run_script, "model_vgg_single", *TINY, "--epochs", 10_000, "--out", "r")
    wait_for_an_epoch(process)
    with open("r/.lock", "r+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    folder = os.open("r", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def test_a_picture_that_cannot_be_drawn_does_not_stop_the_training(whole_run, monkeypatch, capsys):
    def broken(*arguments):
        raise ValueError("no such backend")

    monkeypatch.setattr(run, "plot_curves", broken)
    assert run_script("model_vgg_single", *TINY, "--out", "r", picture=True) == 0
    assert "warning: r/curves.png could not be drawn (no such backend)" in capsys.readouterr().err
    assert_same_run("r", whole_run / "model_vgg_single")


def test_a_picture_that_cannot_be_written_does_not_stop_the_training_either(whole_run, monkeypatch, capsys):
    original = os.replace

    def replace(source, target):
        if str(target).endswith("curves.png"):  # held open elsewhere, on some systems
            raise PermissionError(errno.EACCES, "Permission denied")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert run_script("model_vgg_single", *TINY, "--out", "r") == 0
    assert "warning: r/curves.png could not be drawn" in capsys.readouterr().err
    assert_same_run("r", whole_run / "model_vgg_single")


def test_what_a_terminal_cannot_print_is_no_traceback(monkeypatch):
    said = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", said)
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", "läufe→1") == 0
    said.flush()
    assert r"läufe\u21921".encode("cp1252") in said.buffer.getvalue()


def test_a_folder_may_have_any_name():
    name = "cost_$5_and_$6 ü"
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", name, picture=True) == 0
    assert (Path(name) / "curves.png").read_bytes().startswith(PNG)


def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(whole_run, monkeypatch, capsys):
    with monkeypatch.context() as patch:

        def full(descriptor):
            """The disk is full when the second checkpoint is written."""
            if Path("r/checkpoint.pt").exists() and Path("r/checkpoint.pt.tmp").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        assert run_script("model_vgg_single", *TINY, "--out", "r") == 2
    error = capsys.readouterr().err
    assert "checkpoint.pt could not be written (No space left on device)" in error and error.count("\n") == 1
    assert len(torch.load("r/checkpoint.pt", weights_only=True)["rows"]) == 1
    assert not list(Path("r").glob("*.tmp"))
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 0
    assert_same_run("r", whole_run / "model_vgg_single")


@pytest.mark.parametrize(
    "name, changed, said",
    [
        ("model_vgg_single", ["--seed", 1], "seed was 0, now 1"),
        (
            "model_vgg_single",
            ["--width", 0.04, "--batch-size", 60],
            "batch_size was 20, now 60; width was 0.02, now 0.04",
        ),
        ("model_vgg_human", [], "script was model_vgg_single, now model_vgg_human"),
    ],
)
def test_another_experiments_checkpoint_is_refused_with_what_differs(name, changed, said, capsys):
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", "r") == 0
    before = {p.name: p.read_bytes() for p in Path("r").iterdir()}
    capsys.readouterr()
    assert run_script(name, *TINY, *changed, "--out", "r", "--resume") == 2
    error = capsys.readouterr().err
    assert "is of another experiment" in error and said in error and error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in Path("r").iterdir()} == before


def test_an_existing_folder_is_kept_unless_a_plain_word_says_otherwise(whole_run, capsys):
    Path("r").mkdir()
    Path("r/notes.txt").write_text("mine")
    assert run_script("model_vgg_single", *TINY, "--out", "r") == 2
    assert "r is there already and is not overwritten" in capsys.readouterr().err
    assert [p.name for p in Path("r").iterdir()] == ["notes.txt"]
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--overwrite", "--seed", 1) == 0
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--overwrite") == 0
    assert Path("r/notes.txt").read_text() == "mine"
    assert_same_run("r", whole_run / "model_vgg_single")


@pytest.mark.parametrize("where", ["train", "meta"])
def test_a_loss_that_is_not_finite_stops_with_epoch_and_iteration(where, monkeypatch, capsys):
    """In epoch 2 (6 iterations a pass), at the fourth iteration of the pass."""
    script, step = SCRIPTS["model_vgg_maxl"], {"train": utils, "meta": SCRIPTS["model_vgg_maxl"]}[where]
    function = {"train": "multi_task_step", "meta": "meta_training_step"}[where]
    original, calls = getattr(step, function), 0

    def broken(*arguments, **options):
        nonlocal calls
        calls += 1
        metrics = original(*arguments, **options)
        return {k: v * float("nan") if calls == 6 + 4 else v for k, v in metrics.items()}

    monkeypatch.setattr(step, function, broken)
    assert script.SETTINGS["learning_rate"] == 0.01
    assert run_script("model_vgg_maxl", *TINY, "--out", "r") == 2
    error = capsys.readouterr().err
    assert f"became NaN or infinite in epoch 2, iteration 4 of the {where} pass; saved up to epoch 1" in error
    assert len(curves("r")) == 1
    assert all(
        torch.isfinite(v).all()
        for v in flatten(torch.load("r/checkpoint.pt", weights_only=True)).values()
        if torch.is_tensor(v) and v.is_floating_point()
    )


def test_weights_that_are_not_finite_are_never_saved(monkeypatch, capsys):
    """Those of the label generator after its very last update, which no loss of the epoch has seen."""
    script = SCRIPTS["model_vgg_maxl"]
    original, calls = script.meta_training_step, 0

    def broken(network, label_generator, *arguments, **options):
        nonlocal calls
        calls += 1
        metrics = original(network, label_generator, *arguments, **options)
        if calls == 12:
            next(label_generator.parameters()).data.fill_(float("inf"))
        return metrics

    monkeypatch.setattr(script, "meta_training_step", broken)
    assert run_script("model_vgg_maxl", *TINY, "--out", "r") == 2
    assert "a weight of label_generator: NaN or infinite at the end of epoch 2" in capsys.readouterr().err
    assert len(torch.load("r/checkpoint.pt", weights_only=True)["rows"]) == 1
