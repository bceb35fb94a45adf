"""Patterns: groups, counts and masks say the same, and masks say what the definition says."""

import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hilbert_attn import hilbert_attention
from hilbert_attn.curves import curve_order, inverse_order
from hilbert_attn.patterns import (
    DILATION_MODES,
    DilatedPattern,
    NeighborhoodPattern,
    OverlapPattern,
    SegmentPattern,
    SlidePattern,
    TilesSharedPattern,
    WindowPattern,
    _axis_mask,
    attention_mask,
    create_dilated_mask,
    even_sizes,
)


@st.composite
def segment_patterns(draw):
    n, w = draw(st.integers(1, 60)), draw(st.integers(1, 70))
    r, mode = draw(st.integers(1, w)), draw(st.sampled_from(DILATION_MODES))
    offsets = (
        (0,)
        if mode == "residue"
        else tuple(draw(st.lists(st.integers(0, r - 1), min_size=1, max_size=4)))
    )
    return SegmentPattern(n, w, r, mode, offsets)


def sees(p: SegmentPattern, offset: int, i: int, j: int) -> bool:
    "The definition, pair by pair."
    if i // p.segment_size != j // p.segment_size: return False
    ci, cj = i % p.segment_size % p.dilation_rate, j % p.segment_size % p.dilation_rate
    return {"residue": ci == cj, "keys": cj == offset, "longnet": ci == offset == cj}[p.mode]


@given(segment_patterns())
def test_mask_groups_and_counts_agree_with_the_definition(p):
    masks, n = p.mask(), p.seq_len
    for mask, offset in zip(masks, p.offsets):
        assert mask.tolist() == [[sees(p, offset, i, j) for j in range(n)] for i in range(n)]
        covered = torch.zeros(n, n, dtype=torch.int64)
        for sides in p.lattices(offset):
            for q, k in zip(*(side.positions().flatten(0, 1) for side in sides)):
                covered[q[:, None], k] += 1
        assert torch.equal(covered, mask.long())  # each pair in exactly one group
    assert p.pairs(len(p.offsets)) == masks.sum()
    assert p.density == pytest.approx(masks.double().mean().item())


@given(segment_patterns(), st.integers(0, 2**31))
def test_an_order_moves_the_mask(p, seed):
    order = torch.randperm(p.seq_len, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(p.mask(order)[:, order][:, :, order], p.mask())


def test_attention_mask_is_causal_by_token_index():
    order = curve_order((5, 6))
    mask = attention_mask(
        SegmentPattern(30, 10, 2), order=order, causal=True, key_mask=torch.arange(30)[None] != 3
    )
    rank = inverse_order(order)
    for i in range(30):
        for j in range(30):
            assert mask[0, 0, i, j] == (
                j <= i and j != 3 and sees(SegmentPattern(30, 10, 2), 0, int(rank[i]), int(rank[j]))
            )


def test_create_dilated_mask():
    for mode in DILATION_MODES:
        assert torch.equal(
            create_dilated_mask(20, 7, 3, mode), SegmentPattern(20, 7, 3, mode).mask()[0]
        )
    assert create_dilated_mask(4, 4, 1).all() and create_dilated_mask(6, 3, 3).equal(
        torch.eye(6, dtype=torch.bool)
    )


def test_for_heads_defaults():
    assert SegmentPattern.for_heads(8, 5, 8, 3, "longnet").offsets == (0, 1, 2, 0, 1)
    assert SegmentPattern.for_heads(8, 5, 8, 3, "keys").offsets == (0,)
    assert SegmentPattern.for_heads(8, 3, None, 3, "keys", 2) == SegmentPattern(
        8, 8, 3, "keys", (2,)
    )


def test_patterns_are_immutable_and_hashable():
    p = SegmentPattern(8, 4)
    with pytest.raises(AttributeError): p.segment_size = 3
    assert len({p, SegmentPattern(8, 4), SegmentPattern(8, 5)}) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4), "seq_len=0"),
        ((8, 0), "segment_size=0"),
        ((8, 4, 0), "dilation_rate=0: must be at least 1"),
        ((8, 4, 5), "dilation_rate=5: must not exceed segment_size=4"),
        ((8, 4, 2, "both"), "known modes are 'residue', 'keys', 'longnet'"),
        ((8, 4, 2, "keys", (2,)), "less than dilation_rate=2"),
        ((8, 4, 2, "keys", (-1,)), "at least 0"),
        ((8, 4, 2, "residue", (1,)), "has no offsets"),
    ],
)
def test_bad_segment_patterns(arguments, message):
    with pytest.raises(ValueError, match=message):
        SegmentPattern(*arguments)


