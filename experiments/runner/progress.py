"""How far a plan is: its state in words, the time it will take, and a bar while it runs."""

import collections
import contextlib
import datetime
import io
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

import create_dataset
from experiments.runner.task import Task
from harness.acceleration import select_device
from harness.command_line import settles_anyway
from harness.curves import read_curves, row_seconds
from harness.exits import InputError, run_main

ITERATIONS = 2  # of each pass, for an estimate


class Progress:
    """A bar over the epochs of all runs, weighted by what they cost, and a line for each thing that happens."""

    def __init__(self, tasks):
        self.tasks, self.next_look = tasks, 0.0
        self.bar = tqdm(
            total=self.cost(lambda task: task.settings.epochs), initial=self.cost(Task.epochs_done),
            disable=None, smoothing=0, dynamic_ncols=True, bar_format="{l_bar}{bar}| {elapsed}, {remaining} left",
        )  # fmt: skip

    def cost(self, epochs):
        return sum(task.cost * epochs(task) for task in self.tasks)

    def show(self, **counts):
        if self.bar.disable or time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + 5  # a look reads the curves of all runs
        self.bar.set_description(", ".join(f"{n} {what}" for what, n in counts.items() if n), refresh=False)
        self.bar.n = self.cost(Task.epochs_done)
        self.bar.refresh()

    def say(self, text):
        with tqdm.external_write_mode():
            print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def show_plan(tasks, jobs):
    """Print every run with its state and command, and the time that the epochs still to run will take."""
    seconds, left = estimate(tasks), 0.0
    for task in tasks:
        state, epochs = task.state(), task.settings.epochs - task.epochs_done()
        left += epochs * seconds[task.method]
        print(f"{state:10s} {duration(epochs * seconds[task.method]):>9s}  {' '.join(['python', *task.command[1:]])}")
    together = f", {duration(left / jobs)} if {jobs} at a time do not slow each other" if jobs > 1 else ""
    print(
        f"{len(tasks)} runs; about {duration(left)} one after the other on this device{together} "
        "(from a few iterations of each step)"
    )


def estimate(tasks):
    """Seconds of an epoch by method, from the first task of each: a few iterations on generated images, here and now.

    On a GPU the first epoch, in which cuDNN looks for its best kernels, is not counted, and CUDA graphs, which take
    more iterations to record, are left out.
    """
    seconds = {}
    for task in tasks:
        if task.method in seconds:
            continue
        settings = task.settings
        epochs = 2 if select_device(settings.device).type == "cuda" else 1
        counts = range(create_dataset.LEVEL_CLASSES[-1], task.data.SIZES["synthetic"][0] + 1)
        few = next((count for count in counts if iterations(settings, count) >= ITERATIONS), counts[-1])
        with tempfile.TemporaryDirectory() as folder:
            small = {
                "dataset": "synthetic",
                "train-images": few,
                "epochs": epochs,
                "max-minutes": 1e6,
                "out": f"{folder}/run",
            }
            if "cosine_every" in settings:
                small["cosine-every"] = 0  # a few iterations do not have a tenth of it
            eager = (argument for argument in task.arguments if argument != "--cuda-graphs")  # too few to capture
            arguments = [*eager, *(f"--{name}={value}" for name, value in small.items())]
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = run_main(task.script_module.main, arguments)
            if code:
                raise InputError(f"{task.method} could not be measured: {said.getvalue().splitlines()[-1]}")
            row = read_curves(Path(folder) / "run")[-1]
        train_images, test_images = task.data.SIZES[settings.dataset]
        whole = iterations(settings, settings.train_images or train_images)
        passes = row["seconds_train"] + row.get("seconds_meta", 0.0)
        seconds[task.method] = passes * whole / iterations(settings, few)
        # a pass that settles the statistics is a forward of each image, as the test is; MAXL has its second pass for it
        settled = (settings.settle_statistics or settles_anyway(settings)) and "seconds_meta" not in row
        forwards = test_images + whole * settings.batch_size * settled
        seconds[task.method] += row["seconds_test"] * forwards / task.data.SIZES["synthetic"][1]
    return seconds


def iterations(settings, images):
    """Batches in a pass over so many training images, less those that one of Appendix E's variations holds out."""
    held_out = round((getattr(settings, "validation_share", None) or 0.0) * images)
    return (images - held_out) // settings.batch_size


def show_status(tasks):
    """Print how far every run is, and about how long the rest will take, from the epochs run so far."""
    width = max(24, *(len(task.name) for task in tasks))
    counts, seconds, cost, left = collections.Counter(), 0.0, 0.0, 0.0
    for task in tasks:
        state, rows = task.state(), read_curves(task.folder)
        why = task.failure() if state in ("unfinished", "not begun") else ""
        state = "failed" if why else state
        counts[state] += 1
        print(f"{task.name:{width}s} {state:10s} epoch {len(rows)} of {task.settings.epochs} {why}".rstrip())
        seconds += sum(map(row_seconds, rows))
        cost += task.cost * len(rows)
        left += task.cost * (task.settings.epochs - len(rows))
    rest = f"; about {duration(left * seconds / cost)} of runs left, one after the other" if cost and left else ""
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())) + rest)


def duration(seconds):
    """Seconds in words of hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if seconds >= 60 else f"{seconds:.0f} s"
