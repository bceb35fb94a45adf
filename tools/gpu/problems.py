"""A case as tensors and as functions of q, k and v, on a GPU, a CPU, or nowhere at all."""
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hilbert_attn.bench.gpu_model import Blocks
from hilbert_attn.blocks.lists import lists_from_block_mask
from hilbert_attn.blocks.planner import block_lists
from hilbert_attn.curves import curve_order
from hilbert_attn.kernels import backward, forward, steps, tuning
from hilbert_attn.kernels import block_sparse as blocks
from hilbert_attn.patterns import (
    NeighborhoodPattern,
    SegmentPattern,
    SlidePattern,
    TilesSharedPattern,
    WindowPattern,
    attention_mask,
)

PATTERNS = dict(window=WindowPattern, neighborhood=NeighborhoodPattern, slide=SlidePattern,
                tiles_shared=TilesSharedPattern, segment=SegmentPattern)
DRY = steps.interpreted


def device() -> str: return "cuda" if torch.cuda.is_available() and not DRY else "cpu"


@dataclass
class Problem:
    "Tensors, and the two launchers with everything but tensors filled in."
    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, H_kv, M, D)
    v: Tensor  # (B, H_kv, M, D)
    forward: Callable  # of q, k, v: out and LSE
    backward: Callable  # of q, k, v, out, lse, dout, dlse: dq, dk and dv
    mask: Callable[[], Tensor]  # bool, (heads or 1, N, M)
    pairs: int  # attended, of all heads; 0 where nobody asks

    def attend(self, *x: Tensor) -> tuple[Tensor, Tensor]: return Attend.apply(*x, self)

    def launch(self) -> None:
        "Forward and backward once, results unused."
        out, lse = self.forward(self.q, self.k, self.v)
        self.backward(self.q, self.k, self.v, out, lse, out, None)


class Attend(torch.autograd.Function):
    "The launchers as one differentiable function."
    @staticmethod
    def forward(ctx: Any, q, k, v, problem: Problem):
        out, lse = problem.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None: dout = torch.zeros_like(out)
        return *ctx.problem.backward(q, k, v, out, lse, dout, dlse), None


def forced_tile(case: dict):
    "The tile that a case asks for: of the forward, and of the backward kernels."
    if "tile" not in case: return None, None
    tile = tuning.Tile(*case["tile"])
    return (tile, None) if case["kernel"] == "forward" else (None, {case["kernel"]: tile})


