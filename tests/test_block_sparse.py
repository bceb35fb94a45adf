"""Block lists against dense masks, block-sparse attention against the float64 oracle."""
import re
import time
import tracemalloc
from dataclasses import dataclass, replace
from functools import wraps
from math import prod

import numpy as np
import pytest
import torch
from cases import LAYOUTS, SCALES, laid_out
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sampling import examples, sampled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hilbert_attn import tiles
from hilbert_attn.backends import REGISTRY, set_backend
from hilbert_attn.block_layers import BlockSparseAttention
from hilbert_attn.block_sparse import (
    block_reference_attention,
    block_sdpa_mask_attention,
    block_sparse_attention,
)
from hilbert_attn.blocks import engine, planner
from hilbert_attn.blocks.engine import block_sdpa_attention, block_stats
from hilbert_attn.blocks.lists import (
    ALWAYS,
    BlockLists,
    lists_from_block_mask,
    lists_from_bounds,
    lists_from_kinds,
    lists_from_operands,
    lists_to_operands,
)
from hilbert_attn.blocks.planner import block_lists
from hilbert_attn.blocks.schedule import (
    PATTERN_TYPES,
    PostPatternHilbertOptimizer,
    SparsePatternConfig,
    permute_blocks,
)
from hilbert_attn.common import is_plain
from hilbert_attn.curves import CURVES, curve_order, inverse_order
from hilbert_attn.patterns import (
    DILATION_MODES,
    NeighborhoodPattern,
    SegmentPattern,
    SlidePattern,
    TilesSharedPattern,
    WindowPattern,
    _axis_mask,
    attention_mask,
)
from hilbert_attn.reference import assert_matches_oracle, masked_attention


def poison(run):
    "Runs with memory in which nobody wrote filled with NaN."
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        return run()
    finally: torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_pieces(monkeypatch): monkeypatch.setattr(engine, "_CHUNK", 700)


@dataclass
class Layout:
    "A pattern, how it is laid out, and what is asked on top."
    pattern: object
    curve: str # "none", "random" or a curve
    block_size: tuple[int, int]
    causal: bool
    registers: int
    grouped: bool
    seed: int

    @property
    def order(self):
        if self.curve == "none": return None
        n = self.pattern.seq_len - getattr(self.pattern, "shared", 0)
        if self.curve == "random":
            return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        return curve_order(getattr(self.pattern, "grid", n), self.curve)

    def lists(self) -> BlockLists:
        return block_lists(
            self.pattern, order=self.order, block_size=self.block_size, causal=self.causal,
            registers=self.registers, grouped=self.grouped)

    def mask(self) -> torch.Tensor: # bool (N, N + registers), from the definition
        n = self.pattern.seq_len
        mask = self.pattern.mask(self.order)[0]
        if self.causal: mask = mask & torch.ones(n, n, dtype=torch.bool).tril()
        return torch.cat([mask, torch.ones(n, self.registers, dtype=torch.bool)], 1)


@st.composite
def grids(draw, most: int):
    "One to three dimensions; about `most` cells, twice as many at most."
    ndim = draw(st.integers(1, 3))
    side = max(2, int(most ** (1 / ndim)))
    sides = [3 * side if ndim > 1 else side, side, side]
    grid = tuple(draw(st.integers(1, side)) for side in sides[:ndim])
    return grid if prod(grid) <= 2 * most else (side,) * ndim


