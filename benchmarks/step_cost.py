"""What a step of each method costs in time, memory and arithmetic, all rows interleaved in one run on one batch.

    python -m benchmarks.step_cost                                        # on the GPU where there is one
    python -m benchmarks.step_cost --device cpu --out results/benchmarks/cpu
    python -m benchmarks.step_cost --scaling --out results/benchmarks/cpu # and how it grows, some minutes more
    python -m benchmarks.step_cost --backbone conv4 --psi '3*10'          # one of Table 1's networks

Prints a Markdown table; with --out also writes step_cost.json, step_cost.md and step_cost.png. The images are random
and of CIFAR-100's shape: the time of a step does not depend on what is in them. F is one forward pass of the
multi-task network; the arithmetic is counted by torch, not estimated.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import create_dataset
import model_vgg_maxl
import model_vgg_single
import utils
from benchmarks import finite_difference
from benchmarks.table import chart, markdown
from experiments.methods.backbones import BACKBONES
from harness.acceleration import PRECISIONS, Acceleration, CapturedStep, add_acceleration, in_fp32, select_device
from harness.command_line import Parser, add_psi
from harness.exits import InputError, run_main
from harness.run import environment

TRAIN_IMAGES, TEST_IMAGES = create_dataset.SIZES["cifar100"]
BATCHES = 10  # in a call of the rows "data and augmentation" and "test"


class Bench:
    """The networks, one batch, and every row of the table as a function of no arguments."""

    def __init__(
        self, device, width=1.0, batch_size=100, psi=(5,) * 20, seed=0, backbone="vgg16", **acceleration
    ):  # fmt: skip
        torch.manual_seed(seed)
        self.device, self.batch_size, psi = device, batch_size, list(psi)
        fast = Acceleration(device, **acceleration)
        self.warm_up = CapturedStep.WARM_UP + 1 if fast.cuda_graphs else 1  # rounds

        def network(*classes):
            trunk = BACKBONES[backbone](width)
            return fast.place(utils.initialise(utils.Network(trunk, *classes), nn.init.xavier_uniform_))

        self.single, self.network = network(len(psi)), network(len(psi), sum(psi))
        self.generator = model_vgg_maxl.LabelGenerator(BACKBONES[backbone](width), psi)
        fast.place(utils.initialise(self.generator, nn.init.xavier_normal_))
        self.low_single, self.low_network = fast.lower(self.single), fast.lower(self.network)
        self.low_generator = fast.lower(self.generator)
        self.single_optimizer = torch.optim.SGD(self.single.parameters(), lr=0.01)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)
        self.label_optimizer = torch.optim.SGD(self.generator.parameters(), lr=0.001, weight_decay=5e-4)

        pixels = torch.randint(256, (BATCHES * batch_size, 32, 32, 3), dtype=torch.uint8)
        labels = torch.randint(len(psi), (BATCHES * batch_size, 4))
        self.split = create_dataset.Split(pixels, labels, device)
        self.images, labels = next(self.split.train_batches(batch_size, torch.Generator().manual_seed(seed)))
        self.primary = labels[:, 0].contiguous()
        self.auxiliary = torch.randint(sum(psi), (batch_size,)).to(device)
        steps = {"single": model_vgg_single.single_step, "human": utils.multi_task_step}
        steps |= {"first": model_vgg_maxl.auxiliary_training_step, "second": model_vgg_maxl.meta_training_step}
        self.finite_difference = in_fp32(device)(finite_difference.meta_gradient)
        self.steps = {name: fast.capture(step) for name, step in steps.items()}
        side = 8192 if device.type == "cuda" else 2048
        self.matrix = torch.randn(side, side, device=device)
        if fast.precision == "bf16":
            self.matrix = self.matrix.bfloat16()

    @property
    def rows(self):
        """What is measured, {name: function}; made anew, as a Bench that held them would be held by them."""
        rows = {
            "matrix product": lambda: self.matrix @ self.matrix,
            "data and augmentation": self.data,
            "test": self.test,
            "Single step": self.single_step,
            "Human step": self.human_step,
            "MAXL first pass": self.first_pass,
            "MAXL first pass with cosine similarity": lambda: self.first_pass(cosine=True),
        }
        for method in model_vgg_maxl.META_GRADIENTS:
            rows[f"MAXL second pass, {method}"] = lambda method=method: self.second_pass(method)
        rows["MAXL second pass, finite-difference"] = self.finite_difference_pass
        return rows

    def data(self):
        for _ in self.split.train_batches(self.batch_size, torch.Generator().manual_seed(0)):
            pass

    def test(self):
        utils.evaluate(self.low_single, self.split, [0])
        self.single.train()

    def single_step(self):
        self.steps["single"](self.low_single, self.single_optimizer, self.images, self.primary)

    def human_step(self):
        self.steps["human"](self.low_network, self.optimizer, self.images, self.primary, self.auxiliary)

    def first_pass(self, cosine=False):
        parts = self.low_network, self.low_generator, self.optimizer, self.images, self.primary
        self.steps["first"](*parts, cosine=cosine)

    def second_pass(self, method):
        parts = self.network, self.generator, self.optimizer, self.label_optimizer, self.images, self.primary
        self.steps["second"](*parts, method=method)

    def finite_difference_pass(self):
        parts = self.network, self.generator, self.images, self.primary
        gradients = self.finite_difference(*parts, 0.01)
        for parameter, gradient in zip(self.generator.parameters(), gradients):
            parameter.grad = gradient
        self.label_optimizer.step()

    def seconds(self, row):
        """Wall time of one call, with the device's work done before and after."""
        synchronise = torch.cuda.synchronize if self.device.type == "cuda" else (lambda: None)
        synchronise()
        start = time.perf_counter()
        self.rows[row]()
        synchronise()
        return time.perf_counter() - start

    def operations(self, row):
        """Floating-point operations of one call, counted by torch."""
        with FlopCounterMode(display=False) as counter:
            self.rows[row]()
        return counter.get_total_flops()


