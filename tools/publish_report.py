"""Store the demo's report of its bundled photo, for the site: nbs/report/index.html.

Without what it measures in time: that is for whoever runs `make demo`, on their machine.
"""

import argparse
import re
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from notebook import NBS
from PIL import Image

from hilbert_attn.demo import run_demo

PATCHES, SEGMENT = 1200, 64  # the keys of so many are small enough to be sent along
TIMED = re.compile(
    r"<h2>The bill</h2>.*?(?=<h2>The choice</h2>)"
    r"|<div><dt>[^<]*&times;</dt>.*?</div>\n"
    r"|<p>Time: .*?</p>\n",
    re.S,
)
PICTURE = re.compile(r"data:image/webp;base64,([A-Za-z0-9+/=]+)")
WIDTH = 360  # pixels, of the picture at the head, which comes again below
QUALITY = 60
HOME = '<p class="eyebrow"><a href="../index.html">hilbert_attn</a></p>'


def main() -> None:
    with TemporaryDirectory() as folder:
        made = run_demo(out=folder, segment_size=SEGMENT, max_patches=PATCHES)
        page = Path(made.files["report.html"]).read_text()
    page, count = TIMED.subn("", page)
    assert count == 4, f"{count} parts with times, of 4: see hilbert_attn/demo/body.html"
    target = NBS / "report" / "index.html"
    target.parent.mkdir(exist_ok=True)
    page = PICTURE.sub(lambda match: smaller(match[1], WIDTH), page, count=1)
    page = PICTURE.sub(lambda match: smaller(match[1]), page)
    target.write_text(page.replace('<p class="eyebrow">hilbert_attn</p>', HOME))


def smaller(picture: str, width: int = 4096) -> str:
    "As a photo that is looked at once, and no wider than this."
    with Image.open(BytesIO(b64decode(picture))) as opened:
        opened.thumbnail((width, 2 * width))
        opened.save(out := BytesIO(), "webp", quality=QUALITY, method=6)
    return f"data:image/webp;base64,{b64encode(out.getvalue()).decode()}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
