"""The Triton kernels, in Triton's interpreter where there is no GPU: against the oracle, forward
and backward, in everything that they claim."""
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from cases import cases, listening
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (  # noqa: F401  the fixtures apply here too
    DEVICE,
    RUNS,
    dirty,
    dropped_attention,
    far_and_near,
    heads,
    learning,
    permutation,
    poison,
    poisoned,
    randn,
    same,
    some,
    upstream,
)
from sampling import examples
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
from hilbert_attn.autograd import (
    HilbertAttentionFunction,
    triton_attention,
    triton_backward,
    triton_forward,
)
from hilbert_attn.curves import curve_order
from hilbert_attn.kernels import forward, launch, steps, tuning
from hilbert_attn.kernels.backward import attention_backward, fit_small
from hilbert_attn.kernels.forward import (
    attention_forward,
    fit_tile,
    hilbert_attention_kernel,
    standard_attention_kernel,
)
from hilbert_attn.kernels.tuning import Tile, TileCache, Workload, default_tile, split_head_dim
from hilbert_attn.patterns import DILATION_MODES, SegmentPattern, attention_mask
from hilbert_attn.reference import (
    Scores,
    assert_matches_oracle,
    masked_attention,
    reference_attention,
)

pytestmark = RUNS


def on_device(q, k, v, pattern, *, order, causal, key_mask, scale):
    "`triton_attention`, wherever the tensors come from."
    def move(x): return None if x is None else x.to(DEVICE)
    options = dict(order=move(order), causal=causal, key_mask=move(key_mask), scale=scale)
    out, lse = triton_attention(*map(move, (q, k, v)), pattern, **options)
    return out.to(q.device), lse.to(q.device)


class Kernels(torch.autograd.Function):
    "The kernels with given tiles, below the operators."
    @staticmethod
    def forward(ctx, q, k, v, pattern, options, tile):
        fields = pattern.segment_size, pattern.dilation_rate, pattern.mode, pattern.offsets
        ctx.rest = fields, options, tile
        out, lse = attention_forward(q, k, v, *fields, **options, tile=tile)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        fields, options, tile = ctx.rest
        tiles = None
        if tile:
            m, n, tma = tile.block_m, tile.block_n, tile.tma
            tiles = {"dq": Tile(m, n, tma=tma), "dkv": Tile(n, m, tma=tma)}
        saved = ctx.saved_tensors
        gradients = attention_backward(*saved, dout, dlse, *fields, **options, tiles=tiles)
        return *gradients, None, None, None


def check(pattern, x, tile=None, **options):
    "The kernels against the oracle."
    def run(*x): return Kernels.apply(*x, pattern, options, tile)
    assert_matches_oracle(run, *x, attention_mask(pattern, **options, device=DEVICE))


def offsets_of(mode): return (0,) if mode == "residue" else (1, 0)


@examples(20, 100)
@given(cases(max_n=48, head_dims=(16, 20, 24, 32, 40, 48, 64, 80)))
def test_equals_the_oracle(case): poison(lambda: case.check(on_device))


@st.composite
def patterns(draw, heads):
    n = draw(st.integers(20, 64))
    w, r = draw(st.integers(17, n)), draw(st.integers(1, 3))
    mode = draw(st.sampled_from(DILATION_MODES))
    offsets = draw(st.tuples(*[st.integers(0, r - 1)] * heads))
    return SegmentPattern(n, w, r, mode, (0,) if mode == "residue" else offsets)


@st.composite
def tiles(draw):
    "tma where descriptors are possible."
    size = draw(st.sampled_from([(16, 16), (32, 16), (16, 32)]))
    return Tile(*size, overlap=draw(st.booleans()), tma=draw(st.booleans()))


@examples(20, 60)
@given(st.data())
def test_every_tile_equals_the_oracle(data):
    "A small call that several tiles share."
    h, kv = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]), "heads")
    pattern, tile = data.draw(patterns(h)), data.draw(tiles())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    d, seed = data.draw(st.sampled_from([16, 32, 48])), data.draw(st.integers(0, 999))
    ordered, causal, masked = data.draw(st.tuples(*[st.booleans()] * 3), "order, causal, mask")
    n = pattern.seq_len
    x = [randn(1, count, n, d, dtype=dtype, seed=seed + i) for i, count in enumerate((h, kv, kv))]
    options = dict(order=permutation(n, seed) if ordered else None, causal=causal,
                   key_mask=some(1, n, share=0.7, seed=seed) if masked else None)
    poison(lambda: check(pattern, x, tile, **options))


