"""A run's folder: what is written, resuming to the bit after every kind of stop, damaged files, full disks, NaN."""

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
from conftest import PNG, SCRIPTS, TINY, assert_same_run, curves, flatten, forked, generated, run_script, script_process

import utils
from harness import exits, run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A folder for each script with the run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for name in SCRIPTS:
        assert run_script(name, *TINY, "--out", folder / name, picture=True) == 0
    return folder


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
def test_a_run_writes_settings_curves_plot_and_checkpoint(name, whole_run):
    folder = whole_run / name
    assert {p.name for p in folder.iterdir()} == {
        "settings.json", "curves.csv", "curves.png", "checkpoint.pt",
    }  # fmt: skip
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["script"] == name and settings["seed"] == 0 and settings["width"] == 0.02
    assert settings["learning_rate"] == 0.01 and settings["halve_every"] == 50 and settings["focal_gamma"] == 2.0
    assert settings["torch_version"] == torch.__version__ and settings["device_name"]
    assert settings["command"].startswith(f"python {name}.py --dataset synthetic --width 0.02")
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    rows = curves(folder, with_seconds=True)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    expected = {"epoch", "learning_rate", "train_primary_loss", "train_primary_accuracy", "seconds_train",
                "test_primary_loss", "test_primary_accuracy", "seconds_test"}  # fmt: skip
    if name != "model_vgg_single":
        expected |= {"train_auxiliary_loss", "train_auxiliary_accuracy"}
    if name == "model_vgg_human":
        expected |= {"test_auxiliary_loss", "test_auxiliary_accuracy"}
    if name == "model_vgg_maxl":
        expected |= {"label_learning_rate", "train_label_entropy", "train_auxiliary_classes_used",
                     "meta_lookahead_primary_loss", "meta_mean_label_entropy", "seconds_meta"}  # fmt: skip
    assert rows[0].keys() == expected
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    for part in {"network", "optimizer", "scheduler", "generator"}:
        assert part in checkpoint["parts"]
    if name == "model_vgg_maxl":
        assert {"label_generator", "label_optimizer", "label_scheduler"} <= checkpoint["parts"].keys()


def test_the_test_columns_are_the_checkpoints_accuracy_and_loss(whole_run):
    """Recomputed here from the saved weights, image by image."""
    checkpoint = torch.load(whole_run / "model_vgg_human/checkpoint.pt", weights_only=True)
    network = utils.Network(utils.VGG16(0.02), 20, 100).eval()
    network.load_state_dict(checkpoint["parts"]["network"])
    images, labels = generated(train=False, seed=0, count=200)
    x = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    with torch.no_grad():
        p = [logits.double().softmax(dim=1) for logits in network(x)]
    row = curves(whole_run / "model_vgg_human")[-1]
    for task, level, q in (("primary", 2, p[0]), ("auxiliary", 3, p[1])):
        target = labels[:, level]
        assert float(row[f"test_{task}_accuracy"]) == pytest.approx((q.argmax(1) == target).double().mean().item())
        q = q[torch.arange(len(q)), target]
        assert float(row[f"test_{task}_loss"]) == pytest.approx((-((1 - q) ** 2) * q.log()).mean().item(), rel=1e-4)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole_run):
    assert run_script("model_vgg_single", *TINY, "--out", "again") == 0
    assert_same_run("again", whole_run / "model_vgg_single")
    assert run_script("model_vgg_single", *TINY, "--out", "other", "--seed", 1) == 0
    assert curves("other") != curves(whole_run / "model_vgg_single")


def test_learning_rates_are_halved_after_every_50_epochs_from_the_papers_values(monkeypatch):
    monkeypatch.setitem(SCRIPTS["model_vgg_maxl"].SETTINGS, "halve_every", 2)
    assert run_script("model_vgg_maxl", *TINY, "--batch-size", 60, "--epochs", 5, "--out", "r") == 0
    rates = [(float(row["learning_rate"]), float(row["label_learning_rate"])) for row in curves("r")]
    assert rates == [(0.01, 0.001)] * 2 + [(0.005, 0.0005)] * 2 + [(0.0025, 0.00025)]


