"""The demo on photos of all kinds: what it reads, what it refuses, what it writes, and that the page works in a browser."""
import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from hilbert_attn.curves import CURVES, curve_order, inverse_order, segment_map
from hilbert_attn.demo import MASKED, NAIVE, Photo, _page_data, load_photo, patch_weights, photo_tokens, project_tokens, run_demo, weight_kept, which_order, write_report


def picture(width, height, mode="RGB"):
    "Smooth colours with some noise."
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    rgb = np.stack([(3 * x + noise) % 256, (2 * y + noise) % 256, (x + y) % 256], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    path = folder / "odd <size> & co.png"
    picture(77, 123).save(path)  # 15 x 9 patches and a few pixels more
    return run_demo(path, folder / "out", segment_size=32, patch=(3, 7), progress=False)


def test_files(result):
    assert list(result.files) == ["curve.png", "segments.png", "attention.png", "report.html"]
    for name in ("curve.png", "segments.png", "attention.png"):
        with Image.open(result.files[name]) as image: assert min(image.size) > 100
    assert result.photo.grid == (15, 9)


def test_rows(result):
    assert [row["name"] for row in result.rows] == [*CURVES, "dense", MASKED, NAIVE]
    for row in result.rows[:6]: assert 0 <= row["error"] <= row["allowed"] and row["checked_heads"] == 2
    assert {row["pairs"] for row in result.rows} == {4 * 32 ** 2 + 7 ** 2, 135 ** 2}
    assert next(row for row in result.rows if row["name"] == MASKED)["forward_over_masked"] == 1
    for name in CURVES: assert re.search(rf"^{name} .* \d\.\de-\d\d ", str(result), re.M)


def test_the_choice_of_an_order_follows_the_figures(result):
    rows = [dict(row) for row in result.rows]
    of = {row["name"]: row for row in rows}
    of["morton"]["reach"], of["hilbert"]["reach"], of["row_major"]["reach"] = 0.999, 0.5, 0.25
    of["snake"]["both_ms"] = 1e-3
    words = which_order(rows)
    assert "Weight kept: morton 99.9%, hilbert 50.0%, row_major 25.0%." in words
    assert "Time: snake is the fastest here." in words
    assert which_order(result.rows) in str(result)
    page = result.files["report.html"].read_text()
    assert "<h2>The choice</h2>" in page and "is the fastest here" in page


def test_report_is_one_page(result):
    page = result.files["report.html"].read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|src=\"(?!data:)", re.sub(r"data:image/\w+;base64,[\w+/=]+", "data:", page).split('<script type="application/json"')[0])
    assert "http" not in page.split('id="data"')[1].split("<script>")[1]
    for row in result.rows: assert f"<td>{row['name']}</td>" in page
    assert "odd &lt;size&gt; &amp; co.png" in page and "<size>" not in page
    assert "@" not in re.findall(r"<title>(.*?)</title>", page)[0] and "prefers-color-scheme: dark" in page
    assert len(page) < 3e6


def test_page_data_decodes_to_what_the_library_computes(result):
    page = result.files["report.html"].read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    q, k, _ = project_tokens(photo_tokens(result.photo))
    assert (data["rows"], data["cols"], data["segment"], data["start"]) == (15, 9, 32, 3 * 9 + 7)
    for curve in CURVES:
        order = np.frombuffer(base64.b64decode(data["orders"][curve]), "<u2")
        assert (order == curve_order((15, 9), curve).numpy()).all()
    keys = torch.tensor(np.frombuffer(base64.b64decode(data["keys"]), np.int8).reshape(data["heads"], 135, data["dim"]).astype(np.float32))
    weights = (data["scale"] * keys @ keys[:, 34, :, None])[..., 0].softmax(-1).mean(0)
    assert (weights - patch_weights(q, k, 34)).abs().sum() < 0.1


def test_large_photos_leave_their_keys_out_of_the_page(result):
    q, *_ = project_tokens(photo_tokens(result.photo))
    assert _page_data(result.photo, q, 32, (0, 0), limit=1000)["keys"] is None


@pytest.mark.parametrize("mode, file", [("RGB", "a.jpg"), ("L", "a.png"), ("LA", "a.png"), ("RGBA", "a.png"), ("P", "a.gif"), ("1", "a.png"), ("CMYK", "a.tiff"), ("I;16", "a.png"), ("F", "a.tiff")])
def test_kinds_of_images(tmp_path, mode, file):
    image = picture(41, 26, "L").convert("I") if mode == "I;16" else picture(41, 26, mode)
    if mode == "I;16": image = Image.fromarray(np.asarray(image).astype(np.uint16) * 200)
    image.save(tmp_path / file)
    photo = load_photo(tmp_path / file)
    assert photo.grid == (3, 5) and photo.pixels.shape == (24, 40, 3) and photo.pixels.dtype == np.uint8 and photo.pixels.flags.writeable
    assert photo.pixels.std() > 10


