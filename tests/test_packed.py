"""Documents packed in one row, and prefixes: each row of the mask written out by hand."""
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling import examples
from torch._dynamo.testing import CompileCounterWithBackend

from hilbert_attn import curve_order, dilated_attention
from hilbert_attn.dilated import _packed_attention
from hilbert_attn.integrations import HilbertSettings, prefix_attention
from hilbert_attn.reference import assert_matches_oracle

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def residue_counts(n, lengths, rates):
    "How often key j counts for query i: once for each branch whose segment and residue they share."
    i = torch.arange(n)
    counts = torch.zeros(n, n, dtype=torch.int64)
    for w, r in zip(lengths, rates):
        same = (i // w)[:, None] == i // w
        counts += same & ((i % w % r)[:, None] == i % w % r)
    return counts


def inputs(seed, b, heads, kv_heads, n, d, dtype):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, generator=g).to(dtype) for h in (heads, kv_heads, kv_heads)]


@st.composite
def packs(draw):
    "Lengths or pictures, branches, and everything else of a call."
    pictures = draw(st.booleans())
    side = st.integers(1, 6)
    grids = draw(st.lists(st.tuples(side, side), min_size=1, max_size=4))
    sizes = [h * w for h, w in grids]
    if not pictures: sizes = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5)) + [1]
    rates = draw(st.sampled_from(((1,), (2,), (1, 3))))
    heads = draw(st.sampled_from(((1, 1), (2, 1), (4, 2))))
    return dict(
        sizes=sizes, grids=grids if pictures else None, rates=rates,
        lengths=tuple(draw(st.integers(3, 24)) for _ in rates), heads=heads,
        causal=draw(st.booleans()), masked=draw(st.booleans()), d=draw(st.sampled_from((8, 24))),
        dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 2**31)))


def pack_mask(case):
    "int (N, N) in token order."
    n = sum(case["sizes"])
    mask, at = torch.zeros(n, n, dtype=torch.int64), 0
    for i, size in enumerate(case["sizes"]):
        own = residue_counts(size, case["lengths"], case["rates"])
        if case["grids"]:
            rank = curve_order(case["grids"][i]).argsort()
            own = own[rank[:, None], rank]
        mask[at:at + size, at:at + size] = own
        at += size
    return mask.tril() if case["causal"] else mask


def borders(sizes): return [0, *torch.tensor(sizes).cumsum(0).tolist()]


def check_pack(case, backend="auto", dropout_p=0.0):
    mask, n = pack_mask(case)[None, None], sum(case["sizes"])
    q, k, v = inputs(case["seed"], 2, *case["heads"], n, case["d"], case["dtype"])
    key_mask = None
    if case["masked"]:
        key_mask = torch.rand(2, n, generator=torch.Generator().manual_seed(1)) < 0.7
        mask = mask * key_mask[:, None, None]
    place = dict(cu_seqlens=torch.tensor(borders(case["sizes"])), curve=None)
    if case["grids"]: place = dict(grid=case["grids"])

    def attention(q, k, v):
        return dilated_attention(
            q, k, v, case["lengths"], case["rates"], dilation_mode="residue", **place,
            causal=case["causal"], key_mask=key_mask, backend=backend, dropout_p=dropout_p,
            return_lse=True)

    assert_matches_oracle(attention, q, k, v, mask, seed=case["seed"])


@examples(40, 300)
@given(packs())
def test_packs_equal_the_oracle(case): check_pack(case)


PACK = dict(
    sizes=[12, 0, 1, 20], grids=None, rates=(1, 3), lengths=(5, 20), heads=(2, 1), causal=True,
    masked=True, d=16, dtype=torch.float32, seed=0)


@pytest.mark.parametrize("backend", ["reference", "sdpa_mask", "triton"])
def test_packs_on_every_backend(backend):
    if backend == "triton": pytest.importorskip("triton")
    check_pack(PACK, backend)
    check_pack(PACK | dict(sizes=[12, 6], grids=[(3, 4), (2, 3)]), backend)


def test_packs_that_drop_weights_form_them(): check_pack(PACK, "sdpa", 1e-12)


def test_a_forward_derivative_goes_document_by_document():
    x = inputs(0, 1, 2, 2, 33, 16, torch.float64)
    with torch.autograd.forward_ad.dual_level():
        check_pack(PACK)

    def of_queries(q): return dilated_attention(q, *x[1:], 8, 1, cu_seqlens=[0, 20, 33], curve=None)

    _, tangent = torch.func.jvp(of_queries, (x[0],), (torch.ones_like(x[0]),))
    assert tangent.isfinite().all() and (tangent != 0).any()


