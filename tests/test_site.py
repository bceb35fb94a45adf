"""The site: what either renderer is given, so that who has Quarto gets it whole, and its weight."""

import json
import re
import statistics
import sys
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urldefrag
from zipfile import ZipFile

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import weigh_site
from built_site import (
    NBS,
    PROCESSED,
    ROOT,
    built,
    exported,
    joined,
    navigation,
    read_cells,
)

import hilbert_attn

pytestmark = pytest.mark.timeout(600)
PUBLISHED = "https://hilbert-attn.github.io"
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
INLINE = re.compile(r"`[^`\n]*`")
MARKDOWN_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s]+)\)")
HTML_LINK = re.compile(r'<a [^>]*href="([^"]+)"[^>]*>')
Pages = dict[str, list[dict]]


@pytest.fixture(scope="module")
def site() -> Path:
    return built()


@pytest.fixture(scope="module")
def pages(site) -> Pages:
    "The cells of each processed notebook."
    paths = sorted(PROCESSED.glob("*.ipynb"))
    return {path.name: read_cells(path) for path in paths}


@pytest.fixture(scope="module")
def quarto(site) -> dict:
    return yaml.safe_load((PROCESSED / "_quarto.yml").read_text())


def front(cells: list[dict]) -> dict:
    return yaml.safe_load(joined(cells[0]["source"]).strip().strip("-"))


def printed(cell: dict) -> list[str]:
    "The Markdown and HTML that code shows."
    found = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        for kind in ("text/markdown", "text/html"):
            if kind in data:
                found.append(joined(data[kind]))
    return found


def prose(cells: list[dict]) -> str:
    "What a page says, written and printed, without blocks of code."
    found = []
    for cell in cells[1:]:
        if cell["cell_type"] == "markdown":
            found.append(joined(cell["source"]))
        found += printed(cell)
    return FENCED.sub("", "\n".join(found))


class Link(NamedTuple):
    page: str  # the file that it stands in
    text: str
    target: str
    tag: str  # where it is HTML


@pytest.fixture(scope="module")
def links(pages) -> list[Link]:
    found = all_links(pages)
    assert len(found) > 500
    return found


def all_links(pages: Pages) -> list[Link]:
    found = []
    for name, cells in pages.items():
        text = INLINE.sub("", prose(cells))
        for match in MARKDOWN_LINK.finditer(text):
            found.append(Link(name, match[1], match[2], ""))
        for match in HTML_LINK.finditer(text):
            found.append(Link(name, "", match[1], match[0]))
    return found


def headings(cells: list[dict]) -> set[str]:
    "Their anchors, as Pandoc names them."
    found = set()
    for title in re.findall(r"^#+ +(.+)", prose(cells), re.M):
        plain = re.sub(r"[^\w\s.-]", "", title.lower())
        found.add(re.sub(r"\s+", "-", plain).lstrip("0123456789-._"))
    return found


def anchors(cells: list[dict]) -> set[str]:
    ids = re.findall(r'\bid="([^"]+)"', prose(cells))
    return headings(cells) | {*ids}


def files_by_html(pages: Pages) -> dict[str, str]:
    return {front(cells)["output-file"]: name for name, cells in pages.items()}


def test_no_link_between_pages_goes_around_by_the_published_site(links):
    assert not [link for link in links if link.target.startswith(PUBLISHED)]


def test_link_targets_exist(pages, links):
    known = {*pages, *files_by_html(pages)}
    for link in links:
        file = urldefrag(link.target)[0]
        if not file or re.match(r"\w+:", file) or file in known:
            continue
        there = NBS / file.removeprefix("notebooks/")
        assert file == "notebooks.zip" or there.exists(), link


def test_links_to_notebooks_as_files_are_marked(links):
    "Quarto takes them for links to pages otherwise, finds none, and fails."
    assert len([link for link in links if link.target == "notebooks.zip"]) == len(exported())
    check_downloads(links)


def check_downloads(links: list[Link]) -> None:
    downloads = [link for link in links if link.tag and link.target.endswith(".ipynb")]
    assert all("data-noresolveinput" in link.tag for link in downloads)


def test_anchors_exist(pages, links):
    by_html = files_by_html(pages)
    known = {name: anchors(cells) for name, cells in pages.items()}
    for link in links:
        file, anchor = urldefrag(link.target)
        page = by_html.get(file, file) or link.page
        if anchor and page in known:
            assert anchor in known[page], link


def test_links_say_titles(pages, links):
    stems = {Path(name).stem for name in pages} - {"index"}
    said = [link.text.removesuffix(".ipynb") for link in links]
    assert not stems.intersection(said)


