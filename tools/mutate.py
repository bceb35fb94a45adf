"""Do the tests bite? Plants one mistake at a time and runs the tests that should notice it.

The list is mutations.json: file, text to replace (it occurs once), what to put there, tests, and
what goes wrong. A mistake that no test notices is named, unless the list says why none can.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from checkout import checkout_files, copy_checkout

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tools" / "mutations.json"


@dataclass(frozen=True)
class Mutation:
    "A mistake, and the tests that should notice it."
    name: str # in a few words: what goes wrong
    file: str # below the root
    old: str # occurs once in the file
    new: str
    tests: tuple[str, ...] # arguments of pytest
    explained: str = "" # why no test can notice


def load(path: Path = LIST) -> list[Mutation]:
    "The list, in its order."
    entries = json.loads(path.read_text())
    return [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def misplaced(mutations: list[Mutation], root: Path = ROOT) -> list[str]:
    "Names of mutations whose text does not occur exactly once."
    return [m.name for m in mutations if (root / m.file).read_text().count(m.old) != 1]


def run_tests(folder: Path, tests: tuple[str, ...], seconds: float) -> bool:
    "Do these tests pass in this folder?"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, timeout=seconds,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired: return False  # a mistake that hangs is noticed
    return done.returncode == 0


def try_one(mutation: Mutation, folder: Path, seconds: float) -> bool:
    "Plants a mistake, runs its tests, takes it out again; was it noticed?"
    path = folder / mutation.file
    before = path.read_text()
    path.write_text(before.replace(mutation.old, mutation.new))
    try: return not run_tests(folder, mutation.tests, seconds)
    finally: path.write_text(before)


def check_baseline(mutations: list[Mutation], folder: Path, seconds: float):
    "The tests pass without a mistake, or nothing can be said."
    for tests in dict.fromkeys(m.tests for m in mutations):
        if not run_tests(folder, tests, seconds):
            sys.exit(f"these tests fail without any mutation: {' '.join(tests)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", metavar="TEXT", default="", help="only those whose name has TEXT")
    parser.add_argument("--seconds", type=float, default=300, help="limit for one run of tests")
    options = parser.parse_args()
    mutations = [m for m in load() if options.k in m.name]
    if gone := misplaced(mutations): sys.exit(f"not found exactly once: {', '.join(gone)}")
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_checkout(folder, checkout_files())
        check_baseline(mutations, folder, options.seconds)
        for i, mutation in enumerate(mutations, 1):
            start = time.monotonic()
            noticed = try_one(mutation, folder, options.seconds)
            word = "noticed" if noticed else "explained" if mutation.explained else "SURVIVES"
            took = time.monotonic() - start
            print(f"{i:3} of {len(mutations)}  {word:9} {took:5.0f} s  {mutation.name}", flush=True)
            if word == "SURVIVES": survivors.append(mutation.name)
    print(f"{len(mutations) - len(survivors)} noticed or explained, {len(survivors)} survive")
    return 1 if survivors else 0


if __name__ == "__main__": sys.exit(main())
