"""Running a plan as jobs of submitit (github.com/facebookincubator/submitit): on Slurm, or as processes here."""

import contextlib
import itertools
import os
import time

from experiments.runner import process
from experiments.runner.here import share_of_machine
from experiments.runner.progress import Progress
from harness.exits import InputError
from harness.files import at_work


class Job:
    """A command as submitit runs it: the same process, started anew where the job is preempted or runs out of time.

    variables: of its environment, set over those that submitit sets.
    """

    def __init__(self, command, log, variables):
        self.command, self.log, self.variables, self.process = command, log, variables, None

    def __call__(self):
        self.process = process.start(self.command, self.log, **self.variables)
        try:
            # not wait(), which holds a lock that checkpoint(), called by a signal amid it, would wait for
            while self.process.poll() is None:
                time.sleep(0.5)
            return self.process.returncode
        finally:
            process.stop([self.process])

    def checkpoint(self):
        """What submitit calls before it queues the job again; the command has --resume."""
        import submitit

        if self.process:
            process.stop([self.process], patience=20)
        return submitit.helpers.DelayedSubmission(Job(self.command, self.log, self.variables))


def run_on_cluster(tasks, cluster, jobs, parameters):
    """Run the tasks that are not done as submitit jobs (an array, on Slurm); as run_here."""
    try:
        import submitit
    except ImportError:
        raise InputError("--submitit needs the package submitit: pip install submitit") from None
    os.environ.update(process.environment())  # the jobs inherit it
    if cluster == "slurm":
        parameters = {"name": "maxl", "slurm_array_parallelism": jobs} | parameters
    try:
        executor = submitit.AutoExecutor(folder=tasks[0].root / "submitit", cluster=cluster)
        executor.update_parameters(**parameters)
    except (RuntimeError, ValueError, TypeError, AssertionError, NameError, KeyError) as error:
        raise InputError(f"--submitit {cluster}, and its parameters: {' '.join(str(error).split())}") from None

    slots = itertools.count()

    def variables():  # submitit's local jobs see no GPU but those that they are told of
        return share_of_machine(next(slots), jobs) if cluster == "local" else {}

    waiting, running, bad = [task for task in tasks if task.state() != "done"], {}, {}
    progress = Progress(tasks)
    at_a_time = len(waiting) if cluster == "slurm" else jobs  # Slurm keeps the number itself
    try:
        while waiting or running:
            batch = [task for task in waiting if task.state() != "at work"][: at_a_time - len(running)]
            waiting = [task for task in waiting if task not in batch]
            if batch:
                with executor.batch():
                    submitted = [executor.submit(Job(task.command, task.log, variables())) for task in batch]
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
                result = f"{type(error).__name__}, see {job.paths.stderr}" if error else task.outcome(code)
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


def executor_parameters(texts):
    """["timeout_min=600", ...] -> a dict, whole numbers as int."""
    parameters = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InputError(f"--submitit-parameters {text}: expected NAME=VALUE, such as timeout_min=600")
        parameters[name] = int(value) if value.isdecimal() else value
    return parameters
