"""All of Figure 3: five methods, six pairs of levels, three seeds, as 81 runs of the scripts in processes of their own.

    python -m experiments.figure3 --dry-run                        # the plan and how long it will take here
    python -m experiments.figure3                                  # run what is missing, then draw
    python -m experiments.figure3 --pairs 20-100 --seeds 0         # a part of it
    python -m experiments.figure3 --jobs 4                         # four at a time, spread over the visible GPUs
    python -m experiments.figure3 --status                         # how far each run is
    python -m experiments.figure3 --plot                           # figure and table of what is there, also meanwhile
    python -m experiments.figure3 --submitit slurm --submitit-parameters timeout_min=600 slurm_partition=gpu
    python -m experiments.figure3 --quick                          # ten small runs on generated images, in minutes

Options that are not its own go to the scripts as they are: --epochs, --width, --train-images, --precision, --device ...
The same command again continues what is unfinished and skips what is done. One run that fails does not stop the
others. --max-minutes limits each run. Single has no auxiliary task, so it runs once for each primary level and seed.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import datetime
import functools
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import create_dataset
import model_vgg_human
import model_vgg_maxl
import model_vgg_single
import utils
from experiments import figure3_report, model_vgg_kmeans, model_vgg_random, process

PAIRS = {
    f"{create_dataset.LEVEL_CLASSES[primary]}-{create_dataset.LEVEL_CLASSES[auxiliary]}": (primary, auxiliary)
    for primary, auxiliary in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
}
SCRIPTS = {
    "single": model_vgg_single,
    "random": model_vgg_random,
    "kmeans": model_vgg_kmeans,
    "human": model_vgg_human,
    "maxl": model_vgg_maxl,
}
COST = {"single": 1.0, "random": 1.0, "kmeans": 1.1, "human": 1.0, "maxl": 4.7}  # of an epoch, roughly, for time left
SET_HERE = ("--primary-level", "--auxiliary-level", "--psi", "--seed", "--out", "--resume", "--overwrite")


# ------------------------------------------------------------------------------------------------
# The plan
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """One run: a method on a primary level and, but for Single, an auxiliary level, from a seed."""

    method: str
    primary: int
    auxiliary: int | None
    seed: int
    root: Path
    options: tuple = ()  # of the script

    @property
    def name(self):
        levels = [level for level in (self.primary, self.auxiliary) if level is not None]
        return "-".join(
            [self.method, *(str(create_dataset.LEVEL_CLASSES[level]) for level in levels), f"seed{self.seed}"]
        )

    @property
    def folder(self):
        return self.root / self.name

    @property
    def log(self):
        return self.root / "logs" / f"{self.name}.log"

    @property
    def arguments(self):
        """What a person would type after the script's name."""
        arguments = ["--primary-level", str(self.primary)]
        if self.method == "human":
            arguments += ["--auxiliary-level", str(self.auxiliary)]
        elif self.method != "single":
            classes = (create_dataset.LEVEL_CLASSES[level] for level in (self.primary, self.auxiliary))
            psi = create_dataset.balanced_psi(*classes, seed=self.seed)  # the placement is the seed's, for all methods
            arguments += ["--psi", ",".join(map(str, psi))]
        return [*arguments, "--seed", str(self.seed), "--out", str(self.folder), *self.options]

    @property
    def command(self):
        script = SCRIPTS[self.method].__name__
        start = ["-m", script] if "." in script else [os.path.relpath(process.REPOSITORY / f"{script}.py")]
        return [sys.executable, *start, *self.arguments, "--resume"]

    @functools.cached_property
    def settings(self):
        """As the script reads them; raises InputError where it would."""
        try:
            return SCRIPTS[self.method].parse(self.arguments)
        except utils.InputError as error:
            raise utils.InputError(f"{self.method}: {error}") from None

    def epochs_done(self):
        """Rows of its curves.csv."""
        try:
            with open(self.folder / "curves.csv", newline="") as file:
                return sum(1 for _ in csv.DictReader(file))
        except OSError:
            return 0

    def state(self):
        """ "done", "at work", "unfinished" or "not begun"; raises InputError where the folder is of another run."""
        theirs = utils.read_settings(self.folder / "settings.json")
        if not theirs:
            return "not begun"
        differences = utils.differences(vars(self.settings), theirs)
        if differences:
            raise utils.InputError(
                f"{self.folder} is of another experiment ({differences}); give its settings, or another --out"
            )
        done, epochs = self.epochs_done(), self.settings.epochs
        if done > epochs:
            raise utils.InputError(f"{self.folder} has {done} epochs already; give --epochs {done}, or another --out")
        if at_work(self.folder):
            return "at work"
        return "done" if done == epochs else "unfinished"