ODD = [(1, 1, 1, "residue"), (63, 63, 2, "residue"), (65, 30, 7, "keys"), (65, 64, 3, "longnet"),
       (1000, 700, 7, "residue"), (1000, 1000, 3, "keys"), (1000, 333, 2, "longnet")]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("n, w, r, mode", ODD)
def test_odd_sizes(n, w, r, mode):
    tile = Tile(128, 64) if n == 1000 else None
    pattern = SegmentPattern.for_heads(n, 2, w, r, mode)
    check(pattern, heads([(2, n), (1, n), (1, n)]), tile, order=permutation(n, n))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("causal", [False, True])
def test_odd_sizes_without_an_order(causal):
    tile = Tile(128, 64, overlap=True)
    check(SegmentPattern(1000, 700, 3), heads([(1, 1000)] * 3), tile, causal=causal)


def test_rows_that_overlap():
    "Their results have rows in one piece."
    sizes, strides = (2, 2, 3, 8), (1, 1, 1, 1)
    flat = [x.as_strided(sizes, strides) for x in randn(3, 40)]
    leaves = [x.detach() for x in flat]
    copies = [x.double().contiguous() for x in leaves]
    for x in (*leaves, *copies): x.requires_grad_()
    pattern, found = SegmentPattern(3, 2), []
    for attention, own in (
        (triton_attention, leaves),
        (reference_attention, copies),
    ):
        out = attention(*own, pattern)[0]
        grads = torch.autograd.grad(out.sum(), own)
        found.append([out.double(), *grads])
    for x, y in zip(*found):
        x = x.double()
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [(16, 32), (32, 16)])
@pytest.mark.parametrize("mode", DILATION_MODES)
def test_the_diagonal_crosses_tiles_of_any_shape(mode, size):
    pattern = SegmentPattern(100, 100, 3, mode, (0,) if mode == "residue" else (1,))
    check(pattern, heads([(1, 100)] * 3), Tile(*size), causal=True)


SMALL = [(70, 60, 2), (21, 14, 2), (33, 31, 1)]  # pieces of a group, groups in a tile; ragged


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", DILATION_MODES)
@pytest.mark.parametrize("n, w, r", SMALL)
@pytest.mark.parametrize("traits", [(), ("causal", "order"), ("key_mask", "order")])
def test_gradients_of_small_groups(n, w, r, mode, traits):
    every = dict(causal=True, order=permutation(n), key_mask=some(1, n, share=0.7))
    pattern = SegmentPattern.for_heads(n, 2, w, r, mode)
    check(pattern, heads([(2, n), (1, n), (1, n)]), **{name: every[name] for name in traits})


@pytest.mark.usefixtures("poisoned")
def test_gradients_of_small_groups_with_scores_so_low_that_a_zero_overflows():
    "A masked key is read as 0, and exp(0 - lse) is infinite."
    q, k, v = heads([(2, 20), (1, 20), (1, 20)])
    check(SegmentPattern(20, 10), (q * 0 + 30, k * 0 - 30, v), key_mask=some(1, 20, share=0.7))


@pytest.fixture
def launches():
    with listening() as found: yield found


def names_of(launches): return [name for name, _ in launches]


@pytest.mark.parametrize("mode", DILATION_MODES)
@pytest.mark.parametrize("keys", [1, 16, 32, 33])
def test_one_kernel_does_the_backward_of_small_groups(launches, mode, keys):
    most = 32 if steps.interpreted else 64
    pattern = SegmentPattern.for_heads(2 * keys, 1, 2 * keys, 2, mode)
    x = learning(heads([(1, 2 * keys)] * 3))
    Kernels.apply(*x, pattern, {}, None)[0].sum().backward()
    backward = ["_small_kernel"] if keys <= most else ["_dq_kernel", "_dkv_kernel"]
    assert names_of(launches) == ["_forward_kernel", *backward]


@pytest.mark.parametrize("r, mode", [(1, "residue"), (2, "residue"), (2, "keys"), (2, "longnet")])
def test_warps_that_only_load(launches, r, mode):
    "Tiles of keys are whole, a tile of queries is cut off, heads have offsets of their own."
    x, tile = heads([(2, 96), (1, 96), (1, 96)], dtype=torch.float16), Tile(32, 16, tma=True)
    fields = 48 * r, r, mode, (0,) if mode == "residue" else (1, 0)

    def attend(tile, **options): return attention_forward(*x, *fields, tile=tile, **options)

    spared = replace(tile, producer=True)
    poison(lambda: attend(spared))
    assert same(attend(spared), attend(tile))
    assert [S.PRODUCER for _, S in launches[-2:]] == [True, False]
    attend(spared, causal=True)  # not every tile is attended by all
    assert not launches[-1][1].PRODUCER


