"""How the code looks to a reader, in figures: `python tools/readable.py`.

Package, notebooks, tests and tools: widths of lines, syntax nodes of functions, lengths of
functions and cells, public names, private names that cross modules. `--shrink` takes out of
tests/style_exceptions.json what is not needed any more; it never adds to it.
"""
import argparse
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
EXCEPTIONS = ROOT / "tests" / "style_exceptions.json"
PACKAGE = "hilbert_attn"
GENERATED = "_modidx.py"

# figure of the project -> at most
LIMITS = {
    "package: median width": 45,
    "notebooks: median width": 45,
    "tests: median width": 45,
    "tools: median width": 45,
    "package: lines over 100": 0,
    "package: nodes": 80_000,
    "functions: nodes, median": 35,
    "functions: nodes, p90": 130,
    "functions: nodes, p99": 300,
    "public names": 45,
    "private names imported": 20,
}
NOT_COUNTED = (ast.expr_context, ast.operator, ast.cmpop, ast.boolop, ast.unaryop)


@dataclass(frozen=True)
class Source:
    "A module, or a cell of a notebook."
    path: str # of the file, from the root
    text: str
    after_prose: bool = False # of a cell: is the one before it prose?

    @property
    def group(self) -> str:
        first = self.path.partition("/")[0]
        return {PACKAGE: "package", "nbs": "notebooks"}.get(first, first)

    @property
    def lines(self) -> list[str]: # of code
        stripped = ((line, line.strip()) for line in self.text.splitlines())
        return [line for line, code in stripped if code and not code.startswith("#")]

    @property
    def tree(self) -> ast.Module:
        try:
            return ast.parse(self.text)
        except SyntaxError:  # a cell with a magic command
            return ast.Module([], [])


def without_all(text: str) -> str:
    "nbdev writes `__all__` at a width of its own."
    return re.sub(r"(?ms)^# %% auto #0$.*?(?=^# %%)", "", text)


def sources(root: Path = ROOT) -> list[Source]:
    "All code that people read."
    found = []
    for folder in (PACKAGE, "tests", "tools"):
        for path in sorted((root / folder).rglob("*.py")):
            if path.name == GENERATED:
                continue
            name = path.relative_to(root).as_posix()
            found.append(Source(name, without_all(path.read_text())))
    for path in sorted((root / "nbs").glob("*.ipynb")):
        name = path.relative_to(root).as_posix()
        cells = json.loads(path.read_text())["cells"]
        for before, cell in zip([None, *cells], cells):
            if cell["cell_type"] == "code":
                prose = before is not None and before["cell_type"] == "markdown"
                found.append(Source(name, "".join(cell["source"]), prose))
    return found


def nodes(tree: ast.AST) -> int:
    "Syntax nodes, without contexts and names of operators."
    return sum(not isinstance(node, NOT_COUNTED) for node in ast.walk(tree))


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def functions(source: Source) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)]


def long_functions(source: Source) -> int:
    "Over 50 lines, kernels over 80."
    lengths = ((f.end_lineno - f.lineno + 1, is_kernel(f)) for f in functions(source))
    return sum(length > (80 if kernel else 50) for length, kernel in lengths)


def heavy_functions(source: Source) -> int:
    "Over 400 syntax nodes, kernels over 600."
    weights = ((nodes(f), is_kernel(f)) for f in functions(source))
    return sum(weight > (600 if kernel else 400) for weight, kernel in weights)


