"""What is generated is fresh: the package, clean notebooks, README.md and CONTRIBUTING.md.

And the numbers of the notebooks are the order in which their modules depend on each other.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from checkout import checkout_files, copy_checkout

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULE = re.compile(r"hilbert_attn(?:\.\w+)+")


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text())["cells"]


def sources(notebook: Path) -> list[str]:
    return [
        "".join(cell["source"])
        for cell in cells(notebook)
        if cell["cell_type"] == "code"
    ]


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {
        **os.environ,
        "PYTHONPATH": str(cwd),
    }  # the copy's package, not the one installed
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def paths() -> list[str]:
    "All files that git knows or would add."
    found = checkout_files()
    if found is None:
        pytest.skip("not a git checkout")
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory, paths) -> Path:
    "A copy of these files."
    copy_checkout(copy := tmp_path_factory.mktemp("tree"), paths)
    return copy


def test_export_and_clean_leave_no_difference(tree, paths):
    for name in ("nbdev_export", "nbdev_clean"):
        done = run(str(Path(sys.executable).parent / name), cwd=tree)
        assert done.returncode == 0, done.stderr
    stale = [
        path
        for path in paths
        if (tree / path).read_bytes() != (ROOT / path).read_bytes()
    ]
    files = [path for path in tree.rglob("*") if path.is_file()]
    made = {
        str(path.relative_to(tree)) for path in files if "__pycache__" not in path.parts
    }
    stale += sorted(made - {*paths})
    assert not stale, f"run `make export`: {stale}"


@pytest.mark.full
def test_readme_quickstart_and_contributing_are_fresh(tree):
    "As `.ci/run` sees too: `make export` leaves no difference."
    done = run(sys.executable, "tools/make_readme.py", "--check", cwd=tree)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(notebook):
    for cell in cells(notebook):
        assert cell.get("execution_count") is None
        kinds = [output["output_type"] for output in cell.get("outputs", [])]
        assert "error" not in kinds, "".join(cell["source"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_title_stands_alone(notebook):
    "nbdev takes the first cell as title and description, and drops whatever else stands in it."
    title = "".join(cells(notebook)[0]["source"])
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+\n?", title), title


def exported_module(notebook: Path) -> str | None:
    for text in sources(notebook):
        if found := re.search(r"^#\| *default_exp +(\S+)", text, re.M):
            return f"hilbert_attn.{found[1]}"


def imported(tree: ast.AST, module: str) -> Iterator[str]:
    "The modules, or names in them, that code imports, written as statements or as strings."
    package = module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            path = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{path}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.replace(
                ":", "."
            )  # as "hilbert_attn.reference:reference_attention"
            if MODULE.fullmatch(name):
                yield name


def exported_imports(notebook: Path, module: str) -> set[str]:
    "What its exported cells import from this package."
    found = set()
    for text in sources(notebook):
        if re.search(r"^#\| *export", text, re.M):
            found |= {*imported(ast.parse(text), module)}
    return {name for name in found if name.startswith("hilbert_attn.")}


# A string that names what is not there: this backend leaves the registry.
WAITING = {"07_backends": {"hilbert_attn.flex.flex_attention"}}
MODULES = {found: path for path in NOTEBOOKS if (found := exported_module(path))}


def home(name: str) -> str | None:
    "The module that a dotted name is, or is in."
    return next(
        (found for found in (name, name.rpartition(".")[0]) if found in MODULES), None
    )


@pytest.mark.parametrize("module", MODULES)
def test_number_order_is_dependency_order(module):
    "Exported cells import from earlier notebooks alone, and names straight from their module."
    notebook = MODULES[module]
    assert re.match(r"\d\d[a-z]{0,2}_", notebook.stem), notebook.name
    for name in exported_imports(notebook, module) - WAITING.get(notebook.stem, set()):
        if name.endswith("__"):
            continue  # hilbert_attn.__version__, and the like
        if module.startswith(f"{name}."):
            continue  # its own package, where its files lie
        assert home(name), f"{notebook.stem} imports {name}, which no module has"
        earlier = MODULES[home(name)].stem < notebook.stem
        assert earlier or home(name) == module, f"{notebook.stem} imports {name}"


def test_imports_are_found_in_all_their_forms():
    code = """
import torch
from .curves import curve_order
from hilbert_attn.kernels import forward
import_module("hilbert_attn.ring")
PLACE = "hilbert_attn.sdpa:sdpa_attention"
OPERATOR = "hilbert_attn::forward"
"""
    assert {*imported(ast.parse(code), "hilbert_attn.local")} == {
        "torch",
        "hilbert_attn.curves.curve_order",
        "hilbert_attn.kernels.forward",
        "hilbert_attn.ring",
        "hilbert_attn.sdpa.sdpa_attention",
    }
