"""No step leaves the device or waits for it, shown without a GPU: on torch's meta device, whose tensors hold nothing.

By itself it refuses to be read, but takes part in many an operation with a CPU tensor; OnDevice refuses these too.
"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_meta_gradient import NoRun, batch, networks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import create_dataset
import model_vgg_human
import model_vgg_maxl
import model_vgg_single
import utils
from experiments.methods import kmeans as model_vgg_kmeans
from experiments.methods import random_labels as model_vgg_random
from harness.acceleration import Acceleration
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


def optimizers(*modules):
    return [torch.optim.SGD(module.parameters(), lr=0.01, weight_decay=5e-4) for module in modules]


@pytest.fixture(scope="module", autouse=True)
def set_up_once():
    """What is set up in the first step of a process may be the host's work."""
    model_vgg_maxl.meta_gradient(*networks(PSI), *batch(len(PSI)), 0.01)


@pytest.fixture
def parts():
    """Multi-task network and label generator, placed as the scripts place them, and their optimizers."""
    place = Acceleration(META).place
    modules = [place(module) for module in networks(PSI, dtype=torch.float32)]
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


# --- what is refused ------------------------------------------------------------------------------

THERE, HERE = torch.empty(4, 3, device=META), torch.ones(4, 3)
INDEX, MASK = torch.arange(3), torch.ones(4, dtype=torch.bool)
LEAVING = {
    "item": lambda: THERE.sum().item(),
    "float": lambda: float(THERE.sum()),
    "if": lambda: 1 if (THERE > 0).all() else 0,
    "tolist": lambda: THERE.tolist(),
    "cpu": lambda: THERE.cpu(),
    "to": lambda: THERE.to("cpu", torch.float64),
    "sum with a CPU tensor": lambda: THERE + HERE,
    "product with a CPU tensor": lambda: THERE.T @ HERE,
    "weights on the CPU": lambda: F.linear(THERE, HERE),
    "index on the CPU": lambda: THERE[INDEX],
    "mask on the CPU": lambda: THERE[MASK],
    "gather by an index on the CPU": lambda: THERE.gather(1, INDEX[:, None]),
    "table on the CPU": lambda: HERE[torch.empty(2, dtype=torch.int64, device=META)],
    "assignment of a CPU tensor": lambda: THERE.copy_(HERE),
    "copy of a CPU tensor": lambda: HERE.to(META),
    "copy of a number": lambda: torch.tensor(1.0).to(META),
    "list of numbers": lambda: torch.tensor([1.0, 2.0], device=META),
    "new CPU tensor": lambda: torch.zeros(3),
    "work on the CPU": lambda: HERE.sum(),
}


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING)
def test_reads_copies_and_tensors_left_on_the_cpu_are_refused(leave):
    if leave is LEAVING["list of numbers"] and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("this torch (seen in 2.3) copies the numbers before a dispatch mode can see it")
    with OnDevice(), pytest.raises(LeftTheDevice):
        leave()


@pytest.mark.parametrize("wait", [lambda: THERE.nonzero(), lambda: torch.equal(THERE, THERE), lambda: THERE.unique()])
def test_the_meta_device_itself_refuses_what_has_to_be_looked_at(wait):
    with OnDevice(), pytest.raises(NotImplementedError):
        wait()


def test_work_on_the_device_numbers_and_so_many_reads_are_let_pass():
    with OnDevice(reads=2) as device:
        x = torch.where(THERE[THERE.argmax(dim=0)] > 0.5, torch.zeros(3, device=META), torch.tensor(1.0))
        x.index_fill_(0, torch.zeros(2, dtype=torch.int64, device=META), True)
        assert x.device == META and x.sum().item() == 0.0 and (x > 0).tolist() == [[False] * 3] * 3
        assert device.reads == 0
        with pytest.raises(LeftTheDevice):
            x.sum().item()
    with OnDevice(loading=True):
        assert torch.randperm(3).to(META).device == META
        with pytest.raises(LeftTheDevice):
            THERE[torch.randperm(3)]


# --- batches --------------------------------------------------------------------------------------


def test_batches_are_made_on_the_device_and_only_a_pass_as_a_whole_is_drawn_on_the_host():
    split = make_split(META)
    assert split.padded.device == split.labels.device == META
    batches = train_batches(split)
    assert len(batches) == 3
    with OnDevice():
        tests = list(split.test_batches(40))
    for images, labels in batches + tests:
        assert on_device(images, labels) and images.shape[1:] == (3, 32, 32) and labels.shape[1:] == (4,)


# --- steps ----------------------------------------------------------------------------------------


