"""The site: what either renderer is given, what is built from it, and the pages in a browser."""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urldefrag, urljoin

import pytest
import yaml

import hilbert_attn
from hilbert_attn.bench import SUITES, machine_slug

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SITE = ROOT / "_docs"
PROCESSED = ROOT / "_proc"
PUBLISHED = "https://hilbert-attn.github.io"
SOURCES = [NBS, ROOT / "tools", ROOT / "hilbert_attn"]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.M | re.S)
LINK = re.compile(r'\[([^\[\]]*)\]\(([^)\s]+)\)|(<a [^>]*href="([^"]+)"[^>]*>)')
FLAGS = """headless no-sandbox disable-gpu disable-quic no-first-run
    disable-background-networking disable-component-update disable-sync""".split()


# What both renderers are given


def is_stale() -> bool:
    "Whether something that the site is made from is newer than the site."
    start = SITE / "index.html"
    if not start.exists() or not PROCESSED.exists(): return True
    made_from = [path for folder in SOURCES for path in folder.rglob("*") if path.is_file()]
    made_from += [ROOT / "_quarto.yml", ROOT / "settings.ini"]
    passing = {".ipynb_checkpoints", "__pycache__", "nbdev.yml"}
    kept = [path for path in made_from if not passing & {*path.parts}]
    return start.stat().st_mtime < max(path.stat().st_mtime for path in kept)


@pytest.fixture(scope="module")
def site() -> Path:
    "The folder of the site, built where it is absent or stale."
    pytest.importorskip("sphinx")
    if is_stale():
        subprocess.run([sys.executable, "tools/build_site.py"], cwd=ROOT, check=True, timeout=500)
    return SITE


@pytest.fixture(scope="module")
def pages(site) -> dict[str, list[dict]]:
    "The cells of each processed notebook."
    found = {}
    for path in sorted(PROCESSED.glob("*.ipynb")):
        found[path.name] = json.loads(path.read_text())["cells"]
    return found


@pytest.fixture(scope="module")
def quarto(site) -> dict:
    return yaml.safe_load((PROCESSED / "_quarto.yml").read_text())


def joined(lines) -> str: return lines if isinstance(lines, str) else "".join(lines)


def front(cells: list[dict]) -> dict:
    return yaml.safe_load(joined(cells[0]["source"]).strip().strip("-"))


def texts(cells: list[dict]) -> list[str]:
    "The Markdown and HTML of a page, written and printed, without code."
    found = []
    for cell in cells[1:]:
        if cell["cell_type"] == "markdown": found.append(joined(cell["source"]))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            found += [joined(data.get(kind, "")) for kind in ("text/markdown", "text/html")]
    return found


def without_code(text: str) -> str: return CODE.sub("", text)


def links(pages) -> list[tuple[str, str, str, str]]:
    "Of every link: its page, its text, its target, and its tag where it is HTML."
    found = []
    for name, cells in pages.items():
        for match in LINK.finditer("\n".join(map(without_code, texts(cells)))):
            text, target, tag, address = match.groups()
            found.append((name, text or "", target or address, tag or ""))
    assert len(found) > 500
    return found


def headings(cells: list[dict]) -> set[str]:
    "Their anchors, as Pandoc names them."
    found = set()
    for text in texts(cells):
        unfenced = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        for title in re.findall(r"^#+ +(.+)", unfenced, re.M):
            plain = re.sub(r"[^\w\s.-]", "", title.lower())
            found.add(re.sub(r"\s+", "-", plain).lstrip("0123456789-._"))
    return found


def anchors(cells: list[dict]) -> set[str]:
    ids = re.findall(r'\bid="([^"]+)"', "\n".join(texts(cells)))
    return {*ids} | headings(cells)


def test_no_link_between_pages_goes_around_by_the_published_site(pages):
    assert not [link for link in links(pages) if link[2].startswith(PUBLISHED)]


