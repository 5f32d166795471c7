"""The command line of every script: an option for each setting, the range of each, and `--quick`."""

import argparse
import difflib
import itertools
import math
import os
import re
import sys

from harness.exits import InputError

QUICK = {"dataset": "synthetic", "width": 0.125, "epochs": 10, "train_images": 4000}

# Settings that may differ between a run and its continuation. All others must be the same.
FREE_ON_RESUME = {"out", "resume", "overwrite", "max_minutes", "epochs", "device", "data_root", "quick"}
FREE_ON_RESUME |= {"channels_last"}

# What every script has besides its own SETTINGS. None is allowed only where it stands here.
SHARED = {
    "dataset": "cifar100", "data_root": "dataset", "train_images": None, "seed": 0, "device": "auto",
    "precision": "fp32", "channels_last": False, "cosine_every": 0, "out": None, "resume": False,
    "overwrite": False, "max_minutes": None, "quick": False,
}  # fmt: skip


def flag(name):
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"


def parse_psi(text):
    """ "2,3,4" or "5*20" (20 times 5), or both mixed, "5*19,4" -> list of ints. Raises ArgumentTypeError."""
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


def format_psi(psi):
    """The list as short as parse_psi reads it: [5] * 20 -> "5*20", [3, 3, 4] -> "3,3,4"."""
    groups = [(size, len(list(group))) for size, group in itertools.groupby(psi)]
    return ",".join(f"{size}*{times}" if times > 2 else ",".join([str(size)] * times) for size, times in groups)


AT_LEAST_0 = (lambda value: value >= 0), "0 or a positive number"
AT_LEAST_1 = (lambda value: value >= 1), "1 or more"
LEVEL = (lambda value: value in range(4)), "0, 1, 2 or 3 (3, 10, 20 or 100 classes)"

# name: (type, help, check, what the check expects). The type is int, float, str, bool (a flag), a tuple of the
# possible texts, or a function that reads the text. The default is appended to a help that does not state it.
OPTIONS = {
    "primary_level": (int, "level of the primary task: 0, 1, 2, 3 for 3, 10, 20, 100 classes", *LEVEL),
    "auxiliary_level": (int, "level of the auxiliary task, finer than the primary", *LEVEL),
    "psi": (parse_psi, "ψ, the number of auxiliary classes of each primary class: 2,3,4 or 5*20; one number stands "
            "for every class", None, None),
    "epochs": (int, "passes over the training data", *AT_LEAST_1),
    "batch_size": (int, "images in a batch", lambda n: n >= 2, "2 or more (BatchNorm needs a variance)"),
    "width": (float, "multiplier of the backbone's channels; 1.0 is the paper's network",
              lambda width: 1 / 64 <= width <= 16, "1/64 (one channel in the first layer) to 16"),
    "learning_rate": (float, "learning rate of the network", *AT_LEAST_0),
    "label_learning_rate": (float, "learning rate of the label generator", *AT_LEAST_0),
    "label_weight_decay": (float, "weight decay of the label generator", *AT_LEAST_0),
    "momentum": (float, "momentum of the network's SGD", lambda momentum: 0 <= momentum < 1, "0 or more, below 1"),
    "weight_decay": (float, "weight decay of the network", *AT_LEAST_0),
    "halve_every": (int, "epochs after which the learning rates are halved", *AT_LEAST_1),
    "focal_gamma": (float, "γ of the focal loss; 0 is cross-entropy", *AT_LEAST_0),
    "auxiliary_weight": (float, "weight of the auxiliary loss in the network's loss", *AT_LEAST_0),
    "entropy_weight": (float, "weight of the entropy loss in the label generator's loss", *AT_LEAST_0),
    "meta_gradient": (("forward-mode", "double-backward"), "how the label generator's gradient is computed; both are "
                      "exact", None, None),
    "test_statistics": (("running", "settled", "batch"), "BatchNorm's statistics in the test: running ones as training "
                        "left them, running ones after a pass at fixed weights, or those of each test batch",
                        None, None),
    "dataset": (("cifar100", "synthetic"), "4-level CIFAR-100, or generated images with the same labels", None, None),
    "data_root": (str, "folder that holds, or will hold, the data", lambda path: path != "", "a folder"),
    "train_images": (int, "train on a class-balanced subset of so many images, drawn from the seed (default: all)",
                     *AT_LEAST_1),
    "seed": (int, "seed of weights, order and augmentation", lambda seed: 0 <= seed < 2**63,
             "0 or a positive number below 2**63"),
    "device": (("auto", "cpu", "cuda"), "auto takes a GPU if there is one", None, None),
    "precision": (("fp32", "tf32", "bf16"), "arithmetic of convolutions and linear layers; MAXL's second pass is "
                  "always in fp32", None, None),
    "channels_last": (bool, "another memory layout, the same up to rounding (default: off)", None, None),
    "cosine_every": (int, "compare the gradients of the two tasks in every so many iterations; 0 is never",
                     *AT_LEAST_0),
    "out": (str, "folder of this run (default: in runs/, named by script, dataset, classes and seed)",
            lambda path: path != "", "a folder, or leave it out"),
    "resume": (bool, "continue the run in its folder (default: off)", None, None),
    "overwrite": (bool, "replace an earlier run in its folder (default: off)", None, None),
    "max_minutes": (float, "stop after so many minutes, ready for --resume, with exit code 3 (default: no limit)",
                    lambda minutes: minutes > 0, "a positive number of minutes"),
    "quick": (bool, "a first look in minutes: " + ", ".join(f"{flag(name)} {value}" for name, value in QUICK.items())
              + ", unless you set them (default: off)", None, None),
}  # fmt: skip

