"""The pages: their examples run, their commands are accepted, their links lead somewhere."""

import copy
import importlib
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

import create_dataset
import maxl
from harness.exits import InputError

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md")), *sorted(REPOSITORY.glob("*/README.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page):
    """What follows `python` in the commands of a page, as lists of words."""
    found = re.findall(r"(?:^|&& |^\w+=\S+ )python (.*)", "".join(blocks(page, "bash")), re.M)
    found += re.findall(r"`python ([^`]+)`", page.read_text())
    return [shlex.split(text, comments=True) for text in found if "NAME" not in text]


def anchors(page):
    """The names by which GitHub links to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)}


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists() and (not anchor or anchor in anchors(linked)), target


@every_page
def test_commands_are_accepted(page):
    """Read by the parser of the module, and planned where it is a figure's; what extending.md adds is run below."""
    for words in commands(page) if page.name != "extending.md" else []:
        name, *arguments = words[1:] if words[0] == "-m" else [words[0].removesuffix(".py"), *words[1:]]
        module = importlib.import_module(name) if name not in ("pytest", "experiments", "docs/scheme") else None
        if hasattr(module, "experiment"):
            settings, options = module.experiment.parse(arguments)
            assert settings.plot or module.experiment.tasks(settings, options)
        elif name.startswith("benchmarks"):  # its main reads options first; this one it refuses at once
            with pytest.raises(InputError, match="--width 0.0 is out of range"):
                module.main([*arguments, "--width", "0"])
        elif module:
            module.parse(arguments)


def test_every_column_of_curves_is_explained():
    text = (REPOSITORY / "harness/README.md").read_text()
    for name in SCRIPTS:
        cosine = [] if name == "model_vgg_single" else ["--cosine-every", 1]
        assert run_script(name, *TINY, "--epochs", 1, "--train-images", 100, *cosine, "--out", name) == 0
        for column in curves(name, with_seconds=True)[0].keys() - {"epoch"}:
            assert f"`{column}`" in text, column


def test_the_examples_of_networks_run(capsys):
    """In order; the last, a function for several processes, in a group of one."""
    names = {}
    for code in blocks(DOCS / "networks.md", "python"):
        exec(code, names)
    errors = [float(number) for number in re.findall(r"tensor\(([\d.e-]+)", capsys.readouterr().out)]
    assert len(errors) == 2 and max(errors) < 1e-5
    parts = [names[name] for name in ("network", "label_generator", "optimizer", "label_optimizer", "images", "primary")]
    alone = copy.deepcopy(parts)
    maxl.meta_training_step(*alone)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{Path('group').resolve()}")
    names["meta_training_step"](torch.nn.parallel.DistributedDataParallel(parts[0]), *parts[1:])
    torch.distributed.destroy_process_group()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(alone[1].parameters(), parts[1].parameters()))


def test_the_batch_of_paper_has_the_labels_of_all_levels(monkeypatch):
    class Generated(create_dataset.CIFAR100):
        def __init__(self, root, train, transform, download):
            self.data, self.targets = create_dataset.make_synthetic(train=False)
            self.transform, self.target_transform = transform, None

    monkeypatch.setattr(create_dataset, "CIFAR100", Generated)
    names = {}
    exec(*blocks(DOCS / "paper.md", "python"), names)
    assert names["train_data"].shape == (100, 3, 32, 32) and names["train_label"].shape == (100, 4)


@pytest.mark.slow
def test_the_additions_of_extending_run():
    """Added to a copy of the repository where the page says, and run by the commands of the page."""
    for path in [*REPOSITORY.glob("*.py"), REPOSITORY / "harness", REPOSITORY / "experiments"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, path.name)
    for code in blocks(DOCS / "extending.md", "python"):
        head, _, rest = code.partition("\n")
        path, where, name = re.fullmatch(r"# (\S+?)(?:, (in|above) (\w+))?", head).groups()
        if where:
            before, start, after = Path(path).read_text().partition(f"\n{name} = {{")
            assert start, head
            rest = f"{before}{start}\n{rest}{after}" if where == "in" else f"{before}\n{rest}{start}{after}"
        Path(path).write_text(rest)
    images, labels = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8), np.arange(70) % 7
    np.savez("mine.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    for words in commands(DOCS / "extending.md"):
        data = ["--data-root", "."] if "mine" in words else ["--dataset", "synthetic", "--train-images", "120"]
        tiny = ["--width", "0.02", "--epochs", "1", "--batch-size", "20"]
        done = subprocess.run([sys.executable, *words, *data, *tiny], capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    figures = ["entropy_weight-seed0", "figure3-20-100-seed0", "figure3-20-40-seed0", "table1-mine-3-seed0"]
    assert sorted(path.stem for path in Path("runs").glob("*/*.md")) == figures
