"""Writes hilbert_attn/overloads.pyi: what functions with `return_lse` give, for type checkers.

    python tools/make_overloads.py [--check]

Their result is a tensor, or a pair with the log-sum-exp, as `return_lse` says. A checker hears that
from overloads, three of each; they are made here from the signatures in the package, so that
notebooks need not show them. `--check` writes nothing, and fails where the file is stale.
"""
import argparse
import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "hilbert_attn"
TARGET = PACKAGE / "overloads.pyi"
HEAD = '''"""Written by tools/make_overloads.py from the functions' own signatures."""
from collections.abc import Sequence
from typing import Literal, overload

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask

from hilbert_attn.blocks.lists import BlockLists
'''
RESULTS = (  # type of return_lse, its default, the result
    ("Literal[False]", " = ...", "Tensor"),
    ("Literal[True]", "", "tuple[Tensor, Tensor]"),
    ("bool", "", "Tensor | tuple[Tensor, Tensor]"),
)


def public_functions() -> list[str]:
    "Names that the package's front lists, and those that can be had from there too."
    lists = {}
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign): lists[ast.unparse(node.targets[0])] = node.value
    front, elsewhere = (ast.literal_eval(lists[name]) for name in ("__all__", "_ELSEWHERE"))
    return [*front, *" ".join(elsewhere.values()).split()]


def flagged(names: list[str]) -> list[ast.FunctionDef]:
    "The functions of these names that take `return_lse`, in the order of the names."
    found = {}
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name not in names: continue
            if any(a.arg == "return_lse" for a in node.args.kwonlyargs): found[node.name] = node
    return [found[name] for name in names if name in found]


def _parameter(argument: ast.arg, default: bool) -> str:
    kind = argument.annotation
    text = kind.value if isinstance(kind, ast.Constant) else ast.unparse(kind)
    return f"    {argument.arg}: {text}{' = ...' * default},"


def stub(function: ast.FunctionDef, flag: str, default: str, result: str) -> str:
    "One overload."
    own, lines = function.args, [f"@overload\ndef {function.name}("]
    lines += [_parameter(a, False) for a in own.args] + ["    *,"]
    for argument, value in zip(own.kwonlyargs, own.kw_defaults, strict=True):
        if argument.arg != "return_lse": lines.append(_parameter(argument, value is not None))
    return "\n".join([*lines, f"    return_lse: {flag}{default},", f") -> {result}: ..."])


def overloads() -> str: # the text of the file
    functions = flagged(public_functions())
    parts = ["\n".join(stub(f, *result) for result in RESULTS) for f in functions]
    return "\n\n".join([HEAD.rstrip("\n"), *parts]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    asked, text = parser.parse_args(), overloads()
    if not asked.check: TARGET.write_text(text)
    elif not TARGET.exists() or TARGET.read_text() != text:
        raise SystemExit(f"{TARGET.name} is stale: run `python tools/make_overloads.py`")


if __name__ == "__main__": main()
