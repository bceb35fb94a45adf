"""Build the site into _docs/ from the notebooks, their stored outputs and _quarto.yml.

nbdev processes the notebooks into _proc/, where they are mended (`processed`). Then Quarto renders
them where it is installed, and Sphinx elsewhere (`sphinx_site`). Either way a warning is an error,
and nothing is run but what nbdev needs to document the exported names.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import documented  # noqa: F401  nbdev's processes import it with this file
import processed
import sphinx_site
from lighter import lighten
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from nbformat import NotebookNode
from notebook import NBS, ROOT, prepare, read

SITE = ROOT / "_docs"
STATIC = ["styles.css", "logo.svg", "card.png", "site.js", "search.js"]  # what pages load
PLAYED = ["explorer", "report"]  # pages of their own
MATHJAX = ["input/tex", "output/chtml", "a11y/assistive-mml"]  # and what these load:
MATHJAX_PARTS = ["core", "output/chtml/fonts/tex", *MATHJAX]
UNUSED_FONTS = re.compile("Fraktur|SansSerif|Script|Typewriter|Calligraphic-Bold|Vector-Bold")


def quarto(folder: Path) -> None:
    "Leave the site in `folder`, under the name of `SITE`."
    command = ["quarto", "render", "--no-cache"]
    run = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(run.stderr)
    if run.returncode or "WARN" in run.stderr:
        sys.exit("quarto render failed or warned: see above")


def sphinx(folder: Path) -> None:
    sphinx_site.build(folder, SITE.name, STATIC)


def add_files(site: Path) -> None:
    "What pages load or offer, and no renderer copies: scripts, formulas, the explorer, notebooks."
    static = site / "_static"
    static.mkdir(exist_ok=True)
    for name in STATIC:
        shutil.copy(NBS / name, static)
    add_mathjax(static / "mathjax")
    for folder in PLAYED:
        shutil.copytree(NBS / folder, site / folder, dirs_exist_ok=True)
    add_notebooks(site / processed.ARCHIVE)


def add_notebooks(archive: Path) -> None:
    "All notebooks to be run, with what their exercises import."
    with ZipFile(archive, "w", ZIP_DEFLATED, compresslevel=9) as file:
        for path in sorted([*NBS.glob("*.ipynb"), *NBS.glob("exercises/*.py")]):
            text = path.read_text()
            if path.suffix == ".ipynb":
                text = json.dumps(without_outputs(path), ensure_ascii=False, indent=1)
            file.writestr(ZipInfo(f"nbs/{path.relative_to(NBS)}"), text, ZIP_DEFLATED, 9)


def without_outputs(path: Path) -> NotebookNode:
    "A notebook to be run: what it has shown stands on its page."
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    return notebook


def add_mathjax(target: Path) -> None:
    "What sets formulas on a page, with the fonts that TeX has: no menu, no speech, no other input."
    package = find_spec("sphinx-mathjax-offline").submodule_search_locations[0]
    source, fonts = Path(package) / "static" / "mathjax", "output/chtml/fonts/woff-v2"
    loaded = json.dumps({"loader": {"load": MATHJAX}})
    settings = f"MathJax = Object.assign({loaded}, window.MathJax);"
    target.mkdir(exist_ok=True)
    start = (source / "startup.js").read_text()
    (target / "tex-chtml.js").write_text(f"{settings}\n{start}")
    for part in MATHJAX_PARTS:
        script = target / f"{part}.js"
        script.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / f"{part}.js", script)
    (target / fonts).mkdir(parents=True, exist_ok=True)
    for font in (source / fonts).iterdir():
        if not UNUSED_FONTS.search(font.name):
            shutil.copy(font, target / fonts)


def main() -> None:
    prepare()
    refresh_quarto_yml()
    render = quarto if shutil.which("quarto") else sphinx
    folder = proc_nbs(force=True)
    processed.finish(folder)
    render(folder)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(folder / SITE.name, SITE)
    add_files(SITE)
    if render is sphinx:
        lighten(SITE)
    print(
        f"The site is in {SITE.name}/, built by {render.__name__}: open {SITE.name}/index.html"
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
