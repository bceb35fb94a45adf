"""Build the site into _docs/ from the notebooks, their stored outputs and the navigation of _quarto.yml.

nbdev processes the notebooks into _proc/. Where the program `quarto` is installed, it renders them; elsewhere Sphinx does,
with MyST-NB, the Furo theme and offline MathJax, after a translation of the small part of Quarto that the notebooks use:
callouts, figures and equations with references, folded and hidden code. Either way a warning is an error, and nothing is run
but what nbdev needs to document the exported names. Both get the modules too, as pages of their source: every notebook links to
its module, every cell of a module to the section that it comes from.
"""
import ast
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from html import escape
from pathlib import Path

import nbformat
import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell
from sphinx.application import Sphinx

from notebook import NBS, ROOT, callouts, cells, front_matter, local_links, module_page, outside_code, prepare

SITE = ROOT / "_docs"
THEME = {f"{mode}_css_variables": {"color-brand-primary": color, "color-brand-content": color}
         for mode, color in {"light": "#1c62b9", "dark": "#6aa9f4"}.items()}
Anchors = dict[str, tuple[set[str], set[str]]]  # of each page: its headings, and private functions whose code it shows
MODULE_LIST = "18_api_by_topic.ipynb"  # the page below which the navigation lists the modules
WIDE = 700  # pixels: on a phone, a wider picture is shown large enough to be read, and scrolls
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


def headings(text: str) -> list[str]: return re.findall(r"^#+ +(.+)", re.sub(r"```.*?```", "", text, flags=re.S), re.M)


def anchors(path: Path) -> tuple[set[str], set[str]]:
    "The `Anchors` of one page."
    shown = list(cells(path))
    return {slug(heading) for cell in shown for heading in headings(prose(*cell) or "")}, {name for cell in shown for name in private(*cell)}


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


def pixels(cell) -> int:
    "The width of the widest picture that a cell shows."
    return max((int.from_bytes(b64decode(out.data["image/png"])[16:20], "big") for out in cell.outputs if "image/png" in out.get("data", {})), default=0)


def code(cell, given: dict, title: str):
    "A code cell with Quarto's options as MyST-NB's tags and settings."
    tags = {"remove-input": given.get("echo") is False, "remove-output": given.get("output") is False,
            "remove-stderr": given.get("warning") is False, "hide-input": given.get("code-fold") is True}
    look = {"image": {"alt": given.get("fig-alt") or given.get("fig-cap") or f"Figure: {title}", "classes": given.get("classes") or ("wide" if pixels(cell) > WIDE else "narrow")},
            "code_prompt_show": given.get("code-summary", "Code"), "code_prompt_hide": given.get("code-summary", "Code")}
    if "fig-cap" in given: look["figure"] = {"caption": given["fig-cap"], "name": given.get("label", "")}
    return new_code_cell(cell.source, outputs=cell.outputs, metadata={"tags": [tag for tag in tags if tags[tag]], "mystnb": look})


def as_it_is(cell, given: dict, title: str) -> Iterator[tuple]:
    "The outputs of a cell that shows them as they are, each as a cell with its options: Markdown, and pictures named after the last heading above."
    for out in cell.outputs:
        text = prose(new_code_cell(outputs=[out]), given)
        title = [title, *headings(text)][-1]
        yield (new_markdown_cell(text), {}) if text else (new_code_cell(cell.source, outputs=[out]), {"echo": False, "fig-alt": f"Figure: {title}"})


