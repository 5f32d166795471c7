"""The time and memory of a training step of each method, all measured interleaved in one process, on one batch.

    python -m benchmarks.step_cost                                         # on the GPU if there is one
    python -m benchmarks.step_cost --device cpu --threads 2 --out results/benchmarks/cpu
    python -m benchmarks.step_cost --backbone conv4 --channels-last        # one of Table 1's networks

Prints a Markdown table; with --out also writes step_cost.json, step_cost.md and step_cost.png. The images are random
and of CIFAR-100's shape: the time of a step does not depend on their content. F is one forward pass of the multi-task
network; torch counts the floating-point operations.
"""

import argparse
import ctypes
import functools
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import create_dataset
import maxl
import model_vgg_maxl
import utils
from experiments.methods.backbones import BACKBONES
from harness.acceleration import autocast, place, select_device
from harness.command_line import Parser
from harness.exits import InputError, run_main
from harness.run import environment

TRAIN_IMAGES, TEST_IMAGES = create_dataset.SIZES["cifar100"]


class Bench:
    """The networks, one batch of random images, and `rows`: what is measured, {name: function without arguments}."""

    def __init__(
        self, device, width=1.0, batch_size=100, backbone="vgg16", precision="fp32", channels_last=False
    ):  # fmt: skip
        self.device, self.batch_size = device, batch_size
        self.settings = argparse.Namespace(
            **model_vgg_maxl.SETTINGS, seed=0, precision=precision, channels_last=channels_last
        )
        psi = self.settings.psi
        make_trunk = functools.partial(BACKBONES[backbone], width)
        networks = model_vgg_maxl.make_networks(self.settings, make_trunk)
        networks["single"] = utils.initialise(maxl.Network(make_trunk(), len(psi)), nn.init.xavier_uniform_)
        self.network, self.generator, self.single = place(networks, device, self.settings).values()
        optimizers = model_vgg_maxl.make_optimizers(networks, self.settings)
        self.optimizer, self.label_optimizer = optimizers["optimizer"], optimizers["label_optimizer"]
        single_optimizer = torch.optim.SGD(self.single.parameters(), lr=self.settings.learning_rate)

        pixels = torch.randint(256, (batch_size, 32, 32, 3), dtype=torch.uint8)
        self.split = create_dataset.Split(pixels, torch.randint(len(psi), (batch_size, 1)), device, channels_last)
        self.images, labels = self.data()
        self.primary, auxiliary = labels[:, 0], torch.randint(sum(psi), (batch_size,)).to(device)

        batch = self.images, self.primary
        first = self.network, self.generator, self.optimizer, *batch
        second = self.network, self.generator, self.optimizer, self.label_optimizer, *batch
        cosine = {"compare": utils.cosine_similarities}
        self.rows = {
            "data and augmentation": self.data,
            "test": self.test,
            "Single step": lambda: maxl.multi_task_step(self.single, single_optimizer, *batch),
            "Human step": lambda: maxl.multi_task_step(self.network, self.optimizer, *batch, auxiliary),
            "MAXL first pass": lambda: maxl.auxiliary_training_step(*first),
            "MAXL first pass with cosine similarity": lambda: maxl.auxiliary_training_step(*first, **cosine),
            "MAXL second pass, forward-mode": lambda: maxl.meta_training_step(*second, method="forward-mode"),
            "MAXL second pass, double-backward": lambda: maxl.meta_training_step(*second, method="double-backward"),
        }

    def data(self):
        return next(self.split.train_batches(self.batch_size, torch.Generator().manual_seed(0)))

    def test(self):
        utils.evaluate(self.single, self.split, [0])
        self.single.train()

    def run(self, row):
        with autocast(self.device, self.settings):
            self.rows[row]()

    def seconds(self, row):
        """Wall time of one call, with the device's work done before and after."""
        synchronise = torch.cuda.synchronize if self.device.type == "cuda" else (lambda: None)
        synchronise()
        start = time.perf_counter()
        self.run(row)
        synchronise()
        return time.perf_counter() - start


def measure(bench, repeats):
    """Interleaved seconds of each row, {row: [seconds] * repeats}, after one round of warm-up."""
    rounds = [{row: bench.seconds(row) for row in bench.rows} for _ in range(1 + repeats)]
    return {row: [seconds[row] for seconds in rounds[1:]] for row in bench.rows}


