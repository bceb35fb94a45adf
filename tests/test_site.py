"""The built site in a real browser: its pages, pictures, formulas, search and links, on a desk and on a phone, offline."""
import os
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urldefrag, urljoin

import pytest

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
    made_from = [path for folder in ("nbs", "tools") for path in (ROOT / folder).rglob("*")] + [ROOT / "_quarto.yml", ROOT / "settings.ini"]
    newest = max(path.stat().st_mtime for path in made_from if path.is_file() and ".ipynb_checkpoints" not in path.parts)
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
    cards.first.click()
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


def test_every_page_on_a_phone(site, open_page):
    "All pages that links lead to: whole, not wider than the screen, no raw markup, and no link or anchor leads nowhere."
    page = open_page(390, 844, is_mobile=True, has_touch=True)
    todo, anchors, wanted, wide, raw = [f"{site}index.html", f"{site}search.html"], {}, set(), [], []
    for address in todo:
        page.goto(address)
        pictures_and_formulas(page)
        raw += page.evaluate(RAW_MARKUP)
        if page.evaluate("document.documentElement.scrollWidth > 390"): wide.append(address)
        anchors[address] = {*page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")}
        for link in page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"):
            target, anchor = urldefrag(urljoin(address, link))
            if not target.startswith(site): continue
            target += "index.html" if target.endswith("/") else ""
            wanted.add((target, unquote(anchor), address))
            if target not in todo and target.endswith(".html"): todo.append(target)
            elif not target.endswith(".html"): assert page.request.get(target).ok, f"{address} links to {target}"
    assert not wide
    assert not raw
    lost = [f"{address} links to {target}#{anchor}" for target, anchor, address in wanted if anchor and anchor not in anchors.get(target, ())]
    assert not lost
    assert len(todo) > len(list((ROOT / "nbs").glob("*.ipynb")))  # and the search page


def test_dark_pages_keep_pictures_readable(site, open_page):
    page = open_page(color_scheme="dark")
    page.goto(f"{site}curves.html")
    assert pictures_and_formulas(page)[0]
    light = "images => images.every(image => getComputedStyle(image).backgroundColor == 'rgb(255, 255, 255)')"
    assert page.locator(".cell_output img").evaluate_all(light)
    red, *_ = map(int, page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)"))
    assert red < 80
