"""Builds what a release uploads, and tries it where a user would install it.

`python tools/release.py` wants a clean checkout whose version stands in CITATION.cff and, with a
date, in CHANGELOG.md. It builds source distribution and wheel into dist/, has twine read them, and
installs the wheel into a new environment of each Python that the package supports and that is here:
there README.md's quickstart must run. The changelog's section becomes dist/notes.md, and with --tag
the message of a tag. Nothing is uploaded. With --rehearse all of it is tried on any tree, undated.
"""
import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from checkout import ROOT, checkout_files, copy_checkout

import hilbert_attn

VERSION = hilbert_attn.__version__
PYTHONS = "python3.11", "python3.12", "python3.13"
SECTION = re.compile(rf"^## {re.escape(VERSION)}, (?P<date>.+)\n(?P<notes>(?:(?!## ).*\n)*)", re.M)


def run(*command: str | Path, cwd: Path = ROOT) -> str: # what it prints
    "Runs a command; the release ends where it fails."
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode == 0: return done.stdout
    called = " ".join(map(str, command))
    raise SystemExit(f"{called}\n{done.stdout}{done.stderr}release.py: the command above failed")


def runs(python: str) -> bool:
    "Is there such a program? A name on the path may lead to none."
    try: return subprocess.run([python, "--version"], capture_output=True).returncode == 0
    except OSError: return False


def notes(changelog: str) -> tuple[str, str]: # date, text
    "The changelog's section of this version."
    found = SECTION.search(changelog)
    if found is None: raise SystemExit(f"CHANGELOG.md has no section '## {VERSION}, <date>'")
    return found["date"], found["notes"].strip()


def unready(changelog: str, citation: str, changes: str) -> list[str]:
    "What is missing before a release."
    faults, (date, _) = [], notes(changelog)
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        faults.append(f"CHANGELOG.md says '{VERSION}, {date}': give it a date, as 2026-01-31")
    if f"\nversion: {VERSION}\n" not in citation:
        faults.append(f"CITATION.cff has another version than {VERSION}")
    if changes: faults.append(f"the checkout has changes:\n{changes}")
    return faults


def build(out: Path) -> list[Path]: # source distribution and wheel
    "Both, from the files that git knows."
    shutil.rmtree(out, ignore_errors=True)
    with TemporaryDirectory() as folder:
        copy_checkout(Path(folder), checkout_files() or [])
        run(sys.executable, "-m", "build", "--outdir", out, folder)
    built = sorted(out.iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *built)
    return built


def try_wheel(python: str, wheel: Path) -> str: # what the quickstart prints last
    "Installs the wheel into a new environment, and runs it as README.md does."
    with TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        inside = Path(folder) / "bin" / "python"
        constraints = ROOT / "constraints.txt"
        run(inside, "-m", "pip", "install", "--quiet", "--no-compile", "-c", constraints, wheel)
        said = run(inside, "-m", "hilbert_attn", "--version", cwd=Path(folder))
        if said.split()[-1] != VERSION: raise SystemExit(f"{python} runs {said}, not {VERSION}")
        return run(inside, ROOT / "examples" / "quickstart.py", cwd=Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="try it all on any tree")
    parser.add_argument("--tag", action="store_true", help=f"tag this commit as v{VERSION}")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where files go")
    parser.add_argument("--pythons", nargs="*", default=PYTHONS, help="programs to try it with")
    args = parser.parse_args()
    changelog, citation = ((ROOT / x).read_text() for x in ("CHANGELOG.md", "CITATION.cff"))
    faults = unready(changelog, citation, run("git", "status", "--porcelain"))
    if faults and not args.rehearse: raise SystemExit("\n".join(faults))
    built = build(args.out)
    print(*built, sep="\n")
    for python in args.pythons:
        if not runs(python):
            print(f"{python}: not here, not tried")
            continue
        try_wheel(python, next(path for path in built if path.suffix == ".whl"))
        print(f"{python}: installs, and runs the quickstart")
    _, text = notes(changelog)
    (message := args.out / "notes.md").write_text(f"hilbert_attn {VERSION}\n\n{text}\n")
    if args.tag: run("git", "tag", "-a", f"v{VERSION}", "-F", message, "--cleanup=verbatim")
    print(f"notes in {message}; to upload: twine upload {args.out}/hilbert_attn*")


if __name__ == "__main__":
    main()
