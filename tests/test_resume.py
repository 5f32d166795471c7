"""Resuming bit-identically after every kind of stop; damaged checkpoints. With the toy; test_run.py has the scripts."""

import errno
import itertools
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
import toy as toy_script
from conftest import assert_same_run, curves, forked, wait_for_an_epoch
from toy import epochs_saved, toy

from harness import exits


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "toy"
    assert toy("--out", folder) == 0
    return folder


def stop_in(epoch, error, code, monkeypatch, batch=4):
    """Raise the error, made anew as it would keep the run alive, in the midst of an epoch, in its n-th batch."""
    original, calls = toy_script.step, itertools.count(1)

    def stopping(*arguments):
        if next(calls) == (epoch - 1) * toy_script.BATCHES + batch:
            raise error(code)
        return original(*arguments)

    monkeypatch.setattr(toy_script, "step", stopping)


@pytest.fixture
def two_epochs(every_epoch_is_saved):
    """The folder r, with a checkpoint of its second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in(3, KeyboardInterrupt, 130, patch)
        assert toy("--out", "r") == 130
    assert epochs_saved(Path("r")) == 2


# --- kill -9 ----------------------------------------------------------------------------------------


def run_and_die(dies, *arguments):
    """The toy in a copy of this process that ends, as by kill -9, at the first rename or sync where `dies` says so.

    dies: called with the operation's name and arguments. Returns whether it came to that.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for operation in (os.replace, os.fsync):

                def dying(*files, operation=operation):
                    if dies(operation.__name__, *files):
                        os._exit(9)
                    operation(*files)

                setattr(os, operation.__name__, dying)
            code = toy(*arguments)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def nth(call, wanted=lambda name, *files: True):
    """True at the nth of the operations that are wanted."""
    count = itertools.count(1)
    return lambda *operation: wanted(*operation) and next(count) == call


def renames_a_checkpoint(name, *files):
    return name == "replace" and "checkpoint" in str(files[0])


def test_killed_at_any_file_operation_it_resumes_bit_identically(whole, every_epoch_is_saved):
    """The process ends at the nth rename or sync of a run, among them half-way through writing a checkpoint."""
    for call in itertools.count(1):
        if not run_and_die(nth(call), "--out", f"r{call}"):
            break
        assert toy("--out", f"r{call}", "--resume") == 0
        assert_same_run(f"r{call}", whole)
    assert call > 20  # three epochs write the checkpoint, the curves and the picture


def test_killed_where_not_every_epoch_is_saved_the_curves_are_never_ahead(
    whole, only_the_first_and_the_last_epoch_are_saved, capsys
):  # fmt: skip
    assert run_and_die(nth(2, renames_a_checkpoint), "--out", "r")
    assert len(curves("r")) == epochs_saved(Path("r")) == 1
    assert toy("--out", "r", "--resume") == 0
    assert "resuming r after epoch 1" in capsys.readouterr().out
    assert_same_run("r", whole)


# --- other ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code", [(KeyboardInterrupt, 130), (SystemExit, 143), (exits.InputError, 2), (OSError, 2)]
)
def test_what_ends_a_run_in_the_midst_of_an_epoch_saves_the_epochs_before_it(
    error, code, whole, only_the_first_and_the_last_epoch_are_saved, monkeypatch
):  # fmt: skip
    """In the third epoch; the second was not saved at its end."""
    with monkeypatch.context() as patch:
        stop_in(3, error, code, patch)
        assert toy("--out", "r") == code
    assert len(curves("r")) == 2
    assert toy("--out", "r", "--resume") == 0
    assert_same_run("r", whole)


