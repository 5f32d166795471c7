"""How far gradients in fp32, TF32 and bf16, and a finite difference, are from float64's; a CPU emulates TF32.

    python -m benchmarks.precision --width 0.25 --train-steps 150 --out results/benchmarks/precision

On one batch of CIFAR-100's images if --data-root has them, else of generated images; at initial weights and after
training. Prints a Markdown table; with --out also writes precision.json and precision.md.
"""

import contextlib
import copy
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import create_dataset
import maxl
from benchmarks.step_cost import Bench, heading, make_parser, parse, report
from harness.acceleration import allow_tf32
from harness.exits import run_main

class RoundedToTF32(TorchDispatchMode):
    """Rounds the inputs of every convolution and matrix product to TF32's 10 bits of mantissa, as a GPU does.

    In forwards, in backwards and along v; sums, losses and BatchNorm are left in fp32.
    """

    FACTORS = {  # where the factors stand among the arguments of a product
        torch.ops.aten.convolution.default: (0, 1),
        torch.ops.aten.convolution_backward.default: (0, 1, 2),
        torch.ops.aten.mm.default: (0, 1),
        torch.ops.aten.addmm.default: (1, 2),
    }

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        factors = self.FACTORS.get(operation, ())
        args = [round_to_tf32(a) if i in factors else a for i, a in enumerate(args)]
        return operation(*args, **(kwargs or {}))


def round_to_tf32(x):
    """float32 -> float32 with 10 bits of mantissa, to nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32).view_as(x)


@contextlib.contextmanager
def tf32(device):
    """TF32 in all products inside: the GPU's own, or emulated."""
    if device.type != "cuda":
        with RoundedToTF32():
            yield
        return
    allow_tf32(True)
    try:
        yield
    finally:
        allow_tf32(False)


@contextlib.contextmanager
def bf16(device):
    """bf16 autocast, which maxl.meta_gradient refuses; here its check is off."""
    with mock.patch.object(maxl, "RefuseLowPrecision", contextlib.nullcontext):
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield


def by_finite_difference(total_loss, network, buffers, labels, v, distance=0.01):
    """As maxl.by_forward_mode, with D_v L(θ1, y) replaced by (L(θ1 + εv, y) - L(θ1 - εv, y)) / 2ε, as in DARTS.

    distance: ε‖v‖, of the two points from θ1.
    """
    theta1 = dict(network.named_parameters())
    epsilon = distance / torch.stack([direction.norm() for direction in v.values()]).norm()

    def differentiate(network):
        total = total_loss(network)
        return torch.autograd.grad(total, labels)[0], total.detach()

    def at(step):
        weights = {name: theta1[name].detach() + step * direction for name, direction in v.items()}
        return maxl.with_weights(network, weights, buffers, differentiate)

    return tuple((ahead - behind) / (2 * epsilon) for ahead, behind in zip(at(epsilon), at(-epsilon)))


def ordinary(network, generator, images, primary):
    """∇_θ1 (L_pri + L_aux), the gradient of a multi-task step."""
    with torch.no_grad():
        labels = generator(images, primary)
    return torch.autograd.grad(maxl.multi_task_loss(network, images, primary, labels)[0], list(network.parameters()))


def exact(network, generator, images, primary):
    """The meta-gradient by forward mode, without the entropy, which no precision spoils."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    return maxl.meta_gradient(network, generator, optimizer, images, primary, entropy_weight=None)[0]


def by_difference(*parts):
    """The meta-gradient by the finite difference."""
    with mock.patch.object(maxl, "by_forward_mode", by_finite_difference):
        return exact(*parts)


def errors(network, generator, images, primary):
    """{gradient: {precision: {"relative_error", "cosine"}}}, both to the same gradient in float64, on one batch.

    network, generator: in fp32, left as they are. images: (B, 3, 32, 32) float32.
    """
    allow_tf32(False)
    precisions = {"fp32": contextlib.nullcontext, "TF32": tf32, "bf16": bf16}
    if images.device.type != "cuda":
        precisions["TF32, emulated"] = precisions.pop("TF32")

    def gradient(function, dtype=torch.float32):
        """One float64 vector."""
        parts = (copy.deepcopy(module).to(dtype) for module in (network, generator))
        return torch.cat([g.flatten() for g in function(*parts, images.to(dtype), primary)]).double()

    def compare(function):
        found = {}
        for name, precision in precisions.items():
            with precision(images.device):
                found[name] = gradient(function)
        if function is exact:
            found["fp32, finite difference"] = gradient(by_difference)
        reference = gradient(function, torch.float64)
        return {
            name: {
                "relative_error": ((other - reference).norm() / reference.norm()).item(),
                "cosine": torch.cosine_similarity(reference, other, dim=0).item(),
            }
            for name, other in found.items()
        }

    return {"meta-gradient": compare(exact), "gradient of a multi-task step": compare(ordinary)}


def errors_before_and_after(bench, split, level, steps):
    """`errors` at initial weights and, if there are any, after `steps` of training of both networks on `split`.

    level: the column of the split's labels that holds the primary classes.
    """
    generator = torch.Generator().manual_seed(0)

    def batches():
        while True:
            for images, labels in split.train_batches(bench.batch_size, generator):
                yield images, labels[:, level]

    stream = batches()
    judged = next(stream)
    found = {"initial weights": errors(bench.network, bench.generator, *judged)}
    for _, batch in zip(range(steps), stream):
        maxl.auxiliary_training_step(bench.network, bench.generator, bench.optimizer, *batch)
        maxl.meta_training_step(bench.network, bench.generator, bench.optimizer, bench.label_optimizer, *batch)
    if steps:
        found[f"after {steps} steps of each pass"] = errors(bench.network, bench.generator, *judged)
    return found


def markdown(results):
    """The table as Markdown."""
    lines = heading(results) + [
        f"Width {results['width']}, one batch of {results['batch_size']} images of {results['images']}, beside the "
        "same gradient in float64. The error is relative to its length.", "",
        "| gradient | at | in | relative error | cosine |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for at, gradients in results["at"].items():
        for gradient, found in gradients.items():
            for name, error in found.items():
                lines.append(f"| {gradient} | {at} | {name} | {error['relative_error']:.2g} | {error['cosine']:.4f} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--train-steps", type=int, default=0, metavar="N", help="also after N steps (default: %(default)s)")
    add("--data-root", default="dataset", metavar="DIR", help="of CIFAR-100, if it is there (default: %(default)s)")
    parser.set_defaults(train_images=None, seed=0, channels_last=False)
    arguments, device, results = parse(parser, argv, "precision")
    there = (Path(arguments.data_root) / create_dataset.CIFAR100.base_folder).exists()
    arguments.dataset = "cifar100" if there else "synthetic"
    split, _ = create_dataset.load(arguments, device)
    bench = Bench(device, arguments.width, arguments.batch_size)
    results |= {"width": arguments.width, "batch_size": arguments.batch_size, "images": arguments.dataset}
    results["at"] = errors_before_and_after(bench, split, bench.settings.primary_level, arguments.train_steps)
    report(results, markdown(results), arguments.out, "precision")


if __name__ == "__main__":
    sys.exit(run_main(main))
