"""The site in a browser, offline: pages, pictures, formulas, search, links; desk and phone."""

import json
import os
import re
import shutil
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urldefrag, urljoin
from zlib import crc32

import bs4
import pytest
from built_site import NBS, SITE, built
from sampling import FULL

import hilbert_attn
from hilbert_attn.bench import SUITES, machine_slug

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
CHROMIUM = "chromium", "chromium-browser", "google-chrome"
FLAGS = """headless no-sandbox disable-gpu disable-quic no-first-run
    disable-background-networking disable-component-update disable-sync""".split()


@pytest.fixture(scope="module")
def chromium() -> str:
    found = [path for path in map(shutil.which, CHROMIUM) if path]
    if found:
        return found[0]
    missing = "no Chromium on PATH: install Debian's package `chromium`"
    pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        "A page that is left while it loads; what it lacks is for the page to complain of."


@pytest.fixture(scope="module")
def server(chromium) -> str:
    "The address of the site."
    handler = partial(Quiet, directory=built())
    with Server(("127.0.0.1", 0), handler) as running:
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
        launch = partial(driver.chromium.launch, executable_path=chromium, timeout=60_000)
        opened = launch(args=flags)
        yield opened
        opened.close()


def listen(page, server: str, complaints: list[str]) -> None:
    "Notes what leaves this machine, fails to load, or complains in the console."

    def check(route):
        if route.request.url.startswith((server, "data:", "blob:")):
            return route.continue_()
        complaints.append(f"asked for {route.request.url}")
        route.abort()

    def hear(message):
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def answered(response):
        if response.status >= 400:
            complaints.append(f"{response.status} {response.url}")

    page.context.route("**/*", check)
    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("websocket", lambda socket: complaints.append(f"opened {socket.url}"))
    page.on("response", answered)


@pytest.fixture
def open_page(server, browser):
    "Opens pages of the site; in the end, there may be no complaint."
    contexts, complaints = [], []

    def opener(name, width=1280, **options):
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, **options)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        listen(page, server, complaints)
        page.goto(f"{server}{name}.html")
        return page

    yield opener
    for context in contexts:
        context.close()
    assert not complaints


def follow(link):
    "Clicks on a link to another page, and waits for all of it: a click returns when it begins."
    with link.page.expect_navigation(wait_until="load"):
        link.click()


def texts_of(found) -> list[str]:
    return found.evaluate_all("found => found.map(element => element.textContent)")


def targets(found) -> list[str]:
    return found.evaluate_all("links => links.map(link => link.getAttribute('href'))")


SHOWN = """document.querySelectorAll("section").forEach(
    section => { section.style.contentVisibility = "visible" })"""
FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
BROKEN = """[...document.images]
    .filter(image => !image.naturalWidth).map(image => image.src)"""


def drawn(page) -> tuple[int, int]:
    "How many pictures and formulas there are, once every one has been drawn."
    page.wait_for_load_state("load")
    page.evaluate(SHOWN)
    page.evaluate(FRAMES)
    page.wait_for_function("[...document.images].every(image => image.complete)")
    if page.locator(".math").count():
        page.wait_for_selector("mjx-container", state="attached")
    assert not page.evaluate(BROKEN)
    pictures, formulas = page.locator("article img"), page.locator("article mjx-container")
    return pictures.count(), formulas.count()


def test_start_page(server, open_page):
    page = open_page("index")
    assert "hilbert_attn" in page.title()
    assert page.locator("h1").inner_text().startswith("hilbert_attn")
    cards = page.locator("ul.cards a")
    assert cards.count() == len(list(NBS.glob("[0-9]*.ipynb")))
    assert page.locator("article .cell_output img").count() == 1
    numbers = page.locator("article table").first.inner_text()
    assert re.search(r"\d+x, \d+x\s+as fast .* as SDPA with a dense mask", numbers)
    look_up = targets(page.locator("article p:has(strong:text('Look up')) a"))
    expected = {"api_by_topic.html", "benchmarks.html", "claims_on_trial.html"}
    assert {"#which-variant-when", *expected} <= {*look_up}
    assert "@software{hilbert_attn" in page.locator("section#citing pre").text_content()
    page.locator("a:has(img[src*='still.'])").click()
    page.frame_locator("iframe.explorer").locator("#grid").wait_for()
    follow(cards.get_by_text("Curves", exact=True))
    assert page.url.startswith(f"{server}curves.html")


