"""Resuming to the bit after every kind of stop; damaged checkpoints and what else is found in a folder."""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import PNG, SCRIPTS, TINY, assert_same_run, curves, forked, run_script, script_process, wait_for_an_epoch

import utils
from harness import exits, run


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A folder with a run of model_vgg_single that was stopped amid its third epoch."""
    script, folder, count = SCRIPTS["model_vgg_single"], tmp_path_factory.mktemp("stopped") / "r", itertools.count(1)
    original = script.train_epoch

    def stopping(*arguments):
        if next(count) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train_epoch", stopping)
        assert run_script("model_vgg_single", *TINY, "--out", folder) == 130
    return folder


@pytest.fixture
def two_epochs(stopped_run):
    """The same in the folder r of this test, with a checkpoint of its second and of its first epoch."""
    shutil.copytree(stopped_run, "r")
    assert len(curves("r")) == 2 and Path("r/checkpoint.previous.pt").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_shorter_run_resumed_is_the_longer_run_to_the_bit(name, whole_run):
    assert run_script(name, *TINY, "--epochs", 1, "--out", "r") == 0
    assert run_script(name, *TINY, "--resume", "--out", "r") == 0
    assert_same_run("r", whole_run / name)
    settings = json.loads(Path("r/settings.json").read_text())
    assert [session["after_epoch"] for session in settings["sessions"]] == [0, 1]


def run_and_die(dies, *arguments):
    """The script in a copy of this process that ends, as by kill -9, at the first rename or sync where `dies` says so.

    dies: called with the operation's name and arguments.
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
            code = run_script(*arguments)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def nth(call, wanted=lambda name, *files: True):
    """True at the nth of the operations that are wanted."""
    count = itertools.count(1)
    return lambda *operation: wanted(*operation) and next(count) == call


@pytest.fixture
def every_epoch_is_saved(monkeypatch):
    monkeypatch.setattr(run, "_seldom", lambda start: 0.0)


@pytest.fixture
def only_the_first_and_the_last_epoch_are_saved(monkeypatch):
    monkeypatch.setattr(run, "_seldom", lambda start: math.inf)


@pytest.mark.parametrize("call", range(1, 14))
def test_killed_at_any_file_operation_it_resumes_to_the_bit(call, whole_run, every_epoch_is_saved):
    """The process ends at the nth rename or sync of a run, among them half-way through writing a checkpoint."""
    run_and_die(nth(call), "model_vgg_single", *TINY, "--out", "r")
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 0
    assert_same_run("r", whole_run / "model_vgg_single")


def test_killed_where_epochs_are_not_saved_one_by_one_the_curves_are_never_ahead(
    whole_run, only_the_first_and_the_last_epoch_are_saved, capsys
):
    last = nth(2, lambda name, *files: "checkpoint.pt.tmp" in str(files[0]))
    run_and_die(last, "model_vgg_single", *TINY, "--out", "r")
    assert len(curves("r")) == len(torch.load("r/checkpoint.previous.pt", weights_only=True)["rows"]) == 1
    capsys.readouterr()
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 0
    assert "resuming r after epoch 1" in capsys.readouterr().out
    assert_same_run("r", whole_run / "model_vgg_single")


@pytest.mark.parametrize("stop, code", [(KeyboardInterrupt, 130), (SystemExit, 143), (exits.InputError, 2)])
def test_what_ends_a_run_in_the_midst_of_an_epoch_saves_the_epochs_before_it(
    stop, code, whole_run, only_the_first_and_the_last_epoch_are_saved, monkeypatch
):
    """In the third epoch, after some steps of it; the second was not saved at its end."""
    script, count = SCRIPTS["model_vgg_maxl"], itertools.count(1)
    original = script.meta_training_step

    def stopping(*arguments, **options):
        if next(count) == 2 * 6 + 3:
            assert len(curves("r")) == 1
            raise stop(code)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(script, "meta_training_step", stopping)
        assert run_script("model_vgg_maxl", *TINY, "--out", "r") == code
    assert len(curves("r")) == 2
    assert run_script("model_vgg_maxl", *TINY, "--out", "r", "--resume") == 0
    assert_same_run("r", whole_run / "model_vgg_maxl")