def call_of(capability=(9, 0), dtype=torch.bfloat16, d=64, w=1024, r=2, **options):
    "On a Hopper GPU, unless another is asked for; and its queries."
    q = torch.empty(1, 2, 4096, d, dtype=dtype, device="meta")
    usual = dict.fromkeys(("order", "seed", "key_mask", "scale"))
    usual |= dict(causal=False, dropout_p=0.0) | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "capability", lambda device: capability)
        return forward.SegmentCall(q, q, w, r, "residue", (0,), **usual), q


def spares_warps(**settings):
    call, q = call_of(**settings)
    return call.spares_warps(q)


@pytest.mark.parametrize("changes", [
    dict(capability=(8, 0)), dict(capability=(10, 0)), dict(dtype=torch.float32), dict(d=32),
    dict(w=1040), dict(w=4096, r=3), dict(causal=True), dict(dropout_p=0.1),
    dict(key_mask=torch.ones(1, 4096, dtype=torch.bool)), dict(order=torch.arange(4096)),
    dict(scale=Scores(0.1, softcap=50.0))])
def test_warps_that_only_load_are_tried_for_whole_tiles_on_hopper(changes):
    assert spares_warps() and spares_warps(d=128, w=512)
    assert not spares_warps(**changes)


@pytest.mark.parametrize("kernel, d, capability", [
    ("dq", 64, (8, 0)), ("dkv", 128, (8, 0)), ("dq", 128, (10, 0))])
def test_a_cap_takes_smaller_tiles_where_registers_run_out(kernel, d, capability):
    def tile(scale): return call_of(capability, d=d, scale=scale)[0].default(kernel)
    usual, capped = tile(None), tile(Scores(0.1, softcap=50.0))
    assert capped.block_m * capped.block_n < usual.block_m * usual.block_n


def test_memory_for_descriptors_is_lent_for_one_launch():
    from triton.runtime._allocation import _allocator
    before = _allocator.get()
    assert launch._with_memory(_allocator.get) is launch._memory
    assert _allocator.get() is before


def test_tiles_of_two_kernels_mean_two_kernels(launches):
    x = learning(heads([(1, 16)] * 3))
    Kernels.apply(*x, SegmentPattern(16, 16), {}, Tile(16, 16))[0].sum().backward()
    assert names_of(launches) == ["_forward_kernel", "_dq_kernel", "_dkv_kernel"]


def test_small_groups_of_gpus_fit_registers():
    bf16, hopper, ampere = torch.bfloat16, (9, 0), (8, 0)
    fit = fit_small
    assert fit(128, True, 64, bf16, hopper).single and not fit(128, True, 128, bf16, hopper).single
    assert fit(20, True, 64, bf16, hopper).pack == 2 and fit(20, False, 64, bf16, hopper).pack == 1
    for refused in ((129, True, 64, bf16, hopper), (128, True, 128, bf16, ampere),
                    (65, True, 80, bf16, hopper), (16, True, 256, bf16, hopper),
                    (16, False, 64, torch.float32, hopper)): assert fit(*refused) is None
    assert fit(128, True, 64, bf16, ampere) and not fit(128, True, 64, bf16, ampere, dropout=True)


@pytest.mark.grid
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [16, 17, 48, 72, 80, 96, 100, 128, 160, 192, 256])
def test_head_dims(d, dtype):
    x = heads([(2, 40), (1, 40), (1, 40)], d, dtype=dtype)
    for tile in (None, Tile(16, 16)):
        check(SegmentPattern(40, 36, 2), x, tile, order=permutation(40, d))


def test_columns_are_split_into_powers_of_two():
    expected = {16: (16, 0), 20: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32),
                112: (128, 0), 160: (128, 32), 192: (128, 64), 256: (256, 0)}
    assert {d: split_head_dim(d) for d in expected} == expected
    for d in range(16, 257):
        a, b = split_head_dim(d)
        assert a + b >= d and math.log2(a).is_integer()
        assert b == 0 or math.log2(b).is_integer()


