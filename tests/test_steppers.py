"""The steppers in a real browser: what they show is what the package computes."""
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_explorer import browser  # noqa: F401  a fixture

from hilbert_attn import ring
from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import NeighborhoodPattern, SegmentPattern, WindowPattern
from hilbert_attn.ring_plan import shard_positions, shard_sizes

FOLDER = Path(__file__).resolve().parent.parent / "nbs" / "explorer"
NAMES = ["online", "recursion", "ring", "tiles"]
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


def sources(rank, world, monkeypatch):
    "Whose keys the package's ring brings to a rank, round by round."
    met = []
    monkeypatch.setattr(ring, "ring_tasks", lambda *_: None)
    call = SimpleNamespace(
        ring=SimpleNamespace(rank=rank, size=world), plan=SimpleNamespace(sizes=[1] * world),
        blocks=lambda tasks, batch: tasks,
        pass_on=lambda block, rows: (block, SimpleNamespace(wait=lambda: None)))
    turn = SimpleNamespace(keys=lambda x: x, batch=(None,))
    ring._go_around(call, 0, turn, [torch.zeros(1)], lambda blocks, kv, src: met.append(src))
    return met


def pair_count(queries, keys, causal):
    return int((keys <= queries[:, None]).sum()) if causal else len(queries) * len(keys)


def test_the_ring_goes_around_as_ours(opened, monkeypatch):
    page = opened("ring")
    for world in (2, 3, 4, 6, 8):
        page.select_option("#ranks", str(world))
        assert page.get_attribute("#step", "max") == str(world - 1)
        rounds = f"range({world}).map(s => holder(r, s, {world}))"
        came = page.evaluate(f"range({world}).map(r => {rounds})")
        assert came == [sources(rank, world, monkeypatch) for rank in range(world)]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_ranks_of_the_ring_compute_what_they_hold(opened, layout):
    page = opened("ring")
    for world in (3, 8):
        sizes = shard_sizes(48, world, layout)
        held = [shard_positions(sizes, rank, layout) for rank in range(world)]
        told = page.evaluate(f"range({world}).map(r => positions(r, {world}, '{layout}'))")
        assert told == [positions.tolist() for positions in held]
        for step, causal in product(range(world), (False, True)):
            expected = [pair_count(queries, held[(rank - step) % world], causal)
                        for rank, queries in enumerate(held)]
            told = f"round({step}, {world}, '{layout}', {str(causal).lower()})"
            assert page.evaluate(told) == expected


def test_who_waits_in_the_ring(opened):
    page = opened("ring")
    page.focus("#step")
    page.keyboard.press("End")
    words = page.inner_text("#words")
    assert "Round 4 of 4" in words and "3 of 4 ranks have nothing to compute" in words
    assert "1176 of 1176 pairs" in words and "busy 58 % of the time" in words
    page.check("[value=zigzag]")
    assert "All ranks compute alike" in page.inner_text("#words")
    assert "busy 100 % of the time" in page.inner_text("#words")


@pytest.mark.parametrize("words, pattern", [
    ("neighborhood 3", NeighborhoodPattern((32, 32), 3)),
    ("neighborhood 7", NeighborhoodPattern((32, 32), 7)),
    ("window 4", WindowPattern((32, 32), 4)),
])
def test_tiles_of_a_window_are_those_of_its_mask(opened, words, pattern):
    page = opened("tiles")
    for curve in ("hilbert", "row_major"):
        order = curve_order((32, 32), curve)
        mask = pattern.mask()[0][order][:, order].view(64, 16, 1024)
        told = f"tiles('{words}', '{curve}').map(t => [t.queries, t.seen, t.visited, t.pairs])"
        for rows, part, tile in zip(mask, order.view(64, 16), page.evaluate(told), strict=True):
            queries, seen, visited, pairs = tile
            assert queries == part.tolist()
            assert sorted(seen) == order[rows.any(0)].sort().values.tolist()
            assert visited == rows.any(0).view(64, 16).any(1).nonzero().flatten().tolist()
            assert pairs == int(rows.sum())


def test_the_keyboard_moves_the_tile(opened):
    page = opened("tiles")
    page.focus("#tile")
    page.keyboard.press("Home")
    first = page.inner_text("#said-along")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#said-along") != first
    page.select_option("#pattern", "window 4")
    assert "Along hilbert: 1 of 64 tiles of keys, 100 %" in page.inner_text("#said-along")
    assert "In rows: 4 of 64 tiles of keys, 25 %" in page.inner_text("#said-rows")
    assert "rows cost 4.0 times as much" in page.inner_text("#words")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cut_off(opened, name):
    page = opened(name)
    for width, scheme in product((390, 1400), ("light", "dark")):
        page.set_viewport_size(dict(width=width, height=900))
        page.emulate_media(color_scheme=scheme)
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
