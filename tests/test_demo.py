"""The demo on photos of all kinds: what it reads, refuses and writes, and its page in a browser."""
import base64
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from hilbert_attn.curves import CURVES, curve_order, segment_map
from hilbert_attn.demo import report
from hilbert_attn.demo.comparison import MASKED, NAIVE, which_order
from hilbert_attn.demo.photo import (
    Photo,
    load_photo,
    patch_weights,
    photo_tokens,
    project_tokens,
    weight_kept,
)
from hilbert_attn.demo.report import _page_data, run_demo

PICTURES = ["curve.png", "segments.png", "attention.png"]


def picture(width, height, mode="RGB"):
    "Smooth colours with some noise."
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    colors = (3 * x + noise) % 256, (2 * y + noise) % 256, (x + y) % 256
    rgb = np.stack(colors, -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    path = folder / "odd <size> & co.png"
    picture(77, 123).save(path)  # 15 x 9 patches and a few pixels more
    sizes = dict(segment_size=32, patch=(3, 7))
    return run_demo(path, folder / "out", **sizes)


@pytest.fixture(scope="module")
def page(result) -> str:
    return result.files["report.html"].read_text()


def test_files(result):
    assert list(result.files) == [*PICTURES, "report.html"]
    for name in PICTURES:
        with Image.open(result.files[name]) as image:
            assert min(image.size) > 100
    assert result.photo.grid == (15, 9)


def test_rows(result):
    assert [row["name"] for row in result.rows] == [*CURVES, "dense", MASKED, NAIVE]
    for row in result.rows[:6]:
        assert 0 <= row["error"] <= row["allowed"] and row["checked_heads"] == 2
    pairs = {row["pairs"] for row in result.rows}
    assert pairs == {4 * 32 ** 2 + 7 ** 2, 135 ** 2}
    masked = next(row for row in result.rows if row["name"] == MASKED)
    assert masked["forward_over_masked"] == 1
    for name in CURVES:
        assert re.search(rf"^{name} .* \d\.\de-\d\d ", str(result), re.M)


def test_the_choice_of_an_order_follows_the_figures(result, page):
    rows = [dict(row) for row in result.rows]
    of = {row["name"]: row for row in rows}
    for name, reach in dict(morton=0.999, hilbert=0.5, row_major=0.25).items():
        of[name]["reach"] = reach
    of["snake"]["both_ms"] = 1e-3
    words = which_order(rows)
    assert "Weight kept: morton 99.9%, hilbert 50.0%, row_major 25.0%." in words
    assert "Time: snake is the fastest here." in words
    assert which_order(result.rows) in str(result)
    assert "<h2>The choice</h2>" in page and "is the fastest here" in page


ELSEWHERE = r"https?:|//[a-z]|url\(|@import|<link|src=\"(?!data:)"


def test_report_is_one_page(result, page):
    without_pictures = re.sub(r"data:image/\w+;base64,[\w+/=]+", "data:", page)
    visible = without_pictures.split('<script type="application/json"')[0]
    assert not re.search(ELSEWHERE, visible)
    assert "http" not in page.split('id="data"')[1].split("<script>")[1]
    for row in result.rows:
        assert f"<td>{row['name']}</td>" in page
    assert "odd &lt;size&gt; &amp; co.png" in page and "<size>" not in page
    assert "@" not in re.findall(r"<title>(.*?)</title>", page)[0]
    assert "prefers-color-scheme: dark" in page
    assert len(page) < 3e6


DATA = r'<script type="application/json" id="data">(.*?)</script>'


def test_page_data_decodes_to_what_the_library_computes(result, page):
    data = json.loads(re.search(DATA, page)[1])
    q, k, _ = project_tokens(photo_tokens(result.photo))
    start = 3 * 9 + 7
    sizes = [data[key] for key in ("rows", "cols", "segment", "start")]
    assert sizes == [15, 9, 32, start]
    for curve in CURVES:
        order = np.frombuffer(base64.b64decode(data["orders"][curve]), "<u2")
        assert (order == curve_order((15, 9), curve).numpy()).all()
    keys = np.frombuffer(base64.b64decode(data["keys"]), np.int8)
    keys = keys.reshape(data["heads"], 135, data["dim"]).astype(np.float32)
    keys = torch.tensor(keys)
    scores = (data["scale"] * keys @ keys[:, start, :, None])[..., 0]
    weights = scores.softmax(-1).mean(0)
    assert (weights - patch_weights(q, k, start)).abs().sum() < 0.1


def test_large_photos_leave_their_keys_out_of_the_page(result, monkeypatch):
    q, *_ = project_tokens(photo_tokens(result.photo))
    monkeypatch.setattr(report, "_LARGEST_KEYS", 1000)
    assert _page_data(result.photo, q, 32, (0, 0))["keys"] is None


KINDS = [
    ("RGB", "a.jpg"),
    ("L", "a.png"),
    ("LA", "a.png"),
    ("RGBA", "a.png"),
    ("P", "a.gif"),
    ("1", "a.png"),
    ("CMYK", "a.tiff"),
    ("I;16", "a.png"),
    ("F", "a.tiff"),
]


@pytest.mark.parametrize("mode, file", KINDS)
def test_kinds_of_images(tmp_path, mode, file):
    if mode == "I;16":
        wide = np.asarray(picture(41, 26, "L").convert("I"))
        image = Image.fromarray(wide.astype(np.uint16) * 200)
    else:
        image = picture(41, 26, mode)
    image.save(tmp_path / file)
    photo = load_photo(tmp_path / file)
    assert photo.grid == (3, 5) and photo.pixels.shape == (24, 40, 3)
    assert photo.pixels.dtype == np.uint8 and photo.pixels.flags.writeable
    assert photo.pixels.std() > 10


def test_depths_may_be_unknown(tmp_path):
    depth = np.asarray(picture(32, 32, "F")).copy()
    depth[0, :3] = np.inf, -np.inf, np.nan
    Image.fromarray(depth).save(tmp_path / "a.tiff")
    pixels = load_photo(tmp_path / "a.tiff").pixels[..., 0]
    assert pixels[0, :3].tolist() == [255, 0, 0] and pixels[1:].std() > 10


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
    rows, cols = photo.grid
    assert 150 <= rows * cols <= 200 and abs(cols / rows - 10 / 7) < 0.15
    assert "800 x 560" in photo.note
    assert load_photo(tmp_path / "a.png").note == ""


def test_a_strip_is_scaled_down_too(tmp_path):
    Image.new("L", (16_000, 16)).save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png", max_patches=200)
    assert photo.grid == (2, 100) and "800 x 16" in photo.note


@pytest.mark.parametrize("most", [60_001, 3, 2.5, True])
def test_the_report_has_room_for_so_many_patches(tmp_path, most):
    with pytest.raises(ValueError, match=f"max_patches={most}: "):
        run_demo(out=tmp_path, max_patches=most)
    assert not list(tmp_path.iterdir())


WRONG = {
    "absent.jpg": "no such file",
    ".": "a folder",
    "text.jpg": "not an image",
    "half.jpg": "not an image, or damaged",
    "narrow.png": "at least 16 x 16",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_photo(tmp_path, name):
    (tmp_path / "text.jpg").write_text("not a photo")
    picture(80, 80).save(tmp_path / "whole.jpg")
    half = (tmp_path / "whole.jpg").read_bytes()[:500]
    (tmp_path / "half.jpg").write_bytes(half)
    picture(15, 80).save(tmp_path / "narrow.png")
    with pytest.raises(ValueError, match=WRONG[name]):
        load_photo(tmp_path / name)


def test_the_smallest_photo(tmp_path):
    picture(16, 16, "L").save(tmp_path / "tiny.png")
    result = run_demo(tmp_path / "tiny.png", tmp_path)
    assert result.photo.grid == (2, 2) and result.segment_size == 1
    assert result.rows[0]["pairs"] == 4
    assert "<dt>0&times;" not in result.files["report.html"].read_text()  # slower, not nothing


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path): raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match="a.png': you may not read this file"):
        load_photo(tmp_path / "a.png")