@pytest.mark.grid
@pytest.mark.parametrize("mode", DILATION_MODES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(mode, causal):
    pattern = SegmentPattern(9, 7, 2, mode, offsets_of(mode))
    x = [t.requires_grad_() for t in heads([(2, 9), (1, 9), (1, 9)], 2, dtype=torch.float64)]
    key_mask = torch.tensor([[True] * 6 + [False] + [True] * 2], device=DEVICE)
    options = dict(order=permutation(9), causal=causal, key_mask=key_mask)

    def attend(q, k, v):
        out, lse = triton_attention(q, k, v, pattern, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0)  # differences of infinities are NaN

    assert torch.autograd.gradcheck(attend, x, fast_mode=mode != "residue" or causal)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_scales_of_any_sign(scale):
    pattern = SegmentPattern(20, 20)
    def run(*x): return triton_attention(*x, pattern, scale=scale)
    mask = attention_mask(pattern, device=DEVICE)
    assert_matches_oracle(run, *heads([(1, 20)] * 3), mask, scale=scale)


@pytest.mark.parametrize("mode", DILATION_MODES)
def test_what_lies_in_masked_tokens_does_not_matter(mode):
    pattern, key_mask = SegmentPattern.for_heads(40, 2, 40, 2, mode), some(1, 40, share=0.6)
    q, k, v = heads([(2, 40)] * 3)
    runs = []
    for kv in ((k, v), (dirty(k, key_mask, torch.nan), dirty(v, key_mask, torch.inf))):
        x = [q.clone().requires_grad_(), *(t.clone().requires_grad_() for t in kv)]
        out, lse = triton_attention(*x, pattern, key_mask=key_mask)
        runs.append([out, lse, *torch.autograd.grad(out, x, q)])
    assert same(*runs) and runs[1][0].isfinite().all()


@pytest.mark.usefixtures("poisoned")
def test_a_key_mask_with_any_strides():
    pattern, key_mask = SegmentPattern(40, 20, 2), some(40, 2, share=0.5).T
    def run(*x): return triton_attention(*x, pattern, key_mask=key_mask)
    mask = attention_mask(pattern, key_mask=key_mask, device=DEVICE)
    assert_matches_oracle(run, *heads([(2, 40)] * 3, batch=2), mask)


@pytest.mark.usefixtures("poisoned")
def test_rows_without_keys_are_zero_and_pass_no_gradient():
    pattern = SegmentPattern(9, 4, 3, "keys", (2,))  # the last segment has no key of residue 2
    x = [t.requires_grad_() for t in heads([(1, 9)] * 3)]
    out, lse = triton_attention(*x, pattern)
    assert (out[:, :, 8] == 0).all() and (lse[:, :, 8] == -torch.inf).all()
    assert out.isfinite().all()
    dlse = torch.full_like(lse, torch.nan).where(lse == -torch.inf, 1.0)
    grads = torch.autograd.grad((out, lse), x, (torch.ones_like(out), dlse))
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, 8] == 0).all()


def test_offsets_beyond_int32(monkeypatch):
    tiles = dict(dq=Tile(16, 16), dkv=Tile(16, 16))
    for order in (None, torch.tensor([2, 0, 1], device=DEVICE)):
        runs, others = [], []
        for q, k, v, do in far_and_near(monkeypatch):
            saved = attention_forward(q, k, v, 3, order=order)
            run = [q, k, v, *saved, do, None, 3]
            runs.append([*saved, *attention_backward(*run, order=order)])
            others.append(attention_backward(*run, mode="keys", order=order, tiles=tiles))
        assert same(*runs)
        for other in others:  # by the two kernels of large groups
            for a, b in zip(other, runs[0][2:]): torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", DILATION_MODES)
def test_bit_identical_repeats(mode):
    pattern = SegmentPattern.for_heads(70, 4, 50, 2, mode)
    order = curve_order((7, 10), device=DEVICE)
    x = heads([(4, 70), (2, 70), (2, 70)], batch=2, dtype=torch.bfloat16)
    x = [t.requires_grad_() for t in x]
    runs = []
    for _ in range(2):
        out, lse = triton_attention(*x, pattern, order=order)
        upstream = out, lse.nan_to_num(neginf=0)
        runs.append([out, lse, *torch.autograd.grad((out, lse), x, upstream)])
    assert same(*runs)


def test_layouts_are_kept():
    x = [randn(2, 30, 3, 16, seed=i).transpose(1, 2).requires_grad_() for i in range(3)]
    out, _ = triton_attention(*x, SegmentPattern(30, 10))
    for t in (out, *torch.autograd.grad(out.sum(), x)): assert t.stride() == x[0].stride()