def test_link_targets_exist(pages):
    html = {front(cells)["output-file"] for cells in pages.values()}
    for name, _, target, _ in links(pages):
        file = urldefrag(target)[0]
        if re.match(r"\w+:", file) or not file: continue
        exists = file in pages or file in html or (NBS / file).exists()
        assert exists or (NBS / file.removeprefix("notebooks/")).exists(), f"{name}: {target}"


def test_links_to_notebooks_as_files_are_marked(pages):
    "Quarto takes them for links to pages otherwise, finds none, and fails."
    downloads = [link for link in links(pages) if link[2].startswith("notebooks/")]
    assert len(downloads) == len(exported())
    assert all("data-noresolveinput" in tag for *_, tag in downloads)


def test_anchors_exist(pages):
    by_html = {front(cells)["output-file"]: name for name, cells in pages.items()}
    known = {name: anchors(cells) for name, cells in pages.items()}
    lost = []
    for name, _, target, _ in links(pages):
        file, anchor = urldefrag(target)
        page = by_html.get(file, file) or name
        if anchor and page in known and anchor not in known[page]: lost.append((name, target))
    assert not lost


def test_links_say_titles(pages):
    stems = {Path(name).stem for name in pages} - {"index"}
    assert not [link for link in links(pages) if link[1].removesuffix(".ipynb") in stems]


def test_markdown_that_is_shown_as_it_is_stands_alone(pages):
    "Without blank lines around it, Quarto runs it into the next table or picture."
    cells = [cell for page in pages.values() for cell in page]
    shown = [cell for cell in cells if "#| output: asis" in joined(cell["source"])]
    outputs = [output for cell in shown for output in cell["outputs"]]
    printed = [joined(out.get("text") or out["data"].get("text/markdown", "")) for out in outputs]
    printed = [text for text in printed if text]
    assert len(printed) > 100
    assert not [text for text in printed if not re.fullmatch(r"\n\n\S.*\S\n\n", text, re.S)]


def test_documented_source_is_folded(pages):
    "Its arguments stand in the signature and the table already; kernels and helpers stay open."
    folds = {"true": 0, "show": 0}
    for cells in pages.values():
        titles = headings(cells)
        for source in (joined(cell["source"]) for cell in cells):
            if not (fold := re.search(r"^#\| code-fold: (true|show)\n.*Exported", source)): continue
            names = re.findall(r"^(?:def|class) (\w+)", source, re.M)
            documented = any(name.lower() in titles for name in names)
            assert fold[1] == ("true" if documented else "show"), source[:400]
            folds[fold[1]] += 1
    assert min(folds.values()) > 5


def test_no_section_is_empty(pages):
    for name, cells in pages.items():
        for cell, after in pairwise(cells[1:]):
            if {cell["cell_type"], after["cell_type"]} != {"markdown"}: continue
            alone = re.fullmatch(r"(#+) .*", joined(cell["source"]).strip())
            following = re.match(r"#+ ", joined(after["source"]))
            if alone and following: assert len(following[0]) > len(alone[1]) + 1, (name, alone[0])


def test_torch_documents_no_operator_of_ours(pages):
    assert not [name for name, cells in pages.items() if "instantiate CustomOpDef" in str(cells)]


def test_settings_of_quarto(quarto, site):
    html, website = quarto["format"]["html"], quarto["website"]
    assert website["page-navigation"] and html["respect-user-color-scheme"] and html["code-copy"]
    for theme in html["theme"].values():
        own = [file for file in theme if file.endswith(".scss")]
        assert "$web-font-path: false" in (PROCESSED / own[-1]).read_text()
    assert html["html-math-method"]["method"] == "mathjax"
    assert (site / html["html-math-method"]["url"]).is_file()
    assert all((PROCESSED / file).is_file() for file in quarto["project"]["resources"])


def sidebar(described: dict) -> list[tuple[str, list[str]]]:
    "The sections of the navigation, each with the files of its pages; a separator has none."
    found = []
    for entry in described["website"]["sidebar"]["contents"]:
        inside = [entry] if "href" in entry else entry.get("contents", [])
        files = [page if isinstance(page, str) else page["href"] for page in inside]
        found.append((entry.get("section") or entry["text"], files))
    return found


