"""The newcomer's path: its checks believe files and output, not exit codes; and what is copied for it is what git would take."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import checkout
import newcomer

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (640).to_bytes(4, "big") + (480).to_bytes(4, "big") + b"..." + b"IEND\xaeB`\x82"
README = "# a\n\n## Quickstart\n\n```python\nprint(1)\n```\n\n    sdpa: because\n      7 pairs\n      not flex: on that machine\n\n## More\n"
MAKEFILE = """
quickstart:
\t@test -z "$$HILBERT_ATTN_BACKEND$$VIRTUAL_ENV" && printf 'sdpa: because\\n  7 pairs\\n  not flex: here\\n'
demo:
\t@mkdir -p out/demo && for name in curve segments attention; do cp picture out/demo/$$name.png; done && echo '<p></p></html>' > out/demo/report.html
docs:
\t@mkdir -p _docs && touch _docs/index.html _docs/curves.html
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A repository in which every step works, in an instant."
    for name, value in (("HILBERT_ATTN_BACKEND", "reference"), ("VIRTUAL_ENV", "elsewhere"), ("MAKEFLAGS", "n")): monkeypatch.setenv(name, value)  # none of it reaches a newcomer
    (tmp_path / "nbs").mkdir()
    for name in ("index", "00_curves"): (tmp_path / "nbs" / f"{name}.ipynb").touch()
    (tmp_path / ".venv/lib/python3.12/site-packages/numpy-2.0.dist-info").mkdir(parents=True)
    (tmp_path / "picture").write_bytes(PNG)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return tmp_path


def test_the_path(clone):
    rows = newcomer.walk(clone, False, 60)
    assert [(row["name"], row["command"], row["packages"]) for row in rows] == [("attention", "make quickstart", 1), ("pictures", "make demo", 1), ("site", "make docs", 1)]
    assert [row["gave"] for row in rows] == ["2 lines as in README.md", "curve.png 640 x 480, segments.png 640 x 480, attention.png 640 x 480, report.html 0 kB", "_docs/index.html and 1 more pages"]
    assert rows[-1]["so_far"] == pytest.approx(sum(row["seconds"] for row in rows), abs=0.2)
    text = newcomer.table(rows).splitlines()
    assert len(text) == 4 and text[0].startswith("first") and all(row["gave"] in line for row, line in zip(rows, text[1:]))


@pytest.mark.parametrize("file, old, new, said", [
    ("Makefile", "7 pairs", "8 pairs", "`make quickstart`.*promises '7 pairs'"),
    ("Makefile", "test -z", "test -n", "`make quickstart`.*exit code 2"),
    ("Makefile", "curve segments", "curve", "`make demo`.*segments.png"),
    ("Makefile", "</html>", "", "`make demo`.*report.html is cut short"),
    ("Makefile", "touch _docs/index.html", "touch", "`make docs`.*only curves.html"),
    ("Makefile", "_docs/curves.html", "", "`make docs`.*2 notebooks"),
    ("picture", "IEND", "", "`make demo`.*curve.png is no whole picture"),
])
def test_steps_that_do_not_give_what_they_promise(clone, file, old, new, said):
    data = (clone / file).read_bytes()
    assert old.encode() in data
    (clone / file).write_bytes(data.replace(old.encode(), new.encode()))
    with pytest.raises(RuntimeError, match=f"(?s){said}"): newcomer.walk(clone, False, 60)


def test_steps_are_targets_of_the_makefile():
    makefile = (checkout.ROOT / "Makefile").read_text()
    for command, _ in newcomer.STEPS.values(): assert f"\n{command.split()[1]}: " in makefile


def test_a_checkout_is_copied_as_git_sees_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "ROOT", root := tmp_path / "root")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    root.mkdir()
    assert checkout.checkout_files() is None
    subprocess.run(["git", "init", "--quiet", root], check=True)
    for name, text in ((".gitignore", "*.log\n"), ("tracked.py", "1"), ("gone.py", "2"), ("new name.py", "3"), ("x.log", "4")): (root / name).write_text(text)
    subprocess.run(["git", "add", "tracked.py", "gone.py", ".gitignore"], cwd=root, check=True)
    (root / "gone.py").unlink()
    (root / "folder").mkdir()
    os.symlink("../tracked.py", root / "folder" / "link.py")
    paths = checkout.checkout_files()
    assert sorted(paths) == [".gitignore", "folder/link.py", "new name.py", "tracked.py"]
    checkout.copy_checkout(copy := tmp_path / "copy", paths)
    assert (copy / "folder" / "link.py").is_symlink() and (copy / "folder" / "link.py").read_text() == "1" and not (copy / "x.log").exists()
