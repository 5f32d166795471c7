"""The device, and what makes the same training faster on it: lower precision, another memory layout."""

import contextlib
import os
import sys
from pathlib import Path

import torch

from harness.exits import InputError, is_out_of_memory


def select_device(settings):
    """The torch.device of --device and --precision; also sets TF32 and cuDNN's search for kernels in this process.

    settings: has `device` and, if there is a choice, `precision`. Raises InputError if torch cannot use the device, or
    the device has no such precision.
    """
    name, precision = settings.device, getattr(settings, "precision", "fp32")
    failed = why_no_gpu() if name != "cpu" else ""
    if name == "cuda" and failed:
        raise InputError(f"--device cuda was asked for, but {failed}; use --device cpu or auto")
    device = torch.device("cpu" if name == "cpu" or failed else "cuda")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if name == "auto" and failed and nvidia_gpus() and not hidden:
        print(f"warning: there is an NVIDIA GPU here, but {failed}; training on the CPU", file=sys.stderr)
    if device.type == "cpu" and precision == "tf32":
        raise InputError("--precision tf32 is a format of CUDA GPUs; on a CPU use fp32 or bf16")
    if device.type == "cuda" and precision != "fp32" and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(f"--precision {precision} needs a GPU of compute capability 8.0 or later; use fp32")
    allow_tf32(precision != "fp32")
    torch.backends.cudnn.benchmark = True  # training batches have one size, so the search for the best kernels pays
    return device


def why_no_gpu():
    """Why torch cannot compute on a CUDA GPU here, in words; empty if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU (its CUDA may be newer than the driver's, or it is a build without CUDA)"
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:  # for example, this build of torch has no code for a GPU that old
        if is_out_of_memory(error):
            raise
        return f"torch cannot compute on it ({str(error).splitlines()[0]})"
    return ""


def nvidia_gpus():
    """Paths of the system's NVIDIA GPUs, whether torch can use them or not; none if the system does not tell."""
    return list(Path("/proc/driver/nvidia/gpus").glob("*"))


def allow_tf32(allowed):
    """Let matrix products and convolutions on CUDA round to TF32, or not, in the whole process.

    torch's own default allows it for convolutions, so "fp32" has to switch it off.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    convolutions = getattr(torch.backends.cudnn, "conv", None)  # torch 2.9 has wider settings, which would win
    if not allowed and convolutions is not None and convolutions.fp32_precision == "tf32":
        convolutions.fp32_precision = "ieee"


def place(networks, device, settings):
    """The networks, {name: module}, moved to the device in the memory layout of --channels-last."""
    memory_format = torch.channels_last if settings.channels_last else torch.preserve_format
    return {name: network.to(device, memory_format=memory_format) for name, network in networks.items()}


def autocast(device, settings):
    """A context for an epoch or a test: bf16 autocast with --precision bf16, else nothing.

    Optimizers may step inside: weights are cast anew in every forward, never taken from autocast's cache.
    """
    if settings.precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