def test_every_page_is_in_the_navigation_and_sources_come_last(quarto, pages):
    sections = sidebar(quarto)
    listed = [file for _, files in sections for file in files]
    assert sorted(listed) == sorted(pages)
    assert sections[-2] == ("---", [])  # previous and next stop here
    modules = sorted(name for name in pages if name.startswith("module_"))
    assert sections[-1] == ("Source", modules) and len(modules) > 15
    assert not any(front(pages[name])["page-navigation"] for name in modules)


# What is built


def html_pages(site: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in site.glob("*.html")}


def test_pager_is_the_reading_path(site, pages):
    described = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    path = [file for _, files in sidebar(described) for file in files]
    html = html_pages(site)
    at, walked = "index.html", []
    while at:
        walked.append(at)
        found = re.search(r'class="next-page" href="([^"]+)"', html[at])
        at = found and found[1]
    assert walked == [front(pages[file]).get("output-file", "index.html") for file in path]
    modules = [text for name, text in html.items() if name.startswith("module_")]
    assert not [text for text in modules if 'class="next-page"' in text or "prev-page" in text]


def loaded(site: Path, page: str, html: str) -> int:
    "Bytes of a page with everything that it loads; fonts of formulas count as a whole."
    sources = re.findall(r'<(?:script|img)[^>]* src="([^"]+)"', html)
    sources += re.findall(r'<link rel="stylesheet"[^>]* href="([^"]+)"', html)
    files = {site / urldefrag(source)[0].partition("?")[0] for source in sources}
    if any("mathjax" in source for source in sources): files |= {*site.rglob("*.woff")}
    return len(html.encode()) + sum(file.stat().st_size for file in files if file.is_file())


def test_weight(site):
    whole = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    assert whole < 12e6
    weights = [loaded(site, name, html) for name, html in html_pages(site).items()]
    assert statistics.median(weights) < 300e3


def test_formulas_alone_load_mathjax(site):
    html = html_pages(site)
    loads = {name for name, text in html.items() if "tex-chtml.js" in text}
    shows = {name for name, text in html.items() if re.search(r'class="math ', text)}
    assert loads == shows and len(shows) > 5


# Pages in a browser


@pytest.fixture(scope="module")
def chromium() -> str:
    names = "chromium", "chromium-browser", "google-chrome"
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        missing = "no Chromium on PATH: install Debian's package `chromium`, or Google Chrome"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    return found


@pytest.fixture(scope="module")
def server(chromium, site) -> str:
    "The address of the site."
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=site)) as running:
        thread = Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join(10)


@pytest.fixture(scope="module")
def browser(chromium):
    playwright = pytest.importorskip("playwright.sync_api")
    flags = [f"--{flag}" for flag in FLAGS]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=flags, timeout=60_000)
        yield opened
        opened.close()


def listen(page, server: str, complaints: list[str]) -> None:
    "Notes what leaves this machine, fails to load, or complains in the console."
    def check(route):
        if route.request.url.startswith((server, "data:", "blob:")): return route.continue_()
        complaints.append(f"asked for {route.request.url}")
        route.abort()

    def hear(message):
        if message.type in ("error", "warning"): complaints.append(message.text)

    def answered(response):
        if response.status >= 400: complaints.append(f"{response.status} {response.url}")

    page.context.route("**/*", check)
    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("websocket", lambda socket: complaints.append(f"opened {socket.url}"))
    page.on("response", answered)


