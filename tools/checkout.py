"""The files of the checkout that git knows or would add: what a clone has once all is committed."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ["git", "ls-files", "-coz", "--exclude-standard"]


def checkout_files() -> list[str] | None:
    "Their paths from the root; None where there is no git checkout."
    try:
        listed = subprocess.run(LIST, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    if listed.returncode:
        return None
    return [path for path in listed.stdout.split("\0") if (ROOT / path).is_file()]


def copy_checkout(folder: Path, paths: list[str]) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path, follow_symlinks=False)
