"""The steppers in a real browser: what they show is what the package computes."""
import math
from pathlib import Path

import pytest
import torch
from test_explorer import browser  # noqa: F401  a fixture

from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import SegmentPattern

FOLDER = Path(__file__).resolve().parent.parent / "nbs" / "explorer"
NAMES = ["online", "recursion"]
pytestmark = pytest.mark.browser


@pytest.fixture
def opened(browser):  # noqa: F811
    "Opens a page by name; nothing may go wrong in it, and nothing may come from elsewhere."
    pages, problems = [], []

    def open_page(name, **options):
        page = browser.new_page(**options)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: m.type == "error" and problems.append(m.text))
        page.on("request", lambda r: r.url.startswith("file:") or problems.append(r.url))
        page.goto((FOLDER / f"{name}.html").as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages: page.close()
    assert not problems


def softmax_of(page, seen, hidden=0):
    scores = torch.tensor(page.evaluate("scores"), dtype=torch.float64)[hidden:seen]
    values = torch.tensor(page.evaluate("values"), dtype=torch.float64)[hidden:seen]
    return scores, scores.softmax(0) @ values if len(scores) else torch.zeros(2).double()


@pytest.mark.parametrize("tile", [1, 2, 3, 4])
def test_the_online_softmax_is_one(opened, tile):
    page = opened("online")
    for seen in range(13):
        now = page.evaluate(f"run({seen}, {tile}, 'right')")
        scores, expected = softmax_of(page, seen)
        torch.testing.assert_close(torch.tensor(now["out"], dtype=torch.float64), expected)
        torch.testing.assert_close(now["exact"], now["out"])
        if seen: assert math.isclose(now["m"] + math.log(now["l"]), float(scores.logsumexp(0)))


def test_each_mistake_is_one(opened):
    page = opened("online")
    _, right = softmax_of(page, 12)
    def out(way): return torch.tensor([x if isinstance(x, float | int) else math.nan for x in
                                       page.evaluate(f"run(12, 3, '{way}')")["out"]])
    for way in ("forgotten", "apart"):
        assert out(way).isfinite().all() and (out(way) - right).abs().max() > 0.05
    assert page.evaluate("run(12, 3, 'apart').l") == pytest.approx(4)
    for way in ("unshifted", "masked"): assert out(way).isnan().all()
    _, hidden = softmax_of(page, 12, 3)
    torch.testing.assert_close(page.evaluate("run(12, 3, 'masked').exact"), hidden.tolist())


def test_the_keyboard_moves_the_online_softmax(opened):
    page = opened("online")
    page.focus("#seen")
    for key in ("Home", "ArrowRight", "ArrowRight"): page.keyboard.press(key)
    assert page.inner_text("#m") == "4.500"
    page.keyboard.press("End")
    assert page.inner_text("#out") == page.inner_text("#exact")
    for way, told in [("forgotten", "wrong"), ("masked", "wrong"), ("right", "right")]:
        page.check(f"[value={way}]")
        assert f"The output is {told}" in page.inner_text("#words")


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_recursion_is_the_curve(opened, m):
    side = 2 ** m
    page = opened("recursion")
    walk = torch.tensor(page.evaluate(f"hilbert({m})"))
    order = curve_order((side, side))
    assert torch.equal(walk[:, 0] * side + walk[:, 1], order)
    page.check(f"[name=m][value='{m}']")
    assert page.locator("#curve rect").count() == 4 ** m
    for w, r in [(4, 1), (4, 2), (2, 1)]:
        page.select_option("#w", str(w))
        page.select_option("#r", str(r))
        mask = SegmentPattern(4 ** m, w, r).mask()[0]
        for p in (0, 3):
            expected = mask[p].nonzero().flatten().tolist()
            assert page.evaluate(f"keys({p}, {4 ** m}, {w}, {r})") == expected
        page.focus("#p")
        page.keyboard.press("End")
        seen = int(mask[-1].sum())
        assert f"It attends {seen} of {4 ** m} positions" in page.inner_text("#words")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off(opened, name, width, scheme):
    page = opened(name, viewport=dict(width=width, height=900), color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_pages(opened, name):
    pages = {path.stem.partition("_")[2] for path in FOLDER.parent.glob("*.ipynb")}
    page = opened(name)
    links = [link.get_attribute("href") for link in page.locator("a").all()]
    assert links
    for link in links:
        target = link.partition("#")[0]
        if target.startswith("../"): assert target[3:].removesuffix(".html") in pages
        else: assert (FOLDER / target).exists()