def is_long(cell: Source) -> bool:
    "A lesson's over 25 lines (a kernel's 40); exported, over 50 (one class or kernel: 80)."
    length = sum(bool(line.strip()) for line in cell.text.splitlines())
    made = [x for x in cell.tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    kernel = any(isinstance(x, ast.FunctionDef) and is_kernel(x) for x in made)
    if not is_exported(cell):
        return length > (40 if kernel else 25)
    one_large_thing = len(made) == 1 and (kernel or isinstance(made[0], ast.ClassDef))
    return length > (80 if one_large_thing else 50)


def is_exported(cell: Source) -> bool:
    return re.search(r"^#\|\s*export[si]?\b", cell.text, re.M) is not None


def lacks_prose(cell: Source) -> bool:
    "Exported, more than imports, and not at once behind the prose that says why it is there."
    if cell.after_prose or not is_exported(cell): return False
    return not all(map(is_import, cell.tree.body))


def is_import(statement: ast.stmt) -> bool:
    "Or one for type checkers alone."
    if isinstance(statement, ast.If): return ast.unparse(statement.test) == "TYPE_CHECKING"
    return isinstance(statement, (ast.Import, ast.ImportFrom))


def complaints(root: Path = ROOT) -> Counter:
    "What ruff says, by file."
    command = [sys.executable, "-m", "ruff", "check", "nbs", "tests", "tools"]
    done = subprocess.run(
        [*command, "--output-format", "json", "--no-cache", "--exit-zero"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (Path(found["filename"]) for found in json.loads(done.stdout))
    return Counter(path.relative_to(root).as_posix() for path in paths)


def by_file(root: Path = ROOT) -> dict[str, dict[str, int]]: # path -> rule -> count
    "What is wrong with each file; nothing for those with which nothing is."
    found: dict[str, Counter] = {}
    for path, count in complaints(root).items():
        found.setdefault(path, Counter())["ruff"] = count
    for source in sources(root):
        counts = found.setdefault(source.path, Counter())
        if source.group == "notebooks":
            counts["long cells"] += is_long(source)
            counts["cells without prose"] += lacks_prose(source)
            continue
        counts["long functions"] += long_functions(source)
        counts["heavy functions"] += heavy_functions(source)
    wrong = {path: {rule: n for rule, n in counts.items() if n} for path, counts in found.items()}
    return {path: counts for path, counts in wrong.items() if counts}


def public_names(root: Path) -> int:
    "Of the package's `__all__`."
    tree = ast.parse((root / PACKAGE / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return len(node.value.elts)
    raise ValueError(f"{PACKAGE}/__init__.py has no __all__")


def private_imports(package: list[Source]) -> int:
    "Names with an underscore that one module takes from another."
    names = []
    for source in package:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level or (node.module or "").startswith(PACKAGE):
                names += [alias.name for alias in node.names]
    return sum(name.startswith("_") for name in names)


def of_project(root: Path = ROOT) -> dict[str, float]: # as `LIMITS`
    "Figures of the whole."
    everything, figures = sources(root), {}
    for group in ("package", "notebooks", "tests", "tools"):
        widths = [len(x) for s in everything if s.group == group for x in s.lines]
        figures[f"{group}: median width"] = median(widths)
        if group == "package":
            figures["package: lines over 100"] = sum(width > 100 for width in widths)
    package = [source for source in everything if source.group == "package"]
    figures["package: nodes"] = sum(nodes(source.tree) for source in package)
    plain = [f for source in package for f in functions(source) if not is_kernel(f)]
    weights = sorted(map(nodes, plain))
    figures["functions: nodes, median"] = weights[len(weights) // 2]
    figures["functions: nodes, p90"] = weights[int(0.9 * len(weights))]
    figures["functions: nodes, p99"] = weights[int(0.99 * len(weights))]
    figures["public names"] = public_names(root)
    figures["private names imported"] = private_imports(package)
    return figures


def shrunk(listed: dict, files: dict, project: dict) -> dict:
    "The exceptions that are still needed, none larger than before."
    kept = {}
    for path, counts in listed["files"].items():
        found = files.get(path, {})
        smaller = {rule: min(n, found.get(rule, 0)) for rule, n in counts.items()}
        if needed := {rule: n for rule, n in smaller.items() if n}:
            kept[path] = needed
    figures = {name: min(n, project[name]) for name, n in listed["project"].items()}
    figures = {name: n for name, n in figures.items() if n > LIMITS[name]}
    return dict(project=figures, files=kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shrink", action="store_true", help="drop exceptions not needed")
    arguments = parser.parse_args()
    files, project = by_file(), of_project()
    for name, value in project.items():
        print(f"{name:28} {value:10,}   at most {LIMITS[name]:,}")
    for path, counts in files.items():
        print(f"{path:40} {', '.join(f'{n} {rule}' for rule, n in counts.items())}")
    if arguments.shrink:
        listed = json.loads(EXCEPTIONS.read_text())
        EXCEPTIONS.write_text(json.dumps(shrunk(listed, files, project), indent=1) + "\n")


if __name__ == "__main__":
    main()
