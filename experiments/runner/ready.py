"""What has to be there before the first run starts: the data, and room on the disk."""

import shutil
import sys

import torch

import utils
from experiments.methods.backbones import BACKBONES
from harness.exits import InputError


def get_ready(tasks, jobs):
    """Fetch and check the data once, so that runs side by side do not; warn where the disk is too small.

    Raises InputError where data is not to be had, with a line for each dataset, and one on what is there.
    """
    missing, found = [], []
    for data, dataset, root in {(task.data, task.settings.dataset, task.settings.data_root): 0 for task in tasks}:
        if not dataset.startswith("synthetic"):
            try:
                data.read(dataset, root)
            except InputError as error:
                missing.append(str(error))
                continue
        found.append(dataset)
    if missing and found:
        missing.append(f"What is there can be run without the rest: --datasets {' '.join(found)}")
    if missing:
        raise InputError("\n".join(missing))
    if not tasks:
        return
    folder = tasks[0].root.absolute()
    while not folder.exists():
        folder = folder.parent
    needed, free = room_needed(tasks, jobs), shutil.disk_usage(folder).free
    if needed > free:
        print(
            f"warning: the {len(tasks)} runs to come will leave about {needed / 2**30:.1f} GiB in {tasks[0].root}, "
            f"and the disk has {free / 2**30:.1f} GiB left; a run that finds no room stops and can be continued",
            file=sys.stderr,
        )


def room_needed(tasks, jobs):
    """Bytes that the tasks leave: a checkpoint each, and two more (the one before, and the next) while at work."""
    sizes = sorted(checkpoint_bytes(task) for task in tasks)
    return sum(sizes) + 2 * sum(sizes[-jobs:])


def checkpoint_bytes(task):
    """Roughly: the weights of its networks, each taken for as large as the multi-task network."""
    with torch.device("meta"):
        backbone = BACKBONES[task.settings.backbone] if "backbone" in task.settings else utils.Backbone
        psi = task.settings.psi if "psi" in task.settings else [5] * 20
        network = utils.Network(backbone(task.settings.width), len(psi), sum(psi))
    return 4 * task.networks * sum(weight.numel() for weight in network.parameters())