def neighbors(x, n, k, d, causal):
    "Keys of coordinate x on one axis, from the definition."
    members = [c for c in range(n) if c % d == x % d]
    g = x // d
    return (
        members[max(0, g - k + 1) : g + 1]
        if causal
        else members[(s := min(max(g - k // 2, 0), len(members) - k)) : s + k]
    )


@given(st.data())
def test_neighborhoods(data):
    dims = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    dilation = tuple(data.draw(st.integers(1, n)) for n in dims)
    kernel = tuple(data.draw(st.integers(1, n // d)) for n, d in zip(dims, dilation))
    causal = tuple(data.draw(st.booleans()) for _ in dims)
    p = NeighborhoodPattern(dims, kernel, dilation, causal)
    mask = p.mask()[0]
    assert p.pairs() == mask.sum()
    for axis, (n, k, d, c) in enumerate(zip(dims, kernel, dilation, causal)):
        own = _axis_mask(p.axis_bounds(axis), 0)
        for x in range(n):
            assert own[x].nonzero().flatten().tolist() == neighbors(x, n, k, d, c)
    coords = torch.stack(torch.unravel_index(torch.arange(p.seq_len), dims), 1).tolist()
    i = data.draw(st.integers(0, p.seq_len - 1))
    assert mask[i].tolist() == [
        all(
            b in neighbors(a, n, k, d, c)
            for a, b, n, k, d, c in zip(coords[i], other, dims, kernel, dilation, causal)
        )
        for other in coords
    ]


def test_windows():
    "As Swin's shifted windows: rolled, cut, and what the roll joins kept apart."
    p = WindowPattern((8, 8), 4, 2)
    region = torch.zeros(8, 8, dtype=torch.int64)
    bands = (
        slice(0, 4),
        slice(4, 6),
        slice(6, 8),
    )  # of the rolled image: whole windows, last window, wrapped part
    for a, rows in enumerate(bands):
        for b, cols in enumerate(bands):
            region[rows, cols] = 10 * a + b
    window = torch.arange(8) // 4
    window = 2 * window[:, None] + window
    label = (100 * window + region).roll((2, 2), (0, 1)).flatten()
    assert torch.equal(p.mask()[0], label[:, None] == label)
    assert (
        WindowPattern((5, 7), (2, 3)).pairs()
        == WindowPattern((5, 7), (2, 3)).mask().sum()
        == (4 + 4 + 1) * (9 + 9 + 1)
    )


@pytest.mark.parametrize("shift", range(5))
def test_windows_begin_at_their_shift(shift):
    "Borders at shift, shift + 5, ...; what lies before the first one is a box of its own."
    box = [(x - shift) // 5 for x in range(13)]
    same = [[a == b for b in box] for a in box]
    assert WindowPattern((13,), 5, shift).mask()[0].tolist() == same


def test_the_first_shares_are_the_longer_ones():
    assert even_sizes(10, 4) == (3, 3, 2, 2) and even_sizes(4, 4) == (1,) * 4
    heads = [b.heads for b in DilatedPattern.for_heads(16, 5, [4, 16], [1, 2], "heads").branches]
    assert heads == [(0, 3), (3, 5)]


def test_branches_that_are_alike_count_as_often_as_they_are_asked_for():
    pattern = DilatedPattern.for_heads(20, 2, [4, 10, 4, 4], [2, 5, 2, 2], mode="residue")
    near, far = (SegmentPattern(20, w, r).mask().long() for w, r in ((4, 2), (10, 5)))
    assert torch.equal(pattern.counts(), (3 * near + far).expand(2, -1, -1))


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**31))
def test_slide(n, window, seed):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    p = SlidePattern(n, window)
    assert p.pairs() == p.mask(order).sum()
    assert p.mask()[0].tolist() == [[abs(i - j) <= window // 2 for j in range(n)] for i in range(n)]


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 100), st.data())
def test_tiles_shared(rest, shared, offset, data):
    p = TilesSharedPattern(rest + shared, data.draw(st.integers(1, rest)), offset, shared)
    sizes, mask = p.tile_sizes(), p.mask()[0]
    assert (
        sum(sizes) == rest
        and max(sizes) - min(sizes) <= 1
        and list(sizes) == sorted(sizes, reverse=True)
    )
    assert p.pairs() == mask.sum() and mask[:shared].all() and mask[:, :shared].all()
    start = 0
    for size in sizes:
        tile = torch.tensor([shared + (offset + start + i) % rest for i in range(size)])
        assert mask[tile][:, tile].all() and mask[tile].sum() == size * (size + shared)
        start += size


@pytest.mark.parametrize(
    "bad",
    [
        lambda: NeighborhoodPattern((4, 4), 5),
        lambda: NeighborhoodPattern((8, 8), 3, 3),
        lambda: NeighborhoodPattern((8, 8), (3, 3, 3)),
        lambda: WindowPattern((4, 4), 0),
        lambda: WindowPattern((4, 4), 2, 2),
        lambda: SlidePattern(0, 3),
        lambda: OverlapPattern(4, 0),
        lambda: OverlapPattern(4, 2, -1),
        lambda: TilesSharedPattern(4, 5),
        lambda: TilesSharedPattern(4, 1, 0, 4),
        lambda: SegmentPattern(9, 1 << 63),
        lambda: WindowPattern(9, 1 << 63),
        lambda: SlidePattern(9, (1, 1 << 63)),
    ],
)
def test_bad_grid_patterns(bad):
    with pytest.raises(ValueError, match="="):
        bad()


@pytest.mark.parametrize("make", (
    lambda n: NeighborhoodPattern(n, 7), lambda n: NeighborhoodPattern(n, 7, 3, True),
    lambda n: WindowPattern(n, 16, 5)))
def test_pairs_are_counted_without_the_mask(make):
    n = 1 << 20
    tracemalloc.start()
    pairs = make(n).pairs()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * n  # bytes: a few integers per token
    few = make(1000).pairs()
    assert few == make(1000).mask().sum() and abs(pairs - few * n / 1000) < 0.05 * pairs


@pytest.mark.parametrize("given, window", [
    (np.array([3, 0]), (3, 0)), (torch.tensor([3, 0]), (3, 0)), (np.int64(7), (3, 3)),
    (np.array(7), (3, 3))])
def test_reaches_in_arrays(given, window): assert SlidePattern(9, given) == SlidePattern(9, window)


def test_reaches_and_offsets_that_no_sequence_has():
    most = sys.maxsize
    assert SlidePattern(5, (most, most)).mask().all() and SlidePattern(5, most).mask().all()
    assert SlidePattern(5, (0, most)).pairs() == 15
    for offset in (-most, most):
        same = TilesSharedPattern(10, 3, offset % 10)
        assert torch.equal(TilesSharedPattern(10, 3, offset).mask(), same.mask())
    for shift in (0, 3, 5, most - 1):
        wide, same = WindowPattern(5, most, shift), WindowPattern(5, 10, min(shift, 9))
        assert torch.equal(wide.mask(), same.mask()) and wide.pairs() == same.pairs()
    x = torch.randn(1, 2, 40, 8)
    whole = hilbert_attention(x, x, x)
    for size in (most, 1 << 61):
        torch.testing.assert_close(hilbert_attention(x, x, x, segment_size=size), whole)


@pytest.mark.parametrize("size", [(1 << 32) + 2, 1 << 62])
def test_segments_longer_than_an_order_of_32_bits_can_count(size):
    p, order = SegmentPattern(9, size, 2), curve_order(9)
    assert torch.equal(p.mask(order.int()), p.mask(order))


@pytest.mark.parametrize("shape", ((6,), (1, 5), (2, 1), (1, 1, 6)))
def test_a_key_mask_has_a_row_for_each_sequence(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"key_mask is .*: expected bool of shape \(B, N\), N = 6"):
        attention_mask(SlidePattern(6, 1), key_mask=mask)
