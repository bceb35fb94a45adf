"""Types: the public names are annotated in full, users who check types find no errors of ours
and all of theirs, and the package itself passes."""
import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import hilbert_attn as h
from hilbert_attn import backends, curves, options, patterns, ring_plan
from hilbert_attn.block_layers import PLACEMENTS
from hilbert_attn.integrations import DiTSettings
from hilbert_attn.kernels.forward import attention_forward

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def methods(cls: type) -> Iterator[tuple[str, Callable]]:
    "Public methods that a class defines itself, and how it is made, called and entered."
    for name, member in vars(cls).items():
        member = member.fget if isinstance(member, property) else getattr(
            member, "__func__", getattr(member, "func", member))
        generated = name == "__init__" and dataclasses.is_dataclass(cls)
        if inspect.isfunction(member) and not generated and (
            name[0] != "_" or name in ("__init__", "__call__", "__enter__", "__exit__")):
            yield f"{cls.__name__}.{name}", member


NAMES = [*h.__all__, *h._HOMES]  # those of the front, and those that can be had from there too


def public() -> dict[str, Callable]:
    found = {}
    for name in NAMES:
        value = getattr(h, name)
        if inspect.isclass(value): found |= dict(methods(value))
        elif callable(value): found[name] = value
    return found


PUBLIC = public()
ANY = {  # where any object will do, or where torch decides
    # of any attention inside
    "MultiheadDilatedAttention.forward options", "DilatedSelfAttention.forward options",
    "TransformerBlock.forward options",
    "set_backend.__exit__ error",
    "BlockSparseAttention.settings return",
}


def vague(annotation) -> bool:
    "Does `Any` hide in it, or a container that does not say of what?"
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    bare = "[Cc]allable|dict|list|tuple|type|Sequence|Mapping|Iterator|MappingProxyType"
    return re.search(rf"\b(Any|object)\b|\b({bare})\b(?!\[)", text) is not None


def test_vague():
    assert all(map(vague, (dict, Callable, "Any", "int | list", tuple | None, "dict[str, Any]")))
    assert not any(map(vague, (int, "dict[str, int]", tuple[int, ...], Callable[[int], str])))


def test_every_parameter_and_result_is_annotated():
    assert len(PUBLIC) > 90
    missing, unclear = [], set()
    for name, function in PUBLIC.items():
        signature = inspect.signature(function)
        parameters = {
            p.name: p.annotation for i, p in enumerate(signature.parameters.values()) if i
            or p.name not in ("self", "cls")}
        if not name.endswith("__init__"): parameters["return"] = signature.return_annotation
        missing += [
            f"{name} {key}" for key, annotation in parameters.items()
            if annotation is inspect.Parameter.empty]
        unclear |= {f"{name} {key}" for key, annotation in parameters.items() if vague(annotation)}
    assert not missing and unclear == ANY


def test_every_field_is_annotated_in_full():
    "Of public dataclasses."
    fields = [
        (cls, f) for cls in (getattr(h, name) for name in NAMES) if dataclasses.is_dataclass(cls)
        for f in dataclasses.fields(cls)]
    assert len(fields) > 60
    assert not [f"{cls.__name__}.{f.name}" for cls, f in fields if vague(f.type)]


def named(function) -> dict:
    """The annotations of all that a function takes by name, the keys of its `**options`
    included; None where that is any name."""
    result = {}
    for p in inspect.signature(function, eval_str=True).parameters.values():
        if p.kind is not p.VAR_KEYWORD: result[p.name] = p.annotation
        elif p.annotation is Any: result[p.name] = None
        else: result |= get_type_hints(*get_args(p.annotation))
    return result


FLAGGED = sorted(
    name for name, f in PUBLIC.items() if "return_lse" in inspect.signature(f).parameters)


