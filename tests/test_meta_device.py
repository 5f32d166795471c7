"""No step leaves the device or waits for it, shown without a GPU: on torch's meta device, whose tensors hold nothing.

By itself it refuses to be read, but takes part in many an operation with a CPU tensor; OnDevice refuses these too.
"""

import pytest
import torch
from reference import networks
from test_meta_gradient import NoRun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import create_dataset
import maxl
import model_vgg_human
import model_vgg_maxl
import model_vgg_single
import utils
from harness.run import Meter

META = torch.device("meta")
LEVEL, PSI = 0, [2, 3, 4]  # 3 primary and 9 auxiliary classes
aten = torch.ops.aten


class LeftTheDevice(Exception):
    """Something that a GPU refuses, or for which it and the host wait for each other."""


class OnDevice(TorchDispatchMode):
    """Raises LeftTheDevice where what runs in it reads from the device, copies to it, or works on the CPU.

    reads: so many reads are allowed; they find zeros. loading: work on the CPU and copies to the device are allowed,
    tensors of both in one operation never. A 0-d tensor on the CPU is a number: a GPU's kernels take it as an
    argument, and Adam counts its steps in one.
    """

    def __init__(self, reads=0, loading=False):
        super().__init__()
        self.reads, self.loading = reads, loading

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = places((args, kwargs))
        if "device" in inputs and function is aten._local_scalar_dense.default:
            return self.read((), args[0].dtype).item()
        if "device" in inputs and function is aten._to_copy.default and kwargs.get("device", META) != META:
            return self.read(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        copies = function in (aten._to_copy.default, aten.copy_.default)
        if {"device", "cpu"} <= inputs and not copies:
            raise LeftTheDevice(f"{function} of tensors on the device and on the CPU")
        results = function(*args, **kwargs)
        outputs = places(results)
        if not self.loading:
            if "cpu" in inputs | outputs:
                raise LeftTheDevice(f"{function} on the CPU")
            if "device" in outputs and (function is aten.lift_fresh.default or copies and "number" in inputs):
                raise LeftTheDevice("numbers of the host copied to the device")
        return results

    def read(self, shape, dtype):
        self.reads -= 1
        if self.reads < 0:
            raise LeftTheDevice("the host waits for the device")
        return torch.zeros(shape, dtype=dtype)


def places(values):
    """Where the tensors among the values are: "device", "cpu", or "number" for 0-d ones on the CPU."""
    tensors = [value for value in tree_leaves(values) if torch.is_tensor(value)]
    return {"device" if t.device == META else "cpu" if t.dim() else "number" for t in tensors}


THERE, HERE = torch.empty(4, 3, device=META), torch.ones(4, 3)
LEAVING = {
    "item": lambda: THERE.sum().item(),
    "sum with a CPU tensor": lambda: THERE + HERE,
    "copy of a CPU tensor": lambda: HERE.to(META),
}


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING)
def test_the_check_itself_sees_what_leaves_the_device(leave):
    with OnDevice(), pytest.raises(LeftTheDevice):
        leave()


@pytest.mark.parametrize("method", maxl.META_GRADIENTS)
def test_the_passes_over_the_batches_and_the_test_are_read_at_their_ends_alone(method):
    """The averages; in MAXL's first pass the share of classes used, too, in its second the error of forward mode."""
    if method == "forward-mode" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        pytest.skip("torch 2.3 cannot under a dispatch mode")
    maxl.load_forward_mode()  # what is set up in the first step of a process may be the host's work
    network, label_generator = (module.to(META) for module in networks(PSI, dtype=torch.float32))
    optimizer, label_optimizer = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (network, label_generator))
    pixels = torch.randint(256, (150, 32, 32, 3), dtype=torch.uint8)
    split = create_dataset.Split(pixels, create_dataset.LABELS_OF_FINE_CLASS[torch.arange(150) % 100], META)
    batches, loss = split.train_batches(50, torch.Generator().manual_seed(0)), maxl.multi_task_loss
    with OnDevice(loading=True):
        first = next(batches)  # draws and copies what the whole pass needs
    with OnDevice():
        batches = [first, *batches]
    pair = network, label_generator, optimizer
    passes = {
        "single": (1, lambda: model_vgg_single.train_epoch(network, optimizer, batches, LEVEL, loss, meter())),
        "human": (1, lambda: model_vgg_human.train_epoch(
            network, optimizer, batches, LEVEL, model_vgg_human.TrueLabels(1), loss, meter(), cosine_every=2
        )),
        "first": (2, lambda: model_vgg_maxl.train_epoch(*pair, batches, LEVEL, loss, meter(), cosine_every=2)),
        "second": (2 if method == "forward-mode" else 1, lambda: model_vgg_maxl.meta_epoch(
            *pair, label_optimizer, batches, LEVEL, loss, meter(), method=method
        )),
        "test": (1, lambda: utils.evaluate(network, split, [LEVEL, 1])),
    }  # fmt: skip
    for name, (reads, one_pass) in passes.items():
        with OnDevice(reads=reads) as device:
            one_pass()
        assert device.reads == 0, name


def meter():
    return Meter(NoRun(), "train")
