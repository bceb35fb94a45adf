"""The list of planted mistakes fits the sources, and the tool tells noticed ones from survivors."""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import mutate  # noqa: E402


def test_every_mutation_has_its_place():
    mutations = mutate.load()
    assert mutations and not mutate.misplaced(mutations)
    assert len({m.name for m in mutations}) == len(mutations)
    for m in mutations:
        assert m.new != m.old
        for test in m.tests:
            if test.startswith("tests/"): assert (ROOT / test).is_file(), test


def toy(folder, old, new, explained=""):
    "A module, its test, and a mistake."
    (folder / "one.py").write_text("def add(a, b): return a + b\n\n\ndef unused(): return 1\n")
    tests = ("def test_same(): assert add(2, 0) == 2", "def test(): assert add(1, 2) == 3",
             "def test_waits(): sleep(max(0, -add(1, 2)))")
    text = "\n".join(("from time import sleep", "from one import add", *tests))
    (folder / "test_one.py").write_text(text + "\n")
    return mutate.Mutation("m", "one.py", old, new, ("test_one.py",), explained)


NOTICED_BY = "test_one.py::test"
MISTAKES = (
    (("a + b", "a - b"), ("noticed", NOTICED_BY)),
    (("return a + b", "return ("), ("noticed", "test_one.py")),  # does not even import
    (("return 1", "return 2"), ("SURVIVES", None)),
    (("return 1", "return 2", "nobody calls it"), ("explained", None)),
)


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "copy_checkout", lambda folder, files: None)
    monkeypatch.setattr(mutate, "PRELOADED", [])
    return mutate.Trial(tmp_path, 60)


@pytest.mark.parametrize("mistake,expected", MISTAKES)
def test_survivors_are_told_from_the_others(mistake, expected, trial):
    mutation = toy(trial.folder, *mistake)
    before = (trial.folder / "one.py").read_text()
    row = trial.verdict(mutation)
    assert (row["verdict"], row.get("by")) == expected
    assert (trial.folder / "one.py").read_text() == before
    assert mutate.misplaced([mutation], trial.folder) == []
    assert mutate.misplaced([replace(mutation, old="return")], trial.folder) == ["m"]


def test_tests_that_take_too_long_say_nothing(trial):
    mutation = toy(trial.folder, "a + b", "a + b - 2 * 99 * (a == 1)")
    only_the_wait = replace(mutation, tests=("test_one.py::test_waits",))
    trial.seconds = 2
    row = trial.verdict(only_the_wait) | dict(digest=mutate.digest(only_the_wait, trial.folder))
    assert row["verdict"] == mutate.UNDECIDED and mutate.tell([row]) == 1
    assert "by" not in row


def test_what_noticed_a_mistake_before_is_asked_first(trial, monkeypatch):
    asked, run = [], mutate.run_tests
    monkeypatch.setattr(
        mutate, "run_tests", lambda folder, tests, s: asked.append(tests) or run(folder, tests, s))
    mutation = toy(trial.folder, "a + b", "a - b")
    assert trial.verdict(mutation, NOTICED_BY)["by"] == NOTICED_BY
    assert asked == [(NOTICED_BY,)] * 2  # with the mistake, and without
    del asked[:]
    assert trial.verdict(mutation, "test_one.py::test_same")["verdict"] == "noticed"
    assert asked == [("test_one.py::test_same",), ("test_one.py",)]  # known to pass without


def test_a_test_that_fails_anyhow_notices_nothing(trial):
    mutation = toy(trial.folder, "return 1", "return 2")
    with (trial.folder / "test_one.py").open("a") as file: file.write("def test_no(): assert 0\n")
    with pytest.raises(SystemExit, match="without any mutation: test_one.py::test_no"):
        trial.verdict(mutation)


def test_undecided_ones_are_tried_again(monkeypatch):
    one, two = mutate.load()[:2]
    rows = {m.name: dict(digest=mutate.digest(m), verdict=word)
            for m, word in ((one, mutate.UNDECIDED), (two, "SURVIVES"))}
    assert mutate.to_try([one, two], rows) == [one]


def test_a_list_that_does_not_fit_is_refused():
    script = ("import mutate; gone = mutate.Mutation('m', 'README.md', 'no such text', '', ()); "
              "mutate.load = lambda: [gone]; mutate.main()")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tools",
                          capture_output=True, text=True)
    assert done.returncode == 1 and "not found exactly once: m" in done.stderr