@pytest.mark.parametrize("name", [b"@data@ @photo@ {0}.png", b"caf\xe9.png"])
def test_odd_names_stand_in_the_report_as_they_are(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    picture(16, 16).save(path)
    result = run_demo(path, tmp_path / "out", seed=3)
    shown = name.decode(errors="replace")
    page = result.files["report.html"].read_text(encoding="utf-8")
    assert f"<title>Attention along a curve: {shown}</title>" in page
    assert f'<p class="lede">{shown} is 2 rows' in page and page.count('"rows": 2') == 1
    assert "--segment-size 1 --patch 1 1 --seed 3</code>" in page
    assert str(result).startswith(f"{shown}: 2 x 2")


BAD = [
    (dict(patch=(4, 0)), r"patch=\(4, 0\): rows are 0 to 3 and columns 0 to 3"),
    (dict(patch=(0, -1)), "patch"),
    (dict(segment_size=17), "segment_size=17"),
    (dict(segment_size=0), "segment_size=0"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_arguments_are_answered_before_any_work(tmp_path, options, message):
    picture(32, 32).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path / "a.png", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_weights():
    photo = Photo("", np.asarray(picture(40, 24)).copy())
    tokens = photo_tokens(photo)
    q, k, v = project_tokens(tokens, heads=3, head_dim=8, seed=1)
    segments = torch.stack([segment_map((3, 5), 4, curve).view(-1) for curve in CURVES])
    dense = (q[0] @ k[0].mT / 8 ** 0.5).softmax(-1).mean(0)
    kept = weight_kept(q, k, segments)
    for found, row in zip(kept, segments):
        inside = torch.where(row[:, None] == row, dense, 0).sum(-1)
        torch.testing.assert_close(found, inside)
        seen = row == row[7]
        weights = patch_weights(q, k, 7, seen)
        assert (weights[~seen] == 0).all() and abs(weights.sum() - 1) < 1e-5
    again = project_tokens(tokens, 3, 8, seed=1)
    assert all(map(torch.equal, (q, k, v), again))
    assert (project_tokens(tokens, 3, 8, seed=2)[0] != q).any()


def test_a_photo_of_one_colour():
    tokens = photo_tokens(Photo("", np.full((24, 24, 3), 7, np.uint8)))
    assert tokens.isfinite().all() and tokens.shape == (9, 200)


def test_default_photo():
    photo = load_photo()
    assert photo.grid == (75, 64) and photo.name == "Grace Hopper"


FLAGS = """
headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking
disable-component-update disable-sync
""".split()


@pytest.fixture
def browser_page():
    "A page of Chromium, and what it complained about."
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium on PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    flags, complaints = [f"--{flag}" for flag in FLAGS], []

    def watch_request(request):
        if not request.url.startswith(("file:", "data:")):
            complaints.append(request.url)

    with playwright.sync_playwright() as driver:
        launch = driver.chromium.launch
        browser = launch(executable_path=chromium, args=flags, timeout=60_000)
        size = {"width": 390, "height": 844}
        shown = browser.new_context(viewport=size).new_page()
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("request", watch_request)
        yield shown, complaints
        browser.close()


def wait_for_patch(shown, row, column):
    words = f"Patch in row {row}, column {column}"
    text = "document.querySelector('.readout').textContent"
    shown.wait_for_function(f"{text}.startsWith('{words}')")


@pytest.mark.browser
def test_report_in_a_browser(result, browser_page):
    shown, complaints = browser_page
    shown.goto(result.files["report.html"].as_uri())
    dense = shown.locator("canvas[data-order=dense]")
    wait_for_patch(shown, 3, 7)
    box = dense.bounding_box()
    dense.click(position={"x": box["width"] * 0.5 / 9, "y": box["height"] * 14.5 / 15})
    wait_for_patch(shown, 14, 0)
    dense.press("ArrowUp")
    shown.mouse.move(0, 0)
    wait_for_patch(shown, 13, 0)
    q, k, _ = project_tokens(photo_tokens(result.photo))
    query = 13 * 9
    segments = segment_map((15, 9), 32, "hilbert").view(-1)
    kept = patch_weights(q, k, query)[segments == segments[query]].sum()
    readout = shown.locator(".readout").inner_text()
    assert abs(float(re.search(r"hilbert ([\d.]+)%", readout)[1]) - 100 * kept) < 2
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390
    assert not complaints


@pytest.mark.browser
def test_a_strip_in_a_browser(tmp_path, browser_page):
    picture(16, 4000).save(tmp_path / "strip.png")
    report = run_demo(tmp_path / "strip.png", tmp_path).files["report.html"]
    shown, _ = browser_page
    shown.goto(report.as_uri())
    wait_for_patch(shown, 250, 1)
    drawn = """canvas => {
        const pen = canvas.getContext('2d');
        const x = canvas.width / 2;
        const y = canvas.height / 2;
        const cell = [x, y, 1, 1];
        return pen.getImageData(...cell).data[3];
    }"""
    walk = "canvas[data-view=walk]"
    canvas = shown.locator(walk).first
    assert canvas.evaluate(drawn) == 255