def test_historic_names():
    x, order = heads([(2, 24)] * 3), permutation(24)
    ours = hilbert_attention_kernel(*x, order, 12, 2)
    assert same(ours, triton_attention(*x, SegmentPattern(24, 12, 2), order=order))
    assert same(standard_attention_kernel(*x), triton_attention(*x, SegmentPattern(24, 24)))


@pytest.fixture
def products(monkeypatch):
    "How often two tiles were multiplied for scores, or for their gradient."
    if not steps.interpreted: pytest.skip("counts in Triton's interpreter")
    counted, scores = [], steps.scores

    def count(*arguments):
        counted.append(1)
        return scores(*arguments)

    monkeypatch.setattr(steps, "scores", count)
    return counted


@pytest.mark.parametrize("mode, r", [("residue", 1), ("residue", 2), ("longnet", 2), ("keys", 1)])
@pytest.mark.parametrize("ordered", [False, True])
def test_causal_visits_half_of_the_tiles(products, mode, r, ordered):
    "With an order too, where queries and keys are the same rows."
    n, tile = 64 * r, Tile(16, 16)
    pattern, options = SegmentPattern(n, n, r, mode), dict(causal=True)
    if ordered: options["order"] = permutation(n)
    x = learning(heads([(1, n)] * 3))
    out, _ = Kernels.apply(*x, pattern, options, tile)
    groups = 1 if mode == "longnet" else r  # the others attend nothing
    all_masked = ordered and mode == "keys"
    tiles = groups * (16 if all_masked else 1 + 2 + 3 + 4)
    assert len(products) == tiles
    out.sum().backward()
    assert len(products) == tiles + 2 * tiles + 2 * tiles  # s and dp, twice


def test_sorted_groups_are_the_same_groups():
    for n, w, r in ((64, 64, 1), (61, 20, 3), (50, 50, 7)):
        order, groups = permutation(n), SegmentPattern(n, w, r)
        sorted_order = forward.ascending(order, w, r)
        assert forward.ascending(order, w, r) is sorted_order
        for index in (range(s + c, min(s + w, n), r) for s in range(0, n, w) for c in range(r)):
            assert sorted_order[[*index]].tolist() == sorted(order[[*index]].tolist())
        masks = [groups.mask(o.cpu()) for o in (order, sorted_order)]
        assert torch.equal(*masks)


def test_a_captured_graph_keeps_no_sorted_order(monkeypatch):
    known, fresh = permutation(40), permutation(40, 1)
    before = forward.ascending(known, 20, 2)
    monkeypatch.setattr(forward, "capturing", lambda device: True)
    assert forward.ascending(known, 20, 2) is before
    assert forward.ascending(fresh, 20, 2) is not forward.ascending(fresh, 20, 2)


# ---- operators

SETTINGS = dict(order=permutation(20), key_mask=None, seed=None, segment_size=10, dilation_rate=2,
                mode="longnet", offsets=[0, 1], causal=True, scale=[0.25], dropout_p=0.0)
PLAIN = dict(order=None, causal=False, mode="residue", offsets=[0])
CHANGES = dict(order={}, plain=PLAIN,
               dropout=dict(seed=torch.tensor([3], device=DEVICE), dropout_p=0.5),
               cap=dict(scale=[0.25, 2.0]),
               mask=dict(key_mask=torch.ones(1, 20, dtype=torch.bool, device=DEVICE)))


def operator_arguments(requires_grad=True, **changes):
    x = heads([(2, 20), (1, 20), (1, 20)], dtype=torch.float64)
    return *(t.requires_grad_(requires_grad) for t in x), *(SETTINGS | changes).values()


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_opcheck_forward(changes):
    torch.library.opcheck(triton_forward, operator_arguments(**changes))


@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck_backward(with_lse):
    q, k, v, *rest = operator_arguments(False)
    out, lse = triton_forward(q, k, v, *rest)
    dout, dlse = upstream(with_lse)
    torch.library.opcheck(triton_backward, (dout, dlse, q, k, v, out, lse, *rest))


def test_the_function_and_the_operator_are_one():
    arguments = operator_arguments()
    results = []
    for function in (HilbertAttentionFunction.apply, triton_forward):
        out = function(*arguments)[0]
        results.append(torch.autograd.grad(out.square().sum(), arguments[:3]))
    assert same(*results)


