"""Tables as a reader wants them: numbers under each other, verdicts in colour, seeds folded.

pandas writes a row of headers for the names of the index, and every column to the right. Here each
table of a processed notebook is mended, in the HTML of pandas and in Markdown, for either renderer.
"""

import re
from copy import copy

from bs4 import BeautifulSoup, Tag

NUMBER = re.compile(r"^[~<>≤≥+-]?[\d.,]*\d")
NOTHING = {"", "-", "NaN", "nan", "None"}
MISSING = {"NaN", "nan", "NaT", "<NA>"}  # to pandas
LONG = 20  # characters of a row's header that wants room
LONG_WORD = re.compile(r"\w{6}\+\w{6}")
SEED = re.compile(r"seed \d+")
VERDICTS = {
    "yes": {"holds", "yes", "met", "lower"},
    "partly": {"holds only when …", "undecided", "no clear one"},
    "no": {"does not hold", "no", "not met", "higher"},
}
JUDGES = re.compile(r"verdict|^met$|met by")
MARKDOWN_TABLE = re.compile(r"(?:^\|.*\|[ ]*(?:\n|\Z)){2,}", re.M)
FENCED = re.compile(r"(^```.*?^```)", re.M | re.S)
BORDER = re.compile(r"\|(?:[ ]*:?-+:?[ ]*\|)+")


def mended(html: str) -> str:
    "The HTML of an output, its tables mended."
    if "dataframe" not in html and 'id="T_' not in html:
        return html
    soup = BeautifulSoup(html, "html.parser")
    for table in soup("table"):
        mend(table)
    for style in soup("style", scoped=True):  # pandas's own, which the site's sheet replaces
        style.decompose()
    return re.sub(r"\s*\n\s*", "\n", str(soup))


def mend(table: Tag) -> None:
    for element in (table, *table("tr")):
        del element["border"], element["style"]
    name_the_index(table)
    align_the_index(table)
    for column, cells in enumerate(columns(table)):
        of_words = is_words([cell.get_text(strip=True) for cell in cells])
        judges = bool(JUDGES.search(header(table, column)))
        for cell in cells:
            if cell.get_text(strip=True) in MISSING:
                cell.string = "-"
            if of_words:
                add_class(cell, "words")
            if judges:
                add_verdict(cell)
        if of_words and (head := head_of(table, column)):
            add_class(head, "words")
    give_scopes(table)
    part_long_words(table)
    fold_seeds(table)


def add_class(cell: Tag, name: str) -> None:
    cell["class"] = [*cell.get("class", []), name]


def heads(table: Tag) -> list[Tag]:
    return table.thead("tr") if table.thead else []


def levels(table: Tag) -> int:
    "Of the index: headers of the first row."
    first = table.tbody.tr if table.tbody else None
    return len(first("th")) if first else 0


def name_the_index(table: Tag) -> None:
    "The names of the index stand beside those of the columns, not below."
    rows = heads(table)
    if len(rows) != 2:
        return
    above, below = (row(["th", "td"]) for row in rows)
    names = [cell.get_text(strip=True) for cell in below]
    count = levels(table)
    free = not any(cell.get_text(strip=True) for cell in above[:count])
    if len(above) != len(below) or any(names[count:]) or not any(names) or not free:
        return
    for cell, name in zip(above, names[:count]):
        cell.string = name
    rows[1].decompose()


def align_the_index(table: Tag) -> None:
    "The headers of the index stand to the left, as the index does."
    count = levels(table)
    for row in heads(table):
        place = 0
        for cell in row(["th", "td"]):
            if place >= count:
                break
            add_class(cell, "index")
            place += int(cell.get("colspan", 1))


def columns(table: Tag) -> list[tuple[Tag, ...]]:
    "The cells below the headers, column by column, headers of rows apart."
    rows = [row("td") for row in table.tbody("tr")] if table.tbody else []
    return list(zip(*rows)) if len({len(row) for row in rows}) == 1 else []