def test_notebook_page_has_figures_formulas_and_tables(server, open_page):
    page = open_page("curves")
    assert all(drawn(page))
    docments = page.locator("section:has(> h3:text('curve_order')) table")
    assert "grid" in docments.first.inner_text()


def test_search_from_any_page(server, open_page):
    page = open_page("patterns")
    page.locator("input[name=q]").first.fill("curve_order")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    assert found_pages(page)[0] == "curves"
    page.locator("article input[name=q]").fill("nosuchword")
    page.keyboard.press("Enter")
    page.get_by_text("No page has “nosuchword”.").wait_for()


SOUGHT = {  # the page that has to be among the first three; with *, the first
    "Morton": "*curves",
    "causal": "*patterns",
    "key mask": "patterns",
    "LongNet": "*patterns",
    "dilation": "patterns",
    "neighborhood": "local",
    "window": "local",
    "zigzag": "ring_plan",
    "block sparse": "*block_sparse",
    "Triton": "triton_forward",
    "backward": "triton_backward",
    "benchmarks": "*benchmarks",
    "explorer": "*explorer",
    "memory": "*memory",
    "point cloud": "*points",
    "ViT": "vision",
    "diffusers": "*diffusers",
    "cross attention": "*cross",
    "tolerance": "reference",
    "glossary": "*notation",
    "claims": "*claims_on_trial",
    "hilbert_attention": "*backends",
    "install": "*index",
    "autotune": "tile_choice",
}


def found_pages(page) -> list[str]:
    links = targets(page.locator("#search-results li a:first-child"))
    return [link.removesuffix(".html") for link in links]


def test_search(server, open_page):
    page = open_page("search")
    for words, expected in SOUGHT.items():
        page.goto(f"{server}search.html?q={words}")
        found = found_pages(page)[:3]
        place = found[:1] if expected.startswith("*") else found
        assert expected.lstrip("*") in place, (words, found)


def test_a_site_in_files_works(browser):
    "Without a server: pages, search, the explorer, the report; no complaint."
    context, complaints = browser.new_context(), []
    page = context.new_page()
    listen(page, SITE.as_uri(), complaints)
    for name in ("index", "curves", "explorer/index", "report/index"):
        page.goto(f"{SITE.as_uri()}/{name}.html")
        drawn(page)
    page.goto(f"{SITE.as_uri()}/search.html?q=Morton")
    assert found_pages(page)[0] == "curves"
    context.close()
    assert not complaints


AXE = """async () => {
    const found = await axe.run(document, {resultTypes: ["violations"]})
    return found.violations.map(rule => [rule.id, rule.nodes.slice(0, 3).map(node => node.html)])
}"""
HEARD = ["index", "curves", "local", "claims_on_trial", "search", "explorer/index", "cli"]


@pytest.mark.timeout(1800)  # 300 pages in `make full`
def test_pages_are_for_everybody(server, open_page):
    """Nothing that axe finds: every page in both themes in `make full`, else one of each kind, the
    themes in turn."""
    axe = Path(pytest.importorskip("axe_playwright_python").__file__).with_name("axe.min.js")
    names = sorted(path.stem for path in SITE.glob("*.html")) if FULL else HEARD
    found = {}
    for turn, scheme in enumerate(("light", "dark")):
        page = open_page("index", 1400, color_scheme=scheme)
        for name in names if FULL else names[turn::2]:
            page.goto(f"{server}{name}.html")
            page.add_script_tag(path=axe)
            for part in (SHOWN, FRAMES): page.evaluate(part)  # what scrolls is marked once laid out
            for rule, places in page.evaluate(AXE):
                found.setdefault(rule, []).append((name, scheme, places))
    assert not found


def test_code_can_be_copied(server, open_page):
    page = open_page("index", permissions=["clipboard-read", "clipboard-write"])
    block = page.locator("section#quickstart div.highlight").first
    code = block.locator("pre").text_content()
    block.hover()
    block.locator("button.copy").click()
    block.get_by_text("Copied", exact=True).wait_for()  # for a second and a half
    assert page.evaluate("navigator.clipboard.readText()") == code
    assert page.locator(".cell_output button.copy").count() == 0