@st.composite
def neighborhoods(draw, grid: tuple[int, ...]):
    dilation = tuple(draw(st.integers(1, min(4, g))) for g in grid)
    window = tuple(draw(st.integers(1, g // d)) for g, d in zip(grid, dilation))
    causal = tuple(draw(st.booleans()) for _ in grid)
    return NeighborhoodPattern(grid, window, dilation, causal)


@st.composite
def segments(draw, n: int):
    w = draw(st.integers(1, n + 3))
    r, mode = draw(st.integers(1, min(w, 9))), draw(st.sampled_from(DILATION_MODES))
    offset = 0 if mode == "residue" else draw(st.integers(0, r - 1))
    return SegmentPattern(n, w, r, mode, (offset,))


KINDS = ("window", "neighborhood", "neighborhood", "slide", "tiles", "segment")


@st.composite
def patterns(draw, max_n: int = 90):
    grid, kind = draw(grids(max_n)), draw(st.sampled_from(KINDS))
    n = prod(grid)
    if kind == "window":
        window = tuple(draw(st.integers(1, g + 2)) for g in grid)
        return WindowPattern(grid, window, tuple(draw(st.integers(0, w - 1)) for w in window))
    if kind == "neighborhood": return draw(neighborhoods(grid))
    if kind == "slide":
        reach = st.integers(0, n + 3)
        return SlidePattern(n, (draw(reach), draw(reach)), draw(st.integers(0, 5)))
    if kind == "segment": return draw(segments(n))
    shared = draw(st.integers(0, min(n - 1, 20)))
    tiles, offset = draw(st.integers(1, n - shared)), draw(st.integers(0, 2 * n))
    return TilesSharedPattern(n, tiles, offset, shared)


SIZES = st.sampled_from((1, 2, 4, 5, 8, 16))


@st.composite
def layouts(draw, max_n: int = 90):
    pattern, size = draw(patterns(max_n)), draw(SIZES)
    return Layout(
        pattern, draw(st.sampled_from(("none", "random", *CURVES))),
        (size, draw(st.just(size) | SIZES)), draw(st.booleans()),
        draw(st.sampled_from((0, 0, 1, 5))),
        isinstance(pattern, WindowPattern) and draw(st.booleans()), draw(st.integers(0, 999)))


def assert_exact(lists: BlockLists, mask: torch.Tensor):
    """Lists say what a dense mask (N, M) says: the pairs, the blocks that are empty, partial or
    full, rows and their transpose, and each token in one slot."""
    assert torch.equal(lists.mask()[0], mask)
    q, k = lists.query_tokens(), lists.key_tokens()
    for tokens, n in ((q, lists.num_queries), (k, lists.num_keys)):
        assert torch.equal(tokens[tokens >= 0].sort().values, torch.arange(n))
    pairs = (
        mask[q.clamp(min=0)[:, :, None, None], k.clamp(min=0)]
        & (q >= 0)[:, :, None, None]
        & (k >= 0)
    )  # (nQ, BM, nK, BN)
    some, every = pairs.any(3).any(1), (pairs | (q < 0)[:, :, None, None]).all(3).all(1)
    assert torch.equal(lists.kinds()[0], some.to(torch.int8) + (some & every).to(torch.int8))
    assert torch.equal(lists.columns.kinds(len(q)).transpose(1, 2), lists.kinds())
    for rows in (lists.rows, lists.columns):
        for start, end, full in zip(rows.start[0], rows.start[0, 1:], rows.full[0]):
            for part in rows.index[start : start + full], rows.index[start + full : end]:
                assert torch.equal(part, part.sort().values)


# block lists


@given(layouts())
@example(Layout(NeighborhoodPattern((7, 9), 3, 2), "random", (4, 8), True, 5, False, 0))
@example(Layout(TilesSharedPattern(40, 3, 7, 5), "random", (8, 4), True, 3, False, 0))
@example(Layout(NeighborhoodPattern((7, 9), 1), "none", (4, 8), True, 0, False, 0))
@example(Layout(NeighborhoodPattern((6, 7), 3, 2), "none", (1, 1), True, 0, False, 0))
def test_lists_are_exact(case): assert_exact(case.lists(), case.mask())


@examples(50, 300)
@given(layouts(40))
def test_the_slow_builder_agrees(case):
    lists = case.lists()
    fields = {
        name: getattr(lists, name) for name in ("q_tokens", "k_tokens", "lo", "hi", "at", "causal")
    }
    slow = lists_from_bounds(lists.num_queries, lists.num_keys, lists.block_size, **fields)
    listed = (
        lists.kinds() > 0 if lists.at is None else slice(None)
    )  # without a test, the bounds do not say which blocks are empty
    assert torch.equal(slow.kinds()[listed], lists.kinds()[listed])


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("causal", (False, True))
def test_larger_grids(curve, causal):
    for pattern in (
        WindowPattern((40, 33), (16, 7), (3, 2)), NeighborhoodPattern((40, 33), (13, 6)),
        NeighborhoodPattern((40, 33), 5, (3, 2), (True, False)), SlidePattern(1320, 200),
        TilesSharedPattern(1320, 5, 100, 33)
    ):
        assert_exact(
            Layout(pattern, curve, (64, 32), causal, 2, False, 0).lists(),
            Layout(pattern, curve, (64, 32), causal, 2, False, 0).mask())


GRID, N = (1024, 1024), 1 << 20
ON_GRID = [
    WindowPattern(GRID, 16, 5), NeighborhoodPattern(GRID, 13), NeighborhoodPattern(GRID, 13, 4)]
ON_POSITIONS = [
    SlidePattern(N, 1000), TilesSharedPattern(N, 1000, 77, 0), SegmentPattern(N, 1024, 3)]


def keys_of(pattern, position: torch.Tensor, query: int) -> torch.Tensor: # bool (N,), by token
    "The keys of one query, by definition."
    if isinstance(pattern, (WindowPattern, NeighborhoodPattern)):
        x, y = divmod(query, GRID[1])
        down, across = (_axis_mask(pattern.axis_bounds(axis), 0) for axis in (0, 1))
        return (down[x][:, None] & across[y]).flatten()
    if isinstance(pattern, SlidePattern):
        return (position - position[query]).abs() <= pattern.window[0]
    if isinstance(pattern, TilesSharedPattern):
        sizes = torch.tensor(pattern.tile_sizes())
        tile = torch.repeat_interleave(torch.arange(pattern.tiles), sizes)
        tile = tile[(position - pattern.offset) % N]
        return tile == tile[query]
    w, r = pattern.segment_size, pattern.dilation_rate
    segment, residue = position // w, position % w % r
    return (segment == segment[query]) & (residue == residue[query])


@pytest.mark.parametrize("curve", sampled(CURVES, ["hilbert"]))
def test_a_million_tokens(curve):
    order, generator = curve_order(GRID, curve), torch.Generator().manual_seed(0)
    position = inverse_order(order)
    for pattern in ON_GRID + (ON_POSITIONS if curve == "hilbert" else []):
        tracemalloc.start()
        lists = block_lists(pattern, order=order)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 400 * N  # bytes
        q_tokens, k_tokens = lists.query_tokens(), lists.key_tokens()
        for block in torch.randint(0, lists.num_blocks[0], (2,), generator=generator).tolist():
            found = torch.zeros(lists.num_blocks[1], dtype=torch.bool)
            for query in q_tokens[block][q_tokens[block] >= 0][::9].tolist():
                keys = keys_of(pattern, position, query)
                found |= (keys[k_tokens.clamp(min=0)] & (k_tokens >= 0)).any(1)
            listed = torch.zeros_like(found)
            entries = slice(*lists.rows.start[0, block:block + 2].tolist())
            listed[lists.rows.index[entries].long()] = True
            assert not (found & ~listed).any()
            assert listed.sum() <= 1.5 * found.sum() + 2  # every ninth query was asked


def test_a_random_order_is_no_worse_than_its_pairs():
    "Nothing is near anything: every block of queries meets almost every block of keys."
    pattern, order = NeighborhoodPattern((512, 512), 7), torch.randperm(512 * 512)
    tracemalloc.start()
    start = time.process_time()
    lists = block_lists(pattern, order=order)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{seconds:.2f} s, {peak / 1e6:.0f} MB, {lists.rows.index.numel()} blocks")
    assert seconds < 20 and peak < 80 * lists.rows.index.numel()  # bytes
    assert block_stats(lists, pattern.pairs()).full == 0
    rank, x = inverse_order(order), torch.arange(512)
    first = (x - 3).clamp(0, 505)
    for block in (0, 1000):
        row, column = (
            order[block * 128 : block * 128 + 128] // 512,
            order[block * 128 : block * 128 + 128] % 512)
        keys = (
            (first[row, None, None] + torch.arange(7)[:, None]) * 512
            + first[column, None, None]
            + torch.arange(7))
        found = lists.rows.index[lists.rows.start[0, block]:lists.rows.start[0, block + 1]]
        assert torch.equal(found.long(), (rank[keys] // 128).unique())


def test_where_hilbert_earns_its_place():
    "128 x 128 tokens, windows of 16 x 16, blocks of 128."
    count = {
        curve: block_stats(block_lists(WindowPattern((128, 128), 16), curve=curve)).non_empty
        for curve in CURVES
    }
    assert (
        count["hilbert"] <= 1.05 * min(count.values())
        and 5 * count["hilbert"] <= count["row_major"])
    assert count == {"row_major": 2048, "snake": 2048, "tile": 256, "morton": 256, "hilbert": 256}
    grouped = block_stats(block_lists(WindowPattern((96, 96), 16), curve="hilbert", grouped=True))
    assert (grouped.non_empty, grouped.full, round(grouped.empty_share, 3)) == (144, 144, 0.972)
    assert round(block_stats(block_lists(WindowPattern((96, 96), 16))).empty_share, 3) == 0.833


@settings(max_examples=60)
@given(layouts(60))
def test_stats_count_blocks_and_pairs(case):
    lists, mask = case.lists(), case.mask()
    stats, kinds = block_stats(lists), lists.kinds()
    assert (stats.blocks, stats.full, stats.partial, stats.pairs) == (
        kinds.numel(), int((kinds == 2).sum()), int((kinds == 1).sum()), int(mask.sum()))
    test, partial = lists.pair_test(), (kinds[0] == 1)[:, None, :, None]
    assert stats.wasted == int((~test & partial).sum())
    assert block_stats(lists, int(mask.sum())) == stats


def test_the_cache_is_bounded_and_notices_writes():
    order = torch.randperm(64)
    lists = block_lists(SlidePattern(64, 9), order=order, block_size=8)
    assert block_lists(SlidePattern(64, 9), order=order, block_size=8) is lists
    order.copy_(torch.arange(64))
    assert block_lists(SlidePattern(64, 9), order=order, block_size=8).q_tokens is None
    for window in range(1, 90): block_lists(SlidePattern(64, window), block_size=8)
    assert len(planner._list_cache.entries) <= planner._list_cache.max_entries


def test_lists_survive_the_way_through_an_operator():
    lists = block_lists(
        NeighborhoodPattern((6, 7), 3), curve="hilbert", block_size=(8, 4), causal=True, registers=3
    )
    back = lists_from_operands(*lists_to_operands(lists))
    assert torch.equal(back.mask(), lists.mask()) and back.groups == lists.groups and back.causal
    assert lists.to("cpu").nbytes == lists.nbytes


# attention


@dataclass
class Call:
    "A layout and the tensors of a call."
    layout: Layout
    b: int
    heads: tuple[int, int]
    d: int
    key_mask: bool
    dtype: torch.dtype
    memory: str
    scale: float | None
    lse_grad: bool

    def check(self, attention):
        generator, n = torch.Generator().manual_seed(self.layout.seed), self.layout.pattern.seq_len
        (h, kv), m = self.heads, n + self.layout.registers
        q, *_ = laid_out(self.memory, self.b, (h, kv, kv), n, self.d, self.dtype, generator)
        k, v = laid_out(self.memory, self.b, (h, kv, kv), m, self.d, self.dtype, generator)[1:]
        mask, key_mask = self.layout.mask()[None, None], None
        if self.key_mask:
            key_mask = torch.rand(self.b, m, generator=generator) < 0.6
            mask = mask & key_mask[:, None, None]
        lists = self.layout.lists()
        return assert_matches_oracle(
            lambda q, k, v: attention(q, k, v, lists, key_mask=key_mask, scale=self.scale), q, k,
            v, mask, scale=self.scale, lse_grad=self.lse_grad)


@st.composite
def calls(
    draw, max_n: int = 70, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)
):
    return Call(
        draw(layouts(max_n)), draw(st.integers(1, 3)),
        draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (3, 1), (4, 2)))),
        draw(st.sampled_from((8, 16, 24, 32, 80))), draw(st.booleans()),
        draw(st.sampled_from(dtypes)), draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(SCALES)), draw(st.booleans()))


@examples(40, 300)
@given(calls())
def test_equals_the_oracle(call): poison(lambda: call.check(block_sdpa_attention))


