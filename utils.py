"""What the training scripts share: VGG-16, the focal loss, the command line, and the bookkeeping of a run."""

import argparse
import contextlib
import copy
import csv
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm


class InputError(ValueError):
    """Something the user can put right; its text is one sentence: what is wrong, what was expected, what to do."""


class TimeLimit(Exception):
    """--max-minutes are over; everything up to the last finished epoch is saved."""


# ------------------------------------------------------------------------------------------------
# The backbone and its heads
# ------------------------------------------------------------------------------------------------


class VGG16(nn.Module):
    """The VGG-16 trunk: images (B, 3, 32, 32) -> features (B, feature_size).

    Five blocks of 2-2-3-3-3 convolutions (3x3) -> BatchNorm -> ReLU, each block ended by 2x2 max-pooling.
    `width` multiplies the channels 64-128-256-512-512; 1.0 is the paper's network. Any module with this
    forward and a `feature_size` can take its place.
    """

    def __init__(self, width=1.0):
        super().__init__()
        layers, channels_in = [], 3
        for convolutions, channels in zip((2, 2, 3, 3, 3), (64, 128, 256, 512, 512)):
            channels = max(1, round(channels * width))
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(channels_in, channels, kernel_size=3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                ]
                channels_in = channels
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.feature_size = channels_in

    def forward(self, images):
        return self.layers(images).flatten(1)


def make_head(feature_size, classes):
    """A task's own layers: features (B, feature_size) -> logits (B, classes). The loss holds the SoftMax."""
    return nn.Sequential(nn.Linear(feature_size, feature_size), nn.ReLU(inplace=True), nn.Linear(feature_size, classes))


class Network(nn.Module):
    """f_θ1: a shared trunk and one head a task (hard parameter sharing, section 3.1).

    images (B, 3, 32, 32) -> a tuple of logits, one (B, classes) for each entry of `classes`; the first is the
    primary task, the second, in a multi-task network, the auxiliary task.
    """

    def __init__(self, trunk, *classes):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(make_head(trunk.feature_size, n) for n in classes)

    def forward(self, images):
        features = self.trunk(images)
        return tuple(head(features) for head in self.heads)


def initialise(network, weights):
    """Draw every convolution's and linear layer's weight by `weights` (an nn.init function), zero the biases.

    BatchNorm keeps its 1 and 0. Returns the network.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weights(module.weight)
            nn.init.zeros_(module.bias)
    return network


# ------------------------------------------------------------------------------------------------
# Losses, and the update of the multi-task network
# ------------------------------------------------------------------------------------------------


def focal_losses(logits, gamma=2.0):
    """ℓ_nk = -(1 - p_nk)^γ log p_nk of eq. 1 for every image and class: (B, K) logits -> (B, K).

    Worked from log p, never from p, so that it and its gradient stay finite where p is nearly 0 or 1; and in fp32 at
    least, whatever the logits are in.
    """
    log_p = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -((-torch.expm1(log_p)) ** gamma) * log_p


def focal_loss(logits, labels, gamma=2.0):
    """Focal loss (eq. 1), summed over the classes, mean over the batch: a 0-d tensor.

    logits: (B, K). labels: int64 (B,) class ids, or float (B, K) soft labels, as in F.cross_entropy.
    """
    losses = focal_losses(logits, gamma)
    if labels.dim() == 1:
        return losses.gather(1, labels[:, None]).mean()
    return (labels * losses).sum(dim=1).mean()


def accuracy(logits, labels):
    """Share of the batch whose largest logit is the label's class (soft labels: the label's largest class)."""
    if labels.dim() == 2:
        labels = labels.argmax(dim=1)
    return (logits.argmax(dim=1) == labels).double().mean()


def multi_task_step(network, optimizer, images, primary, auxiliary, gamma=2.0, cosine=False):
    """One update of the multi-task network θ1 (eq. 2): primary and auxiliary loss, weights 1 and 1.

    images: (B, 3, 32, 32). primary: int64 (B,). auxiliary: int64 (B,) or soft float (B, K). cosine: compare the two
    tasks' gradients too, which takes a backward pass for each.
    Returns the step's losses and accuracies as 0-d tensors by name.
    """
    primary_logits, auxiliary_logits = network(images)
    primary_loss = focal_loss(primary_logits, primary, gamma)
    auxiliary_loss = focal_loss(auxiliary_logits, auxiliary, gamma)
    optimizer.zero_grad()
    if cosine:
        cosines = backward_by_task(network, primary_loss, auxiliary_loss)
    else:
        (primary_loss + auxiliary_loss).backward()
        cosines = {}
    optimizer.step()
    metrics = {
        "primary_loss": primary_loss.detach(),
        "primary_accuracy": accuracy(primary_logits, primary),
        "auxiliary_loss": auxiliary_loss.detach(),
        "auxiliary_accuracy": accuracy(auxiliary_logits, auxiliary),
    }
    return metrics | cosines


def backward_by_task(network, primary_loss, auxiliary_loss):
    """Set each parameter's gradient to the sum of the two losses' gradients, and compare the two (section 4.4, Fig. 4).

    Returns 0-d tensors by name: "cosine_similarity", on each of the trunk's convolution weights the mean over the
    output filters, then the mean over these layers; "trunk_cosine_similarity", of all of the trunk's gradient at once.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    primary = torch.autograd.grad(primary_loss, parameters, retain_graph=True, materialize_grads=True)
    auxiliary = torch.autograd.grad(auxiliary_loss, parameters, materialize_grads=True)
    trunk = set(network.trunk.parameters())
    pairs = []
    for parameter, *pair in zip(parameters, primary, auxiliary):
        parameter.grad = sum(pair)
        if parameter in trunk:
            pairs.append(pair)
    # a bias's or BatchNorm's share of a filter is a single number, and its cosine always 1 or -1
    layers = [F.cosine_similarity(a.flatten(1), b.flatten(1)).mean() for a, b in pairs if a.dim() > 1]
    whole = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in zip(*pairs))
    return {
        "cosine_similarity": torch.stack(layers).mean(),
        "trunk_cosine_similarity": F.cosine_similarity(*whole, dim=0),
    }


