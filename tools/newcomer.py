"""The newcomer's path, timed: from a fresh clone to attention, pictures and site.

`python tools/newcomer.py` clones this repository and runs what README.md tells, one command after
the other. Nothing is there before but git, make, Python and what pip has cached of earlier
downloads (--no-cache takes that away too). Seconds, what was installed and what came out are
appended to nbs/results/<machine>/newcomer.json. With --worktree the files are those of the working
tree, committed or not, and the run is stored only where --out says.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from checkout import ROOT, checkout_files, copy_checkout

from hilbert_attn.bench import environment, save_run

QUICKSTART = re.compile(
    r"^## Quickstart\n\n```python\n.*?^```\n\n"  # the code
    r"((?:    [^\n]*\n)+)",  # what it prints
    re.M | re.S,
)
LEAKS = "VIRTUAL_ENV", "PYTHON", "HILBERT_ATTN_", "TRITON_", "MAKE", "MFLAGS"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def attention(clone: Path, printed: str) -> str:
    "README.md shows what its quickstart prints, but for the backends that cannot run there."
    promised = QUICKSTART.search((clone / "README.md").read_text())[1]
    lines = [line.strip() for line in promised.splitlines()]
    lines = [line for line in lines if not line.startswith("not ")]
    for line in lines:
        if line not in printed:
            raise RuntimeError(f"README.md promises {line!r}, which was not printed")
    return f"{len(lines)} lines as in README.md"


def picture_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    if not data.startswith(PNG_HEAD) or b"IEND" not in data[-12:]:
        raise RuntimeError(f"{path.name} is no whole picture")
    width, height = (
        int.from_bytes(data[16:20], "big"),
        int.from_bytes(data[20:24], "big"),
    )
    if min(width, height) < 100:
        raise RuntimeError(f"{path.name} is tiny: {width} x {height}")
    return width, height


def pictures(clone: Path, printed: str) -> str:
    folder, gave = clone / "out" / "demo", []
    for name in ("curve", "segments", "attention"):
        width, height = picture_size(folder / f"{name}.png")
        gave.append(f"{name}.png {width} x {height}")
    page = (folder / "report.html").read_text()
    if "</html>" not in page:
        raise RuntimeError("report.html is cut short")
    return ", ".join([*gave, f"report.html {len(page) / 1e3:,.0f} kB"])


def site(clone: Path, printed: str) -> str:
    pages = sorted(path.name for path in (clone / "_docs").glob("*.html"))
    notebooks = list((clone / "nbs").glob("*.ipynb"))
    if "index.html" not in pages or len(pages) < len(notebooks):
        there = ", ".join(pages) or "nothing"
        raise RuntimeError(f"{len(notebooks)} notebooks, but the site has only {there}")
    return f"_docs/index.html and {len(pages) - 1} more pages"


STEPS: dict[str, tuple[str, Callable[[Path, str], str]]] = {
    "attention": ("make quickstart", attention),
    "pictures": ("make demo", pictures),
    "site": ("make docs", site),
}


def packages(clone: Path) -> int:
    return len(list((clone / ".venv").glob("lib/python*/site-packages/*.dist-info")))


def own_environment(no_cache: bool) -> dict[str, str]:
    "Nothing of the environment that this runs in, and no other one but what make creates."
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(LEAKS)
    }
    folders = env["PATH"].split(os.pathsep)
    kept = [
        folder
        for folder in folders
        if not (Path(folder).parent / "pyvenv.cfg").exists()
    ]
    env["PATH"] = os.pathsep.join(kept)
    if no_cache:
        env["PIP_NO_CACHE_DIR"] = "1"
    return env


def run_step(name: str, clone: Path, env: dict[str, str], limit: int) -> dict:
    "Seconds, and what came out; a `RuntimeError` if it is not what the step promises."
    command, check = STEPS[name]
    start = time.perf_counter()
    done = subprocess.run(
        command.split(),
        cwd=clone,
        env=env,
        timeout=limit,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seconds = time.perf_counter() - start
    try:
        if done.returncode:
            raise RuntimeError(f"it ended with exit code {done.returncode}")
        gave = check(clone, done.stdout)
    except (RuntimeError, OSError) as error:
        broken = f"`{command}` did not give what it promises: {error}"
        raise RuntimeError(f"{broken}\n{done.stdout[-6000:]}") from None
    return dict(name=name, command=command, seconds=round(seconds, 1), gave=gave)


def walk(clone: Path, no_cache: bool, limit: int) -> list[dict]:
    "Runs the steps in turn, and stops at the first that does not give what it promises."
    env, rows, so_far = own_environment(no_cache), [], 0.0
    for name, (command, _) in STEPS.items():
        print(f"{command} ...", end=" ", flush=True)
        row = run_step(name, clone, env, limit)
        print(f"{row['seconds']:.1f} s", flush=True)
        so_far += row["seconds"]
        rows.append(row | dict(so_far=round(so_far, 1), packages=packages(clone)))
    return rows


def table(rows: list[dict]) -> str:
    cells = [["first", "command", "seconds", "in all", "packages", "what came out"]]
    for row in rows:
        times = f"{row['seconds']:.1f}", f"{row['so_far']:.1f}", str(row["packages"])
        cells.append([row["name"], row["command"], *times, row["gave"]])
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust]
    lines = [
        [side(cell, width) for cell, side, width in zip(line, sides, widths)]
        for line in cells
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = partial(parser.add_argument, action="store_true")
    flag(
        "--worktree", help="copy the files of the working tree instead of cloning HEAD"
    )
    flag("--no-cache", help="take nothing from pip's cache")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of results, not nbs/results"
    )
    limit = "for each step (default: 3600)"
    parser.add_argument(
        "--limit", metavar="SECONDS", type=int, default=3600, help=limit
    )
    return parser


def pip_cache_bytes() -> int:
    command = [sys.executable, "-m", "pip", "cache", "dir"]
    folder = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    files = Path(folder or "/nowhere").rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def clone_into(folder: Path, worktree: bool) -> None:
    if not worktree:
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        return
    paths = checkout_files()
    if paths is None:
        sys.exit("--worktree: this is not a git checkout")
    copy_checkout(folder, paths)


def main() -> None:
    args = arguments().parse_args()
    config = dict(
        source="working tree" if args.worktree else "clone of HEAD",
        pip_cache_bytes=0 if args.no_cache else pip_cache_bytes(),
    )
    with TemporaryDirectory() as folder:
        clone = Path(folder) / "hilbert_attn"
        clone_into(clone, args.worktree)
        try:
            rows = walk(clone, args.no_cache, args.limit)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            sys.exit(str(error))
        print(table(rows))
        if args.worktree and not args.out:
            return
        whole = dict(
            suite="newcomer", quick=False, config=config, environment=environment()
        )
        path = save_run(whole | dict(rows=rows), args.out)
        print(
            f"appended to {path}", flush=True
        )  # before the folder goes, which takes a while


if __name__ == "__main__":
    main()
