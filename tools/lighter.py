"""The site that Sphinx built, made lighter: what no reader sees, or what every page repeats.

Pages look and work as before. Drawings get a palette where that shows no difference.
"""

import json
import re
from pathlib import Path
from zlib import crc32

import numpy as np
from photos import is_drawn, without_paper
from PIL import Image
from search_index import write_index

SPACE = re.compile(r"(<(pre|script|textarea)\b.*?</\2>)|\s*\n\s*", re.S)
SYMBOL = re.compile(r'<symbol id="svg-([\w-]+)".*?</symbol>\n?', re.S)
UNUSED = {  # marks of Sphinx that nothing here looks at
    '<a class="reference internal" ': "<a ",  # see `style_all_links`
    '<li class="toctree-l1">': "<li>",
    "<pre><span></span>": "<pre>",
    '<tr class="row-even">': "<tr>",
    '<tr class="row-odd">': "<tr>",
    '<code class="docutils literal notranslate">': "<code>",  # see `style_all_code`
    "docutils container": "container",
    'class="cell_input container"': 'class="cell_input"',
    'class="cell_output container"': 'class="cell_output"',
    " notranslate": "",
}
CELL = re.compile(r"(<(t[dh])\b[^>]*>)<p>((?:(?!</?p>).)*)</p></\2>", re.S)  # of one paragraph
FOLD = re.compile(  # the same words twice, for folded and unfolded
    r"<summary aria-label=[^>]*>\s*"
    r'<p class="collapsed admonition-title">(.*?)</p>\s*'
    r'<p class="expanded admonition-title">\1</p>\s*</summary>'
)
LONG_NAME = re.compile(r'(<h[1-4]>)([\w.]{20,})(?=<a class="headerlink")')  # wider than a phone
HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[_.])")
TOKEN = re.compile(r'<span class="(?!pre)(\w{1,3})">([^<]*)</span>')  # of code
REFERENCE = re.compile(r'<span class="std std-(?:doc|ref)">([^<]*)</span>')
HEARD = {  # what a screen reader is told of the theme's parts
    'class="caption" role="heading"': 'class="caption"',
    '<aside class="sidebar-drawer"': '<aside aria-label="All pages" class="sidebar-drawer"',
    '<aside class="toc-drawer': '<aside aria-label="This page" class="toc-drawer',
}
LATER = {'<script src="_static/scripts/furo.js': '<script defer src="_static/scripts/furo.js'}
NO_HEADER = re.compile(r'<th class="head[^"]*"><p></p></th>')
WORD = re.compile(r'<span class="pre">([^<>/-]*)</span>')  # others could be broken inside
SOURCE = '<span class="caption-text">Source</span>'
MODULES = re.compile(rf"({SOURCE}</p>\s*<ul[^>]*>).*?(</ul>)", re.S)
NOTEBOOKS = re.compile(
    rf'(<div class="sidebar-tree">).*?(<p class="caption"[^>]*>{SOURCE})', re.S
)
ALL_NOTEBOOKS = '<ul><li><a href="index.html">All notebooks</a></li></ul>'
ALL_MODULES = '<li><a href="{}">All modules</a></li>'
LINK_RULE = re.compile(r"(\.(?:sidebar|toc)-tree[^{},]*?)\.reference")
ICONS = "_static/icons.js"
SEARCH = ("search_index.js", "_static/search.js")
SPHINX_SCRIPT = re.compile(
    r'<script src="(?:_static/)?(?:documentation_options|doctools|sphinx_highlight|searchtools'
    r'|language_data|searchindex)\.js[^"]*"></script>\n?'
)
SEARCH_HEAD = '<h1>Search</h1><form><input name="q" aria-label="Words to find"></form>'
UNREAD = """searchindex.js _static/documentation_options.js _static/doctools.js
    _static/sphinx_highlight.js _static/searchtools.js _static/language_data.js
    _static/english-stemmer.js _static/base-stemmer.js _static/debug.css _static/skeleton.css
    _static/basic.css _static/file.png _static/minus.png _static/plus.png objects.inv""".split()
SHEET = re.compile(r'<link rel="stylesheet"[^>]* href="([^"?]+)[^"]*"[^>]*>\n?')
ONE_SHEET = "_static/styles.css"
SPARED = re.compile(r"/\*(?!!).*?\*/|\s+(?=[{}])|(?<=[{};,])\s+", re.S)  # but licences
COLOURS = re.compile(r"<style>(\s*body \{.*?)</style>", re.S)
PICTURE = re.compile(r"(?<=_images/)\w+\.(?:png|jpg)\b")
QUALITY = 72  # of photos; drawings lose nothing
SHOWS_NO_DIFFERENCE = 0.2  # of 255 levels, on average


def lighten(site: Path) -> None:
    themes, sources = {}, sorted(site.glob("module_*.html"))
    add_search(site / "search.html")
    write_index(site, SEARCH[0])
    smaller = smaller_pictures(site / "_images")
    move_colours(site)
    for style in (style_all_code, style_all_links):
        style(site / "_static" / "styles" / "furo.css")
    join_sheets(site)
    for path in site.glob("*.html"):
        text, symbols = without_theme_icons(path.read_text())
        themes |= symbols
        if path in sources:
            text = NOTEBOOKS.sub(rf"\1{ALL_NOTEBOOKS}\2", text)
        if path != sources[0]:
            text = without_modules(text, sources[0].name)
        text = PICTURE.sub(lambda match: smaller.get(match[0], match[0]), text)
        path.write_text(lighter_page(text))
    (site / ICONS).write_text(icon_script("".join(themes.values())))
    for path in [*site.rglob("*.map"), *(site / name for name in UNREAD)]:
        path.unlink(missing_ok=True)


