"""The site by Sphinx, with MyST-NB and the Furo theme, where Quarto is not installed.

It takes the processed notebooks that Quarto would take, and the navigation that Quarto would
read, and translates the small part of Quarto that the notebooks use: callouts, figures and
equations with references, folded and hidden code. A warning is an error; nothing is run.
"""

import os
import re
import shutil
import sys
from base64 import b64decode
from collections.abc import Iterator
from functools import partial
from html import escape, unescape
from io import BytesIO
from pathlib import Path

import nbformat
import yaml
from IPython.lib.lexers import IPython3Lexer
from nbdev.config import get_config
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebook import (
    NBS,
    callouts,
    cells,
    front_matter,
    headings,
    local_links,
    outside_code,
    read,
)
from photos import is_drawn
from PIL import Image
from processed import CHANGES
from pygments.token import Name, Operator, Punctuation, String, Text, Whitespace
from sphinx.application import Sphinx

COLORS = {"light": "#1c62b9", "dark": "#6aa9f4"}
THEME = {
    f"{mode}_css_variables": {
        "color-brand-primary": color,
        "color-brand-content": color,
    }
    for mode, color in COLORS.items()
}
WIDE = 700  # pixels: on a phone, a wider picture is shown large enough to be read, and scrolls
LAST_FIRST = "## Three routes"  # of the start page: the cards of all pages follow
CARD = "card.png"
LOOKED_UP = ("module_", CHANGES)  # pages that nobody reads one after the other
SIDEBAR = ["brand", "version", "search", "scroll-start", "navigation", "scroll-end"]
VERSION = f"""<a class="version" href="{{{{ pathto('{CHANGES}') }}}}">\
Version {{{{ release }}}}: changes</a>
"""
PICTURES = {".png", ".svg", ".jpg", ".gif"}
EXTENSIONS = "amsmath attrs_block attrs_inline colon_fence deflist dollarmath tasklist"
UNKNOWN = re.compile(r"^:::+ *\{\..*|\{\{<.*|(?<![\w@])@(?:tbl|sec|lst)-.*", re.M)
PLAIN = {Name, Name.Builtin.Pseudo, Operator, Punctuation, Whitespace}
PLAIN |= {Name.Builtin, String.Affix, String.Interpol}
Docs = dict[str, str]  # file name of a notebook -> name of its page


class PlainNames(IPython3Lexer):
    "Names and signs are most of the code, and in no colour: they need no markup each."

    def get_tokens_unprocessed(self, text):
        for index, token, value in super().get_tokens_unprocessed(text):
            yield index, Text if token in PLAIN else token, value


def build(processed: Path, name: str, static: list[str]) -> None:
    "Leave the site in `processed / name`; `static` names the files of nbs/ that its pages load."
    source = processed / "_sphinx"
    source.mkdir()
    write_sources(processed, source)
    copy_pictures(processed, source)
    (source / "_templates" / "sidebar").mkdir(parents=True)
    (source / "_templates" / "sidebar" / "version.html").write_text(VERSION)
    (source / "_static").mkdir()
    for file in static:
        shutil.copy(NBS / file, source / "_static")
    built, doctrees = processed / name, processed / "_doctrees"
    settings = configuration()
    app = Sphinx(
        source,
        None,
        built,
        doctrees,
        "html",
        settings,
        freshenv=True,
        warningiserror=True,
        status=None,
        parallel=os.cpu_count(),
    )
    app.add_lexer("ipython3", PlainNames)
    app.add_lexer("python", PlainNames)
    app.connect("html-page-context", stop_pager)
    app.connect("html-page-context", partial(describe, descriptions(processed)))
    app.build()
    if app.statuscode:
        sys.exit("Sphinx warned: see above")


def configuration() -> dict:
    project = get_config()
    return {
        "project": project.title,
        "copyright": project.copyright,
        "release": project.version,
        "language": "en",
        "extensions": ["myst_nb", "sphinx.ext.mathjax"],
        "mathjax_path": "mathjax/tex-chtml.js",
        "nb_execution_mode": "off",
        "nb_render_markdown_format": "myst",
        "nb_merge_streams": True,
        "myst_enable_extensions": EXTENSIONS.split(),
        "myst_heading_anchors": 4,
        "myst_heading_slug_func": "notebook.slug",
        "myst_dmath_double_inline": True,
        "numfig": True,
        "numfig_format": {"figure": "Figure %s"},
        "templates_path": ["_templates"],
        "html_sidebars": {"**": [f"sidebar/{part}.html" for part in SIDEBAR]},
        "html_theme": "furo",
        "html_theme_options": THEME,
        "html_title": project.title,
        "html_logo": "_static/logo.svg",
        "html_favicon": "_static/logo.svg",
        "html_static_path": ["_static"],
        "html_css_files": ["styles.css"],
        "html_js_files": [("site.js", {"defer": "defer"})],
        "html_copy_source": False,
        "html_show_sourcelink": False,
        "html_use_index": False,
    }


