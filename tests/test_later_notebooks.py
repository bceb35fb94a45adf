"""The second half of the notebooks, in a file of its own: a file runs in one process."""
import pytest
from test_notebooks import LESSONS, NOTEBOOKS, run_and_compare

LATER = [path for path in NOTEBOOKS if path not in LESSONS]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("path", LATER, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    run_and_compare(path, tmp_path)
