"""The built site, for tests that read it and for tests that open it in a browser."""

import fcntl
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SITE = ROOT / "_docs"
PROCESSED = ROOT / "_proc"
FOLDERS = [NBS, ROOT / "tools", ROOT / "hilbert_attn"]
FILES = [ROOT / "_quarto.yml", ROOT / "settings.ini", ROOT / "CHANGELOG.md"]
PASSING = {".ipynb_checkpoints", "__pycache__", "nbdev.yml", "site.json"}


def built() -> Path:
    "The folder of the site, built where it is absent or stale, by one process at a time."
    pytest.importorskip("sphinx")
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "tools/build_site.py"]
        if is_stale():
            subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    return SITE


def is_stale() -> bool:
    "Whether something that the site is made from is newer than the site."
    start = SITE / "index.html"
    if not start.exists() or not PROCESSED.exists():
        return True
    inside = [path for folder in FOLDERS for path in folder.rglob("*")]
    kept = [path for path in inside + FILES if not PASSING & {*path.parts}]
    times = [path.stat().st_mtime for path in kept if path.is_file()]
    return start.stat().st_mtime < max(times)


def joined(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)


def read_cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text())["cells"]


def navigation(folder: Path) -> list[tuple[str, list[str]]]:
    "The sections of the sidebar, each with the files of its pages; a separator has none."
    website = yaml.safe_load((folder / "_quarto.yml").read_text())["website"]
    found = []
    for entry in website["sidebar"]["contents"]:
        inside = [entry] if "href" in entry else entry.get("contents", [])
        files = [page if isinstance(page, str) else page["href"] for page in inside]
        found.append((entry.get("section") or entry["text"], files))
    return found


def exported() -> dict[str, str]:
    "Notebook -> the file that it exports."
    found = {}
    for path in NBS.glob("[0-9]*.ipynb"):
        module = re.search(r"#\| default_exp ([\w.]+)", path.read_text())
        if module:
            found[path.name] = f"hilbert_attn/{module[1].replace('.', '/')}.py"
    return found