def test_transforms_of_the_operators():
    x = [torch.stack([y, 2 * y]).detach() for y in operator_arguments(False)[:3]]
    pattern = SegmentPattern.for_heads(20, 2, 10, 2, "longnet")
    def attend(*x): return triton_attention(*x, pattern, causal=True)[0]
    def loss(*x): return attend(*x).square().sum()
    assert same(torch.func.vmap(attend)(*x), torch.stack([attend(*one) for one in zip(*x)]))
    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*x)
    leaves = [y.requires_grad_() for y in x]
    assert same(found, torch.autograd.grad(sum(map(loss, *leaves)), leaves))


def test_flops_of_the_operators():
    x = [torch.cat([y, y]) for y in operator_arguments()[:3]]
    pattern = SegmentPattern.for_heads(20, 2, 10, 2, "longnet")
    pairs = 2 * pattern.pairs(2)
    with FlopCounterMode(display=False) as forward: out = triton_attention(*x, pattern)[0]
    with FlopCounterMode(display=False) as backward: out.sum().backward()
    counts = forward.get_total_flops(), backward.get_total_flops()
    assert counts == (4 * x[0].shape[3] * pairs, 10 * x[0].shape[3] * pairs)


def test_only_the_lse():
    q, k, v, *rest = operator_arguments(**PLAIN)
    mask = SegmentPattern(20, 10, 2).mask().to(DEVICE)
    ours, theirs = triton_forward(q, k, v, *rest)[1], masked_attention(q, k, v, mask, 0.25)[1]
    grads = [torch.autograd.grad(lse.sum(), (q, k)) for lse in (ours, theirs)]
    torch.testing.assert_close(*grads)


class Attend(torch.nn.Module):
    def forward(self, q, k, v, order=None):
        pattern = SegmentPattern(q.shape[2], 8, 2)
        out, lse = triton_attention(q, k, v, pattern, order=order, causal=True)
        return out * 2 + lse[..., None].to(out.dtype)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Attend(), fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (16, 27) if dynamic else (16,):
        x = [t.requires_grad_() for t in heads([(2, n), (1, n), (1, n)])]
        for order in (None, permutation(n)):
            results = []
            for f in (compiled, Attend()):
                out = f(*x, order)
                results.append([out, *torch.autograd.grad(out.square().sum(), x)])
            torch.testing.assert_close(*results)


def test_a_dense_segment_follows_a_symbolic_length():
    def dense(q): return triton_attention(q, q, q, SegmentPattern.for_heads(q.shape[2], 1))[0]
    torch._dynamo.reset()
    compiled = torch.compile(dense, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (20, 33):
        q = randn(1, 1, n, 16)
        assert torch.equal(compiled(q), dense(q))


@pytest.mark.parametrize("dynamic", [False, True])
def test_exports(dynamic):
    shapes = None
    if dynamic:
        tokens = torch.export.Dim("tokens", min=8, max=1 << 20)
        shapes = {name: {2: tokens} for name in "qkv"} | {"order": None}
    x, y = (heads([(2, n), (1, n), (1, n)]) for n in (24, 33 if dynamic else 24))
    program = torch.export.export(Attend(), (*x, None), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(*y, None), Attend()(*y))


# ---- dropout

def unit_values(n):
    "Values that make the weights visible."
    return torch.eye(n, dtype=torch.float64, device=DEVICE).expand(1, 2, n, n)


def kept_weights(p, seed, n=32, **options):
    q, k = heads([(2, n)] * 2, n, dtype=torch.float64)
    options |= dict(dropout_p=p, seed=torch.tensor([seed], device=DEVICE))
    return attention_forward(q, k, unit_values(n), n, **options)[0] != 0


def test_dropout_depends_on_seed_head_and_tokens_only():
    kept = kept_weights(0.4, 1)
    assert torch.equal(kept, kept_weights(0.4, 1, tile=Tile(16, 16)))
    assert torch.equal(kept, kept_weights(0.4, 1, order=permutation(32)))
    assert not torch.equal(kept, kept_weights(0.4, 2))
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(kept_weights(0.4, 1, n=64)[:, 0, :32, :32], kept[:, 0])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share(p):
    share = kept_weights(p, 3, n=64).double().mean().item()
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / 2 / 64 ** 2)


