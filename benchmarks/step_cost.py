"""The time and memory of a training step of each method, all measured interleaved in one process, on one batch.

    python -m benchmarks.step_cost                                         # on the GPU if there is one
    python -m benchmarks.step_cost --device cpu --threads 2 --out results/benchmarks/cpu
    python -m benchmarks.step_cost --backbone conv4 --channels-last        # one of Table 1's networks

Prints a Markdown table; with --out also writes step_cost.json and step_cost.md. The images are random
and of CIFAR-100's shape: the time of a step does not depend on their content. F is one forward pass of the multi-task
network; torch counts the floating-point operations.
"""

import argparse
import ctypes
import functools
import json
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

    def __init__(self, device, width=1.0, batch_size=100, backbone="vgg16", precision="fp32", channels_last=False):
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


def markdown(results):
    """The table as Markdown."""
    where = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in results["environment"].items())
    lines = [
        f"`{results['command']}`", "", f"{where}.", "",
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


def parse(argv):
    """The command line's arguments. Raises InputError for one out of range."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, default="vgg16", help=f"{', '.join(BACKBONES)} (default: %(default)s)")
    add("--width", type=float, default=1.0, help="multiplier of the backbone's channels (default: %(default)s)")
    add("--batch-size", type=int, default=100, help="(default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    add("--threads", type=int, metavar="N", help="of the CPU (default: torch's own choice)")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="as in the scripts (default: fp32)")
    add("--channels-last", action="store_true", help="another memory layout (default: off)")
    add("--repeats", type=int, default=5, help="rounds, after one of warm-up (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="also write the results there (default: print only)")
    arguments = parser.parse_args(argv)
    ranges = {"batch_size": (2, 10**6), "threads": (1, 1024), "repeats": (1, 10**6), "width": (1 / 64, 16)}
    for option, (least, most) in ranges.items():
        value = getattr(arguments, option)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{option.replace('_', '-')} {value} is out of range; give {least} to {most}")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    device = select_device(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    command = " ".join(["python -m benchmarks.step_cost", *(sys.argv[1:] if argv is None else argv)])
    sizes = {k: getattr(arguments, k) for k in ("width", "batch_size", "backbone", "precision", "channels_last")}
    results = {"command": command, "environment": environment(device)} | sizes | {"repeats": arguments.repeats}
    results |= step_costs(Bench(device, **sizes), arguments.repeats)
    table = markdown(results)
    print(table)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "step_cost.json").write_text(json.dumps(results, indent=2) + "\n")
        (arguments.out / "step_cost.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_main(main))
