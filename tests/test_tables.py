"""Tables of the site: what tools/tables.py makes of pandas's HTML and of Markdown."""

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
bs4 = pytest.importorskip("bs4")
import tables


def made(frame: pd.DataFrame):
    return bs4.BeautifulSoup(tables.mended(frame.to_html()), "html.parser")


def texts(found) -> list[str]:
    return [element.get_text() for element in found]


@pytest.fixture
def frame() -> pd.DataFrame:
    rows = [
        ("hilbert", 0.3, 0.31, 0.29, "holds"),
        ("snake", 0.4, 0.41, 0.39, "holds only when …"),
        ("rows", 0.5, 0.51, 0.49, "does not hold"),
        ("dense", 0.2, 0.21, 0.19, ""),
    ]
    columns = ["order", "mean", "seed 0", "seed 1", "verdict"]
    return pd.DataFrame(rows, columns=columns).set_index("order")


def test_verdicts_are_words_in_colour(frame):
    cells = made(frame).table.tbody.select("td:last-child")
    kinds = [[kind for kind in cell["class"] if kind != "words"] for cell in cells]
    assert kinds == [["verdict-yes"], ["verdict-partly"], ["verdict-no"], []]
    assert texts(cells) == [*frame.verdict]


def test_a_yes_that_is_no_verdict_has_no_colour():
    assert "verdict-" not in str(made(pd.DataFrame({"causal": ["yes", "no"]})))


def test_seeds_are_folded_and_none_is_lost(frame):
    page = made(frame)
    shown, folded = page("table")
    assert texts(shown.thead("th")) == ["order", "mean", "verdict"]
    assert folded.parent.name == "details" and folded.parent.summary
    assert texts(folded.thead("th")) == ["order", "seed 0", "seed 1"]
    seeds = frame[["seed 0", "seed 1"]].to_numpy().ravel()
    assert texts(folded.tbody("td")) == [f"{loss:.2f}" for loss in seeds]


def test_headers_say_of_what(frame):
    page = made(frame.drop(columns=["seed 0", "seed 1"]))
    assert [cell["scope"] for cell in page.thead("th")] == ["col"] * 3
    assert [cell["scope"] for cell in page.tbody("th")] == ["row"] * 4
    assert len(page.thead("tr")) == 1  # the index's name stands beside the others
    unnamed = made(frame.rename_axis(None))
    assert unnamed.thead.td.get_text() == "" and len(unnamed.thead("th")) == 2


def test_what_is_missing_is_a_dash():
    frame = pd.DataFrame({"loss": [0.5, float("nan")], "steps": pd.array([3, pd.NA], "Int64")})
    assert texts(made(frame).tbody("td")) == ["0.5", "3", "-", "-"]


def test_words_stand_left_and_numbers_right():
    frame = pd.DataFrame({"ms": ["1.5", "-"], "backend": ["sdpa", "triton"], "x": ["~2x", "<1"]})
    page = made(frame)
    assert [("words" in cell.get("class", [])) for cell in page.thead("th")] == [False, True, False]
    assert texts(page.select("td.words")) == ["sdpa", "triton"]


def test_headers_of_the_index_stand_left_as_it_does():
    frame = pd.DataFrame({"kind": ["a", "a"], "tokens": [8, 9], "ms": [1.5, 2.5]})
    page = made(frame.set_index(["kind", "tokens"]))
    assert texts(page.select("thead .index")) == ["kind", "tokens"]
    wide = frame.set_index(["kind", "tokens"]).rename_axis(columns="unit").unstack("kind")
    assert "ms" not in texts(made(wide).select("thead .index"))


def test_the_name_of_the_second_level_alone_stands_beside_those_of_columns():
    frame = pd.DataFrame({"beats it": ["yes", "no"]}, index=pd.Index(["dense", "tile"], name="arm"))
    page = made(pd.concat({"photos": frame}))
    assert texts(page.thead("tr")[0](["th", "td"])) == ["", "arm", "beats it"]
    assert len(page.thead("tr")) == 1 and "words" in page.thead("th")[-1]["class"]


def test_names_of_columns_that_would_be_lost_keep_their_row():
    frame = pd.DataFrame([[1, 2]], columns=pd.Index([8, 16], name="rate"))
    frame.index.name = "task"
    assert len(made(frame).thead("tr")) == 2


def test_pandas_own_sheet_is_gone():
    html = "<style scoped>\n .dataframe {}\n</style>" + pd.DataFrame({"a": [1]}).to_html()
    assert "<style" not in tables.mended(html) and "border" not in tables.mended(html)


def test_other_html_stays():
    assert tables.mended("<p>a\n\n b</p>") == "<p>a\n\n b</p>"


TABLE = """| claim | times | verdict |
| --- | --- | --- |
| `a \\| b` | 1.5 | **holds** |
| c | 20x | **does not hold** |
"""
MENDED = """| claim | times | verdict |
| --- | ---: | --- |
| `a \\| b` | 1.5 | <span class="verdict-yes">holds</span> |
| c | 20x | <span class="verdict-no">does not hold</span> |
"""


def test_tables_of_markdown():
    assert tables.mended_markdown(TABLE) == MENDED
    assert tables.mended_markdown(f"{TABLE}\nMore\n") == f"{MENDED}\nMore\n"
    code = f"```\n{TABLE}```\n"
    assert tables.mended_markdown(code) == code