def test_overloads_say_what_the_functions_take():
    "Three of each, made from the signatures of today: the same names, whatever `return_lse` is."
    stubs = ast.parse((ROOT / "hilbert_attn" / "overloads.pyi").read_text()).body
    there = [node for node in stubs if isinstance(node, ast.FunctionDef)]
    assert len(FLAGGED) == 14 and sorted(node.name for node in there) == sorted(3 * FLAGGED)
    for node in there:
        own = inspect.signature(getattr(h, node.name)).parameters
        names = [a.arg for a in node.args.args + node.args.kwonlyargs]
        assert sorted(names) == sorted(own) and names[-1] == "return_lse"
    done = subprocess.run([sys.executable, ROOT / "tools" / "make_overloads.py", "--check"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_overloads_stand_in_lessons():
    for path in (ROOT / "nbs").glob("*.ipynb"):
        assert "@overload" not in path.read_text(), path.name


def test_words_of_the_interface_are_those_that_are_checked():
    "Each `Literal` holds what the code takes at run time, and nothing else."
    assert get_args(options.CurveName) == tuple(curves.CURVES)
    assert get_args(options.Mode) == patterns.DILATION_MODES
    assert get_args(options.Combine) == patterns.COMBINES
    assert get_args(options.Backend) == backends.BACKENDS
    assert get_args(options.Layout) == tuple(ring_plan.LAYOUTS)
    assert get_args(options.Placement) == PLACEMENTS


def test_stubs_stand_out_of_the_way():
    "In the notebooks of layers and settings, types of options are the last cells, folded away."
    for path in (ROOT / "nbs").glob("1[23]*.ipynb"):
        code = [
            "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
            if cell["cell_type"] == "code"]
        typed = {i for i, source in enumerate(code) if "(TypedDict" in source}
        folded = [i for i, source in enumerate(code) if "code-fold: true" in source]
        last = list(range(len(code) - len(folded), len(code)))
        assert typed <= {*folded} and folded == last, path.name


def either_settings() -> Callable:
    "All that `use_hilbert_attention` knows: the fields of both settings, and `layers`."
    def front(layers): ...
    both = named(h.HilbertSettings) | named(DiTSettings) | {"layers": Any}
    kind = inspect.Parameter.KEYWORD_ONLY
    front.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=hint) for name, hint in both.items()])
    return front


PASSED_ON = [  # what passes its options on, to what, and which of them it sets itself
    (h.HilbertAttentionCoreWithSDPA, h.HilbertAttentionCore, {"use_custom_backward", "backend"}),
    (h.HilbertDilatedAttention, h.DilatedAttention, set()),
    (h.HilbertAttentionTritonWrapper, h.HilbertDilatedAttention, set()),
    (h.DilatedSelfAttention, h.MultiheadDilatedAttention, set()),
    (h.RingDilatedAttention, h.DilatedAttention, set()),
    (h.MultiheadDilatedAttention, h.DilatedAttention, set()),
    (h.HilbertAttentionMixin.setup_hilbert, h.DilatedAttention, {"dropout"}),
    (h.RingBlockSparseAttention, h.BlockSparseAttention, set()),
    (h.RingDilatedAttentionHilbertCore, h.RingDilatedAttention, set()),
    (h.RingDilatedAttentionHilbertOptimizedFixed, h.RingDilatedAttention, set()),
    (
        h.BlockSparseRingDilatedAttentionHilbertPostPattern, h.RingBlockSparseAttention,
        {"pattern", "placement", "curve"}),
    (h.HilbertAttentionTritonWrapper.forward, h.DilatedAttention.forward, set()),
    (h.HilbertAttentionMixin.compute_hilbert_attention, h.DilatedAttention.forward, {"is_causal"}),
    (h.RingDilatedAttentionHilbertOptimizedFixed.forward, h.RingDilatedAttention.forward, set()),
    (h.RingBlockSparseAttention.block_lists, h.BlockSparseAttention.block_lists, set()),
    (h.AttentionConfig.replace, h.AttentionConfig, set()),
    (h.create_dilated_attention, h.AttentionConfig, set()),
    (h.create_multihead_dilated_attention, h.AttentionConfig, set()),
    (h.create_self_attention, h.AttentionConfig, set()),
    (h.use_hilbert_attention, either_settings(), set()),
    (h.register_hilbert_attention, h.HilbertSettings, set()),
    (h.convert_attention, h.HilbertSettings, set()),
    (h.convert_vit, h.HilbertSettings, set()), (h.use_hilbert_processor, h.HilbertSettings, set()),
    (h.hilbert_attention_kernel, attention_forward, set()),
    (h.standard_attention_kernel, attention_forward, {"order"}),
    (h.explain_backend, h.hilbert_attention, {"v", "return_lse"}),
    (h.explain_backend, h.dilated_attention, {"v", "return_lse", "cu_seqlens"}),
]


@pytest.mark.parametrize(
    "function, target, sets", PASSED_ON, ids=lambda x: getattr(x, "__qualname__", ""))
def test_options_are_those_of_the_target(function, target, sets):
    "Every option is known to the target, and each of its parameters can be given."
    (options,) = (
        p.annotation for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.kind is p.VAR_KEYWORD)
    keys, known, given = get_type_hints(*get_args(options)).keys(), named(target), named(function)
    others = set(
        named(h.hilbert_attention)
    ) | set(named(h.dilated_attention)) if function is h.explain_backend else set()
    assert keys <= known.keys() | others and not keys & sets
    assert known.keys() - {"self"} - sets <= given.keys()


def mypy(*arguments: str | Path, cwd: Path, cache: Path) -> tuple[int, str]:
    done = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--cache-dir", cache, "--no-error-summary",
            "--show-error-codes", *arguments],
        cwd=cwd, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=280)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path: return tmp_path_factory.mktemp("mypy")


def test_the_package_itself(cache): assert mypy(cwd=ROOT, cache=cache) == (0, "")


