"""How nbdev documents what a notebook exports: importing this puts it in place.

That holds here, and in the processes that nbdev starts for a program that imports this.
"""

import ast
import inspect
import re
from dataclasses import is_dataclass
from inspect import Parameter
from itertools import compress
from textwrap import fill

import fastcore.docments
from fastcore.docments import docments
from nbdev import processors, showdoc
from notebook import ROOT, module_page, outside_code

WIDTH = 76  # characters of a signature, which fit the page


class DocTable(showdoc.BasicMarkdownRenderer):
    "Heading, link to the source, signature, docstring, and the docments as a table."

    def _repr_markdown_(self):
        # the function behind a torch operator, or behind a jitted one
        made_from = getattr(self.sym, "_init_fn", None) or getattr(self.sym, "fn", None)
        if made_from:
            self.sym, self.docs = made_from, made_from.__doc__ or ""
        parts = [
            "#" * self.title_level + f" {self.nm}",
            _source_link(self.nm),
            f"```python\n{call(self.nm, _parameters(self.sym))}\n```",
            self.sym.__doc__ and self.docs,
            _table(self.sym),
        ]
        return "\n\n".join(filter(None, parts))


def _parameters(sym) -> list[Parameter]:
    try:
        every = inspect.signature(sym).parameters.values()
    except ValueError:  # a class of exceptions that adds nothing to its base
        return []
    return [parameter for parameter in every if parameter.name != "self"]


def _source_link(name: str) -> str:
    file = _file_of(name)
    if not file:
        return ""
    target = f"{module_page(file)}.html#def-{name.partition('.')[0]}"
    return f'<div class="source"><a href="{target}">source</a></div>'


def _file_of(name: str) -> str:
    "Where it is defined: nbdev's index passes over notebooks with `auto` in their names."
    if entry := showdoc.NbdevLookup()[name]:
        return entry[1]
    definition = re.compile(rf"^(?:def|class) {name.partition('.')[0]}\b", re.M)
    files = sorted((ROOT / "hilbert_attn").rglob("*.py"))
    found = [file for file in files if definition.search(file.read_text())]
    return found[0].relative_to(ROOT).as_posix() if len(found) == 1 else ""


def _table(sym) -> str:
    "Name, type, default and note of each argument; columns that are empty are left out."
    rows = [row for row in _rows(sym) if any(row[1:])]
    filled = [True, *(any(row[i] for row in rows) for i in (1, 2, 3))]
    _, types, _, details = filled
    if not types and not details:
        return ""
    rows = [["", "Type", "Default", "Details"], ["---"] * 4, *rows]
    return "\n".join(f"| {' | '.join(compress(row, filled))} |" for row in rows)


def _rows(sym) -> list[list[str]]:
    notes = _fields(sym) if is_dataclass(sym) else docments(sym)
    rows = []
    for p in _parameters(sym):  # code in HTML becomes no link to what has the same name
        rows.append(_row(f"<code>{p.name}</code>", p.annotation, p.default, notes.get(p.name)))
    if not inspect.isclass(sym):
        returned = inspect.signature(sym).return_annotation
        rows.append(_row("*returns*", returned, Parameter.empty, notes.get("return")))
    return rows


def _row(name: str, annotation, default, note: str | None) -> list[str]:
    shown = "" if default is Parameter.empty else f"`{_Shown(default)!r}`"
    text = outside_code(lambda part: part.replace("*", r"\*"), note or "")
    cells = name, _type(annotation), shown, text
    return [" ".join(cell.split()).replace("|", r"\|") for cell in cells]


def _fields(cls) -> dict[str, str]:
    "The comments on a dataclass' fields, which Python keeps for no class of a notebook."
    entry = showdoc.NbdevLookup()[cls.__qualname__]
    if not entry:
        return {}
    source = (ROOT / entry[1]).read_text()
    lines, notes = source.splitlines(), {}
    definitions = ast.parse(source).body
    body = next(
        node.body for node in definitions if getattr(node, "name", "") == cls.__name__
    )
    for node in body:
        if not isinstance(node, ast.AnnAssign):
            continue
        _, found, note = lines[node.end_lineno - 1].partition("# ")
        if found:
            notes[node.target.id] = note
    return notes


def _type(annotation) -> str:
    if annotation is Parameter.empty:
        return ""
    text = (
        annotation
        if isinstance(annotation, str)
        else inspect.formatannotation(annotation)
    )
    text = re.sub(r"[a-z_][a-z_0-9]*[.](?=\w)", "", text)  # no module names
    # `int` or `None`, not int | None: a pipe would end the table's cell
    alternatives = re.split(r" *\| *(?![^\[]*\])", text)
    shown = (re.sub(" *[|] *", " or ", part) for part in alternatives)
    return " or ".join(f"`{part}`" for part in shown)


class _Shown:
    "A default as one would write it: a function by its name."

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return getattr(self.value, "__qualname__", None) or repr(self.value)


def call(name: str, parameters: list[Parameter], width: int = WIDTH) -> str:
    "`name(a, b, *, c=1)`, wrapped between the arguments."
    shown = [_argument(parameter).replace(" ", "\0") for parameter in parameters]
    kinds = [parameter.kind for parameter in parameters]
    if Parameter.KEYWORD_ONLY in kinds and Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(kinds.index(Parameter.KEYWORD_ONLY), "*")
    start = f"{name}("
    indent = " " * min(len(start), 8)
    whole = ["break_long_words", "break_on_hyphens"]
    text = fill(
        ", ".join(shown) + ")",
        width,
        initial_indent=start,
        subsequent_indent=indent,
        **dict.fromkeys(whole, False),
    )
    return text.replace("\0", " ")


def _argument(parameter: Parameter) -> str:
    "A parameter without its annotation."
    default = parameter.default
    if default is not Parameter.empty:
        default = _Shown(default)
    return str(parameter.replace(annotation=Parameter.empty, default=default))


def _signature(sym, **options) -> inspect.Signature:
    "As `inspect.signature`; a name that is imported for type checkers alone stays as written."
    try:
        return inspect.signature(sym, **options)
    except NameError:
        return inspect.signature(sym)


_names, _runs = processors._def_names, processors._do_eval


def _names_in_order(*args):
    "nbdev lists them last to first."
    return _names(*args)[::-1]


def _exports_alone(cell):
    "Run no imports of other cells: a module's own cells stand alone."
    exports = cell.directives_.keys() & {"export", "exports", "exporti"}
    return (exports or "show_doc(" in (cell.source or "")) and _runs(cell)


fastcore.docments.signature = _signature
showdoc.BasicMarkdownRenderer = DocTable
processors._def_names = _names_in_order
processors._do_eval = _exports_alone
