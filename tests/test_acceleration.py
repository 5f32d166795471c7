"""The device, --precision and --channels-last: what they change, and that they change nothing else."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import SCRIPTS, TINY, curves, run_script, tf32_allowed

import maxl
import utils
from harness import acceleration
from harness.acceleration import autocast, place, select_device
from harness.exits import InputError

CPU = torch.device("cpu")


def settings(**given):
    return argparse.Namespace(**{"device": "auto", "precision": "fp32", "channels_last": False} | given)


# --- device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gpus, visible, option, warned",
    [(1, None, "auto", True), (0, None, "auto", False), (1, "", "auto", False), (1, None, "cpu", False)],
)
def test_a_gpu_that_torch_cannot_use_is_named(gpus, visible, option, warned, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(acceleration, "nvidia_gpus", lambda: [Path("0000:01:00.0")] * gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert select_device(settings(device=option)) == CPU
    assert ("there is an NVIDIA GPU here, but torch sees no CUDA GPU" in capsys.readouterr().err) == warned


def test_a_gpu_that_this_torch_has_no_code_for_is_not_used(monkeypatch, capsys):
    def no_kernel(*arguments, **options):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nSome more lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", no_kernel)
    monkeypatch.setattr(acceleration, "nvidia_gpus", lambda: [Path("0000:01:00.0")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert select_device(settings()) == CPU
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and "no kernel image is available" in error and error.count("\n") == 1
    with pytest.raises(InputError, match="--device cuda was asked for, but torch cannot compute on it"):
        select_device(settings(device="cuda"))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_low_precision_is_refused_on_a_gpu_that_is_too_old_for_it(precision, monkeypatch):
    monkeypatch.setattr(acceleration, "why_no_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert select_device(settings()).type == "cuda"
    with pytest.raises(InputError, match=f"--precision {precision} needs a GPU of compute capability 8.0"):
        select_device(settings(precision=precision))


@pytest.fixture
def as_torch_was():
    """Puts torch's settings of precision back."""
    yield
    if hasattr(torch.backends.cudnn, "conv"):
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    acceleration.allow_tf32(False)


WAYS = {  # in which a user's program may have allowed TF32
    "torch's default": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="reads the settings of torch 2.9")
@pytest.mark.parametrize("way", WAYS)
def test_fp32_is_fp32_whoever_allowed_tf32_and_bf16_allows_it_for_the_rest(way, as_torch_was):
    def allowed():
        return [kind.fp32_precision == "tf32" for kind in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)]

    def rounding():
        return [getattr(kind, name) in ("tf32", "bf16") for kind, name, _ in maxl.rounding_switches()]

    WAYS[way]()
    before = rounding()
    assert any(before)
    with maxl.exact_arithmetic(CPU):
        assert not any(rounding())
    assert rounding() == before
    if way in ("high", "medium"):
        assert torch.get_float32_matmul_precision() == way
    select_device(settings(device="cpu"))
    assert not any(allowed())
    select_device(settings(device="cpu", precision="bf16"))
    assert all(allowed())


# --- precision --------------------------------------------------------------------------------------


def test_weights_that_change_inside_the_context_are_those_of_the_next_forward():
    """Autocast's cache would keep the first bf16 copy of each weight as long as the context lasts."""
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    with autocast(CPU, settings(precision="bf16")):
        layer(x).sum().backward()
        with torch.no_grad():
            layer.weight.add_(1.0)
        inside = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside, layer(x))


def test_all_of_maxl_is_in_lower_precision_but_the_second_pass(monkeypatch):
    """--precision bf16 allows TF32 for what autocast leaves; the flags can be set and read without a GPU."""
    forward, seen = utils.VGG16.forward, []

    def watched(trunk, images):
        old = not hasattr(torch, "get_autocast_dtype")
        lowered = {torch.is_autocast_cpu_enabled() if old else torch.is_autocast_enabled("cpu"), *tf32_allowed()}
        seen.append((trunk.training, lowered))
        return forward(trunk, images)

    monkeypatch.setattr(utils.VGG16, "forward", watched)
    assert run_script("model_vgg_maxl", *TINY, "--epochs", 1, "--precision", "bf16", "--out", "r") == 0
    tests = [(False, {True})] * 2
    first_pass = [(True, {True})] * (2 * 6)  # two networks, six batches
    second_pass = [(True, {False})] * (len(seen) - len(first_pass) - len(tests))
    assert second_pass and seen == first_pass + second_pass + tests


# --- memory layout ----------------------------------------------------------------------------------


def test_channels_last_is_the_same_up_to_rounding():
    outputs, images = [], torch.randn(2, 3, 8, 8).double()
    for channels_last in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)).double()
        placed = place({"network": network}, CPU, settings(channels_last=channels_last))["network"]
        assert placed[2].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        outputs.append(placed(images))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [[], ["--precision", "tf32"], ["--precision", "bf16", "--channels-last"]])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_learn_on_the_gpu_with_every_acceleration(name, options):
    assert run_script(name, "--quick", "--epochs", 4, *options, "--out", "r", images=(4000, 2000)) == 0
    assert "NVIDIA" in json.loads(Path("r/settings.json").read_text())["device_name"]
    assert float(curves("r")[-1]["test_primary_accuracy"]) > 0.15
