"""`python -m experiments.NAME`, the same for every figure and table: run what is missing, then draw."""

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from experiments.runner import report
from experiments.runner.cluster import Cluster, executor_parameters
from experiments.runner.here import Here, run_tasks
from experiments.runner.progress import show_plan, show_status
from experiments.runner.task import check_plan
from harness.command_line import Parser
from harness.exits import InputError, TimeLimit, run_main


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A figure or table: which runs it needs, and what it draws from them."""

    name: str  # of its default folder and its files
    doc: str  # for --help
    plan: Callable  # (settings, options of the runs) -> the Tasks, in the order in which they are to start
    report: Callable  # settings -> a matplotlib Figure or None, the table as dicts, and as text in Markdown
    add_options: Callable  # adds its own options, which choose the runs, to a parser
    full: dict  # what these options and --seeds are if not given, and what has no option, such as methods,
    quick: dict  # and with --quick
    folder: str = ""  # of its runs, in runs/, where they are another experiment's too; by default its name
    needs_scikit_learn: bool = False

    def parse(self, argv=None):
        """The command line: the runner's and the experiment's settings, and the options that go to the runs."""
        parser = Parser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        add = parser.add_argument
        self.add_options(parser)
        add("--seeds", nargs="+", type=int, metavar="N", help=f"(default: {' '.join(map(str, self.full['seeds']))})")
        add("--jobs", type=int, default=1, metavar="N", help="runs at a time, on all visible GPUs (default: 1)")
        folder = f"runs/{self.folder or self.name}"
        add("--out", metavar="DIR", help=f"folder of all runs, figure and table (default: {folder})")
        add("--data-root", metavar="DIR", help="folder of the data (default: dataset; with --plot, the runs' own)")
        narrowed = "; ".join(f"{name} {' '.join(map(str, values))}" for name, values in self.quick.items())
        add("--quick", action="store_true", help=f"small runs on generated images: {narrowed} (default: off)")
        what = parser.add_mutually_exclusive_group()
        what.add_argument("--dry-run", action="store_true", help="show the plan and its estimated time (default: off)")
        what.add_argument("--status", action="store_true", help="show how far each run is (default: off)")
        what.add_argument("--plot", action="store_true", help="draw figure and table from what is there (default: off)")
        add("--submitit", choices=("slurm", "local"), help="hand the runs to submitit (default: run them here)")
        add("--submitit-parameters", nargs="+", default=[], metavar="NAME=VALUE",
            help="of its executor, such as timeout_min=600 slurm_partition=gpu gpus_per_node=1")  # fmt: skip
        settings, options = parser.parse_known_args(argv)
        if settings.jobs < 1:
            raise InputError(f"--jobs {settings.jobs} is out of range; give 1 or more")
        settings.drawn_as = self.name
        for name, value in (self.full | (self.quick if settings.quick else {})).items():
            given = list(dict.fromkeys(getattr(settings, name, None) or value))  # each once
            setattr(settings, name, given)
            if name != "methods" and set(given) != set(value):  # of the methods all that there are are drawn
                settings.drawn_as += "".join(f"-{'seed' * (name == 'seeds')}{one}" for one in given)
        for seed in settings.seeds:
            if not 0 <= seed < 2**63:
                raise InputError(f"--seeds {seed} is out of range; give 0 or positive numbers below 2**63")
        settings.out = Path(os.path.expanduser(settings.out or folder + ("-quick" if settings.quick else "")))
        options += ["--data-root", settings.data_root] if settings.data_root else []
        return settings, [*options, *(["--quick"] if settings.quick else [])]

    def tasks(self, settings, options):
        """The plan, checked; raises InputError for options that are not for the runs, and folders of others."""
        tasks = check_plan(self.plan(settings, options), options)
        for task in tasks:  # what is wrong is said before anything is started
            task.state()
        return tasks

    def draw(self, settings):
        """Write figure and table of what there is; of a part, such as --pairs 20-100, under a name of its own."""
        report.write(settings.out, settings.drawn_as, *self.report(settings))

    def main(self, argv=None):
        settings, options = self.parse(argv)
        draws = not (settings.dry_run or settings.status)
        if draws and self.needs_scikit_learn and importlib.util.find_spec("sklearn") is None:
            raise InputError(f"{self.name} needs the package scikit-learn: pip install scikit-learn")
        if settings.plot:
            if options:  # they change nothing that is there, but what no run knows is said
                check_plan(self.plan(settings, options), options)
            self.draw(settings)
            return
        tasks = self.tasks(settings, options)
        if settings.dry_run:
            show_plan(tasks, settings.jobs)
        elif settings.status:
            show_status(tasks)
        else:
            self.run(tasks, settings)

    def run(self, tasks, settings):
        """Run what is missing, then draw; raises InputError if runs failed, TimeLimit if some are unfinished."""
        parameters = executor_parameters(settings.submitit_parameters)
        fetch_data([task for task in tasks if task.state() != "done"])
        where = Here(settings.jobs)
        if settings.submitit:
            where = Cluster(settings.submitit, settings.jobs, settings.out, parameters)
        bad = run_tasks(tasks, where)
        if any(task.epochs_done() for task in tasks):
            try:
                self.draw(settings)
            except InputError as error:
                if not bad:
                    raise
                print(f"warning: nothing was drawn: {error}", file=sys.stderr)
        if bad:
            names = "; ".join(f"{task.name} ({result})" for task, result in bad.items())
            if all(result == "unfinished" for result in bad.values()):
                raise TimeLimit(f"{len(bad)} of {len(tasks)} runs are unfinished, the same command goes on: {names}")
            raise InputError(f"{len(bad)} of {len(tasks)} runs did not end well: {names}; logs in {settings.out}/logs")

    def __call__(self):
        """The command; returns the exit code."""
        return run_main(self.main, how_to_go_on="the same command goes on after each run's last finished epoch")


def fetch_data(tasks):
    """Fetch and check the data once, before runs side by side do; raises InputError with a line for what is missing."""
    missing, found = [], []
    for data, dataset, root in {(task.data, task.settings.dataset, task.settings.data_root): 0 for task in tasks}:
        try:
            data.read(dataset, root)
            found.append(dataset)
        except InputError as error:
            missing.append(str(error))
    if missing and found:
        missing.append(f"What is there can be run without the rest: --datasets {' '.join(found)}")
    if missing:
        raise InputError("\n".join(missing))
