"""README's example runs as printed, and what README says of files and columns is so."""

import importlib
import re

import pytest
import torch
from conftest import REPOSITORY, SCRIPTS, TINY, curves, run_script

README = (REPOSITORY / "README.md").read_text()


def test_the_example_with_ones_own_data_and_backbone_runs_and_trains_both_networks():
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "SmallConvNet" in code]
    names = {}
    torch.manual_seed(0)
    before, _, loop = example.partition("for epoch in range(2):")
    exec(before, names)
    theta = {part: [p.detach().clone() for p in names[part].parameters()] for part in ("network", "label_generator")}
    exec(f"for epoch in range(2):{loop}", names)
    for part, parameters in theta.items():
        assert all(p.isfinite().all() for p in names[part].parameters())
        assert any(not torch.equal(p, q) for p, q in zip(parameters, names[part].parameters())), part
    assert names["primary_logits"].shape == (500, 10) and names["auxiliary_logits"].shape == (500, 30)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_column_of_curves_is_in_the_glossary(name):
    cosine = [] if name == "model_vgg_single" else ["--cosine-every", 1]
    assert run_script(name, *TINY, "--epochs", 1, "--train-images", 100, *cosine, "--out", "r") == 0
    (row,) = curves("r", with_seconds=True)
    for column in row.keys() - {"epoch"}:
        assert f"`{column}`" in README, column


def test_the_commands_printed_are_accepted():
    """Every `python model_vgg_…` line parses, checked up to the point where it would load data."""
    commands = re.findall(r"^(?:pip install [^&]*&& )?python (model_vgg_\w+)\.py *([^#\n]*)", README, re.M)
    assert len(commands) >= 8
    for name, arguments in commands:
        options = arguments.replace("'", "").split()
        few = [*TINY, "--epochs", "1", "--train-images", "100", "--out", f"r{len(options)}", "--overwrite"]
        assert run_script(name, *[o for o in options if o != "--quick"], *few) == 0, (name, arguments)


def test_the_commands_of_the_experiments_are_accepted():
    commands = re.findall(r"^python -m (experiments\.\w+) *([^#\n]*)", README, re.M)
    assert len(commands) >= 9
    for name, arguments in commands:
        module = importlib.import_module(name)
        getattr(module, "experiment", module).parse(arguments.split())


def test_the_file_table_names_what_is_there():
    for name in re.findall(r"^\| (`.*?) \|", README.split("## Files")[1], re.M):
        for path in re.findall(r"`([^`]+)`", name):
            assert (REPOSITORY / path).exists(), path
