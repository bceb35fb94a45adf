"""What is generated is fresh: the package, the notebooks' cleanliness, README.md, CONTRIBUTING.md and its tables; and the numbers of the notebooks are their order."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from checkout import checkout_files, copy_checkout

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def sources(notebook: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(cwd)}  # the copy's package, not the one that is installed
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> tuple[Path, list[str]]:
    "A copy of all files that git knows or would add, with their paths."
    if (paths := checkout_files()) is None: pytest.skip("not a git checkout")
    copy_checkout(copy := tmp_path_factory.mktemp("tree"), paths)
    return copy, paths


def test_export_and_clean_leave_no_difference(tree):
    copy, paths = tree
    for name in ("nbdev_export", "nbdev_clean"):
        done = run(str(Path(sys.executable).parent / name), cwd=copy)
        assert done.returncode == 0, done.stderr
    made = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    stale = [path for path in paths if (copy / path).read_bytes() != (ROOT / path).read_bytes()]
    assert not (stale := stale + sorted(made - set(paths))), f"run `make export`: {stale}"


def test_readme_quickstart_and_contributing_are_fresh(tree):
    done = run(sys.executable, "tools/make_readme.py", "--check", cwd=tree[0])
    assert done.returncode == 0, done.stderr


def test_stale_pages_are_named(tree):
    pages = {tree[0] / path: (tree[0] / path).read_bytes() for path in ("README.md", "examples/quickstart.py", "CONTRIBUTING.md")}
    for page, fresh in pages.items(): page.write_bytes(fresh + b"\n")
    done = run(sys.executable, "tools/make_readme.py", "--check", cwd=tree[0])
    for page, fresh in pages.items(): page.write_bytes(fresh)
    assert done.returncode == 1 and "CONTRIBUTING.md, README.md, examples/quickstart.py; run `make readme`" in done.stderr


def test_tables_of_contributing_are_those_of_the_sources(tmp_path):
    "The other notebooks store measurements; this one describes the sources, and they change."
    stored = nbformat.read(ROOT / "nbs" / "30_contributing.ipynb", as_version=4)
    again = NotebookClient(nbformat.from_dict(stored), timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, now in zip(stored.cells, again.cells, strict=True):
        if before.cell_type != "code": continue
        shown = [[output.get("text") or output.data.get("text/markdown") or output.data["text/plain"] for output in cell.outputs] for cell in (before, now)]
        assert shown[0] == shown[1], f"run `make export`: stale is the output of\n{before.source}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(notebook):
    for cell in json.loads(notebook.read_text())["cells"]:
        assert cell.get("execution_count") is None
        assert all(output["output_type"] != "error" for output in cell.get("outputs", [])), "".join(cell["source"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_title_stands_alone(notebook):
    "nbdev takes the first cell as title and description, and drops whatever else stands in it."
    title = "".join(json.loads(notebook.read_text())["cells"][0]["source"])
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+\n?", title), title


def test_number_order_is_dependency_order():
    "Exported cells import only from modules of lower numbers, and names straight from where they live."
    exports, imports = {}, []  # module -> its notebook, such as "10b_block_kernels"; (notebook, module or module.name)
    for notebook in NOTEBOOKS:
        code = sources(notebook)
        module = next((m[1] for text in code if (m := re.search(r"^#\| *default_exp +(\S+)", text, re.M))), None)
        if module is None: continue
        number, path = notebook.stem, ["hilbert_attn", *module.split(".")]  # the names of the files sort as they depend
        assert re.match(r"\d\d[a-z]?_", number), notebook.name
        exports[".".join(path)] = number
        for node in (node for text in code if re.search(r"^#\| *export", text, re.M) for node in ast.walk(ast.parse(text))):
            if isinstance(node, ast.Import): imports += [(number, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ".".join([*path[:-node.level], node.module or ""]).strip(".") if node.level else node.module
                imports += [(number, f"{base}.{alias.name}") for alias in node.names]
    ours = [(number, name) for number, name in imports if name.startswith("hilbert_attn.")]
    homes = {name: next((module for module in (name, name.rpartition(".")[0]) if module in exports), None) for _, name in ours}
    assert not [f"{number} imports {name}" for number, name in ours if not homes[name] and not name.endswith("__")]
    assert not [f"{number} imports {name}, of {exports[homes[name]]}" for number, name in ours if homes[name] and exports[homes[name]] >= number]