def as_they_are(cells: list[dict]) -> list[str]:
    "The outputs of cells that show Markdown as it is."
    found = []
    for cell in cells:
        if "#| output: asis" not in joined(cell["source"]):
            continue
        found += [joined(output.get("text", "")) for output in cell["outputs"]]
        found += printed(cell)
    return [text for text in found if text]


def test_markdown_that_is_shown_as_it_is_stands_alone(pages):
    "Without blank lines around it, Quarto runs it into the next table or picture."
    shown = as_they_are_in(pages)
    assert len(shown) > 100
    check_alone(shown)


def as_they_are_in(pages: Pages) -> list[str]:
    return [text for cells in pages.values() for text in as_they_are(cells)]


def check_alone(shown: list[str]) -> None:
    for text in shown:
        assert re.fullmatch(r"\n\n\S.*\S\n\n", text, re.S), text[:400]


EXPORTED_SOURCE = re.compile(r"#\| code-fold: (true|show)\n.*Exported source")


def shown_sources(cells: list[dict]) -> list[tuple[str, str]]:
    "The exported code that a page shows, and whether it is folded."
    sources = [joined(cell["source"]) for cell in cells]
    found = [(EXPORTED_SOURCE.match(source), source) for source in sources]
    return [(match[1], source) for match, source in found if match]


def test_documented_source_is_folded(pages):
    "Its arguments stand in the signature and in the table; kernels and helpers stay open."
    seen = []
    for cells in pages.values():
        titles = headings(cells)
        for fold, source in shown_sources(cells):
            names = re.findall(r"^(?:def|class) (\w+)", source, re.M)
            documented = any(name.lower() in titles for name in names)
            assert fold == ("true" if documented else "show"), source[:400]
            seen.append(fold)
    assert seen.count("true") > 5 and seen.count("show") > 5


def test_no_section_is_empty(pages):
    for name, cells in pages.items():
        for cell, after in pairwise(cells[1:]):
            if {cell["cell_type"], after["cell_type"]} != {"markdown"}:
                continue
            alone = re.fullmatch(r"(#+) .*", joined(cell["source"]).strip())
            following = re.match(r"(#+) ", joined(after["source"]))
            if alone and following:
                assert len(following[1]) > len(alone[1]), (name, alone[0])


def test_torch_documents_no_operator_of_ours(pages):
    for name, cells in pages.items():
        assert "instantiate CustomOpDef" not in str(cells), name


def test_settings_of_quarto(quarto):
    html = quarto["format"]["html"]
    assert quarto["website"]["page-navigation"]
    assert html["respect-user-color-scheme"] and html["code-copy"]
    resources = quarto["project"]["resources"]
    assert {"explorer/", "report/", "card.png"} <= {*resources}
    for file in resources:
        assert (PROCESSED / file).exists()
    for card in ("open-graph", "twitter-card"):
        assert quarto["website"][card]["image"] == "card.png"


def test_fonts_and_formulas_come_from_the_site_itself(quarto, site):
    html = quarto["format"]["html"]
    for theme in html["theme"].values():
        assert "$web-font-path: false" in (PROCESSED / theme[-1]).read_text()
    assert html["html-math-method"]["method"] == "mathjax"
    assert (site / html["html-math-method"]["url"]).is_file()


def test_every_page_is_in_the_navigation_and_sources_come_last(pages):
    sections = navigation(PROCESSED)
    listed = [file for _, files in sections for file in files]
    assert sorted(listed) == sorted(pages)
    assert sections[-3] == ("---", [])  # previous and next stop here
    assert sections[-2] == ("Versions", ["changelog.ipynb"])
    modules = sorted(name for name in pages if name.startswith("module_"))
    assert len(modules) == len(exported())
    assert sections[-1] == ("Source", modules)
    for name in [*modules, "changelog.ipynb"]:
        assert front(pages[name])["page-navigation"] is False