def test_the_step_of_single_stays_on_the_device(batches):
    network = Acceleration(META).place(utils.Network(utils.VGG16(1 / 16), 3))
    (optimizer,) = optimizers(network)
    with OnDevice():
        for images, labels in batches[:2]:
            metrics = model_vgg_single.single_step(network, optimizer, images, labels[:, LEVEL])
    assert on_device(network, optimizer, metrics)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_step_of_human_stays_on_the_device(cosine, parts, batches):
    network, _, optimizer, _ = parts
    auxiliary_labels = model_vgg_human.TrueLabels(1)
    with OnDevice():
        for images, labels in batches[:2]:
            primary, auxiliary = labels[:, LEVEL], auxiliary_labels(images, labels)
            metrics = utils.multi_task_step(network, optimizer, images, primary, auxiliary, cosine=cosine)
    assert on_device(network, optimizer, metrics) and ("cosine_similarity" in metrics) == cosine


@pytest.mark.parametrize("cosine", [False, True])
def test_maxls_first_pass_stays_on_the_device(cosine, parts, batches):
    network, label_generator, optimizer, _ = parts
    with OnDevice():
        for images, labels in batches[:2]:
            primary = labels[:, LEVEL]
            metrics, largest = model_vgg_maxl.auxiliary_training_step(
                network, label_generator, optimizer, images, primary, cosine=cosine
            )
    assert on_device(network, label_generator, optimizer, metrics, largest)


@pytest.mark.parametrize("method", model_vgg_maxl.META_GRADIENTS)
def test_maxls_second_pass_stays_on_the_device(method, parts, batches):
    with OnDevice():
        for images, labels in batches[:2]:
            metrics = model_vgg_maxl.meta_training_step(*parts, images, labels[:, LEVEL], method=method)
    assert on_device(*parts, metrics)


def random_labels(split):
    """As the script makes them, but for the drawing, which is the host's and is made before the split is moved."""
    on_cpu = make_split("cpu", len(split))
    labels = model_vgg_random.RandomLabels(on_cpu, LEVEL, PSI, seed=0)
    split.labels = on_cpu.labels.to(META)
    return labels


def cluster_labels(split):
    """As the script makes them, on the device; what the centroids start from is read from it, as zeros."""
    settings = model_vgg_kmeans.parse(["--primary-level", str(LEVEL), "--psi", ",".join(map(str, PSI))])
    labels = model_vgg_kmeans.ClusterLabels(split, settings)
    with OnDevice(reads=3, loading=True):  # codes, their classes, and which clusters are whose
        labels.start()
    return labels


@pytest.mark.parametrize("make", [random_labels, cluster_labels])
def test_labels_of_the_baselines_stay_on_the_device(make):
    split = make_split(META)
    auxiliary_labels = make(split)
    batches = train_batches(split)
    with OnDevice():
        labels = [auxiliary_labels(*batch) for batch in batches]
    assert on_device(labels, *auxiliary_labels.parts.values())
    assert all(label.shape == (50,) and label.dtype == torch.int64 for label in labels)


# --- whole passes ---------------------------------------------------------------------------------


def meter():
    return Meter(NoRun(), "train")


def test_a_pass_of_single_is_read_once(batches):
    network = Acceleration(META).place(utils.Network(utils.VGG16(1 / 16), 3))
    (optimizer,) = optimizers(network)
    with OnDevice(reads=1) as device:
        row = model_vgg_single.train_epoch(network, optimizer, batches, LEVEL, 2.0, meter())
    assert device.reads == 0 and {type(value) for value in row.values()} == {float}


def true_labels(split):
    return model_vgg_human.TrueLabels(1)


@pytest.mark.parametrize("make", [random_labels, cluster_labels, true_labels])
def test_a_pass_with_given_auxiliary_labels_is_read_once(make, parts):
    network, _, optimizer, _ = parts
    split = make_split(META)
    auxiliary_labels = make(split)
    given = train_batches(split), LEVEL, auxiliary_labels, 2.0, meter(), utils.multi_task_step
    with OnDevice(reads=1) as device:
        row = model_vgg_human.train_epoch(network, optimizer, *given, cosine_every=2)
    assert device.reads == 0 and {type(value) for value in row.values()} == {float}


def test_maxls_first_pass_is_read_twice_and_its_second_once(parts, batches):
    """At their ends: the averages of each, and in the first the share of auxiliary classes that were used."""
    network, label_generator, optimizer, _ = parts
    with OnDevice(reads=2) as device:
        model_vgg_maxl.train_epoch(network, label_generator, optimizer, batches, LEVEL, meter(), cosine_every=2)
    assert device.reads == 0
    with OnDevice(reads=1) as device:
        model_vgg_maxl.meta_epoch(*parts, batches, LEVEL, meter())
    assert device.reads == 0


def test_a_test_is_read_once(parts):
    split = make_split(META)
    with OnDevice(reads=1) as device:
        row = utils.evaluate(parts[0], split, [LEVEL, 1])
    assert device.reads == 0 and row["test_auxiliary_loss"] == 0.0
