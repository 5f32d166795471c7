"""Ways in which a run was once lost or mixed with another without a word."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import toy as toy_script
from toy import epochs_saved, toy

from harness import files, folder


def in_batch(number, action, monkeypatch):
    """Do something in the n-th batch of a toy run."""
    original, calls = toy_script.step, iter(range(1, 1000))

    def step(*arguments):
        if next(calls) == number:
            action()
        return original(*arguments)

    monkeypatch.setattr(toy_script, "step", step)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_removed_or_replaced_meanwhile_is_not_written(replaced, monkeypatch, capsys, every_epoch_is_saved):
    def remove():
        shutil.rmtree("r")
        if replaced:
            Path("r").mkdir()
            os.close(files.lock(Path("r")))

    in_batch(toy_script.BATCHES + 1, remove, monkeypatch)
    assert toy("--out", "r") == 2
    assert "r was removed or replaced while this run was at work in it" in capsys.readouterr().err
    assert not Path("r/checkpoint.pt").exists() and not Path("r/curves.csv").exists()


def test_a_closed_terminal_saves_what_is_finished(monkeypatch, only_the_first_and_the_last_epoch_are_saved):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # a test may run under nohup
    in_batch(2 * toy_script.BATCHES + 1, lambda: os.kill(os.getpid(), signal.SIGHUP), monkeypatch)
    assert toy("--out", "r") == 143
    assert epochs_saved(Path("r")) == 2


def test_a_signal_while_a_checkpoint_is_written_does_not_lose_it(monkeypatch, every_epoch_is_saved):
    original, calls = folder.Folder.save, iter(range(1, 100))

    def save(self, state):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, state)

    monkeypatch.setattr(folder.Folder, "save", save)
    assert toy("--out", "r") == 143
    assert epochs_saved(Path("r")) == 2


@pytest.mark.parametrize("change, said", [
    (lambda n, s: torch.optim.SGD(n.parameters(), s.learning_rate), "momentum 0.9"),
    (lambda n, s: torch.optim.SGD(n.parameters(), s.learning_rate, 0.9, weight_decay=0.1), "weight_decay 0.1"),
])  # fmt: skip
def test_an_optimizer_edited_before_a_resume_is_refused(change, said, monkeypatch, capsys):
    assert toy("--out", "r", "--epochs", 1) == 0
    monkeypatch.setattr(toy_script, "make_optimizer", change)
    assert toy("--out", "r", "--resume") == 2
    error = capsys.readouterr().err
    assert "optimizer was SGD with momentum 0.9" in error and said in error


def test_resume_in_a_folder_of_other_files_touches_nothing(capsys):
    Path("mine").mkdir()
    Path("mine/curves.png").write_text("my own")
    assert toy("--out", "mine", "--resume") == 2
    assert "mine holds other files and no run to resume" in capsys.readouterr().err
    assert Path("mine/curves.png").read_text() == "my own" and not Path("mine/settings.json").exists()


def test_a_statistic_that_is_not_finite_is_never_saved(monkeypatch, capsys):
    def poison(network):
        network.register_buffer("statistic", torch.tensor(float("nan")), persistent=True)
        return {"test_primary_accuracy": 0.5, "seconds_test": 0.0}

    monkeypatch.setattr(toy_script, "evaluate", poison)
    assert toy("--out", "r") == 2
    assert "a weight or statistic of network: NaN" in capsys.readouterr().err
    assert not Path("r/checkpoint.pt").exists()