def head_of(table: Tag, column: int) -> Tag | None:
    "The header of a column of cells, where there is one of its own."
    rows = heads(table)
    last = rows[-1](["th", "td"]) if rows else []
    count = len(columns(table))
    if not last or last[0].has_attr("colspan") or len(last) < count:
        return None
    return last[len(last) - count + column]


def header(table: Tag, column: int) -> str:
    head = head_of(table, column)
    return head.get_text(strip=True) if head else ""


def is_words(texts: list[str]) -> bool:
    told = [text for text in texts if text not in NOTHING]
    return any(not NUMBER.match(text) for text in told)


def verdict(text: str) -> str:
    "The class of a verdict, or nothing."
    found = (f"verdict-{kind}" for kind, words in VERDICTS.items() if text in words)
    return next(found, "")


def add_verdict(cell: Tag) -> None:
    if kind := verdict(cell.get_text(strip=True)):
        add_class(cell, kind)


def give_scopes(table: Tag) -> None:
    "What each header is the header of, for those who hear a table; an empty one is none."
    for part, scope in ((table.thead, "col"), (table.tbody, "row")):
        for cell in part("th") if part else ():
            if not cell.get_text(strip=True):
                cell.name = "td"
            elif cell.has_attr("colspan") and scope == "col":
                cell["scope"] = "colgroup"
            elif cell.has_attr("rowspan") and scope == "row":
                cell["scope"] = "rowgroup"
            else:
                cell["scope"] = scope
            if len(cell.get_text()) > LONG:
                add_class(cell, "long")


def part_long_words(table: Tag) -> None:
    "A header may break behind the sign in `forward+backward`."
    for text in table.thead(string=LONG_WORD) if table.thead else ():
        first, sign, rest = text.partition("+")
        text.replace_with(first + sign, BeautifulSoup("<wbr>", "html.parser"), rest)


def fold_seeds(table: Tag) -> None:
    "The table without the column of each seed, then, folded, with it."
    row = heads(table)[-1](["th", "td"]) if heads(table) else []
    seeds = {i for i, cell in enumerate(row) if SEED.fullmatch(cell.get_text(strip=True))}
    if not seeds:
        return
    whole = copy(table)
    for line in table("tr"):
        for i, cell in enumerate(line(["th", "td"], recursive=False)):
            if i in seeds:
                cell.decompose()
    kept = {0, *seeds}
    for line in whole("tr"):
        for i, cell in enumerate(line(["th", "td"], recursive=False)):
            if i not in kept:
                cell.decompose()
    soup = BeautifulSoup("<details><summary>Each seed</summary></details>", "html.parser")
    soup.details.append(whole)
    table.insert_after(soup.details)


def mended_markdown(text: str) -> str:
    "Numbers to the right, and verdicts in colour, in the tables of Markdown."
    parts = FENCED.split(text)
    parts[::2] = [MARKDOWN_TABLE.sub(markdown_table, part) for part in parts[::2]]
    return "".join(parts)


def markdown_table(match: re.Match) -> str:
    lines = match[0].splitlines()
    rows = [cells_of(line) for line in lines]
    if not BORDER.fullmatch(lines[1].strip()) or len({*map(len, rows)}) > 1:
        return match[0]
    for column, cells in enumerate(zip(*rows)):
        name, border, *below = cells
        if border == "---" and all(map(is_number, below)):
            rows[1][column] = "---:"
        if JUDGES.search(name):
            for row in rows[2:]:
                row[column] = in_colour(row[column])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def is_number(text: str) -> bool:
    plain = text.strip("*`")
    return plain in NOTHING or len(plain) < 16 and bool(NUMBER.match(plain))


def in_colour(text: str) -> str:
    kind = verdict(text.strip("*"))
    return f'<span class="{kind}">{text.strip("*")}</span>' if kind else text
