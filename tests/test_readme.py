"""README's example runs as printed, and what it and the other pages say of commands, files and columns is so."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SCRIPTS, TINY, curves, run_script

from experiments.methods import table1_maxl
from experiments.datasets import registry
from harness import exits

README = (REPOSITORY / "README.md").read_text()
FOLDERS = ("harness", "experiments", "benchmarks", "results")
PAGES = {page: (REPOSITORY / page / "README.md").read_text() for page in FOLDERS}


def example():
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "resnet18" in code]
    return code


def test_the_example_with_ones_own_data_and_backbone_runs_and_trains_both_networks(capsys):
    names = {}
    torch.manual_seed(0)
    before, _, loop = example().partition("for epoch in range(2):")
    exec(before.replace("torch.rand(500", "torch.rand(100").replace("(500,)", "(100,)"), names)
    theta = {part: [p.detach().clone() for p in names[part].parameters()] for part in ("network", "label_generator")}
    exec(f"for epoch in range(2):{loop}", names)
    for part, parameters in theta.items():
        assert all(p.isfinite().all() for p in names[part].parameters())
        assert any(not torch.equal(p, q) for p, q in zip(parameters, names[part].parameters())), part
    logits = [head.shape for head in names["network"](names["images"][:7].to(names["device"]))]
    assert logits == [(7, 10), (7, 30)]
    assert capsys.readouterr().out.count("accuracy 0.") == 2


def test_it_runs_in_a_project_that_has_a_module_utils_of_its_own():
    """As README says: on the path, utils renamed, one import line changed."""
    for path in ("model_vgg_maxl.py", "create_dataset.py"):
        Path("maxl").mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / path, "maxl")
    shutil.copytree(REPOSITORY / "harness", "maxl/harness")
    shutil.copy(REPOSITORY / "utils.py", "maxl/maxl_utils.py")
    script = Path("maxl/model_vgg_maxl.py")
    assert script.read_text().count("\nimport utils\n") == 1
    script.write_text(script.read_text().replace("\nimport utils\n", "\nimport maxl_utils as utils\n"))
    Path("utils.py").write_text("MINE = True\n")
    setup = example().partition("for epoch in range(2):")[0].replace("import utils\n", "import maxl_utils\n")
    Path("mine.py").write_text(
        'import sys\nsys.path.append("maxl")\nimport utils\n'
        + setup.replace("utils.Network", "maxl_utils.Network")
        + "x, primary = next(iter(loader))\nparts = network, label_generator, optimizer, label_optimizer\n"
        "assert utils.MINE and meta_training_step(*parts, x.to(device), primary.to(device))\n"
    )
    done = subprocess.run([sys.executable, "mine.py"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_column_of_curves_is_in_the_glossary(name):
    cosine = [] if name == "model_vgg_single" else ["--cosine-every", 1]
    assert run_script(name, *TINY, "--epochs", 1, "--train-images", 100, *cosine, "--out", "r") == 0
    (row,) = curves("r", with_seconds=True)
    for column in row.keys() - {"epoch"}:
        assert f"`{column}`" in PAGES["results"], column


def test_the_commands_printed_are_accepted():
    """Every `python model_vgg_…` line parses, checked up to the point where it would load data."""
    commands = re.findall(r"^(?:pip install [^&]*&& )?python (model_vgg_\w+)\.py *([^#\n]*)", README, re.M)
    assert len(commands) >= 8
    for name, arguments in commands:
        options = arguments.replace("'", "").split()
        few = [*TINY, "--epochs", "1", "--train-images", "100", "--out", f"r{len(options)}", "--overwrite"]
        assert run_script(name, *[o for o in options if o != "--quick"], *few) == 0, (name, arguments)


def test_the_commands_of_the_experiments_are_accepted():
    pages = "\n".join([README, *PAGES.values()])
    commands = re.findall(r"^python -m (experiments\.[\w.]+) *([^#\n]*)", pages, re.M)
    assert len(commands) >= 14
    for name, arguments in commands:
        module = importlib.import_module(name)
        getattr(module, "experiment", module).parse(shlex.split(arguments))


def test_the_dataset_that_experiments_shows_is_read_and_trained_on(monkeypatch):
    section = PAGES["experiments"].split("## Adding a dataset")[1]
    function, line = re.findall(r"```python\n(.*?)```", section, re.S)[:2]
    names = {name: value for name, value in vars(registry).items() if name in ("torch", "Dataset")}  # registry.py's own
    exec(function, names)
    exec(f"added = {{{line}}}", names)
    monkeypatch.setitem(registry.DATASETS, "mine", names["added"]["mine"])
    labels = np.arange(70) % 7
    images = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8)
    np.savez("mine.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    few = ["--dataset", "mine", "--data-root", ".", "--width", "0.1", "--epochs", "1", "--batch-size", "35"]
    assert exits.run_main(table1_maxl.main, [*few, "--psi", "3", "--out", "r"]) == 0
    assert Path("r/curves.csv").exists()


def test_the_file_table_names_what_is_there():
    for name in re.findall(r"^\| (`.*?) \|", README.split("## Files")[1], re.M):
        for path in re.findall(r"`([^`]+)`", name):
            assert (REPOSITORY / path).exists(), path


def test_the_links_of_all_pages_lead_somewhere():
    for folder, text in {".": README, **PAGES}.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (REPOSITORY / folder / target).exists(), (folder, target)


def test_the_module_that_experiments_shows_for_a_figure_of_ones_own_plans_and_draws(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(\"\"\"Test accuracy.*?)```", PAGES["experiments"], re.S)
    names = {"__name__": "entropy_weight"}
    exec(code, names)
    settings, options = names["experiment"].parse(["--seeds", "0", "1", "--out", "r"])
    assert len(names["plan"](settings, options)) == 6
    for weight in names["WEIGHTS"]:
        folder = Path("r") / names["run_name"](weight, 0)
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text('{"epochs": 2}')
        (folder / "curves.csv").write_text("epoch,test_primary_accuracy\n1,0.5\n2,0.625\n")
    _, rows, text = names["make_report"](settings)
    assert [row["mean"] for row in rows] == [62.5] * 3 and "| 0.2 | 62.50 |" in text
