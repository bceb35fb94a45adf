"""Windows, neighbourhoods, slides and tiles on this CPU, beside SDPA and FlexAttention.

`python tools/bench_local.py`: every contender computes the same function on the same tensors, takes
turns with the others, and is checked before it is timed. The run is appended to
`nbs/results/<machine>/local.json`. `--quick` takes toy sizes and writes nothing unless `--out`
names a folder. FlexAttention needs a C++ compiler; without one it is left out, and the run says so.
"""
import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hilbert_attn.bench.contenders import (
    DENSE,
    MASKED,
    MATMUL,
    OURS,
    Candidate,
    check_exact,
    random_inputs,
)
from hilbert_attn.bench.machine import (
    FLOPS_PER_PAIR,
    environment,
    machine_limits,
    matmul_call,
    peak_memory,
)
from hilbert_attn.bench.measuring import measure
from hilbert_attn.bench.results import save_run, target
from hilbert_attn.curves import curve_order, inverse_order
from hilbert_attn.local import (
    hilbert_slide_attention,
    hilbert_window_attention,
    neighborhood_attention,
    tiles_shared_attention,
    window_attention,
)
from hilbert_attn.patterns import (
    NeighborhoodPattern,
    SegmentPattern,
    SlidePattern,
    TilesSharedPattern,
    WindowPattern,
)

CONFIG = dict(
    batch=1,
    heads=8,
    grid=[64, 64],
    head_dim=64,
    dtype="float32",
    repeats=9,
    sweep_sides=[8, 16, 32, 64],
    sweep_kernel=7,
    memory_grid=[128, 128],
    memory_kernel=13,
)
QUICK = CONFIG | dict(
    heads=2, grid=[16, 16], repeats=3, sweep_sides=[8, 16], memory_grid=[32, 32],
)
FLEX, FLEX_HILBERT = "FlexAttention, compiled", "FlexAttention, compiled, Hilbert order"
TILES = 16


@dataclass(frozen=True)
class Case:
    "One function at one setting."
    name: str
    attention: Callable # attention(q, k, v) -> out
    pattern: Any
    order: Tensor | None # that the pattern is defined with
    layout: Tensor # int64 (N,): tokens along the curve, for FlexAttention
    place: Tensor # int64 (N, axes): what FlexAttention's mask looks at
    rule: Callable # rule(q_place, k_place) -> bool, on lists of scalars, one per axis


def coordinates(grid):
    "int64 (N, 2)."
    return torch.stack(torch.unravel_index(torch.arange(prod(grid)), grid), 1)