@pytest.mark.parametrize("combine, mode", [("lse", "longnet"), ("heads", None), ("lse", "keys")])
def test_each_document_is_its_own_call(combine, mode):
    "Bit by bit, forward and backward, for modes with rows or heads of their own."
    x = [y.requires_grad_() for y in inputs(3, 2, 4, 2, 50, 16, torch.float32)]
    how = dict(combine=combine, dilation_mode=mode, curve=None, backend="sdpa", return_lse=True)
    cut = borders([9, 0, 30, 1, 10])
    packed = dilated_attention(*x, (8, 30), (1, 2), cu_seqlens=cut, **how)
    alone = [dilated_attention(*(y[:, :, a:b] for y in x), (8, 30), (1, 2), **how)
             for a, b in pairwise(cut) if a < b]
    alone = [torch.cat(parts, 2) for parts in zip(*alone)]
    assert all(map(torch.equal, packed, alone))
    g = torch.randn(packed[0].shape)
    grads = [torch.autograd.grad(out, x, g) for out in (packed[0], alone[0])]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_documents_drop_other_weights():
    q, k, _ = inputs(0, 1, 1, 1, 64, 32, torch.float32)
    values = torch.eye(32).repeat(2, 1)[None, None]
    q, k = (x[:, :, :32].repeat(1, 1, 2, 1) for x in (q, k))
    out = dilated_attention(
        q, k, values, 32, 1, cu_seqlens=[0, 32, 64], curve=None, dropout_p=0.5, backend="sdpa")
    assert not torch.equal(out[:, :, :32], out[:, :, 32:])


def test_orders_keep_documents_apart():
    x = inputs(0, 1, 1, 1, 20, 16, torch.float64)
    order = torch.cat([torch.randperm(12), 12 + torch.randperm(8)])
    packed = dilated_attention(*x, 5, 1, cu_seqlens=[0, 12, 20], order=order)
    parts = [(0, 12, order[:12]), (12, 20, order[12:] - 12)]
    alone = [dilated_attention(*(y[:, :, a:b] for y in x), 5, 1, order=o) for a, b, o in parts]
    assert torch.allclose(packed, torch.cat(alone, 2))
    with pytest.raises(ValueError, match="tokens of another one"):
        dilated_attention(*x, 5, 1, cu_seqlens=[0, 12, 20], order=order.flip(0), backend="sdpa")


def test_transforms_and_gradcheck():
    x = [y.requires_grad_() for y in inputs(0, 1, 2, 1, 11, 4, torch.float64)]
    def f(*x):
        return dilated_attention(
            *x, (3, 8), (1, 2), cu_seqlens=[0, 4, 4, 5, 11], curve=None, return_lse=True,
            dilation_mode="residue", backend="sdpa")
    assert torch.autograd.gradcheck(f, x)
    loss = lambda *x: f(*x)[0].sin().sum()  # noqa: E731
    assert all(torch.allclose(a, b) for a, b in zip(
        torch.func.grad(loss, (0, 1, 2))(*x), torch.autograd.grad(loss(*x), x)))
    many = [torch.stack([y, 2 * y]) for y in x]
    mapped = torch.func.vmap(lambda *x: f(*x)[0])(*many)
    assert torch.allclose(mapped, torch.stack([f(*(y[i] for y in many))[0] for i in range(2)]))


def test_one_graph_for_packs_of_any_length():
    count = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def f(q, k, v, cu): return dilated_attention(q, k, v, 8, 1, cu_seqlens=cu, curve=None)

    compiled = torch.compile(f, fullgraph=True, backend=count)
    for sizes in ([9, 11], [4, 30, 7], [1, 0, 70], [50]):
        x = [y.requires_grad_() for y in inputs(0, 1, 2, 1, sum(sizes), 16, torch.float32)]
        cu = torch.tensor(borders(sizes))
        out, expected = compiled(*x, cu), f(*x, cu)
        assert torch.allclose(out, expected, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(y.sin().sum(), x) for y in (out, expected))):
            assert torch.allclose(a, b, atol=1e-6)
    assert count.frame_count <= 2


def test_opcheck():
    q, k, v = (y.requires_grad_() for y in inputs(0, 1, 2, 1, 12, 8, torch.float32))
    settings = [4, 12], [1, 2], [1, 1], "residue", [0] * 4, True, [0.3, 2.0], 0.0, False
    args = (q, k, v, torch.cat([torch.randperm(5), 5 + torch.randperm(7)]),
            torch.ones(1, 12, dtype=torch.bool), None, torch.tensor([0, 5, 12]), *settings)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration",
              "test_aot_dispatch_dynamic")
    torch.library.opcheck(_packed_attention.forward_op, args, test_utils=checks)


@pytest.mark.parametrize("options, named", [
    (dict(cu_seqlens=[0, 5]), "end with N=12"),
    (dict(cu_seqlens=[1, 12]), "begin with 0"),
    (dict(cu_seqlens=[0, 7, 5, 12]), "never fall"),
    (dict(cu_seqlens=[0, -1, 12]), "cu_seqlens"),
    (dict(cu_seqlens=torch.tensor([0.0, 12.0])), "int32 or int64"),
    (dict(cu_seqlens=torch.tensor(12)), "shape"),
    (dict(cu_seqlens=[0, 12], grid=(3, 4)), "give one of them"),
    (dict(cu_seqlens=[0, 12], curve="hilbert"), "curve='hilbert' with cu_seqlens"),
    (dict(grid=[(2, 3), (2, 2)]), "10 cells"),
    (dict(grid=[(2, 3), (2, 3)], curve="peano"), "peano"),
    (dict(cu_seqlens=[0, 12], order=torch.arange(11)), "order"),
])
def test_bad_packs(options, named):
    x = inputs(0, 1, 1, 1, 12, 16, torch.float32)
    with pytest.raises(ValueError, match=named):
        dilated_attention(*x, 4, 1, **(dict(curve=None) | options))