@pytest.mark.parametrize("tile", [None, Tile(16, 16)])
@pytest.mark.parametrize("mode", ["residue", "keys"])
def test_dropout_backward_has_the_same_mask(mode, tile):
    n, p = 32, 0.3
    pattern = SegmentPattern(n, n, 2, "keys", (1,)) if mode == "keys" else SegmentPattern(n, n)
    options = dict(order=permutation(n, 1), causal=True)
    mask = attention_mask(pattern, **options, device=DEVICE)
    options |= dict(dropout_p=p, seed=torch.tensor([5], device=DEVICE))
    q, k, v = heads([(2, n)] * 3, n, dtype=torch.float64)
    kept = Kernels.apply(q, k, unit_values(n), pattern, options, tile)[0] != 0
    x = [t.requires_grad_() for t in (q, k, v)]
    ours = Kernels.apply(*x, pattern, options, tile)
    theirs = dropped_attention(*x, mask, kept, p)
    torch.testing.assert_close(ours[0], theirs[0])
    dout = randn(1, 2, n, n, dtype=torch.float64, seed=9)
    dlse = randn(1, 2, n, dtype=torch.float64, seed=8) * mask.any(-1)
    torch.testing.assert_close(*(torch.autograd.grad(f, x, (dout, dlse)) for f in (ours, theirs)))


def test_dropout_keeps_the_mean_and_follows_torchs_generator():
    x, pattern = heads([(1, 16)] * 3), SegmentPattern(16, 16)
    def run(p): return triton_attention(*x, pattern, dropout_p=p)[0]
    runs, exact = torch.stack([run(0.2) for _ in range(150)]), run(0.0)
    assert (runs.mean(0) - exact).abs().max() < 5 * (runs.std(0) / math.sqrt(150)).max()
    torch.manual_seed(3)
    first = run(0.2)
    torch.manual_seed(3)
    assert torch.equal(first, run(0.2)) and (run(1.0) == 0).all()


# ---- tiles, and where it can't run

ROWS = [(1, 1), (5, 5), (16, 16), (33, 33), (64, 64), (100, 100), (128, 128), (1000, 1000),
        (64, 16), (4096, 20), (7, 3)]


@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tiles_fit_their_groups(capability, dtype):
    for d, (q_rows, k_rows) in product((16, 64, 80, 128, 256), ROWS):
        wanted = default_tile("forward", d, dtype, capability)
        fit = fit_tile(wanted, q_rows, k_rows, d, dtype, capability)
        m, n = fit.tile.block_m, fit.tile.block_n
        assert m >= 16 and n >= 16 and m % fit.pack == 0 and n % fit.pack == 0
        if fit.pack > 1: assert fit.single and m // fit.pack >= q_rows
        if fit.single: assert n // fit.pack >= k_rows


def test_tuned_tiles_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("HILBERT_ATTN_CACHE", str(tmp_path / "cache"))
    one, other = TileCache(), TileCache()  # of two processes that know nothing of each other
    assert one.get("a") is None and other.get("b") is None
    overlapped = Tile(64, 32, 4, 2, overlap=True)
    one.put("a", overlapped)
    other.put("b", Tile(128, 64))
    fresh = TileCache()
    assert fresh.get("a") == overlapped and fresh.get("b") == Tile(128, 64)
    tuning.tile_cache_path().write_text("{ not json")
    assert TileCache().get("a") is None


