"""What a run has trained, back from its checkpoint: for figures that look into the networks, not at the curves."""

import argparse
from typing import NamedTuple

import numpy as np
import torch

import create_dataset
from experiments.runner.report import listed
from harness.exits import InputError
from harness.files import read_checkpoint


class Trained(NamedTuple):
    network: torch.nn.Module
    label_generator: object  # None for the methods that have none,
    first_label_generator: object  # and with the weights that the run started with
    settings: argparse.Namespace


def load_trained(run, task, device):
    """The networks of a RunOnDisk, the run of a Task, as Trained: on `device`, in evaluation mode, in fp32.

    The run's rows become the checkpoint's: those of a run at work may be of a later epoch than the curves read before.
    Raises InputError if there is no checkpoint, or if it is damaged or of another task.
    """
    path = run.folder / "checkpoint.pt"
    if not path.exists():
        raise InputError(
            f"{path} is not there, and this figure needs its trained network; run it again, or choose other --seeds"
        )
    checkpoint = read_checkpoint(path)
    if details := task.mismatch(checkpoint["settings"]):
        raise InputError(f"{path} is not the run that {run.folder.name} names ({details}); move it away")
    settings = argparse.Namespace(**checkpoint["settings"])
    try:
        networks = task.script_module.make_networks(settings)
        for name, network in networks.items():
            network.load_state_dict(checkpoint["parts"][name])
            network.to(device).eval()
    except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not fit this code ({str(error).splitlines()[0]}); draw with the code that wrote it"
        ) from None
    run.rows = checkpoint["rows"]
    run.finished = len(run.rows) == run.settings.get("epochs")
    first = {name: network.to(device) for name, network in task.script_module.make_networks(settings).items()}
    return Trained(networks["network"], networks.get("label_generator"), first.get("label_generator"), settings)


def load_data(run, data_root, device, load=create_dataset.load, **changed):
    """The training Split that a RunOnDisk was trained on and the test Split, on `device`; changed: of its settings."""
    settings = run.settings | {"channels_last": False} | ({"data_root": data_root} if data_root else {}) | changed
    return load(argparse.Namespace(**settings), device)


def load_test(runs, data_root, device):
    """The test Split of {(pair, method): {seed: RunOnDisk}}, which are alike in their dataset."""
    few = create_dataset.LEVEL_CLASSES[-1]  # training images, which are not needed: the fewest that there can be
    return load_data(listed(runs)[0], data_root, device, train_images=few)[1]


def random_subset(labels, count, seed):
    """Indices (count,) of a class-balanced subset of images with labels (N, levels), in a random order, in numpy."""
    return np.random.default_rng(seed).permutation(create_dataset.balanced_subset(labels, count, seed).numpy())


def class_names(runs, level):
    """The names of a level's classes for a figure; generated images show no dolphins, so theirs are numbers."""
    if listed(runs)[0].settings["dataset"] == "synthetic":
        return [f"class {c}" for c in range(create_dataset.LEVEL_CLASSES[level])]
    return [name.replace("_", " ") for name in create_dataset.CLASS_NAMES[level]]


@torch.no_grad()
def trunk_features(network, split):
    """The trunk's output, the last layer that the tasks share, on all of `split`: float32 (N, D), on the CPU."""
    network.eval()
    return torch.cat([network.trunk(images).cpu() for images, _ in split.test_batches()])


@torch.no_grad()
def generated_labels(label_generator, split, primary_level, trained=True):
    """The generated labels of all of `split`: float32 (N, sum(psi)), on the CPU.

    trained: without it, BatchNorm takes each batch's own statistics, as there are no running ones yet.
    """
    label_generator.train(not trained)
    batches = split.test_batches()
    return torch.cat([label_generator(images, labels[:, primary_level]).cpu() for images, labels in batches])
