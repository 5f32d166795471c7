"""No step leaves the device or waits for it, shown without a GPU: on torch's meta device, whose tensors hold nothing.

By itself it refuses to be read, but takes part in many an operation with a CPU tensor; OnDevice refuses these too.
"""

import pytest
import torch
import torch.nn as nn
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


def on_device(*values):
    """Whether every tensor of the values is on the device, those of modules and optimizers and gradients too."""
    tensors = []
    for value in values:
        if isinstance(value, nn.Module):
            tensors += [*value.parameters(), *value.buffers(), *(p.grad for p in value.parameters())]
        elif isinstance(value, torch.optim.Optimizer):
            tensors += tree_leaves([value.param_groups, list(value.state.values())])
        else:
            tensors += tree_leaves(value)
    found = places(tensors)
    return "device" in found and "cpu" not in found


THERE, HERE = torch.empty(4, 3, device=META), torch.ones(4, 3)
LEAVING = {
    "item": lambda: THERE.sum().item(),
    "cpu": lambda: THERE.cpu(),
    "sum with a CPU tensor": lambda: THERE + HERE,
    "index on the CPU": lambda: THERE[torch.arange(3)],
    "copy of a CPU tensor": lambda: HERE.to(META),
    "new CPU tensor": lambda: torch.zeros(3),
}


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING)
def test_the_check_itself_sees_what_leaves_the_device(leave):
    with OnDevice(), pytest.raises(LeftTheDevice):
        leave()


# --- batches, steps, whole passes -----------------------------------------------------------------


def optimizers(*modules):
    return [torch.optim.SGD(module.parameters(), lr=0.01, weight_decay=5e-4) for module in modules]


@pytest.fixture(scope="module", autouse=True)
def set_up_once():
    """What is set up in the first step of a process may be the host's work."""
    maxl.load_forward_mode()


@pytest.fixture
def parts():
    """Multi-task network and label generator on the device, and their optimizers."""
    modules = [module.to(META) for module in networks(PSI, dtype=torch.float32)]
    return *modules, *optimizers(*modules)


def make_split(device, count=150):
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)
    labels = create_dataset.LABELS_OF_FINE_CLASS[torch.arange(count) % 100]
    return create_dataset.Split(pixels, labels, device)


def train_batches(split):
    """A pass's batches, of 50; only the first may draw and copy what the whole pass needs."""
    batches = split.train_batches(50, torch.Generator().manual_seed(0))
    with OnDevice(loading=True):
        first = next(batches)
    with OnDevice():
        return [first, *batches]


@pytest.fixture(scope="module")
def batches():
    return train_batches(make_split(META))


def meter():
    return Meter(NoRun(), "train")


def test_batches_are_made_on_the_device_and_only_a_pass_as_a_whole_is_drawn_on_the_host():
    split = make_split(META)
    assert split.padded.device == split.labels.device == META
    batches = train_batches(split)
    assert len(batches) == 3
    with OnDevice():
        tests = list(split.test_batches(40))
    for images, labels in batches + tests:
        assert on_device(images, labels) and images.shape[1:] == (3, 32, 32) and labels.shape[1:] == (4,)


def test_a_pass_of_single_is_read_once(batches):
    network = maxl.Network(utils.VGG16(1 / 16), 3).to(META)
    (optimizer,) = optimizers(network)
    with OnDevice(reads=1) as device:
        row = model_vgg_single.train_epoch(network, optimizer, batches, LEVEL, maxl.multi_task_loss, meter())
    assert on_device(network, optimizer)
    assert device.reads == 0 and {type(value) for value in row.values()} == {float}


def test_a_pass_with_given_auxiliary_labels_is_read_once(parts, batches):
    network, _, optimizer, _ = parts
    labels = model_vgg_human.TrueLabels(1)
    with OnDevice(reads=1) as device:
        row = model_vgg_human.train_epoch(
            network, optimizer, batches, LEVEL, labels, maxl.multi_task_loss, meter(), cosine_every=2
        )
    assert on_device(network, optimizer)
    assert device.reads == 0 and {type(value) for value in row.values()} == {float}


@pytest.mark.parametrize("method", maxl.META_GRADIENTS)
def test_maxls_passes_are_read_at_their_ends_alone(method, parts, batches):
    """The averages of each; in the first the share of auxiliary classes used; in the second forward mode's error."""
    if method == "forward-mode" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        pytest.skip("this torch (seen in 2.3) cannot differentiate along v under a dispatch mode")
    network, label_generator, optimizer, _ = parts
    loss = maxl.multi_task_loss
    with OnDevice(reads=2) as device:
        model_vgg_maxl.train_epoch(
            network, label_generator, optimizer, batches, LEVEL, loss, meter(), cosine_every=2
        )  # fmt: skip
    assert device.reads == 0
    with OnDevice(reads=2 if method == "forward-mode" else 1) as device:
        model_vgg_maxl.meta_epoch(*parts, batches, LEVEL, loss, meter(), method=method)
    assert on_device(*parts) and device.reads == 0


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_a_test_is_read_once(statistics, parts):
    split = make_split(META)
    with OnDevice(reads=1) as device:
        row = utils.evaluate(parts[0], split, [LEVEL, 1], statistics=statistics)
    assert device.reads == 0 and row["test_auxiliary_loss"] == 0.0
