"""Every backend against the float64 oracle: fuzz, gradcheck, memory, operators."""
import pytest
import torch
from cases import Case, cases
from hypothesis import example, given
from torch.library import opcheck

from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import DILATION_MODES, SegmentPattern
from hilbert_attn.reference import reference_attention
from hilbert_attn.sdpa import _grouped_expression, sdpa_attention, sdpa_mask_attention


ONE_KEY_FOR_TWO_RESIDUES = Case(1, 1, 1, 2, 16, 2, 2, "keys", None, "none", True, False, torch.float32, "BHND", None, False, 0)

ITSELF_ALONE = Case(1, 1, 1, 1, 64, 1, 1, "residue", None, "none", False, False, torch.float16, "BHND", 0.3, False, 1)  # dq = 0 exactly


@given(cases())
@example(ONE_KEY_FOR_TWO_RESIDUES)
@example(ITSELF_ALONE)
def test_fuzz_sdpa(case: Case): case.check(sdpa_attention)


@given(cases())
def test_fuzz_sdpa_expression(case: Case): case.check(sdpa_attention, custom_backward=False)


@given(cases())
def test_fuzz_sdpa_mask(case: Case): case.check(sdpa_mask_attention)


def expression_without_lse(q, k, v, pattern, *, scale, **options):
    "What `sdpa_attention` runs on other devices, and with dropout, when nobody asks for the LSE."
    return _grouped_expression(q, k, v, pattern, **options, dropout_p=0.0, scale=scale, need_lse=False)


def mask_without_lse(*args, **options): return sdpa_mask_attention(*args, **options, need_lse=False)


@pytest.mark.parametrize("attention", (expression_without_lse, mask_without_lse), ids=lambda f: f.__name__)
@given(case=cases())
def test_fuzz_without_lse(attention, case: Case):
    def complete(*args, **options): return attention(*args, **options)[0], sdpa_attention(*args, **options)[1]
    case.check(complete)


@pytest.mark.parametrize("mode", DILATION_MODES)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("ordered", (False, True))
@pytest.mark.parametrize("attention", (sdpa_attention, sdpa_mask_attention, reference_attention), ids=lambda f: f.__name__)
def test_gradcheck(attention, mode, causal, ordered):
    torch.manual_seed(0)
    x = [torch.randn(2, h, 11, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    key_mask = torch.tensor([[True] * 11, [False] * 3 + [True] * 5 + [False] * 3])
    pattern = SegmentPattern.for_heads(11, 4, 6, 2, mode, [0, 1, 1, 0] if mode != "residue" else None)

    def call(*x):
        out, lse = attention(*x, pattern, order=curve_order(11) if ordered else None, causal=causal, key_mask=key_mask)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(call, x)


@pytest.mark.parametrize("empty", ("batch", "all keys masked"))
def test_nothing_to_attend(empty):
    q = torch.randn(0 if empty == "batch" else 2, 3, 7, 8, requires_grad=True)
    key_mask = torch.zeros(q.shape[0], 7, dtype=torch.bool)
    out, lse = sdpa_attention(q, q, q, SegmentPattern(7, 3), key_mask=key_mask, order=curve_order(7))
    assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.shape == q.shape and not grad.any()


def test_repeats_are_bit_identical():
    q, k, v = (torch.randn(2, 4, 333, 32, requires_grad=True) for _ in range(3))
    def run():
        out, lse = sdpa_attention(q, k, v, SegmentPattern(333, 100, 3), order=curve_order(333), causal=True)
        return [out, lse, *torch.autograd.grad((out.sin().sum() + lse.sin().sum()), (q, k, v))]
    for a, b in zip(run(), run()): assert torch.equal(a, b)


def test_no_order_means_no_copies():
    "Contiguous and transposed inputs go to the kernel as views, and the result keeps their layout."
    from hilbert_attn.sdpa import _blocks, _merge_all, _view
    pattern = SegmentPattern(64, 16, 4)
    (block,) = _blocks(pattern, 0, False, False)
    for x in (torch.randn(2, 3, 64, 8), torch.randn(2, 64, 3, 8).transpose(1, 2)):
        (merged,), _ = _merge_all([_view(x, block, "q")])
        assert merged.data_ptr() == x.data_ptr()
        out, _ = sdpa_attention(x, x, x, pattern)
        assert out.stride() == x.stride()


@pytest.mark.parametrize("ordered", (False, True))
@pytest.mark.parametrize("mode", DILATION_MODES)
def test_opcheck(mode, ordered):
    q, k, v = (torch.randn(1, h, 13, 8, requires_grad=True) for h in (4, 2, 2))
    order, key_mask = (curve_order(13), torch.ones(1, 13, dtype=torch.bool)) if ordered else (None, None)
    args = (q, k, v, order, key_mask, 6, 2, mode, [0], ordered, 0.3)
    opcheck(torch.ops.hilbert_attn.sdpa_forward.default, args)
    out, lse = (x.detach() for x in torch.ops.hilbert_attn.sdpa_forward(*args))
    q, k, v = (x.detach() for x in (q, k, v))
    opcheck(torch.ops.hilbert_attn.sdpa_backward.default, (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *args[3:]))


def test_opcheck_order(): opcheck(torch.ops.hilbert_attn.curve_order.default, ((5, 7), "hilbert", torch.device("cpu")))


def test_dropout_keeps_the_mean_and_scales_the_gradient():
    "Given the dropped weights, output and gradient are those of the expression with the same weights dropped."
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 40, 16, dtype=torch.float64) for _ in range(2))
    eye = torch.eye(40, dtype=torch.float64)[None, None].requires_grad_()  # v = I makes the output the matrix of weights
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
