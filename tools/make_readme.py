"""Write what stands at the root and comes from notebooks, or with --check say if it is fresh.

README.md, CONTRIBUTING.md, their pictures, and examples/quickstart.py.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path
from posixpath import normpath
from tempfile import TemporaryDirectory

from execnb.nbio import read_nb, write_nb
from nbconvert import MarkdownExporter
from nbdev.processors import FilterDefaults
from nbformat import NotebookNode
from nbformat.v4 import new_notebook
from notebook import (
    NBS,
    callouts,
    cells,
    front_matter,
    local_links,
    outside_code,
    plain_headings,
    prepare,
    read,
)
from traitlets.config import Config

# each from this notebook, with its pictures in <notebook>_files/
PAGES = {"README.md": "index", "CONTRIBUTING.md": "30_contributing"}
QUICKSTART = "examples/quickstart.py"
LOCAL = re.compile(r"\]\((?!\w+:|#|/)([^)#]*)(#[^)]*)?")
STYLE = re.compile(r"<style.*?</style>\n?", re.S)
HIDDEN = "hide-input"
PICTURES = {"image/png", "image/jpeg", "image/svg+xml"}


def alert(kind: str, title: str, body: str, collapsed: bool) -> str:
    "A callout as the quoted alert that code hosts know."
    bold = "" if title.lower() == kind else f"**{title}**\n\n"
    lines = f"[!{kind.upper()}]\n{bold}{body}\n".splitlines()
    return "\n".join(f"> {line}".rstrip() for line in lines)


def markdown(text: str) -> str:
    "A Markdown cell with its links as seen from the repository's root."

    def local(part):
        return local_links(str, part)

    def from_root(part):  # a code host shows notebooks, but not their anchors
        return LOCAL.sub(lambda match: f"]({normpath(f'nbs/{match[1]}')}", part)

    text = outside_code(local, plain_headings(text))
    return outside_code(from_root, callouts(alert, text))


def processed(name: str) -> NotebookNode:
    "A notebook as nbdev processes it."
    notebook = read_nb(NBS / f"{name}.ipynb")
    FilterDefaults()(notebook)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.ipynb"
        write_nb(notebook, path)
        return read(path)


def plain(cell: NotebookNode, given: dict) -> None:
    "Make a cell fit for a code host."
    if cell.cell_type == "markdown":
        cell.source = markdown(cell.source)
    if given.get("echo") is False:
        cell.metadata.tags = [HIDDEN]
    for data in (output.get("data", {}) for output in cell.get("outputs", [])):
        if "text/markdown" in data:
            data["text/markdown"] = markdown(data["text/markdown"])
        if "text/html" in data:
            data["text/html"] = STYLE.sub("", data["text/html"])


def alts(cell: NotebookNode, given: dict, title: str) -> list[str]:
    "What its pictures show, in words."
    outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
    pictures = [data for data in outputs if PICTURES & {*data}]
    return [given.get("fig-alt") or given.get("fig-cap") or title] * len(pictures)


def page(target: str, name: str) -> dict[str, bytes]:
    "The files that a notebook becomes: `target` and its pictures, by their path."
    notebook = processed(name)
    front, shown, words = front_matter(notebook), [], []
    for cell, given in cells(notebook):
        plain(cell, given)
        words += alts(cell, given, front["title"])
        shown.append(cell)
    body, pictures = exported(shown, name)
    body = re.sub(r"!\[(?:png|jpeg|svg)\]", lambda _: f"![{words.pop(0)}]", body)
    source = f"<!-- Written by `make readme` from nbs/{name}.ipynb: edit that. -->"
    parts = [source, f"# {front['title']}", front.get("description", ""), body]
    text = re.sub(r"\n([ \t]*\n){2,}", "\n\n", "\n\n".join(parts))
    return {target: f"{text.rstrip()}\n".encode(), **pictures}


def exported(shown: list[NotebookNode], name: str) -> tuple[str, dict[str, bytes]]:
    "Cells as Markdown, and their pictures."
    hide = {"enabled": True, "remove_input_tags": {HIDDEN}}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=hide))
    notebook = new_notebook(cells=shown, metadata={"language_info": {"name": "python"}})
    names = {"output_files_dir": f"{name}_files", "unique_key": name}
    body, resources = exporter.from_notebook_node(notebook, names)
    return body, resources["outputs"]


def quickstart(readme: str) -> str:
    "The code below README.md's heading, as a file that runs."
    code = re.search(r"^## Quickstart\n\n```python\n(.*?)^```", readme, re.M | re.S)[1]
    lines = [
        '"""The quickstart of README.md; `make quickstart` runs it.',
        "",
        "Written by `make readme` from nbs/index.ipynb: edit that.",
        '"""',
    ]
    return "\n".join(lines) + f"\n{code}"


def fresh() -> dict[str, bytes]:
    "What should stand at the root, by its path."
    new = {}
    for target, name in PAGES.items():
        new |= page(target, name)
    new[QUICKSTART] = quickstart(new["README.md"].decode()).encode()
    return new


def stale(new: dict[str, bytes], folders: list[Path]) -> list[str]:
    "The paths whose files are not what they should be, or should not be there."
    paths = {
        *map(Path, new),
        *(path for folder in folders for path in folder.glob("*")),
    }
    there = {str(path): path.read_bytes() for path in paths if path.exists()}
    return sorted(path for path in {*new, *there} if new.get(path) != there.get(path))


def write(new: dict[str, bytes], folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for path, data in new.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if stale"
    )
    check = parser.parse_args().check
    prepare()
    new, folders = fresh(), [Path(f"{name}_files") for name in PAGES.values()]
    if not check:
        write(new, folders)
    elif found := stale(new, folders):
        sys.exit(f"not what the notebooks say: {', '.join(found)}; run `make readme`")


if __name__ == "__main__":
    main()