def neighborhood(grid, k, d=1) -> Case:
    "Exact neighbours on the grid."
    def rule(q, key):
        inside = True
        for x, y, length in zip(q, key, grid):
            members = (length - x % d + d - 1) // d
            first = torch.clamp(x // d - k // 2, min=0)
            start = torch.minimum(first, members - k)
            near = (y // d >= start) & (y // d < start + k)
            inside = inside & (y % d == x % d) & near
        return inside

    sizes = dict(grid=grid, kernel_size=k, dilation=d)
    attention = partial(neighborhood_attention, **sizes, backend="sdpa")
    name = f"neighborhood {k} x {k}" + (f", dilation {d}" if d > 1 else "")
    pattern, order = NeighborhoodPattern(grid, k, d), curve_order(grid)
    return Case(name, attention, pattern, None, order, coordinates(grid), rule)


def window(grid) -> Case:
    "Shifted boxes of the grid."
    w, s = grid[0] // 4, grid[0] // 8

    def box(x):
        return (x - s + w) // w

    def rule(q, key):
        return (box(q[0]) == box(key[0])) & (box(q[1]) == box(key[1]))

    attention = partial(window_attention, grid=grid, window=w, shift=s, backend="sdpa")
    name, order = f"window {w} x {w}, shift {s}", curve_order(grid)
    return Case(name, attention, WindowPattern(grid, w, s), None, order, coordinates(grid), rule)


def stretch(grid) -> Case:
    "Windows of positions."
    n = prod(grid)
    w, order = n // 16, curve_order(grid)
    attention = partial(hilbert_window_attention, grid=grid, window=w, backend="sdpa")
    position = inverse_order(order)[:, None]

    def rule(q, key):
        return q[0] // w == key[0] // w

    pattern = SegmentPattern(n, w)
    return Case(f"hilbert_window {w}", attention, pattern, order, order, position, rule)


def slide(grid) -> Case:
    "Positions nearby."
    n = prod(grid)
    w, order = n // 16, curve_order(grid)
    attention = partial(hilbert_slide_attention, grid=grid, window=w, backend="sdpa")
    position = inverse_order(order)[:, None]

    def rule(q, key):
        return (q[0] - key[0]).abs() <= w // 2

    pattern = SlidePattern(n, w)
    return Case(f"hilbert_slide {w}", attention, pattern, order, order, position, rule)


def shared_tiles(grid) -> Case:
    "Tiles of positions, and tokens shared by all."
    n, (rows, columns) = prod(grid), grid
    shared = n // 64
    rest = (rows - 1, columns) if columns == shared else (n - shared,)
    order = curve_order(rest)
    pattern, tile = TilesSharedPattern(n, TILES, 0, shared), torch.full((n,), -1)
    if (n - shared) % TILES == 0:
        tile[shared:] = inverse_order(order) * TILES // (n - shared)
    else:
        tile[shared:] = pattern.mask(order)[0, shared:, shared:].int().argmax(1)
    sizes = dict(tiles=TILES, shared=shared, grid=rest)
    attention = partial(tiles_shared_attention, **sizes, backend="sdpa")
    layout = torch.cat([torch.arange(shared), shared + order])

    def rule(q, key):
        return (q[0] == key[0]) | (q[0] == -1) | (key[0] == -1)

    name = f"tiles_shared, {TILES} tiles, {shared} shared"
    return Case(name, attention, pattern, order, layout, tile[:, None], rule)


def cases(grid: tuple[int, int]) -> list[Case]:
    "Kernels that fit the grid, and one of each pattern."
    kernels = [(13, 1), (7, 1), (7, 2), (3, 1)]
    others = [window(grid), stretch(grid), slide(grid), shared_tiles(grid)]
    return [neighborhood(grid, k, d) for k, d in kernels] + others


def flex(case: Case, n: int, order: Tensor | None = None):
    "Compiled FlexAttention; `order` lays tokens out before and after, in its time."
    places = case.place if order is None else case.place[order]
    place = [p.contiguous() for p in places.unbind(1)]

    def mask(b, h, i, j):
        return case.rule([p[i] for p in place], [p[j] for p in place])

    blocks = create_block_mask(mask, None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def plain(q, k, v):
        return compiled(q, k, v, block_mask=blocks)

    if order is None:
        return plain, blocks
    rank = inverse_order(order)

    def ordered(q, k, v):
        return plain(*(x[:, :, order] for x in (q, k, v)))[:, :, rank]

    return ordered, blocks


def memory_call(
    grid: list[int], kernel: int, heads: int, head_dim: int, backward: bool, small: bool = False,
):
    "For `peak_memory`: neighbourhood attention on fresh tensors."
    if small:
        grid = [16, 16]
    shape = 1, heads, prod(grid), head_dim
    x = [torch.randn(shape).requires_grad_(backward) for _ in range(3)]
    dout = torch.randn(shape)

    def call():
        out = neighborhood_attention(*x, tuple(grid), kernel, backend="sdpa")
        return torch.autograd.grad(out, x, dout) if backward else out

    return call


@dataclass(frozen=True)
class Group:
    "Calls to time together."
    about: dict
    calls: dict[str, Callable]
    blocks: dict[str, float] # share of blocks that FlexAttention computes, by contender


def flex_candidates(case: Case, first: bool, masked: Candidate, qkv) -> dict:
    "name -> (candidate, share of blocks), each held against SDPA with the mask."
    orders = {FLEX: None}
    if first or case.order is not None:
        orders[FLEX_HILBERT] = case.layout
    found, n = {}, qkv[0].shape[2]
    with torch.no_grad():
        right = masked.attention(*qkv)
        for name, order in orders.items():
            call, lists = flex(case, n, order)
            error = (call(*qkv) - right).abs().max().item()
            if error > 1e-5:
                wrong = f"{name} computes something else for {case.name}"
                raise AssertionError(f"{wrong}: off by {error}")
            candidate = Candidate(name, call, masked.mask, masked.pairs)
            found[name] = candidate, 1 - lists.sparsity() / 100
    return found


def groups_of(case: Case, contenders: list[Candidate], blocks: dict, inputs: tuple) -> list[Group]:
    "Both directions; FlexAttention has no backward on a CPU."
    pairs, head_dim, groups = contenders[0].pairs, inputs[0][0].shape[3], []
    for direction, factor in FLOPS_PER_PAIR.items():
        calls = {MATMUL: matmul_call(factor * head_dim * pairs)}
        for c in contenders:
            if direction == "forward":
                calls[c.name] = torch.no_grad()(c.call(direction, inputs))
            elif c.name not in (FLEX, FLEX_HILBERT):
                calls[c.name] = c.call(direction, inputs)
        about = dict(case=case.name, direction=direction, pairs=pairs)
        groups.append(Group(about | dict(density=case.pattern.density), calls, blocks))
    return groups


def smaller_grid(config: dict, side: int, inputs: tuple) -> Group:
    "A neighbourhood where everything is cheap."
    grid, kernel = (side, side), config["sweep_kernel"]
    pattern = NeighborhoodPattern(grid, kernel)
    x, mask = [t[:, :, :side * side].clone() for t in inputs[0]], pattern.mask()[None]
    calls = {
        MASKED: lambda: F.scaled_dot_product_attention(*x, mask),
        DENSE: lambda: F.scaled_dot_product_attention(*x),
        OURS: lambda: neighborhood_attention(*x, grid, kernel, backend="sdpa"),
    }
    pairs = config["batch"] * pattern.pairs(config["heads"])
    return Group(dict(case="sweep", direction="forward", side=side, pairs=pairs), calls, {})


def masked_sdpa(mask):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)


def prepare(config: dict) -> tuple[list[Group], dict, str | None]:
    "Builds, compiles and checks all contenders; why there is no FlexAttention."
    torch.manual_seed(0)
    torch._dynamo.config.cache_size_limit = 64
    grid, heads = tuple(config["grid"]), config["heads"]
    shape = config["batch"], heads, prod(grid), config["head_dim"]
    inputs = random_inputs(shape)
    groups, checks, without_flex = [], {}, None
    for i, case in enumerate(cases(grid)):
        mask = case.pattern.mask(case.order)[None]
        pairs = config["batch"] * case.pattern.pairs(heads)
        ours = Candidate(OURS, case.attention, mask, pairs)
        masked = Candidate(MASKED, masked_sdpa(mask), mask, pairs)
        checks[case.name] = check_exact(ours, *inputs[0], heads=[0]).errors
        compiled: dict = {}
        try:
            compiled = flex_candidates(case, i == 0, masked, inputs[0])
        except RuntimeError as e:
            without_flex = str(e).splitlines()[0]
        contenders = [masked, ours, *(candidate for candidate, _ in compiled.values())]
        blocks = {name: share for name, (_, share) in compiled.items()}
        groups += groups_of(case, contenders, blocks, inputs)
    groups += [smaller_grid(config, side, inputs) for side in config["sweep_sides"]]
    return groups, checks, without_flex


def rows_of(group: Group, repeats: int) -> list[dict]:
    "What the clock said."
    about, rows = group.about, []
    print(about["case"], about["direction"], about.get("side", ""), flush=True)
    for name, t in measure(group.calls, repeats).items():
        times = dict(median=t.median, p20=t.p20, p80=t.p80, repeats=t.repeats)
        row = dict(name=name, **about, **times)
        if name in group.blocks:
            row["blocks"] = group.blocks[name]
        rows.append(row)
    return rows


def memory_row(config: dict, backward: bool) -> dict:
    "Peak memory of a large neighbourhood."
    sizes = dict(heads=config["heads"], head_dim=config["head_dim"])
    options = dict(grid=config["memory_grid"], kernel=config["memory_kernel"], **sizes)
    peak = peak_memory("bench_local:memory_call", backward=backward, **options)
    tokens = prod(config["memory_grid"])
    inputs = 3 * 4 * tokens * prod(sizes.values())
    return dict(backward=backward, tokens=tokens, qkv_bytes=inputs, peak_extra_bytes=peak)


def run_suite(config: dict, quick: bool) -> dict: # the run, JSON-ready
    "Checks, times and measures memory."
    groups, checks, without_flex = prepare(config)
    limits, rows, sweep = machine_limits(), [], []
    for group in groups:
        found = rows_of(group, config["repeats"])
        if group.about["case"] == "sweep":
            sweep += found
        else:
            rows += found
    memory = [memory_row(config, backward) for backward in (False, True)]
    run = dict(suite="local", quick=quick, config=config, environment=environment())
    run |= dict(limits=limits, checks=checks, rows=rows, sweep=sweep, memory=memory)
    return run | ({"without_flex": without_flex} if without_flex else {})


def targets(run: dict) -> list[dict]: # what, measured, target, met
    "What neighbourhoods of 13 x 13 are meant to reach, and what they reached."
    mine = [row for row in run["rows"] if row["case"] == "neighborhood 13 x 13"]
    times = {(row["name"], row["direction"]): row["median"] for row in mine}
    found = []
    if (FLEX, "forward") in times:
        ratio = times[FLEX, "forward"] / times[OURS, "forward"]
        found.append(target("forward, times faster than compiled FlexAttention", ratio, 3))
    both = "forward+backward"
    ratio = times[MASKED, both] / times[OURS, both]
    found.append(target(f"{both}, times faster than masked SDPA", ratio, 6))
    for row in run["memory"]:
        direction = both if row["backward"] else "forward"
        what = f"{row['tokens']:,} tokens, {direction}, peak extra memory (GB)"
        found.append(target(what, row["peak_extra_bytes"] / 1e9, 1, at_least=False))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--out", help="folder of results instead of nbs/results")
    args = parser.parse_args()
    run = run_suite(QUICK if args.quick else CONFIG, args.quick)
    if args.out or not args.quick:
        print(save_run(run, args.out))
    for row in run["rows"]:
        about = f"{row['case']:36} {row['direction']:17} {row['name']:40}"
        print(f"{about} {1e3 * row['median']:9.2f} ms")
    print(json.dumps(targets(run), indent=1))


if __name__ == "__main__":
    main()
