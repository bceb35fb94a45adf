"""The list of planted mistakes fits the sources, and the tool tells noticed ones from survivors."""
import subprocess
import sys
from pathlib import Path

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


def test_survivors_are_told_from_the_others(tmp_path):
    (tmp_path / "one.py").write_text("def add(a, b): return a + b\n\n\ndef unused(): return 1\n")
    test = "from one import add\n\n\ndef test(): assert add(1, 2) == 3\n"
    (tmp_path / "test_one.py").write_text(test)
    def tried(old, new):
        mutation = mutate.Mutation("m", "one.py", old, new, ("test_one.py",))
        return mutate.try_one(mutation, tmp_path, 60)
    assert mutate.run_tests(tmp_path, ("test_one.py",), 60)
    assert tried("a + b", "a - b")
    assert tried("return a + b", "return (")  # does not even import
    assert not tried("return 1", "return 2")
    assert (tmp_path / "one.py").read_text().startswith("def add(a, b): return a + b\n")
    assert mutate.misplaced([mutate.Mutation("m", "one.py", "return", "", ())], tmp_path) == ["m"]


def test_a_list_that_does_not_fit_is_refused():
    script = ("import mutate; gone = mutate.Mutation('m', 'README.md', 'no such text', '', ()); "
              "mutate.load = lambda: [gone]; mutate.main()")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tools",
                          capture_output=True, text=True)
    assert done.returncode == 1 and "not found exactly once: m" in done.stderr
