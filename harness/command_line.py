"""The command line of the scripts: the options that all of them have, `--quick`, and what is out of range."""

import argparse
import os
import re

from harness.acceleration import add_acceleration
from harness.exits import InputError

QUICK = {"dataset": "synthetic", "width": 0.125, "epochs": 10, "train_images": 4000}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


def make_parser(description, auxiliary_task=True, datasets=None):
    """An ArgumentParser with the options that every script has; a script adds its own.

    datasets: their names, of datasets whose labels have one level; by default the two of create_dataset, with four.
    """
    quick = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("--data-root", metavar="DIR", default="dataset",
        help="folder that holds, or will hold, the data, such as cifar-100-python/ (default: %(default)s)")
    if datasets is None:
        add("--dataset", choices=("cifar100", "synthetic"), default="cifar100",
            help="4-level CIFAR-100, or generated images with the same labels (default: %(default)s)")
        add("--primary-level", type=int, metavar="K",
            help="level of the primary task: 0, 1, 2, 3 for 3, 10, 20, 100 classes (default: %(default)s)")
    else:
        add("--dataset", choices=datasets, metavar="NAME", help=f"{', '.join(datasets)} (default: %(default)s)")
    add("--epochs", type=int, metavar="N", help="passes over the training data (default: %(default)s)")
    add("--batch-size", type=int, metavar="N", help="images in a batch, 2 or more (default: %(default)s)")
    add("--width", type=float, metavar="F",
        help="multiplier of the backbone's channels; 1.0 is the paper's network (default: %(default)s)")
    add("--train-images", type=int, metavar="N",
        help="train on a class-balanced subset of N images, drawn from the seed (default: all)")
    add("--seed", type=int, metavar="N", default=0,
        help="seed of weights, order and augmentation (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto is cuda where there is one, else cpu (default: %(default)s)")
    add_acceleration(parser)
    if auxiliary_task:
        add("--cosine-every", type=int, metavar="N", default=0,
            help="compare the two tasks' gradients at every N-th iteration, 0 for never (default: %(default)s)")
    add("--settle-statistics", action="store_true",
        help="before each test, a pass at fixed weights for BatchNorm's statistics, to compare with MAXL on equal "
        "terms; no effect on MAXL, whose second pass settles them (default: off)")
    add("--out", metavar="DIR", help="folder of this run (default: runs/<script>-<what>-seed<seed>)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in DIR (default: off)")
    existing.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR (default: off)")
    add("--max-minutes", type=float, metavar="M",
        help="stop within M minutes, resumable, with exit code 3 (default: no limit)")
    add("--quick", action="store_true", help=f"a first look in minutes: {quick}, unless you set them (default: off)")
    # fmt: on
    return parser


def settles_anyway(settings):
    """Whether a run tests with settled statistics without --settle-statistics: MAXL after its second pass."""
    return "entropy_weight" in settings


def parse_settings(parser, defaults, argv=None):
    """Command line over `--quick` over the script's own `defaults` -> a Namespace of every setting, checked.

    Raises InputError, with one sentence, where a value is out of range.
    """
    parser.set_defaults(**defaults)
    settings = parser.parse_args(argv)
    if settings.quick:
        parser.set_defaults(**QUICK)
        settings = parser.parse_args(argv)

    def require(condition, option, expected):
        if not condition:
            value = getattr(settings, option)
            raise InputError(f"--{option.replace('_', '-')} {value} is out of range; give {expected}")

    for action in parser._actions:  # argparse takes a script's own default as it stands
        if action.choices and (value := getattr(settings, action.dest)) is not None:
            require(value in action.choices, action.dest, f"one of {', '.join(action.choices)}")
    if "primary_level" in settings:
        require(settings.primary_level in range(4), "primary_level", "0, 1, 2 or 3 (3, 10, 20 or 100 classes)")
    require(settings.epochs >= 1, "epochs", "1 or more")
    require(
        settings.batch_size >= 2, "batch_size", "2 or more (BatchNorm takes the variance of a batch, and 1 has none)"
    )
    require(1 / 64 <= settings.width <= 16, "width", "1/64 (one channel in the first layer) to 16")
    require(0 <= settings.seed < 2**63, "seed", "0 or a positive number below 2**63")
    require(settings.out != "", "out", "a folder, or leave it out")
    if settings.out:
        settings.out = os.path.expanduser(settings.out)
    require(getattr(settings, "cosine_every", 0) >= 0, "cosine_every", "0 for never, or 1 or more")
    require(settings.max_minutes is None or settings.max_minutes > 0, "max_minutes", "a positive number of minutes")
    return settings


def add_psi(parser):
    """Add --psi."""
    parser.add_argument(
        "--psi", type=parse_psi, metavar="5,5,...",
        help="auxiliary classes of each primary class, 2,3,4 or 5*20 (default: %(default)s)",
    )  # fmt: skip


def parse_psi(text):
    """ "2,3,4" or "5*20" (20 times 5), or both mixed, "5*19,4" -> list of ints."""
    psi = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?[0-9]{1,9})(?:\*([0-9]{1,9}))?\s*", part)
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 2,3,4 or 5*20")
        size, times = int(match[1]), int(match[2] or 1)
        if not 1 <= times <= 1000:
            raise argparse.ArgumentTypeError(f"{part!r} has to repeat 1 to 1000 times; no dataset has more classes")
        psi += [size] * times
    return psi


def check_psi(psi, classes, whose):
    """Raise InputError unless ψ has one whole number, 1 to 1000, for each of the `classes` of what has them."""
    if not isinstance(psi, list) or not all(type(size) is int and 1 <= size <= 1000 for size in psi):
        raise InputError(f"psi {psi} must be a list of ints from 1 to 1000: each primary class's auxiliary classes")
    if len(psi) != classes:
        raise InputError(
            f"psi has {len(psi)} numbers, but {whose} has {classes} classes; "
            f"give one number for each, for example --psi '5*{classes}'"
        )
