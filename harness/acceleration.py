"""The device, and what makes the same algorithm faster on it: precision, memory layout, CUDA graphs."""

import contextlib
import copy
import os
import sys
from pathlib import Path

import torch

from harness.exits import InputError, is_out_of_memory


def select_device(name):
    """ "auto", "cpu" or "cuda" -> torch.device. Raises InputError for cuda where torch cannot use one."""
    failed = why_no_gpu() if name != "cpu" else ""
    if name == "cuda" and failed:
        raise InputError(f"--device cuda was asked for, but {failed}; use --device cpu or auto")
    device = torch.device("cpu" if name == "cpu" or failed else "cuda")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if name == "auto" and failed and nvidia_gpus() and not hidden:
        print(f"warning: there is an NVIDIA GPU here, but {failed}; training on the CPU", file=sys.stderr)
    torch.backends.cudnn.benchmark = True  # training batches have one size, so the search for the best kernels pays
    return device


def why_no_gpu():
    """Why torch cannot compute on a CUDA GPU here, in words; empty where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU (its CUDA may be newer than the driver's, or it is a build without CUDA)"
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:  # as where this build has no code for so old a GPU
        if is_out_of_memory(error):
            raise
        return f"torch cannot compute on it ({str(error).splitlines()[0]})"
    return ""


def nvidia_gpus():
    """NVIDIA GPUs that the system has, whether torch can use them or not, as paths; none where it does not tell."""
    return list(Path("/proc/driver/nvidia/gpus").glob("*"))


PRECISIONS = ("fp32", "tf32", "bf16")


def add_acceleration(parser):
    """Add the options of Acceleration."""
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32",
        help="of convolutions and linear layers: tf32, on CUDA, or bf16, for all but MAXL's second pass, which they "
        "spoil and which stays in fp32 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--channels-last", action="store_true",
        help="lay weights and activations out channels last: the same up to rounding (default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--cuda-graphs", action="store_true",
        help="launch each training step as one CUDA graph; not yet run on a GPU (default: off)",
    )  # fmt: skip


class Acceleration:
    """What --precision, --channels-last and --cuda-graphs do to networks and steps; by default, nothing.

    Raises InputError for tf32 and for CUDA graphs on a CPU, and for low precision on a GPU that is too old for it.
    """

    def __init__(self, device, precision="fp32", channels_last=False, cuda_graphs=False):
        if device.type != "cuda" and precision == "tf32":
            raise InputError("--precision tf32 is a format of CUDA GPUs; on a CPU use fp32 or bf16")
        if device.type != "cuda" and cuda_graphs:
            raise InputError("--cuda-graphs needs a CUDA GPU; leave it out on a CPU")
        if device.type == "cuda" and precision != "fp32" and torch.cuda.get_device_capability(device) < (8, 0):
            raise InputError(f"--precision {precision} needs a GPU of compute capability 8.0 or later; use fp32")
        self.device, self.precision, self.cuda_graphs = device, precision, cuda_graphs
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        allow_tf32(precision != "fp32", precision != "fp32")

    def place(self, network):
        """Move the network to the device, in the memory layout asked for; returns it."""
        return network.to(self.device, memory_format=self.memory_format)

    def lower(self, network):
        """The network for the passes that bear low precision: with bf16, a view of it, its forward under autocast.

        All else is shared with `network`, its parameters and buffers too.
        """
        if self.precision != "bf16":
            return network
        view = copy.copy(network)
        view.forward = torch.autocast(self.device.type, torch.bfloat16)(network.forward)
        return view

    def capture(self, step):
        """The training step, with CUDA graphs as a CapturedStep."""
        return CapturedStep(step) if self.cuda_graphs else step


def allow_tf32(products, convolutions):
    """Let matrix products, and convolutions, on CUDA round to TF32, or not, in the whole process.

    torch's own default is True for convolutions, which would make fp32 something else.
    """
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
    if not convolutions and tf32_allowed()[1]:  # by one of the wider settings of newer torch
        torch.backends.cudnn.conv.fp32_precision = "ieee"


def tf32_allowed():
    """Whether matrix products, and convolutions, on CUDA may round to TF32: two booleans."""
    if not hasattr(torch.backends.cudnn, "conv"):  # torch before 2.9
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return tuple(kind.fp32_precision == "tf32" for kind in (torch.backends.cuda.matmul, torch.backends.cudnn.conv))


@contextlib.contextmanager
def in_fp32(device):
    """No autocast and no TF32 while it lasts, whoever allowed them, for what does not bear rounding.

    A step captured in it as a CUDA graph stays in fp32.
    """
    before = tf32_allowed()
    allow_tf32(False, False)
    try:
        with torch.autocast("cuda" if device.type == "cuda" else "cpu", enabled=False):
            yield
    finally:
        allow_tf32(*before)


def generator_states():
    """The states of all of torch's generators that a step may draw from; the host has them, no GPU is waited for."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


class CapturedStep:
    """A training step as a CUDA graph, one launch in place of hundreds; called like the step. Not yet run on a GPU.

    Tensors among the positional arguments are the graph's inputs. All else is part of the graph, learning rates too:
    other arguments (which have to be hashable) get a graph of their own, other rates replace all graphs. Frozen in a
    graph, and not looked at again, are the networks' training mode, TF32 and the optimizer's settings other than the
    rate. The first calls of each run the step as it is, since what is set up once must not be captured; a step that
    draws from torch's generators in them is never captured. The tensors returned are written over by the next call.
    """

    WARM_UP = 3  # calls; cuDNN looks for its best kernels in the first

    def __init__(self, step):
        self.step, self.rates, self.recorded, self.side = step, None, {}, None

    def __call__(self, *args, **options):
        rates = [g["lr"] for a in args if isinstance(a, torch.optim.Optimizer) for g in a.param_groups]
        if rates != self.rates:
            self.rates, self.recorded = rates, {}
        tensors = [a for a in args if torch.is_tensor(a)]
        others = (a for a in args if not torch.is_tensor(a))  # as keys they stay alive, so none is taken for another
        key = (*others, *((t.shape, t.dtype) for t in tensors), *sorted(options.items()))
        graph = self.recorded.setdefault(key, {"calls": 0, "draws": False})
        graph["calls"] += 1
        if graph["draws"] or graph["calls"] <= self.WARM_UP:
            before = generator_states()
            outputs = self._on_a_side_stream(args, options)
            graph["draws"] |= not all(map(torch.equal, before, generator_states()))
            return outputs
        if graph["calls"] == self.WARM_UP + 1:
            graph["inputs"] = [t.clone() for t in tensors]
            inputs = iter(graph["inputs"])
            args = [next(inputs) if torch.is_tensor(a) else a for a in args]
            graph["replay"], graph["outputs"] = self._record(args, options)
        for there, here in zip(graph["inputs"], tensors):
            there.copy_(here)
        graph["replay"]()
        return graph["outputs"]

    def _on_a_side_stream(self, args, options):
        """The step as it is; off the main stream, as torch asks of calls before a capture."""
        main, self.side = torch.cuda.current_stream(), self.side or torch.cuda.Stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            outputs = self.step(*args, **options)
        main.wait_stream(self.side)
        return outputs

    def _record(self, args, options):
        """Capture the step, which does not run it; returns the function that does, and the tensors it will fill."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.step(*args, **options)
        return graph.replay, outputs
