"""A script like the three of the repository, with a linear model on random numbers: a run takes a few milliseconds."""

import torch
import torch.nn.functional as F
from conftest import shortcuts

from harness import exits
from harness.acceleration import autocast, place, select_device
from harness.command_line import parse_settings
from harness.run import Run

SETTINGS = {"primary_level": 0, "epochs": 3, "batch_size": 10, "learning_rate": 0.1, "halve_every": 2}
BATCHES = 6  # of an epoch


def load():
    """Where a script loads its data, for tests that do something meanwhile."""


def step(network, optimizer, images, labels):
    loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"primary_loss": loss.detach()}


def evaluate(network):
    return {"test_primary_accuracy": torch.rand(()).item(), "seconds_test": 0.0}  # of torch's own generator


def make_optimizer(network, settings):
    return torch.optim.SGD(network.parameters(), settings.learning_rate, momentum=0.9)


def main(argv=None):
    settings = parse_settings(__doc__, SETTINGS, argv)
    device = select_device(settings)
    training = Run("toy", settings, argv)
    load()
    torch.manual_seed(settings.seed)
    parts = place({"network": torch.nn.Sequential(torch.nn.Linear(5, 3))}, device, settings)
    parts["optimizer"] = make_optimizer(parts["network"], settings)
    parts["scheduler"] = torch.optim.lr_scheduler.StepLR(parts["optimizer"], settings.halve_every, gamma=0.5)
    generator = parts["generator"] = torch.Generator().manual_seed(settings.seed)
    for _ in training.epochs(BATCHES, device, parts):
        row = {"learning_rate": parts["optimizer"].param_groups[0]["lr"]}
        meter = training.meter("train")
        for _ in range(BATCHES):
            images = torch.randn(settings.batch_size, 5, generator=generator)
            with autocast(device, settings):
                metrics = step(parts["network"], parts["optimizer"], images, images.argmax(dim=1) % 3)
            meter.add(metrics)
        row |= meter.averages() | evaluate(parts["network"])
        parts["scheduler"].step()
        training.end_epoch(row)


def toy(*arguments, **changed):
    """The toy's main() as its command would run it; returns the exit code. changed: options of shortcuts."""
    with shortcuts(**changed):
        return exits.run_main(main, [str(argument) for argument in arguments])


def epochs_saved(folder):
    """In the checkpoint; curves.csv may have fewer if the run was killed between writing the two."""
    return len(torch.load(folder / "checkpoint.pt", weights_only=True)["rows"])
