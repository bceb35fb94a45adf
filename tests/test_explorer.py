"""The explorer in a real browser: what it shows is what the package computes."""
import json
import random
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch
from sampling import sampled

from hilbert_attn.curves import CURVES, curve_order
from hilbert_attn.patterns import (
    DILATION_MODES,
    NeighborhoodPattern,
    SegmentPattern,
    SlidePattern,
    TilesSharedPattern,
    WindowPattern,
)

PAGE = Path(__file__).resolve().parent.parent / "nbs" / "explorer" / "index.html"
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = next((x for x in ("/usr/bin/chromium", "/usr/bin/chromium-browser")
                      if Path(x).exists()), None)
        if found is None: pytest.skip("no Chromium here")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda m: m.type == "error" and page.problems.append(m.text))
    page.on("request", lambda r: r.url.startswith("file:") or page.problems.append(r.url))
    page.goto(PAGE.as_uri())
    yield page
    assert not page.problems
    page.close()


def random_settings(seed: int) -> dict:
    draw = random.Random(seed)
    frames = draw.choice([1, 1, 3, 4])
    sides = [draw.randint(1, 14 if frames == 1 else 7) for _ in range(2)]
    if seed % 5 == 0: frames, sides = 4, [4, 4]  # the classic cube
    w = draw.randint(1, frames * sides[0] * sides[1])
    return dict(
        T=frames, H=sides[0], W=sides[1], curve=draw.choice(CURVES), w=w,
        pattern=draw.choice(["segments", "slide", "window", "neighborhood", "tiles"]),
        r=draw.randint(1, min(w, 9)), mode=draw.choice(DILATION_MODES), offset=draw.randint(0, 8),
        causal=draw.random() < 0.4, window=draw.randint(1, 5), shift=draw.randint(0, 4),
        kernel=draw.randint(1, 5), dilation=draw.randint(1, 2), tiles=draw.randint(1, 6),
        text=draw.randint(0, 5), block=16)


def pattern_of(s: dict):
    "The pattern of a state as the page settled it, and whether its mask follows the order."
    grid = tuple(s["grid"])
    if s["pattern"] == "window": return WindowPattern(grid, s["window"], s["shift"]), False
    if s["pattern"] == "neighborhood":
        return NeighborhoodPattern(grid, s["kernel"], s["dilation"]), False
    if s["pattern"] == "slide": return SlidePattern(s["N"], s["w"]), True
    if s["pattern"] == "tiles":
        return TilesSharedPattern(s["N"] + s["text"], s["tiles"], s["offset"], s["text"]), True
    offset = 0 if s["mode"] == "residue" else s["offset"]
    return SegmentPattern(s["N"], s["w"], s["r"], s["mode"], (offset,)), True


@pytest.mark.parametrize("seed", sampled(range(40), range(20)))
def test_the_page_shows_what_the_package_computes(page, seed):
    page.goto(PAGE.as_uri() + "#" + urlencode(random_settings(seed)))
    page.reload()
    state = page.evaluate("state")
    order = curve_order(tuple(state["grid"]), state["curve"])
    assert page.evaluate("scene.order") == order.tolist()
    pattern, along = pattern_of(state)
    mask = pattern.mask(order if along else None)[0]
    if state["causal"] and state["pattern"] == "segments": mask = mask.tril()
    text = state["text"] if state["pattern"] == "tiles" else 0
    token = state["N"] // 2
    keys = page.evaluate(f"keysOf(scene.sees, state.N, {token})")
    assert keys == mask[text + token, text:].nonzero().flatten().tolist()
    totals = page.evaluate("({pairs: scene.totals.pairs, blocks: scene.totals.blocks})")
    laid_out = mask[text:, text:][order][:, order]
    assert totals == dict(pairs=int(mask.sum()), blocks=touched(laid_out, state["block"]))


def touched(mask: torch.Tensor, block: int) -> int:
    "Blocks that hold a pair."
    n = -(-len(mask) // block) * block
    padded = torch.zeros(n, n, dtype=torch.bool)
    padded[:len(mask), :len(mask)] = mask
    return int(padded.unflatten(0, (-1, block)).unflatten(2, (-1, block)).any(3).any(1).sum())


@pytest.mark.parametrize("seed", range(12))
def test_the_call_can_be_copied(page, seed):
    import hilbert_attn
    page.goto(PAGE.as_uri() + "#" + urlencode(random_settings(seed)))
    page.reload()
    state, call = page.evaluate("state"), page.inner_text("#call")
    text = state["text"] if state["pattern"] == "tiles" else 0
    shape = (1, 2, state["N"] + text, 8)
    names = {name: torch.randn(shape) for name in "qkv"}
    names |= {name: getattr(hilbert_attn, name) for name in hilbert_attn.__all__}
    assert eval(call, names).shape == shape


def test_keyboard_pointer_and_address(page):
    page.focus("#grid")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"): page.keyboard.press(key)
    assert page.evaluate("state.token") == 33 and "token=33" in page.url
    box = page.locator("#grid").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 2)
    assert page.evaluate("state.token") == 31
    page.select_option("[name=pattern]", "neighborhood")
    page.fill("[name=kernel]", "9")
    page.locator("[name=kernel]").blur()
    assert page.inner_text("#keys") == "81 of 1024"
    page.goto(PAGE.as_uri() + "#" + page.url.partition("#")[2])
    page.reload()
    assert page.evaluate("[state.kernel, state.pattern, state.token]") == [9, "neighborhood", 31]


@pytest.mark.parametrize("address", [
    "H=99999&W=-3", "curve=peano&pattern=x", "w=NaN&r=0", "T=8&H=64", "token=-5",
    "kernel=63&dilation=16&pattern=neighborhood"])
def test_a_bad_address_is_put_right(page, address):
    page.goto(PAGE.as_uri() + "#" + address)
    page.reload()
    state = page.evaluate("state")
    assert state["N"] <= 4096 and 0 <= state["token"] < state["N"]
    assert page.evaluate("scene.totals.pairs") > 0
    json.dumps(state, allow_nan=False)


@pytest.mark.grid
@pytest.mark.parametrize("width", [390, 900, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off(browser, width, scheme):
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    page.goto(PAGE.as_uri() + "#T=4&H=16&W=16&line=true")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    page.close()