def write_sources(processed: Path, source: Path) -> None:
    notebooks = {path.name: read(path) for path in sorted(processed.glob("*.ipynb"))}
    fronts = {name: front_matter(notebook) for name, notebook in notebooks.items()}
    docs = {name: Path(front["output-file"]).stem for name, front in fronts.items()}
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    for name, notebook in notebooks.items():
        shown = page_cells(notebook, docs)
        if name == "index.ipynb":
            cards, *trees = contents(navigation(processed), fronts, docs)
            after = next(i for i, cell in enumerate(shown) if cell.source.startswith(LAST_FIRST))
            shown = [*shown[: after + 1], cards, *shown[after + 1 :], *trees]
        translated = new_notebook(cells=shown, metadata=language)
        nbformat.write(translated, source / f"{docs[name]}.ipynb")


def copy_pictures(processed: Path, source: Path) -> None:
    "The pictures that the prose shows."
    for path in list(processed.rglob("*")):
        if path.suffix not in PICTURES or source in path.parents:
            continue
        copy = source / path.relative_to(processed)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def stop_pager(app, name: str, template: str, context: dict, doctree) -> None:
    "Previous and next stop before what is looked up, as they do for Quarto at the separator."
    for way in ("prev", "next"):
        pages = [name, (context.get(way) or {}).get("link", "")]
        if any(page.startswith(LOOKED_UP) for page in pages):
            context[way] = None


def descriptions(processed: Path) -> dict[str, str]:
    "For each page, what it says of itself in one sentence."
    fronts = [front_matter(read(path)) for path in processed.glob("*.ipynb")]
    return {Path(front["output-file"]).stem: front.get("description", "") for front in fronts}


def describe(sentences: dict[str, str], app, name: str, template, context: dict, doctree) -> None:
    "What a search engine shows of a page, and the card that a link to it becomes elsewhere."
    project = get_config()
    site = f"{project.doc_host}{project.doc_baseurl}"
    sentence = sentences.get(name) or project.description
    told = {
        "og:title": unescape(re.sub("<[^>]+>", "", context.get("title", project.title))),
        "og:description": sentence,
        "og:type": "article",
        "og:url": f"{site}/{name}.html",
        "og:image": f"{site}/_static/{CARD}",
        "og:site_name": project.title,
    }
    lines = [f'<meta property="{key}" content="{escape(text)}">' for key, text in told.items()]
    lines.append('<meta name="twitter:card" content="summary_large_image">')
    lines.append(f'<meta name="description" content="{escape(sentence)}">')
    context["metatags"] = "\n".join([context.get("metatags", ""), *lines])


def page_cells(notebook: NotebookNode, docs: Docs) -> list[NotebookNode]:
    "The cells of a processed notebook, ready for MyST-NB."
    front = front_matter(notebook)
    title = front["title"]
    shown = [
        new_markdown_cell(f"# {title}\n\n{{.subtitle}}\n{front.get('description', '')}")
    ]
    for cell, given in cells(notebook):
        if cell.cell_type == "markdown":
            shown.append(new_markdown_cell(myst(cell.source, docs)))
        elif cell.cell_type == "code":
            for output in cell.outputs:
                translate_output(output, docs)
            if given.get("output") == "asis":
                shown += as_it_is(cell, given, title)
            else:
                shown.append(code_cell(cell, given, title))
    return shown


def translate_output(output: NotebookNode, docs: Docs) -> None:
    data = output.get("data", {})
    if "text/markdown" in data:
        data["text/markdown"] = myst(data["text/markdown"], docs)


def as_it_is(cell: NotebookNode, given: dict, title: str) -> Iterator[NotebookNode]:
    "Outputs shown as they are: Markdown, and pictures named after the last heading above them."
    for output in cell.outputs:
        text = output.get("data", {}).get("text/markdown") or output.get("text", "")
        title = [title, *headings(text)][-1]
        picture = new_code_cell(cell.source, outputs=[output])
        if text:
            yield new_markdown_cell(text)
        else:
            shown = {"echo": False, "fig-alt": f"{title}: {given.get('fig-alt', 'a picture')}"}
            yield code_cell(picture, shown, title)


def code_cell(cell: NotebookNode, given: dict, title: str) -> NotebookNode:
    "A code cell with Quarto's options as MyST-NB's tags and settings."
    metadata = {"tags": tags(given), "mystnb": look(cell, given, title)}
    return new_code_cell(cell.source, outputs=cell.outputs, metadata=metadata)


