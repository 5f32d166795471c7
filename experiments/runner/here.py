"""Running a plan on this machine, some runs at a time."""

import os
import time

import torch

from experiments.runner import process
from experiments.runner.progress import Progress
from harness.files import at_work


def run_here(tasks, jobs):
    """Run the tasks that are not done, `jobs` at a time; returns {task: "unfinished" or why it failed}.

    It waits for a folder that another process is at work in. Whatever ends this function ends the runs first.
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
                    with process.signals_held():
                        running[slot] = task, process.start(task.command, task.log, **share_of_machine(slot, jobs))
            time.sleep(0.5)
            for slot, (task, run) in list(running.items()):
                code = run.poll()
                if code is None:
                    continue
                del running[slot]
                result = task.outcome(code)
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


def share_of_machine(slot, jobs):
    """Environment variables for the slot-th of `jobs` runs at a time: its GPU, its share of the cores."""
    variables, gpus = {}, torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:  # more threads than cores fight each other
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    return variables
