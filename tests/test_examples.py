"""The examples run from the first line to the last, and leave what they promise."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from notebook_runs import run_notebook, said

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "run_stories.py"


def stored(name: str, folder: Path) -> tuple[str, dict]:
    "What an example prints and finds at its toy size, by the tool that stores it."
    command = [sys.executable, TOOL, name, "--quick", "--results", folder]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=250,
        env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["environment"]["torch"] and (folder / f"{name}.png").stat().st_size > 5000
    return done.stdout, found["found"]


def told(page: str, folder: Path) -> str:
    "What the page of an example says of what is stored there."
    first = f"""
from pathlib import Path
from hilbert_attn.bench import results
results.results_folder = lambda: Path({str(folder)!r})
"""
    outputs = run_notebook(ROOT / "nbs" / f"{page}.ipynb", folder, first)
    kinds = {kind for out in outputs for kind in out.get("data", {})}
    assert "image/png" in kinds
    return "\n".join(said(outputs, "text/plain", "text/markdown"))


@pytest.mark.full
def test_video_dit(tmp_path):
    said, curves = stored("video_dit", tmp_path)
    assert list(curves) == ["dense", "Hilbert tiles", "row tiles"]
    for name, curve in curves.items():
        assert f"{name} " in said and curve["steps"] == [0, 2]
        assert curve["losses"][1] < curve["losses"][0]
    first = {round(curve["losses"][0], 6) for curve in curves.values()}
    assert len(first) == 3  # the same weights, three patterns
    page = told("14j_video_story", tmp_path)
    assert "No run is stored" not in page
    for name, curve in curves.items():
        assert re.search(rf"{name} +2 .* {curve['losses'][1]:.3f}", page), page


@pytest.mark.full
def test_long_images(tmp_path):
    said, found = stored("long_images", tmp_path)
    assert said.count("right before") == 3 and "256 x 256, Hilbert segments: " in said
    assert list(found["large"]) == ["dense", "Hilbert segments", "row segments"]
    page = told("14k_long_images_story", tmp_path)
    for name, row in found["large"].items():
        assert re.search(rf"{name} +2 +{row['before']:.1%} +{row['after']:.1%}", page), page