def test_saving_and_drawing_take_a_twentieth_of_the_time(monkeypatch):
    """The clock moves only where something is done: an epoch 1 s, a checkpoint 0.2 s, a picture 0.1 s."""
    now, saved, drawn = 0.0, [], []

    class Clock:
        monotonic = perf_counter = staticmethod(lambda: now)
        strftime = time.strftime

    original = run.write_atomically

    def writing(path, content, **options):
        nonlocal now
        if path.name == "checkpoint.pt":
            now += 0.2
            saved.append(now)
        original(path, content, **options)

    def drawing(rows, title, file):
        nonlocal now
        now += 0.1
        drawn.append(now)

    def evaluating(*arguments):
        nonlocal now
        now += 1.0
        return {"test_primary_loss": 1.0, "test_primary_accuracy": 0.5}

    monkeypatch.setattr(run, "time", Clock)
    monkeypatch.setattr(run, "write_atomically", writing)
    monkeypatch.setattr(run, "plot_curves", drawing)
    monkeypatch.setattr(utils, "evaluate", evaluating)
    few = [*TINY, "--train-images", 100, "--batch-size", 50, "--epochs", 41]
    assert run_script("model_vgg_single", *few, "--out", "r", picture=True) == 0
    for times, seconds in ((saved, 0.2), (drawn, 0.1)):
        gaps = [later - earlier for earlier, later in zip(times, times[1:])]
        assert all(20 * seconds < gap < 20 * seconds + 1.6 for gap in gaps[:-1])
        assert len(gaps) > 41 / (20 * seconds + 1.6)
    assert len(curves("r")) == 41


@pytest.mark.parametrize(
    "stop, code, said",
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGTERM, 143, "stopped by SIGTERM; --resume"),
        (signal.SIGINT, 130, "stopped by Ctrl-C; --resume"),
    ],
)
def test_a_stopped_process_resumes_to_the_bit(stop, code, said, whole_run):
    process = forked(run_script, "model_vgg_maxl", *TINY, "--epochs", 1000, "--out", "r")
    wait_for_an_epoch(process)
    os.kill(process.pid, stop)
    process.join(60)
    assert process.exitcode == code
    errors = Path("errors").read_text()
    assert said in errors and "Traceback" not in errors
    whole, epochs = whole_run / "model_vgg_maxl", 1 + len(curves("r"))
    if epochs > 3:  # on a slow machine more were finished before the signal
        whole = "whole"
        assert run_script("model_vgg_maxl", *TINY, "--epochs", epochs, "--out", whole) == 0
    assert run_script("model_vgg_maxl", *TINY, "--epochs", max(3, epochs), "--out", "r", "--resume") == 0
    assert_same_run("r", whole)


@pytest.mark.parametrize("stop, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_within_a_finalizer_stops_the_run_all_the_same(stop, code, capsys):
    """As while a module that is imported late gives back its lock; Python drops an exception raised there."""
    script = SCRIPTS["model_vgg_single"]
    original = script.train_epoch

    class Finalized:
        def __del__(self):
            signal.raise_signal(stop)

    def dropping(*arguments):
        Finalized()
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train_epoch", dropping)
        assert run_script("model_vgg_single", *TINY, "--out", "r") == code
    errors = capsys.readouterr().err
    assert "stopped by" in errors and "ignored" not in errors and not Path("r/curves.csv").exists()
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", "r", "--resume") == 0


def test_ctrl_c_in_a_terminal_resumes_to_the_bit():
    """In a process as a person starts it."""
    process = script_process("model_vgg_single", *TINY, "--epochs", 1000, "--out", "r")
    while not Path("r/curves.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by Ctrl-C; --resume" in errors and "Traceback" not in errors
    more = [*TINY, "--epochs", 1 + len(curves("r"))]
    assert run_script("model_vgg_single", *more, "--out", "r", "--resume", test_images=2000) == 0
    assert run_script("model_vgg_single", *more, "--out", "whole", test_images=2000) == 0
    assert_same_run("r", "whole")


def test_max_minutes_saves_and_ends_with_its_own_exit_code(whole_run, monkeypatch, capsys):
    """The clock is turned forward: an hour for every epoch, with two hours and a half to go."""
    clock, real = 0.0, time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + clock)
    evaluate = utils.evaluate

    def slow(*arguments):
        nonlocal clock
        clock += 3600
        return evaluate(*arguments)

    monkeypatch.setattr(utils, "evaluate", slow)
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--max-minutes", 150) == 3
    assert len(curves("r")) == 2
    assert "saved up to epoch 2" in capsys.readouterr().out
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume", "--max-minutes", 150) == 0
    assert_same_run("r", whole_run / "model_vgg_single")


def test_max_minutes_ends_an_epoch_that_outlasts_it(whole_run, capsys):
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--max-minutes", 1e-5) == 3
    assert "no epoch was finished, so nothing is saved yet" in capsys.readouterr().out
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 0
    assert "no checkpoint was written in r yet; starting from the beginning" in capsys.readouterr().out
    assert_same_run("r", whole_run / "model_vgg_single")


def test_resuming_where_nothing_is_starts_from_the_beginning_and_says_so(whole_run, capsys):
    assert run_script("model_vgg_single", *TINY, "--out", "new", "--resume") == 0
    assert "no checkpoint was written in new yet; starting from the beginning" in capsys.readouterr().out
    assert_same_run("new", whole_run / "model_vgg_single")


def test_resuming_a_finished_run_changes_nothing(capsys):
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", "r") == 0
    before = {p.name: p.read_bytes() for p in Path("r").iterdir()}
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", "r", "--resume") == 0
    assert "finished: test accuracy" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path("r").iterdir()} == before


