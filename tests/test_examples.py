"""The examples run from the first line to the last, and leave what they promise."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
TOOL = Path(__file__).resolve().parent.parent / "tools" / "run_stories.py"


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


def test_video_dit(tmp_path):
    said, curves = stored("video_dit", tmp_path)
    assert list(curves) == ["dense", "Hilbert tiles", "row tiles"]
    for name, curve in curves.items():
        assert f"{name} " in said and curve["steps"] == [0, 2]
        assert curve["losses"][1] < curve["losses"][0]
    first = {round(curve["losses"][0], 6) for curve in curves.values()}
    assert len(first) == 3  # the same weights, three patterns


@pytest.mark.full
def test_long_images(tmp_path):
    said, found = stored("long_images", tmp_path)
    assert said.count("right before") == 3 and "256 x 256, Hilbert segments: " in said
    assert list(found["large"]) == ["dense", "Hilbert segments", "row segments"]