def move_colours(site: Path) -> None:
    "The theme's colours stand in a sheet that all pages share, instead of in each of them."
    colours = ""
    for path in site.glob("*.html"):
        text = path.read_text()
        if found := COLOURS.search(text):
            colours = found[1]
            path.write_text(text.replace(found[0], ""))
    with open(site / "_static" / "styles.css", "a") as sheet:
        sheet.write(colours)


def join_sheets(site: Path) -> None:
    "What all pages look like is asked for once: a page is not painted before its last sheet."
    texts = {path: path.read_text() for path in site.glob("*.html")}
    lists = {tuple(SHEET.findall(text)) for text in texts.values()}
    if lists == {()}:
        return
    [names] = lists
    joined = SPARED.sub("", "\n".join((site / name).read_text() for name in names))
    for name in names:
        (site / name).unlink()
    (site / ONE_SHEET).write_text(joined)
    link = f'<link rel="stylesheet" href="{ONE_SHEET}?v={crc32(joined.encode()):x}">\n'
    for path, text in texts.items():
        path.write_text(SHEET.sub("", text).replace("</head>", f"{link}</head>"))


def style_all_code(sheet: Path) -> None:
    "Code in text needs no class: the theme's rules for that class hold outside of blocks."
    rules = sheet.read_text()
    sheet.write_text(rules.replace("code.literal", "code:not(pre *)"))


def style_all_links(sheet: Path) -> None:
    "Nor do the links beside a page: the theme's rules hold for all of them."
    rules = LINK_RULE.sub(r"\1:is(.reference,a)", sheet.read_text())
    sheet.write_text(rules.replace(".sidebar-tree .toctree-l1>", ".sidebar-tree>ul>li>"))


def add_search(page: Path) -> None:
    "A search of our own, which knows how often a page has a word, and works from files."
    scripts = "".join(f'<script src="{script}"></script>\n' for script in SEARCH)
    text = page.read_text().replace("</body>", f"{scripts}</body>")
    results = '<div id="search-results"'
    page.write_text(text.replace(results, SEARCH_HEAD + results))


def lighter_page(text: str) -> str:
    text = SPHINX_SCRIPT.sub("", text)
    for given, better in (UNUSED | HEARD | LATER).items():
        text = text.replace(given, better)
    text = NO_HEADER.sub("<td></td>", text)
    text = CELL.sub(r"\1\3</\2>", text)
    text = FOLD.sub(r"<summary>\1</summary>", text)
    text = LONG_NAME.sub(lambda match: match[1] + HUMP.sub("<wbr>", match[2]), text)
    text = WORD.sub(r"\1", text)
    text = REFERENCE.sub(r"\1", text)
    text = TOKEN.sub(r"<i class=\1>\2</i>", text)
    return SPACE.sub(lambda match: match[1] or "\n", text)


def without_modules(text: str, first: str) -> str:
    "A page whose sidebar leads to the first module: that one's sidebar lists them all."
    return MODULES.sub(rf"\1{ALL_MODULES.format(first)}\2", text)


def without_theme_icons(text: str) -> tuple[str, dict[str, str]]:
    "A page that loads the icons of the theme's switch, and these; without a script it has none."
    used, moved = {*re.findall('href="#svg-([^"]+)"', text)}, {}

    def keep(match):
        name = match[1]
        if name in used and re.search("sun|moon", name):
            moved[name] = match[0]
        return match[0] if name in used - {*moved} else ""

    text = SYMBOL.sub(keep, text)
    script = f'<script defer src="{ICONS}"></script>\n</body>'
    return text.replace("</body>", script), moved


def icon_script(symbols: str) -> str:
    "Puts symbols where the page's others are."
    code = json.dumps(re.sub(r"\s*\n\s*", " ", symbols))
    return f'document.querySelector("svg").insertAdjacentHTML("beforeend", {code})\n'


def smaller_pictures(folder: Path) -> dict[str, str]:
    "Pictures as WebP, where that is smaller: the names they had, and those that they have now."
    found = {}
    for path in [*folder.glob("*.png"), *folder.glob("*.jpg")]:
        new = path.with_suffix(".webp")
        photo = save_webp(path, new)
        worse = not photo and new.stat().st_size >= path.stat().st_size
        (new if worse else path).unlink()
        if not worse:
            found[path.name] = new.name
    return found


def save_webp(path: Path, new: Path) -> bool:
    "Whether it is a photo, which then has lost the paper around it."
    lossless = path.suffix == ".png"
    with Image.open(path) as picture:
        photo = not is_drawn(picture, lossless)
        if photo:
            without_paper(picture).save(new, quality=QUALITY, alpha_quality=QUALITY, method=6)
    if not photo:
        if lossless:
            lighten_picture(path)
        with Image.open(path) as picture:
            picture.save(new, quality=QUALITY, lossless=lossless, method=6)
    return photo


def lighten_picture(path: Path) -> None:
    "With a palette instead of three colours a pixel, unless that can be seen, as on photos."
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    if picture.getextrema()[3] != (255, 255):
        return
    found = with_palette(picture.convert("RGB"))
    before = path.read_bytes()
    found.save(path, optimize=True)
    if path.stat().st_size > len(before):
        path.write_bytes(before)


def with_palette(picture: Image.Image) -> Image.Image:
    "With as few colours as show no difference; the picture itself if 256 are not enough."
    for colours in (64, 256):
        few = picture.quantize(colours, dither=Image.Dither.NONE)
        if difference(picture, few) < SHOWS_NO_DIFFERENCE:
            return few
    return picture


def difference(one: Image.Image, other: Image.Image) -> float:
    levels = [np.asarray(picture.convert("RGB"), float) for picture in (one, other)]
    return np.abs(levels[0] - levels[1]).mean()
