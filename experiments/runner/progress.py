"""How far a plan is, in words, and the time that it will take."""

import collections
import contextlib
import io
import tempfile
from pathlib import Path

import torch

from harness.curves import read_curves, row_seconds

BATCHES = 5  # of a pass over the training data, for an estimate


def show_plan(tasks, jobs):
    """Print every run with its state and command, and the time that the epochs still to run will take."""
    seconds, left = {}, 0.0
    for task in tasks:
        if task.method not in seconds:
            seconds[task.method] = estimate(task)
        rest = (task.settings.epochs - task.epochs_done()) * seconds[task.method]
        left += rest
        print(f"{task.state():10s} {duration(rest):>9s}  {' '.join(['python', *task.command[1:]])}")
    together = f", {duration(left / jobs)} if {jobs} at a time do not slow each other" if jobs > 1 else ""
    print(
        f"{len(tasks)} runs; about {duration(left)} one after the other on this device{together} "
        "(from a few iterations of each step)"
    )


def estimate(task):
    """Seconds of an epoch of a task here and now, from an epoch on a few generated images.

    On a GPU it is the second epoch, as cuDNN looks for its best kernels in the first.
    """
    settings, sizes = task.settings, task.data.SIZES
    few = min(max(BATCHES * settings.batch_size, 100), sizes["synthetic"][0])
    with tempfile.TemporaryDirectory() as folder:
        small = {"dataset": "synthetic", "train-images": few, "epochs": 1 + torch.cuda.is_available()}
        small |= {"out": f"{folder}/run", "max-minutes": 1e6}
        small |= {"cosine-every": 0} if "cosine_every" in settings else {}
        arguments = [*task.arguments, *(f"--{name}={value}" for name, value in small.items())]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            task.script_module.main(arguments)
        row = read_curves(Path(folder) / "run")[-1]
    train_images, test_images = settings.train_images or sizes[settings.dataset][0], sizes[settings.dataset][1]
    passes = row["seconds_train"] + row.get("seconds_meta", 0.0)
    # a pass that settles the statistics is a forward of each image, as the test is; MAXL has its second pass for it
    settled = settings.test_statistics == "settled" and "seconds_meta" not in row
    forwards = test_images + settled * train_images
    return passes * train_images / few + row["seconds_test"] * forwards / sizes["synthetic"][1]


def show_status(tasks):
    """Print how far every run is, and about how long the rest will take, from the epochs run so far."""
    width, counts = max(24, *(len(task.name) for task in tasks)), collections.Counter()
    spent, left = collections.defaultdict(list), collections.Counter()
    for task in tasks:
        state, rows = task.state(), read_curves(task.folder)
        counts[state] += 1
        print(f"{task.name:{width}s} {state:10s} epoch {len(rows)} of {task.settings.epochs}")
        spent[task.method] += map(row_seconds, rows)
        left[task.method] += task.settings.epochs - len(rows)
    known = [method for method in left if spent[method] and left[method]]
    rest = sum(left[method] * sum(spent[method]) / len(spent[method]) for method in known)
    words = f"; about {duration(rest)} left of {', '.join(known)}, one after the other" if known else ""
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())) + words)


def duration(seconds):
    """Seconds in words of hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if seconds >= 60 else f"{seconds:.0f} s"
