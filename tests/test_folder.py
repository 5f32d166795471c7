"""A run's folder: its name, who may write in it, which runs may go on in it; no memory and no disk left."""

import argparse
import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import toy as toy_script
from conftest import assert_same_run, curves, forked, wait_for_an_epoch
from toy import epochs_saved, toy

from harness import exits
from harness.folder import default_folder, differences

# --- its name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, own, name", [
    ("model_vgg_single", {"primary_level": 0}, "model_vgg_single-3-seed0"),
    ("model_vgg_human", {"primary_level": 2, "auxiliary_level": 3}, "model_vgg_human-20-100-seed0"),
    ("model_vgg_maxl", {"primary_level": 0, "psi": [3, 3, 4]}, "model_vgg_maxl-3,3,4-seed0"),
    ("experiments.methods.uniform", {"psi": [5] * 19 + [4], "seed": 7}, "uniform-19x5,4-seed7"),
    ("experiments.methods.table1", {"dataset": "mnist", "backbone": "conv4"}, "table1-mnist-conv4-seed0"),
])  # fmt: skip
def test_the_default_folder_says_what_is_in_it(script, own, name):
    settings = argparse.Namespace(**{"dataset": "cifar100", "seed": 0} | own)
    assert default_folder(script, settings) == Path("runs") / name


