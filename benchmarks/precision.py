"""How far gradients in fp32, TF32 and bf16, and a finite difference, are from float64; on a CPU, TF32 is emulated.

    python -m benchmarks.precision --width 0.25 --train-steps 150 --out results/benchmarks/precision

On one batch of CIFAR-100's images where --data-root has them, else of generated images; at initial weights and after
training. Prints a Markdown table; with --out also writes precision.json and precision.md.
"""

import argparse
import contextlib
import copy
import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import create_dataset
import model_vgg_maxl
import utils
from benchmarks import finite_difference
from benchmarks.step_cost import Bench
from harness.acceleration import Acceleration, allow_tf32, select_device
from harness.command_line import Parser
from harness.exits import InputError, run_main
from harness.run import environment

STEP_LENGTH = 0.01


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
    allow_tf32(True, True)
    try:
        yield
    finally:
        allow_tf32(False, False)


def flat(gradients):
    """All tensors as one vector, float64."""
    return torch.cat([g.flatten() for g in gradients]).double()


def ordinary(network, generator, images, primary):
    """∇_θ1 (L_pri + L_aux), the gradient of a multi-task step."""
    with torch.no_grad():
        labels = generator(images, primary)
    primary_logits, auxiliary_logits = network(images)
    loss = utils.focal_loss(primary_logits, primary) + utils.focal_loss(auxiliary_logits, labels)
    return torch.autograd.grad(loss, list(network.parameters()))


def exact(network, generator, images, primary):
    """The meta-gradient, forward-mode; the entropy is left out, which no precision spoils."""
    return model_vgg_maxl.meta_gradient(network, generator, images, primary, STEP_LENGTH, entropy_weight=0.0)[0]


def by_difference(network, generator, images, primary):
    return finite_difference.meta_gradient(network, generator, images, primary, STEP_LENGTH, entropy_weight=0.0)


def errors(network, generator, images, primary):
    """{gradient: {precision: its relative error and its cosine, both to float64's}}, on one batch.

    network, generator: in fp32, left as they are. images: (B, 3, 32, 32) float32.
    """
    device = images.device
    bf16 = Acceleration(device, "bf16")
    allow_tf32(False, False)

    def gradient(function, lower=lambda module: module, dtype=torch.float32):
        parts = (lower(copy.deepcopy(module).to(dtype)) for module in (network, generator))
        return flat(function(*parts, images.to(dtype), primary))

    def compare(function, others):
        reference = gradient(function, dtype=torch.float64)
        found = {"fp32": gradient(function), "bf16": gradient(function, bf16.lower)} | others
        with tf32(device):
            found["TF32" if device.type == "cuda" else "TF32, emulated"] = gradient(function)
        return {
            name: {
                "relative_error": ((other - reference).norm() / reference.norm()).item(),
                "cosine": torch.cosine_similarity(reference, other, dim=0).item(),
            }
            for name, other in sorted(found.items(), key=lambda item: item[0].lower(), reverse=True)
        }

    return {
        "meta-gradient": compare(exact, {"fp32, finite-difference": gradient(by_difference)}),
        "gradient of a multi-task step": compare(ordinary, {}),
    }


def errors_before_and_after(bench, split, level, steps):
    """`errors` at initial weights and, if there are any, after `steps` of training of both networks on `split`.

    level: the column of the split's labels that holds the primary classes.
    """
    generator = torch.Generator().manual_seed(0)

    def batches():
        while True:
            for images, labels in split.train_batches(bench.batch_size, generator):
                yield images, labels[:, level].contiguous()

    stream = batches()
    judged = next(stream)
    found = {"initial weights": errors(bench.network, bench.generator, *judged)}
    for _, batch in zip(range(steps), stream):
        model_vgg_maxl.auxiliary_training_step(bench.network, bench.generator, bench.optimizer, *batch)
        optimizers = bench.optimizer, bench.label_optimizer
        model_vgg_maxl.meta_training_step(bench.network, bench.generator, *optimizers, *batch)
    if steps:
        found[f"after {steps} steps of each pass"] = errors(bench.network, bench.generator, *judged)
    return found


def markdown(results):
    """The table as Markdown."""
    where = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in results["environment"].items())
    lines = [
        f"`{results['command']}`", "", f"{where}.", "",
        f"Width {results['width']}, one batch of {results['batch_size']} images of {results['images']}, beside the "
        "same gradient in float64. The error is a share of its length.", "",
        "| gradient | at | in | relative error | cosine |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for at, gradients in results["at"].items():
        for gradient, found in gradients.items():
            for name, error in found.items():
                lines.append(f"| {gradient} | {at} | {name} | {error['relative_error']:.2g} | {error['cosine']:.4f} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    add("--width", type=float, default=1.0, help="channel multiplier of VGG-16 (default: %(default)s)")
    add("--batch-size", type=int, default=100, help="(default: %(default)s)")
    add("--train-steps", type=int, default=0, metavar="N", help="also after N steps (default: %(default)s)")
    add("--data-root", default="dataset", metavar="DIR", help="of CIFAR-100, if it is there (default: %(default)s)")
    add("--out", metavar="DIR", help="write precision.json and precision.md there (default: print only)")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 2 or arguments.train_steps < 0 or not 1 / 64 <= arguments.width <= 16:
        raise InputError("--batch-size must be 2 or more, --train-steps 0 or more, --width 1/64 to 16")
    device = select_device(arguments.device)
    there = (Path(arguments.data_root) / create_dataset.CIFAR100.base_folder).exists()
    images = "cifar100" if there else "synthetic"
    split, _ = create_dataset.load(images, arguments.data_root, device)
    bench = Bench(device, arguments.width, arguments.batch_size)
    command = " ".join(["python -m benchmarks.precision", *(sys.argv[1:] if argv is None else argv)])
    results = {"command": command, "environment": environment(device), "width": arguments.width}
    results |= {"batch_size": arguments.batch_size, "images": images}
    results["at"] = errors_before_and_after(bench, split, 2, arguments.train_steps)
    print(markdown(results))
    if arguments.out:
        out = Path(arguments.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "precision.json").write_text(json.dumps(results, indent=2) + "\n")
        (out / "precision.md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_main(main))