# Names that people try, beside those that are spelt nearly right.
ALIASES = {"--lr": "--learning-rate", "--gamma": "--focal-gamma", "--lambda": "--entropy-weight"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError, and suggests which option an unknown one was meant to be."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")

    def parse_args(self, args=None, namespace=None):
        args = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        settings, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(args, unknown)}")
        return settings

    def _hint(self, args, unknown):
        if "--psi" in args and args[args.index("--psi") + 2 :][: len(unknown)] == unknown:
            return "; separate the numbers of --psi with commas, such as 2,3,4"
        name = next((arg for arg in unknown if arg.startswith("-")), "").partition("=")[0].replace("_", "-")
        known = self._option_string_actions
        near = [ALIASES[name]] if ALIASES.get(name) in known else difflib.get_close_matches(name, known, n=1)
        return f"; did you mean {near[0]}?" if near else ""


def parse_settings(doc, defaults, argv=None, auxiliary_task=True, datasets=None, options=None):
    """A script's command line -> argparse.Namespace of every setting, checked.

    doc: the script's, for --help. defaults: its SETTINGS; each becomes an option. auxiliary_task: whether there is one,
    whose gradient --cosine-every can compare. datasets: names for --dataset, by default the two of create_dataset.
    options: further entries of OPTIONS, for settings that only this script has; their default may be None.
    The command line wins over --quick, and --quick over the script. `settings.quick` keeps what the script had where
    --quick replaced it, by name. Raises InputError for a bad value, also for one edited in the script.
    """
    own = options or {}
    table = OPTIONS | own
    if datasets is not None:
        table["dataset"] = tuple(datasets), ", ".join(datasets), None, None
    script = defaults | {name: value for name, value in SHARED.items() if name not in defaults}
    if not auxiliary_task:
        del script["cosine_every"]
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, value in script.items():
        _add_option(parser, name, value, *table[name][:2])
    given = vars(parser.parse_args(argv))

    quick = {name: value for name, value in QUICK.items() if name in script and name not in given}
    quick = quick if given.get("quick") else {}
    settings = script | quick | given
    for name, value in settings.items():
        if value is not None or (name not in own and SHARED.get(name, 0) is not None):
            _check(name, value, table[name])
    if settings["resume"] and settings["overwrite"]:
        raise InputError("--resume is not allowed with --overwrite; give one of them")
    if settings["out"]:
        settings["out"] = os.path.expanduser(settings["out"])
    settings["quick"] = {name: script[name] for name, value in quick.items() if script[name] != value}
    return argparse.Namespace(**settings)


def show(value):
    """A setting's value as one would type it."""
    return format_psi(value) if isinstance(value, list) else str(value)


def _add_option(parser, name, default, kind, text):
    if "(default" not in text:
        text += f" (default: {show(default)})"
    arguments = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}  # so that what was not given is absent
    if kind is bool:
        arguments["action"] = "store_true"
    elif isinstance(kind, tuple):
        arguments |= {"choices": kind} | ({"metavar": "NAME"} if len(kind) > 4 else {})
    else:
        arguments |= {"type": kind, "metavar": {int: "N", float: "F", str: "DIR"}.get(kind, "5,5,...")}
    parser.add_argument(flag(name), **arguments)


def _check(name, value, option):
    """Raise InputError unless the value has the option's type and is in its range; no NaN, no infinity."""
    kind, _, check, expected = option
    if isinstance(kind, tuple):
        fits, expected = value in kind, f"one of {', '.join(kind)}"
    elif kind is float:
        fits = type(value) in (int, float) and math.isfinite(value)
    else:
        fits = type(value) is kind or not isinstance(kind, type)
    if not fits or (check and not check(value)):
        raise InputError(f"{flag(name)} {show(value)} is out of range; give {expected or 'another'}")


def fit_psi(settings, classes, whose):
    """Make settings.psi a list of one number for each of the `classes` of `whose`; one number stands for every class.

    Raises InputError unless it then has so many numbers, all whole and from 1 to 1000.
    """
    psi = [settings.psi] if type(settings.psi) is int else settings.psi
    if not isinstance(psi, list) or not all(type(size) is int and 1 <= size <= 1000 for size in psi):
        raise InputError(f"psi {psi} must be a list of ints from 1 to 1000: each primary class's auxiliary classes")
    psi = psi * classes if len(psi) == 1 else psi
    if len(psi) != classes:
        raise InputError(
            f"psi has {len(psi)} numbers, but {whose} has {classes} classes; "
            f"give one number for each, for example --psi '5*{classes}', or one for all"
        )
    settings.psi = psi