def test_optimizers_and_initial_weights_are_the_published_ones(monkeypatch):
    """Plain SGD; Xavier uniform for the multi-task network, Xavier normal and weight decay for the label generator."""
    for rate in ("learning_rate", "label_learning_rate"):  # with rates of 0 the saved weights are the initial ones
        monkeypatch.setitem(SCRIPTS["model_vgg_maxl"].SETTINGS, rate, 0.0)
    assert run_script("model_vgg_maxl", *TINY, "--width", 0.1, "--batch-size", 60, "--epochs", 1, "--out", "r") == 0
    parts = torch.load("r/checkpoint.pt", weights_only=True)["parts"]
    for name, weight_decay in (("optimizer", 0), ("label_optimizer", 5e-4)):
        (group,) = parts[name]["param_groups"]
        assert (group["momentum"], group["dampening"], group["nesterov"]) == (0, 0, False)
        assert group["weight_decay"] == weight_decay
    for name, uniform in (("network", True), ("label_generator", False)):
        weight = parts[name]["trunk.layers.34.weight"]  # a convolution of 51 to 51 channels
        std = math.sqrt(2 / (2 * 51 * 9))
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert (weight.abs().max().item() <= math.sqrt(3) * std) == uniform


def test_an_epoch_is_a_pass_of_multi_task_steps_then_one_of_meta_steps(monkeypatch):
    """Algorithm 1, with 120 images in batches of 20."""
    maxl, order = SCRIPTS["model_vgg_maxl"], []
    for module, name in ((utils, "multi_task_step"), (maxl, "meta_training_step")):
        original = getattr(module, name)

        def logged(*arguments, original=original, name=name, **options):
            order.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, logged)
    assert run_script("model_vgg_maxl", *TINY, "--epochs", 2, "--out", "r") == 0
    assert order == (["multi_task_step"] * 6 + ["meta_training_step"] * 6) * 2


@pytest.mark.parametrize("name", ["model_vgg_human", "model_vgg_maxl"])
def test_the_cosine_similarity_is_taken_at_every_nth_iteration_and_averaged_over_these(name, monkeypatch):
    original, asked, values = utils.multi_task_step, [], []

    def logged(*arguments, cosine=False):
        *arguments, cosine = (*arguments, cosine) if len(arguments) == 6 else arguments
        metrics = original(*arguments, cosine=cosine)
        asked.append(cosine)
        if cosine:
            values.append(metrics["cosine_similarity"].item())
        return metrics

    monkeypatch.setattr(utils, "multi_task_step", logged)
    assert run_script(name, *TINY, "--epochs", 2, "--cosine-every", 4, "--out", "r") == 0
    assert asked == [True, False, False, False, True, False] * 2
    found = [float(row["train_cosine_similarity"]) for row in curves("r")]
    assert found == pytest.approx([sum(values[:2]) / 2, sum(values[2:]) / 2])
    assert run_script(name, *TINY, "--epochs", 3, "--cosine-every", 4, "--out", "r", "--resume") == 0
    assert run_script(name, *TINY, "--epochs", 2, "--out", "without") == 0
    (row, *_) = curves("without")
    assert not any("cosine" in column for column in row)


# --- resuming -------------------------------------------------------------------------------------


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


def wait_for_an_epoch(process):
    while not Path("r/curves.csv").exists() and process.exitcode is None:
        time.sleep(0.01)


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


# --- damage, full disks, other experiments ----------------------------------------------------------


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


def test_a_second_process_in_the_same_folder_is_refused(whole_run, capsys):
    process = forked(run_script, "model_vgg_single", *TINY, "--epochs", 10_000, "--out", "r")
    wait_for_an_epoch(process)
    for word in ("--resume", "--overwrite"):
        assert run_script("model_vgg_single", *TINY, "--epochs", 10_000, "--out", "r", word) == 2
        assert "another run is at work in r" in capsys.readouterr().err
    process.kill()
    process.join()
    done = len(curves("r"))
    assert run_script("model_vgg_single", *TINY, "--epochs", done + 1, "--out", "r", "--resume") == 0


def test_a_picture_that_cannot_be_drawn_does_not_stop_the_training(whole_run, monkeypatch, capsys):
    def broken(*arguments):
        raise ValueError("no such backend")

    monkeypatch.setattr(run, "plot_curves", broken)
    assert run_script("model_vgg_single", *TINY, "--out", "r", picture=True) == 0
    assert "warning: r/curves.png could not be drawn (no such backend)" in capsys.readouterr().err
    assert_same_run("r", whole_run / "model_vgg_single")


def test_a_folder_may_have_any_name():
    name = "cost_$5_and_$6 ü"
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", name, picture=True) == 0
    assert (Path(name) / "curves.png").read_bytes().startswith(PNG)


