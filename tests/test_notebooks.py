"""Every notebook runs from the first cell to the last: its assertions are tests, and its pictures can be drawn."""
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("*.ipynb"))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(notebook, tmp_path):
    NotebookClient(nbformat.read(notebook, as_version=4), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
