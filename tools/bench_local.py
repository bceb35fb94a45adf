"""Windows, neighbourhoods, slides and tiles on this CPU, against SDPA with the same mask and compiled FlexAttention: `python tools/bench_local.py`.

Every contender computes the same function on the same tensors, takes turns with the others, and is checked before it is timed. The run is appended to `nbs/results/<machine>/local.json`.
`--quick` takes toy sizes and writes nothing unless `--out` names a folder. FlexAttention needs a C++ compiler; without one it is left out, and the run says so.
"""
import argparse
import json
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hilbert_attn import bench
from hilbert_attn.bench import FLOPS_PER_PAIR, MASKED, MATMUL, Candidate, check_exact, environment, machine_limits, measure, peak_memory, save_run
from hilbert_attn.curves import curve_order, inverse_order
from hilbert_attn.local import hilbert_slide_attention, hilbert_window_attention, neighborhood_attention, tiles_shared_attention, window_attention
from hilbert_attn.patterns import NeighborhoodPattern, SegmentPattern, SlidePattern, TilesSharedPattern, WindowPattern

CONFIG = dict(batch=1, heads=8, grid=[64, 64], head_dim=64, dtype="float32", repeats=9, sweep_sides=[8, 16, 32, 64], sweep_kernel=7, memory_grid=[128, 128], memory_kernel=13)
QUICK = CONFIG | dict(heads=2, grid=[16, 16], repeats=3, sweep_sides=[8, 16], memory_grid=[32, 32])
OURS, FLEX, FLEX_HILBERT, DENSE = "sdpa", "FlexAttention, compiled", "FlexAttention, compiled, Hilbert order", "dense SDPA"


@dataclass(frozen=True)
class Case:
    "One function at one setting."
    name: str
    attention: object # attention(q, k, v) -> out
    pattern: object
    order: Tensor | None # that the pattern is defined with
    layout: Tensor # int64 (N,): tokens along the curve, for FlexAttention
    place: Tensor # int64 (N, axes): what FlexAttention's mask looks at
    rule: object # rule(q_place, k_place) -> bool, on lists of scalars, one per axis


