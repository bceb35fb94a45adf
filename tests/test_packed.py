"""Documents packed in one row, and prefixes: each row of the mask written out by hand."""
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from cases import Inputs, in_triton, inputs
from hypothesis import given
from hypothesis import strategies as st
from sampling import examples
from test_dilated import counted
from torch._dynamo.testing import CompileCounterWithBackend

from hilbert_attn import curve_order, dilated_attention
from hilbert_attn.dilated import _packed_attention, _prefix_attention
from hilbert_attn.integrations import HilbertSettings, prefix_attention
from hilbert_attn.patterns import COMBINES, DILATION_MODES


def random_inputs(seed, b, heads, kv_heads, n, d, dtype):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, generator=g).to(dtype) for h in (heads, kv_heads, kv_heads)]


@dataclass
class Pack:
    "Several documents or pictures, and branches that attend each."
    sizes: list[int]
    grids: list[tuple[int, int]] | None # None: documents
    shuffled: bool # are documents in another order than they lie?
    lengths: tuple[int, ...]
    rates: tuple[int, ...]
    combine: str
    mode: str
    offsets: int | None
    causal: bool
    inputs: Inputs

    def own_orders(self) -> list:
        "Of each document: token at each position, or None."
        if self.grids: return list(map(curve_order, self.grids))
        if not self.shuffled: return [None] * len(self.sizes)
        g = torch.Generator().manual_seed(self.inputs.seed)
        return [torch.randperm(size, generator=g) for size in self.sizes]

    def place(self, device="cpu") -> dict:
        "Arguments that say where documents are, and in which order."
        if self.grids: return dict(grid=self.grids)
        own, cut = self.own_orders(), borders(self.sizes)
        place = dict(cu_seqlens=torch.tensor(cut), curve=None)
        if not self.shuffled: return place
        return place | dict(order=torch.cat([x + at for x, at in zip(own, cut)]).to(device))

    def mask(self):
        "How often each key counts, int (1, H, N, N) in token order."
        how = self.lengths, self.rates, self.combine, self.mode, self.offsets
        heads = self.inputs.heads
        mask = torch.zeros(1, heads, sum(self.sizes), sum(self.sizes), dtype=torch.int64)
        for (a, b), order in zip(pairwise(borders(self.sizes)), self.own_orders()):
            mask[0, :, a:b, a:b] = counted(b - a, heads, *how, order, self.causal)
        return mask

    def check(self, device="cpu", **more):
        how = dict(combine=self.combine, dilation_mode=self.mode, offsets=self.offsets)
        how |= dict(self.place(device), causal=self.causal, **more)
        def attention(q, k, v, **options):
            return dilated_attention(q, k, v, self.lengths, self.rates, **how, **options)
        self.inputs.check(attention, self.mask(), device)


def borders(sizes): return [0, *torch.tensor(sizes).cumsum(0).tolist()]


@st.composite
def branches(draw) -> dict:
    "How keys are taken, in segments of each length."
    rates = draw(st.sampled_from(((1,), (2,), (1, 3))))
    return dict(lengths=tuple(draw(st.integers(3, 24)) for _ in rates), rates=rates,
                combine=draw(st.sampled_from(COMBINES)), causal=draw(st.booleans()))


def with_heads(case):
    "With two heads where two branches share them and there is one."
    few = case.combine == "heads" and case.inputs.heads < len(case.rates)
    return replace(case, inputs=replace(case.inputs, heads=2)) if few else case


@st.composite
def packs(draw, side=6, most=20) -> Pack:
    sides = st.integers(1, side)
    grids = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=4))
    sizes, pictures = [h * w for h, w in grids], draw(st.booleans())
    if not pictures: sizes = draw(st.lists(st.integers(0, most), min_size=1, max_size=5)) + [1]
    mode = draw(st.sampled_from(DILATION_MODES))
    offsets = None if mode == "residue" else draw(st.none() | st.integers(0, 6))
    return with_heads(Pack(
        sizes=sizes, grids=grids if pictures else None, shuffled=draw(st.booleans()), mode=mode,
        offsets=offsets, inputs=draw(inputs()), **draw(branches())))


@examples(40, 300)
@given(packs())
def test_packs_equal_the_oracle(case): case.check()


@examples(4, 60)
@given(packs(side=4, most=12))
def test_packs_in_triton(case): in_triton(lambda device: case.check(device, backend="triton"))


