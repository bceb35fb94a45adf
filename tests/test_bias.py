"""A bias on relative places: against a table that is read pair by pair, with its gradient."""
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from cases import GROUPS, assert_same_gradient, random_tensors
from hypothesis import given
from hypothesis import strategies as st
from sampling import examples, sampled
from torch._dynamo.testing import CompileCounterWithBackend

from hilbert_attn import (
    explain_backend,
    hilbert_attention,
    hilbert_slide_attention,
    hilbert_window_attention,
    neighborhood_attention,
    sdpa,
    window_attention,
)
from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import (
    NeighborhoodPattern,
    OverlapPattern,
    SegmentPattern,
    SlidePattern,
    WindowPattern,
    attention_mask,
)
from hilbert_attn.reference import Scores, assert_matches_oracle, masked_attention
from hilbert_attn.relative import alibi_bias

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("segments", "sequence", "window", "neighborhood", "stretches", "slide", "decoder")


def pair_by_pair(bias, grid):
    "(H, N, N): the entry of each difference, one after the other."
    cells = [[]]
    for side in grid: cells = [[*cell, i] for cell in cells for i in range(side)]
    rows = []
    for one in cells:
        for other in cells:
            places = [a - b + size // 2 for a, b, size in zip(one, other, bias.shape[1:])]
            inside = all(0 <= p < size for p, size in zip(places, bias.shape[1:]))
            rows.append(bias[(slice(None), *places)] if inside else torch.zeros_like(bias[:, 0, 0]
                        if bias.ndim > 2 else bias[:, 0]))
    return torch.stack(rows, 1).view(len(bias), len(cells), len(cells))


@dataclass
class Biased:
    "One call, described by small numbers."
    name: str # one of `NAMES`
    grid: tuple[int, ...]
    b: int
    heads: tuple[int, int] # H_kv, and query heads for each
    w: int
    r: int
    causal: bool
    masked: bool
    registers: int
    room: int # how much larger than needed the table is, on each side
    softcap: float | None
    dtype: torch.dtype
    backend: str
    seed: int

    @property
    def n(self): return torch.Size(self.grid).numel()

    def ask(self): # function, its options, the mask (N, N), how far pairs reach
        n, w, r, grid = self.n, self.w, self.r, self.grid
        whole = tuple(side - 1 for side in grid)
        if self.name == "segments":
            how = dict(grid=grid, segment_size=w, dilation_rate=r, causal=self.causal)
            mask = attention_mask(
                SegmentPattern(n, w, r), order=curve_order(grid), causal=self.causal)
            return hilbert_attention, how, mask, whole
        if self.name == "sequence":
            how = dict(curve=None, segment_size=w, dilation_rate=r, causal=self.causal)
            return hilbert_attention, how, attention_mask(
                SegmentPattern(n, w, r), causal=self.causal), (n - 1,)
        if self.name == "window":
            near = tuple(min(w, side) - 1 for side in grid)
            how = dict(grid=grid, window=w, shift=w // 3)
            return window_attention, how, WindowPattern(grid, w, w // 3).mask(), near
        if self.name == "neighborhood":
            kernel = tuple(min(w, side) for side in grid)
            how, near = dict(grid=grid, kernel_size=kernel), tuple(k - 1 for k in kernel)
            return neighborhood_attention, how, NeighborhoodPattern(grid, kernel).mask(), near
        if self.name == "stretches":
            mask = OverlapPattern(n, w).mask(curve_order(grid))
            return hilbert_window_attention, dict(grid=grid, window=w), mask, whole
        if self.name == "slide":
            mask = SlidePattern(n, w).mask(curve_order(grid))
            return hilbert_slide_attention, dict(grid=grid, window=w), mask, whole
        how = dict(grid=n, window=(w, 0), sinks=r, curve=None)
        return hilbert_slide_attention, how, SlidePattern(n, (w, 0), r).mask(), (n - 1,)

    def check(self):
        g, r = torch.Generator().manual_seed(self.seed), self.registers
        function, how, mask, near = self.ask()
        if function is hilbert_attention: r = 0
        heads = self.heads[0] * self.heads[1]
        (q,) = random_tensors(self.b, [heads], self.n, 16, self.dtype, g)
        k, v = random_tensors(self.b, [self.heads[0]] * 2, self.n + r, 16, self.dtype, g)
        sizes = [2 * (far + self.room) + 1 for far in near]
        bias = torch.randn(heads, *sizes, dtype=torch.float64, generator=g).to(self.dtype)
        bias.requires_grad_()
        grid = (self.n,) if len(near) == 1 else self.grid
        added = pair_by_pair(bias.double(), grid)
        added, mask = (torch.nn.functional.pad(x, (0, r), value=x.dtype == torch.bool)
                       for x in (added, mask.view(1, 1, self.n, self.n)))
        if self.masked:
            seen = torch.rand(self.b, self.n + r, generator=g) < 0.7
            how["key_mask"], mask = seen, mask & seen[:, None, None]

        def attention(q, k, v):
            more = dict(registers=(k[:, :, self.n:], v[:, :, self.n:])) if r else {}
            return function(
                q, k[:, :, :self.n], v[:, :, :self.n], **how, **more, bias=bias,
                softcap=self.softcap, backend=self.backend, return_lse=True)
        rule = Scores(0.25, self.softcap, added)
        assert_matches_oracle(attention, q, k, v, mask, scale=rule._replace(bias=added.detach()))
        exact = masked_attention(q.double(), k.double(), v.double(), mask, rule)
        assert_same_gradient(bias, attention(q, k, v)[:1], exact[:1], g)


@st.composite
def biased(draw) -> Biased:
    side = st.integers(1, 6)
    w = draw(st.integers(1, 20))
    return Biased(
        name=draw(st.sampled_from(NAMES)), grid=draw(st.tuples(side, side)),
        b=draw(st.integers(1, 2)), heads=draw(st.sampled_from(GROUPS)), w=w,
        r=draw(st.integers(1, min(w, 4))), causal=draw(st.booleans()), masked=draw(st.booleans()),
        registers=draw(st.sampled_from((0, 0, 2))), room=draw(st.sampled_from((0, 0, 1))),
        softcap=draw(st.sampled_from((None, None, 1.5))), dtype=draw(st.sampled_from(DTYPES)),
        backend=draw(st.sampled_from(("auto", "sdpa", "sdpa_mask", "reference"))),
        seed=draw(st.integers(0, 2**31)))


@examples(40, 300)
@given(biased())
def test_each_pair_has_its_entry(case: Biased): case.check()


def inputs(n=20, heads=2, grid=(4, 5)):
    torch.manual_seed(0)
    x = torch.randn(3, 1, heads, n, 8, dtype=torch.float64)
    table = torch.randn(heads, *(2 * side - 1 for side in grid), dtype=torch.float64)
    return [y.requires_grad_() for y in (*x.unbind(0), table)]


def segments(q, k, v, bias, **options):
    return hilbert_attention(q, k, v, grid=(4, 5), segment_size=7, bias=bias, **options)


def neighbours(q, k, v, bias, **options):
    return neighborhood_attention(q, k, v, (4, 5), 3, bias=bias, **options)


each = pytest.mark.parametrize("function", (segments, neighbours))


@each
def test_gradients(function):
    x = inputs()
    assert torch.autograd.gradcheck(lambda *x: function(*x, return_lse=True), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: function(*x), x, fast_mode=True)


@each
def test_graphs_and_transforms(function):
    x = inputs()
    expected = torch.autograd.grad(function(*x).sin().sum(), x)
    plain = [y.detach() for y in x]
    found = torch.func.grad(lambda *x: function(*x).sin().sum(), (0, 1, 2, 3))(*plain)
    torch.testing.assert_close(found, expected)
    mapped = torch.vmap(lambda bias: function(*plain[:3], bias))(torch.stack([plain[3]] * 2))
    torch.testing.assert_close(mapped[1], function(*plain))
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*x).sin().sum(), x), expected)