def cases(grid: tuple[int, int]) -> list[Case]:
    "Kernels that fit the grid, and one of each pattern."
    n, (H, W) = prod(grid), grid
    yx = torch.stack(torch.unravel_index(torch.arange(n), grid), 1)
    order = curve_order(grid)
    position = inverse_order(order)[:, None]
    shared, tiles = n // 64, 16
    rest = (H - 1, W) if W == shared else (n - shared,)

    def neighborhood(k, d=1):
        def rule(q, key):
            inside = True
            for x, y, length in zip(q, key, grid):
                members = (length - x % d + d - 1) // d
                start = torch.minimum(torch.clamp(x // d - k // 2, min=0), members - k)
                inside = inside & (y % d == x % d) & (y // d >= start) & (y // d < start + k)
            return inside
        def attention(q, key, v): return neighborhood_attention(q, key, v, grid, k, dilation=d, backend="sdpa")
        return Case(f"neighborhood {k} x {k}" + (f", dilation {d}" if d > 1 else ""), attention, NeighborhoodPattern(grid, k, d), None, order, yx, rule)

    w, s = H // 4, H // 8
    def window_rule(q, key): return ((q[0] - s + w) // w == (key[0] - s + w) // w) & ((q[1] - s + w) // w == (key[1] - s + w) // w)
    stretch = n // 16
    tile_order = curve_order(rest)
    tile = torch.full((n,), -1)
    tile[shared:] = (inverse_order(tile_order) * tiles // (n - shared)) if (n - shared) % tiles == 0 else TilesSharedPattern(n, tiles, 0, shared).mask(tile_order)[0, shared:, shared:].int().argmax(1)
    return [neighborhood(13), neighborhood(7), neighborhood(7, 2), neighborhood(3),
            Case(f"window {w} x {w}, shift {s}", lambda q, k, v: window_attention(q, k, v, grid, w, shift=s, backend="sdpa"), WindowPattern(grid, w, s), None, order, yx, window_rule),
            Case(f"hilbert_window {stretch}", lambda q, k, v: hilbert_window_attention(q, k, v, grid, stretch, backend="sdpa"), SegmentPattern(n, stretch), order, order, position, lambda q, k: q[0] // stretch == k[0] // stretch),
            Case(f"hilbert_slide {stretch}", lambda q, k, v: hilbert_slide_attention(q, k, v, grid, stretch, backend="sdpa"), SlidePattern(n, stretch), order, order, position, lambda q, k: (q[0] - k[0]).abs() <= stretch // 2),
            Case(f"tiles_shared, {tiles} tiles, {shared} shared", lambda q, k, v: tiles_shared_attention(q, k, v, tiles=tiles, shared=shared, grid=rest, backend="sdpa"), TilesSharedPattern(n, tiles, 0, shared), tile_order,
                 torch.cat([torch.arange(shared), shared + tile_order]), tile[:, None], lambda q, k: (q[0] == k[0]) | (q[0] == -1) | (k[0] == -1))]


def flex(case: Case, n: int, order: Tensor | None = None):
    "Compiled FlexAttention with the mask of a case; `order` lays tokens out before and after, in its time."
    place = (case.place if order is None else case.place[order]).unbind(1)
    place = [p.contiguous() for p in place]
    def mask(b, h, i, j): return case.rule([p[i] for p in place], [p[j] for p in place])
    blocks = create_block_mask(mask, None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    if order is None: return lambda q, k, v: compiled(q, k, v, block_mask=blocks), blocks
    rank = inverse_order(order)
    return lambda q, k, v: compiled(*(x[:, :, order] for x in (q, k, v)), block_mask=blocks)[:, :, rank], blocks


def memory_call(grid: list[int], kernel: int, heads: int, head_dim: int, backward: bool, small: bool = False):
    "For `peak_memory`: neighbourhood attention on fresh tensors."
    if small: grid = [16, 16]
    x = [torch.randn(1, heads, prod(grid), head_dim).requires_grad_(backward) for _ in range(3)]
    dout = torch.randn(1, heads, prod(grid), head_dim)
    def call():
        out = neighborhood_attention(*x, tuple(grid), kernel, backend="sdpa")
        return torch.autograd.grad(out, x, dout) if backward else out
    return call


def prepare(config: dict) -> tuple[list, dict, str | None]: # groups of calls to time together, checks, why there is no FlexAttention
    "Builds, compiles and checks all contenders."
    torch.manual_seed(0)
    torch._dynamo.config.cache_size_limit = 64
    grid, heads, D = tuple(config["grid"]), config["heads"], config["head_dim"]
    n = prod(grid)
    q, k, v, dout = (torch.randn(config["batch"], heads, n, D) for _ in range(4))
    dlse, generator = torch.zeros(config["batch"], heads, n), torch.Generator().manual_seed(0)
    groups, checks, without_flex = [], {}, None
    for i, case in enumerate(cases(grid)):
        mask = case.pattern.mask(case.order)[None]
        pairs = config["batch"] * case.pattern.pairs(heads)
        ours = Candidate(OURS, case.attention, mask, pairs)
        masked = Candidate(MASKED, lambda q, k, v, mask=mask: F.scaled_dot_product_attention(q, k, v, mask), mask, pairs)
        checks[case.name] = check_exact(ours, q, k, v, [0]).errors
        contenders, blocks = [masked, ours], {}
        try:
            with torch.no_grad():
                right = masked.attention(q, k, v)
                for name, order in ((FLEX, None), (FLEX_HILBERT, case.layout))[:2 if i == 0 or case.order is not None else 1]:
                    call, lists = flex(case, n, order)
                    error = (call(q, k, v) - right).abs().max().item()
                    if error > 1e-5: raise AssertionError(f"{name} computes something else for {case.name}: off by {error}")
                    blocks[name] = 1 - lists.sparsity() / 100
                    contenders.append(Candidate(name, call, mask, pairs))
        except RuntimeError as e: without_flex = str(e).splitlines()[0]
        for direction, factor in FLOPS_PER_PAIR.items():
            calls = {MATMUL: bench._matmul_call(factor * D * pairs, generator)}
            for c in contenders:
                if direction == "forward": calls[c.name] = torch.no_grad()(c.forward(q, k, v))
                elif not c.name.startswith("FlexAttention"): calls[c.name] = c.backward(q, k, v, dout, dlse)
            groups.append((dict(case=case.name, direction=direction, pairs=pairs, density=case.pattern.density), calls, blocks))
    for side in config["sweep_sides"]:
        pattern = NeighborhoodPattern((side, side), config["sweep_kernel"])
        small, mask = [x[:, :, :side * side].clone() for x in (q, k, v)], pattern.mask()[None]
        calls = {MASKED: lambda x=small, m=mask: F.scaled_dot_product_attention(*x, m), DENSE: lambda x=small: F.scaled_dot_product_attention(*x),
                 OURS: lambda x=small, side=side: neighborhood_attention(*x, (side, side), config["sweep_kernel"], backend="sdpa")}
        groups.append((dict(case="sweep", direction="forward", side=side, pairs=config["batch"] * pattern.pairs(heads)), calls, {}))
    return groups, checks, without_flex


def run_suite(config: dict, quick: bool) -> dict: # the run, JSON-ready
    "Checks, times and measures memory."
    groups, checks, without_flex = prepare(config)
    rows, sweep = [], []
    limits = machine_limits()
    for about, calls, blocks in groups:
        print(about["case"], about["direction"], about.get("side", ""), flush=True)
        measured = measure(calls, config["repeats"])
        for name, t in measured.items():
            row = dict(name=name, **about, median=t.median, p20=t.p20, p80=t.p80, repeats=t.repeats) | ({"blocks": blocks[name]} if name in blocks else {})
            (sweep if about["case"] == "sweep" else rows).append(row)
    memory = [dict(backward=backward, tokens=prod(config["memory_grid"]), qkv_bytes=3 * 4 * config["heads"] * config["head_dim"] * prod(config["memory_grid"]),
                   peak_extra_bytes=peak_memory("bench_local:memory_call", grid=config["memory_grid"], kernel=config["memory_kernel"], heads=config["heads"], head_dim=config["head_dim"], backward=backward))
              for backward in (False, True)]
    return dict(suite="local", quick=quick, config=config, environment=environment(), limits=limits, checks=checks, rows=rows, sweep=sweep, memory=memory) | ({"without_flex": without_flex} if without_flex else {})


def targets(run: dict) -> list[dict]: # what, measured, target, met
    "What neighbourhoods of 13 x 13 are meant to reach, and what they reached."
    ms = {(r["name"], r["direction"]): r["median"] for r in run["rows"] if r["case"] == "neighborhood 13 x 13"}
    found = []
    def add(what, value, target, met): found.append(dict(what=what, measured=value, target=target, met=met))
    if (FLEX, "forward") in ms: add("forward, times faster than compiled FlexAttention", x := ms[FLEX, "forward"] / ms[OURS, "forward"], ">= 3", x >= 3)
    add("forward+backward, times faster than masked SDPA", x := ms[MASKED, "forward+backward"] / ms[OURS, "forward+backward"], ">= 6", x >= 6)
    for row in run["memory"]: add(f"{row['tokens']:,} tokens, {'forward+backward' if row['backward'] else 'forward'}, peak extra memory (GB)", x := row["peak_extra_bytes"] / 1e9, "<= 1", x <= 1)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--out", help="folder of results instead of nbs/results")
    args = parser.parse_args()
    run = run_suite(QUICK if args.quick else CONFIG, args.quick)
    if args.out or not args.quick: print(save_run(run, args.out))
    for row in run["rows"]: print(f"{row['case']:36} {row['direction']:17} {row['name']:40} {1e3 * row['median']:9.2f} ms")
    print(json.dumps(targets(run), indent=1))


if __name__ == "__main__": main()
