"""The built site in a real browser: its pages, pictures, formulas, search and links, on a desk and on a phone, light and dark, offline."""
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urldefrag, urljoin

import pytest

import hilbert_attn
from hilbert_attn.bench import SUITES, machine_slug

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_docs"
FLAGS = ("headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
         "disable-component-update disable-sync").split()


RAW_MARKUP = r"""[...document.querySelectorAll("article p")].map(paragraph => {
    const prose = paragraph.cloneNode(true)
    prose.querySelectorAll("code").forEach(code => code.remove())
    return prose.textContent
}).filter(text => /\| *:?(--|—)|^:::|\$\$|@(fig|eq|tbl)-|\]\(/.test(text))"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        missing = "no Chromium on PATH: install Debian's package `chromium`, or Google Chrome, to test the site"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    return found


@pytest.fixture(scope="module")
def site(chromium) -> str:
    "The address of the site, built where it is absent or older than what it is made from."
    made_from = [path for folder in ("nbs", "tools", "hilbert_attn") for path in (ROOT / folder).rglob("*")] + [ROOT / "_quarto.yml", ROOT / "settings.ini"]
    newest = max(path.stat().st_mtime for path in made_from if path.is_file() and not {".ipynb_checkpoints", "__pycache__"} & {*path.parts})
    start = SITE / "index.html"
    if not start.exists() or start.stat().st_mtime < newest:
        subprocess.run([sys.executable, "tools/build_site.py"], cwd=ROOT, check=True, timeout=500)
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=SITE)) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join(10)


@pytest.fixture(scope="module")
def browser(chromium):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=[f"--{flag}" for flag in FLAGS], timeout=60_000)
        yield opened
        opened.close()


@pytest.fixture
def open_page(site, browser):
    "Opens pages of the site; in the end, nothing may have left this machine, failed to load, or complained in the console."
    contexts, complaints = [], []

    def check(route):
        if route.request.url.startswith((site, "data:", "blob:")): return route.continue_()
        complaints.append(f"asked for {route.request.url}")
        route.abort()

    def opener(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(20_000)
        context.route("**/*", check)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("websocket", lambda socket: complaints.append(f"opened {socket.url}"))
        page.on("response", lambda response: complaints.append(f"{response.status} {response.url}") if response.status >= 400 else None)
        return page

    yield opener
    for context in contexts: context.close()
    assert not complaints


def follow(link):
    "Clicks on a link that leads to another page, and waits for all of it: a click returns as soon as the new page begins."
    with link.page.expect_navigation(wait_until="load"): link.click()


def pictures_and_formulas(page) -> tuple[int, int]:
    "How many there are, once every one has been drawn."
    page.wait_for_load_state("load")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    if page.locator(".math").count(): page.wait_for_selector("mjx-container", state="attached")
    broken = page.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)")
    assert not broken
    return page.locator("article img").count(), page.locator("article mjx-container").count()


def test_start_page(site, open_page):
    page = open_page()
    page.goto(site)
    assert "hilbert_attn" in page.title()
    assert page.locator("h1").inner_text().startswith("hilbert_attn")
    cards = page.locator("ul.cards a")
    assert cards.count() == len(list((ROOT / "nbs").glob("[0-9]*.ipynb")))
    assert page.locator("article .cell_output img").count() == 1
    assert re.search(r"\d+x, \d+x\s+faster than SDPA with a mask", page.locator("article table").first.inner_text())
    look_up = page.locator("article p:has(strong:text('Look up'))").locator("a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert {"#which-variant-when", "api_by_topic.html", "benchmarks.html", "claims_on_trial.html"} <= {*look_up}
    assert "@software{hilbert_attn" in page.locator("section#citing pre").inner_text()
    follow(cards.get_by_text("Curves", exact=True))
    assert page.url.startswith(f"{site}curves.html")


def test_notebook_page_has_figures_formulas_and_tables(site, open_page):
    page = open_page()
    page.goto(f"{site}curves.html")
    pictures, formulas = pictures_and_formulas(page)
    assert pictures and formulas
    docments = page.locator("section:has(> h3:text('curve_order')) table")
    assert "grid" in docments.first.inner_text()


def test_search_finds_curve_order(site, open_page):
    page = open_page()
    page.goto(site)
    page.locator("input[name=q]").first.fill("curve_order")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    assert any("curves.html" in link.get_attribute("href") for link in page.locator("#search-results li a").all())


DARK_ON_DARK = """[...document.querySelectorAll("article p, article li, article td, article pre span, article h1, article h2")].filter(element => {
    const style = getComputedStyle(element), light = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number); return 0.3 * r + 0.6 * g + 0.1 * b }
    return element.textContent.trim() && light(style.color) < 90
}).map(element => element.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_every_page(site, open_page, width, scheme):
    "All pages that links lead to: whole, not wider than the screen, readable, no raw markup, and no link or anchor leads nowhere."
    page = open_page(width, 844, color_scheme=scheme, **(dict(is_mobile=True, has_touch=True) if width < 500 else {}))
    todo, anchors, wanted, files, wide, raw, unreadable, nameless = [f"{site}index.html", f"{site}search.html"], {}, set(), set(), [], [], [], []
    for address in todo:
        page.goto(address)
        pictures_and_formulas(page)
        raw += page.evaluate(RAW_MARKUP)
        if page.evaluate(f"document.documentElement.scrollWidth > {width}"): wide.append(address)
        if scheme == "dark": unreadable += [(address, what) for what in page.evaluate(DARK_ON_DARK)]
        nameless += page.evaluate("[...document.querySelectorAll('article img')].filter(image => !image.alt).map(image => image.src)")
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
        anchors[address] = {*ids}
        for link in page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"):
            target, anchor = urldefrag(urljoin(address, link))
            if not target.startswith(site): continue
            target += "index.html" if target.endswith("/") else ""
            wanted.add((target, unquote(anchor), address))
            if target not in todo and target.endswith(".html"): todo.append(target)
            elif not target.endswith(".html"): files.add((target, address))
    assert not wide
    assert not raw
    assert not unreadable
    assert not nameless
    lost = [f"{address} links to {target}#{anchor}" for target, anchor, address in wanted if anchor and anchor not in anchors.get(target, ())]
    assert not lost
    assert not [f"{address} links to {target}" for target, address in files if not page.request.get(target).ok]
    assert {Path(address).name for address in todo} == {path.name for path in SITE.glob("*.html")}  # so no page is beyond the reach of links
    assert len(todo) > len(list((ROOT / "nbs").glob("*.ipynb"))) + len(exported())


def exported() -> dict[str, str]:
    "Notebook -> the file that it exports."
    texts = {path: path.read_text() for path in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    return {path.name: f"hilbert_attn/{found[1].replace('.', '/')}.py" for path, text in texts.items() if (found := re.search(r"#\| default_exp ([\w.]+)", text))}


def test_notebook_and_module_lead_to_each_other(site, open_page):
    page = open_page()
    assert len(exported()) > 15
    for notebook, file in exported().items():
        name = re.sub(r"^\d+[a-z]?_", "", Path(notebook).stem)
        module, source = file[:-3].replace("/", "."), (ROOT / file).read_text()
        page.goto(f"{site}{name}.html")
        assert page.locator("p.source-links").inner_text().startswith(f"Module {module}: source")
        with page.expect_download() as download: page.locator("p.source-links a[download]").click()
        assert json.loads(download.value.path().read_text())["cells"] == json.loads((ROOT / "nbs" / notebook).read_text())["cells"]
        follow(page.locator("p.source-links a").first)
        assert page.locator("h1").inner_text().startswith(module)
        assert page.locator(f"p.source-links a[href='{name}.html']").count() == 1 and "View notebook" in page.locator("p.source-links").inner_text()
        assert page.locator("p.origin a").evaluate_all("links => links.map(a => a.textContent)") == re.findall(r"^# %% .*nbs/(.*)", source, re.M)
        assert all(link.startswith(f"{name}.html") for link in page.locator("p.origin a").evaluate_all("links => links.map(a => a.getAttribute('href'))"))
        shown = page.locator("div.cell_input pre").evaluate_all("cells => cells.map(cell => cell.textContent).join('\\n')")
        assert [line for line in shown.splitlines() if line.strip()] == [line for line in source.splitlines() if line.strip() and not line.startswith("# %% ")]


def test_a_function_leads_to_its_source_and_back(site, open_page):
    page = open_page()
    page.goto(f"{site}curves.html")
    follow(page.locator("div.source a[href='module_curves.html#def-curve_order']"))
    cell = page.locator("p.origin:has(#def-curve_order)")
    source = cell.locator("xpath=following-sibling::div[1]").inner_text()
    assert "def curve_order(" in source
    follow(cell.locator("a"))
    assert page.url.startswith(f"{site}curves.html#") and f"def {page.url.partition('#')[2]}(" in source


def test_api_page_has_every_name_once(site, open_page):
    page = open_page()
    page.goto(f"{site}api_by_topic.html")
    names = page.locator("article table tbody tr td:first-child").evaluate_all("cells => cells.map(cell => cell.querySelector('code').textContent)")
    beyond = set(page.locator("section#measuring table tbody tr td:first-child").evaluate_all("cells => cells.map(cell => cell.querySelector('code').textContent)")) - set(hilbert_attn.__all__)
    assert sorted(set(names) - beyond) == sorted(hilbert_attn.__all__) and len(names) == len(set(names))
    assert page.locator("article table tbody tr").evaluate_all("rows => rows.every(row => /^[a-z_]+\\.html/.test(row.querySelector('td:last-child a:last-of-type').getAttribute('href')))")
    documented = page.locator("article table tbody tr").evaluate_all("rows => rows.filter(row => row.querySelector('td:first-child a')).length")
    assert documented > 0.8 * len(names)  # constants and aliases have no documentation of their own
    follow(page.locator("article table td:first-child a").get_by_text("hilbert_attention", exact=True).first)
    assert page.url.replace("-", "_") == f"{site}backends.html#hilbert_attention"


def test_benchmark_page_has_every_machine_and_suite(site, open_page):
    page = open_page()
    page.goto(f"{site}benchmarks.html")
    stored = {folder.name: {path.stem for path in folder.glob("*.json")} for folder in (ROOT / "nbs" / "results").iterdir() if folder.is_dir()}
    assert page.locator("section > section:has(> h2):has(h3)").count() == len(stored)
    drawn = sum("gpu" if suite.startswith("gpu_run") else suite in SUITES for suites in stored.values() for suite in suites)
    pictures = page.locator("article .cell_output img")
    assert pictures.count() == drawn > 0
    assert all(width <= 700 for width in pictures.evaluate_all("images => images.map(image => image.naturalWidth)"))  # legible on a phone without scrolling
    assert all(len(page.request.get(source).body()) < 200_000 for source in pictures.evaluate_all("images => images.map(image => image.src)"))
    assert page.locator("section:has(> h3) table").count() >= drawn
    for machine, suites in stored.items():
        environment = json.loads((ROOT / "nbs" / "results" / machine / f"{sorted(suites & set(SUITES))[0]}.json").read_text())[-1]["environment"]
        assert machine_slug(environment) == machine
        section = page.locator(f"section:has(> h2:text('{environment.get('gpu', environment['cpu'])}'))").inner_text()
        assert all(environment[key] in section for key in ("torch", "python", "date", "commit"))
        assert all(f"{suite}" in section.rpartition("Not measured on this machine:")[2] for suite in set(SUITES) - suites)


@pytest.mark.parametrize("name", ["index", "curves", "benchmarks", "which_backend_when"])
def test_dark_pages_keep_pictures_readable(site, open_page, name):
    page = open_page(color_scheme="dark")
    page.goto(f"{site}{name}.html")
    assert pictures_and_formulas(page)[0]
    light = "images => images.every(image => getComputedStyle(image).backgroundColor == 'rgb(255, 255, 255)')"
    assert page.locator(".cell_output img").evaluate_all(light)
    red, *_ = map(int, page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)"))
    assert red < 80
