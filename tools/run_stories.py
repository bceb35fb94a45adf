"""Runs the two long examples, and stores what they found: `python tools/run_stories.py`.

With a name (video_dit, long_images), this one alone. Their pages in nbs/ read
nbs/results/NAME.json, and show the pictures beside it. Each takes under ten minutes on two
quiet cores."""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hilbert_attn.bench.machine import environment

STORIES = { # what an example writes: a table, a picture
    "video_dit": ("losses.json", "videos.png"),
    "long_images": ("results.json", "scenes.png"),
}
HOSTS = dict(video_dit="diffusers", long_images="transformers")


def stored(name: str, quick: bool, results: Path):
    "Runs an example in a folder of its own."
    table, picture = STORIES[name]
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--out", folder]
        subprocess.run(command + ["--quick"] * quick, check=True)
        host = HOSTS[name]
        about = environment() | {host: version(host)}
        found = dict(environment=about, found=json.loads((Path(folder) / table).read_text()))
        (results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (results / f"{name}.png").write_bytes((Path(folder) / picture).read_bytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(STORIES)}")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--results", type=Path, default=ROOT / "nbs" / "results",
                        help="folder of results instead of nbs/results")
    args = parser.parse_args()
    if unknown := set(args.names) - set(STORIES):
        parser.error(f"no story {', '.join(sorted(unknown))}: take some of {', '.join(STORIES)}")
    for name in args.names or STORIES: stored(name, args.quick, args.results)


if __name__ == "__main__": main()