@pytest.fixture
def open_page(server, browser):
    "Opens pages of the site; in the end, there may be no complaint."
    contexts, complaints = [], []

    def opener(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        listen(page, server, complaints)
        return page

    yield opener
    for context in contexts: context.close()
    assert not complaints


def follow(link):
    "Clicks on a link to another page, and waits for all of it: a click returns when it begins."
    with link.page.expect_navigation(wait_until="load"): link.click()


def texts_of(found) -> list[str]:
    return found.evaluate_all("elements => elements.map(element => element.textContent)")


def targets(found) -> list[str]:
    return found.evaluate_all("links => links.map(link => link.getAttribute('href'))")


def drawn(page) -> tuple[int, int]:
    "How many pictures and formulas there are, once every one has been drawn."
    page.wait_for_load_state("load")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    if page.locator(".math").count(): page.wait_for_selector("mjx-container", state="attached")
    broken = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
    assert not page.evaluate(broken)
    return page.locator("article img").count(), page.locator("article mjx-container").count()


def test_start_page(server, open_page):
    page = open_page()
    page.goto(server)
    assert "hilbert_attn" in page.title()
    assert page.locator("h1").inner_text().startswith("hilbert_attn")
    cards = page.locator("ul.cards a")
    assert cards.count() == len(list(NBS.glob("[0-9]*.ipynb")))
    assert page.locator("article .cell_output img").count() == 1
    numbers = page.locator("article table").first.inner_text()
    assert re.search(r"\d+x, \d+x\s+faster than SDPA with a mask", numbers)
    look_up = targets(page.locator("article p:has(strong:text('Look up')) a"))
    expected = {"api_by_topic.html", "benchmarks.html", "claims_on_trial.html"}
    assert {"#which-variant-when", *expected} <= {*look_up}
    assert "@software{hilbert_attn" in page.locator("section#citing pre").inner_text()
    follow(cards.get_by_text("Curves", exact=True))
    assert page.url.startswith(f"{server}curves.html")


def test_notebook_page_has_figures_formulas_and_tables(server, open_page):
    page = open_page()
    page.goto(f"{server}curves.html")
    assert all(drawn(page))
    docments = page.locator("section:has(> h3:text('curve_order')) table")
    assert "grid" in docments.first.inner_text()


def test_search_finds_curve_order(server, open_page):
    page = open_page()
    page.goto(server)
    page.locator("input[name=q]").first.fill("curve_order")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    assert any("curves.html" in link for link in targets(page.locator("#search-results li a")))


def test_code_can_be_copied(server, open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.goto(f"{server}index.html")
    block = page.locator("section#quickstart div.highlight").first
    code = block.locator("pre").text_content()
    block.hover()
    block.locator("button.copy").click()
    assert block.locator("button.copy").inner_text() == "Copied"
    assert page.evaluate("navigator.clipboard.readText()") == code
    assert page.locator(".cell_output button.copy").count() == 0


RAW_MARKUP = r"""[...document.querySelectorAll("article p")].map(paragraph => {
    const prose = paragraph.cloneNode(true)
    prose.querySelectorAll("code").forEach(code => code.remove())
    return prose.textContent
}).filter(text => /\| *:?(--|—)|^:::|\$\$|@(fig|eq|tbl)-|\]\(/.test(text))"""
DARK_ON_DARK = r"""[...document.querySelectorAll(
    "article p, article li, article td, article pre span, article h1, article h2"
)].filter(element => {
    const color = getComputedStyle(element).color
    const [red, green, blue] = color.match(/[\d.]+/g).map(Number)
    return element.textContent.trim() && 0.3 * red + 0.6 * green + 0.1 * blue < 90
}).map(element => element.outerHTML.slice(0, 120))"""
CUT_OFF = r"""[...document.querySelectorAll(
    "article pre, article table, article .output, article .table-wrapper, article div.math"
)].filter(box => {
    if (!box.checkVisibility() || box.scrollWidth <= box.clientWidth + 1) return false
    const overflow = getComputedStyle(box).overflowX
    if (overflow === "visible") return !box.closest("[data-more]")
    return !box.hasAttribute("data-more") || box.tabIndex !== 0
}).map(box => box.outerHTML.slice(0, 200))"""
NAMELESS = """[...document.querySelectorAll('article img')]
    .filter(image => !image.alt).map(image => image.src)"""
IDS = "[...document.querySelectorAll('[id]')].map(element => element.id)"


def faults(page, width: int, scheme: str) -> list:
    "What is wrong with a page as it is shown."
    found = [*page.evaluate(RAW_MARKUP), *page.evaluate(NAMELESS), *page.evaluate(CUT_OFF)]
    if page.evaluate(f"document.documentElement.scrollWidth > {width}"): found.append("too wide")
    if scheme == "dark": found += page.evaluate(DARK_ON_DARK)
    return found


def crawl(page, server: str, check) -> tuple[dict[str, set[str]], set[tuple[str, str, str]]]:
    "All pages that links lead to, with their anchors; and where each link on them leads."
    todo, anchors, wanted = [f"{server}index.html", f"{server}search.html"], {}, set()
    for address in todo:
        page.goto(address)
        drawn(page)
        check(address)
        anchors[address] = {*page.evaluate(IDS)}
        for link in targets(page.locator("a[href]")):
            target, anchor = urldefrag(urljoin(address, link))
            if not target.startswith(server): continue
            if target.endswith("/"): target += "index.html"
            wanted.add((target, unquote(anchor), address))
            if target.endswith(".html") and target not in todo: todo.append(target)
    return anchors, wanted


@pytest.mark.parametrize("width, scheme", [(1400, "light"), (900, "dark"), (390, "dark")])
def test_every_page(server, open_page, width, scheme):
    "Whole, not wider than the screen, readable, no raw markup; no link or anchor leads nowhere."
    phone = dict(is_mobile=True, has_touch=True) if width < 500 else {}
    page = open_page(width, 844, color_scheme=scheme, **phone)
    wrong = {}

    def check(address):
        if found := faults(page, width, scheme): wrong[address] = found

    anchors, wanted = crawl(page, server, check)
    assert not wrong
    for target, anchor, address in wanted:
        if anchor: assert anchor in anchors.get(target, ()), f"{address}: {target}#{anchor}"
    files = {target for target, *_ in wanted} - {*anchors}
    assert not [file for file in files if not page.request.get(file).ok]
    reached = {Path(address).name for address in anchors}
    assert reached == {path.name for path in SITE.glob("*.html")}
    assert len(reached) > len(list(NBS.glob("*.ipynb"))) + len(exported())


def exported() -> dict[str, str]:
    "Notebook -> the file that it exports."
    found = {}
    for path in NBS.glob("[0-9]*.ipynb"):
        module = re.search(r"#\| default_exp ([\w.]+)", path.read_text())
        if module: found[path.name] = f"hilbert_attn/{module[1].replace('.', '/')}.py"
    return found


def sources(notebook: Path) -> list[str]:
    return [joined(cell["source"]) for cell in json.loads(notebook.read_text())["cells"]]


def page_name(notebook: str) -> str: return re.sub(r"^\d+[a-z]?_", "", Path(notebook).stem)


def lines(text: str) -> list[str]:
    kept = [line for line in text.splitlines() if line.strip()]
    return [line for line in kept if not line.startswith("# %% ")]


@pytest.mark.parametrize("notebook, file", exported().items())
def test_notebook_and_module_lead_to_each_other(server, open_page, notebook, file):
    page, name, source = open_page(), page_name(notebook), (ROOT / file).read_text()
    module = file.removesuffix(".py").replace("/", ".")
    page.goto(f"{server}{name}.html")
    line = page.locator("p.source-links")
    assert line.inner_text().startswith(f"Module {module}: source")
    with page.expect_download() as download: line.locator("a[download]").click()
    assert sources(download.value.path()) == sources(NBS / notebook)
    follow(line.locator("a").first)
    assert page.locator("h1").inner_text().startswith(module)
    assert line.locator(f"a[href='{name}.html']").count() == 1
    assert "View notebook" in line.inner_text()
    origins = page.locator("p.origin a")
    assert texts_of(origins) == re.findall(r"^# %% .*nbs/(.*)", source, re.M)
    assert all(target.startswith(f"{name}.html") for target in targets(origins))
    shown = "\n".join(texts_of(page.locator("div.cell_input pre")))
    assert lines(shown) == lines(source)


def test_a_function_leads_to_its_source_and_back(server, open_page):
    page = open_page()
    page.goto(f"{server}curves.html")
    follow(page.locator("div.source a[href='module_curves.html#def-curve_order']"))
    cell = page.locator("p.origin:has(#def-curve_order)")
    source = cell.locator("xpath=following-sibling::div[1]").inner_text()
    assert "def curve_order(" in source
    follow(cell.locator("a"))
    assert page.url.startswith(f"{server}curves.html#")
    assert f"def {page.url.partition('#')[2]}(" in source


def row_names(rows) -> list[str]:
    return rows.evaluate_all("rows => rows.map(row => row.querySelector('code').textContent)")


def test_api_page_has_every_name_once(server, open_page):
    page = open_page()
    page.goto(f"{server}api_by_topic.html")
    rows = page.locator("article table tbody tr")
    names = row_names(rows)
    beyond = {*row_names(page.locator("section#measuring tbody tr"))} - {*hilbert_attn.__all__}
    assert sorted({*names} - beyond) == sorted(hilbert_attn.__all__)
    assert len(names) == len({*names})
    sources = targets(rows.locator("td:last-child a:last-of-type"))
    assert len(sources) == rows.count()
    assert all(re.match(r"[a-z_]+\.html", target) for target in sources)
    documented = rows.locator("td:first-child a")
    assert documented.count() > 0.8 * len(names)  # constants and aliases have no page of their own
    follow(documented.get_by_text("hilbert_attention", exact=True).first)
    assert page.url.replace("-", "_") == f"{server}backends.html#hilbert_attention"


def stored_suites() -> dict[str, set[str]]:
    "For each machine, the suites that were measured on it."
    folders = [folder for folder in (NBS / "results").iterdir() if folder.is_dir()]
    return {folder.name: {path.stem for path in folder.glob("*.json")} for folder in folders}


def test_benchmark_page_has_every_machine(server, open_page):
    page = open_page()
    page.goto(f"{server}benchmarks.html")
    stored = stored_suites()
    assert page.locator("section > section:has(> h2):has(h3)").count() == len(stored)
    for machine, suites in stored.items():
        file = NBS / "results" / machine / f"{min(suites & {*SUITES})}.json"
        environment = json.loads(file.read_text())[-1]["environment"]
        assert machine_slug(environment) == machine
        title = environment.get("gpu", environment["cpu"])
        section = page.locator(f"section:has(> h2:text('{title}'))").inner_text()
        assert all(environment[key] in section for key in ("torch", "python", "date", "commit"))
        missing = section.rpartition("Not measured on this machine:")[2]
        assert all(suite in missing for suite in {*SUITES} - suites)


def test_benchmark_page_draws_every_suite(server, open_page):
    page = open_page()
    page.goto(f"{server}benchmarks.html")
    suites = [suite for suites in stored_suites().values() for suite in suites]
    drawn = sum(suite.startswith("gpu_run") or suite in SUITES for suite in suites)
    pictures = page.locator("article .cell_output img")
    assert pictures.count() == drawn > 0
    widths = pictures.evaluate_all("images => images.map(image => image.naturalWidth)")
    assert max(widths) <= 700  # legible on a phone without scrolling
    addresses = pictures.evaluate_all("images => images.map(image => image.src)")
    assert all(len(page.request.get(address).body()) < 200_000 for address in addresses)
    assert page.locator("section:has(> h3) table").count() >= drawn


@pytest.mark.parametrize("name", ["index", "curves", "benchmarks", "which_backend_when"])
def test_dark_pages_keep_pictures_readable(server, open_page, name):
    page = open_page(color_scheme="dark")
    page.goto(f"{server}{name}.html")
    assert drawn(page)[0]
    white = "getComputedStyle(image).backgroundColor == 'rgb(255, 255, 255)'"
    assert page.locator(".cell_output img").evaluate_all(f"all => all.every(image => {white})")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, *_ = map(int, re.findall(r"\d+", ground))
    assert red < 80