LEFT_OVER = r"\| *:?(--|—)|^:::|\$\$|@(fig|eq|tbl)-|\]\("
RAW_MARKUP = r"""[...document.querySelectorAll("article p, article td")].map(paragraph => {
    const prose = paragraph.cloneNode(true)
    prose.querySelectorAll("code").forEach(code => code.remove())
    return prose.textContent
}).filter(text => /LEFT_OVER/.test(text))""".replace("LEFT_OVER", LEFT_OVER)
DARK_ON_DARK = r"""[...document.querySelectorAll(
    "article p, article li, article td, article pre i, article h1, article h2"
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
BEYOND = """[...document.querySelectorAll(
    "article .table-wrapper, article .output:has(table), article div.math"
)].filter(box => box.scrollWidth > box.clientWidth + 1)
    .map(box => `more than fits a desk: ${box.innerText.slice(0, 100)}`)"""
WIDEST = """Math.max(...[document.documentElement, ...document.querySelectorAll(".content")]
    .map(part => part.scrollWidth))"""
CUT_PICTURES = """[...document.querySelectorAll("article .cell_output > img")].filter(image => {
    const box = image.parentElement
    return image.offsetWidth > box.clientWidth + 1 && !box.hasAttribute("data-more")
}).map(image => image.alt)"""
NAMELESS = """[...document.querySelectorAll('article img')]
    .filter(image => !image.alt).map(image => image.src)"""
IDS = "[...document.querySelectorAll('[id]')].map(element => element.id)"


def faults(page, width: int, scheme: str) -> list:
    "What is wrong with a page as it is shown."
    found = []
    for question in (RAW_MARKUP, NAMELESS, CUT_OFF, CUT_PICTURES):
        found += page.evaluate(question)
    if scheme == "dark":
        found += page.evaluate(DARK_ON_DARK)
    if width >= 1400:
        found += page.evaluate(BEYOND)
    if page.evaluate(WIDEST) > width:
        found.append("too wide")
    return found


def leads_to(links: list[str], address: str, server: str) -> set[tuple[str, str]]:
    "The addresses and anchors, here on the site, that links of a page lead to."
    found = set()
    for link in links:
        target, anchor = urldefrag(urljoin(address, link))
        if target.endswith("/"):
            target += "index.html"
        if target.startswith(server):
            found.add((target, unquote(anchor)))
    return found


def is_drawn(address: str) -> bool:
    "Is a page looked at? One in five, and of the sources one in nine; in `make full` all."
    name = address.rpartition("/")[2]
    return FULL or crc32(name.encode()) % (9 if name.startswith("module_") else 5) == 0


def raw_markup(text: str) -> list[str]:
    "As RAW_MARKUP, of a page that is not drawn."
    page = bs4.BeautifulSoup(text, "html.parser")
    for code in page.select("code, .math"):
        code.decompose()
    prose = [paragraph.get_text() for paragraph in page.select("article p, article td")]
    return [text for text in prose if re.search(LEFT_OVER, text)]


def test_raw_markup_is_seen():
    assert raw_markup("<article><p>by [<code>a</code>](b.ipynb)</p></article>")
    prose = r"<code>x](y)</code> <i class=math>\(x[a](b)\)</i>"
    assert not raw_markup(f"<article><p>{prose}</p></article>")


class Crawl:
    "All pages that links lead to: what is wrong with them, their anchors, and their links."

    def __init__(self, page, server: str, width: int, scheme: str):
        self.page, self.width, self.scheme = page, width, scheme
        self.faults, self.anchors, self.links = {}, {}, {}
        todo = [f"{server}index.html", f"{server}search.html"]
        for address in todo:
            look = self.draw if is_drawn(address) else self.read
            anchors, links = look(address)
            self.anchors[address] = {*anchors}
            self.links[address] = leads_to(links, address, server)
            linked = {target for target, _ in self.links[address]}
            pages = {target for target in linked if target.endswith(".html")}
            todo += sorted(pages - {*todo})

    def draw(self, address: str) -> tuple[list[str], list[str]]:
        "Anchors and links of a page in the browser."
        self.page.goto(address)
        drawn(self.page)
        self.faults[address] = faults(self.page, self.width, self.scheme)
        return self.page.evaluate(IDS), targets(self.page.locator("a[href]"))

    def read(self, address: str) -> tuple[list[str], list[str]]:
        "Anchors and links in the text of a page."
        answer = self.page.request.get(address)
        assert answer.ok, address
        text = answer.text()
        self.faults[address] = raw_markup(text)
        links = re.findall(r'<a\b[^>]*\bhref="([^"]*)"', text)
        return re.findall(r'\bid="([^"]+)"', text), [unescape(link) for link in links]


def test_every_page(server, open_page):
    "Whole, not wider than the screen, readable, no raw markup; no link or anchor leads nowhere."
    page = open_page("index", 1400, color_scheme="light")
    site = Crawl(page, server, 1400, "light")
    assert not {address: found for address, found in site.faults.items() if found}
    links = {link for found in site.links.values() for link in found}
    for target, anchor in links:
        if anchor:
            assert anchor in site.anchors[target]
    for file in {target for target, _ in links} - {*site.anchors}:
        assert page.request.get(file).ok, file
    reached = {address.removeprefix(server) for address in site.anchors}
    folders = SITE, SITE / "explorer", SITE / "report"
    pages = [path for folder in folders for path in folder.glob("*.html")]
    assert reached == {path.relative_to(SITE).as_posix() for path in pages}


@pytest.mark.parametrize("width, first", [(900, 0), (390, 2)])
def test_pages_on_other_screens(server, open_page, width, first):
    "In the dark, on a tablet and on a phone: every page in `make full`, else every twelfth."
    phone = dict(is_mobile=True, has_touch=True) if width < 500 else {}
    page = open_page("index", width, color_scheme="dark", **phone)
    found, names = {}, sorted(path.name for path in SITE.glob("*.html"))
    for name in names if FULL else ["index.html", *names[first::12]]:
        page.goto(f"{server}{name}")
        drawn(page)
        found[name] = faults(page, width, "dark")
    assert not {name: wrong for name, wrong in found.items() if wrong}


PARTED = """rows => rows.filter(row => {
    const at = [...row.cells].map(cell => cell.getBoundingClientRect())
    return at.some(box => box.right > innerWidth) || at.at(-1).top < at[0].bottom
}).map(row => row.innerText)"""


def test_arguments_on_a_phone_stand_above_what_is_said_of_them(server, open_page):
    "Nothing of them is beyond the edge, and what they are called stands with the words."
    page = open_page("backends", 390, is_mobile=True, has_touch=True)
    section = page.locator("section:has(> h3:text-is('hilbert_attention'))")
    rows = section.locator("table.stacked tbody tr:has(.below:not(:empty))")
    assert rows.count() > 5
    assert not rows.evaluate_all(PARTED)
    assert rows.filter(has_text="dropout_p").locator("[data-head=default]").inner_text() == "0.0"
    page.goto(f"{server}claims_on_trial.html")
    assert not page.locator("table.stacked tbody tr").evaluate_all(PARTED)
    page.goto(f"{server}notation.html")
    _, formulas = drawn(page)
    assert formulas == (SITE / "notation.html").read_text().count('class="math ')  # none is lost
    signs = page.locator("table.stacked mjx-c")  # empty elements, whose glyph a sheet adds
    assert signs.count() > 50
    assert all(signs.evaluate_all("all => all.map(sign => sign.getBoundingClientRect().width)"))


def test_the_head_of_a_page_on_a_phone(open_page):
    "Its icons stand apart; folded code shows that it is."
    page = open_page("block_engine", 390, is_mobile=True, has_touch=True)
    theme, contents = (
        page.locator(f".header-right .{name}").bounding_box()
        for name in ("theme-toggle", "toc-header-icon")
    )
    assert theme["x"] + theme["width"] + 8 <= contents["x"]
    fold = page.locator("details.hide > summary").first
    assert fold.evaluate("fold => getComputedStyle(fold).display") == "list-item"


CHANGED = "before => document.querySelector('.readout').innerText !== before"


def test_the_report_can_be_pointed_at(server, open_page):
    "The stored page of the demo, in both themes: what a patch attends is drawn where it is."
    for scheme in ("light", "dark"):
        page = open_page("report/index", color_scheme=scheme)
        before = page.locator(".readout").inner_text()
        canvas = page.locator("canvas[data-view=look]").first
        canvas.scroll_into_view_if_needed()
        canvas.click(position={"x": 20, "y": 30})
        page.wait_for_function(CHANGED, arg=before)  # in the next frame
        assert " ms" not in page.locator("main").inner_text()  # times are for the reader's machine


def test_notebook_and_module_lead_to_each_other(server, open_page):
    page = open_page("curves")
    line = page.locator("p.source-links")
    assert line.inner_text().startswith("Module hilbert_attn.curves: source")
    with page.expect_download() as download:
        line.locator("a[download]").click()
    assert download.value.suggested_filename == "notebooks.zip"
    follow(line.locator("a").first)
    assert page.locator("h1").inner_text().startswith("hilbert_attn.curves")
    assert line.inner_text().startswith("View notebook: Curves")
    follow(line.locator("a").first)
    assert page.url == f"{server}curves.html"


def test_a_function_leads_to_its_source_and_back(server, open_page):
    page = open_page("curves")
    follow(page.locator("div.source a[href='module_curves.html#def-curve_order']"))
    cell = page.locator("p.origin:has(#def-curve_order)")
    source = cell.locator("xpath=following-sibling::div[1]").inner_text()
    assert "def curve_order(" in source
    follow(cell.locator("a"))
    assert page.url.startswith(f"{server}curves.html#")
    assert f"def {page.url.partition('#')[2]}(" in source


def row_names(rows) -> list[str]:
    first = "rows => rows.map(row => row.querySelector('code').textContent)"
    return rows.evaluate_all(first)


def test_api_page_has_every_name_once(server, open_page):
    page = open_page("api_by_topic")
    rows = page.locator("article table tbody tr")
    names = row_names(rows)
    historical = {*hilbert_attn._ELSEWHERE["compat"].split()}
    assert {*names} == {*hilbert_attn.__all__, *hilbert_attn._HOMES} - historical
    assert len(names) == len({*names})
    sources = targets(rows.locator("td:last-child a:last-of-type"))
    assert len(sources) == rows.count()
    assert all(re.match(r"[a-z_]+\.html", target) for target in sources)
    documented = rows.locator("td:first-child a")
    # constants and aliases have no documentation of their own
    assert documented.count() > 0.8 * len(names)
    follow(documented.get_by_text("hilbert_attention", exact=True).first)
    assert page.url.replace("-", "_") == f"{server}backends.html#hilbert_attention"


def stored_suites() -> dict[str, set[str]]:
    "For each machine, the suites that were measured on it."
    folders = [folder for folder in (NBS / "results").iterdir() if folder.is_dir()]
    found = {each.name: {path.stem for path in each.glob("*.json")} for each in folders}
    return {name: suites for name, suites in found.items() if suites}  # the study has folders


def test_benchmark_page_has_every_machine(server, open_page):
    page = open_page("benchmarks")
    stored = stored_suites()
    assert page.locator("section > section:has(> h2):has(h3)").count() == len(stored)
    for machine, suites in stored.items():
        file = NBS / "results" / machine / f"{min(suites & {*SUITES})}.json"
        environment = json.loads(file.read_text())[-1]["environment"]
        assert machine_slug(environment) == machine
        title = environment.get("gpu", environment["cpu"])
        section = page.locator(f"section:has(> h2:text('{title}'))").inner_text()
        for key in ("torch", "python", "date", "commit"):
            assert environment[key] in section
        missing = section.rpartition("Not measured on this machine:")[2]
        assert all(suite in missing for suite in {*SUITES} - suites)


def test_benchmark_page_draws_every_suite(server, open_page):
    page = open_page("benchmarks")
    suites = [suite for suites in stored_suites().values() for suite in suites]
    drawn = sum(suite.startswith("gpu_run") or suite in SUITES for suite in suites)
    pictures = page.locator("article .cell_output img")
    assert pictures.count() == drawn > 0
    widths = pictures.evaluate_all("images => images.map(image => image.naturalWidth)")
    assert max(widths) <= 700  # legible on a phone without scrolling
    addresses = pictures.evaluate_all("images => images.map(image => image.src)")
    assert all(len(page.request.get(address).body()) < 200_000 for address in addresses)
    assert page.locator("section:has(> h3) table").count() >= drawn


GROUND = """images => images.map(image => {
    const { filter, mixBlendMode } = getComputedStyle(image)
    return `${mixBlendMode} ${filter}`
})"""


@pytest.mark.parametrize("name", ["index", "curves", "benchmarks", "orders_on_photos"])
def test_dark_pages_have_no_white_slabs(server, open_page, name):
    "Drawings are light lines on the page's own ground; photos stay as they are."
    page = open_page(name, color_scheme="dark")
    assert drawn(page)[0]
    for kind, expected in (("drawing", "screen invert(1) hue-rotate(180deg)"), ("photo", "normal")):
        pictures = page.locator(f".cell_output img.{kind}")
        assert all(ground.startswith(expected) for ground in pictures.evaluate_all(GROUND))
    assert page.locator(".cell_output img:is(.drawing, .photo)").count() > 0
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, *_ = map(int, re.findall(r"\d+", ground))
    assert red < 80