def test_different_psi_never_share_a_folder_and_its_name_stays_short():
    psis = [[1 + i // 2 % 2 + (i == j) for i in range(20)] for j in range(20)]  # one differs in each
    psis += [[3, 3, 4], [5, 1, 4], [33, 4], [3, 34], [5] * 3, [3] * 5]
    names = {str(default_folder("m", argparse.Namespace(dataset="cifar100", seed=0, psi=psi))) for psi in psis}
    assert len(names) == len(psis) and max(map(len, names)) < 45 and not any(set(name) & set("*? ") for name in names)


# --- who may write in it ----------------------------------------------------------------------------


def test_a_second_process_in_the_same_folder_is_refused(capsys):
    process = forked(toy, "--epochs", 1_000_000, "--out", "r")
    wait_for_an_epoch(process)
    for option in ("--resume", "--overwrite"):
        assert toy("--epochs", 1_000_000, "--out", "r", option) == 2
        assert "another run is at work in r" in capsys.readouterr().err
    process.kill()
    process.join()
    assert toy("--epochs", epochs_saved(Path("r")) + 1, "--out", "r", "--resume") == 0


def test_the_lock_is_one_that_other_machines_see():
    """On a file opened for writing, which NFS takes to its server; not on the folder."""
    fcntl = pytest.importorskip("fcntl")
    process = forked(toy, "--epochs", 1_000_000, "--out", "r")
    wait_for_an_epoch(process)
    with open("r/.lock", "r+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    descriptor = os.open("r", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_of_two_runs_started_together_in_a_new_folder_one_is_refused(monkeypatch):
    """Both have found no folder and loaded the data before either makes the folder."""
    both = multiprocessing.get_context("fork").Barrier(2)
    monkeypatch.setattr(toy_script, "load", lambda: both.wait(60))
    logs = [open(f"log{i}", "w", buffering=1) for i in range(2)]
    processes = [forked(toy, "--epochs", 300, "--out", "new/r", log=log) for log in logs]
    for process, log in zip(processes, logs):
        process.join(120)
        log.close()
    codes = [process.exitcode for process in processes]
    assert sorted(codes) == [0, 2]
    error = Path(f"log{codes.index(2)}").read_text()
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "another run is at work in new/r" in error or "new/r is there already and is not overwritten" in error
    assert len(curves("new/r")) == 300


@pytest.mark.parametrize(
    "options, code, said", [([], 2, "is there already"), (["--resume"], 0, "resuming r after epoch 2")]
)
def test_a_run_that_ended_while_the_data_was_loaded_is_not_written_over(options, code, said, monkeypatch, capsys):
    """Another process makes the folder, trains two epochs there, and is gone before this one gets to it."""
    with monkeypatch.context() as patch:
        patch.setattr(toy_script, "load", lambda: (patch.undo(), toy("--epochs", 2, "--out", "r")))
        assert toy("--out", "r", *options) == code
    assert said in "".join(capsys.readouterr())
    assert len(curves("r")) == (3 if options else 2)


def test_an_existing_folder_is_kept_unless_a_plain_word_says_otherwise(capsys):
    Path("r").mkdir()
    Path("r/notes.txt").write_text("mine")
    assert toy("--out", "r") == 2
    assert "r is there already and is not overwritten" in capsys.readouterr().err
    assert [p.name for p in Path("r").iterdir()] == ["notes.txt"]
    assert toy("--out", "r", "--overwrite", "--seed", 1) == 0
    assert toy("--out", "r", "--overwrite") == 0
    assert toy("--out", "whole") == 0
    assert Path("r/notes.txt").read_text() == "mine"
    assert_same_run("r", "whole")


def test_a_run_that_cannot_begin_leaves_no_folder(monkeypatch):
    def no_data():
        raise exits.InputError("no data")

    monkeypatch.setattr(toy_script, "load", no_data)
    assert toy("--out", "new/r") == 2
    assert not Path("new").exists()


# --- which runs may go on in it ---------------------------------------------------------------------


@pytest.mark.parametrize("changed, said", [
    (["--seed", 1], "seed was 0, now 1"),
    (["--learning-rate", 1, "--batch-size", 60], "batch_size was 10, now 60; learning_rate was 0.1, now 1.0"),
    (["--precision", "bf16"], "precision was fp32, now bf16"),
])  # fmt: skip
def test_another_experiments_checkpoint_is_refused_with_what_differs(changed, said, capsys):
    assert toy("--epochs", 1, "--out", "r") == 0
    before = {p.name: p.read_bytes() for p in Path("r").iterdir()}
    assert toy(*changed, "--out", "r", "--resume") == 2
    error = capsys.readouterr().err
    assert f"r/checkpoint.pt is of another experiment ({said})" in error and error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in Path("r").iterdir()} == before
    free = ["--device", "cpu", "--channels-last", "--data-root", "elsewhere", "--max-minutes", 9, "--epochs", 2]
    assert toy("--out", "r", "--resume", *free) == 0


def test_a_setting_that_was_not_there_is_a_difference():
    ours = {"script": "a", "psi": [5] * 20, "epochs": 3, "auxiliary_weight": 0.0}
    assert differences(ours, ours | {"epochs": 5, "device_name": "x"}) == ""
    said = "psi was 3,3,4, now 5*20; auxiliary_weight was not set, now 0.0"
    assert differences(ours, {"script": "a", "psi": [3, 3, 4]}) == said


def test_another_optimizer_is_refused_in_one_sentence(monkeypatch, capsys):
    assert toy("--epochs", 1, "--out", "r") == 0
    monkeypatch.setattr(toy_script, "make_optimizer", lambda network, settings: torch.optim.Adam(network.parameters()))
    assert toy("--out", "r", "--resume") == 2
    error = capsys.readouterr().err
    assert "optimizer was SGD with momentum 0.9, now Adam" in error and error.count("\n") == 1
    assert epochs_saved(Path("r")) == 1


# --- memory and disk --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\nSome more lines"),
    MemoryError(),
])  # fmt: skip
def test_out_of_memory_is_one_sentence_that_says_what_to_lower(error, monkeypatch, capsys):
    def broken(*arguments):
        raise error

    monkeypatch.setattr(toy_script, "step", broken)
    assert toy("--out", "r") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (") and said.count("\n") == 1
    assert "lower --batch-size or --width" in said and "Some more lines" not in said


def test_memory_that_a_cpu_does_not_have_is_recognised_and_another_error_keeps_its_traceback():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56)
    assert exits.is_out_of_memory(caught.value)

    def broken(argv):
        raise RuntimeError("sizes of tensors must match")

    with pytest.raises(RuntimeError, match="must match"):
        exits.run_main(broken)


def test_settings_json_says_how_each_session_was_started():
    assert toy("--epochs", 1, "--out", "r") == 0
    assert toy("--epochs", 2, "--out", "r", "--resume", "--data-root", "a b") == 0
    settings = json.loads(Path("r/settings.json").read_text())
    assert settings["command"] == "python toy.py --epochs 2 --out r --resume --data-root 'a b'"
    assert [session["after_epoch"] for session in settings["sessions"]] == [0, 1]
    assert settings["sessions"][0]["command"] == "python toy.py --epochs 1 --out r"
