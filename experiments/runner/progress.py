"""How far a plan is, in words, and the time that it will take."""

import collections
import contextlib
import io
import tempfile
from pathlib import Path

import torch

import create_dataset
from harness.curves import read_curves, row_seconds
from harness.exits import InputError, run_main

ITERATIONS = 2  # of each pass, for an estimate


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

    On a GPU the first epoch, in which cuDNN looks for its best kernels, is not counted.
    """
    seconds = {}
    for task in tasks:
        if task.method in seconds:
            continue
        settings, sizes = task.settings, task.data.SIZES
        counts = range(create_dataset.LEVEL_CLASSES[-1], sizes["synthetic"][0] + 1)
        few = next((count for count in counts if iterations(settings, count) >= ITERATIONS), counts[-1])
        epochs = 2 if torch.cuda.is_available() and settings.device != "cpu" else 1
        with tempfile.TemporaryDirectory() as folder:
            small = {"dataset": "synthetic", "train-images": few, "epochs": epochs, "out": f"{folder}/run"}
            small |= {"max-minutes": 1e6} | ({"cosine-every": 0} if "cosine_every" in settings else {})
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                arguments = [*task.arguments, *(f"--{name}={value}" for name, value in small.items())]
                code = run_main(task.script_module.main, arguments)
            if code:
                raise InputError(f"{task.method} could not be measured: {said.getvalue().splitlines()[-1]}")
            row = read_curves(Path(folder) / "run")[-1]
        train_images, test_images = sizes[settings.dataset]
        whole = iterations(settings, settings.train_images or train_images)
        passes = row["seconds_train"] + row.get("seconds_meta", 0.0)
        # a pass that settles the statistics is a forward of each image, as the test is; MAXL has its second pass for it
        settled = settings.test_statistics == "settled" and "seconds_meta" not in row
        forwards = test_images + whole * settings.batch_size * settled
        seconds[task.method] = passes * whole / iterations(settings, few)
        seconds[task.method] += row["seconds_test"] * forwards / sizes["synthetic"][1]
    return seconds


def iterations(settings, images):
    """Batches in a pass over so many training images, less those that one of Appendix E's variations holds out."""
    share = settings.validation_share if getattr(settings, "variant", "") == "validation" else 0.0
    return (images - round(share * images)) // settings.batch_size


def show_status(tasks):
    """Print how far every run is, and about how long the rest will take, from the epochs run so far."""
    width, counts = max(24, *(len(task.name) for task in tasks)), collections.Counter()
    spent, left = collections.defaultdict(list), collections.Counter()
    for task in tasks:
        state, rows = task.state(), read_curves(task.folder)
        why = task.failure() if state in ("unfinished", "not begun") else ""
        state = "failed" if why else state
        counts[state] += 1
        print(f"{task.name:{width}s} {state:10s} epoch {len(rows)} of {task.settings.epochs} {why}".rstrip())
        spent[task.method] += map(row_seconds, rows)
        left[task.method] += task.settings.epochs - len(rows)
    known = [method for method in left if spent[method] and left[method]]
    rest = sum(left[method] * sum(spent[method]) / len(spent[method]) for method in known)
    of = f", of {', '.join(known)}" if len(known) < sum(epochs > 0 for epochs in left.values()) else ""
    words = f"; about {duration(rest)} of runs left{of}, one after the other" if known else ""
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())) + words)


def duration(seconds):
    """Seconds in words of hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if seconds >= 60 else f"{seconds:.0f} s"