def test_every_page_says_its_version(html, quarto):
    "And leads to what that version brought, with either renderer."
    words = f"Version {hilbert_attn.__version__}: changes"
    assert quarto["website"]["page-footer"] == {
        "left": [{"text": words, "href": "changelog.ipynb"}]
    }
    for name, text in html.items():
        file = "#" if name == "changelog.html" else "changelog.html"
        assert f'<a class="version" href="{file}">{words}</a>' in text, name
    newest = re.search(r"^## (.+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert f"<h2>{newest}<" in html["changelog.html"]


@pytest.mark.parametrize("notebook, file", exported().items())
def test_page_of_a_module_is_its_source(pages, notebook, file):
    path = Path(file).with_suffix("").parts[1:]
    cells = pages[f"{'_'.join(['module', *path])}.ipynb"]
    shown = [joined(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    source = (ROOT / file).read_text()
    assert lines("\n".join(shown)) == lines(source)
    origins = re.findall(r'<p class="origin">.*?<a href="([^"]*)">(.*?)</a>', prose(cells))
    assert [name for _, name in origins] == re.findall(r"^# %% .*nbs/(.*)", source, re.M)
    back = front(pages[notebook])["output-file"]
    assert all(target.startswith(back) for target, _ in origins)
    assert f'View notebook: <a href="{back}">' in prose(cells)


def lines(source: str) -> list[str]:
    kept = [line for line in source.splitlines() if line.strip()]
    return [line for line in kept if not line.startswith("# %% ")]


# Each of these checks fails where the defect is that it is there for

def planted(change) -> dict:
    "A page in order, with a link to another, and what `change` makes of it."
    def cell(kind, source, **more):
        return dict(cell_type=kind, source=source, metadata={}, **more)

    shown = [dict(output_type="stream", name="stdout", text="\n\n| a |\n| --- |\n\n")]
    code = "#| output: asis\nprint(table)"
    pages = {}
    for name, title in (("00b_curves.ipynb", "Curves"), ("01_patterns.ipynb", "Patterns")):
        head = f"---\ntitle: {title}\noutput-file: {title.lower()}.html\n---"
        text = '## Order\n\n<a id="f" href="notebooks/00b_curves.ipynb" data-noresolveinput>get</a>'
        text += "\n\n[Curves](00b_curves.ipynb#order) [f](#f)"
        output = cell("code", code, outputs=[dict(shown[0])])
        pages[name] = [cell("raw", head), cell("markdown", text), output]
    change(pages["01_patterns.ipynb"])
    return pages


def in_text(old: str, new: str):
    def change(cells):
        cells[1]["source"] = cells[1]["source"].replace(old, new)

    return change


def run_into_the_next(cells):
    cells[2]["outputs"][0]["text"] = cells[2]["outputs"][0]["text"].strip()


def leave_empty(cells):
    cells.insert(1, dict(cell_type="markdown", source="## Empty", metadata={}))


DEFECTS = {
    "a link that Quarto resolves": (in_text(" data-noresolveinput", ""), "marked"),
    "a link to the published site": (
        in_text("(00b_curves.ipynb", f"({PUBLISHED}/curves.html"), "published"),
    "a link to a page that is gone": (in_text("(00b_curves", "(00b_gone"), "targets"),
    "an anchor that is gone": (in_text("#order", "#_private"), "anchors"),
    "a link that says a file's name": (in_text("[Curves]", "[00b_curves]"), "titles"),
    "a table that runs into a plot": (run_into_the_next, "alone"),
    "an empty section": (leave_empty, "empty"),
}


def verdicts(pages: Pages) -> dict[str, bool]:
    "Which of the checks hold."
    found = all_links(pages)
    checks = {
        "published": lambda: test_no_link_between_pages_goes_around_by_the_published_site(found),
        "targets": lambda: test_link_targets_exist(pages, found),
        "anchors": lambda: test_anchors_exist(pages, found),
        "titles": lambda: test_links_say_titles(pages, found),
        "marked": lambda: check_downloads(found),
        "alone": lambda: check_alone(as_they_are_in(pages)),
        "empty": lambda: test_no_section_is_empty(pages),
    }
    return {name: holds(check) for name, check in checks.items()}


def holds(check) -> bool:
    try:
        check()
    except AssertionError:
        return False
    return True


def test_a_page_in_order_passes():
    assert all(verdicts(planted(lambda cells: None)).values())


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_noticed(defect):
    change, check = DEFECTS[defect]
    found = verdicts(planted(change))
    assert [name for name, holds in found.items() if not holds] == [check]


# Pictures


def pictured(cells: list[dict]) -> list[tuple[str, str]]:
    "The code that shows pictures, and what it says of them."
    found = []
    for cell in cells:
        kinds = [kind for output in cell.get("outputs", []) for kind in output.get("data", {})]
        if any(kind.startswith("image/") for kind in kinds):
            source = joined(cell["source"])
            alt = re.findall(r"^#\| fig-(?:alt|alt-\d|cap): (.+)", source, re.M)
            found.append((source, " ".join(alt)))
    return found


def test_pictures_say_what_is_to_be_seen():
    shown = {path.name: pictured(read_cells(path)) for path in NBS.glob("*.ipynb")}
    alts = [alt for found in shown.values() for _, alt in found]
    assert len(alts) > 60
    for name, found in shown.items():
        for source, alt in found:
            assert len(alt.split()) >= 5, (name, source[:300])


def test_alts_of_several_lines_are_one_for_the_renderers(pages):
    alts = [alt for cells in pages.values() for _, alt in pictured(cells)]
    assert max(map(len, alts)) > 100  # longer than a line of a notebook
    assert not [name for name, cells in pages.items() if "#| fig-alt-2" in str(cells)]


# What is built


def test_notebooks_can_be_had_without_outputs(site):
    with ZipFile(site / "notebooks.zip") as archive:
        offered = {name: archive.read(name) for name in archive.namelist()}
    notebooks = {f"nbs/{path.name}": path for path in NBS.glob("*.ipynb")}
    exercises = {f"nbs/exercises/{path.name}" for path in NBS.glob("exercises/*.py")}
    assert {*offered} == {*notebooks} | exercises
    for name, path in notebooks.items():
        for one, other in zip(json.loads(offered[name])["cells"], read_cells(path), strict=True):
            assert joined(one["source"]) == joined(other["source"])
            assert not one.get("outputs")


@pytest.fixture(scope="module")
def html(site) -> dict[str, str]:
    return {path.name: path.read_text() for path in site.glob("*.html")}


def test_pager_is_the_reading_path(html, pages):
    path = [file for _, files in navigation(ROOT) for file in files]
    at, walked = "index.html", []
    while at:
        walked.append(at)
        found = re.search(r'class="next-page" href="([^"]+)"', html[at])
        at = found and found[1]
    assert walked == [front(pages[file])["output-file"] for file in path]


def test_pages_of_modules_are_no_part_of_it(html):
    for name, text in html.items():
        if name.startswith(("module_", "changelog")):
            assert not re.search('class="(next|prev)-page"', text)


def test_weight(site):
    "Of all files, and of pages with everything that they load."
    found = weigh_site.weights(site)
    assert found["total"] < 12e6
    weights = {name: weight for name, weight in found["pages"].items()}
    assert statistics.median(weights.values()) < 300e3
    assert max(weights.values()) < 1.5e6


BEFORE_PAINT = 250e3  # bytes: a second of a phone's 2 Mbit/s
SCRIPT = re.compile(r'<script\b([^>]*) src="([^"?]+)[^"]*"([^>]*)>')
PLAYED = ["index.html", "explorer.html", "search.html", "explorer/index.html"]


@pytest.mark.parametrize("name", PLAYED)
def test_little_comes_before_the_first_paint(site, name):
    "The page, its sheets, and the scripts that it waits for: not formulas, nor pictures."
    page = site / name
    text = page.read_text()
    waited = [src for a, src, b in SCRIPT.findall(text) if "defer" not in a + b]
    prose = max(text.rfind(f"</{element}>") for element in ("p", "article", "main"))
    at_the_end = [src for src in waited if text.index(src) > prose > 0]
    sheets = [sheet.partition("?")[0] for sheet in weigh_site.SHEET.findall(text)]
    files = {page, *(page.parent / file for file in sheets + waited if file not in at_the_end)}
    assert weigh_site.size(files) < BEFORE_PAINT
    assert len(waited) - len(at_the_end) <= 1
    assert "_static/mathjax" not in text


def test_no_page_waits_for_a_script(html):
    "All are run once the page is there, but for the search's, which stand behind its field."
    waited = {
        name: [src for a, src, b in SCRIPT.findall(text) if "defer" not in a + b]
        for name, text in html.items()
    }
    assert waited.pop("search.html") == ["search_index.js", "_static/search.js"]
    assert not {name: found for name, found in waited.items() if found}


def test_weights_are_stored(site):
    "Before and after they were looked at; the newest stands near what is built."
    stored = json.loads(weigh_site.STORED.read_text())
    first, *_, last = stored
    assert last["total"] < 0.85 * first["total"]
    assert last["total"] == pytest.approx(weigh_site.weights(site)["total"], rel=0.1)


def test_pages_say_what_they_are(html, pages):
    "To search engines, and where a link to them is shared."
    for cells in pages.values():
        told = front(cells)
        text = html[told["output-file"]]
        for name in ('name="description"', 'property="og:description"'):
            content = re.search(rf'<meta {name} content="([^"]*)"', text)[1]
            assert unescape(content) == told.get("description", content) and content
        assert "/_static/card.png" in re.search('property="og:image" content="([^"]*)"', text)[1]


def test_formulas_alone_load_mathjax(html):
    loads = {name for name, text in html.items() if "tex-chtml.js" in text}
    shows = {name for name, text in html.items() if re.search('class="math ', text)}
    assert loads == shows and len(shows) > 5