def tags(given: dict) -> list[str]:
    found = {
        "remove-input": given.get("echo") is False,
        "remove-output": given.get("output") is False,
        "remove-stderr": given.get("warning") is False,
        "hide-input": given.get("code-fold") is True,
    }
    return [tag for tag, holds in found.items() if holds]


def look(cell: NotebookNode, given: dict, title: str) -> dict:
    caption, summary = given.get("fig-cap"), given.get("code-summary", "Code")
    width = "wide" if pixels(cell) > WIDE else "narrow"
    kind = "drawing" if all_drawn(cell) else "photo"
    image = {
        "alt": given.get("fig-alt") or caption or f"Figure: {title}",
        "classes": f"{given.get('classes') or width} {kind}",
    }
    found = {"image": image, "code_prompt_show": summary, "code_prompt_hide": summary}
    if caption:
        found["figure"] = {"caption": caption, "name": given.get("label", "")}
    return found


def pixels(cell: NotebookNode) -> int:
    "The width of the widest picture that a cell shows."
    pictures = (output.get("data", {}) for output in cell.outputs)
    return max(map(picture_width, pictures), default=0)


def all_drawn(cell: NotebookNode) -> bool:
    "Are its pictures drawings? Photos stay as they are where the page is dark."
    found = []
    for output in cell.outputs:
        for kind in ("image/jpeg", "image/png"):
            if kind in output.get("data", {}):
                with Image.open(BytesIO(b64decode(output["data"][kind]))) as picture:
                    found.append(is_drawn(picture, kind == "image/png"))
    return all(found)


def picture_width(data: dict) -> int:
    if "image/png" in data:
        return int.from_bytes(b64decode(data["image/png"])[16:20], "big")
    points = re.search(r'<svg[^>]* width="([\d.]+)pt"', data.get("image/svg+xml", ""))
    return round(float(points[1]) * 4 / 3) if points else 0


def myst(text: str, docs: Docs) -> str:
    "A Markdown cell in Quarto's dialect, in MyST's."

    def convert(part):
        part = re.sub(r"^\$\$ *\{#(eq-[\w-]+)\}", r"$$ (\1)", part, flags=re.M)
        part = re.sub(r"(?<![\w@])@(eq-[\w-]+)", r"{eq}`\1`", part)
        part = re.sub(r"(?<![\w@])@(fig-[\w-]+)", r"{numref}`\1`", part)
        return local_links(lambda name: f"{docs[name]}.ipynb", part)

    text = callouts(admonition, outside_code(convert, text))
    unknown = UNKNOWN.search(re.sub(r"```.*?```", "", text, flags=re.S))
    if unknown is None:
        return text
    file = Path(__file__).name
    raise ValueError(
        f"{unknown[0]!r}: this part of Quarto's Markdown has no translation in {file}"
    )


def admonition(kind: str, title: str, body: str, collapsed: bool) -> str:
    folded = ":collapsible: closed\n" if collapsed else ""
    return f":::{{admonition}} {title}\n:class: {kind}\n{folded}\n{body}\n:::"


def navigation(processed: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    "The sections of the sidebar of _quarto.yml: their names, and file and short title of pages."
    website = yaml.safe_load((processed / "_quarto.yml").read_text())["website"]
    sections = []
    for entry in website["sidebar"]["contents"]:
        if "section" not in entry:
            continue
        pages = [
            (page, "") if isinstance(page, str) else (page["href"], page["text"])
            for page in entry["contents"]
        ]
        sections.append((entry["section"], pages))
    return sections


def contents(sections, fronts: dict[str, dict], docs: Docs) -> tuple[NotebookNode, ...]:
    "The start page's cards, one for each section, and the navigation beside every page."
    cards, trees = ["## The notebooks", "{.cards}"], []
    for title, pages in sections:
        trees.append(toctree(title, [(docs[name], text) for name, text in pages]))
        if any(name.startswith(LOOKED_UP) for name, _ in pages):
            continue
        links = [f"[{fronts[name]['title']}]({docs[name]}.ipynb)" for name, _ in pages]
        listed = "\n".join(f"  - {link}" for link in links)
        cards.append(f"- {title}\n\n{listed}")
    return new_markdown_cell("\n".join(cards[:2]) + "\n" + "\n".join(cards[2:])), *trees


def toctree(caption: str, pages: list[tuple[str, str]]) -> NotebookNode:
    "A part of the navigation beside every page."
    entries = [f"{text} <{page}>" if text else page for page, text in pages]
    lines = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"]
    return new_markdown_cell("\n".join(lines))
