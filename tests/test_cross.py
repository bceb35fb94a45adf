"""Cross-attention between segments of two curves, against a mask written from its definition.

Values of another width, and scores without a key, of every function."""
from dataclasses import dataclass

import pytest
import torch
from cases import Inputs, in_triton
from cases import inputs as drawn
from hypothesis import given
from hypothesis import strategies as st
from sampling import examples, sampled
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import hilbert_attn.cross as cross_module
from hilbert_attn import curve_order, hilbert_attention, hilbert_cross_attention
from hilbert_attn.backends import detect_gpu_architecture
from hilbert_attn.blocks.engine import block_stats
from hilbert_attn.blocks.planner import block_lists, cross_lists
from hilbert_attn.blocks.schedule import SparsePatternConfig
from hilbert_attn.cross import sdpa_cross
from hilbert_attn.patterns import CrossPattern, SegmentPattern

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("sdpa", "sdpa_mask", "reference", "expression")


def segment_mask(n, m, w):
    "bool (n, m) over positions: a key lies in the segment whose borders it lies between."
    mask = torch.zeros(n, m, dtype=torch.bool)
    for start in range(0, n, w):
        end = min(start + w, n)
        mask[start:end, start * m // n:end * m // n] = True
    return mask


@dataclass
class Cross:
    "One call, described by small numbers."
    grids: tuple[tuple[int, ...], tuple[int, ...]]
    orders: tuple[str, str] # "none", "random" or a curve
    w: int | None
    registers: int
    inputs: Inputs

    @property
    def sizes(self): return [torch.Size(grid).numel() for grid in self.grids]

    def place(self, device):
        "Arguments that say where tokens lie, and the orders that they mean."
        generator = torch.Generator().manual_seed(self.inputs.seed)
        given, orders = {}, []
        for prefix, n, grid, name in zip(("", "key_"), self.sizes, self.grids, self.orders):
            given[f"{prefix}grid"] = grid
            given[f"{prefix}curve"] = None if name in ("none", "random") else name
            orders.append(torch.arange(n))
            if name == "random":
                orders[-1] = torch.randperm(n, generator=generator)
                given[f"{prefix}order"] = orders[-1].to(device)
            elif name != "none": orders[-1] = curve_order(grid, name)
        return given, orders

    def mask(self, orders): # bool (1, 1, N, M + R)
        n, m = self.sizes
        mask = segment_mask(n, m, n if self.w is None else self.w)
        ranks = [order.argsort() for order in orders]
        mask = mask[ranks[0][:, None], ranks[1]][None, None]
        return torch.nn.functional.pad(mask, (0, self.registers), value=True)

    def check(self, backend, device="cpu"):
        place, orders = self.place(device)
        m = self.sizes[1]

        def attention(q, k, v, **options):
            own, more = [x[:, :, :m] for x in (k, v)], [x[:, :, m:] for x in (k, v)]
            rest = dict(place, segment_size=self.w, registers=more if self.registers else None)
            if backend == "expression": return as_expression(q, *own, **rest, **options)
            return hilbert_cross_attention(q, *own, **rest, **options, backend=backend)
        self.inputs.check(attention, self.mask(orders), device)


def as_expression(q, k, v, **options):
    "What is differentiated by PyTorch itself."
    with pytest.MonkeyPatch.context() as patch:
        def attend(call, backend, family):
            call.custom_backward = False
            return sdpa_cross(call.hidden())
        patch.setattr(cross_module, "attend", attend)
        return hilbert_cross_attention(q, k, v, **options)


@st.composite
def crosses(draw, most=9, dims=(8, 16, 20, 32)) -> Cross:
    side = st.integers(1, most)
    grids = [draw(st.tuples(side) | st.tuples(side, side) | st.tuples(side, side, st.just(2)))
             for _ in "qk"]
    n, m = (torch.Size(grid).numel() for grid in grids)
    orders = st.sampled_from(("none", "random", "hilbert", "morton"))
    return Cross(
        grids=tuple(grids),
        orders=tuple(draw(orders) for _ in "qk"),
        w=draw(st.none() | st.integers(-(-n // m), n + 3)),
        registers=draw(st.sampled_from((0, 0, 1, 3))),
        inputs=draw(drawn(dims=dims)))


@examples(40, 300)
@given(case=crosses())
def test_segments_of_two_curves(case): case.check("auto")


@pytest.mark.parametrize("backend", BACKENDS)
@examples(5, 300)
@given(case=crosses())
def test_on_every_backend(backend, case): case.check(backend)


@examples(4, 60)
@given(case=crosses(most=4, dims=(16, 32)))
def test_on_triton(case): in_triton(lambda device: case.check("triton", device))


def inputs(n=60, m=35, d=16, dv=16, heads=(2, 1), **options):
    g = torch.Generator().manual_seed(0)
    def rand(*shape): return torch.randn(shape, generator=g).to(**options)
    return rand(1, heads[0], n, d), rand(1, heads[1], m, d), rand(1, heads[1], m, dv)


def test_as_many_keys_as_queries_are_self_attention():
    q, k, v = inputs(60, 60)
    for w in (60, 7, 13, None):
        place = dict(grid=(10, 6), segment_size=w, return_lse=True)
        found = hilbert_cross_attention(q, k, v, key_grid=(10, 6), **place)
        torch.testing.assert_close(found, hilbert_attention(q, k, v, **place))


@pytest.mark.parametrize("n, m, w", [(64, 64, 16), (64, 32, 16), (100, 300, 25), (48, 4, 12)])
def test_segments_are_blocks_without_a_test(n, m, w):
    pattern = CrossPattern(n, m, w)
    lists = cross_lists(pattern, block_size=cross_module._block_size(pattern, False))
    stats = block_stats(lists)
    assert (stats.partial, stats.wasted, stats.pairs) == (0, 0, pattern.pairs())


def test_sides_of_blocks():
    def sizes(n, m, w): return [cross_module._block_size(CrossPattern(n, m, w), x) for x in (0, 1)]
    assert sizes(4096, 4096, 512) == [(128, 128), (128, 128)]
    assert sizes(4096, 1024, 300) == [(100, 75), (128, 128)]
    assert sizes(4096, 77, 600) == [(120, 12), (128, 16)]


def test_one_segment_needs_no_order(monkeypatch):
    found = []
    def attend(call, *_): return found.append(call.pattern) or (call.q, None)
    monkeypatch.setattr(cross_module, "attend", attend)
    for w in (None, 60, 59): hilbert_cross_attention(Q, K, V, segment_size=w)
    assert [place.order is None for place in found] == [True, True, False]
    assert [place.key_order is None for place in found] == [True, True, False]


def test_lists_hold_the_mask():
    pattern, order, key_order = CrossPattern(37, 23, 9), torch.randperm(37), torch.randperm(23)
    for size in ((4, 8), (16, 16), (64, 3)):
        lists = cross_lists(
            pattern, order=order, key_order=key_order, block_size=size, registers=2)
        mask = lists.mask()
        assert torch.equal(mask[:, :, :23], pattern.mask(order, key_order))
        assert mask[:, :, 23:].all()
    assert pattern.pairs(3) == 3 * pattern.mask().sum()
    assert torch.equal(pattern.mask()[0], segment_mask(37, 23, 9))


def double(*sizes): return [x.requires_grad_() for x in inputs(*sizes, dtype=torch.float64)]


def test_gradients():
    def cross(q, k, v): return hilbert_cross_attention(q, k, v, segment_size=5, return_lse=True)
    x = double(12, 7, 5, 3)
    assert torch.autograd.gradcheck(cross, x, fast_mode=True)
    seen = torch.arange(7)[None] != 2
    def seeded(q, k, v, *more):
        torch.manual_seed(0)
        return hilbert_cross_attention(
            q, k, v,
            segment_size=5,
            registers=more,
            dropout_p=0.3,
            key_mask=seen)
    def first(x): return x[:, :, :2].detach().clone()
    more = [first(y).requires_grad_() for y in x[1:]]
    assert torch.autograd.gradcheck(seeded, x + more, fast_mode=True)


def test_kept_masks_know_registers_and_both_orders():
    calls = [dict(), dict(registers=(K[:, :, :3], V[:, :, :3])), dict(key_curve="morton")]
    for options in calls:
        options |= dict(segment_size=9)
        found, expected = (
            hilbert_cross_attention(Q, K, V, **options, backend=x)
            for x in ("sdpa_mask", "reference"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_flops_know_registers():
    n, m, more = Q.shape[2], K.shape[2], tuple(x[:, :, :3] for x in (K, V))
    with FlopCounterMode(display=False) as counter:
        hilbert_cross_attention(Q, K, V, segment_size=9, registers=more, backend="sdpa")
    pairs = CrossPattern(n, m, 9).pairs(Q.shape[1]) + 3 * n * Q.shape[1]
    assert counter.get_total_flops() == 4 * Q.shape[3] * Q.shape[0] * pairs


@pytest.mark.parametrize("triton", sampled([False, True], [False]))
def test_the_operator(triton):
    if triton: pytest.importorskip("triton")
    device = DEVICE if triton else "cpu"
    q, k, v = (x.detach().to(device).requires_grad_() for x in double(12, 7))
    orders = (torch.randperm(n, device=device) for n in (12, 7))
    args = q, k, v, *orders, None, None, 5, 0, [0.25, 2.0], 0.0, triton
    opcheck(torch.ops.hilbert_attn.cross_forward.default, args)
    out, lse = (x.detach() for x in torch.ops.hilbert_attn.cross_forward(*args))
    plain = [x.detach() for x in (q, k, v)]
    backward = torch.ones_like(out), None, *plain, out, lse, *args[3:]
    opcheck(torch.ops.hilbert_attn.cross_backward.default, backward)


def test_one_graph_for_all_lengths():
    def cross(q, k, v):
        return hilbert_cross_attention(q, k, v, segment_size=8, sink_logits=q[0, :, 0, 0])
    compiled = torch.compile(cross, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, m in ((40, 24), (64, 16), (24, 56)):
        x, y = ([z.requires_grad_() for z in inputs(n, m)] for _ in "ab")
        found, expected = compiled(*x), cross(*y)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
        for a, b in zip(x, y): torch.testing.assert_close(a.grad, b.grad)


def test_a_key_mask_of_tokens_alone_leaves_registers():
    more = tuple(x[:, :, :3] for x in (K, V))
    seen = torch.arange(35)[None] % 3 > 0
    both = torch.cat([seen, torch.ones(1, 3, dtype=torch.bool)], 1)
    found = [hilbert_cross_attention(Q, K, V, segment_size=9, registers=more, key_mask=mask)
             for mask in (seen, both)]
    assert torch.equal(*found)


def test_half_precision_under_autocast():
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        more = inputs(m=2)[1:]
        out, lse = hilbert_cross_attention(q, k, v, segment_size=9, registers=more, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


Q, K, V = inputs()
BAD = [
    (dict(segment_size=1), "segment_size=1 cuts 60 queries into more segments than 35 keys .* 2"),
    (dict(segment_size=0), "segment_size=0: must be at least 1"),
    (dict(segment_size=2.0), "segment_size=2.0: expected a whole number"),
    (dict(grid=(6, 9)), r"grid=\(6, 9\) has 54 cells for 60 tokens"),
    (dict(key_grid=(6, 9)), r"key_grid=\(6, 9\) has 54 cells for 35 tokens"),
    (dict(order=torch.zeros(60, dtype=torch.int64)), "^order is no permutation"),
    (dict(key_order=torch.arange(34)), "^key_order is given with shape"),
    (dict(grid=(0, 60)), r"^grid=\(0, 60\)"),
    (dict(key_grid=(0, 35)), r"^key_grid=\(0, 35\)"),
    (dict(curve="peano"), "^curve='peano'"),
    (dict(key_curve="peano"), "^key_curve='peano'"),
    (dict(segment_size=1 << 63), "segment_size=9223372036854775808: must be"),
    (dict(k=K[:, :, :0], v=V[:, :, :0]), "N and D must be at least 1"),
    (dict(k=K[..., :8]), "B and D must agree"),
    (dict(v=V[:, :, :3]), "they must agree in all but the last size"),
    (dict(v=V[..., :0]), "D must be at least 1"),
    (dict(key_mask=torch.ones(1, 60, dtype=torch.bool)), r"key_mask .* \(B, M\) = \(1, 35\)"),
    (dict(registers=K), "registers is Tensor: expected a pair"),
    (dict(registers=(K, V[:, :, :3])), "the values are .* the same R"),
    (dict(registers=(K, V[..., :3])), "the values are .*expected"),
    (dict(registers=(K, V.double())), "the values are torch.float64"),
    (dict(sink_logits=torch.zeros(3)), r"sink_logits is torch.float32 \(3,\) .* \(H,\) = \(2,\)"),
    (dict(sink_logits=torch.zeros(2, dtype=torch.int64)), "sink_logits is torch.int64"),
    (dict(sink_logits=0.5), "sink_logits is float"),
    (dict(backend="flash"), "known backends"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        hilbert_cross_attention(**dict(q=Q, k=K, v=V) | bad)


def test_a_forced_backend_that_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="triton"):
        hilbert_cross_attention(Q, K, V, backend="triton")


def lists_places():
    cross, segments = CrossPattern(8, 8, 4), SegmentPattern(8, 4)
    return {
        "cross_lists": lambda device: cross_lists(cross, device=device).rows.start.device,
        "block_lists": lambda device: block_lists(segments, device=device).rows.start.device,
        "blocks": lambda device: SparsePatternConfig().blocks(8, device).device,
        "curve_order": lambda device: curve_order(8, device=device).device,
        "detect": lambda device: detect_gpu_architecture(device).capability and torch.device(0)}


@pytest.mark.parametrize("name", lists_places())
def test_a_device_may_be_the_number_of_the_first_gpu(name):
    place = lists_places()[name]
    if torch.cuda.is_available(): assert place(0) == torch.device(0)
    else:
        with pytest.raises((RuntimeError, AssertionError)): place(0)


def test_what_is_made_of_numbers_is_on_the_cpu():
    "Whatever the default device is."
    with torch.device("meta"):
        for name, place in lists_places().items():
            if name != "detect": assert place(None) == torch.device("cpu")