PACK = Pack(
    sizes=[12, 0, 1, 20], grids=None, shuffled=False, lengths=(5, 20), rates=(1, 3),
    combine="lse", mode="residue", offsets=None, causal=True, inputs=Inputs(
        b=2, heads=2, kv_heads=1, d=16, dv=16, masked=True, sinks=False, dtype=torch.float32,
        layout="BHND", scale=None, lse_grad=True, seed=0))


@pytest.mark.parametrize("backend", ["reference", "sdpa_mask", "triton"])
def test_packs_on_every_backend(backend):
    if backend == "triton": pytest.importorskip("triton")
    PACK.check(backend=backend)
    replace(PACK, sizes=[12, 6], grids=[(3, 4), (2, 3)]).check(backend=backend)


def test_packs_that_drop_weights_form_them(): PACK.check(backend="sdpa", dropout_p=1e-12)


def test_a_forward_derivative_goes_document_by_document():
    x = random_inputs(0, 1, 2, 2, 33, 16, torch.float64)
    with torch.autograd.forward_ad.dual_level():
        PACK.check()

    def of_queries(q): return dilated_attention(q, *x[1:], 8, 1, cu_seqlens=[0, 20, 33], curve=None)

    _, tangent = torch.func.jvp(of_queries, (x[0],), (torch.ones_like(x[0]),))
    assert tangent.isfinite().all() and (tangent != 0).any()


@pytest.mark.parametrize("combine, mode", [("lse", "longnet"), ("heads", None), ("lse", "keys")])
def test_each_document_is_its_own_call(combine, mode):
    "Bit by bit, forward and backward, for modes with rows or heads of their own."
    x = [y.requires_grad_() for y in random_inputs(3, 2, 4, 2, 50, 16, torch.float32)]
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
    q, k, _ = random_inputs(0, 1, 1, 1, 64, 32, torch.float32)
    values = torch.eye(32).repeat(2, 1)[None, None]
    q, k = (x[:, :, :32].repeat(1, 1, 2, 1) for x in (q, k))
    out = dilated_attention(
        q, k, values, 32, 1, cu_seqlens=[0, 32, 64], curve=None, dropout_p=0.5, backend="sdpa")
    assert not torch.equal(out[:, :, :32], out[:, :, 32:])


def test_orders_keep_documents_apart():
    x = random_inputs(0, 1, 1, 1, 20, 16, torch.float64)
    order = torch.cat([torch.randperm(12), 12 + torch.randperm(8)])
    packed = dilated_attention(*x, 5, 1, cu_seqlens=[0, 12, 20], order=order)
    parts = [(0, 12, order[:12]), (12, 20, order[12:] - 12)]
    alone = [dilated_attention(*(y[:, :, a:b] for y in x), 5, 1, order=o) for a, b, o in parts]
    assert torch.allclose(packed, torch.cat(alone, 2))
    with pytest.raises(ValueError, match="tokens of another one"):
        dilated_attention(*x, 5, 1, cu_seqlens=[0, 12, 20], order=order.flip(0), backend="sdpa")


def test_transforms_and_gradcheck():
    x = [y.requires_grad_() for y in random_inputs(0, 1, 2, 1, 11, 4, torch.float64)]
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
        x = [y.requires_grad_() for y in random_inputs(0, 1, 2, 1, sum(sizes), 16, torch.float32)]
        cu = torch.tensor(borders(sizes))
        out, expected = compiled(*x, cu), f(*x, cu)
        assert torch.allclose(out, expected, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(y.sin().sum(), x) for y in (out, expected))):
            assert torch.allclose(a, b, atol=1e-6)
    assert count.frame_count <= 2


