"""Every figure and table by its --quick, from end to end; the runs in this process, and smaller yet."""

import csv
import gc
import importlib
from pathlib import Path

import pytest
from conftest import PNG, TINY

from experiments import figure6
from experiments.runner import main
from harness import exits

SHOWS = {  # in its table, so many lines of runs that all are there
    "figure3": 10, "figure4": 4, "figure5": 6, "figure6": 21, "figure7": 4, "table3": 2, "appendix_e": 7,
    "label_learning": 6, "loss_or_labels": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs' folder, which all share, as runs/figure3 is shared."""
    return tmp_path_factory.mktemp("quick") / "r"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHOWS, "generalisation"])
def test_quick_ends_with_picture_and_table(name, folder, spared, monkeypatch, capsys):
    if name in ("figure5", "figure6"):
        pytest.importorskip("sklearn", reason="needs scikit-learn")

    def run_tasks(tasks, where):
        failed = {}
        for task in tasks:
            gc.collect()  # or this process would hold the locks of runs that are over
            if task.state() != "done" and exits.run_main(task.script_module.main, task.arguments):
                failed[task] = "failed"
        return failed

    monkeypatch.setattr(main, "run_tasks", run_tasks)
    monkeypatch.setattr(figure6.random_information, "__defaults__", (2,))  # draws
    experiment = importlib.import_module(f"experiments.{name}").experiment
    arguments = ["--quick", "--out", str(folder), *TINY, "--epochs", "2"]
    assert exits.run_main(experiment.main, arguments) == 0, capsys.readouterr().err
    if name != "table3":
        assert Path(folder, f"{name}.png").read_bytes().startswith(PNG)
        assert Path(folder, f"{name}.pdf").read_bytes().startswith(b"%PDF")
    text = Path(folder, f"{name}.md").read_text()
    assert "generated images" in text and "not run" not in text and "at epoch" not in text
    with open(folder / f"{name}.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == SHOWS.get(name, 0) or name == "generalisation"