def test_resuming_a_longer_run_than_asked_for_is_refused(capsys):
    assert run_script("model_vgg_single", *TINY, "--epochs", 2, "--out", "r") == 0
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", "r", "--resume") == 2
    assert "r/checkpoint.pt has 2 epochs already; give --epochs 2 or more" in capsys.readouterr().err


# --- damage ---------------------------------------------------------------------------------------


def flip_a_bit(path, where):
    """In the content of one of the archive's entries; the space between them means nothing."""
    content, entries = bytearray(path.read_bytes()), zipfile.ZipFile(path).infolist()
    start = [entry for entry in entries if entry.file_size][int(len(entries) * where)].header_offset
    name, extra = (int.from_bytes(content[start + i : start + i + 2], "little") for i in (26, 28))
    content[start + 30 + name + extra] ^= 1
    path.write_bytes(content)


def cut(path, where):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * where)])


def foreign(path, _):
    torch.save([torch.zeros(3)], path)


@pytest.mark.parametrize(
    "damage, where", [(flip_a_bit, 0.3), (flip_a_bit, 0.7), (cut, 0.5), (cut, 0.999), (cut, 0.0), (foreign, 0)]
)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(damage, where, whole_run, two_epochs, capsys):
    damage(Path("r/checkpoint.pt"), where)
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 0
    said = capsys.readouterr()
    assert "r/checkpoint.pt is damaged; r/checkpoint.previous.pt is used in its place" in said.err
    assert "after epoch 1" in said.out
    assert_same_run("r", whole_run / "model_vgg_single")


def test_with_every_checkpoint_damaged_the_run_is_refused_and_left_alone(two_epochs, capsys):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        cut(Path("r") / name, 0.5)
    before = {p.name: p.read_bytes() for p in Path("r").iterdir()}
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 2
    error = capsys.readouterr().err
    assert "r/checkpoint.pt and r/checkpoint.previous.pt: damaged" in error and "--overwrite" in error
    assert {p.name: p.read_bytes() for p in Path("r").iterdir()} == before


@pytest.mark.parametrize("error, said", [
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (MemoryError(), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "out of memory"),
])  # fmt: skip
def test_what_keeps_a_whole_checkpoint_from_being_read_is_no_damage_to_it(error, said, two_epochs, monkeypatch, capsys):
    before = {p.name: p.read_bytes() for p in Path("r").iterdir()}

    def broken(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "load", broken)
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and said in text and "damaged" not in text and "--overwrite" not in text
    assert {p.name: p.read_bytes() for p in Path("r").iterdir()} == before


def test_curves_without_a_checkpoint_are_not_written_over(capsys):
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", "r") == 0
    Path("r/checkpoint.pt").unlink()
    before = curves("r")
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 2
    assert "has curves but no checkpoint" in capsys.readouterr().err
    assert curves("r") == before


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(whole_run, two_epochs, every_epoch_is_saved):
    """Killed between the two renames of the first save after going on from the previous checkpoint."""
    cut(Path("r/checkpoint.pt"), 0.5)
    renamed = nth(1, lambda name, *files: name == "replace" and "checkpoint.pt.tmp" in str(files[0]))
    run_and_die(renamed, "model_vgg_single", *TINY, "--out", "r", "--resume")
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 0
    assert_same_run("r", whole_run / "model_vgg_single")


def test_after_an_error_on_the_gpu_that_lets_nothing_be_read_the_finished_epochs_are_saved(
    whole_run, only_the_first_and_the_last_epoch_are_saved
):
    """In the third epoch the step fails, and whatever would read a tensor."""
    script, calls = SCRIPTS["model_vgg_single"], itertools.count(1)
    step, (images, batch_size) = script.single_step, (120, 20)

    def broken(*arguments, **options):
        if next(calls) > 2 * images // batch_size:
            patch.setattr(torch, "save", broken)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return step(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "single_step", broken)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run_script("model_vgg_single", *TINY, "--out", "r")
    assert len(curves("r")) == 2
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 0
    assert_same_run("r", whole_run / "model_vgg_single")


def test_killed_after_the_last_checkpoint_the_curves_are_completed(whole_run, every_epoch_is_saved):
    last = nth(3, lambda name, *files: name == "replace" and "curves.csv.tmp" in str(files[0]))
    run_and_die(last, "model_vgg_single", *TINY, "--out", "r")
    assert len(curves("r")) == 2
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 0
    assert_same_run("r", whole_run / "model_vgg_single")
    assert Path("r/curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("content", ["[]", "5", "null", '{"sessions": 5}', '{"sessions": null}', "{", "\xff"])
def test_a_settings_file_that_is_none_does_not_stop_a_resume(content, whole_run, two_epochs):
    Path("r/settings.json").write_text(content, encoding="latin1")
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 0
    assert_same_run("r", whole_run / "model_vgg_single")