@st.composite
def prefixes(draw):
    cells, rates = draw(st.integers(1, 40)), draw(st.sampled_from(((1,), (2,), (1, 3))))
    return dict(
        cells=cells, prefix=draw(st.integers(1, 9)), rates=rates,
        lengths=tuple(draw(st.integers(3, 24)) for _ in rates),
        heads=draw(st.sampled_from(((1, 1), (2, 1), (4, 2)))), causal=draw(st.booleans()),
        masked=draw(st.booleans()), dtype=draw(st.sampled_from(DTYPES)),
        combine=draw(st.sampled_from(("lse", "heads"))), seed=draw(st.integers(0, 2**31)))


@examples(40, 300)
@given(prefixes())
def test_prefixes_equal_the_oracle(case):
    prefix, heads = case["prefix"], case["heads"]
    n = prefix + case["cells"]
    many = case["combine"] == "heads" and len(case["rates"]) > 1
    if many and heads[0] == 1: heads = (2, 1)
    settings = HilbertSettings(
        case["lengths"], case["rates"], combine=case["combine"], prefix_tokens=prefix)
    own = residue_counts(case["cells"], case["lengths"], case["rates"])[None]
    if many:
        branches = zip(case["lengths"], case["rates"])
        own = torch.stack([residue_counts(case["cells"], (w,), (r,)) for w, r in branches])
        own = own.repeat_interleave(heads[0] // 2, 0)
    mask = torch.ones(1, len(own), n, n, dtype=torch.int64)
    mask[:, :, prefix:, prefix:] = own
    if case["causal"]: mask = mask.tril()
    key_mask = None
    if case["masked"]:
        key_mask = torch.rand(2, n, generator=torch.Generator().manual_seed(1)) < 0.7
        mask = mask * key_mask[:, None, None]

    def attention(q, k, v):
        return prefix_attention(
            q, k, v, settings, causal=case["causal"], key_mask=key_mask, return_lse=True)

    q, k, v = inputs(case["seed"], 2, *heads, n, 16, case["dtype"])
    assert_matches_oracle(attention, q, k, v, mask, seed=case["seed"])


def test_a_prefix_is_one_operator_without_scores():
    "No N x prefix array: what grows with the tokens is q, k, v, results, and chunks."
    n, prefix = 5000, 64
    q, k, v = (x.requires_grad_() for x in inputs(0, 1, 1, 1, n + prefix, 16, torch.float32))
    settings = HilbertSettings(256, prefix_tokens=prefix)
    with torch.autograd.graph.saved_tensors_hooks(kept := Kept(), lambda x: x):
        prefix_attention(q, k, v, settings)
    assert max(kept.sizes) == q.numel()


class Kept:
    def __init__(self): self.sizes = []
    def __call__(self, x):
        self.sizes.append(x.numel())
        return x


def test_one_graph_for_prefixes_of_any_length():
    count = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    settings = HilbertSettings((8, 32), (1, 2), prefix_tokens=3)

    def f(q, k, v): return prefix_attention(q, k, v, settings, causal=True)

    compiled = torch.compile(f, fullgraph=True, backend=count)
    for n in (300, 41, 77, 512):
        x = [y.requires_grad_() for y in inputs(0, 1, 2, 1, n, 16, torch.float32)]
        out, expected = compiled(*x), f(*x)
        assert torch.allclose(out, expected, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(y.sin().sum(), x) for y in (out, expected))):
            assert torch.allclose(a, b, atol=1e-6)
    assert count.frame_count <= 2


def test_prefixes_under_transforms():
    x = inputs(0, 1, 2, 1, 13, 4, torch.float64)
    settings = HilbertSettings(4, prefix_tokens=2)
    def f(*x): return prefix_attention(*x, settings)
    def loss(*x): return f(*x).sin().sum()

    leaves = [y.clone().requires_grad_() for y in x]
    grads = torch.func.grad(loss, (0, 1, 2))(*x)
    assert all(map(torch.allclose, grads, torch.autograd.grad(loss(*leaves), leaves)))
    mapped = torch.func.vmap(f)(*(torch.stack([y, 2 * y]) for y in x))
    assert torch.allclose(mapped[1], f(*(2 * y for y in x)))
    _, tangent = torch.func.jvp(lambda q: f(q, *x[1:]), (x[0],), (torch.ones_like(x[0]),))
    assert tangent.isfinite().all() and (tangent != 0).any()
