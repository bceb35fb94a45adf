"""Build the site into _docs/ from the notebooks, their stored outputs and the navigation of _quarto.yml.

nbdev processes the notebooks into _proc/. Where the program `quarto` is installed, it renders them; elsewhere Sphinx does,
with MyST-NB, the Furo theme and offline MathJax, after a translation of the small part of Quarto that the notebooks use:
callouts, figures and equations with references, folded and hidden code. Either way a warning is an error, and nothing is run
but what nbdev needs to document the exported names.
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from sphinx.application import Sphinx

from notebook import NBS, ROOT, callouts, cells, front_matter, local_links, outside_code, prepare

SITE = ROOT / "_docs"
THEME = {f"{mode}_css_variables": {"color-brand-primary": color, "color-brand-content": color}
         for mode, color in {"light": "#1c62b9", "dark": "#6aa9f4"}.items()}
Anchors = dict[str, tuple[set[str], set[str]]]  # of each page: its headings, and private functions whose code it shows
MYST = "amsmath attrs_block attrs_inline colon_fence deflist dollarmath tasklist".split()


def quarto(processed: Path) -> None:
    run = subprocess.run(["quarto", "render", "--no-cache"], cwd=processed, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(run.stderr)
    if run.returncode or "WARN" in run.stderr: sys.exit("quarto render failed or warned: see above")


def slug(title: str) -> str:
    "The anchor of a heading, as Quarto and nbdev name it."
    return re.sub(r"[^\w. -]", "", title.lower()).replace(" ", "-")


def admonition(kind: str, title: str, body: str, collapsed: bool) -> str:
    folded = ":collapsible: closed\n" if collapsed else ""
    return f":::{{admonition}} {title}\n:class: {kind}\n{folded}\n{body}\n:::"


def prose(cell, given: dict) -> str | None:
    "The Markdown of a cell: its source, or what it shows as it is."
    if cell.cell_type == "markdown": return cell.source
    if given.get("output") == "asis":
        return "\n".join(out.get("data", {}).get("text/markdown") or out.get("text", "") for out in cell.outputs)


def private(cell, given: dict) -> list[str]:
    "The anchors of the private functions whose code a cell shows because it is exported."
    return [name.lower() for name in re.findall(r"^(?:def|class) (_\w+)", cell.source, re.M)] if given.get("code-fold") == "show" else []


def anchors(path: Path) -> tuple[set[str], set[str]]:
    "The `Anchors` of one page."
    shown = list(cells(path))
    headings = re.findall(r"^#+ +(.+)", "\n".join(re.sub(r"```.*?```", "", prose(*cell) or "", flags=re.S) for cell in shown), re.M)
    return {slug(heading) for heading in headings}, {name for cell in shown for name in private(*cell)}


def myst(text: str, docs: dict[str, str], known: Anchors) -> str:
    "A Markdown cell in Quarto's dialect, in MyST's."
    def convert(part):
        part = re.sub(r"^\$\$ *\{#(eq-[\w-]+)\}", r"$$ (\1)", part, flags=re.M)
        part = re.sub(r"(?<![\w@])@(eq-[\w-]+)", r"{eq}`\1`", part)
        part = re.sub(r"(?<![\w@])@(fig-[\w-]+)", r"{numref}`\1`", part)
        return local_links(lambda name: f"{docs[name]}.ipynb", part)

    def name(match):  # nbdev links every exported name, also those that no heading documents: methods, private functions
        code, doc, anchor = match.groups()
        headings, functions = known[doc]
        if anchor in functions: return f'<a href="{doc}.html#{anchor}">{code}</a>'
        anchor = next((a for a in (anchor, anchor.partition(".")[0]) if a in headings), None)
        return f"[{code}]({doc}.ipynb#{anchor})" if anchor else code

    text = callouts(admonition, outside_code(convert, text))
    text = re.sub(r"\[(`[^`\n]+`)\]\((\w+)\.ipynb#([\w.]+)\)", name, text)
    for unknown in re.findall(r"^:::+ *\{\..*|\{\{<.*|(?<![\w@])@(?:tbl|sec|lst)-.*", "".join(re.split(r"```.*?```", text, flags=re.S)), re.M):
        raise ValueError(f"{unknown!r}: this part of Quarto's Markdown has no translation in {Path(__file__).name}")
    return text


def code(cell, given: dict, title: str):
    "A code cell with Quarto's options as MyST-NB's tags and settings."
    tags = {"remove-input": given.get("echo") is False, "remove-output": given.get("output") is False,
            "remove-stderr": given.get("warning") is False, "hide-input": given.get("code-fold") is True}
    look = {"image": {"alt": given.get("fig-alt") or given.get("fig-cap") or f"Figure: {title}"},
            "code_prompt_show": given.get("code-summary", "Code"), "code_prompt_hide": given.get("code-summary", "Code")}
    if "fig-cap" in given: look["figure"] = {"caption": given["fig-cap"], "name": given.get("label", "")}
    return new_code_cell(cell.source, outputs=cell.outputs, metadata={"tags": [tag for tag in tags if tags[tag]], "mystnb": look})


def page(path: Path, docs: dict[str, str], known: Anchors) -> list:
    "The cells of a processed notebook, ready for MyST-NB."
    front = front_matter(nbformat.read(path, as_version=4))
    shown = [new_markdown_cell(f"# {front['title']}\n\n{{.subtitle}}\n{front.get('description', '')}")]
    for cell, given in cells(path):
        text = prose(cell, given)
        if text is not None: shown.append(new_markdown_cell(myst(text, docs, known)))
        elif cell.cell_type == "code":
            if names := private(cell, given): shown.append(new_markdown_cell("".join(f'<span id="{name}"></span>' for name in names)))
            for data in (out.data for out in cell.outputs if "text/markdown" in out.get("data", {})):
                data["text/markdown"] = myst(data["text/markdown"], docs, known)
            shown.append(code(cell, given, front["title"]))
    return shown


def contents(fronts: dict[str, dict], docs: dict[str, str]) -> list:
    "The start page's cards, and the navigation beside every page: the sidebar of _quarto.yml."
    cards, trees = ["## The notebooks"], []
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    for section in (entry for entry in sidebar if "section" in entry):
        names = [entry if isinstance(entry, str) else entry["href"] for entry in section["contents"]]
        items = [f"- [{fronts[name]['title']}]({docs[name]}.ipynb)\n\n  {fronts[name].get('description', '')}" for name in names]
        cards += [f"{{.eyebrow}}\n{section['section']}", "{.cards}\n" + "\n".join(items)]
        trees.append("\n".join(["```{toctree}", ":hidden:", f":caption: {section['section']}", *(docs[name] for name in names), "```"]))
    return [new_markdown_cell(text) for text in ["\n\n".join(cards), *trees]]


def sphinx(processed: Path) -> None:
    "Both renderers leave the site in `processed`, under the name of `SITE`."
    source = processed / "_sphinx"
    source.mkdir()
    notebooks = sorted(processed.glob("*.ipynb"))
    fronts = {path.name: front_matter(nbformat.read(path, as_version=4)) for path in notebooks}
    docs = {name: Path(front["output-file"]).stem for name, front in fronts.items()}
    known = {docs[path.name]: anchors(path) for path in notebooks}
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    for path in notebooks:
        shown = page(path, docs, known)
        if path.name == "index.ipynb": shown += contents(fronts, docs)
        nbformat.write(new_notebook(cells=shown, metadata=language), source / f"{docs[path.name]}.ipynb")
    for path in processed.rglob("*"):  # pictures that the prose shows
        if path.suffix in {".png", ".svg", ".jpg", ".gif"} and source not in path.parents:
            (copy := source / path.relative_to(processed)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    static = source / "_static"
    static.mkdir()
    for name in ("styles.css", "logo.svg"): shutil.copy(NBS / name, static)
    config = get_config()
    built = processed / SITE.name
    app = Sphinx(source, None, built, processed / "_doctrees", "html", freshenv=True, warningiserror=True, status=None, confoverrides={
        "project": config.title, "copyright": config.copyright, "release": config.version, "language": "en", "exclude_patterns": [],
        "extensions": ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"],
        "nb_execution_mode": "off", "nb_render_markdown_format": "myst", "nb_merge_streams": True,
        "myst_enable_extensions": MYST, "myst_heading_anchors": 4, "myst_heading_slug_func": "build_site.slug",
        "myst_dmath_double_inline": True, "numfig": True, "numfig_format": {"figure": "Figure %s"},
        "html_theme": "furo", "html_theme_options": THEME, "html_title": config.title, "html_logo": "_static/logo.svg",
        "html_favicon": "_static/logo.svg", "html_static_path": ["_static"], "html_css_files": ["styles.css"],
        "html_copy_source": False, "html_show_sourcelink": False, "html_use_index": False})
    app.build()
    if app.statuscode: sys.exit("Sphinx warned: see above")


def main() -> None:
    prepare()
    refresh_quarto_yml()
    render = quarto if shutil.which("quarto") else sphinx
    render(processed := proc_nbs(force=True))
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(processed / SITE.name, SITE)
    print(f"The site is in {SITE.name}/, built by {render.__name__}: open {SITE.name}/index.html")


if __name__ == "__main__": main()
