"""A run's folder on a user's machine: two processes at once, what is said at the start, no memory left, the disk."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, TINY, curves, forked, run_script

import create_dataset
import model_vgg_single
from experiments.runner import ready, task
from harness import acceleration, exits, run
from harness.exits import InputError

START = "model_vgg_single: 20 classes of synthetic, seed 0; on "


# --- two processes in one new folder ------------------------------------------------------------------


def test_of_two_runs_started_together_in_a_new_folder_one_is_refused(monkeypatch):
    """Both have found no folder and loaded the data before either makes the folder."""
    original, both = create_dataset.load, multiprocessing.get_context("fork").Barrier(2)

    def together(*arguments):
        data = original(*arguments)
        both.wait(60)
        return data

    monkeypatch.setattr(create_dataset, "load", together)
    few = [*TINY, "--epochs", 12, "--out", "new/r"]
    logs = [open(f"log{i}", "w", buffering=1) for i in range(2)]
    processes = [forked(run_script, "model_vgg_single", *few, log=log) for log in logs]
    for process, log in zip(processes, logs):
        process.join(120)
        log.close()
    codes = [process.exitcode for process in processes]
    assert sorted(codes) == [0, 2]
    error = Path(f"log{codes.index(2)}").read_text()
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "another run is at work in new/r" in error or "new/r is there already and is not overwritten" in error
    assert len(curves("new/r")) == 12


@pytest.mark.parametrize(
    "options, code, said", [([], 2, "is there already"), (["--resume"], 0, "resuming r after epoch 2")]
)
def test_a_run_that_ended_while_the_data_was_loaded_is_not_written_over(options, code, said, monkeypatch, capsys):
    """Another process makes the folder, trains two epochs there, and is gone before this one gets to it."""
    original = create_dataset.load

    def slow(*arguments):
        monkeypatch.setattr(create_dataset, "load", original)
        assert run_script("model_vgg_single", *TINY, "--epochs", 2, "--out", "r") == 0
        return original(*arguments)

    monkeypatch.setattr(create_dataset, "load", slow)
    assert run_script("model_vgg_single", *TINY, "--out", "r", *options) == code
    assert said in "".join(capsys.readouterr())
    assert len(curves("r")) == (3 if options else 2)


def test_a_run_that_cannot_begin_leaves_no_folder():
    assert run_script("model_vgg_single", *TINY, "--train-images", 7, "--out", "new/r") == 2
    assert not Path("new").exists()


# --- what is said at the start --------------------------------------------------------------------------


def test_a_run_says_what_it_trains_on_which_device_and_where(capsys):
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", "r") == 0
    first = capsys.readouterr().out.splitlines()[0]
    name = json.loads(Path("r/settings.json").read_text())["device_name"]
    assert first == f"{START}{name} (cpu, 1 threads), fp32; in r"


@pytest.mark.parametrize(
    "gpus, visible, option, warned",
    [
        (1, None, "auto", True),
        (0, None, "auto", False),
        (1, "", "auto", False),
        (1, "-1", "auto", False),
        (1, None, "cpu", False),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_named(gpus, visible, option, warned, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(acceleration, "nvidia_gpus", lambda: [Path("0000:01:00.0")] * gpus)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert acceleration.select_device(option).type == "cpu"
    error = capsys.readouterr().err
    assert ("there is an NVIDIA GPU here, but torch sees no CUDA GPU" in error) == warned


def test_a_gpu_that_this_torch_has_no_code_for_is_not_used(monkeypatch, capsys):
    def no_kernel(*arguments, **options):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nSome more lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", no_kernel)
    monkeypatch.setattr(acceleration, "nvidia_gpus", lambda: [Path("0000:01:00.0")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert acceleration.select_device("auto").type == "cpu"
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and "no kernel image is available" in error and error.count("\n") == 1
    with pytest.raises(InputError, match="--device cuda was asked for, but torch cannot compute on it"):
        acceleration.select_device("cuda")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_low_precision_is_refused_on_a_gpu_that_is_too_old_for_it(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    acceleration.Acceleration(torch.device("cuda"))
    with pytest.raises(InputError, match=f"--precision {precision} needs a GPU of compute capability 8.0"):
        acceleration.Acceleration(torch.device("cuda"), precision)


# --- memory and disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSome more lines"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\nSome more lines"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),  # cuDNN, for want of memory
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_sentence_that_says_what_to_lower(error, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise error

    monkeypatch.setattr(model_vgg_single.train_epoch, "__defaults__", (broken,))
    monkeypatch.setattr(model_vgg_single, "single_step", broken)
    assert run_script("model_vgg_single", *TINY, "--out", "r") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (") and said.count("\n") == 1
    assert "lower --batch-size or --width" in said and "Some more lines" not in said


def test_memory_that_a_cpu_does_not_have_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56)
    assert exits.is_out_of_memory(caught.value)


def test_another_runtime_error_keeps_its_traceback():
    def broken(argv):
        raise RuntimeError("sizes of tensors must match")

    with pytest.raises(RuntimeError, match="must match"):
        exits.run_main(broken)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_finished_run_keeps_one_checkpoint_of_the_size_that_the_runner_counts_with(name, monkeypatch):
    monkeypatch.setattr(run, "_seldom", lambda start: 0.0)  # so that there is one before the last
    few = ("--dataset", "synthetic", "--width", "0.25", "--train-images", "100", "--batch-size", "50", "--epochs", "2")
    assert run_script(name, *few, "--out", "r/run") == 0
    assert sorted(os.listdir("r/run")) == [".lock", "checkpoint.pt", "curves.csv", "curves.png", "settings.json"]
    networks = 2 if name == "model_vgg_maxl" else 1
    one = task.Task("run", name, name, few, Path("r"), networks=networks)
    size = Path("r/run/checkpoint.pt").stat().st_size
    assert size == pytest.approx(ready.checkpoint_bytes(one), rel=0.1)
    assert ready.room_needed([one, one], jobs=1) == pytest.approx(4 * size, rel=0.1)