def is_small(case: dict) -> bool:
    "Whether one program does the whole backward of a group."
    if "tile" in case: return False
    same, keys = case.get("mode") != "keys" or case["r"] == 1, -(-case["w"] // case["r"])
    dtype, dropout = getattr(torch, case.get("dtype", "bfloat16")), bool(case.get("dropout"))
    return backward.fit_small(keys, same, case["d"], dtype, (9, 0), dropout) is not None


# ---- small problems, to be checked

def _randn(case: dict, n: int, m: int, where: str) -> list[Tensor]:
    dtype = getattr(torch, case["dtype"])
    shapes = [(1, h, rows, case["d"]) for h, rows in
              ((case["heads"], n), (case["kv_heads"], m), (case["kv_heads"], m))]
    if where == "meta": return [torch.empty(s, dtype=dtype, device="meta") for s in shapes]
    generator = torch.Generator().manual_seed(n * case["d"])
    return [torch.randn(s, generator=generator).to(where, dtype) for s in shapes]


def _settings(case: dict, m: int, where: str) -> dict:
    "Key mask, dropout and its seed."
    generator = torch.Generator().manual_seed(m)
    kept = (torch.rand(1, m, generator=generator) < 0.7).to(where) if case["masked"] else None
    seed = torch.tensor([11]).to(where) if "dropout" in case else None
    return dict(key_mask=kept, dropout_p=case.get("dropout", 0.0), seed=seed)


def segment_problem(case: dict, where: str) -> Problem:
    n, (tile, tiles) = case["n"], forced_tile(case)
    pattern = SegmentPattern.for_heads(n, case["heads"], case["w"], case["r"], case["mode"])
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    order = shuffled.to(where) if case["order"] else None
    settings = _settings(case, n, where)
    options = settings | dict(order=order, causal=case["causal"])
    fields = pattern.segment_size, pattern.dilation_rate, pattern.mode, pattern.offsets

    def run(q, k, v):
        return forward.attention_forward(q, k, v, *fields, **options, tile=tile)

    def differentiate(*x):
        return backward.attention_backward(*x, *fields, **options, tiles=tiles)

    def mask():
        traits = dict(order=order, causal=case["causal"], key_mask=settings["key_mask"])
        return attention_mask(pattern, **traits, device=where)

    return Problem(*_randn(case, n, n, where), run, differentiate, mask, 0)


def tokens_of(arguments: list) -> int:
    return math.prod(arguments[0]) if isinstance(arguments[0], list) else arguments[0]


def pattern_of(spec: list):
    name, *arguments = spec
    frozen = [tuple(x) if isinstance(x, list) else x for x in arguments]
    return PATTERNS[name](*frozen)


def _random_lists(case: dict, n: int):
    m, block = n + case["registers"], tuple(case["block"])
    generator = torch.Generator().manual_seed(n)
    shape = 1, case["heads"], -(-n // block[0]), -(-m // block[1])
    order = curve_order(n, case["curve"]) if case["curve"] else None
    kept = torch.rand(shape, generator=generator) < 0.5
    lists = lists_from_block_mask(kept, n, m, block, order=order, causal=case["causal"])
    return lists, lists.mask


def _pattern_lists(case: dict, n: int):
    pattern, registers = pattern_of(case["pattern"]), case["registers"]
    grid = getattr(pattern, "grid", n - getattr(pattern, "shared", 0))
    order = curve_order(grid, case["curve"]) if case["curve"] else None
    lists = block_lists(pattern, order=order, block_size=tuple(case["block"]),
                        causal=case["causal"], registers=registers)

    def mask():
        seen = pattern.mask(order)
        if case["causal"]: seen = seen & torch.ones(n, n, dtype=torch.bool).tril()
        return F.pad(seen, (0, registers), value=True)

    return lists, mask


def block_problem(case: dict, where: str) -> Problem:
    n, (tile, tiles) = tokens_of(case["pattern"][1:]), forced_tile(case)
    plan = _random_lists if case["pattern"][0] == "random" else _pattern_lists
    lists, mask = plan(case, n)
    m = n + case["registers"]
    settings = _settings(case, m, where)
    if where != "meta": lists = lists.to(where)

    def run(q, k, v):
        return blocks.block_attention_forward(q, k, v, lists, **settings, tile=tile)

    def differentiate(*x):
        return blocks.block_attention_backward(*x, lists, **settings, tiles=tiles)

    def masked():
        seen, kept = mask().to(where), settings["key_mask"]
        return seen if kept is None else seen & kept[:, None, None]

    return Problem(*_randn(case, n, m, where), run, differentiate, masked, 0)


def small_problem(case: dict, where: str | None = None) -> Problem:
    build = block_problem if "pattern" in case else segment_problem
    return build(case, where or device())


# ---- large problems, to be timed

def around_centre(side: int) -> Tensor:
    """The Hilbert order of an image without its centre, a square of a quarter of the side, for
    tokens that lie row by row."""
    cells = torch.arange(side * side)
    y, x = cells // side - side * 3 // 8, cells % side - side * 3 // 8
    outside = (torch.minimum(y, x) < 0) | (torch.maximum(y, x) >= side // 4)
    order = curve_order((side, side))
    return (outside.cumsum(0) - 1)[order[outside[order]]]


def order_of(case: dict) -> Tensor | None:
    if "pattern" not in case: return curve_order(case["n"]) if case["order"] else None
    if "around" in case: return around_centre(case["around"])
    if not case["curve"]: return None
    return curve_order(tuple(case.get("grid", [case["n"]])), case["curve"])


@lru_cache(maxsize=16)
def _planned(spec: str):
    "On a CPU; the largest take seconds."
    case = json.loads(spec)
    return block_lists(pattern_of(case["pattern"]), order=order_of(case),
                       block_size=tuple(case["block"]))


@lru_cache(maxsize=2)
def _lists(spec: str, where: str): return _planned(spec).to(where)


def lists_of(case: dict, where: str):
    "The block lists of a case; the newest two are remembered."
    names = ("pattern", "n", "curve", "grid", "around", "block")
    spec = {name: case[name] for name in names if name in case}
    return _lists(json.dumps(spec), "cpu" if where == "meta" else where)


def walked(case: dict) -> dict:
    "What the kernels visit, as numbers."
    lists = lists_of(case, device())
    return asdict(Blocks.of(lists, case["h"])) | dict(order=lists.k_tokens is not None)


def tensors(case: dict, where: str) -> list[Tensor]:
    "q, k and v of bfloat16; float32 in the dry run."
    torch.manual_seed(0)
    dtype = torch.float32 if DRY else torch.bfloat16
    shapes = [(1, h, case["n"], case["d"]) for h in (case["h"], case["kv"], case["kv"])]
    if where == "meta": return [torch.empty(s, dtype=dtype, device="meta") for s in shapes]
    return [torch.randn(s, device=where, dtype=dtype) for s in shapes]


def pairs_of(pattern, case: dict, where: str) -> int:
    "Attended pairs of all heads; 0 where nothing is computed."
    return 0 if where == "meta" else pattern.pairs(case["h"])


def large_problem(case: dict, where: str | None = None) -> Problem:
    where = where or device()
    x = tensors(case, where)
    if "pattern" in case:
        lists, pattern = lists_of(case, where), pattern_of(case["pattern"])
        return Problem(
            *x, lambda *x: blocks.block_attention_forward(*x, lists),
            lambda *x: blocks.block_attention_backward(*x, lists), lists.mask,
            pairs_of(pattern, case, where))
    order = order_of(case)
    pattern = SegmentPattern(case["n"], case["w"], case["r"])
    options = dict(order=None if order is None else order.to(where), causal=case["causal"])
    fields = case["w"], case["r"]
    pairs = pairs_of(pattern, case, where) // (2 if case["causal"] else 1)
    return Problem(
        *x, lambda *x: forward.attention_forward(*x, *fields, **options),
        lambda *x: backward.attention_backward(*x, *fields, **options),
        lambda: attention_mask(pattern, **options, device=where), pairs)
