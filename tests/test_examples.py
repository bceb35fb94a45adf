"""The examples run from the first line to the last, and leave what they promise."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, folder: Path) -> str:
    "What an example prints, at its toy size."
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--quick"], cwd=folder, capture_output=True, text=True,
        timeout=250, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_video_dit(tmp_path):
    said = run("video_dit.py", tmp_path)
    out = tmp_path / "out" / "video_dit"
    curves = json.loads((out / "losses.json").read_text())
    assert list(curves) == ["dense", "Hilbert tiles", "row tiles"]
    for name, curve in curves.items():
        assert f"{name} " in said and curve["steps"] == [0, 2]
        assert curve["losses"][1] < curve["losses"][0]
    first = {round(curve["losses"][0], 6) for curve in curves.values()}
    assert len(first) == 3  # the same weights, three patterns
    for name in ("losses.png", "videos.png"): assert (out / name).stat().st_size > 5000


@pytest.mark.full
def test_long_images(tmp_path):
    said = run("long_images.py", tmp_path)
    assert said.count("right before") == 3 and "256 x 256, Hilbert segments: " in said
    out = tmp_path / "out" / "long_images"
    found = json.loads((out / "results.json").read_text())["large"]
    assert list(found) == ["dense", "Hilbert segments", "row segments"]
    assert (out / "scenes.png").stat().st_size > 5000