def operations(function, *arguments):
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def peak_memory(bench, row):
    """Bytes that a call takes at its peak above what is held between calls; None where that cannot be measured."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        bench.run(row)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**18)  # M_MMAP_THRESHOLD: a freed block goes back to the system, so the peak is memory in use
    bench.run(row)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # start VmHWM, the peak of VmRSS, the resident memory, anew
    before = Path("/proc/self/status").read_text()
    bench.run(row)
    after = Path("/proc/self/status").read_text()
    return 1024 * (int(after.split("VmHWM:")[1].split()[0]) - int(before.split("VmRSS:")[1].split()[0]))


def step_costs(bench, repeats):
    """{"forward_flops_per_image", "steps": {row: its costs}, "epoch_seconds": {method: seconds}}."""
    times = measure(bench, repeats)
    median = {row: statistics.median(seconds) for row, seconds in times.items()}
    forward = operations(bench.network, bench.images)
    steps = {
        row: {
            "seconds": median[row],
            "fastest": min(times[row]),
            "slowest": max(times[row]),
            "times_single": median[row] / median["Single step"],
            "forward_passes": operations(bench.run, row) / forward,
            "memory_bytes": peak_memory(bench, row),  # after all timings, as it makes the allocator slower
        }
        for row in bench.rows
    }

    def epoch(*rows):
        passes = sum(median[row] + median["data and augmentation"] for row in rows)
        return TRAIN_IMAGES // bench.batch_size * passes + TEST_IMAGES / bench.batch_size * median["test"]

    epochs = {"Single": epoch("Single step"), "Human": epoch("Human step")}
    for method in maxl.META_GRADIENTS:
        epochs[f"MAXL, {method}"] = epoch("MAXL first pass", f"MAXL second pass, {method}")
    return {"forward_flops_per_image": forward / bench.batch_size, "steps": steps, "epoch_seconds": epochs}


def heading(results):
    """The first lines of a table: the command, and where and when it ran."""
    where = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in results["environment"].items())
    return [f"`{results['command']}`", "", f"{where}.", ""]


def markdown(results):
    """The table as Markdown."""
    lines = heading(results) + [
        f"{results['backbone']}, width {results['width']}, batches of {results['batch_size']}, {results['precision']}"
        f"{', channels last' * results['channels_last']}; median of {results['repeats']} interleaved rounds after one "
        f"of warm-up. One forward pass F is {results['forward_flops_per_image'] / 1e9:.3f} GFLOP an image. Memory is "
        "the peak of a step above what is held between steps.", "",
        "| step | seconds (fastest to slowest) | × Single | arithmetic, F | memory, MiB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row, cost in results["steps"].items():
        memory = "" if cost["memory_bytes"] is None else f"{cost['memory_bytes'] / 2**20:.0f}"
        lines.append(
            f"| {row} | {cost['seconds']:.4f} ({cost['fastest']:.4f} to {cost['slowest']:.4f}) "
            f"| {cost['times_single']:.2f} | {cost['forward_passes']:.2f} | {memory} |"
        )
    lines += ["", "| epoch of CIFAR-100 with its test, from the medians | seconds | × Single |", "|---|---|---|"]
    epochs = results["epoch_seconds"]
    lines += [f"| {name} | {seconds:.1f} | {seconds / epochs['Single']:.2f} |" for name, seconds in epochs.items()]
    return "\n".join(lines) + "\n"


def chart(results, path):
    """Bars: time of each step in Single steps, beside what its arithmetic alone would take; and its memory."""
    from matplotlib.figure import Figure

    steps = results["steps"]
    places, single = range(len(steps)), steps["Single step"]["forward_passes"]
    figure = Figure(figsize=(11, 0.55 * len(steps) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(places, [cost["times_single"] for cost in steps.values()], color="tab:blue")
    arithmetic = [cost["forward_passes"] / single for cost in steps.values()]
    left.plot(arithmetic, places, "k|", markersize=16, markeredgewidth=2, label="its arithmetic alone")
    left.set(yticks=places, yticklabels=steps, xlabel="time, in Single steps")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    left.invert_yaxis()
    right.barh(places, [(cost["memory_bytes"] or math.nan) / 2**20 for cost in steps.values()], color="tab:orange")
    right.set(xlabel="peak memory above what is held between steps (MiB)")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=120)


def make_parser(doc):
    """A parser with the options that both benchmarks have."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    add("--threads", type=int, metavar="N", help="of the CPU (default: torch's own choice)")
    add("--width", type=float, default=1.0, metavar="F", help="multiplier of the channels (default: %(default)s)")
    add("--batch-size", type=int, default=100, metavar="N", help="(default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="also write the results there (default: print only)")
    return parser


def parse(parser, argv, name):
    """The command line: (arguments, device, the first entries of the results). name: of the benchmark."""
    arguments = parser.parse_args(argv)
    least = {"batch_size": 2, "threads": 1, "repeats": 1, "train_steps": 0}
    for option, value in vars(arguments).items():
        if option in least and value is not None and value < least[option]:
            raise InputError(f"--{option.replace('_', '-')} {value} is out of range; give {least[option]} or more")
    if not 1 / 64 <= arguments.width <= 16:
        raise InputError(f"--width {arguments.width} is out of range; give 1/64 to 16")
    device = select_device(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    command = " ".join([f"python -m benchmarks.{name}", *(sys.argv[1:] if argv is None else argv)])
    return arguments, device, {"command": command, "environment": environment(device)}


def report(results, table, out, name):
    """Print the table; write it and the results to the folder `out` unless that is None."""
    print(table)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / f"{name}.md").write_text(table, encoding="utf-8")


def main(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, default="vgg16", help=f"{', '.join(BACKBONES)} (default: %(default)s)")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="as in the scripts (default: fp32)")
    add("--channels-last", action="store_true", help="another memory layout (default: off)")
    add("--repeats", type=int, default=5, metavar="N", help="rounds, after one of warm-up (default: %(default)s)")
    arguments, device, results = parse(parser, argv, "step_cost")
    sizes = {k: getattr(arguments, k) for k in ("width", "batch_size", "backbone", "precision", "channels_last")}
    results |= sizes | {"repeats": arguments.repeats} | step_costs(Bench(device, **sizes), arguments.repeats)
    report(results, markdown(results), arguments.out, "step_cost")
    if arguments.out:
        chart(results, arguments.out / "step_cost.png")


if __name__ == "__main__":
    sys.exit(run_main(main))
