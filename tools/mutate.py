"""Do the tests bite? Plants one mistake at a time and runs the tests that should notice it.

The list is mutations.json: file, text to replace (it occurs once), what to put there, tests, and
what goes wrong. A mistake that no test notices is named, unless the list says why none can.

What was found is stored after each mistake. The next run tries only those whose entry, file or
tests have changed since, so that a run that was stopped goes on where it was.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from checkout import checkout_files, copy_checkout

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tools" / "mutations.json"
FOUND = ROOT / "nbs" / "results" / "mutations.json"


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


def digest(mutation: Mutation, root: Path = ROOT) -> str:
    "Of all that a verdict depends on most: the entry, its file, the files of its tests."
    tests = [root / word for word in mutation.tests if word.endswith(".py")]
    parts = [path.read_text() for path in (root / mutation.file, *tests)]
    text = "\0".join([json.dumps(asdict(mutation)), *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stored(path: Path) -> dict[str, dict]:
    "What earlier runs found, by name."
    return {row["name"]: row for row in json.loads(path.read_text())} if path.exists() else {}


def store(found: dict[str, dict], path: Path):
    "A row for each mutation of the list, in its order; the file is replaced in one step."
    rows = [json.dumps(found[m.name]) for m in load() if m.name in found]
    scratch = path.with_suffix(".part")
    scratch.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    scratch.replace(path)


def to_try(mutations: list[Mutation], found: dict[str, dict]) -> list[Mutation]:
    "Those of which nothing is known as they now are."
    known = {name: row["digest"] for name, row in found.items()}
    return [m for m in mutations if known.get(m.name) != digest(m)]


class Trial:
    "Plants mistakes in a copy of the checkout."

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds
        self.passing: set[tuple[str, ...]] = set() # tests that pass without a mistake
        copy_checkout(folder, checkout_files())
        self.commit = commit()

    def check(self, tests: tuple[str, ...]):
        "The tests pass without a mistake, or nothing can be said."
        if tests in self.passing: return
        if not run_tests(self.folder, tests, self.seconds):
            sys.exit(f"these tests fail without any mutation: {' '.join(tests)}")
        self.passing.add(tests)

    def verdict(self, mutation: Mutation) -> dict:
        "A row of what was found."
        self.check(mutation.tests)
        start = time.monotonic()
        noticed = try_one(mutation, self.folder, self.seconds)
        word = "noticed" if noticed else "explained" if mutation.explained else "SURVIVES"
        took = round(time.monotonic() - start)
        row = dict(name=mutation.name, verdict=word, seconds=took)
        if word == "explained": row["why"] = mutation.explained
        return row | dict(commit=self.commit, date=str(date.today()))


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, text=True,
                          capture_output=True)
    return done.stdout.strip()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", metavar="TEXT", default="", help="only those whose name has TEXT")
    parser.add_argument("--seconds", type=float, default=300, help="limit for one run of tests")
    parser.add_argument("--again", action="store_true", help="those that are known, too")
    parser.add_argument("--results", type=Path, default=FOUND, help="where what is found goes")
    return parser.parse_args()


def main() -> int:
    given = options()
    mutations = [m for m in load() if given.k in m.name]
    if gone := misplaced(mutations): sys.exit(f"not found exactly once: {', '.join(gone)}")
    found = stored(given.results)
    left = to_try(mutations, {} if given.again else found)
    digests = {m.name: digest(m) for m in left}
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(Path(name), given.seconds)
        for i, mutation in enumerate(left, 1):
            row = trial.verdict(mutation)
            found[mutation.name] = row | dict(digest=digests[mutation.name])
            store(found, given.results)
            print(f"{i:3} of {len(left)}  {row['verdict']:9} {row['seconds']:5} s  {mutation.name}",
                  flush=True)
    survivors = [m.name for m in mutations if found[m.name]["verdict"] == "SURVIVES"]
    print(f"{len(mutations) - len(survivors)} noticed or explained, {len(survivors)} survive")
    for name in survivors: print(f"  {name}")
    return 1 if survivors else 0


if __name__ == "__main__": sys.exit(main())
