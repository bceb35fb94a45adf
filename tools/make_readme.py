"""Write README.md, and its pictures into index_files/, from nbs/index.ipynb; with --check only say whether they are fresh."""
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

PICTURES = "index_files"


def alert(kind: str, title: str, body: str, collapsed: bool) -> str:
    "A callout as the quoted alert that code hosts know."
    title = "" if title.lower() == kind else f"**{title}**\n\n"
    return f"[!{kind.upper()}]\n{title}{body}".replace("\n", "\n> ").replace("> \n", ">\n").join(["> ", ""])


def markdown(text: str) -> str:
    "A Markdown cell with its links as seen from the repository's root (a code host shows notebooks, but not their anchors)."
    text = callouts(alert, outside_code(lambda part: local_links(lambda name: name, part), text))
    local = re.compile(r"\]\((?!\w+:|#|/)([^)#]*)(#[^)]*)?")
    return outside_code(lambda part: local.sub(lambda m: f"]({normpath(f'nbs/{m[1]}')}", part), text)


def readme() -> dict[str, bytes]:
    "The files to write: README.md and its pictures, by their path."
    notebook = read_nb(NBS / "index.ipynb")
    FilterDefaults()(notebook)
    with TemporaryDirectory() as folder:
        write_nb(notebook, path := Path(folder) / "index.ipynb")
        page, shown = front_matter(nbformat.read(path, as_version=4)), list(cells(path))
    alts = []
    for cell, options in shown:
        if cell.cell_type == "markdown": cell.source = markdown(cell.source)
        if options.get("echo") is False: cell.metadata.tags = ["hide-input"]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = markdown(data["text/markdown"])
            if "text/html" in data: data["text/html"] = re.sub(r"<style.*?</style>\n?", "", data["text/html"], flags=re.S)
            if "image/png" in data: alts.append(options.get("fig-alt") or options.get("fig-cap") or page["title"])
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"hide-input"}}))
    notebook = nbformat.v4.new_notebook(cells=[cell for cell, _ in shown], metadata={"language_info": {"name": "python"}})
    body, resources = exporter.from_notebook_node(notebook, {"output_files_dir": PICTURES, "unique_key": "index"})
    body = re.sub(r"!\[png\]", lambda _: f"![{alts.pop(0)}]", body)
    head = f"<!-- Written by `make readme` from nbs/index.ipynb: edit that. -->\n\n# {page['title']}\n\n{page.get('description', '')}\n\n"
    body = re.sub(r"\n([ \t]*\n){2,}", "\n\n", head + body).rstrip() + "\n"
    return {"README.md": body.encode(), **resources["outputs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if README.md or its pictures are stale")
    check = parser.parse_args().check
    prepare()
    new = readme()
    there = {path: Path(path).read_bytes() for path in ["README.md", *map(str, Path(PICTURES).glob("*"))] if Path(path).exists()}
    if check:
        stale = sorted(path for path in {*new, *there} if new.get(path) != there.get(path))
        sys.exit(f"{', '.join(stale)} differ from nbs/index.ipynb: run `make readme`" if stale else 0)
    shutil.rmtree(PICTURES, ignore_errors=True)
    for path, data in new.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(data)


if __name__ == "__main__": main()