def measure(bench, rows, repeats):
    """Interleaved seconds of each row: {row: [seconds] * repeats}, after the rounds of warm-up."""
    times = {row: [] for row in rows}
    for repeat in range(-bench.warm_up, repeats):
        for row in rows:
            seconds = bench.seconds(row)
            if repeat >= 0:
                times[row].append(seconds)
    return times


def peak_memory(bench, row):
    """Bytes that a call of a row takes at its peak above what is held between calls; the first call is not counted."""
    bench.rows[row]()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        bench.rows[row]()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base
    Path("/proc/self/clear_refs").write_text("5")  # Linux: start the process's peak anew
    base = kibibytes_of_this_process("VmRSS")
    bench.rows[row]()
    return 1024 * (kibibytes_of_this_process("VmHWM") - base)


def kibibytes_of_this_process(name):
    """VmRSS, the resident memory now, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0])


def memory_of_rows(bench, arguments, rows):
    """Peak memory by row; on a CPU each row runs in a process of its own, whose peak is the row's (Linux only)."""
    if bench.device.type == "cuda":
        return {row: peak_memory(bench, row) for row in rows}
    if platform.system() != "Linux":
        return dict.fromkeys(rows)
    command = [sys.executable, "-m", "benchmarks.step_cost", "--device", "cpu", "--width", str(arguments.width)]
    command += ["--batch-size", str(arguments.batch_size), "--precision", arguments.precision]
    command += ["--backbone", arguments.backbone, "--psi", ",".join(map(str, arguments.psi))]
    command += ["--channels-last"] if arguments.channels_last else []
    command += ["--memory-of"]
    root = Path(__file__).resolve().parent.parent
    # Large blocks are given back to the system when freed, so that the peak is of memory in use.
    here = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
    return {row: int(subprocess.check_output([*command, row], cwd=root, env=here, text=True)) for row in rows}


def acceleration(arguments):
    """The options that Acceleration takes."""
    return {name: getattr(arguments, name) for name in ("precision", "channels_last", "cuda_graphs")}


def make_bench(arguments, device, **changed):
    """The Bench that the command line asks for."""
    sizes = {name: getattr(arguments, name) for name in ("width", "batch_size", "psi", "backbone")}
    return Bench(device, **sizes | acceleration(arguments) | changed)


def epoch_seconds(bench, seconds, passes):
    """Seconds of CIFAR-100's epoch: a pass with data and augmentation for each row in `passes`, then the test.

    seconds: of a call, by row.
    """
    batch = seconds["data and augmentation"] / BATCHES
    iterations = TRAIN_IMAGES // bench.batch_size
    test = seconds["test"] * TEST_IMAGES / len(bench.split)
    return sum(iterations * (seconds[row] + batch) for row in passes) + test


