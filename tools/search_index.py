"""What the site's search looks up: titles, descriptions, headings, and how often words stand where.

Sphinx's own index knows which page has a word, not how often, and its results fetch every page
that they name. This one is a script of a few lists, so that it works from files, too.
"""

import json
import re
from collections import Counter
from html import unescape
from pathlib import Path

ARTICLE = re.compile(r"<article\b.*?</article>", re.S)
HEADING = re.compile(r'<h[1-4]>(.*?)<a class="headerlink" href="(#[^"]*)"', re.S)
SUBTITLE = re.compile(r'<p class="subtitle">(.*?)</p>', re.S)
TAG = re.compile(r"<[^>]+>")
WORD = re.compile(r"[a-z][a-z0-9_]+")
UNLISTED = {"genindex.html", "search.html"}
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
LARGEST = 35  # of the counts that are told apart: one digit
EVERYWHERE = 0.7  # a word on more pages than this share tells nothing


def write_index(site: Path, script: str) -> None:
    paths = sorted(path for path in site.glob("*.html") if path.name not in UNLISTED)
    pages, places = [], {}
    for number, path in enumerate(paths):
        article = ARTICLE.search(path.read_text())[0]
        pages.append(entry(path.name, article))
        if path.name.startswith("module_"):
            continue  # its words stand on the notebook's page
        for word, count in words(article).items():
            places.setdefault(word, {})[number] = count
    told = {word: found for word, found in places.items() if len(found) < EVERYWHERE * len(pages)}
    listed = {word: "".join(map(posting, *zip(*told[word].items()))) for word in sorted(told)}
    data = json.dumps({"pages": pages, "words": listed}, ensure_ascii=False, separators=(",", ":"))
    (site / script).write_text(f"const INDEX = {data}\n")


def entry(file: str, article: str) -> list:
    "File, title, description, and each heading with its anchor."
    title, *headings = [(plain(text), anchor) for text, anchor in HEADING.findall(article)]
    subtitle = SUBTITLE.search(article)
    return [file, title[0], plain(subtitle[1]) if subtitle else "", headings]


def plain(html: str) -> str:
    return " ".join(unescape(TAG.sub("", html)).split())


def words(article: str) -> Counter:
    return Counter(WORD.findall(unescape(TAG.sub(" ", article)).lower()))


def posting(page: int, count: int) -> str:
    "A page and a count in three digits."
    high, low = divmod(page, len(DIGITS))
    return DIGITS[high] + DIGITS[low] + DIGITS[min(count, LARGEST)]
