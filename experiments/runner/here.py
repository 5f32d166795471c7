"""Running a plan, some runs at a time: on this machine or, with the Cluster of cluster.py, as jobs."""

import datetime
import os
import time

import torch

from experiments.runner import process
from harness.files import at_work


class Here:
    """Runs as processes of this machine, `jobs` at a time."""

    pause = 0.5  # seconds between two looks at the runs
    retries = False  # a run that ends at --max-minutes is not started again

    def __init__(self, jobs):
        self.jobs = jobs

    def start(self, task, slot):
        """Start a task; returns what has poll(): its exit code, None while it runs."""
        return process.start(task.command, task.log, **share_of_machine(slot, self.jobs))

    def stop(self, runs):
        process.stop(runs)


def run_tasks(tasks, where):
    """Run the tasks that are not done, where.jobs at a time; returns {task: "unfinished" or why it failed}.

    where: Here or a Cluster. It waits for a folder that another process is at work in. Whatever ends this function ends
    the runs first.
    """
    waiting, running, bad = [task for task in tasks if task.state() != "done"], {}, {}
    if len(waiting) < len(tasks):
        say(f"{len(tasks) - len(waiting)} of {len(tasks)} runs are done already")
    try:
        while waiting or running:
            for slot in set(range(where.jobs)) - running.keys():
                ready = ((task, state) for task in waiting if (state := task.state()) != "at work")
                task, state = next(ready, (None, None))
                if task is None:
                    break
                waiting.remove(task)
                if state != "done":  # by another process, meanwhile
                    say(f"started {task.name}")
                    with process.signals_held():  # so that no run is started and then not known of
                        running[slot] = task, task.epochs_done(), where.start(task, slot)
            time.sleep(where.pause)
            for slot, (task, epochs, run) in list(running.items()):
                code = run.poll()
                if code is None:
                    continue
                del running[slot]
                result = task.outcome(code)
                if code == 2 and at_work(task.folder):
                    waiting.append(task)
                    continue
                say(f"ended {task.name}: {result}")
                if where.retries and result == "unfinished" and task.epochs_done() > epochs:
                    waiting.append(task)
                elif result != "done":
                    bad[task] = result
    finally:
        where.stop([run for *_, run in running.values()])
    return bad


def say(text):
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def share_of_machine(slot, jobs):
    """Environment variables for the slot-th of `jobs` runs at a time: its GPU, its share of the cores."""
    variables, gpus = {}, torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:  # more threads than cores fight each other
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    return variables