def test_transparency_is_white(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (load_photo(tmp_path / "a.png").pixels == 255).all()


def test_the_camera_was_held_upright(tmp_path):
    image = picture(64, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it
    image.save(tmp_path / "a.png", exif=exif)
    photo = load_photo(tmp_path / "a.png")
    assert photo.grid == (8, 4)
    assert (photo.pixels == np.rot90(np.asarray(image), -1)).all()


def test_large_photos_are_scaled_down(tmp_path):
    picture(800, 560).save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png", max_patches=200)
    assert 150 <= photo.grid[0] * photo.grid[1] <= 200 and abs(photo.grid[1] / photo.grid[0] - 10 / 7) < 0.15
    assert "800 x 560" in photo.note and load_photo(tmp_path / "a.png").note == ""


def test_what_is_no_photo(tmp_path):
    (tmp_path / "text.jpg").write_text("not a photo")
    picture(80, 80).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:500])
    picture(15, 80).save(tmp_path / "narrow.png")
    for name, message in {"absent.jpg": "no such file", ".": "a folder", "text.jpg": "not an image", "half.jpg": "not an image, or damaged", "narrow.png": "at least 16 x 16"}.items():
        with pytest.raises(ValueError, match=message): load_photo(tmp_path / name)


def test_the_smallest_photo(tmp_path):
    picture(16, 16, "L").save(tmp_path / "tiny.png")
    result = run_demo(tmp_path / "tiny.png", tmp_path, progress=False)
    assert result.photo.grid == (2, 2) and result.segment_size == 1 and result.rows[0]["pairs"] == 4


def test_bad_arguments_are_answered_before_any_work(tmp_path):
    picture(32, 32).save(tmp_path / "a.png")
    for options, message in [(dict(patch=(4, 0)), r"patch=\(4, 0\): rows are 0 to 3 and columns 0 to 3"), (dict(patch=(0, -1)), "patch"), (dict(segment_size=17), "segment_size=17"), (dict(segment_size=0), "segment_size=0")]:
        with pytest.raises(ValueError, match=message): run_demo(tmp_path / "a.png", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_weights():
    photo = Photo("", np.asarray(picture(40, 24)).copy())
    q, k, v = project_tokens(photo_tokens(photo), heads=3, head_dim=8, seed=1)
    segments = torch.stack([segment_map((3, 5), 4, curve).view(-1) for curve in CURVES])
    dense = (q[0] @ k[0].mT / 8 ** 0.5).softmax(-1).mean(0)
    kept = weight_kept(q, k, segments)
    for i, row in enumerate(segments):
        torch.testing.assert_close(kept[i], torch.where(row[:, None] == row, dense, 0).sum(-1))
        seen = row == row[7]
        weights = patch_weights(q, k, 7, seen)
        assert (weights[~seen] == 0).all() and abs(weights.sum() - 1) < 1e-5
    assert all((a == b).all() for a, b in zip((q, k, v), project_tokens(photo_tokens(photo), 3, 8, seed=1)))
    assert (project_tokens(photo_tokens(photo), 3, 8, seed=2)[0] != q).any()


def test_a_photo_of_one_colour():
    tokens = photo_tokens(Photo("", np.full((24, 24, 3), 7, np.uint8)))
    assert tokens.isfinite().all() and tokens.shape == (9, 200)


def test_default_photo():
    photo = load_photo()
    assert photo.grid == (75, 64) and photo.name == "Grace Hopper"


@pytest.mark.browser
def test_report_in_a_browser(result):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None: pytest.skip("no Chromium on PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync".split()
    complaints = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=[f"--{flag}" for flag in flags], timeout=60_000)
        page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
        page.goto(result.files["report.html"].as_uri())
        readout, dense = page.locator(".readout"), page.locator("canvas[data-order=dense]")
        page.wait_for_function("document.querySelector('.readout').textContent.startsWith('Patch in row 3, column 7')")
        box = dense.bounding_box()
        dense.click(position={"x": box["width"] * 0.5 / 9, "y": box["height"] * 14.5 / 15})
        page.wait_for_function("document.querySelector('.readout').textContent.startsWith('Patch in row 14, column 0')")
        dense.press("ArrowUp")
        page.mouse.move(0, 0)
        page.wait_for_function("document.querySelector('.readout').textContent.startsWith('Patch in row 13, column 0')")
        q, k, _ = project_tokens(photo_tokens(result.photo))
        segments = segment_map((15, 9), 32, "hilbert").view(-1)
        kept = patch_weights(q, k, 13 * 9)[segments == segments[13 * 9]].sum()
        shown = float(re.search(r"hilbert ([\d.]+)%", readout.inner_text())[1])
        assert abs(shown - 100 * kept) < 2
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert not complaints