@torch.no_grad()
def evaluate(network, split, levels, gamma=2.0):
    """Loss and accuracy over the whole of `split`, by name, in evaluation mode (BatchNorm's running statistics).

    levels: the label level of the network's first head (primary) and, where that has a meaning, of its second.
    """
    start = time.perf_counter()
    network.eval()
    totals = {}
    for images, labels in split.test_batches():
        for task, logits, level in zip(("primary", "auxiliary"), network(images), levels):
            for name, value in (
                (f"test_{task}_loss", focal_loss(logits, labels[:, level], gamma)),
                (f"test_{task}_accuracy", accuracy(logits, labels[:, level])),
            ):
                totals[name] = totals.get(name, 0) + value.double() * len(images)
    values = (torch.stack(list(totals.values())) / len(split)).tolist()  # the host waits for the device here
    return dict(zip(totals, values)) | {"seconds_test": time.perf_counter() - start}


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------

QUICK = {"dataset": "synthetic", "width": 0.125, "epochs": 10, "train_images": 4000}

# Settings that may differ between a run and its continuation: they change where and how long, not what.
FREE_ON_RESUME = {"out", "resume", "overwrite", "max_minutes", "epochs", "device", "data_root", "quick"}
FREE_ON_RESUME |= {"channels_last", "cuda_graphs"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


def make_parser(description, auxiliary_task=True):
    """An ArgumentParser with the options that every script has; a script adds its own."""
    quick = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("--data-root", metavar="DIR", default="dataset",
        help="folder that holds, or will hold, cifar-100-python/ (default: %(default)s)")
    add("--dataset", choices=("cifar100", "synthetic"), default="cifar100",
        help="4-level CIFAR-100, or generated images with the same labels (default: %(default)s)")
    add("--primary-level", type=int, metavar="K",
        help="level of the primary task: 0, 1, 2, 3 for 3, 10, 20, 100 classes (default: %(default)s)")
    add("--epochs", type=int, metavar="N", help="passes over the training data (default: %(default)s)")
    add("--batch-size", type=int, metavar="N", help="images in a batch, 2 or more (default: %(default)s)")
    add("--width", type=float, metavar="F",
        help="multiplier of VGG-16's channels; 1.0 is the paper's network (default: %(default)s)")
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
    add("--out", metavar="DIR", help="folder of this run (default: runs/<script>-<what>-seed<seed>)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in DIR (default: off)")
    existing.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR (default: off)")
    add("--max-minutes", type=float, metavar="M",
        help="stop within M minutes, resumable, with exit code 3 (default: no limit)")
    add("--quick", action="store_true", help=f"a first look in minutes: {quick}, unless you set them (default: off)")
    # fmt: on
    return parser


def add_acceleration(parser):
    """Add the options of Acceleration."""
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32",
        help="of convolutions and linear layers: tf32, on CUDA; bf16, faster, for all but MAXL's second pass, which "
        "it spoils and which stays in tf32 (fp32 on a CPU) (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--channels-last", action="store_true",
        help="lay weights and activations out channels last: the same up to rounding (default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--cuda-graphs", action="store_true",
        help="launch each training step as one CUDA graph; not yet run on a GPU (default: off)",
    )  # fmt: skip


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