CUT = torch.cat([torch.arange(5).flip(0), 5 + torch.arange(7).flip(0)])
SETTINGS = [4, 12], [1, 2], [1, 1], "residue", [0] * 4, True, [0.3, 2.0], 0.0, False
OPERATORS = dict(
    packed=(_packed_attention, CUT, (torch.tensor([0, 5, 12]), *SETTINGS)),
    prefix=(_prefix_attention, torch.arange(9).flip(0), (*SETTINGS, 3)))


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator, order, rest = OPERATORS[name]
    q, k, v = (y.requires_grad_() for y in random_inputs(0, 1, 2, 1, 12, 8, torch.float32))
    rest = order, torch.ones(1, 12, dtype=torch.bool), None, *rest
    torch.library.opcheck(operator.forward_op, (q, k, v, *rest))
    plain = [x.detach() for x in (q, k, v)]
    out, lse = operator(*plain, *rest)
    upstream = torch.ones_like(out), torch.ones_like(lse)
    torch.library.opcheck(operator.backward_op, (*upstream, *plain, out, lse, *rest))


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int32))
def test_borders_of_any_whole_numbers(dtype):
    x = random_inputs(0, 1, 1, 1, 12, 16, torch.float32)
    borders = torch.tensor([0, 7, 12])
    found, expected = (
        dilated_attention(*x, 4, 1, curve=None, cu_seqlens=y) for y in (borders.to(dtype), borders))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options, named", [
    (dict(cu_seqlens=[0, 5]), "end with N=12"),
    (dict(cu_seqlens=[1, 12]), "begin with 0"),
    (dict(cu_seqlens=[0, 7, 5, 12]), "never fall"),
    (dict(cu_seqlens=[0, -1, 12]), "cu_seqlens"),
    (dict(cu_seqlens=torch.tensor([0.0, 12.0])), "expected whole numbers of shape"),
    (dict(cu_seqlens=torch.tensor([False, True])), "expected whole numbers of shape"),
    (dict(cu_seqlens=torch.tensor(12)), "shape"),
    (dict(cu_seqlens=[0, 12], grid=(3, 4)), "give one of them"),
    (dict(cu_seqlens=[0, 12], curve="hilbert"), "curve='hilbert' with cu_seqlens"),
    (dict(grid=[(2, 3), (2, 2)]), "10 cells"),
    (dict(grid=[(2, 3), (2, 3)], curve="peano"), "peano"),
    (dict(cu_seqlens=[0, 12], order=torch.arange(11)), "order"),
])
def test_bad_packs(options, named):
    x = random_inputs(0, 1, 1, 1, 12, 16, torch.float32)
    with pytest.raises(ValueError, match=named):
        dilated_attention(*x, 4, 1, **(dict(curve=None) | options))


@dataclass
class Prefixed:
    "Branches over the cells behind a prefix."
    prefix: int
    grid: tuple[int, ...] # of the cells
    lengths: tuple[int, ...]
    rates: tuple[int, ...]
    combine: str
    causal: bool
    inputs: Inputs

    def mask(self):
        "How often each key counts, int (1, H, N, N)."
        cells, p = torch.Size(self.grid).numel(), self.prefix
        order = curve_order(self.grid) if len(self.grid) > 1 else None
        how = self.lengths, self.rates, self.combine, "residue", None, order, False
        mask = torch.ones(1, self.inputs.heads, p + cells, p + cells, dtype=torch.int64)
        mask[0, :, p:, p:] = counted(cells, self.inputs.heads, *how)
        return mask.tril() if self.causal else mask

    def check(self, device="cpu", **more):
        grid = self.grid if len(self.grid) > 1 else None
        settings = HilbertSettings(
            self.lengths, self.rates, combine=self.combine, grid=grid, prefix_tokens=self.prefix,
            **more)
        def attention(q, k, v, **options):
            return prefix_attention(q, k, v, settings, causal=self.causal, **options)
        self.inputs.check(attention, self.mask(), device)


@st.composite
def prefixes(draw, most=40, side=6) -> Prefixed:
    sides = st.integers(1, side)
    return with_heads(Prefixed(
        prefix=draw(st.integers(1, 9)),
        grid=draw(st.tuples(st.integers(1, most)) | st.tuples(sides, sides)),
        inputs=draw(inputs(sinks=(False,), widths=False, scales=(None, 0.3))), **draw(branches())))


@examples(40, 300)
@given(prefixes())
def test_prefixes_equal_the_oracle(case): case.check()


@examples(4, 60)
@given(prefixes(most=20, side=4))
def test_prefixes_in_triton(case): in_triton(lambda device: case.check(device, backend="triton"))


def test_a_prefix_is_one_operator_without_scores():
    "No N x prefix array: what grows with the tokens is q, k, v, results, and chunks."
    n, prefix = 5000, 64
    q, k, v = (x.requires_grad_() for x in random_inputs(0, 1, 1, 1, n + prefix, 16, torch.float32))
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
        x = [y.requires_grad_() for y in random_inputs(0, 1, 2, 1, n, 16, torch.float32)]
        out, expected = compiled(*x), f(*x)
        assert torch.allclose(out, expected, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(y.sin().sum(), x) for y in (out, expected))):
            assert torch.allclose(a, b, atol=1e-6)
    assert count.frame_count <= 2


def test_prefixes_under_transforms():
    x = random_inputs(0, 1, 2, 1, 13, 4, torch.float64)
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