@pytest.mark.parametrize("stop, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_process_resumes_bit_identically(stop, code):
    process = forked(toy, "--epochs", 1_000_000, "--out", "r")
    wait_for_an_epoch(process)
    os.kill(process.pid, stop)
    process.join(60)
    assert process.exitcode == code
    errors = Path("errors").read_text()
    assert "Traceback" not in errors and (code < 0 or "; --resume goes on" in errors)
    more = ["--epochs", epochs_saved(Path("r")) + 1]
    assert toy(*more, "--out", "r", "--resume") == 0
    assert toy(*more, "--out", "whole") == 0
    assert_same_run("r", "whole")


def test_max_minutes_saves_and_ends_with_its_own_exit_code(whole, monkeypatch, capsys):
    """The clock is turned forward: an hour for every epoch, with two hours and a half to go."""
    hours, real, evaluate = [], time.monotonic, toy_script.evaluate
    monkeypatch.setattr(time, "monotonic", lambda: real() + 3600 * len(hours))
    monkeypatch.setattr(toy_script, "evaluate", lambda network: (hours.append(1), evaluate(network))[1])
    assert toy("--out", "r", "--max-minutes", 150) == 3
    assert len(curves("r")) == 2 and "saved up to epoch 2" in capsys.readouterr().out
    assert toy("--out", "r", "--resume", "--max-minutes", 150) == 0
    assert_same_run("r", whole)


def test_max_minutes_ends_an_epoch_that_outlasts_it(whole, capsys):
    assert toy("--out", "r", "--max-minutes", 1e-9) == 3
    assert "no epoch was finished, so nothing is saved yet" in capsys.readouterr().out
    assert toy("--out", "r", "--resume") == 0
    assert "no checkpoint was written in r yet; starting from the beginning" in capsys.readouterr().out
    assert_same_run("r", whole)


def test_resuming_a_finished_run_changes_nothing(whole, capsys):
    shutil.copytree(whole, "r")
    before = {p.name: p.read_bytes() for p in Path("r").iterdir()}
    assert toy("--out", "r", "--resume") == 0
    assert "finished: test accuracy" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path("r").iterdir()} == before
    assert toy("--epochs", 2, "--out", "r", "--resume") == 2
    assert "r/checkpoint.pt has 3 epochs already; give --epochs 3 or more" in capsys.readouterr().err


# --- damage -----------------------------------------------------------------------------------------


def flip_a_bit(path, where):
    """In the content of one of the archive's entries; the space between them means nothing."""
    content, entries = bytearray(path.read_bytes()), zipfile.ZipFile(path).infolist()
    start = [entry for entry in entries if entry.file_size][int(len(entries) * where)].header_offset
    name, extra = (int.from_bytes(content[start + i : start + i + 2], "little") for i in (26, 28))
    content[start + 30 + name + extra] ^= 1
    path.write_bytes(content)


def cut(path, where):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * where)])


@pytest.mark.parametrize("damage, where", [(flip_a_bit, 0.3), (flip_a_bit, 0.7), (cut, 0.999), (cut, 0.0)])
def test_a_damaged_checkpoint_is_refused_and_left_alone(damage, where, two_epochs, capsys):
    damage(Path("r/checkpoint.pt"), where)
    before = {p.name: p.read_bytes() for p in Path("r").iterdir()}
    assert toy("--out", "r", "--resume") == 2
    error = capsys.readouterr().err
    assert "error: r/checkpoint.pt is damaged; run it anew with --overwrite" in error and error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in Path("r").iterdir()} == before


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(two_epochs, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", broken)
    assert toy("--out", "r", "--resume") == 2
    error = capsys.readouterr().err
    assert "Input/output error" in error and "damaged" not in error and "--overwrite" not in error


def test_curves_without_a_checkpoint_are_not_written_over(whole, capsys):
    shutil.copytree(whole, "r")
    Path("r/checkpoint.pt").unlink()
    assert toy("--out", "r", "--resume") == 2
    assert "has curves but no checkpoint" in capsys.readouterr().err
    assert curves("r") == curves(whole)


@pytest.mark.parametrize("content", ['{"sessions": 5}', "{", "\xff"])
def test_a_damaged_settings_file_does_not_stop_a_resume(content, whole, two_epochs):
    Path("r/settings.json").write_text(content, encoding="latin1")
    assert toy("--out", "r", "--resume") == 0
    assert_same_run("r", whole)