@examples(40, 300)
@given(call=calls())
def test_equals_the_oracle_in_small_pieces(call):
    chunk, engine._CHUNK = engine._CHUNK, 700
    try: poison(lambda: call.check(block_sdpa_attention))
    finally: engine._CHUNK = chunk


@settings(max_examples=60)
@given(calls(40))
def test_the_expression_equals_the_oracle(call):
    def expression(q, k, v, lists, *, key_mask, scale):
        return engine._block_expression(
            q, k, v, lists, key_mask, 0.0, q.shape[-1] ** -0.5 if scale is None else scale)
    poison(lambda: call.check(lambda *x, **o: (lambda out, lse: (out, lse))(*expression(*x, **o))))


@settings(max_examples=40)
@given(calls(40))
def test_the_dense_backends_equal_the_oracle(call):
    for attention in (block_reference_attention, block_sdpa_mask_attention): call.check(attention)


@st.composite
def slots(draw, count: int, block: int, generator: torch.Generator): # int32: a token, or -1
    "Some tokens in any order, with empty slots among them, in whole blocks."
    empty = torch.full((draw(st.integers(0, 9)),), -1)
    found = torch.cat([torch.arange(count), empty])
    found = found[torch.randperm(len(found), generator=generator)][draw(st.integers(0, 2)):]
    padding = -len(found) % block + block * draw(st.integers(0, 1))
    return torch.nn.functional.pad(found, (0, padding), value=-1).to(torch.int32)