def at_work(folder):
    """Whether a process holds the folder's lock."""
    try:
        descriptor = utils.lock(folder)
    except BlockingIOError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


def plan(root, pairs=tuple(PAIRS), methods=tuple(SCRIPTS), seeds=(0, 1, 2), options=()):
    """The runs, in the order in which they are started: seed by seed, 20-100 first as the paper's main case."""
    tasks = []
    for seed in seeds:
        for pair in sorted(pairs, key=lambda pair: pair != "20-100"):
            primary, auxiliary = PAIRS[pair]
            for method in ("maxl", "single", "human", "random", "kmeans"):
                if method in methods:
                    level = None if method == "single" else auxiliary
                    tasks.append(Task(method, primary, level, seed, Path(root), tuple(options)))
    return list(dict.fromkeys(tasks))


def estimate(tasks):
    """Seconds of an epoch by method, from a few iterations of each step on this device, with the tasks' settings."""
    from benchmarks import step_cost

    settings = tasks[0].settings
    device = utils.select_device(settings.device)
    bench = step_cost.Bench(device, settings.width, settings.batch_size, **step_cost.acceleration(settings))
    kmeans = model_vgg_kmeans.parse(["--psi", "5*20"])
    kmeans.primary_level = 0  # the benchmark's labels have one level
    cluster = model_vgg_kmeans.ClusterLabels(bench.split, kmeans)

    def kmeans_step():
        cluster(bench.images, bench.primary[:, None])
        bench.human_step()

    bench.rows["K-Means step"] = kmeans_step
    passes = {"single": ["Single step"], "human": ["Human step"], "random": ["Human step"], "kmeans": ["K-Means step"]}
    passes["maxl"] = ["MAXL first pass", f"MAXL second pass, {model_vgg_maxl.SETTINGS['meta_gradient']}"]
    rows = sorted({row for steps in passes.values() for row in steps} | {"data and augmentation", "test"})
    seconds = {row: min(times) for row, times in step_cost.measure(bench, rows, repeats=2).items()}
    images = {"cifar100": (step_cost.TRAIN_IMAGES, step_cost.TEST_IMAGES)}
    images["synthetic"] = create_dataset.SYNTHETIC_TRAIN_IMAGES, create_dataset.SYNTHETIC_TEST_IMAGES
    train_images, test_images = images[settings.dataset]
    sizes = settings.train_images or train_images, test_images
    return {method: step_cost.epoch_seconds(bench, seconds, steps, *sizes) for method, steps in passes.items()}


def show_plan(tasks, jobs):
    """Print every run with its state and command, and the time that the epochs still to run will take."""
    seconds, left = estimate(tasks), 0.0
    for task in tasks:
        state, epochs = task.state(), task.settings.epochs - task.epochs_done()
        left += epochs * seconds[task.method]
        print(f"{state:10s} {duration(epochs * seconds[task.method]):>9s}  {' '.join(['python', *task.command[1:]])}")
    together = f", {duration(left / jobs)} if {jobs} at a time do not slow each other" if jobs > 1 else ""
    print(
        f"{len(tasks)} runs; about {duration(left)} one after the other on this device{together} "
        "(from a few iterations of each step)"
    )


def show_status(tasks):
    """Print how far every run is, and about how long the rest will take, from the epochs run so far."""
    counts, seconds, cost, left = collections.Counter(), 0.0, 0.0, 0.0
    for task in tasks:
        state, epochs = task.state(), task.epochs_done()
        last = last_line(task.log) if state in ("unfinished", "not begun") else ""
        failed = last.startswith("error: ")
        state = "failed" if failed else state
        counts[state] += 1
        print(f"{task.name:24s} {state:10s} epoch {epochs} of {task.settings.epochs} {last if failed else ''}".rstrip())
        if epochs:
            seconds += figure3_report.RunOnDisk(task.folder).seconds
            cost += COST[task.method] * epochs
        left += COST[task.method] * (task.settings.epochs - epochs)
    rest = f"; about {duration(left * seconds / cost)} of runs left, one after the other" if cost and left else ""
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())) + rest)


def last_line(path):
    """The last line of a log with anything in it; empty where there is none."""
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")