def decoder(q, k, v, bias):
    return hilbert_slide_attention(
        q, k, v, q.shape[2], (5, 0), sinks=2, curve=None, registers=(k[:, :, :2], v[:, :, :2]),
        bias=bias)


def text(q, k, v, bias):
    return hilbert_attention(q, k, v, segment_size=8, causal=True, curve=None, bias=bias)


SIZES = [(text, ((2, 40), (3, 24), (4, 72))), (decoder, ((2, 40), (3, 24)))] # batches, tokens


@pytest.mark.parametrize("function, sizes", sampled(SIZES, SIZES[1:]))
def test_two_graphs_for_all_sizes(function, sizes):
    "With a table wider than each of them needs. The tiles of a slide are those of one length."
    counter = CompileCounterWithBackend("aot_eager")
    table = torch.randn(2, 199, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for b, n in sizes:
        x = [*(y.detach().repeat(b, 1, 1, 1).requires_grad_() for y in inputs(n)[:3]), table]
        found, expected = compiled(*x), function(*x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.sin().sum(), x) for y in (found, expected)))
    assert counter.frame_count <= 2


def counted(monkeypatch, module, name):
    "Calls of a function, each a dictionary of its arguments by place and name."
    calls, real = [], getattr(module, name)
    def counting(*args, **options):
        calls.append(dict(enumerate(args)) | options)
        return real(*args, **options)
    monkeypatch.setattr(module, name, counting)
    return calls