# what --strict asks of a module; of the package it asks `implicit_reexport = false` above all
STRICT = """
[[tool.mypy.overrides]]
module = ["typed_user", "mistakes"]
allow_redefinition = false
disallow_any_generics = true
disallow_incomplete_defs = true
disallow_subclassing_any = true
disallow_untyped_calls = true
disallow_untyped_decorators = true
disallow_untyped_defs = true
warn_return_any = true
"""


def strict_mypy(script: Path, cwd: Path, cache: Path) -> tuple[int, str]:
    """As a user runs it, who is strict with the script alone. All else has the settings of this
    project, so that torch, which takes most of the time, is read once."""
    config = cwd / "mypy.toml"
    config.write_text((ROOT / "pyproject.toml").read_text() + STRICT)
    options = f"--config-file={config}", "--no-warn-unused-configs"
    return mypy(*options, script, cwd=cwd, cache=cache)


def test_a_user_has_no_errors(cache, tmp_path):
    assert strict_mypy(TESTS / "typed_user.py", tmp_path, cache) == (0, "")


MISTAKES = '''
import torch
from torch import Tensor

import hilbert_attn
from hilbert_attn import (
    AttentionConfig, DilatedAttention, HilbertAttentionCore, HilbertSettings,
    MultiheadDilatedAttention, NeighborhoodPattern, RingDilatedAttention, SegmentPattern,
    WindowPattern, block_sparse_attention, create_dilated_attention, curve_order,
    dilated_attention, explain_backend, hilbert_attention, neighborhood_attention,
    ring_attention, window_attention)

def vague(x): return x  # no-untyped-def: the script itself is held to --strict

q = torch.randn(1, 2, 64, 8)
hilbert_attention(q, q, q, segment_length=16)  # call-overload: it is segment_size
hilbert_attention(q, q, q, scale="0.5")  # call-overload: no number
hilbert_attention(q, q, q, None)  # call-overload: all else goes by name
out: Tensor = hilbert_attention(q, q, q, return_lse=True)  # assignment: a pair
hilbert_attention(q, q, q, return_lse=True).shape  # attr-defined: a pair
number: float = hilbert_attention(q, q, q, return_lse=True)[1]  # assignment: a tensor
hilbert_attention(q, q, q, return_lse=bool(q.any())).shape  # union-attr: perhaps a pair
dilated_attention(q, q, q, 16)  # call-overload: no rates
dilated_attention(q, q, q, [16], [1], segment_size=16)  # call-overload: of one branch
window_attention(q, q, q, (8, 8), 4, causal=True)  # call-overload: windows have no causality
neighborhood_attention(q, q, q, (8, 8), 3, causal="yes")  # arg-type: no bool
block_sparse_attention(q, q, q, SegmentPattern(64, 16))  # call-overload: a mask or lists
ring_attention(q, q, q, dropout_p=0.1)  # call-overload: a ring has no dropout
explain_backend((1, 2, 64, 8), return_lse=True)  # call-arg: it explains either
HilbertAttentionCore(dim=32, head=4)  # call-arg: it is heads
DilatedAttention([16], [1], curve=3)  # arg-type: no name
MultiheadDilatedAttention(32, 4, kernel=3)  # call-arg: unknown
RingDilatedAttention([16], [1], sizes=(3, 4))  # call-arg: unknown
AttentionConfig(dims=32)  # call-arg: it is dim
AttentionConfig(dilation_mode="longnets")  # arg-type: no such mode
DilatedAttention([16], [1], combine="sum")  # arg-type: no such way
MultiheadDilatedAttention(32, 4, backend="tritn")  # arg-type: misspelt
HilbertAttentionCore(32, 4, dilation_mode="both")  # arg-type: no such mode
create_dilated_attention("hilbert", ring="2")  # call-arg: it is ring_size
HilbertSettings(segment_size="16")  # arg-type: no number
WindowPattern((8, 8), "4")  # arg-type: no number, though a sequence
NeighborhoodPattern((8, 8), 3).pairs().shape  # attr-defined: a number
curve_order("8")  # arg-type: no grid
hilbert_attn.hilbert_atention(q, q, q)  # attr-defined: misspelt
'''


def test_mistakes_are_found(cache, tmp_path):
    "Each of them, and on no other line; with the error that is meant."
    (script := tmp_path / "mistakes.py").write_text(MISTAKES)
    code, said = strict_mypy(script, tmp_path, cache)
    found = {
        int(line): kind
        for line, kind in re.findall(r"^mistakes\.py:(\d+): error: .*\[([a-z-]+)\]$", said, re.M)}
    assert code == 1 and found == {
        i: kind[1] for i, line in enumerate(MISTAKES.splitlines(), 1)
        if (kind := re.search(r"  # ([a-z-]+): ", line))}, said


def test_what_is_typed_runs():
    subprocess.run(
        [sys.executable, "-c", "import typed_user; typed_user.tour()"], cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=True,
        capture_output=True, timeout=120)
