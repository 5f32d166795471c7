"""How far gradients in fp32, bf16 and, on a GPU, TF32 are from float64's.

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

import create_dataset
import maxl
from benchmarks.step_cost import Bench, heading, make_parser, parse, report
from experiments.methods.variations import endless_batches
from harness.exits import run_main


@contextlib.contextmanager
def tf32(device):
    """TF32 in all products inside."""
    maxl.allow_tf32(True, True)
    try:
        yield
    finally:
        maxl.allow_tf32(False, False)


@contextlib.contextmanager
def bf16(device):
    """bf16 autocast, which maxl.meta_gradient refuses; here its check is off."""
    with mock.patch.object(maxl, "RefuseLowPrecision", contextlib.nullcontext):
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield


def ordinary(network, generator, images, primary):
    """∇_θ1 (L_pri + L_aux), the gradient of a multi-task step."""
    with torch.no_grad():
        labels = generator(images, primary)
    return torch.autograd.grad(maxl.multi_task_loss(network, images, primary, labels)[0], list(network.parameters()))


def meta(network, generator, images, primary):
    """The meta-gradient by forward mode, without the entropy, which no precision spoils."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    return maxl.meta_gradient(network, generator, optimizer, images, primary, entropy_weight=None)[0]


def errors(network, generator, images, primary):
    """{gradient: {precision: {"relative_error", "cosine"}}}, both to the same gradient in float64, on one batch.

    network, generator: in fp32, left as they are. images: (B, 3, 32, 32) float32.
    """
    maxl.allow_tf32(False, False)
    precisions = {"fp32": contextlib.nullcontext, "TF32": tf32, "bf16": bf16}
    if images.device.type != "cuda":
        del precisions["TF32"]

    def gradient(function, dtype=torch.float32):
        """One float64 vector."""
        parts = (copy.deepcopy(module).to(dtype) for module in (network, generator))
        return torch.cat([g.flatten() for g in function(*parts, images.to(dtype), primary)]).double()

    found = {}
    for title, function in (("meta-gradient", meta), ("gradient of a multi-task step", ordinary)):
        reference, found[title] = gradient(function, torch.float64), {}
        for name, precision in precisions.items():
            with precision(images.device):
                other = gradient(function)
            found[title][name] = {
                "relative_error": ((other - reference).norm() / reference.norm()).item(),
                "cosine": torch.cosine_similarity(reference, other, dim=0).item(),
            }
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
    networks, level = (bench.network, bench.generator), bench.settings.primary_level
    batches = endless_batches(split, arguments.batch_size, torch.Generator().manual_seed(0))
    stream = ((images, labels[:, level]) for images, labels in batches)
    judged = next(stream)
    results["at"] = {"initial weights": errors(*networks, *judged)}
    for _, batch in zip(range(arguments.train_steps), stream):
        maxl.auxiliary_training_step(*networks, bench.optimizer, *batch)
        maxl.meta_training_step(*networks, bench.optimizer, bench.label_optimizer, *batch)
    if arguments.train_steps:
        results["at"][f"after {arguments.train_steps} steps of each pass"] = errors(*networks, *judged)
    report(results, markdown(results), arguments.out, "precision")


if __name__ == "__main__":
    sys.exit(run_main(main))
