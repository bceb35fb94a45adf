"""Every backend against the float64 oracle: fuzz, gradcheck, memory, operators."""
import pytest
import torch
from cases import Case, Memory, cases
from hypothesis import example, given
from sampling import FULL
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from hilbert_attn import (
    backends,
    dilated_attention,
    hilbert_attention,
    hilbert_slide_attention,
    hilbert_window_attention,
    neighborhood_attention,
    tiles_shared_attention,
    window_attention,
)
from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import DILATION_MODES, SegmentPattern, attention_mask
from hilbert_attn.reference import reference_attention
from hilbert_attn.sdpa import _grouped_expression, masked_sdpa, sdpa_attention, sdpa_mask_attention
from hilbert_attn.tiles import dense_backward as _dense_backward
from hilbert_attn.tiles import flash as _flash

ONE_KEY_FOR_TWO_RESIDUES = Case(
    1, 1, 1, 2, 16, 2, 2, "keys", None, "none", True, False, torch.float32, "BHND", None, False, 0)

# dq = 0 exactly
ITSELF_ALONE = Case(
    1, 1, 1, 1, 64, 1, 1, "residue", None, "none", False, False, torch.float16, "BHND", 0.3, False,
    1)


@given(cases())
@example(ONE_KEY_FOR_TWO_RESIDUES)
@example(ITSELF_ALONE)
def test_fuzz_sdpa(case: Case): case.check(sdpa_attention)


@given(cases())
def test_fuzz_sdpa_expression(case: Case): case.check(sdpa_attention, custom_backward=False)


@given(cases())
def test_fuzz_sdpa_mask(case: Case): case.check(sdpa_mask_attention)


def expression_without_lse(q, k, v, pattern, *, scale, **options):
    "What `sdpa_attention` runs on other devices, when nobody asks for the LSE."
    return _grouped_expression(
        q, k, v, pattern, **options, dropout_p=0.0, scale=scale, need_lse=False)


def test_heads_of_the_expression_come_back_in_place():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 12, 8) for _ in range(3))
    pattern = SegmentPattern.for_heads(12, 4, 6, 3, "longnet")  # offsets 0, 1, 2, 0
    results = [sdpa_attention(q, k, v, pattern, custom_backward=x) for x in (False, True)]
    for ours, theirs in zip(*results): torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ("residue", "longnet", "keys"))
@pytest.mark.parametrize("custom_backward", (False, True))
@pytest.mark.parametrize("offset", (0, 1))
def test_an_infinite_value_stays_in_its_group(mode, custom_backward, offset):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 301 - offset, 8) for _ in range(3))
    v[:, :, -1] = torch.inf
    pattern = SegmentPattern.for_heads(v.shape[2], 2, 5, 2, mode, None)
    reached = attention_mask(pattern)[..., -1].expand(1, 2, -1)
    x = [y.requires_grad_() for y in (q, k, v)]
    out, lse = sdpa_attention(*x, pattern, custom_backward=custom_backward)
    assert torch.equal(~out.isfinite().all(-1), reached)
    dq, *_ = torch.autograd.grad(out[out.isfinite()].sum(), x)
    assert dq.isfinite().all(-1)[~reached].all()
    if mode == "keys": return  # under causality a group may hold a key that none of it sees
    causal, _ = sdpa_attention(*x, pattern, causal=True, custom_backward=custom_backward)
    assert torch.equal(~causal.isfinite().all(-1), reached)


def test_the_expression_does_not_pad_a_short_last_segment():
    x = [torch.randn(2, 2, 17, 8) for _ in range(3)]
    pattern = SegmentPattern.for_heads(17, 2, 16)
    with FlopCounterMode(display=False) as counter:
        sdpa_attention(*x, pattern, custom_backward=False)
    assert counter.get_total_flops() == 4 * 8 * 2 * pattern.pairs(2)


def mask_without_lse(*args, **options): return sdpa_mask_attention(*args, **options, need_lse=False)


@pytest.mark.parametrize(
    "attention", (expression_without_lse, mask_without_lse), ids=lambda f: f.__name__)
@given(case=cases())
def test_fuzz_without_lse(attention, case: Case):
    def complete(*args, **options):
        return attention(*args, **options)[0], sdpa_attention(*args, **options)[1]
    case.check(complete)