def select_device(name):
    """ "auto", "cpu" or "cuda" -> torch.device. Raises InputError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was asked for, but torch sees no CUDA GPU here; use --device cpu or auto")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # training batches have one size, so the search for the best kernels pays
    return device


# ------------------------------------------------------------------------------------------------
# Acceleration: the same algorithm, faster; everything here can be left out
# ------------------------------------------------------------------------------------------------

PRECISIONS = ("fp32", "tf32", "bf16")


class Acceleration:
    """What --precision, --channels-last and --cuda-graphs do to networks and steps; by default, nothing.

    Raises InputError for tf32 and for CUDA graphs on a CPU.
    """

    def __init__(self, device, precision="fp32", channels_last=False, cuda_graphs=False):
        if device.type != "cuda" and precision == "tf32":
            raise InputError("--precision tf32 is a format of CUDA GPUs; on a CPU use fp32 or bf16")
        if device.type != "cuda" and cuda_graphs:
            raise InputError("--cuda-graphs needs a CUDA GPU; leave it out on a CPU")
        self.device, self.precision, self.cuda_graphs = device, precision, cuda_graphs
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        # Both flags are the process's; torch's own default is True for cuDNN, which would make fp32 something else.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"

    def place(self, network):
        """Move the network to the device, in the memory layout asked for; returns it."""
        return network.to(self.device, memory_format=self.memory_format)

    def lower(self, network):
        """The network for the passes that bear low precision: with bf16, a view of it, its forward under autocast.

        All else is shared with `network`, its parameters and buffers too.
        """
        if self.precision != "bf16":
            return network
        view = copy.copy(network)
        view.forward = torch.autocast(self.device.type, torch.bfloat16)(network.forward)
        return view

    def capture(self, step):
        """The training step, with CUDA graphs as a CapturedStep."""
        return CapturedStep(step) if self.cuda_graphs else step


class CapturedStep:
    """A training step as a CUDA graph, one launch in place of hundreds; called like the step. Not yet run on a GPU.

    Tensors among the positional arguments are the graph's inputs. All else is part of the graph, learning rates too:
    other arguments get a graph of their own, other rates replace all graphs. The first calls of each run the step as
    it is, since what is set up once must not be captured. The tensors returned are written over by the next call.
    """

    WARM_UP = 3  # calls; cuDNN looks for its best kernels in the first

    def __init__(self, step):
        self.step, self.rates, self.recorded, self.side = step, None, {}, None

    def __call__(self, *args, **options):
        rates = [g["lr"] for a in args if isinstance(a, torch.optim.Optimizer) for g in a.param_groups]
        if rates != self.rates:
            self.rates, self.recorded = rates, {}
        tensors = [a for a in args if torch.is_tensor(a)]
        others = [id(a) for a in args if not torch.is_tensor(a)]
        key = (*others, *((t.shape, t.dtype) for t in tensors), *sorted(options.items()))
        graph = self.recorded.setdefault(key, {"calls": 0})
        graph["calls"] += 1
        if graph["calls"] <= self.WARM_UP:
            return self._on_a_side_stream(args, options)
        if graph["calls"] == self.WARM_UP + 1:
            graph["inputs"] = [t.clone() for t in tensors]
            inputs = iter(graph["inputs"])
            args = [next(inputs) if torch.is_tensor(a) else a for a in args]
            graph["replay"], graph["outputs"] = self._record(args, options)
        for there, here in zip(graph["inputs"], tensors):
            there.copy_(here)
        graph["replay"]()
        return graph["outputs"]

    def _on_a_side_stream(self, args, options):
        """The step as it is; off the main stream, as torch asks of calls before a capture."""
        main, self.side = torch.cuda.current_stream(), self.side or torch.cuda.Stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            outputs = self.step(*args, **options)
        main.wait_stream(self.side)
        return outputs

    def _record(self, args, options):
        """Capture the step, which does not run it; returns the function that does, and the tensors it will fill."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.step(*args, **options)
        return graph.replay, outputs


