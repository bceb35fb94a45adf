"""The translations behind the site and the README, on the small part of Quarto that the notebooks may use."""
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
pytest.importorskip("sphinx")
build_site, make_readme, notebook = map(pytest.importorskip, ("build_site", "make_readme", "notebook"))
DOCS = {"00_curves.ipynb": "curves"}
KNOWN = {"curves": ({"curve_order", "box", "the-order"}, {"_walk"})}


def test_callouts():
    text = '::: {.callout-warning title="Beware"}\nA `b`.\n:::\n\n::: {.callout-tip collapse="true"}\n## Why\nSo.\n:::\n'
    assert build_site.myst(text, DOCS, KNOWN) == (
        ":::{admonition} Beware\n:class: warning\n\nA `b`.\n:::\n\n:::{admonition} Why\n:class: tip\n:collapsible: closed\n\nSo.\n:::\n")
    assert make_readme.markdown(text) == "> [!WARNING]\n> **Beware**\n>\n> A `b`.\n\n> [!TIP]\n> **Why**\n>\n> So.\n"


def test_references_and_links():
    text = "See @fig-a, @eq-b and [it](00_curves.ipynb#the-order), not `@fig-a`.\n\n$$\nx\n$$ {#eq-b}\n"
    assert build_site.myst(text, DOCS, KNOWN) == (
        "See {numref}`fig-a`, {eq}`eq-b` and [it](curves.ipynb#the-order), not `@fig-a`.\n\n$$\nx\n$$ (eq-b)\n")
    assert make_readme.markdown("[it](00_curves.ipynb#a) ![](a.png) [b](../LICENSE) [c](https://d.org)") == (
        "[it](nbs/00_curves.ipynb) ![](nbs/a.png) [b](LICENSE) [c](https://d.org)")


def test_links_around_names():
    def linked(name, anchor): return f"[`{name}`](00_curves.ipynb#{anchor})"
    text = " ".join(linked(name, name.lower()) for name in ("curve_order", "Box.cut", "_walk", "_hidden"))
    assert build_site.myst(text, DOCS, KNOWN) == (
        '[`curve_order`](curves.ipynb#curve_order) [`Box.cut`](curves.ipynb#box) <a href="curves.html#_walk">`_walk`</a> `_hidden`')


def test_unknown_syntax_is_an_error():
    for text in ("{{< include a.md >}}", "::: {.column-margin}\na\n:::", "See @tbl-a."):
        with pytest.raises(ValueError, match="no translation"): build_site.myst(text, DOCS, KNOWN)


def test_cell_options():
    assert notebook.options('#| echo: false\n#| fig-cap: "a: b"\nx = 1\n#| no option\n') == (
        {"echo": False, "fig-cap": "a: b"}, "x = 1\n#| no option")


def test_documentation_of_a_function():
    def f(a: int | None,  # one * of *two
          *, b=2,  # more
          c=print,
          ) -> tuple[Path, int | None] | None: pass
    f.__doc__ = "Does it."
    page = notebook.DocTable(f, name="f")._repr_markdown_()
    assert "f(a, *, b=2, c=print)\n" in page and "Does it." in page
    assert r"| `a` | `int` or `None` |  | one \* of \*two |" in page
    assert "| `b` |  | `2` | more |" in page
    assert "| *returns* | `tuple[Path, int or None]` or `None` |" in page


def test_documentation_of_a_long_call_and_a_dataclass():
    @dataclass
    class Point:
        x: float = 0.5
    assert "| `x` | `float` | `0.5` |" in notebook.DocTable(Point)._repr_markdown_()

    def g(first_argument, second_argument=None, third_argument=(1, 2), *fourth_argument, fifth_argument=None): pass
    assert "g(first_argument, second_argument=None, third_argument=(1, 2), *fourth_argument,\n  fifth_argument=None)" in (
        notebook.DocTable(g, name="g")._repr_markdown_())