@pytest.mark.parametrize("mode", DILATION_MODES)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("ordered", (False, True))
@pytest.mark.parametrize(
    "attention", (sdpa_attention, sdpa_mask_attention, reference_attention),
    ids=lambda f: f.__name__)
def test_gradcheck(attention, mode, causal, ordered):
    torch.manual_seed(0)
    x = [torch.randn(2, h, 11, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    key_mask = torch.tensor([[True] * 11, [False] * 3 + [True] * 5 + [False] * 3])
    pattern = SegmentPattern.for_heads(
        11, 4, 6, 2, mode, [0, 1, 1, 0] if mode != "residue" else None)

    def call(*x):
        out, lse = attention(
            *x, pattern, order=curve_order(11) if ordered else None, causal=causal,
            key_mask=key_mask)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(call, x, fast_mode=not FULL)


@pytest.mark.parametrize("empty", ("batch", "all keys masked"))
def test_nothing_to_attend(empty):
    q = torch.randn(0 if empty == "batch" else 2, 3, 7, 8, requires_grad=True)
    key_mask = torch.zeros(q.shape[0], 7, dtype=torch.bool)
    out, lse = sdpa_attention(
        q, q, q, SegmentPattern(7, 3), key_mask=key_mask, order=curve_order(7))
    assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.shape == q.shape and not grad.any()


def test_repeats_are_bit_identical():
    q, k, v = (torch.randn(2, 4, 333, 32, requires_grad=True) for _ in range(3))
    def run():
        out, lse = sdpa_attention(
            q, k, v, SegmentPattern(333, 100, 3), order=curve_order(333), causal=True)
        return [out, lse, *torch.autograd.grad((out.sin().sum() + lse.sin().sum()), (q, k, v))]
    for a, b in zip(run(), run()): assert torch.equal(a, b)


def test_no_order_means_no_copies():
    "Contiguous and transposed inputs go to the kernel as views, and the result keeps their layout."
    from hilbert_attn.sdpa import _best_layout, _blocks, _merge
    pattern = SegmentPattern(64, 16, 4)
    (block,) = _blocks(pattern, 0, False, False)
    for x in (torch.randn(2, 3, 64, 8), torch.randn(2, 64, 3, 8).transpose(1, 2)):
        view = block.q.view(x)
        merged = _merge(view, _best_layout([view]), copy=False)
        assert merged.data_ptr() == x.data_ptr()
        out, _ = sdpa_attention(x, x, x, pattern)
        assert out.stride() == x.stride()


@pytest.mark.parametrize("ordered", (False, True))
@pytest.mark.parametrize("mode", DILATION_MODES)
def test_opcheck(mode, ordered):
    q, k, v = (torch.randn(1, h, 13, 8, requires_grad=True) for h in (4, 2, 2))
    order, key_mask = (
        curve_order(13), torch.ones(1, 13, dtype=torch.bool)) if ordered else (None, None)
    args = (q, k, v, order, key_mask, None, 6, 2, mode, [0], ordered, [0.3, 2.0], 0.0)
    opcheck(torch.ops.hilbert_attn.sdpa_forward.default, args)
    out, lse = (x.detach() for x in torch.ops.hilbert_attn.sdpa_forward(*args))
    q, k, v = (x.detach() for x in (q, k, v))
    opcheck(
        torch.ops.hilbert_attn.sdpa_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *args[3:]))


def test_opcheck_order():
    opcheck(torch.ops.hilbert_attn.curve_order.default, ((5, 7), "hilbert", torch.device("cpu")))


def test_dropout_keeps_the_mean_and_scales_the_gradient():
    """Given the dropped weights, output and gradient are those of the expression with the same
    weights dropped."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 40, 16, dtype=torch.float64) for _ in range(2))
    # v = I makes the output the matrix of weights
    eye = torch.eye(40, dtype=torch.float64)[None, None].requires_grad_()
    q = torch.cat([q, q.new_zeros(1, 1, 40, 24)], -1)
    k = torch.cat([k, k.new_zeros(1, 1, 40, 24)], -1)
    pattern = SegmentPattern(40, 20, 2)
    dense, _ = sdpa_attention(q, k, eye, pattern, scale=0.25)
    weights, lse = sdpa_attention(q, k, eye, pattern, scale=0.25, dropout_p=0.3)
    kept = weights > 0
    torch.testing.assert_close(weights, dense / 0.7 * kept)
    attended = pattern.mask()[0]
    assert not kept[..., ~attended].any() and 0.55 < kept[..., attended].double().mean() < 0.85
    (grad,) = torch.autograd.grad(weights, eye, torch.ones_like(weights))
    torch.testing.assert_close(grad, weights.detach().transpose(-2, -1) @ torch.ones_like(weights))


NAN_CALLS = [
    (
        "pairs",
        lambda **o: hilbert_attention(
            o.pop("q"), o.pop("k"), o.pop("v"), curve=None, segment_size=2, **o)),
    (
        "alone",
        lambda **o: hilbert_attention(
            o.pop("q"), o.pop("k"), o.pop("v"), curve=None, segment_size=1, **o)),
    (
        "dilated",
        lambda **o: dilated_attention(
            o.pop("q"), o.pop("k"), o.pop("v"), [3, 12], [1, 4], dilation_mode="residue",
            curve=None, **o)),
    ("window", lambda **o: window_attention(o.pop("q"), o.pop("k"), o.pop("v"), (7, 10), 3, **o)),
    (
        "neighborhood",
        lambda **o: neighborhood_attention(o.pop("q"), o.pop("k"), o.pop("v"), (7, 10), 3, **o)),]


@pytest.mark.parametrize("poisoned", "qkv")
@pytest.mark.parametrize("name, call", NAN_CALLS, ids=[name for name, _ in NAN_CALLS])
def test_nan_that_is_attended_gives_nan(name, call, poisoned):
    """Also where a group has fewer keys than the CPU kernel takes at a time; forward and
    backward, as the definition has it."""
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(1, 1, 70, 16, generator=generator) for name in "qkv"}
    x[poisoned][0, 0, 30, 3] = torch.nan
    leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
    out, lse = call(**leaves, backend="sdpa", return_lse=True)
    dq, dk, _ = torch.autograd.grad(out.sin().sum() + lse.sin().sum(), leaves.values())

    zeros = torch.zeros(1, 1, 70, 70)
    # who attends whom
    seen = call(q=zeros, k=zeros, v=torch.eye(70)[None, None], backend="reference")[0, 0] > 0
    rows = torch.arange(70) == 30 if poisoned == "q" else seen[:, 30]
    def nan_rows(x): return x[0, 0].isnan().reshape(70, -1).any(1)
    # there a tile holds keys that some of its queries do not attend
    exactly = name != "neighborhood"
    for x in (out, dq) if poisoned == "v" else (out, lse, dq):
        assert nan_rows(x)[rows].all() and (not exactly or nan_rows(x).equal(rows))
    if poisoned != "v": assert nan_rows(dk)[seen[rows].any(0)].all()


def test_zeros_are_not_taken_for_nan():
    "A query alone with its key, all zeros: the log-sum-exp is 0, as the kernel says of NaN."
    x = torch.zeros(1, 1, 70, 16)
    out, lse = hilbert_attention(x, x, x, segment_size=1, return_lse=True)
    assert not out.any() and not lse.any()


@pytest.mark.parametrize("where", ("causal", "other segment"))
def test_what_nobody_removed_must_be_finite(where):
    """NaN in keys that are unattended for other reasons than the mask may or may not reach a
    row, as in SDPA; finite garbage never does."""
    q, k, v = (torch.randn(1, 1, 96, 16) for _ in range(3))
    options = dict(
        segment_size=96 if where == "causal" else 24, causal=where == "causal", curve=None)
    before = hilbert_attention(q, k, v, **options)[:, :, :24]
    k[:, :, 24:], v[:, :, 24:] = 1e4 * torch.randn(72, 16), 1e30
    assert hilbert_attention(q, k, v, **options)[:, :, :24].equal(before)


FORWARD = [
    ("hilbert", lambda q, k, v, **o: hilbert_attention(q, k, v, segment_size=16, causal=True, **o)),
    (
        "keys",
        lambda q, k, v, **o: hilbert_attention(
            q, k, v, segment_size=16, dilation_rate=2, dilation_mode="keys",
            key_mask=torch.arange(72)[None] % 5 > 0, **o)),
    (
        "lse",
        lambda q, k, v, **o: hilbert_attention(q, k, v, segment_size=16, return_lse=True, **o)[1]),
    ("mixture", lambda q, k, v, **o: dilated_attention(q, k, v, [16, 72], [1, 2], **o)),
    (
        "heads",
        lambda q, k, v, **o: dilated_attention(q, k, v, [16, 72], [1, 2], combine="heads", **o)),
    ("window", lambda q, k, v, **o: window_attention(q, k, v, (8, 9), 3, **o)),
    ("neighborhood", lambda q, k, v, **o: neighborhood_attention(q, k, v, (8, 9), 3, **o)),
    ("hilbert window", lambda q, k, v, **o: hilbert_window_attention(q, k, v, (8, 9), 10, **o)),
    ("hilbert slide", lambda q, k, v, **o: hilbert_slide_attention(q, k, v, (8, 9), 10, **o)),
    ("tiles", lambda q, k, v, **o: tiles_shared_attention(q, k, v, tiles=3, shared=2, **o)),]


@pytest.mark.parametrize("name, f", FORWARD, ids=[name for name, _ in FORWARD])
@pytest.mark.parametrize("backend", ("auto", "sdpa", "sdpa_mask", "reference"))
def test_forward_mode_is_right(backend, name, f):
    generator = torch.Generator().manual_seed(0)
    x, t = (
        [torch.randn(1, h, 72, 16, dtype=torch.float64, generator=generator) for h in (2, 1, 1)]
        for _ in range(2))
    def run(*x): return f(*x, backend=backend)
    tangent = torch.func.jvp(run, tuple(x), tuple(t))[1]
    step = 1e-6
    there, back = (run(*(a + sign * step * b for a, b in zip(x, t))) for sign in (1, -1))
    assert tangent.any()
    torch.testing.assert_close(tangent, (there - back) / (2 * step), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name, f", FORWARD, ids=[name for name, _ in FORWARD])
def test_forward_mode_on_the_kernels_is_refused(name, f, monkeypatch):
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    x = [torch.randn(1, h, 72, 16) for h in (2, 1, 1)]
    with pytest.raises(RuntimeError, match="forward-mode derivatives and a bias"):
        torch.func.jvp(lambda q: f(q, *x[1:], backend="triton"), (x[0],), (x[0],))


def test_forward_over_reverse():
    y = torch.randn(1, 1, 66, 2, dtype=torch.float64)
    def loss(q, **o):
        return hilbert_attention(q, y, y, segment_size=3, curve=None, **o)[0, 0, :2].sum()
    expected = torch.autograd.functional.hessian(lambda q: loss(q, backend="reference"), y)
    torch.testing.assert_close(torch.func.hessian(loss)(y), expected)
    torch.testing.assert_close(torch.func.jacfwd(loss)(y), torch.func.grad(loss)(y))


def test_vmap_and_per_sample_gradients():
    q, k, v = (torch.randn(3, 2, 72, 16, dtype=torch.float64) for _ in range(3))
    def f(q, k, v): return hilbert_attention(q[None], k[None], v[None], segment_size=16)[0]
    torch.testing.assert_close(
        torch.func.vmap(f)(q, k, v), hilbert_attention(q, k, v, segment_size=16))
    grads = torch.func.vmap(torch.func.grad(lambda *x: f(*x).sin().sum(), (0, 1, 2)))(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(hilbert_attention(*leaves, segment_size=16).sin().sum(), leaves)
    torch.testing.assert_close(grads, expected)


# the strides of a row's elements and of its head are both 1
OVERLAPPING = Memory((0, 2, 3, 1), expanded=(2,))


@pytest.mark.parametrize(
    "memory",
    (
        Memory((0, 1, 3, 2)), Memory(steps=(1, 1, 2, 3)), Memory(expanded=(3,)),
        Memory(expanded=(2,)), Memory(offset=3), OVERLAPPING),
    ids=str)
def test_the_kernels_of_torch_get_what_they_can_read(memory):
    """Below the operators too, where the ring calls them: forward and backward, and SDPA with a
    mask."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (memory(torch.randn(1, 1, 20, 16, generator=generator)) for _ in range(4))
    tidy = [x.contiguous() for x in (q, k, v)]
    out, lse = _flash(*tidy, scale=0.25)
    torch.testing.assert_close(_flash(q, k, v, scale=0.25), (out, lse))
    expected = _dense_backward(dout.contiguous(), None, *tidy, out, lse, False, None, 0.25)
    torch.testing.assert_close(
        _dense_backward(dout, None, q, k, v, out, lse, False, None, 0.25), expected)
    mask = torch.ones(20, 20, dtype=torch.bool)
    torch.testing.assert_close(masked_sdpa(q, k, v, mask, 0.25), out)
