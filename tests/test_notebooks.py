"""Every notebook runs from the first cell to the last: its assertions are tests.

Its pictures can be drawn, and pages that describe the package show what it is today.
"""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.stem < "11"]  # the others: test_later_notebooks
DESCRIBE = {"index", "18_api_by_topic", "24_benchmarks", "30_contributing"}


def tables(notebook: nbformat.NotebookNode) -> list[str]:
    "The Markdown that its code shows."
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    shown = [out.get("data", {}).get("text/markdown") for out in outputs]
    return [text for text in shown if text]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    run_and_compare(path, tmp_path)


def run_and_compare(path: Path, folder: Path) -> None:
    "Runs a notebook in a folder; a page that describes the package shows what is stored."
    notebook = nbformat.read(path, as_version=4)
    stored = tables(notebook)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=place
    ).execute()
    if path.stem not in DESCRIBE:
        return
    assert stored, "a page that describes the package shows no table"
    assert tables(notebook) == stored, f"run nbs/{path.name} again, then `make export`"
