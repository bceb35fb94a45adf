"""Write what stands at the root and comes from notebooks: README.md, examples/quickstart.py and CONTRIBUTING.md; with --check only say whether they are fresh."""
import argparse
import re
import shutil
import sys
from pathlib import Path
from posixpath import normpath
from tempfile import TemporaryDirectory

import nbformat
from execnb.nbio import read_nb, write_nb
from nbconvert import MarkdownExporter
from nbdev.processors import FilterDefaults
from traitlets.config import Config

from notebook import NBS, callouts, cells, front_matter, local_links, outside_code, prepare

PAGES = {"README.md": "index", "CONTRIBUTING.md": "30_contributing"}  # each from this notebook, with its pictures in <notebook>_files/
QUICKSTART = "examples/quickstart.py"


def alert(kind: str, title: str, body: str, collapsed: bool) -> str:
    "A callout as the quoted alert that code hosts know."
    title = "" if title.lower() == kind else f"**{title}**\n\n"
    return f"[!{kind.upper()}]\n{title}{body}".replace("\n", "\n> ").replace("> \n", ">\n").join(["> ", ""])


def markdown(text: str) -> str:
    "A Markdown cell with its links as seen from the repository's root (a code host shows notebooks, but not their anchors)."
    text = callouts(alert, outside_code(lambda part: local_links(lambda name: name, part), text))
    local = re.compile(r"\]\((?!\w+:|#|/)([^)#]*)(#[^)]*)?")
    return outside_code(lambda part: local.sub(lambda m: f"]({normpath(f'nbs/{m[1]}')}", part), text)


def page(target: str, name: str) -> dict[str, bytes]:
    "The files that a notebook becomes: `target` and its pictures, by their path."
    notebook = read_nb(NBS / f"{name}.ipynb")
    FilterDefaults()(notebook)
    with TemporaryDirectory() as folder:
        write_nb(notebook, path := Path(folder) / f"{name}.ipynb")
        front, shown = front_matter(nbformat.read(path, as_version=4)), list(cells(path))
    alts = []
    for cell, options in shown:
        if cell.cell_type == "markdown": cell.source = markdown(cell.source)
        if options.get("echo") is False: cell.metadata.tags = ["hide-input"]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = markdown(data["text/markdown"])
            if "text/html" in data: data["text/html"] = re.sub(r"<style.*?</style>\n?", "", data["text/html"], flags=re.S)
            if "image/png" in data: alts.append(options.get("fig-alt") or options.get("fig-cap") or front["title"])
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"hide-input"}}))
    notebook = nbformat.v4.new_notebook(cells=[cell for cell, _ in shown], metadata={"language_info": {"name": "python"}})
    body, resources = exporter.from_notebook_node(notebook, {"output_files_dir": f"{name}_files", "unique_key": name})
    body = re.sub(r"!\[png\]", lambda _: f"![{alts.pop(0)}]", body)
    head = f"<!-- Written by `make readme` from nbs/{name}.ipynb: edit that. -->\n\n# {front['title']}\n\n{front.get('description', '')}\n\n"
    body = re.sub(r"\n([ \t]*\n){2,}", "\n\n", head + body).rstrip() + "\n"
    return {target: body.encode(), **resources["outputs"]}


def quickstart(readme: str) -> str:
    "The code below README.md's heading, as a file that runs."
    code = re.search(r"^## Quickstart\n\n```python\n(.*?)^```", readme, re.M | re.S)[1]
    return f'"""The quickstart of README.md, written by `make readme` from nbs/index.ipynb: edit that. `make quickstart` runs it."""\n{code}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if something is stale")
    check = parser.parse_args().check
    prepare()
    new = {path: data for target, name in PAGES.items() for path, data in page(target, name).items()}
    new[QUICKSTART] = quickstart(new["README.md"].decode()).encode()
    pictures = [Path(f"{name}_files") for name in PAGES.values()]
    there = {str(path): path.read_bytes() for path in [*map(Path, new), *(path for folder in pictures for path in folder.glob("*"))] if path.exists()}
    if check:
        stale = sorted(path for path in {*new, *there} if new.get(path) != there.get(path))
        sys.exit(f"not what the notebooks say: {', '.join(stale)}; run `make readme`" if stale else 0)
    for folder in pictures: shutil.rmtree(folder, ignore_errors=True)
    for path, data in new.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(data)


if __name__ == "__main__": main()