@each
@pytest.mark.parametrize("backend", ("sdpa", "sdpa_mask"))
@pytest.mark.parametrize("fixed", (True, False))
def test_sdpa_takes_the_table_as_its_mask(monkeypatch, function, backend, fixed):
    "Nothing is written out for an LSE that nobody asked for; gradients are those of the oracle."
    x = inputs()
    leaves = x[:3] if fixed else x
    if fixed: x[3].requires_grad_(False)
    expected = function(*x, backend="reference")
    wanted = torch.autograd.grad(expected.sin().sum(), leaves)
    by_sdpa = counted(monkeypatch, torch.nn.functional, "scaled_dot_product_attention")
    written = counted(monkeypatch, sdpa, "masked_attention")
    out = function(*x, backend=backend)
    found = torch.autograd.grad(out.sin().sum(), leaves)
    assert by_sdpa and all(call[3].dtype == torch.float64 for call in by_sdpa)
    assert not written
    torch.testing.assert_close((out, *found), (expected, *wanted))
    for options in (dict(return_lse=True), dict(softcap=2.0)):
        written.clear()
        function(*x, backend=backend, **options)
        assert written


@each
def test_a_table_of_another_precision(function):
    "Scores are in the precision of the queries, or in float32."
    x = inputs()
    fine, coarse = function(*x[:3], x[3].float()), function(*(y.float() for y in x[:3]), x[3])
    assert fine.dtype == torch.float64 and coarse.dtype == torch.float32
    torch.testing.assert_close(fine, function(*x[:3], x[3].float().double()))
    torch.testing.assert_close(coarse.double(), fine, rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("options", (
    dict(return_lse=True), dict(softcap=2.0), dict(sink_logits=torch.zeros(2))))
def test_a_finer_table_where_scores_are_written(function, dtype, options):
    q, k, v, table = inputs()
    q, k, v, table = *(x.to(dtype) for x in (q, k, v)), table.detach().double().requires_grad_()
    out = function(q, k, v, table, **options)
    expected = function(q, k, v, table.float(), **options)
    torch.testing.assert_close(out, expected)
    out, expected = (x[0] if "return_lse" in options else x for x in (out, expected))
    found, wanted = (torch.autograd.grad(x.sum(), table)[0] for x in (out, expected))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def exact(function, q, k, v, *where, **options):
    "Is the default what the oracle says, with and without the LSE?"
    out, lse = function(q, k, v, *where, **options, backend="reference", return_lse=True)
    found = function(q, k, v, *where, **options, return_lse=True)
    torch.testing.assert_close(found, (out, lse), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        function(q, k, v, *where, **options), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("curve", (None, "row_major"))
@pytest.mark.parametrize("mode", ("residue", "longnet", "keys"))
@pytest.mark.parametrize("grid", ((6, 4), (4, 6), (2, 3, 4), (24,)))
def test_segments_that_are_no_whole_rows(grid, mode, curve):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, 2, 24, 8).unbind(0)
    bias = torch.randn(2, *(2 * side - 1 for side in grid))
    for size, rate in ((6, 1), (7, 2), (5, 1), (24, 3)):
        exact(
            hilbert_attention, q, k, v,
            grid=grid,
            curve=curve,
            segment_size=size,
            dilation_rate=rate,
            dilation_mode=mode,
            bias=bias,
        )


@pytest.mark.parametrize("overlap", (0, 3))
def test_windows_that_are_no_whole_rows(overlap):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 1, 1, 24, 8).unbind(0)
    exact(
        hilbert_window_attention, q, k, v, (6, 4), 6,
        overlap=overlap,
        curve=None,
        bias=torch.randn(1, 11, 7),
    )


