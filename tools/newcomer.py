"""The newcomer's path, timed: `python tools/newcomer.py` clones this repository and runs what README.md tells, one command after the other, until attention, pictures and site are there.

Nothing is there before but git, make, Python and what pip has cached of earlier downloads (--no-cache takes that away too). Seconds, what was installed and what came out are appended to
nbs/results/<machine>/newcomer.json. With --worktree the files are those of the working tree, committed or not, and the run is stored only where --out says.
"""
import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from hilbert_attn.bench import environment, save_run

from checkout import ROOT, checkout_files, copy_checkout


def attention(clone: Path, printed: str) -> str:
    "README.md shows what its quickstart prints; which backends cannot run, and why, differs between machines."
    promised = re.search(r"^## Quickstart\n\n```python\n.*?^```\n\n((?:    [^\n]*\n)+)", (clone / "README.md").read_text(), re.M | re.S)[1]
    lines = [line.strip() for line in promised.splitlines() if not line.strip().startswith("not ")]
    if missing := [line for line in lines if line not in printed]: raise RuntimeError(f"README.md promises {missing[0]!r}, which was not printed")
    return f"{len(lines)} lines as in README.md"


def pictures(clone: Path, printed: str) -> str:
    folder, sizes = clone / "out" / "demo", {}
    for name in ("curve", "segments", "attention"):
        data = (folder / f"{name}.png").read_bytes()
        if not data.startswith(b"\x89PNG") or b"IEND" not in data[-12:]: raise RuntimeError(f"{name}.png is no whole picture")
        sizes[name] = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    page = (folder / "report.html").read_text()
    if "</html>" not in page or min(min(size) for size in sizes.values()) < 100: raise RuntimeError("report.html is cut short, or a picture is tiny")
    return ", ".join(f"{name}.png {width} x {height}" for name, (width, height) in sizes.items()) + f", report.html {len(page) / 1e3:,.0f} kB"


def site(clone: Path, printed: str) -> str:
    pages = sorted(path.name for path in (clone / "_docs").glob("*.html"))
    notebooks = list((clone / "nbs").glob("*.ipynb"))
    if "index.html" not in pages or len(pages) < len(notebooks): raise RuntimeError(f"{len(notebooks)} notebooks, but the site has only {', '.join(pages) or 'nothing'}")
    return f"_docs/index.html and {len(pages) - 1} more pages"


STEPS: dict[str, tuple[str, Callable[[Path, str], str]]] = {"attention": ("make quickstart", attention), "pictures": ("make demo", pictures), "site": ("make docs", site)}


def packages(clone: Path) -> int:
    return len(list((clone / ".venv").glob("lib/python*/site-packages/*.dist-info")))


def walk(clone: Path, no_cache: bool, limit: int) -> list[dict]:
    "Runs the steps in turn; rows with seconds and what came out. A `RuntimeError` at the first that does not give what it promises."
    env = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON", "HILBERT_ATTN_", "TRITON_", "MAKE", "MFLAGS"))}
    env["PATH"] = os.pathsep.join(folder for folder in env["PATH"].split(os.pathsep) if not (Path(folder).parent / "pyvenv.cfg").exists())  # no environment but the one that make creates
    if no_cache: env["PIP_NO_CACHE_DIR"] = "1"
    rows = []
    for name, (command, check) in STEPS.items():
        print(f"{command} ...", end=" ", flush=True)
        start = time.perf_counter()
        done = subprocess.run(command.split(), cwd=clone, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
        seconds = time.perf_counter() - start
        print(f"{seconds:.1f} s", flush=True)
        try:
            if done.returncode: raise RuntimeError(f"it ended with exit code {done.returncode}")
            gave = check(clone, done.stdout)
        except (RuntimeError, OSError) as error: raise RuntimeError(f"`{command}` did not give what it promises: {error}\n{done.stdout[-6000:]}") from None
        rows.append(dict(name=name, command=command, seconds=round(seconds, 1), so_far=round(sum(row["seconds"] for row in rows) + seconds, 1), packages=packages(clone), gave=gave))
    return rows


def table(rows: list[dict]) -> str:
    cells = [["first", "command", "seconds", "in all", "packages", "what came out"]] + [[row["name"], row["command"], f"{row['seconds']:.1f}", f"{row['so_far']:.1f}", str(row["packages"]), row["gave"]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) if 2 <= i <= 4 else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worktree", action="store_true", help="copy the files of the working tree instead of cloning HEAD; stored only where --out says")
    parser.add_argument("--no-cache", action="store_true", help="take nothing from pip's cache")
    parser.add_argument("--out", metavar="DIR", help="folder of results instead of nbs/results")
    parser.add_argument("--limit", metavar="SECONDS", type=int, default=3600, help="for each step (default: 3600)")
    args = parser.parse_args()
    cached = 0 if args.no_cache else sum(path.stat().st_size for path in Path(subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True).stdout.strip() or "/nowhere").rglob("*") if path.is_file())
    with TemporaryDirectory() as folder:
        clone = Path(folder) / "hilbert_attn"
        if args.worktree:
            if (paths := checkout_files()) is None: parser.error("this is not a git checkout")
            copy_checkout(clone, paths)
        else: subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        try: rows = walk(clone, args.no_cache, args.limit)
        except (RuntimeError, subprocess.TimeoutExpired) as error: sys.exit(str(error))
        print(table(rows))
        config = dict(source="working tree" if args.worktree else "clone of HEAD", pip_cache_bytes=cached)
        run = dict(suite="newcomer", quick=False, config=config, environment=environment(), rows=rows)
        if args.out or not args.worktree: print(f"appended to {save_run(run, args.out)}", flush=True)  # before the folder goes, which takes a while


if __name__ == "__main__": main()
