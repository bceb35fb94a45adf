"""What the pages of the built site weigh, each with everything that it loads.

    python tools/weigh_site.py [folder]    adds the weights to nbs/results/site.json
"""

import argparse
import json
import re
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "nbs" / "results" / "site.json"
SOURCE = re.compile(r'<(?:script|img)\b[^>]* src="([^"]+)"')
SHEET = re.compile(r'<link rel="stylesheet"[^>]* href="([^"]+)"')


def size(files) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def loaded(site: Path, text: str) -> set[Path]:
    "The files that a page loads; what formulas need counts as a whole, fonts included."
    names = SOURCE.findall(text) + SHEET.findall(text)
    files = {site / re.split("[?#]", name)[0] for name in names}
    if any("mathjax" in name for name in names):
        files |= {*(site / "_static" / "mathjax").rglob("*")}
    return files


def weights(site: Path) -> dict:
    pages = {}
    for path in sorted(site.glob("*.html")):
        text = path.read_text()
        pages[path.stem] = len(text.encode()) + size(loaded(site, text))
    return {"total": size(site.rglob("*")), "pages": pages}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "_docs", help="of the site")
    site = parser.parse_args().folder
    if not (site / "index.html").exists(): parser.error(f"no site in {site}: `make docs` builds it")
    made = datetime.fromtimestamp((site / "index.html").stat().st_mtime, timezone.utc)
    found = {"date": f"{made:%Y-%m-%d %H:%M} UTC", **weights(site)}
    stored = json.loads(STORED.read_text()) if STORED.exists() else []
    STORED.write_text(json.dumps([*stored, found], indent=1) + "\n")
    print(f"{found['total'] / 1e6:.2f} MB, {len(found['pages'])} pages")


if __name__ == "__main__":
    main()
