"""Shared by the tests: tiny runs of the real scripts, in this process or in one of their own.

Only a run with -m cuda sees a GPU: once torch has counted one, the processes that tests fork cannot differentiate.
"""

import contextlib
import csv
import functools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from tqdm import tqdm

import create_dataset
import model_vgg_human
import model_vgg_maxl
import model_vgg_single
from harness import acceleration, command_line, exits, run

# pytest-xdist's workers have another command line, and inherit this.
if os.environ.setdefault("MAXL_TESTS_SEE_GPU", str("-m cuda" in " ".join(sys.argv))) != "True":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Several tests at once, or a test and its subprocess, would fight for the cores with more threads than there are;
# and results to the bit need the same number of threads in every process.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C

# tqdm's own lock is shared with forked processes: one that is killed while it prints would hold it for ever.
tqdm.set_lock(threading.RLock())

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = {"model_vgg_single": model_vgg_single, "model_vgg_human": model_vgg_human, "model_vgg_maxl": model_vgg_maxl}
TINY = ["--dataset", "synthetic", "--width", "0.02", "--train-images", "120", "--batch-size", "20", "--epochs", "3"]
PNG = b"\x89PNG\r\n\x1a\n"


def pytest_runtest_setup(item):
    """A test finds what a process may set for GPUs off, and one marked cuda is skipped where there is none."""
    acceleration.allow_tf32(False)
    torch.backends.cudnn.benchmark = False
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and a run of its own: python -m pytest -m cuda")


# seen in torch 2.3: no differentiation along v under a dispatch mode, by which benchmarks count and round
in_new_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="torch 2.3 cannot under a dispatch mode"
)


def tf32_allowed():
    """Of matrix products and of convolutions."""
    if not hasattr(torch.backends.cudnn, "conv"):  # torch before 2.9
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return tuple(kind.fp32_precision == "tf32" for kind in (torch.backends.cuda.matmul, torch.backends.cudnn.conv))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Every test starts in a folder of its own, so default paths (runs/, dataset/) touch nothing real."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_test_hangs():
    """A test that takes ten minutes fails."""

    def late(*ignored):
        pytest.fail("still running after 600 s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(600)
    yield
    signal.alarm(0)


@pytest.fixture(autouse=True)
def no_process_stays():
    """Ends what a test that failed left running: its forked processes, and those that these forked."""
    yield
    while FORKED:
        process = FORKED.pop()
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


generate = create_dataset.make_synthetic


@functools.cache
def generated(train, seed, count):
    """So many synthetic images, the same arrays for all runs of this process."""
    with mock.patch.dict(create_dataset.SIZES, synthetic=(count, count)):
        return generate(train, seed)


@contextlib.contextmanager
def shortcuts(images=(1000, 200), picture=False):
    """Spares what takes longer than a tiny run itself: images are few and generated once, the picture is a stub.

    images: for training and test; a process of its own has 10,000 and 2000, and only from as many come the same ones.
    """

    def make_synthetic(train=True, seed=0):
        return generated(train, seed, create_dataset.SIZES["synthetic"][0 if train else 1])

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.dict(create_dataset.SIZES, synthetic=images))
        patches.enter_context(mock.patch.object(create_dataset, "make_synthetic", make_synthetic))
        if not picture:
            stub = mock.patch.object(run, "plot_curves", lambda rows, title, file: file.write(PNG))
            patches.enter_context(stub)
        yield


@pytest.fixture
def spared():
    """The shortcuts in all of the test."""
    with shortcuts():
        yield


@pytest.fixture
def every_epoch_is_saved(monkeypatch):
    monkeypatch.setattr(run, "earliest_repetition", lambda start: 0.0)


@pytest.fixture
def only_the_first_and_the_last_epoch_are_saved(monkeypatch):
    monkeypatch.setattr(run, "earliest_repetition", lambda start: math.inf)


def run_script(name, *arguments, **changed):
    """main() of a script under exits.run_main, as its __main__ block has it; returns the exit code.

    changed: options of shortcuts.
    """
    with shortcuts(**changed):
        return exits.run_main(SCRIPTS[name].main, [str(a) for a in arguments])


FORKED = []  # processes of the test that is running


def forked(function, *arguments, log=None, **options):
    """The function in a copy of this process, started; what it returns is the exit code.

    It spares what a new Python takes to load torch, and can be sent signals like any other process. What it prints is
    in the files `said` and `errors`, or goes to the file `log`.
    """

    first = multiprocessing.parent_process() is None

    def target():
        if first:
            os.setsid()  # a group of its own, which what it forks belongs to
        signal.signal(signal.SIGINT, signal.default_int_handler)
        said, errors = (log, log) if log else (open(name, "w", buffering=1) for name in ("said", "errors"))
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = function(*arguments, **options)
        sys.exit(code)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    FORKED.append(process)
    return process


def script_process(name, *arguments, **options):
    """The script as a person starts it, in a process of its own, output piped."""
    command = [sys.executable, str(REPOSITORY / f"{name}.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A test run in the background ignores Ctrl-C, and what it starts would inherit that.
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **(pipes | options))


def wait_for_an_epoch(process):
    """Until the run in r, which goes on, has its first row."""
    deadline = time.monotonic() + 60
    while not Path("r/curves.csv").exists():
        assert process.exitcode is None and time.monotonic() < deadline, Path("errors").read_text()
        time.sleep(0.01)


def curves(directory, with_seconds=False):
    """The rows of curves.csv as text, without the columns of seconds, which no two runs share."""
    with open(Path(directory) / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if with_seconds or not k.startswith("seconds_")} for row in rows]


class Evil:
    """Makes a folder "evil" when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


@contextlib.contextmanager
def one_sentence(*parts, lines=1):
    """What is in it raises an InputError of so many lines that has all the parts."""
    with pytest.raises(exits.InputError) as error:
        yield
    text = str(error.value)
    assert text.count("\n") == lines - 1
    for part in parts:
        assert part in text


def flatten(value, prefix=""):
    """A nested checkpoint as {path: leaf}."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flatten(item, f"{prefix}/{key}").items()}
    return {prefix: value}


def assert_same_run(directory, other):
    """Curves and everything in the checkpoint are the same to the last bit (but for seconds and run control)."""
    assert curves(directory) == curves(other)
    checkpoints = [torch.load(Path(d) / "checkpoint.pt", weights_only=True) for d in (directory, other)]
    ours, theirs = ({k: v for k, v in flatten(c).items() if "/seconds_" not in k} for c in checkpoints)
    free = {f"/settings/{name}" for name in command_line.FREE_ON_RESUME}
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - free:
        same = torch.equal(ours[name], theirs[name]) if torch.is_tensor(ours[name]) else ours[name] == theirs[name]
        assert same, name
