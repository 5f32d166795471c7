"""Running a plan, some runs at a time, each a process of its own; with the Cluster of cluster.py, each a job."""

import datetime
import os
import shlex
import subprocess
import time
from pathlib import Path

import torch

from harness.files import at_work

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def environment(**changed):
    """This process's environment with the repository on Python's path."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path} | changed


def start(command, log, **changed):
    """Start a command; what it prints is appended to the file `log`. changed: variables of its environment."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.write(f"\n--- {datetime.datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(command)}\n")
        file.flush()
        # in a session of its own, so that Ctrl-C reaches it through this process alone
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(**changed),
            start_new_session=True,
        )  # fmt: skip


def stop(processes, patience=60):
    """SIGTERM, which the scripts end on cleanly; SIGKILL for what is still there after `patience` seconds."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Here:
    """Runs as processes of this machine, `jobs` at a time."""

    pause = 0.5  # seconds between two looks at the runs

    def __init__(self, jobs):
        self.jobs = jobs

    def start(self, task, slot):
        """Start a task; returns what has poll(): its exit code, None while it runs."""
        return start(task.command, task.log, **share_of_machine(slot, self.jobs))

    def stop(self, runs):
        stop(runs)


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
                task = next((task for task in waiting if not at_work(task.folder)), None)
                if task is None:
                    break
                waiting.remove(task)
                if task.state() != "done":  # by another process, meanwhile
                    say(f"started {task.name}")
                    running[slot] = task, where.start(task, slot)
            time.sleep(where.pause)
            for slot, (task, run) in list(running.items()):
                code = run.poll()
                if code is None:
                    continue
                del running[slot]
                if code == 2 and at_work(task.folder):  # another process began it at the same moment
                    waiting.append(task)
                    continue
                result = task.outcome(code)
                say(f"ended {task.name}: {result}")
                if result != "done":
                    bad[task] = result
    finally:
        where.stop([run for _, run in running.values()])
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