# ------------------------------------------------------------------------------------------------
# The command of a script
# ------------------------------------------------------------------------------------------------


def run_main(main, argv=None, how_to_go_on="--resume goes on after the last finished epoch"):
    """Call main(argv) and return the exit code: a user's mistake becomes one sentence, not a traceback.

    0 finished; 2 bad input, a full disk, or a loss that is not finite; 3 --max-minutes over; 130 Ctrl-C;
    143 SIGTERM. After 3, 130 and 143 the same command with --resume goes on.
    """

    def terminate(signum, frame):
        raise SystemExit(143)

    # torch warns of its own use of torch.jit when forward-mode differentiation is first loaded
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        main(argv)
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TimeLimit as limit:
        print(limit)
        return 3
    except KeyboardInterrupt:
        print(f"\nstopped by Ctrl-C; {how_to_go_on}", file=sys.stderr)
        return 130
    except SystemExit as stop:
        if stop.code == 143:
            print(f"\nstopped by SIGTERM; {how_to_go_on}", file=sys.stderr)
        return stop.code or 0
    finally:
        signal.signal(signal.SIGTERM, previous)


# ------------------------------------------------------------------------------------------------
# The bookkeeping of a run
# ------------------------------------------------------------------------------------------------


class Run:
    """A run's folder: settings.json, curves.csv, curves.png, checkpoint.pt, and the way back from them.

    script: the script's name. what: what is trained, for the default folder's name. settings: the Namespace of
    every setting. Making a Run writes nothing; it raises InputError where the folder holds another run, or
    where --resume finds a damaged checkpoint or one of another experiment.
    """

    def __init__(self, script, what, settings, argv=None):
        self.started = time.monotonic()
        self.script, self.settings = script, settings
        start = ["-m", script] if "." in script else [f"{script}.py"]  # experiments are started as modules
        self.command = shlex.join(["python", *start, *(sys.argv[1:] if argv is None else argv)])
        generated = "" if settings.dataset == "cifar100" else f"{settings.dataset}-"
        name = script.rpartition(".")[2]
        self.directory = Path(settings.out or f"runs/{name}-{generated}{what}-seed{settings.seed}")
        self.checkpoint_path = self.directory / "checkpoint.pt"
        self.previous_path = self.directory / "checkpoint.previous.pt"
        self.settings_path = self.directory / "settings.json"
        self.curves_path = self.directory / "curves.csv"
        self.plot_path = self.directory / "curves.png"
        self.rows, self.checkpoint, self.damaged, self.next_plot = [], None, None, 0.0

        if self.directory.exists():
            if not self.directory.is_dir():
                raise InputError(f"--out {self.directory} is a file; name a folder")
            self._lock()
        if settings.resume:
            self.checkpoint = self._load_checkpoint()
        elif not settings.overwrite and self.directory.exists() and any(self.directory.iterdir()):
            raise InputError(
                f"{self.directory} is there already and is not overwritten; "
                "continue it with --resume, replace it with --overwrite, or name another folder with --out"
            )

    # --- the epoch loop ---

    def epochs(self, iterations, device, **parts):
        """Yield the number of each epoch still to run, 1 to settings.epochs; restores `parts` first on --resume.

        iterations: batches of an epoch, all passes together. parts: everything that a checkpoint holds: modules,
        optimizers and schedulers (anything with a state_dict), and torch.Generators.
        """
        self.parts, self.device = parts, device
        if self.checkpoint is not None:
            self._restore()
        self.first, total = len(self.rows) + 1, self.settings.epochs
        self._open()
        self.session_started = time.monotonic()
        done = (self.first - 1) * iterations
        with tqdm(total=total * iterations, initial=done, disable=None, smoothing=0, dynamic_ncols=True) as self.bar:
            for epoch in range(self.first, total + 1):
                self.epoch, self.epoch_started = epoch, time.monotonic()
                self.bar.set_description(f"epoch {epoch}/{total}")
                yield epoch
        final, best = self.rows[-1], max(self.rows, key=lambda row: row["test_primary_accuracy"])
        print(
            f"finished: test accuracy {100 * final['test_primary_accuracy']:.2f} % in the final epoch, {total}; "
            f"best {100 * best['test_primary_accuracy']:.2f} % in epoch {best['epoch']} (chosen on the test set); "
            f"settings.json, curves.csv, curves.png and checkpoint.pt are in {self.directory}",
            flush=True,
        )

    def end_epoch(self, row):
        """Save the epoch: checkpoint first, then a row of curves.csv; then print it, and stop if time is up.

        row: the epoch's numbers by column. Raises InputError where one, or any weight, is not finite; the last
        checkpoint stays as it was.
        """
        row = {"epoch": self.epoch} | row
        bad = [name for name, value in row.items() if not math.isfinite(value)] or self._modules_not_finite()
        if bad:
            raise InputError(f"{', '.join(bad)}: NaN or infinite at the end of epoch {self.epoch}; {self.last_good()}")
        self.rows.append(row)
        self._save_checkpoint()
        self._write_curves()
        left = self.settings.epochs - self.epoch
        if left == 0 or time.monotonic() > self.next_plot:
            self._plot()

        now = time.monotonic()
        eta = left * (now - self.session_started) / (self.epoch - self.first + 1)
        with tqdm.external_write_mode():
            print(epoch_line(row, self.settings.epochs, eta), flush=True)
        if left and self._seconds_left() < now - self.epoch_started:
            raise TimeLimit(f"stopped after epoch {self.epoch}: the next would not end in time; {self.last_good()}")

    def meter(self, name):
        """A Meter for one pass over the training data; "train" makes columns train_... and seconds_train."""
        return Meter(self, name)

    def tick(self):
        """Count one batch; raises TimeLimit in the midst of an epoch that outlasts --max-minutes."""
        self.bar.update()
        if self._seconds_left() < 0:
            raise TimeLimit(f"stopped in epoch {self.epoch}: the time is over; {self.last_good()}")

    def last_good(self):
        """What is saved so far, in words."""
        return f"saved up to epoch {len(self.rows)}" if self.rows else "no epoch was finished, so nothing is saved yet"

    def _seconds_left(self):
        limit = self.settings.max_minutes
        return math.inf if limit is None else 60 * limit - (time.monotonic() - self.started)

    def _modules_not_finite(self):
        modules = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
        sums = [torch.stack([p.detach().sum() for p in module.parameters()]).sum() for module in modules.values()]
        return [f"a weight of {name}" for name, ok in zip(modules, torch.stack(sums).isfinite().tolist()) if not ok]

    # --- files ---

    def _lock(self):
        """Hold the folder for this Run, so that no second process writes there; raises InputError where one does."""
        for attempt in range(5):  # who only looks whether the folder is free holds the lock for an instant
            with contextlib.suppress(BlockingIOError):
                descriptor = lock(self.directory)
                if descriptor is not None:
                    weakref.finalize(self, os.close, descriptor)
                return
            time.sleep(0.05 * attempt)
        raise InputError(f"another run is at work in {self.directory}; wait for it, or name another folder with --out")

    def _described(self):
        """Every setting, as it stands in settings.json and in a checkpoint."""
        return {"script": self.script} | vars(self.settings)

    def _open(self):
        """Make the folder, or clear it of an earlier run, and write settings.json and the curves so far."""
        sessions = []
        if self.rows:
            if self.damaged:  # or it would take the place of the good one at the next save
                os.replace(self.damaged, self.directory / "checkpoint.damaged.pt")
            if len(self.rows) == self.settings.epochs:  # a kill may have come between the last checkpoint and these
                self._write_curves()
                self._plot()
                return
            before = read_settings(self.settings_path).get("sessions")
            sessions = before if isinstance(before, list) else []
        else:
            try:
                if not self.directory.exists():
                    self.directory.mkdir(parents=True)
                    self._lock()
                for path in (self.checkpoint_path, self.previous_path, self.curves_path, self.plot_path):
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(
                    f"{self.directory} cannot be made or written ({error.strerror}); name another folder with --out"
                ) from None
        session = {"command": self.command} | environment(self.device)
        sessions.append({"after_epoch": len(self.rows)} | session)
        settings = self._described() | session | {"sessions": sessions}
        write_atomically(self.settings_path, json.dumps(settings, indent=2).encode())
        self._write_curves()

    def _write_curves(self):
        if self.rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, self.rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            write_atomically(self.curves_path, text.getvalue().encode())

    def _plot(self):
        start, image = time.monotonic(), io.BytesIO()
        try:
            plot_curves(self.rows, self.directory.name, image)
        except Exception as error:  # whatever ails matplotlib here, a picture must not stop a training
            print(f"warning: {self.plot_path} could not be drawn ({error}); training goes on", file=sys.stderr)
        else:
            write_atomically(self.plot_path, image.getvalue())
        now = time.monotonic()
        self.next_plot = now + 20 * (now - start)  # drawing takes at most 5 % of the time

    def _save_checkpoint(self):
        checkpoint = {
            "settings": self._described(),
            "rows": self.rows,
            "parts": {
                name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
                for name, part in self.parts.items()
            },
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(self.checkpoint_path, content.getbuffer(), keep_previous_as=self.previous_path)

    def _load_checkpoint(self):
        """The newest whole checkpoint of the folder, or None where none was written yet (and says so)."""
        start_anew = "start anew with --overwrite, or in another folder with --out"
        damaged = []
        for path in (self.checkpoint_path, self.previous_path):
            if not path.exists():
                continue
            checkpoint = read_checkpoint(path)
            if checkpoint is None:
                damaged.append(str(path))
                continue
            self._same_experiment(checkpoint["settings"], path)
            epoch = len(checkpoint["rows"])
            if epoch > self.settings.epochs:
                raise InputError(f"{path} has {epoch} epochs already; give --epochs {epoch} or more")
            if damaged:
                self.damaged = damaged[0]
                print(f"warning: {self.damaged} is damaged; {path} is used in its place", file=sys.stderr)
            print(f"resuming {self.directory} after epoch {epoch}", flush=True)
            return checkpoint
        if damaged:
            raise InputError(f"{' and '.join(damaged)}: damaged, and no whole checkpoint is left; {start_anew}")
        if self.curves_path.exists():
            raise InputError(f"{self.directory} has curves but no checkpoint to resume from; {start_anew}")
        if theirs := read_settings(self.settings_path):
            self._same_experiment(theirs, self.settings_path)
        print(f"no checkpoint was written in {self.directory} yet; starting from the beginning", flush=True)
        return None

    def _same_experiment(self, theirs, path):
        details = differences(self._described(), theirs)
        if details:
            raise InputError(
                f"{path} is of another experiment ({details}); give its settings, or another folder with --out"
            )

    def _restore(self):
        try:
            for name, part in self.parts.items():
                state = self.checkpoint["parts"][name]
                part.set_state(state) if isinstance(part, torch.Generator) else part.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"the checkpoint in {self.directory} does not fit this code ({str(error).splitlines()[0]}); "
                "resume with the code that wrote it, or name another folder with --out"
            ) from None
        torch.set_rng_state(self.checkpoint["torch_rng"])
        if self.checkpoint["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(self.checkpoint["cuda_rng"], self.device)
        self.rows = self.checkpoint["rows"]


class Meter:
    """Averages over one pass of the numbers that its steps return, kept on the device until the pass ends."""

    def __init__(self, run, name):
        self.run, self.name, self.names, self.values = run, name, [], []
        self.start = time.perf_counter()

    def add(self, metrics):
        """Add one step's numbers: 0-d tensors by name. Not every step need have the same."""
        self.names.append(list(metrics))
        self.values.append(torch.stack(list(metrics.values())))
        self.run.tick()

    def averages(self):
        """The means by column name, over the steps that had it, and the pass's seconds.

        Raises InputError where a number was not finite. This is where the host waits for the device, once a pass.
        """
        values, columns = iter(torch.cat(self.values).tolist()), {}
        for iteration, names in enumerate(self.names, start=1):
            for name, value in zip(names, values):
                if not math.isfinite(value):
                    raise InputError(
                        f"{name} became NaN or infinite in epoch {self.run.epoch}, iteration {iteration} "
                        f"of the {self.name} pass; {self.run.last_good()}; a smaller learning rate may help"
                    )
                columns.setdefault(name, []).append(value)
        means = {f"{self.name}_{name}": math.fsum(values) / len(values) for name, values in columns.items()}
        return means | {f"seconds_{self.name}": time.perf_counter() - self.start}


def differences(ours, theirs):
    """What makes two runs different experiments, in words; empty where one may continue the other."""
    differ = [name for name in ours if name not in FREE_ON_RESUME and ours[name] != theirs.get(name)]
    return "; ".join(f"{name} was {theirs.get(name)}, now {ours[name]}" for name in differ)


def lock(directory):
    """Lock a folder for this process: a descriptor to close, None where there are no such locks.

    Raises BlockingIOError where another process holds it.
    """
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except (ImportError, OSError) as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None


def read_checkpoint(path):
    """The content of a checkpoint file, on the CPU; None where it is damaged, half written or not of these scripts."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums, zipfile does
            if archive.testzip() is not None:
                return None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"settings": dict, "rows": list, "parts": dict, "torch_rng": torch.Tensor}
        whole = all(isinstance(checkpoint[name], kind) for name, kind in kinds.items()) and "cuda_rng" in checkpoint
        return checkpoint if whole else None
    except PermissionError:
        raise
    except Exception:  # whatever a damaged file makes of zipfile, pickle and torch
        return None


def read_settings(path):
    """The dict in a settings.json; an empty one where there is none that can be read."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def write_atomically(path, content, keep_previous_as=None):
    """Write bytes to `path` so that a crash leaves the old or the new file, never half of one.

    Raises InputError where the disk is full or the folder cannot be written; the old file stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous_as and path.exists():
            os.replace(path, keep_previous_as)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"{path} could not be written ({error.strerror}); what was saved before is kept; "
            "make room and go on with --resume, or name another folder with --out"
        ) from None


def environment(device):
    """Where a run takes place: git commit (None outside a repository, "-dirty" if changed), versions, device."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "git_commit": commit,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "torchvision_version": torchvision.__version__,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def processor_name():
    """The CPU's model name where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def epoch_line(row, epochs, eta):
    """One readable line of an epoch's row of curves.csv; `eta` is in seconds."""
    parts = [f"epoch {row['epoch']:3d}/{epochs}"]
    for stage, task in (("train", "primary"), ("train", "auxiliary"), ("test", "primary"), ("test", "auxiliary")):
        if f"{stage}_{task}_loss" in row:
            loss, share = row[f"{stage}_{task}_loss"], row[f"{stage}_{task}_accuracy"]
            parts.append(f"{stage} {task} loss {loss:.3f} acc {100 * share:5.2f} %")
    if "train_auxiliary_classes_used" in row:
        parts.append(f"classes used {100 * row['train_auxiliary_classes_used']:.0f} %")
    seconds = sum(value for name, value in row.items() if name.startswith("seconds_"))
    return " | ".join([*parts, f"{seconds:.1f} s, {tqdm.format_interval(eta)} left"])


def plot_curves(rows, title, file):
    """Draw curves.png: accuracies, losses and, where there are any, labels and cosine similarities, over the epochs."""
    from matplotlib.figure import Figure

    panels = {"accuracy (%)": "_accuracy", "focal loss": "_loss"}
    panels |= {"entropy of the generated labels (nats)": "_entropy", "auxiliary classes used (%)": "_used"}
    panels |= {"cosine similarity of the tasks' gradients": "_similarity"}
    panels = {heading: [name for name in rows[0] if name.endswith(ending)] for heading, ending in panels.items()}
    panels = {heading: names for heading, names in panels.items() if names}
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    epochs = [row["epoch"] for row in rows]
    for axes, (heading, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name in names:
            colour = "tab:orange" if any(word in name for word in ("auxiliary", "mean", "trunk")) else "tab:blue"
            style = {"test": "-", "train": "--", "meta": ":"}[name.split("_")[0]]
            values = [100 * row[name] if "%" in heading else row[name] for row in rows]
            axes.plot(epochs, values, style, color=colour, label=name.replace("_", " "), marker=".", markersize=3)
        axes.set(xlabel="epoch", ylabel=heading)
        if "similarity" not in heading:
            axes.set_ylim(bottom=0, top=102 if "used" in heading else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(file, format="png", dpi=120)
