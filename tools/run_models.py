"""Tries model classes of other packages and stores what holds: `python tools/run_models.py`.

With names of packages (transformers, timm, diffusers), these alone; rows of others stay. timm is no
dependency: where it cannot be imported, its rows stay as they are, and the program says so."""

import argparse
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "transformers", "timm", "diffusers"
TABLE = ROOT / "nbs" / "results" / "models.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from model_cases import cases
from model_trial import tried


def declare_torchvision():
    "torchvision's wheel for CUDA has no operators on a CPU build of torch; timm needs none."
    if torch.version.cuda: return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def importable(package: str) -> bool:
    try: __import__(package)
    except (ImportError, RuntimeError) as e:
        print(f"{package} cannot be imported here, its rows stay: {e}", file=sys.stderr)
        return False
    return True


def main(packages: list[str]):
    stored = json.loads(TABLE.read_text()) if TABLE.exists() else dict(versions={}, rows=[])
    library = declare_torchvision()
    for package in packages or PACKAGES:
        if not importable(package): continue
        rows = []
        for case in cases(package):
            rows.append(tried(case))
            print(f"{package} {case.name}: {rows[-1]['switch']}, {rows[-1]['forward']}", flush=True)
        stored["rows"] = [row for row in stored["rows"] if row["package"] != package] + rows
        stored["versions"][package] = version(package)
    del library
    stored["versions"]["torch"] = torch.__version__
    TABLE.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", help=f"some of {', '.join(PACKAGES)}")
    names = parser.parse_args().packages
    if unknown := ", ".join(sorted(set(names) - set(PACKAGES))):
        parser.error(f"no cases for {unknown}: take some of {', '.join(PACKAGES)}")
    main(names)