def duration(seconds):
    """Seconds in words of hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if seconds >= 60 else f"{seconds:.0f} s"


# ------------------------------------------------------------------------------------------------
# Running it
# ------------------------------------------------------------------------------------------------


class Progress:
    """A bar over the epochs of all runs, weighted by what they cost, and a line for each thing that happens."""

    def __init__(self, tasks):
        self.tasks, self.next_look = tasks, 0.0
        self.bar = tqdm(
            total=self.cost(lambda task: task.settings.epochs), initial=self.cost(Task.epochs_done),
            disable=None, smoothing=0, dynamic_ncols=True, bar_format="{l_bar}{bar}| {elapsed}, {remaining} left",
        )  # fmt: skip

    def cost(self, epochs):
        return sum(COST[task.method] * epochs(task) for task in self.tasks)

    def show(self, **counts):
        if self.bar.disable or time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + 5  # a look reads the curves of all runs
        self.bar.set_description(", ".join(f"{n} {what}" for what, n in counts.items() if n), refresh=False)
        self.bar.n = self.cost(Task.epochs_done)
        self.bar.refresh()

    def say(self, text):
        with tqdm.external_write_mode():
            print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def outcome(task, code):
    """What an ended process was: "done", "unfinished", or why it failed."""
    if code == 0:
        return "done"
    if code == 3:
        return "unfinished"
    if code < 0:
        return f"killed by signal {-code}"
    return last_line(task.log) or f"exit code {code}"


def share_of_machine(slot, jobs):
    """Environment variables for the slot-th of `jobs` runs at a time: its GPU, its share of the cores."""
    variables, gpus = {}, torch.cuda.device_count()
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:  # more threads than cores fight each other
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    return variables


def run_here(tasks, jobs):
    """Run the tasks that are not done, `jobs` at a time; returns {task: "unfinished" or why it failed}.

    A folder that another process is at work in is waited for. Whatever ends this function ends the runs first.
    """
    waiting, running, bad = [task for task in tasks if task.state() != "done"], {}, {}
    progress = Progress(tasks)
    if len(waiting) < len(tasks):
        progress.say(f"{len(tasks) - len(waiting)} of {len(tasks)} runs are done already")
    try:
        while waiting or running:
            for slot in set(range(jobs)) - running.keys():
                ready = ((task, state) for task in waiting if (state := task.state()) != "at work")
                task, state = next(ready, (None, None))
                if task is None:
                    break
                waiting.remove(task)
                if state != "done":  # by another process, meanwhile
                    progress.say(f"started {task.name}")
                    running[slot] = task, process.start(task.command, task.log, **share_of_machine(slot, jobs))
            time.sleep(0.5)
            for slot, (task, run) in list(running.items()):
                code = run.poll()
                if code is None:
                    continue
                del running[slot]
                result = outcome(task, code)
                if code == 2 and at_work(task.folder):
                    waiting.append(task)
                    continue
                if result != "done":
                    bad[task] = result
                progress.say(f"ended {task.name}: {result}")
            progress.show(running=len(running), waiting=len(waiting), failed=len(bad))
    finally:
        process.stop([run for _, run in running.values()])
        progress.bar.close()
    return bad


# ------------------------------------------------------------------------------------------------
# Running it on a cluster
# ------------------------------------------------------------------------------------------------


def run_on_cluster(tasks, cluster, jobs, parameters):
    """Run the tasks that are not done as submitit jobs (an array, on Slurm); as run_here."""
    try:
        import submitit
    except ImportError:
        raise utils.InputError("--submitit needs the package submitit: pip install submitit") from None
    os.environ.update(process.environment())  # the jobs inherit it
    executor = submitit.AutoExecutor(folder=tasks[0].root / "submitit", cluster=cluster)
    if cluster == "slurm":
        parameters = {"name": "maxl", "slurm_array_parallelism": jobs} | parameters
    try:
        executor.update_parameters(**parameters)
    except (ValueError, TypeError, AssertionError, NameError, KeyError) as error:
        raise utils.InputError(f"--submitit-parameters: {error}") from None

    waiting, running, bad = [task for task in tasks if task.state() != "done"], {}, {}
    progress = Progress(tasks)
    at_a_time = len(waiting) if cluster == "slurm" else jobs  # Slurm keeps the number itself
    try:
        while waiting or running:
            batch = [task for task in waiting if task.state() != "at work"][: at_a_time - len(running)]
            waiting = [task for task in waiting if task not in batch]
            if batch:
                with executor.batch():
                    submitted = [executor.submit(process.ClusterJob(task.command, task.log)) for task in batch]
                for task, job in zip(batch, submitted):
                    progress.say(f"submitted {task.name} as job {job.job_id}")
                    running[task] = job, task.epochs_done()
            time.sleep(1 if cluster == "local" else 10)
            for task, (job, epochs) in list(running.items()):
                if not job.done():
                    continue
                del running[task]
                error = job.exception()
                code = job.result() if error is None else None
                result = f"{type(error).__name__}, see {job.paths.stderr}" if error else outcome(task, code)
                if code == 2 and at_work(task.folder):
                    waiting.append(task)
                    continue
                progress.say(f"ended {task.name}: {result}")
                if result == "unfinished" and task.epochs_done() > epochs:  # --max-minutes were over: again
                    waiting.append(task)
                elif result != "done":
                    bad[task] = result
            progress.show(running=len(running), waiting=len(waiting), failed=len(bad))
    finally:
        if running and cluster == "slurm":
            progress.say("the jobs go on; scancel ends them")
        else:
            for job, _ in running.values():
                with contextlib.suppress(Exception):
                    job.cancel()
        progress.bar.close()
    return bad


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    """The runner's settings and the scripts' options. Raises InputError for options that this runner sets itself."""
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--pairs", nargs="+", choices=PAIRS, metavar="P-A", help=f"{', '.join(PAIRS)} (default: all)")
    add(
        "--methods", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), metavar="M",
        help=f"{', '.join(SCRIPTS)} (default: all)",
    )  # fmt: skip
    add("--seeds", nargs="+", type=int, metavar="N", help="(default: 0 1 2)")
    add(
        "--jobs", type=int, default=1, metavar="N",
        help="runs at a time, spread over the visible GPUs (default: %(default)s)",
    )  # fmt: skip
    add("--out", metavar="DIR", help="folder of all runs, figure and table (default: runs/figure3)")
    add("--quick", action="store_true", help="small runs on generated images: 3-10 and 20-100, seed 0 (default: off)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="show the plan and an estimate of the time (default: off)")
    what.add_argument("--status", action="store_true", help="show how far each run is (default: off)")
    what.add_argument("--plot", action="store_true", help="draw figure and table from what is there (default: off)")
    add("--submitit", choices=("slurm", "local"), help="hand the runs to submitit (default: run them here)")
    add("--submitit-parameters", nargs="+", default=[], metavar="NAME=VALUE",
        help="of its executor, such as timeout_min=600 slurm_partition=gpu gpus_per_node=1")  # fmt: skip
    settings, options = parser.parse_known_args(argv)
    for option in options:
        if option.split("=")[0] in SET_HERE:
            raise utils.InputError(
                f"{option} is set by figure3 for each run; choose runs with --pairs, --methods, --seeds"
            )
    if settings.jobs < 1:
        raise utils.InputError(f"--jobs {settings.jobs} is out of range; give 1 or more")
    settings.pairs = settings.pairs or (["3-10", "20-100"] if settings.quick else list(PAIRS))
    settings.seeds = settings.seeds or ([0] if settings.quick else [0, 1, 2])
    settings.out = Path(settings.out or ("runs/figure3-quick" if settings.quick else "runs/figure3"))
    return settings, [*options, *(["--quick"] if settings.quick else [])]


def executor_parameters(texts):
    """["timeout_min=600", ...] -> a dict, whole numbers as int."""
    parameters = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise utils.InputError(f"--submitit-parameters {text}: expected NAME=VALUE, such as timeout_min=600")
        parameters[name] = int(value) if value.isdecimal() else value
    return parameters


def main(argv=None):
    settings, options = parse(argv)
    if settings.plot:
        figure3_report.report(settings.out, settings.pairs, settings.seeds)
        return
    tasks = plan(settings.out, settings.pairs, settings.methods, settings.seeds, options)
    for task in tasks:  # what is wrong is said before anything is started
        task.state()
    if settings.dry_run:
        show_plan(tasks, settings.jobs)
    elif settings.status:
        show_status(tasks)
    else:
        parameters = executor_parameters(settings.submitit_parameters)
        if settings.submitit:
            bad = run_on_cluster(tasks, settings.submitit, settings.jobs, parameters)
        else:
            bad = run_here(tasks, settings.jobs)
        if any(task.epochs_done() for task in tasks):
            figure3_report.report(settings.out, settings.pairs, settings.seeds)
        if bad:
            names = "; ".join(f"{task.name} ({result})" for task, result in bad.items())
            if all(result == "unfinished" for result in bad.values()):
                raise utils.TimeLimit(
                    f"{len(bad)} of {len(tasks)} runs are unfinished, the same command goes on: {names}"
                )
            raise utils.InputError(
                f"{len(bad)} of {len(tasks)} runs did not end well: {names}; logs in {settings.out}/logs"
            )


if __name__ == "__main__":
    sys.exit(utils.run_main(main, how_to_go_on="the same command goes on after each run's last finished epoch"))
