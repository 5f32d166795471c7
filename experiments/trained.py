"""What a run has trained, back from its checkpoint: for figures that look into the networks, not at the curves."""

import argparse
import functools
import importlib.util
from typing import NamedTuple

import torch

import create_dataset
import model_vgg_maxl
import utils
from experiments.methods.backbones import BACKBONES
from experiments.datasets.registry import DATASETS
from experiments.runner.report import listed
from harness.acceleration import Acceleration
from harness.exits import InputError
from harness.files import read_checkpoint

WITH_LABEL_GENERATOR = ("model_vgg_maxl", "experiments.methods.table1_maxl", "experiments.methods.controls")


class Trained(NamedTuple):
    network: utils.Network
    label_generator: object  # a LabelGenerator; None for the methods that have none
    settings: dict


def require_scikit_learn(name):
    """Raise InputError where scikit-learn, which all else does without, is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise InputError(f"{name} needs the package scikit-learn: pip install scikit-learn")


def add_data_root(parser):
    """Add --data-root: the scripts' own option, which here also moves the data that a figure is drawn from."""
    parser.add_argument(
        "--data-root", metavar="DIR",
        help="folder that holds, or will hold, the data (default: dataset; with --plot, the runs' own)",
    )  # fmt: skip


def seed_number(text):
    """A seed from the command line, as numpy and scikit-learn take it."""
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def with_data_root(settings, options):
    """The options of the runs, with --data-root where it was given."""
    return [*options, *(["--data-root", settings.data_root] if settings.data_root else [])]


def load_trained(run, task, device):
    """The networks of a RunOnDisk, the run of a Task, as Trained: on `device`, in evaluation mode, in fp32.

    The run's rows become the checkpoint's: those of a run at work may be of a later epoch than the curves read before.
    Raises InputError where there is no whole checkpoint, or where it is of another task.
    """
    path, previous = run.folder / "checkpoint.pt", run.folder / "checkpoint.previous.pt"
    # a run at work replaces one by the other, and for an instant only one of them is there
    checkpoint = next(filter(None, (read_checkpoint(p) for p in (path, previous, path) if p.exists())), None)
    if checkpoint is None:
        state = "is damaged" if path.exists() else "is not there"
        raise InputError(
            f"{path} {state}, and this figure needs its trained network; run it again, or choose other --seeds"
        )
    settings = checkpoint["settings"]
    if details := task.mismatch(settings):
        raise InputError(f"{path} is not the run that {run.folder.name} names ({details}); move it away")
    try:
        parts = make_networks(settings)
        for name, network in parts.items():
            network.load_state_dict(checkpoint["parts"][name])
            Acceleration(device).place(network).eval()
    except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not fit this code ({str(error).splitlines()[0]}); draw with the code that wrote it"
        ) from None
    run.rows = checkpoint["rows"]
    run.finished = len(run.rows) == run.settings.get("epochs")
    return Trained(parts["network"], parts.get("label_generator"), settings)


def make_networks(settings):
    """A run's networks by their names in a checkpoint; a label generator and its network have their first weights."""
    if "backbone" in settings:
        dataset = DATASETS[settings["dataset"]]
        trunk = functools.partial(BACKBONES[settings["backbone"]], settings["width"], dataset.channels)
        classes = [dataset.classes]
    else:
        trunk = functools.partial(utils.Backbone, settings["width"])
        classes = [create_dataset.LEVEL_CLASSES[settings["primary_level"]]]
    if settings["script"] in WITH_LABEL_GENERATOR and settings.get("control", "untrained") == "untrained":
        networks = model_vgg_maxl.make_networks(trunk, settings["psi"], settings["seed"])
        return dict(zip(("network", "label_generator"), networks))
    if "psi" in settings:
        classes.append(sum(settings["psi"]))
    elif "auxiliary_level" in settings:
        classes.append(create_dataset.LEVEL_CLASSES[settings["auxiliary_level"]])
    return {"network": utils.Network(trunk(), *classes)}


def load_test(runs, data_root, device):
    """The test Split of {(pair, method): {seed: RunOnDisk}}, which are alike in their dataset."""
    settings = listed(runs)[0].settings
    # of the training images, which are not needed, the fewest that there can be
    _, test = create_dataset.load(
        settings["dataset"], data_root or settings["data_root"], device, train_images=create_dataset.LEVEL_CLASSES[-1]
    )
    return test


def load_train(run, data_root, device):
    """The training Split of a RunOnDisk: the very images that it was trained on."""
    settings = run.settings
    root = data_root or settings["data_root"]
    return create_dataset.load(settings["dataset"], root, device, settings["train_images"], settings["seed"])[0]


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
