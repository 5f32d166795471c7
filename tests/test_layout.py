"""The house: what may import what."""

import argparse
import ast
import os

from conftest import REPOSITORY

from harness.acceleration import select_device

FOLDERS = ("harness", "experiments", "benchmarks")
MODULES = sorted([*REPOSITORY.glob("*.py"), *(path for name in FOLDERS for path in (REPOSITORY / name).rglob("*.py"))])
SCRIPTS = {"model_vgg_single", "model_vgg_human", "model_vgg_maxl"}
OURS = {"maxl", "utils", "create_dataset", *SCRIPTS, *FOLDERS}
MAY_IMPORT = {
    "maxl": set(),
    "harness": {"harness", "maxl"},
    "utils": {"maxl"},
    "create_dataset": {"harness"},
    **dict.fromkeys(SCRIPTS, {"maxl", "utils", "create_dataset", "harness"}),
    "experiments": OURS - {"benchmarks"},
    "benchmarks": OURS,
}


def name_of(path):
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def imports(tree):
    """Names of the modules that a tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


GRAPH = {name_of(path): set(imports(ast.parse(path.read_text()))) for path in MODULES}


def test_imports_run_one_way():
    for name, imported in GRAPH.items():
        ours = {module.partition(".")[0] for module in imported} & OURS
        assert ours <= MAY_IMPORT[name.partition(".")[0]], name


def test_there_is_no_circle():
    graph = {name: imported & GRAPH.keys() for name, imported in GRAPH.items()}
    while graph:
        ends = [name for name, imported in graph.items() if not imported & graph.keys()]
        assert ends, f"a circle among {sorted(graph)}"
        for name in ends:
            del graph[name]


def test_the_method_needs_nothing_but_torch():
    standard = {"contextlib", "functools", "math", "warnings"}
    assert {name.partition(".")[0] for name in GRAPH["maxl"]} == standard | {"torch"}


def test_a_test_sees_no_gpu_but_with_the_mark_cuda():
    settings = argparse.Namespace(device="auto")
    assert select_device(settings).type == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