def module_pages(processed: Path, exported: dict[str, str]) -> None:
    """Add a page for each module, its source cell by cell, and link it with the page of its notebook, in both directions.

    `exported` names the notebook of each module's file. What is written stays in the dialect of nbdev's notebooks: either renderer makes pages of it.
    """
    def link(page, anchor, text): return f'<a href="{page}{"#" * bool(anchor)}{anchor}">{text}</a>'
    def links(*parts): return new_markdown_cell(f'<p class="source-links">{" · ".join(parts)}</p>')
    for file, name in exported.items():
        notebook = nbformat.read(processed / name, as_version=4)
        front = front_matter(notebook)
        known, functions = anchors(processed / name)
        module, target, sections, section = file.removesuffix(".py").replace("/", "."), front["output-file"], {}, ""
        for cell in nbformat.read(NBS / name, as_version=4).cells:
            if cell.cell_type == "markdown": section = [section, *headings(cell.source)][-1]
            sections[cell.id] = section
        head, *blocks = re.split(r"^# %% (.*)\n", (ROOT / file).read_text(), flags=re.M)
        shown, last = [new_code_cell(head.strip())], None
        for origin, source in zip(blocks[::2], blocks[1::2]):
            made = [node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and "overload" not in map(ast.unparse, node.decorator_list)]
            section = sections.get(origin.partition("#")[2], "")
            anchor = next((a for a in [*(name.lower() for name in made), slug(section)] if a in known | functions), "")
            if section != last and slug(section) in known: shown.append(new_markdown_cell(f"## {section}"))
            last = section
            spans = "".join(f'<span id="def-{name}"></span>' for name in made)
            if name in origin: shown.append(new_markdown_cell(f'<p class="origin">{spans}{link(target, anchor, escape(origin.rpartition("nbs/")[2]))}</p>'))
            shown.append(new_code_cell(source.strip()))
        meta = {"title": module, "description": f"The source, cell by cell, as exported from {name}.", "output-file": f"{module_page(file)}.html"}
        view = links(f"View notebook: {link(target, '', escape(front['title']))}", f"file <code>{file}</code>")
        nbformat.write(new_notebook(cells=[new_raw_cell(f"---\n{yaml.safe_dump(meta)}---"), view, *shown], metadata=notebook.metadata), processed / f"{module_page(file)}.ipynb")
        notebook.cells.insert(1, links(f"Module {link(module_page(file) + '.html', '', f'<code>{module}</code>')}: source", f'<a href="notebooks/{name}" download>download the notebook</a>'))
        nbformat.write(notebook, processed / name)


def exported_modules() -> dict[str, str]:
    "File of each module -> the notebook that it is exported from, as the module itself says."
    files = sorted(Path(get_config().lib_name).rglob("*.py"))
    return {str(file): found[1] for file in files if (found := re.search(r"^# AUTOGENERATED! .*File to edit: \.\./(?:\.\./)?nbs/(\S+)\.$", file.read_text(), re.M))}


def page(path: Path, docs: dict[str, str], known: Anchors) -> list:
    "The cells of a processed notebook, ready for MyST-NB."
    front = front_matter(nbformat.read(path, as_version=4))
    shown = [new_markdown_cell(f"# {front['title']}\n\n{{.subtitle}}\n{front.get('description', '')}")]
    for cell, given in (part for cell, given in cells(path) for part in (as_it_is(cell, given, front["title"]) if given.get("output") == "asis" else [(cell, given)])):
        text = prose(cell, given)
        if text is not None: shown.append(new_markdown_cell(myst(text, docs, known)))
        elif cell.cell_type == "code":
            if names := private(cell, given): shown.append(new_markdown_cell("".join(f'<span id="{name}"></span>' for name in names)))
            for data in (out.data for out in cell.outputs if "text/markdown" in out.get("data", {})):
                data["text/markdown"] = myst(data["text/markdown"], docs, known)
            shown.append(code(cell, given, front["title"]))
    return shown


def toctree(caption: str, names: list[str]):
    "A part of the navigation beside every page."
    return new_markdown_cell("\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *names, "```"]))


def contents(fronts: dict[str, dict], docs: dict[str, str]) -> list:
    "The start page's cards, and the navigation beside every page: the sidebar of _quarto.yml."
    cards, trees = ["## The notebooks"], []
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    for section in (entry for entry in sidebar if "section" in entry):
        names = [entry if isinstance(entry, str) else entry["href"] for entry in section["contents"]]
        items = [f"- [{fronts[name]['title']}]({docs[name]}.ipynb)\n\n  {fronts[name].get('description', '')}" for name in names]
        cards += [f"{{.eyebrow}}\n{section['section']}", "{.cards}\n" + "\n".join(items)]
        trees.append(toctree(section["section"], [docs[name] for name in names]))
    return [new_markdown_cell("\n\n".join(cards)), *trees]


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
        if path.name == MODULE_LIST: shown.append(toctree("", [f"{front['title'].partition('.')[2]} <{docs[name]}>" for name, front in fronts.items() if name.startswith("module_")]))
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
    processed = proc_nbs(force=True)
    module_pages(processed, exported := exported_modules())
    render(processed)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(processed / SITE.name, SITE)
    (SITE / "notebooks").mkdir()
    for name in exported.values(): shutil.copy(NBS / name, SITE / "notebooks")
    print(f"The site is in {SITE.name}/, built by {render.__name__}: open {SITE.name}/index.html")


if __name__ == "__main__": main()