def test_tuned_tiles_stay_in_memory_where_the_disk_refuses(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("HILBERT_ATTN_CACHE", str(blocked))
    cache = TileCache()
    cache.put("a", Tile(16, 16))
    assert cache.get("a") == Tile(16, 16)


def run_python(code):
    "A fresh process, without the interpreter."
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env=inherited, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


NO_TRITON = """
import sys
sys.modules["triton"] = None
import hilbert_attn.kernels.backward, hilbert_attn.kernels.block_sparse
"""
ATTEMPT = """
import torch
from hilbert_attn.autograd import triton_attention
from hilbert_attn.patterns import SegmentPattern
x = torch.randn(1, 1, 8, 16)
try: triton_attention(x, x, x, SegmentPattern(8, 8))
except RuntimeError as e: print(e)
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="is about CPUs")
def test_says_why_it_cannot_run():
    said = run_python(ATTEMPT)
    assert "NVIDIA GPU" in said and "TRITON_INTERPRET=1" in said and "backend='sdpa'" in said


def test_imports_where_triton_is_missing():
    said = run_python(NO_TRITON + ATTEMPT)
    assert "package triton" in said and "backend='sdpa'" in said


def test_tf32_only_where_torch_was_told_so():
    assert launch._precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert launch._precision(torch.float32) == "tf32"
        assert launch._precision(torch.float64) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


USUAL = dict(kernel="dkv", head_dim=128, keys=1000, heads=(8, 2), dtype=torch.bfloat16)
OTHER_WORK = [{}, dict(kernel="dq"), dict(head_dim=64), dict(keys=100), dict(heads=(8, 8)),
              dict(dtype=torch.float16), dict(traits=("dropout",)), dict(traits=("mask",)),
              dict(tma=True)]


def test_the_tuner_knows_what_a_tile_may_depend_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    def key(**change): return Workload(**USUAL | change).key(torch.device("cuda"))
    keys = {key(**change) for change in OTHER_WORK}
    assert len(keys) == len(OTHER_WORK) and all("NVIDIA X" in key for key in keys)
    assert key(keys=5000) == key(keys=2048)


def test_the_tuner_takes_the_fastest_tile(tmp_path, monkeypatch):
    monkeypatch.setenv("HILBERT_ATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    fakes = dict(interpreted=False, tile_cache=TileCache(), _may_time=lambda q: True)
    for name, fake in fakes.items(): monkeypatch.setattr(tuning, name, fake)
    default = default_tile("forward", 64, torch.bfloat16, (9, 0))
    work = Workload("forward", 64, 1024, (8, 8), torch.bfloat16)
    slow, *others = work.candidates(default)
    seconds = {tile: 3.0 - i for i, tile in enumerate([slow, *others[:2]])}
    monkeypatch.setattr(tuning, "time_launch", lambda run: seconds.get(run(), 9.0))
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16)
    assert tuning.tuned_tile(work, default, q, lambda tile: tile) == others[1]


def test_candidates_are_those_that_nothing_spoils():
    default = default_tile("forward", 64, torch.bfloat16, (9, 0))

    def candidates(*traits, tma=False, kernel="forward"):
        work = Workload(kernel, 64, 1024, (8, 8), torch.bfloat16, traits, tma)
        return work.candidates(default)

    plain, described = candidates(), candidates(tma=True)
    assert plain[0] == default and len(plain) == len(set(plain)) > 2
    assert not any(tile.tma for tile in plain) and any(tile.tma for tile in described)
    assert not any(tile.overlap for tile in candidates("order", tma=True))
    for trait in ("dropout", "mask", "causal", "softcap", "blocks"):
        assert len(candidates(trait, tma=True)) < len(described)
    assert candidates("whole", tma=True) == [*described, *tuning.PRODUCERS]
    assert candidates("causal", kernel="dkv", tma=True) == [default]


class PretendCUDA:
    "A stand-in whose clock counts replayed launches."
    def __init__(self): self.launched, self.clock, self.graphs = [], 0.0, []

    def Event(self, enable_timing): return Mark(self)
    def CUDAGraph(self): return Graph(self)
    def graph(self, graph, capture_error_mode): return Capture(graph)
    def Stream(self): return Stream()
    def stream(self, stream): return stream
    def current_stream(self): return Stream()


class Mark:
    def __init__(self, cuda): self.cuda = cuda
    def record(self): self.at = self.cuda.clock
    def synchronize(self): pass
    def elapsed_time(self, other): return other.at - self.at


class Graph:
    def __init__(self, cuda): self.cuda = cuda
    def replay(self): self.cuda.clock += 3.0 * len(self.runs)


class Capture:
    def __init__(self, graph): self.graph = graph
    def __enter__(self): self.before = len(self.graph.cuda.launched)

    def __exit__(self, *_):
        self.graph.runs = self.graph.cuda.launched[self.before:]
        self.graph.cuda.graphs.append(self.graph)


class Stream:
    def wait_stream(self, other): pass
    def __enter__(self): pass
    def __exit__(self, *_): pass


def test_a_tile_is_timed_as_a_graph_of_ten(monkeypatch):
    cuda = PretendCUDA()
    for name in ("Event", "CUDAGraph", "graph", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    assert tuning.time_launch(lambda: cuda.launched.append(1)) == 3.0
    assert len(cuda.graphs) == 1 and len(cuda.graphs[0].runs) == 10 and len(cuda.launched) == 11


def test_offsets_are_not_copied_from_the_host(monkeypatch):
    monkeypatch.setattr(forward, "_offset_tables", {})
    monkeypatch.setattr(torch, "tensor", None)

    def table(*offsets): return forward._offset_table(offsets, 5, torch.device("cpu"))

    known = table(2, 0, 1)
    assert known.tolist() == [2, 0, 1, 2, 0] and known.dtype == torch.int32
    assert table(2, 0, 1) is known
    monkeypatch.setattr(forward, "capturing", lambda device: True)
    assert table(2, 0, 1) is known  # read while a graph is captured
    assert table(1) is not table(1)  # and nothing new is kept
