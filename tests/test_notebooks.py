"""Every notebook runs from the first cell to the last: its assertions are tests.

Its pictures can be drawn, and pages that describe the package show what it is today.
"""
from pathlib import Path

import nbformat
import pytest
from notebook_runs import run_notebook, said

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.stem < "11"]  # the others: test_later_notebooks
DESCRIBE = {"index", "18_api_by_topic", "24_benchmarks", "30_contributing"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    run_and_compare(path, tmp_path)


def run_and_compare(path: Path, folder: Path):
    "A page that describes the package shows what is stored."
    outputs = run_notebook(path, folder)
    if path.stem not in DESCRIBE: return
    cells = nbformat.read(path, as_version=4).cells
    stored = [out for cell in cells for out in cell.get("outputs", [])]
    tables, stored = (markdown(some) for some in (outputs, stored))
    assert stored, "a page that describes the package shows no table"
    assert tables == stored, f"run nbs/{path.name} again, then `make export`"


def markdown(outputs: list[dict]) -> list[str]:
    return said([out for out in outputs if "text/markdown" in out.get("data", {})], "text/markdown")


def written(folder: Path, *cells: str) -> Path:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(x) for x in cells])
    nbformat.write(notebook, folder / "x.ipynb")
    return folder / "x.ipynb"


@pytest.mark.parametrize("bad, told", [
    ("assert 1 == 2, 'no'", "AssertionError: no"),
    ("1 +", "SyntaxError"),
    ("undefined", "NameError"),
    ("import os; os._exit(0)", "ends its process"),
    ("import time; time.sleep(9)", "takes over 3 s"),
])
def test_a_cell_that_fails_is_told(bad, told, tmp_path):
    path = written(tmp_path, "x = 1", bad)
    with pytest.raises(pytest.fail.Exception, match=told):
        run_notebook(path, tmp_path, seconds=3)


def test_cells_share_their_names_and_show_what_they_end_in(tmp_path):
    path = written(tmp_path, "x = 1\nprint('printed')", "x + y")
    assert said(run_notebook(path, tmp_path, first="y = 2"), "text/plain") == ["printed\n", "3"]