# the grid, the kernel, key/value heads and query heads of each
BORDERS = [
    ((14, 14), 7, (1, 4)),
    ((12, 12), 7, (1, 1)),
    ((12, 12), 9, (1, 8)),
    ((16, 16), 11, (1, 4)),
    ((16, 16), 3, (2, 2)),
    ((24, 24), 13, (1, 2)),
    ((28, 28), 13, (1, 1)),
    ((197,), 106, (1, 2)),
    ((6, 7, 5), 3, (1, 3)),
]


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("grid, kernel, heads", BORDERS)
def test_neighbourhoods_at_borders(grid, kernel, heads, causal):
    torch.manual_seed(2)
    n, all_heads = torch.Size(grid).numel(), heads[0] * heads[1]
    q, k, v = (torch.randn(1, some, n, 8) for some in (all_heads, heads[0], heads[0]))
    bias = torch.randn(all_heads, *(2 * side - 1 for side in grid))
    exact(neighborhood_attention, q, k, v, grid, kernel, bias=bias,
          causal=(causal, *[False] * (len(grid) - 1)))


@pytest.mark.parametrize("registers", (0, 2))
def test_without_batches(registers):
    q, k, v = torch.randn(3, 0, 2, 20, 8).unbind(0)
    bias = torch.randn(2, 7, 9, requires_grad=True)
    more = dict(registers=(k[:, :, :registers], v[:, :, :registers])) if registers else {}
    overlapping = partial(hilbert_window_attention, overlap=2)
    for function in (
        window_attention,
        neighborhood_attention,
        overlapping,
        hilbert_slide_attention,
    ):
        out, lse = function(q, k, v, (4, 5), 3, bias=bias, **more, return_lse=True)
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        assert not torch.autograd.grad(out.sum(), bias)[0].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_gradient_of_a_narrow_table(dtype):
    "An entry may be that of thousands of pairs: their sum is not rounded one by one."
    q, k, v = torch.zeros(3, 1, 1, 2048, 8).unbind(0)
    def gradient(dtype):
        bias = torch.zeros(1, 4095, dtype=dtype, requires_grad=True)
        _, lse = hilbert_slide_attention(
            q, k, v, 2048, (15, 0), curve=None, bias=bias, return_lse=True)
        return torch.autograd.grad(lse.sum(), bias)[0].float()
    torch.testing.assert_close(gradient(dtype), gradient(torch.float32), rtol=0.01, atol=0)


def test_bit_identical():
    q, k, v = torch.randn(3, 1, 4, 900, 16).unbind(0)
    bias = torch.randn(4, 59, 59, requires_grad=True)
    def run():
        out = hilbert_attention(q, k, v, grid=(30, 30), segment_size=100, bias=bias)
        return out, *torch.autograd.grad(out.sin().sum(), bias)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try: assert all(torch.equal(a, b) for a, b in zip(run(), run()))
    finally: torch.set_num_threads(before)


def test_an_empty_batch_with_a_table():
    q = torch.randn(0, 2, 200, 8)
    out = hilbert_attention(q, q, q, segment_size=16, curve=None, bias=torch.randn(2, 399))
    assert out.shape == q.shape


def test_alibi_of_a_number_of_heads():
    table = alibi_bias(8, 3)
    assert table.shape == (8, 5) and table[0].tolist() == [-1.0, -0.5, 0.0, -0.5, -1.0]
    assert table[7, 0] == -2 * 2.0 ** -8


@pytest.mark.parametrize("slopes, n, message", [
    (0, 5, "slopes=0"),
    (2.5, 5, "slopes=2.5"),
    (True, 5, "slopes=True"),
    ([0.5], 5, "slopes="),
    (torch.ones(2, 1), 5, r"slopes is .* \(2, 1\)"),
    (torch.arange(2), 5, "int64"),
    (2, 0, "seq_len=0"),
    (2, 2.5, "seq_len=2.5"),
])
def test_alibi_of_what_are_no_slopes(slopes, n, message):
    with pytest.raises(ValueError, match=message):
        alibi_bias(slopes, n)


BAD = [
    (torch.zeros(2, 7), r"\(2, 7\) .* \(2, 7, 9\) or more"),
    (torch.zeros(3, 7, 9), r"\(3, 7, 9\)"),
    (torch.zeros(2, 7, 7), r"\(2, 7, 7\)"),
    (torch.zeros(2, 8, 9), "odd sizes"),
    (torch.zeros(2, 7, 9, dtype=torch.int64), "torch.int64"),
    (torch.zeros(2, 2049, 2049), "at most"),
    (0.5, "bias is float"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_tables(bad, message):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=message): segments(q, k, v, bad)


def test_kernels_say_that_they_do_not_take_it():
    x = inputs()
    with pytest.raises(RuntimeError, match="a bias on the scores"): segments(*x, backend="triton")
    choice = explain_backend((1, 2, 20, 8), grid=(4, 5), segment_size=7, bias=x[3])
    assert choice.backend == "sdpa" and "a bias" in choice.reason
