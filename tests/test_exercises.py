"""Exercises: unsolved they say so, the given answers are right, and wrong ones are noticed."""
import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from wrong_answers import WRONG

NBS = Path(__file__).resolve().parent.parent / "nbs"
sys.path.insert(0, str(NBS))
CHECKED = re.compile(r"^check\.(\w+)\((\w+)\)$", re.M)
ANSWER = re.compile(r"<details><summary>Answer</summary>\n\n```python\n(.*?)\n```", re.S)


def exercises_of(path: Path) -> list[tuple[str, str, str, str]]:
    "Name, cell before it that prepares, cell to fill in, and answer."
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    setup = next((x for x in sources if re.search(r"^from exercises import", x, re.M)), None)
    found = []
    for cell, answer in zip(sources, sources[1:]):
        name = CHECKED.search(cell)
        if name: found.append((name[1], setup, cell, ANSWER.search(answer)[1]))
    return found


ALL = {path.stem: exercises_of(path) for path in sorted(NBS.glob("*.ipynb"))}
CASES = [pytest.param(*exercise, id=f"{stem}-{exercise[0]}")
         for stem, found in ALL.items() for exercise in found]
WRONG_CASES = [
    pytest.param(name, setup, cell, wrong, id=f"{stem}-{name}-{i}")
    for stem, found in ALL.items() for name, setup, cell, _ in found
    for i, wrong in enumerate(WRONG[stem][name])]


def verdict(setup: str, answer: str, cell: str, folder: Path) -> str:
    "What the last line of the cell shows when the answer stands in its place."
    call = cell.rstrip().splitlines()[-1]
    ast.parse(call, mode="eval")
    path = folder / "solved.py"  # Triton reads the source of its kernels
    path.write_text(f"{setup}\n\n{answer}\n\nfound = {call}\n")
    return runpy.run_path(str(path))["found"]


@pytest.mark.parametrize("name, setup, cell, answer", CASES)
def test_the_given_answer_is_right(name, setup, cell, answer, tmp_path):
    assert verdict(setup, answer, cell, tmp_path) == "Right."


@pytest.mark.parametrize("name, setup, cell, answer", CASES)
def test_unsolved_it_says_so(name, setup, cell, answer, tmp_path):
    head = cell.rstrip().rsplit("\n", 1)[0]
    assert verdict(setup, head, cell, tmp_path) == "Not solved yet."


@pytest.mark.parametrize("name, setup, cell, wrong", WRONG_CASES)
def test_a_wrong_answer_is_noticed(name, setup, cell, wrong, tmp_path):
    assert verdict(setup, wrong, cell, tmp_path).startswith("Not yet: ")


def test_lessons_have_exercises():
    assert set(WRONG) == {stem for stem, found in ALL.items() if found}
    assert all(len(ALL[stem]) >= 4 and set(WRONG[stem]) == {x[0] for x in ALL[stem]}
               for stem in WRONG)


def test_a_check_that_meets_an_error_tells_it():
    from exercises import curves
    assert curves.rank_of(lambda order: 1 / 0) == "Not yet: it raises ZeroDivisionError: " \
        "division by zero"
