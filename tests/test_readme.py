"""README's example runs as printed, in a project of its own, and its table names the files that there are."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_the_example_trains_in_a_project_with_modules_of_the_same_names():
    """A folder that holds nothing of ours but maxl.py, and has a `utils` and a `create_dataset` of its own."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "resnet18" in code]
    shutil.copy(REPOSITORY / "maxl.py", ".")
    for name in ("utils", "create_dataset"):
        Path(f"{name}.py").write_text("MINE = True\n")
    setup, _, loop = code.partition("\nfor epoch in range(2):")
    parts = "(single, network, label_generator)"
    Path("mine.py").write_text(
        f"import utils, create_dataset\n{setup.replace('(400, 200)', '(100, 100)')}\n"
        f"before = [[p.detach().clone() for p in part.parameters()] for part in {parts}]\n"
        f"for epoch in range(2):{loop}\n"
        f"for part, weights in zip({parts}, before):\n"
        "    assert all(p.isfinite().all() for p in part.parameters())\n"
        "    assert any(not torch.equal(p, q) for p, q in zip(weights, part.parameters()))\n"
        "assert utils.MINE and create_dataset.MINE\n"
    )
    done = subprocess.run([sys.executable, "mine.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(epoch \d: (Single|MAXL) 0\.\d+\n){4}", done.stdout)


def test_the_file_table_names_what_is_there():
    table = README.split("## Files")[1].split("## ")[0]
    named = set(re.findall(r"`([\w/]+(?:\.py)?)`", table))
    assert all((REPOSITORY / name).exists() for name in named)
    there = {path.name for path in REPOSITORY.glob("*.py")} | {
        f"{path.name}/" for path in REPOSITORY.iterdir()
        if path.is_dir() and not path.name.startswith((".", "_")) and path.suffix != ".egg-info"
        and path.name not in ("runs", "dataset", "build")
    }  # fmt: skip
    assert there <= named