def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(whole_run, monkeypatch, capsys):
    with monkeypatch.context() as patch:

        def full(descriptor):
            """The disk is full when the second checkpoint is written."""
            if Path("r/checkpoint.pt").exists() and Path("r/checkpoint.pt.tmp").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        assert run_script("model_vgg_single", *TINY, "--out", "r") == 2
    error = capsys.readouterr().err
    assert "checkpoint.pt could not be written (No space left on device)" in error and error.count("\n") == 1
    assert len(torch.load("r/checkpoint.pt", weights_only=True)["rows"]) == 1
    assert not list(Path("r").glob("*.tmp"))
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--resume") == 0
    assert_same_run("r", whole_run / "model_vgg_single")


@pytest.mark.parametrize(
    "name, changed, said",
    [
        ("model_vgg_single", ["--seed", 1], "seed was 0, now 1"),
        (
            "model_vgg_single",
            ["--width", 0.04, "--batch-size", 60],
            "batch_size was 20, now 60; width was 0.02, now 0.04",
        ),
        ("model_vgg_human", [], "script was model_vgg_single, now model_vgg_human"),
    ],
)
def test_another_experiments_checkpoint_is_refused_with_what_differs(name, changed, said, capsys):
    assert run_script("model_vgg_single", *TINY, "--epochs", 1, "--out", "r") == 0
    before = {p.name: p.read_bytes() for p in Path("r").iterdir()}
    capsys.readouterr()
    assert run_script(name, *TINY, *changed, "--out", "r", "--resume") == 2
    error = capsys.readouterr().err
    assert "is of another experiment" in error and said in error and error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in Path("r").iterdir()} == before


def test_an_existing_folder_is_kept_unless_a_plain_word_says_otherwise(whole_run, capsys):
    Path("r").mkdir()
    Path("r/notes.txt").write_text("mine")
    assert run_script("model_vgg_single", *TINY, "--out", "r") == 2
    assert "r is there already and is not overwritten" in capsys.readouterr().err
    assert [p.name for p in Path("r").iterdir()] == ["notes.txt"]
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--overwrite", "--seed", 1) == 0
    assert run_script("model_vgg_single", *TINY, "--out", "r", "--overwrite") == 0
    assert Path("r/notes.txt").read_text() == "mine"
    assert_same_run("r", whole_run / "model_vgg_single")


@pytest.mark.parametrize("where", ["train", "meta"])
def test_a_loss_that_is_not_finite_stops_with_epoch_and_iteration(where, monkeypatch, capsys):
    """In epoch 2 (6 iterations a pass), at the fourth iteration of the pass."""
    script, step = SCRIPTS["model_vgg_maxl"], {"train": utils, "meta": SCRIPTS["model_vgg_maxl"]}[where]
    function = {"train": "multi_task_step", "meta": "meta_training_step"}[where]
    original, calls = getattr(step, function), 0

    def broken(*arguments, **options):
        nonlocal calls
        calls += 1
        metrics = original(*arguments, **options)
        return {k: v * float("nan") if calls == 6 + 4 else v for k, v in metrics.items()}

    monkeypatch.setattr(step, function, broken)
    assert script.SETTINGS["learning_rate"] == 0.01
    assert run_script("model_vgg_maxl", *TINY, "--out", "r") == 2
    error = capsys.readouterr().err
    assert f"became NaN or infinite in epoch 2, iteration 4 of the {where} pass; saved up to epoch 1" in error
    assert len(curves("r")) == 1
    assert all(
        torch.isfinite(v).all()
        for v in flatten(torch.load("r/checkpoint.pt", weights_only=True)).values()
        if torch.is_tensor(v) and v.is_floating_point()
    )


def test_weights_that_are_not_finite_are_never_saved(monkeypatch, capsys):
    """Those of the label generator after its very last update, which no loss of the epoch has seen."""
    script = SCRIPTS["model_vgg_maxl"]
    original, calls = script.meta_training_step, 0

    def broken(network, label_generator, *arguments, **options):
        nonlocal calls
        calls += 1
        metrics = original(network, label_generator, *arguments, **options)
        if calls == 12:
            next(label_generator.parameters()).data.fill_(float("inf"))
        return metrics

    monkeypatch.setattr(script, "meta_training_step", broken)
    assert run_script("model_vgg_maxl", *TINY, "--out", "r") == 2
    assert "a weight of label_generator: NaN or infinite at the end of epoch 2" in capsys.readouterr().err
    assert len(torch.load("r/checkpoint.pt", weights_only=True)["rows"]) == 1
