"""Do the tests bite? Plants one mistake at a time and runs the tests that should notice it.

The list is mutations.json: file, text to replace (it occurs once), what to put there, tests, and
what goes wrong. A mistake that no test notices is named, unless the list says why none can.

A mistake is noticed when a test fails that passes without it. Tests that take too long say nothing:
such a mistake is named, too, and tried again by the next run.

What was found is stored after each mistake. The next run tries only those whose entry, file or
tests have changed since, so that a run that was stopped goes on where it was; and it begins with
the test that noticed the mistake before.
"""
import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from checkout import checkout_files, copy_checkout

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tools" / "mutations.json"
FOUND = ROOT / "nbs" / "results" / "mutations.json"
PRELOADED = ["torch", "numpy", "pytest", "hypothesis"] # of the process that tests are forked from
UNDECIDED = "TIMED OUT"


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


@dataclass(frozen=True)
class Outcome:
    "Of one run of tests."
    word: str # passed, failed, or timed out
    by: str = "" # the test that failed first, or the file that could not be collected


class FirstFailure:
    "Notes what fails first, for pytest."
    name = ""

    def note(self, report):
        if report.failed and not self.name: self.name = report.nodeid

    pytest_runtest_logreport = pytest_collectreport = note


def do_not_shrink():
    "A failure is enough: hypothesis need not look for a smaller one."
    from hypothesis import Phase, settings
    settings.register_profile("first", phases=(Phase.explicit, Phase.generate))
    settings.load_profile("first") # profiles that tests register build on it


def serve(sender: Connection, folder: Path, tests: tuple[str, ...]):
    "Runs tests in a process of its own, which can be ended with all that it started."
    os.setsid()
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True # a mistake and its file may be of the same second and size
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2): os.dup2(silence, stream)
    do_not_shrink()
    import pytest
    failure = FirstFailure()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[failure])
    sender.send(Outcome("failed" if code else "passed", failure.name))


def run_tests(folder: Path, tests: tuple[str, ...], seconds: float) -> Outcome:
    "Do these tests pass in this folder?"
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(sender, folder, tests))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds): return Outcome("timed out")
        return receiver.recv()
    except EOFError: return Outcome("failed") # it ended its process
    finally: end(process)


def end(process):
    "With what it started and left running."
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: process.kill() # it never became a group, or all of it is gone
    process.join()


def try_one(mutation: Mutation, folder: Path, seconds: float, first: str = "") -> Outcome:
    "Plants a mistake, runs its tests, takes it out again. A test that may notice it comes first."
    path = folder / mutation.file
    before = path.read_text()
    path.write_text(before.replace(mutation.old, mutation.new))
    try:
        if first and (found := run_tests(folder, (first,), seconds)).word == "failed": return found
        return run_tests(folder, mutation.tests, seconds)
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
    known = {name: row["digest"] for name, row in found.items() if row["verdict"] != UNDECIDED}
    return [m for m in mutations if known.get(m.name) != digest(m)]


class Trial:
    "Plants mistakes in a copy of the checkout."

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds
        self.passing: set[str] = set() # tests that pass without a mistake
        copy_checkout(folder, checkout_files())
        self.commit = commit()

    def check(self, by: str, tests: tuple[str, ...]):
        "What noticed a mistake passes without it, or nothing can be said."
        if by in self.passing: return
        whole = "::" not in by # a file that could not be collected, or a process that ended
        if run_tests(self.folder, tests if whole else (by,), self.seconds).word != "passed":
            sys.exit(f"this fails without any mutation: {by or ' '.join(tests)}")
        self.passing.add(by)

    def verdict(self, mutation: Mutation, first: str = "") -> dict:
        "A row of what was found."
        start = time.monotonic()
        outcome = try_one(mutation, self.folder, self.seconds, first)
        took = round(time.monotonic() - start)
        row = dict(name=mutation.name, verdict=judged(outcome, mutation), seconds=took)
        if outcome.word == "failed":
            self.check(outcome.by, mutation.tests)
            row["by"] = outcome.by
        if row["verdict"] == "explained": row["why"] = mutation.explained
        return row | dict(commit=self.commit, date=str(date.today()))


def judged(outcome: Outcome, mutation: Mutation) -> str:
    if outcome.word == "failed": return "noticed"
    if mutation.explained: return "explained"
    return UNDECIDED if outcome.word == "timed out" else "SURVIVES"


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
    if not mutations: sys.exit(f"no planted mistake has {given.k!r} in its name")
    if gone := misplaced(mutations): sys.exit(f"not found exactly once: {', '.join(gone)}")
    found = stored(given.results)
    left = to_try(mutations, {} if given.again else found)
    digests = {m.name: digest(m) for m in left}
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(Path(name), given.seconds)
        for i, mutation in enumerate(left, 1):
            row = trial.verdict(mutation, found.get(mutation.name, {}).get("by", ""))
            found[mutation.name] = row | dict(digest=digests[mutation.name])
            store(found, given.results)
            print(f"{i:3} of {len(left)}  {row['verdict']:9} {row['seconds']:5} s  {mutation.name}",
                  flush=True)
    return tell([found[m.name] for m in mutations])


def tell(rows: list[dict]) -> int:
    "Names what is left to do; 1 if something is."
    left = [row for row in rows if row["verdict"] in ("SURVIVES", UNDECIDED)]
    print(f"{len(rows) - len(left)} noticed or explained, {len(left)} not")
    for row in left: print(f"  {row['verdict']}  {row['name']}")
    return 1 if left else 0


if __name__ == "__main__": sys.exit(main())