def step_costs(arguments, device):
    """The whole table as a dict; see the keys for the units."""
    bench = make_bench(arguments, device)
    steps = [row for row in bench.rows if row.startswith(("Single", "Human", "MAXL"))]
    times = measure(bench, bench.rows, arguments.repeats)
    plain = bench  # a replayed graph shows neither its operations nor its memory
    if arguments.cuda_graphs:
        plain = make_bench(arguments, device, cuda_graphs=False)
    median = {row: statistics.median(seconds) for row, seconds in times.items()}
    memory = memory_of_rows(plain, arguments, steps)
    matrix_rate = 2 * len(bench.matrix) ** 3 / median["matrix product"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bench.network(bench.images)
    forward = counter.get_total_flops()

    table = {}
    for row in steps:
        operations = plain.operations(row)
        table[row] = {
            "seconds": median[row],
            "fastest": min(times[row]),
            "slowest": max(times[row]),
            "times_single": median[row] / median["Single step"],
            "forward_passes": operations / forward,
            "flops_per_second": operations / median[row],
            "share_of_matrix_rate": operations / median[row] / matrix_rate,
            "memory_bytes": memory[row],
        }
    passes = {"Single": ["Single step"], "Human": ["Human step"]}
    for method in (*model_vgg_maxl.META_GRADIENTS, "finite-difference"):
        passes[f"MAXL, {method}"] = ["MAXL first pass", f"MAXL second pass, {method}"]
    epochs = {name: epoch_seconds(bench, median, rows) for name, rows in passes.items()}
    batch, test = median["data and augmentation"] / BATCHES, epoch_seconds(bench, median, [])
    return {
        "backbone": arguments.backbone,
        "psi": list(arguments.psi),
        "width": arguments.width,
        "batch_size": arguments.batch_size,
        **acceleration(arguments),
        "repeats": arguments.repeats,
        "gflop_of_a_forward_per_image": forward / arguments.batch_size / 1e9,
        "matrix_flops_per_second": matrix_rate,
        "steps": table,
        "data_seconds_per_batch": batch,
        "data_share_of_a_single_epoch": TRAIN_IMAGES // bench.batch_size * batch / epochs["Single"],
        "test_seconds": test,
        "epoch_seconds_from_the_medians": epochs,
        "epoch_times_single": {name: seconds / epochs["Single"] for name, seconds in epochs.items()},
    }


def scaling(device, arguments):
    """Seconds of four rows as batch size, width and auxiliary classes grow and by precision and memory layout."""
    width, batch_size, classes = arguments.width, arguments.batch_size, len(arguments.psi)
    rows = ["Single step", "MAXL first pass", "MAXL second pass, forward-mode", "MAXL second pass, double-backward"]
    sweeps = {
        "batch size": {n: {"batch_size": n} for n in sorted({max(2, batch_size * k // 4) for k in (1, 2, 4, 8)})},
        "width": {w: {"width": w} for w in sorted({width / 4, width / 2, width})},
        "auxiliary classes": {classes * k: {"psi": (k,) * classes} for k in (1, 5, 25, 100)},
        "precision and layout": {
            f"{precision}{', channels last' * channels_last}": {"precision": precision, "channels_last": channels_last}
            for precision in PRECISIONS
            for channels_last in (False, True)
            if precision != "tf32" or device.type == "cuda"
        },
    }
    result = {}
    for name, settings in sweeps.items():
        result[name] = {}
        for value, changed in settings.items():
            bench = make_bench(arguments, device, **changed)
            times = measure(bench, rows, arguments.repeats)
            result[name][value] = {row: statistics.median(seconds) for row, seconds in times.items()}
    return result


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    add("--width", type=float, default=1.0, help="channel multiplier of the backbone (default: %(default)s)")
    add("--backbone", choices=BACKBONES, default="vgg16", help=f"{', '.join(BACKBONES)} (default: %(default)s)")
    add_psi(parser)
    parser.set_defaults(psi=[5] * 20)
    add("--batch-size", type=int, default=100, help="(default: %(default)s)")
    add("--repeats", type=int, default=5, help="rounds, after one of warm-up (default: %(default)s)")
    add_acceleration(parser)
    add("--scaling", action="store_true", help="also over sizes, precision and memory layout (default: off)")
    add("--out", metavar="DIR", help="write step_cost.json, .md and .png there (default: print only)")
    add("--memory-of", metavar="ROW", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 2 or arguments.repeats < 1 or not 1 / 64 <= arguments.width <= 16:
        raise InputError("--batch-size must be 2 or more, --repeats 1 or more, --width 1/64 to 16")
    device = select_device(arguments.device)

    if arguments.memory_of:
        print(peak_memory(make_bench(arguments, device), arguments.memory_of))
        return
    command = " ".join(["python -m benchmarks.step_cost", *(sys.argv[1:] if argv is None else argv)])
    results = {"command": command, "environment": environment(device)} | step_costs(arguments, device)
    if arguments.scaling:
        results["scaling"] = scaling(device, arguments)
    print(markdown(results))
    if arguments.out:
        out = Path(arguments.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "step_cost.json").write_text(json.dumps(results, indent=2) + "\n")
        (out / "step_cost.md").write_text(markdown(results), encoding="utf-8")
        chart(results, out / "step_cost.png")


if __name__ == "__main__":
    sys.exit(run_main(main))
