"""The newcomer's path: its checks believe files and output, not exit codes.

And what is copied for it is what git would take.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import checkout
import newcomer

SIZES = (640).to_bytes(4, "big") + (480).to_bytes(4, "big")
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + SIZES + b"..." + b"IEND\xaeB`\x82"
README = """# a

## Quickstart

```python
print(1)
```

    sdpa: because
      7 pairs
      not flex: on that machine

## More
"""
MAKEFILE = """
quickstart:
\t@test -z "$$HILBERT_ATTN_BACKEND$$VIRTUAL_ENV"
\t@printf 'sdpa: because\\n  7 pairs\\n  not flex: here\\n'
demo:
\t@mkdir -p out/demo
\t@for name in curve segments attention; do cp picture out/demo/$$name.png; done
\t@echo '<p></p></html>' > out/demo/report.html
docs:
\t@mkdir -p _docs && touch _docs/index.html _docs/curves.html
"""
NOT_FOR_NEWCOMERS = {
    "HILBERT_ATTN_BACKEND": "reference",
    "VIRTUAL_ENV": "here",
    "MAKEFLAGS": "n",
}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A repository in which every step works, in an instant."
    for name, value in NOT_FOR_NEWCOMERS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "nbs").mkdir()
    for name in ("index", "00b_curves"):
        (tmp_path / "nbs" / f"{name}.ipynb").touch()
    (tmp_path / ".venv/lib/python3.12/site-packages/numpy-2.0.dist-info").mkdir(
        parents=True
    )
    (tmp_path / "picture").write_bytes(PNG)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return tmp_path


def test_the_path(clone):
    rows = newcomer.walk(clone, False, 60)
    assert [(row["name"], row["command"], row["packages"]) for row in rows] == [
        ("attention", "make quickstart", 1),
        ("pictures", "make demo", 1),
        ("site", "make docs", 1),
    ]
    pictures = [f"{name}.png 640 x 480" for name in ("curve", "segments", "attention")]
    assert [row["gave"] for row in rows] == [
        "2 lines as in README.md",
        ", ".join([*pictures, "report.html 0 kB"]),
        "_docs/index.html and 1 more pages",
    ]
    whole = sum(row["seconds"] for row in rows)
    assert rows[-1]["so_far"] == pytest.approx(whole, abs=0.2)


def test_the_table():
    row = dict(
        name="site",
        command="make docs",
        seconds=9.04,
        so_far=12,
        packages=3,
        gave="all",
    )
    assert newcomer.table([row]).splitlines() == [
        "first  command    seconds  in all  packages  what came out",
        "site   make docs      9.0    12.0         3  all",
    ]


@pytest.mark.parametrize(
    "file, old, new, said",
    [
        ("Makefile", "7 pairs", "8 pairs", "`make quickstart`.*promises '7 pairs'"),
        ("Makefile", "test -z", "test -n", "`make quickstart`.*exit code 2"),
        ("Makefile", "curve segments", "curve", "`make demo`.*segments.png"),
        ("Makefile", "</html>", "", "`make demo`.*report.html is cut short"),
        (
            "Makefile",
            "touch _docs/index.html",
            "touch",
            "`make docs`.*only curves.html",
        ),
        ("Makefile", "_docs/curves.html", "", "`make docs`.*2 notebooks"),
        ("picture", "IEND", "", "`make demo`.*curve.png is no whole picture"),
        ("picture", "\x01\xe0", "\0\1", "`make demo`.*curve.png is tiny"),
    ],
)
def test_steps_that_do_not_give_what_they_promise(clone, file, old, new, said):
    old, new = old.encode("latin-1"), new.encode("latin-1")
    data = (clone / file).read_bytes()
    assert old in data
    (clone / file).write_bytes(data.replace(old, new))
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        newcomer.walk(clone, False, 60)


def test_steps_are_targets_of_the_makefile():
    makefile = (checkout.ROOT / "Makefile").read_text()
    for command, _ in newcomer.STEPS.values():
        assert f"\n{command.split()[1]}: " in makefile


def test_no_checkout_has_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert checkout.checkout_files() is None


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    "One with a file that is tracked, one that is gone, one that is new, one ignored, and a link."
    root = tmp_path / "root"
    monkeypatch.setattr(checkout, "ROOT", root)
    subprocess.run(["git", "init", "--quiet", root], check=True)
    (root / ".gitignore").write_text("*.log\n")
    for name in ("tracked.py", "gone.py", "new name.py", "x.log"):
        (root / name).touch()
    subprocess.run(
        ["git", "add", "tracked.py", "gone.py", ".gitignore"], cwd=root, check=True
    )
    (root / "gone.py").unlink()
    (root / "folder").mkdir()
    os.symlink("../tracked.py", root / "folder" / "link.py")
    return root


def test_a_checkout_is_copied_as_git_sees_it(repository, tmp_path):
    paths = checkout.checkout_files()
    assert sorted(paths) == [
        ".gitignore",
        "folder/link.py",
        "new name.py",
        "tracked.py",
    ]
    copy = tmp_path / "copy"
    checkout.copy_checkout(copy, paths)
    assert (copy / "folder" / "link.py").is_symlink()
    assert (copy / "folder" / "link.py").read_text() == ""
    assert not (copy / "x.log").exists()