@st.composite
def any_lists(draw):
    """Lists that no pattern makes: any bounds on up to three axes, empty slots anywhere, tokens
    without a slot, groups of heads and batches."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    def rand(low, high, shape): return torch.randint(low, high, shape, generator=generator)
    n, extra, size = draw(st.integers(1, 40)), draw(st.integers(0, 6)), (draw(SIZES), draw(SIZES))
    q_tokens = draw(slots(n, size[0], generator))
    k_tokens = draw(slots(n + extra, size[1], generator))
    layout = dict(q_tokens=q_tokens, k_tokens=k_tokens, causal=draw(st.booleans()))
    if axes := draw(st.integers(0, 3)):
        at, lo = rand(0, 8, (axes, len(k_tokens))), rand(-1, 7, (axes, len(q_tokens)))
        at[0, k_tokens >= n] = ALWAYS
        bounds = dict(lo=lo, hi=lo + rand(-1, 8, lo.shape), at=at)
        layout |= {name: x.to(torch.int32) for name, x in bounds.items()}
    one = lists_from_bounds(n, n + extra, size, **layout)
    groups = draw(st.sampled_from(((1, 1), (2, 1), (1, 4), (2, 4))))
    kept = rand(0, 3, (prod(groups), *one.num_blocks)) > 0
    sizes = dict(block_size=size, num_queries=n, num_keys=n + extra)
    return lists_from_kinds(one.kinds() * kept, groups=groups, **sizes, **layout)


@pytest.mark.parametrize("rows, columns", [(0, 2), (2, 0), (0, 0)])
def test_lists_without_a_slot_have_no_pairs(rows, columns):
    def ints(*shape): return torch.zeros(shape, dtype=torch.int32)
    tokens = torch.arange(2, dtype=torch.int32)
    lists = lists_from_bounds(
        2, 2, (1, 1), q_tokens=tokens[:rows], k_tokens=tokens[:columns],
        lo=ints(3, rows), hi=ints(3, rows), at=ints(3, columns))
    assert lists.pair_test().shape == (rows, 1, columns, 1)
    assert not lists.mask().any()


@examples(40, 300)
@given(any_lists(), st.booleans())
def test_any_lists_equal_the_oracle(lists, masked):
    generator = torch.Generator().manual_seed(0)
    n, m = lists.num_queries, lists.num_keys
    q, k, v = (
        torch.randn(2, h, length, 16, generator=generator, dtype=torch.float64).float()
        for h, length in ((4, n), (2, m), (2, m)))
    key_mask = torch.rand(2, m, generator=generator) < 0.7 if masked else None
    mask = lists.mask().unflatten(0, lists.groups)
    if masked: mask = mask & key_mask[:, None, None]
    poison(
        lambda: assert_matches_oracle(
            lambda *x: block_sdpa_attention(*x, lists, key_mask=key_mask), q, k, v, mask)
    )


LISTS = {
    "window": block_lists(WindowPattern((4, 5), 2, 1), curve="hilbert", block_size=(4, 2)),
    "grouped windows, causal, registers": block_lists(
        WindowPattern((4, 5), (2, 3)), curve="hilbert", block_size=4, grouped=True, causal=True,
        registers=3),
    "dilated neighbourhood": block_lists(
        NeighborhoodPattern((4, 5), 2, 2), curve="hilbert", block_size=(4, 3)
    ),
    "tiles, shared": block_lists(TilesSharedPattern(20, 3, 5, 2), block_size=4, causal=True),
    "longnet": block_lists(
        SegmentPattern(20, 7, 3, "longnet", (1,)), curve="hilbert", block_size=4
    ),
    "a mask per head": lists_from_block_mask(
        torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.5, 20, 20, (4, 3),
        order=curve_order(20), causal=True),
}


@pytest.mark.grid
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("masked", (False, True))
def test_gradcheck(name, masked, small_pieces):
    torch.manual_seed(0)
    lists = LISTS[name]
    whole = name == "window"  # every entry of the Jacobian; elsewhere one random direction
    b, heads = (1, (2, 1, 1)) if whole else (2, (4, 2, 2))
    x = [
        torch.randn(b, h, n, 3, dtype=torch.float64, requires_grad=True)
        for h, n in zip(heads, (20, lists.num_keys, lists.num_keys))
    ]
    key_mask = torch.rand(b, lists.num_keys) < 0.7 if masked else None

    def call(*x):
        out, lse = block_sdpa_attention(*x, lists, key_mask=key_mask)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(call, x, fast_mode=not whole)


@pytest.mark.parametrize("name", LISTS)
def test_opcheck(name):
    torch.manual_seed(0)
    lists = LISTS[name]
    q, k, v = (
        torch.randn(2, h, n, 8, requires_grad=True)
        for h, n in ((4, 20), (2, lists.num_keys), (2, lists.num_keys)))
    *tensors, sizes, causal = lists_to_operands(lists)
    key_mask = torch.rand(2, lists.num_keys) < 0.7
    args = (q, k, v, key_mask, None, *tensors, [0.3, 2.0], 0.0, sizes, causal)
    opcheck(torch.ops.hilbert_attn.block_forward.default, args)
    out, lse = (x.detach() for x in torch.ops.hilbert_attn.block_forward(*args))
    upstream = torch.randn_like(out), torch.randn_like(lse)
    args = (*upstream, *(x.detach() for x in (q, k, v)), out, lse, *args[3:])
    opcheck(torch.ops.hilbert_attn.block_backward.default, args)


def test_under_torch_compile():
    def model(q, k, v):
        return block_sparse_attention(
            q * 2, k, v,
            block_lists(NeighborhoodPattern((6, 7), 3), curve="hilbert", block_size=(8, 4))).sin()
    x = [torch.randn(1, 2, 42, 16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), model(*x))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*x).sum(), x), torch.autograd.grad(model(*x).sum(), x))


@pytest.mark.parametrize("inside", (False, True))
@pytest.mark.parametrize("strict", (False, True))
def test_export(inside, strict):
    def make():
        return block_lists(NeighborhoodPattern((6, 7), 3), curve="hilbert", block_size=(8, 4))

    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lists = None if inside else make()

        def forward(self, q, k, v):
            return block_sparse_attention(q * 2, k, v, make() if inside else self.lists).sin()

    x = [torch.randn(1, 2, 42, 16) for _ in range(3)]
    exported = torch.export.export(Attend(), tuple(x), strict=strict)
    torch.testing.assert_close(exported.module()(*x), Attend()(*x))


def test_repeats_are_bit_identical():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    lists = block_lists(NeighborhoodPattern((40, 50), 9), curve="hilbert", block_size=(64, 8))
    x = [torch.randn(2, 4, 2000, 32, requires_grad=True) for _ in range(3)]
    def run():
        out, lse = block_sdpa_attention(*x, lists)
        return [out, lse, *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), x)]
    for a, b in zip(run(), run()): assert torch.equal(a, b)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "pattern",
    (
        WindowPattern((11, 14), 4), NeighborhoodPattern((11, 14), 5),
        NeighborhoodPattern((11, 14), 3, 2)),
    ids=lambda p: type(p).__name__,
)
def test_the_order_changes_nothing_on_a_grid(pattern):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 154, 16) for _ in range(3))
    def run(order, **options):
        return block_sparse_attention(
            q, k, v, block_lists(pattern, order=order, block_size=(16, 8), **options))
    plain = run(None)
    for order in [curve_order((11, 14), curve) for curve in CURVES] + [torch.randperm(154)]:
        torch.testing.assert_close(run(order), plain, atol=2e-6, rtol=0)
    if isinstance(pattern, WindowPattern):
        torch.testing.assert_close(
            run(curve_order((11, 14)), grouped=True), plain, atol=2e-6, rtol=0)


ALONE = {  # pattern or blocks, heads of keys, with a key mask; is each key read by one tile?
    "windows": (WindowPattern((8, 12), 4), 2, False, True),
    "segments": (SegmentPattern(90, 20), 2, False, True),
    "segments that are shorter than a block": (SegmentPattern(90, 4), 2, False, True),
    "heads that share keys": (SegmentPattern(90, 20), 1, False, False),
    "a key mask": (SegmentPattern(90, 20), 2, True, False),
    "a neighbourhood": (NeighborhoodPattern((9, 10), 3), 2, False, False),
    "a block that nobody reads": ([[1, 0, 0], [0, 1, 0], [1, 0, 0]], 2, False, False),
    "a block for two rows": ([[1, 0, 0], [0, 1, 1], [0, 0, 1]], 2, False, False),
    "a block each": ([[0, 1, 0], [0, 0, 1], [1, 0, 0]], 2, False, True),
}


@pytest.mark.parametrize("name", ALONE)
def test_gradients_of_keys_that_one_tile_reads_are_written_once(name, monkeypatch):
    torch.manual_seed(0)
    pattern, kv_heads, masked, once = ALONE[name]
    if isinstance(pattern, list):
        blocks, n = torch.tensor(pattern).bool(), 48
        lists = lists_from_block_mask(blocks, n, n, (16, 16))
        mask = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
    else:
        n, order = pattern.seq_len, torch.randperm(pattern.seq_len)
        whole = isinstance(pattern, WindowPattern)
        if whole: order = None
        size = (16, 16) if whole else (10, 10)
        lists = block_lists(pattern, order=order, block_size=size, grouped=whole)
        mask = attention_mask(pattern, order=order)
    added, add = [], engine._Reader.add
    monkeypatch.setattr(engine._Reader, "add", lambda *x: added.append(x) or add(*x))
    x = [torch.randn(2, h, n, 8, requires_grad=True) for h in (2, kv_heads, kv_heads)]
    key_mask = torch.rand(2, n) < 0.8 if masked else None
    seen = mask.reshape(-1, n, n)[None]
    if masked: seen = seen & key_mask[:, None, None]
    exact = [y.detach().double().requires_grad_() for y in x]
    g = torch.randn(2, 2, n, 8)
    expected = torch.autograd.grad(masked_attention(*exact, seen)[0], exact, g.double())
    def run(): return torch.autograd.grad(
        block_sdpa_attention(*x, lists, key_mask=key_mask)[0], x, g)
    found = poison(run)
    assert bool(added) != once
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_upstream_gradients_lie_as_their_kernel_wants_them(monkeypatch, masked):
    "It copies those that lie otherwise."
    seen, backward = [], tiles._aten_backward

    def watched(dout, *rest, **options):
        seen.append(dout.transpose(1, 2).is_contiguous())
        return backward(dout, *rest, **options)

    monkeypatch.setattr(tiles, "_aten_backward", watched)
    key_mask = torch.ones(2, 90, dtype=torch.bool).index_fill(1, torch.tensor(7), False)
    x = [torch.randn(2, 3, 90, 8, requires_grad=True) for _ in "qkv"]
    lists = block_lists(SegmentPattern(90, 20), block_size=(10, 10))
    out, _ = block_sdpa_attention(*x, lists, key_mask=key_mask if masked else None)
    out.backward(torch.randn(out.shape))
    assert seen and all(seen)


def test_rows_without_keys_are_zero_and_pass_no_gradient(small_pieces):
    def run():
        lists = block_lists(SlidePattern(40, 5), block_size=(8, 4))
        q, k, v = (torch.randn(2, 2, 40, 8, requires_grad=True) for _ in range(3))
        key_mask = torch.ones(2, 40, dtype=torch.bool)
        key_mask[1, 10:30] = False
        out, lse = block_sdpa_attention(q, k, v, lists, key_mask=key_mask)
        dead = torch.zeros(2, 40, dtype=torch.bool)
        dead[1, 12:28] = True
        assert torch.equal((lse == -torch.inf)[:, 0], dead) and not out[:, 0][dead].any()
        grads = torch.autograd.grad(
            (out, lse), (q, k, v),
            (torch.ones_like(out), torch.full_like(lse, torch.nan).where(lse == -torch.inf, 1.0)))
        assert (
            all(x.isfinite().all() for x in grads)
            and not grads[0][:, 0][dead].any()
            and not grads[1][1, :, 10:30].any())
    poison(run)


def test_masked_keys_may_hold_anything():
    torch.manual_seed(0)
    lists = block_lists(NeighborhoodPattern((6, 7), 5), curve="hilbert", block_size=(8, 4))
    q, k, v = (torch.randn(2, 2, 42, 8) for _ in range(3))
    key_mask = torch.rand(2, 42) < 0.7
    def run(bad):
        x = [t.masked_fill(~key_mask[:, None, :, None], bad).requires_grad_() for t in (k, v)]
        out, lse = block_sdpa_attention(q, *x, lists, key_mask=key_mask)
        return [
            out, lse.nan_to_num(neginf=0),
            *torch.autograd.grad(out.sum() + lse.nan_to_num(neginf=0).sum(), x)]
    for a, b in zip(run(0.0), run(torch.nan)): assert torch.equal(a, b)


@pytest.mark.parametrize("empty", ("batch", "mask", "keys"))
def test_nothing_to_attend(empty):
    q = torch.randn(0 if empty == "batch" else 2, 3, 7, 8, requires_grad=True)
    mask = torch.full((2, 3), empty != "mask")
    key_mask = torch.zeros(2, 7, dtype=torch.bool) if empty == "keys" else None
    out, lse = block_sparse_attention(
        q, q, q, mask, block_size=(4, 3), key_mask=key_mask, return_lse=True)
    assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.shape == q.shape and not grad.any()


def test_dropout_drops_weights_and_scales_the_rest():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 40, 40, dtype=torch.float64) for _ in range(2))
    eye = torch.eye(40, dtype=torch.float64)[
        None, None
    ]  # v = I makes the output the matrix of weights
    lists = block_lists(SlidePattern(40, 20), block_size=8)
    dense, lse = block_sdpa_attention(q, k, eye, lists)
    dropped, same = block_sdpa_attention(q, k, eye, lists, dropout_p=0.3)
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], dense[kept] / 0.7)
    assert 0.2 < 1 - kept.sum() / (dense > 0).sum() < 0.4
    torch.testing.assert_close(same, lse)


def test_half_precision_under_autocast():
    q, k, v = (torch.randn(1, 2, 42, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(q, k, v, torch.ones(3, 3, dtype=torch.bool), block_size=16)
    assert out.dtype == torch.bfloat16


# tensors as callers leave them, and content that must not matter


def with_strides(x: torch.Tensor, kind: str) -> torch.Tensor:
    "The values of x (an expanded one: its first values, repeated) with other strides."
    if kind == "transposed": return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "turned": return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if kind == "stepped": return x.repeat_interleave(2, -1)[..., ::2]
    if kind == "offset": return torch.cat([x, x], -1)[..., x.shape[-1]:]
    if kind == "expanded": return x[..., :1].expand(x.shape)
    return x[:1].expand(x.shape)  # "one batch"


STRIDES = ("transposed", "turned", "stepped", "offset", "expanded", "one batch")


@pytest.mark.grid
@pytest.mark.parametrize("backend", ("reference", "sdpa_mask", "sdpa", "triton"))
@pytest.mark.parametrize("kind", STRIDES)
def test_any_strides(kind, backend):
    torch.manual_seed(0)
    lists = block_lists(NeighborhoodPattern((6, 7), 3), curve="hilbert", block_size=16)
    x = [with_strides(torch.randn(2, h, 42, 16), kind) for h in (4, 2, 2)]
    upstream = (
        with_strides(torch.randn(2, 4, 42, 16), kind),
        with_strides(torch.randn(2, 4, 42, 1), kind)[..., 0])

    def run(x, upstream):
        x = [y.detach().requires_grad_() for y in x]
        results = block_sparse_attention(*x, lists, backend=backend, return_lse=True)
        return [*results, *torch.autograd.grad(results, x, upstream)]

    expected = run([y.contiguous() for y in x], [y.contiguous() for y in upstream])
    for a, b in zip(run(x, upstream), expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", STRIDES)
def test_any_strides_in_a_graph(kind):
    lists = block_lists(NeighborhoodPattern((6, 7), 3), curve="hilbert", block_size=16)
    x = [with_strides(torch.randn(2, h, 42, 16), kind) for h in (4, 2, 2)]
    def model(q, k, v):
        return block_sparse_attention(q, k, v, lists).transpose(1, 2).flatten(2).sin()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), model(*x))


@pytest.mark.grid
@pytest.mark.parametrize("backend", ("reference", "sdpa_mask", "sdpa", "triton"))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_masked_keys_never_matter(bad, backend):
    torch.manual_seed(0)
    lists = block_lists(NeighborhoodPattern((6, 7), 5), curve="hilbert", block_size=16, registers=3)
    q, k, v = torch.randn(2, 4, 42, 16), *torch.randn(2, 2, 2, 45, 16)
    key_mask = torch.rand(2, 45) < 0.7
    hidden = ~key_mask[:, None, :, None]

    def run(content):
        x = [
            q.clone().requires_grad_(),
            *(y.masked_fill(hidden, content).requires_grad_() for y in (k, v))]
        results = block_sparse_attention(
            *x, lists, key_mask=key_mask, backend=backend, return_lse=True)
        return [*results, *torch.autograd.grad(sum(y.sin().sum() for y in results), x)]

    for a, b in zip(run(bad), run(0.0)): assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_masked_keys_never_matter_under_dropout(bad):
    lists = block_lists(SlidePattern(42, 9), block_size=16)
    q, k, v = torch.randn(3, 2, 2, 42, 16)
    key_mask = torch.rand(2, 42) < 0.7

    def run(content):
        torch.manual_seed(0)
        x = [y.masked_fill(~key_mask[:, None, :, None], content).requires_grad_() for y in (k, v)]
        out = block_sparse_attention(q, *x, lists, key_mask=key_mask, dropout_p=0.2)
        return [out, *torch.autograd.grad(out.sin().sum(), x)]

    for a, b in zip(run(bad), run(0.0)): assert torch.equal(a, b)


# numbers, orders and caches


@pytest.mark.parametrize("bad", (2.5, 24.0, float("nan"), "24", True, None))
def test_numbers_are_whole(bad):
    pattern, mask, q = (
        SlidePattern(48, 9), torch.ones(2, 2, dtype=torch.bool), torch.randn(1, 1, 48, 16))
    for size in (bad, (24, bad)):
        with pytest.raises(ValueError, match="block_size"): block_lists(pattern, block_size=size)
        with pytest.raises(ValueError, match="block_size"):
            block_sparse_attention(q, q, q, mask, block_size=size)
        with pytest.raises(ValueError, match="block_size"): SparsePatternConfig(block_size=size)
    with pytest.raises(ValueError, match="registers"): block_lists(pattern, registers=bad)
    if bad is True: return
    with pytest.raises(ValueError, match="causal"): block_lists(pattern, causal=bad)
    with pytest.raises(ValueError, match="grouped"): block_lists(pattern, grouped=bad)
    with pytest.raises(ValueError, match="causal"):
        block_sparse_attention(q, q, q, mask, block_size=24, causal=bad)


PATTERNS = {
    "window": lambda x: WindowPattern((6, 8), x),
    "kernel_size": lambda x: NeighborhoodPattern((6, 8), x),
    "dilation": lambda x: NeighborhoodPattern((6, 8), 3, x),
    "slide": lambda x: SlidePattern(48, x), "tiles": lambda x: TilesSharedPattern(48, x),
    "segment_size": lambda x: SegmentPattern(48, x)}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("bad", (2.5, 2.0, float("nan"), "2", True))
def test_numbers_of_a_pattern_are_whole(name, bad):
    with pytest.raises(ValueError, match="window" if name == "slide" else name): PATTERNS[name](bad)
    good, same = (block_lists(PATTERNS[name](make(2)), block_size=16) for make in (int, np.int64))
    assert good is same


@pytest.mark.parametrize("name", ("window", "dilation_rates", "global_tokens"))
@pytest.mark.parametrize("bad", (2.5, 24.0, float("nan"), "24", True))
def test_numbers_of_a_block_pattern_are_whole(name, bad):
    with pytest.raises(ValueError, match=name): SparsePatternConfig("dilated_sparse", **{name: bad})


def test_numpy_numbers_are_whole():
    mine, theirs = (
        block_lists(SlidePattern(48, 9), block_size=make(24), registers=make(3))
        for make in (int, np.int64))
    assert mine is theirs
    assert block_lists(SlidePattern(48, 9), block_size=np.array([24, 24]), registers=3) is mine


class Attend(torch.nn.Module):
    def forward(self, q, order):
        return block_sparse_attention(
            q, q, q, torch.eye(3, dtype=torch.bool), block_size=16, order=order)


@pytest.mark.parametrize("mode", ("eager", "inference", "compiled"))
def test_an_order_is_a_permutation(mode):
    q, order = torch.randn(1, 1, 48, 16), torch.arange(48).flip(0)
    wrong = order.clone()
    wrong[3] = wrong[5]
    if mode == "inference":
        with torch.inference_mode(): order, wrong = order.clone(), wrong.clone()
    call = torch.compile(Attend(), backend="aot_eager") if mode == "compiled" else Attend()
    torch.testing.assert_close(call(q, order).flip(2), call(q.flip(2), torch.arange(48)))
    with pytest.raises(Exception, match="no permutation"): call(q, wrong)
    if mode == "compiled": return
    block_lists(SlidePattern(48, 9), order=order, block_size=16)
    with pytest.raises(ValueError, match="no permutation"):
        block_lists(SlidePattern(48, 9), order=wrong, block_size=16)


def fake_mode(call, q, order):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode: call(mode.from_tensor(q))


POISON = {
    "fake mode": fake_mode,
    "make_fx": lambda call, q, order: make_fx(lambda q: call(q), tracing_mode="fake")(q),
    "functionalize": lambda call, q, order: torch.func.functionalize(call)(q, order),
    "vmap": lambda call, q, order: torch.vmap(lambda x: call(q, x))(order[None]),
    "meta": lambda call, q, order: call(q, order.to("meta")),
    "float": lambda call, q, order: call(q, block_size=16.0)}


@pytest.mark.parametrize("poison", POISON)
def test_no_call_spoils_the_lists(poison):
    pattern = NeighborhoodPattern((5, 7 + len(poison)), 3)  # of this test alone

    def call(q, order=None, block_size=16):
        curve = "hilbert" if order is None else None
        lists = block_lists(pattern, order=order, curve=curve, block_size=block_size)
        return block_sparse_attention(q, q, q, lists)

    q, order = torch.randn(1, 1, pattern.seq_len, 16), torch.randperm(pattern.seq_len)
    try:
        POISON[poison](call, q, order)
    except ValueError as error:
        assert "order" in str(error) or "block_size" in str(error)
    except (RuntimeError, AssertionError) as error:
        assert "Please convert all Tensors to FakeTensors" in str(error)
    expected = masked_attention(q, q, q, pattern.mask()[0])[0]
    for options in ((), (order,)): torch.testing.assert_close(call(q, *options), expected)
    for lists, *_ in planner._list_cache.entries.values():
        assert all(is_plain(x) for x in lists.tensors())


# the front door


@st.composite
def masked_calls(draw):
    b, (h, kv), n, extra = (
        draw(st.integers(1, 2)), draw(st.sampled_from(((1, 1), (2, 1), (4, 2)))),
        draw(st.integers(1, 60)), draw(st.sampled_from((0, 0, 7))))
    return (
        b, h, kv, n, extra, (draw(SIZES), draw(SIZES)), draw(st.integers(0, 2)),
        draw(st.sampled_from((None, "random", *CURVES))), draw(st.booleans()),
        draw(st.booleans()), draw(st.integers(0, 999)))


@examples(40, 300)
@given(masked_calls(), st.sampled_from(("reference", "sdpa_mask", "sdpa", "auto")))
def test_block_masks_equal_the_oracle(call, backend):
    b, h, kv, n, extra, (BM, BN), leading, curve, causal, masked, seed = call
    generator, m = torch.Generator().manual_seed(seed), n + extra
    q, k, v = (
        torch.randn(b, heads, length, 16, generator=generator, dtype=torch.float64).float()
        for heads, length in ((h, n), (kv, m), (kv, m)))
    block_mask = (
        torch.rand((b, h, -(-n // BM), -(-m // BN))[2 - leading :], generator=generator) < 0.5)
    order = (
        None
        if curve is None
        else torch.randperm(n, generator=generator)
        if curve == "random"
        else curve_order(n, curve))
    key_mask = torch.rand(b, m, generator=generator) < 0.7 if masked else None
    rank = torch.arange(n) if order is None else inverse_order(order)
    mask = block_mask[
        ..., rank[:, None] // BM, torch.cat([rank, torch.arange(n, m)]) // BN
    ]  # from the definition
    if causal:
        mask = mask & ((torch.arange(m) <= torch.arange(n)[:, None]) | (torch.arange(m) >= n))
    mask = mask.expand(b, h, n, m)
    if masked: mask = mask & key_mask[:, None, None]
    poison(
        lambda: assert_matches_oracle(
            lambda *x: block_sparse_attention(
                *x, block_mask, block_size=(BM, BN), order=order, causal=causal,
                key_mask=key_mask, backend=backend, return_lse=True),
            q,
            k,
            v,
            mask,)
    )


def test_backends_can_be_forced(monkeypatch):
    q = torch.randn(1, 1, 12, 8)
    mask = torch.ones(3, 3, dtype=torch.bool)
    def call(**options): return block_sparse_attention(q, q, q, mask, block_size=4, **options)
    seen = []
    monkeypatch.setitem(
        REGISTRY["reference"].functions, "blocks", lambda call: (seen.append(1), (call.q, None))[1])
    with set_backend("reference"): call()
    assert len(seen) == 1
    monkeypatch.setenv("HILBERT_ATTN_BACKEND", "reference")
    call()
    call(backend="sdpa")
    assert len(seen) == 2
    with pytest.raises(ValueError, match="backend='flex': known backends are"): call(backend="flex")


Q, MASK = torch.zeros(2, 4, 12, 8), torch.ones(3, 3, dtype=torch.bool)
OF_MASK = lists_from_block_mask(MASK, 12, 12, (4, 4))
LONGER = dict(k=torch.zeros(2, 4, 13, 8), v=torch.zeros(2, 4, 13, 8))
THREE_GROUPS = lists_from_block_mask(MASK.expand(3, 1, 3, 3), 12, 12, (4, 4))


@pytest.mark.parametrize("text, options", [
    ("block_size is missing", dict(block_size=None)),
    ("block_size=0", dict(block_size=0)),
    ("block_size=(4, 4, 4)", dict(block_size=(4, 4, 4))),
    ("(nQ, nK)", dict(block_size=3)),
    ("block_mask is torch.float32", dict(block_mask=MASK.float())),
    ("block_mask is a list", dict(block_mask=[[True]])),
    ("(3, 3, 3)", dict(block_mask=MASK.expand(3, 3, 3))),
    ("no permutation", dict(order=torch.zeros(12, dtype=torch.int64))),
    ("key_mask", dict(key_mask=torch.ones(2, 11, dtype=torch.bool))),
    ("dropout_p=1", dict(dropout_p=1)),
    ("scale=0", dict(scale=0)),
    ("N or more", dict(k=Q[:, :, :11], v=Q[:, :, :11])),
    ("heads", dict(k=Q[:, :3], v=Q[:, :3])),
    ("must agree", dict(v=Q[:, :, :4])),
    ("expected bool of shape (B, M) = (2, 13)",
     LONGER | dict(key_mask=torch.ones(2, 12, dtype=torch.bool))),
    ("known backends", dict(backend="cudnn")),
    ("dtypes", dict(k=Q.double())),
    ("4 dimensions", dict(q=Q[0])),
])
def test_bad_arguments_are_named(text, options):
    arguments = dict(q=Q, k=Q, v=Q, block_mask=MASK, block_size=4) | options
    with pytest.raises(ValueError, match=re.escape(text)): block_sparse_attention(**arguments)


@pytest.mark.parametrize("text, options", [
    ("leave it out", dict(block_mask=OF_MASK, block_size=8)),
    ("hold their layout", dict(block_mask=OF_MASK, order=torch.arange(12))),
    ("not causal", dict(block_mask=OF_MASK, causal=True)),
    ("11 queries", dict(block_mask=lists_from_block_mask(MASK, 11, 12, (4, 4)))),
    ("groups=(3, 1)", dict(block_mask=THREE_GROUPS)),
])
def test_what_does_not_go_with_lists_is_named(text, options):
    with pytest.raises(ValueError, match=re.escape(text)):
        block_sparse_attention(q=Q, k=Q, v=Q, **options)


_ROWS, _COLUMNS = OF_MASK.rows, OF_MASK.columns
_BOUNDS = torch.zeros(1, 12, dtype=torch.int32)
_TOKENS = torch.arange(12, dtype=torch.int32)
_LAST_IS_EMPTY = _TOKENS.masked_fill(_TOKENS == 11, -1)


def rows(**fields): return dict(rows=replace(_ROWS, **fields))
def columns(**fields):
    return dict(columns=replace(_COLUMNS, **fields))


@pytest.mark.parametrize("text, fields", [
    ("block_size=0: must be", dict(block_size=(0, 4))),
    ("block_size=4 of the", dict(block_size=4)),
    ("groups=(1,) of the", dict(groups=(1,))),
    ("num_queries=12.0:", dict(num_queries=12.0)),
    ("causal='no':", dict(causal="no")),
    ("rows=None of the", dict(rows=None)),
    ("rows.index=[0, 1] of", rows(index=[0, 1])),
    ("expected an int32 tensor", rows(full=_ROWS.full.long())),
    ("columns.start=", columns(start=_COLUMNS.start[0])),
    ("two axes", columns(start=_COLUMNS.start[0])),
    ("columns.full=", columns(full=_COLUMNS.full[0])),
    ("expected shape (1, 3)", columns(full=_COLUMNS.full[0])),
    ("expected it on cpu", dict(q_tokens=_TOKENS.to("meta"))),
    ("expected shape (12,)", dict(q_tokens=_TOKENS[1:])),
    ("expected shape (2, 4)", dict(groups=(1, 2))),
    ("expected all of lo", dict(at=_BOUNDS)),
    ("q_tokens=None of the", dict(block_size=(3, 4))),
    ("places of rows", rows(start=_ROWS.start.flip(1))),
    ("places of rows", rows(start=_ROWS.start + 1)),
    ("from 0 to <= 5", rows(index=_ROWS.index[:5])),
    ("at most as many", rows(full=_ROWS.full + 1)),
    ("blocks 0 to 2", rows(index=_ROWS.index - 1)),
    ("blocks 0 to 2", columns(index=_COLUMNS.index + 1)),
    ("each block once", rows(index=_ROWS.index * 0)),
    ("transpose of rows", columns(full=_COLUMNS.full * 0)),
    ("empty key slots", dict(k_tokens=_LAST_IS_EMPTY)),
    ("each once", dict(q_tokens=_TOKENS * 0)),
    ("one of 12 tokens", dict(k_tokens=_TOKENS + 1)),
    ("one of 12 tokens", dict(q_tokens=_TOKENS - 2)),
    ("coordinates >= 0",
     dict(lo=_BOUNDS, hi=_BOUNDS, at=_BOUNDS - 2)),
])
def test_what_is_wrong_with_lists_made_by_hand_is_named(
    text, fields,
):
    made = replace(OF_MASK, **fields)
    with pytest.raises(ValueError, match=re.escape(text)):
        block_sparse_attention(Q, Q, Q, made)


def test_lists_made_by_hand_need_no_order_and_not_all_tokens():
    sizes = _ROWS.start.diff()[0].tolist()
    parts = [x.flip(0) for x in _ROWS.index.split(sizes)]
    made = replace(
        OF_MASK, q_tokens=_LAST_IS_EMPTY,
        **rows(index=torch.cat(parts)))
    q = torch.randn(Q.shape)
    expected = block_sparse_attention(q, q, q, OF_MASK)
    expected[:, :, 11] = 0
    for backend in ("sdpa", "sdpa_mask", "reference"):
        out = block_sparse_attention(
            q, q, q, made, backend=backend)
        torch.testing.assert_close(out, expected)


def test_a_write_into_lists_is_seen():
    index = _ROWS.index.clone()
    made = replace(OF_MASK, **rows(index=index))
    block_sparse_attention(Q, Q, Q, made)
    index[:2] = 0
    with pytest.raises(ValueError, match="each block once"):
        block_sparse_attention(Q, Q, Q, made)
    index.copy_(_ROWS.index)
    block_sparse_attention(Q, Q, Q, made)


def of_blocks(mask): return SparsePatternConfig("mask", 4, block_mask=mask)


@pytest.mark.parametrize("text, make", [
    ("expected a pattern", lambda: block_lists("window")),
    ("registers=-1", lambda: block_lists(SlidePattern(4, 2), registers=-1)),
    ("expected one of them",
     lambda: block_lists(SlidePattern(4, 2), order=torch.arange(4), curve="hilbert")),
    ("order is given with", lambda: block_lists(SlidePattern(4, 2), order=torch.arange(5))),
    ("known curves", lambda: block_lists(SlidePattern(4, 2), curve="peano")),
    ("one per offset", lambda: block_lists(SegmentPattern(8, 4, 2, "keys", (0, 1)))),
    ("known types", lambda: SparsePatternConfig("diagonal")),
    ("missing", lambda: SparsePatternConfig("mask")),
    ("equal blocks", lambda: SparsePatternConfig("dilated_sparse", (4, 8))),
    ("torch.int64 (3, 3): expected bool", lambda: of_blocks(MASK.long())),
    ("torch.float32", lambda: of_blocks(MASK.float())),
    ("bool (3,): expected", lambda: of_blocks(MASK[0])),
    ("block_mask is a list", lambda: of_blocks([[True]])),
    ("here (nQ, nK) = (4, 4)", lambda: of_blocks(MASK).lists(13)),
    ("here (nQ, nK) = (1, 1)", lambda: BlockSparseAttention(of_blocks(MASK))(Q, Q, Q)),
    ("seq_len=30.0: expected a whole", lambda: SparsePatternConfig().lists(30.0)),
    ("seq_len=0: must be at least 1", lambda: SparsePatternConfig().lists(0)),
    ("window=-1", lambda: SparsePatternConfig(window=-1)),
    ("no permutation",
     lambda: permute_blocks(OF_MASK, torch.zeros(3, dtype=torch.int64), torch.arange(3))),
])
def test_what_makes_no_lists_is_named(text, make):
    with pytest.raises(ValueError, match=re.escape(text)): make()


def test_lists_along_an_order_end_a_graph():
    def attend(q, order):
        lists = block_lists(SlidePattern(64, 5), order=order, block_size=16)
        return block_sparse_attention(q, q, q, lists) * 2

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager")
    q = torch.randn(1, 1, 64, 16)
    for order in (torch.randperm(64), torch.randperm(64)):
        torch.testing.assert_close(compiled(q, order), attend(q, order))
    with pytest.raises(ValueError, match="no permutation"): compiled(q, order * 0)


# FlexAttention


DOCUMENT = torch.tensor([0] * 37 + [1] * 50 + [2] * 30 + [3] * 3)
MODS = {
    "causal": lambda b, h, q, k: q >= k, "sliding": lambda b, h, q, k: (q >= k) & (q - k < 40),
    "documents": lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k],
    "prefix": lambda b, h, q, k: (k <= q) | (k < 20)}


@pytest.mark.parametrize("name", MODS)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_from_flex(name):
    torch.manual_seed(0)
    block_mask = create_block_mask(
        MODS[name], None, None, 120, 120, device="cpu", BLOCK_SIZE=(32, 16))
    lists, index = BlockLists.from_flex(block_mask), torch.arange(120)
    assert torch.equal(lists.mask()[0], MODS[name](0, 0, index[:, None], index))
    q, k, v = (torch.randn(2, h, 120, 16) for h in (4, 2, 2))
    torch.testing.assert_close(
        block_sparse_attention(q, k, v, block_mask),
        flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True), atol=2e-6, rtol=1e-5)


def test_from_flex_of_a_function_around_that_of_lists():
    "It has the attributes of the one inside (`functools.wraps`), and says something else."
    block_mask = block_lists(SlidePattern(64, 9), block_size=16).to_flex()
    @wraps(block_mask.mask_mod)
    def causal(b, h, q, k): return block_mask.mask_mod(b, h, q, k) & (k <= q)
    around = BlockMask.from_kv_blocks(
        block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices, BLOCK_SIZE=block_mask.BLOCK_SIZE, mask_mod=causal)
    of_both = BlockLists.from_flex(around).mask()
    assert torch.equal(of_both, BlockLists.from_flex(block_mask).mask().tril())


def test_from_flex_by_batch_and_head():
    mask = torch.rand(2, 3, 4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    count, index = (
        mask.sum(-1, dtype=torch.int32),
        torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32))
    nothing = torch.zeros_like(count), torch.zeros_like(index)
    for tables, kind in ((((*nothing, count, index)), 2), ((count, index), 1)):
        lists = BlockLists.from_flex(BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=(16, 8)))
        assert lists.groups == (2, 3) and torch.equal(
            lists.kinds().unflatten(0, (2, 3)), mask.to(torch.int8) * kind)
        assert torch.equal(
            lists.mask(), mask.flatten(0, 1).repeat_interleave(16, 1).repeat_interleave(8, 2))
    ragged = BlockLists.from_flex(
        BlockMask.from_kv_blocks(*nothing, count, index, BLOCK_SIZE=(16, 8), seq_lengths=(60, 60)))
    assert torch.equal(
        ragged.mask(),
        mask.flatten(0, 1).repeat_interleave(16, 1).repeat_interleave(8, 2)[:, :60, :60])


def test_from_flex_of_a_row_with_a_partial_block_and_a_ragged_full_one():
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    first, last = one[None] - 1, one[None]
    lists = BlockLists.from_flex(
        BlockMask.from_kv_blocks(
            one, first, one, last, BLOCK_SIZE=(16, 16), seq_lengths=(16, 28),
            mask_mod=lambda b, h, q, k: k >= q))
    place = torch.arange(28)
    assert torch.equal(lists.mask()[0], place >= place[:16, None])


def test_from_flex_says_what_it_cannot():
    with pytest.raises(ValueError, match="no interval"):
        BlockLists.from_flex(
            create_block_mask(
                lambda b, h, q, k: (q - k) % 3 == 0, None, None, 64, 64, device="cpu", BLOCK_SIZE=16
            )
        )
    with pytest.raises(ValueError, match="the same in all"):
        BlockLists.from_flex(
            create_block_mask(
                lambda b, h, q, k: q - k > h, None, 2, 64, 64, device="cpu", BLOCK_SIZE=16)
        )
    with pytest.raises(ValueError, match="as many keys"):
        BlockLists.from_flex(
            create_block_mask(MODS["causal"], None, None, 64, 32, device="cpu", BLOCK_SIZE=16))


IMAGE = 24, 25  # 600 tokens: neither side of a block divides them
ON_FLASH = {
    "window": WindowPattern(IMAGE, (5, 8), (1, 2)),
    "neighbourhood": NeighborhoodPattern(IMAGE, (9, 7), (2, 1), (True, False)),
    "slide": SlidePattern(600, 91),
    "tiles, shared": TilesSharedPattern(600, 3, 17, 70),
    "segment": SegmentPattern(600, 500, 3),
    "longnet": SegmentPattern(600, 200, 3, "longnet", (1,)),
}


@pytest.mark.parametrize("curve", (None, "hilbert"))
@pytest.mark.parametrize("name", ON_FLASH)
def test_blocks_of_flash_attention(name, curve):
    "256 queries by 128 keys, as FlexAttention wants them on Blackwell."
    pattern, causal = ON_FLASH[name], name in ("slide", "segment")
    shape = IMAGE if name in ("window", "neighbourhood") else 600
    if name == "tiles, shared": shape = 530  # the others stay where they are
    order = curve_order(shape, curve) if curve else None
    lists = block_lists(pattern, order=order, block_size=(256, 128), causal=causal)
    q, k = lists.query_tokens().flatten(), lists.key_tokens().flatten()
    expected = attention_mask(pattern, order=order, causal=causal).flatten(0, -3)[0]

    flex, zero = lists.to_flex(), torch.tensor(0)
    assert flex.BLOCK_SIZE == (256, 128) and len(q) % 256 == len(k) % 128 == 0
    seen = flex.mask_mod(zero, zero, torch.arange(len(q))[:, None], torch.arange(len(k)))
    there = q >= 0  # what other rows attend is dropped
    assert torch.equal(seen[there], (expected[q[:, None], k] & (k >= 0))[there])
    blocks = seen.view(-1, 256, len(k) // 128, 128).transpose(1, 2).flatten(2)
    assert torch.equal(blocks.any(2), flex.to_dense()[0, 0] > 0)  # nothing else is visited
    full = lists.kinds()[0] == 2
    assert blocks[full].all() and flex.full_kv_num_blocks.sum() == full.sum()
    assert flex.q_num_blocks is not None  # the backward walks columns


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_to_flex(name):
    torch.manual_seed(0)
    lists = LISTS[name]
    block_mask = lists.to_flex()
    assert (
        BlockLists.from_flex(block_mask) is lists
        and tuple(block_mask.BLOCK_SIZE) == lists.block_size)
    q, k, v = (
        torch.randn(2, h, n, 16) for h, n in ((4, 20), (2, lists.num_keys), (2, lists.num_keys)))
    out, lse = block_sdpa_attention(q, k, v, lists)
    sides = [
        (x, tokens if explicit is not None else tokens[: x.shape[2]])
        for x, tokens, explicit in (
            (q, lists.query_tokens().flatten(), lists.q_tokens),
            (k, lists.key_tokens().flatten(), lists.k_tokens),
            (v, lists.key_tokens().flatten(), lists.k_tokens))
    ]
    flex = flex_attention(
        *(x[:, :, t.clamp(min=0)] for x, t in sides), block_mask=block_mask, enable_gqa=True)
    tokens = sides[0][1]
    back = torch.zeros_like(out).index_copy(2, tokens[tokens >= 0], flex[:, :, tokens >= 0])
    torch.testing.assert_close(back, out, atol=2e-6, rtol=1e-5)
    without = BlockMask.from_kv_blocks(
        block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices, BLOCK_SIZE=block_mask.BLOCK_SIZE)
    assert torch.equal(BlockLists.from_flex(without).kinds() > 0, lists.kinds() > 0)


# patterns of blocks


@pytest.mark.parametrize("kind", PATTERN_TYPES)
@pytest.mark.parametrize("causal", (False, True))
def test_post_pattern_leaves_the_output_alone(kind, causal):
    torch.manual_seed(0)
    config = SparsePatternConfig(
        kind, 16, window=64, global_tokens=20,
        block_mask=torch.rand(4, 13, 13) < 0.4 if kind == "mask" else None)
    off, on = (
        PostPatternHilbertOptimizer(enabled=enabled).lists(config, seq_len=200, causal=causal)
        for enabled in (False, True))
    assert torch.equal(off.mask(), on.mask()) and off.q_tokens is None and on.q_tokens is not None
    assert torch.equal(off.columns.full.sum(), on.columns.full.sum())
    q, k, v = (torch.randn(2, h, 200, 16, requires_grad=True) for h in (4, 2, 2))
    def run(lists):
        out, lse = block_sparse_attention(q, k, v, lists, return_lse=True)
        return (
            out, lse,
            *torch.autograd.grad(out.sin().sum() + lse.nan_to_num(neginf=0).sin().sum(), (q, k, v)))
    for a, b in zip(run(off), run(on)): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_post_pattern_on_grids():
    for pattern in (
        WindowPattern((16, 16), 4), NeighborhoodPattern((16, 16), 5), SlidePattern(256, 20),
        TilesSharedPattern(256, 4, 3, 5)
    ):
        off, on = (
            PostPatternHilbertOptimizer(enabled=enabled).lists(pattern, block_size=16)
            for enabled in (False, True))
        assert torch.equal(off.mask(), on.mask())
        if isinstance(pattern, WindowPattern):
            assert 3 * on.rows.index.numel() <= off.rows.index.numel()


@settings(max_examples=60)
@given(layouts(60))
def test_moving_blocks_moves_nothing_else(case):
    lists, generator = case.lists(), torch.Generator().manual_seed(case.seed)
    moved = permute_blocks(
        lists, *(torch.randperm(n, generator=generator) for n in lists.num_blocks))
    assert_exact(moved, case.mask())
    assert_exact(PostPatternHilbertOptimizer()(lists), case.mask())


def test_patterns_of_blocks_by_definition():
    n, size = 200, 16
    block = torch.arange(13)
    apart = (block[:, None] - block).abs()
    assert torch.equal(
        SparsePatternConfig("local_window", size, window=64).blocks(n), apart <= 2
    )  # 32 tokens beyond a block reach to the end of the second
    assert torch.equal(
        SparsePatternConfig("global_local", size, window=0, global_tokens=17).blocks(n),
        (apart == 0) | (block < 2) | (block < 2)[:, None])
    assert torch.equal(
        SparsePatternConfig("dilated_sparse", size, window=32, dilation_rates=(1, 4)).blocks(n),
        (apart <= 1) | (apart == 4))
    token = torch.arange(n)
    wide = SparsePatternConfig("local_window", (16, 10), window=64)
    mask = wide.lists(n).mask()[0]
    assert mask[(token[:, None] - token).abs() <= 32].all()
    rows = mask.view(-1, n)[::16]
    assert (~mask[(token[:, None] - token).abs() > 32 + 16 + 10]).all() and len(rows) == 13


def test_what_has_no_keys_is_zero_in_the_plain_expression():
    "Even where a masked key holds NaN: what ties such rows to the inputs is no value."
    blocks, key_mask = torch.tensor([[True, False], [False, False]]), torch.ones(1, 32, dtype=bool)
    q, k, v = (torch.randn(1, 1, 32, 16, requires_grad=True) for _ in range(3))
    with torch.no_grad(): k[:, :, 3], key_mask[:, 3] = torch.nan, False
    lists = lists_from_block_mask(blocks, 32, 32, (16, 16))
    out, lse = engine._block_expression(q, k, v, lists, key_mask, 0.0, 0.25)
    assert (out[:, :, 16:] == 0).all() and lse[:, :, 16:].isneginf().all()
    gradients = torch.autograd.grad(out.sum(), (q, v))
    assert all(x.isfinite().all() for x in (out, *gradients))


@pytest.mark.parametrize("rest", (True, False)) # have the other rows keys?
def test_a_nan_query_stays_in_its_row_of_the_plain_expression(rest):
    q, k, v = (torch.randn(1, 1, 32, 16) for _ in range(3))
    q[:, :, 3] = torch.nan
    lists = lists_from_block_mask(torch.tensor([[True, False], [False, rest]]), 32, 32, (16, 16))
    out, _ = engine._block_expression(q, k, v, lists, None, 0.0, 0.25)
    assert (out.isnan().any(-1)[0, 0] == (torch.arange(32) == 3)).all()
