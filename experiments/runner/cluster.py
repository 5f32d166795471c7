"""Running a plan as jobs of submitit (github.com/facebookincubator/submitit): on Slurm, or as processes here."""

import contextlib
import os
import time

from experiments.runner import here
from harness.exits import InputError


class Job:
    """A command as submitit runs it: the same process, started anew if the job is preempted or runs out of time.

    variables: of its environment, set over those that submitit sets.
    """

    def __init__(self, command, log, variables):
        self.command, self.log, self.variables, self.process = command, log, variables, None

    def __call__(self):
        self.process = here.start(self.command, self.log, **self.variables)
        try:
            # not wait(): it holds a lock, and checkpoint(), called by a signal in its midst, would wait for that
            while self.process.poll() is None:
                time.sleep(0.5)
            return self.process.returncode
        finally:
            here.stop([self.process])

    def checkpoint(self):
        """What submitit calls before it queues the job again; the command has --resume."""
        import submitit

        if self.process:
            here.stop([self.process], patience=20)
        return submitit.helpers.DelayedSubmission(Job(self.command, self.log, self.variables))


class Submitted:
    """A submitted job, polled like a process; an error of submitit itself goes to the run's log."""

    def __init__(self, job, log):
        self.job, self.log = job, log

    def poll(self):
        if not self.job.done():
            return None
        if error := self.job.exception():
            with open(self.log, "a") as file:
                file.write(f"error: {type(error).__name__}, see {self.job.paths.stderr}\n")
            return 1
        return self.job.result()


class Cluster:
    """Runs as jobs, `jobs` at a time: kind "slurm", or "local" for processes here. parameters: of submitit's executor.

    Raises InputError if submitit is not there or refuses the parameters.
    """

    def __init__(self, kind, jobs, root, parameters):
        try:
            import submitit
        except ImportError:
            raise InputError("--submitit needs the package submitit: pip install submitit") from None
        self.kind, self.jobs, self.pause = kind, jobs, 1 if kind == "local" else 10
        os.environ.update(here.environment())  # the jobs inherit it
        try:
            self.executor = submitit.AutoExecutor(folder=root / "submitit", cluster=kind)
            self.executor.update_parameters(**({"name": "maxl"} if kind == "slurm" else {}) | parameters)
        except (RuntimeError, ValueError, TypeError, AssertionError, NameError, KeyError) as error:
            raise InputError(f"--submitit {kind}, and its parameters: {' '.join(str(error).split())}") from None

    def start(self, task, slot):
        # submitit's local jobs see no GPU but those that they are told of
        variables = here.share_of_machine(slot, self.jobs) if self.kind == "local" else {}
        task.log.parent.mkdir(parents=True, exist_ok=True)
        job = self.executor.submit(Job(task.command, task.log, variables))
        here.say(f"submitted {task.name} as job {job.job_id}")
        return Submitted(job, task.log)

    def stop(self, runs):
        if runs and self.kind == "slurm":
            here.say("the jobs go on; scancel ends them")
            return
        for run in runs:
            with contextlib.suppress(Exception):
                run.job.cancel()


def executor_parameters(texts):
    """["timeout_min=600", ...] -> a dict, whole numbers as int."""
    parameters = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InputError(f"--submitit-parameters {text}: expected NAME=VALUE, such as timeout_min=600")
        parameters[name] = int(value) if value.isdecimal() else value
    return parameters
