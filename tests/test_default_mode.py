"""The dilation mode where none is asked for: one rule for functions, layers and explanations.

"longnet" for branches that are mixed as one softmax, "residue" for everything else."""
import inspect
from functools import partial

import pytest
import torch

import hilbert_attn as h
from hilbert_attn.api import ATTENTION_TYPES
from hilbert_attn.patterns import DilatedPattern, SegmentPattern, default_mode
from hilbert_attn.ring_layers import RingDilatedAttention
from hilbert_attn.ring_plan import plan_ring

N, H, D = 24, 4, 8
LISTS = dict(segment_lengths=[8, 24], dilation_rates=[2, 3])
ONE = dict(segment_size=12, dilation_rate=3)


def test_the_rule():
    assert default_mode("lse") == "longnet" and default_mode("heads") == default_mode() == "residue"


def qkv(layout="BHND"):
    shape = (2, H, N, D) if layout == "BHND" else (2, N, H, D)
    return [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in range(3)]


def by_mode(call):
    "The mode whose results are also those without a mode; no two modes agree."
    results = {mode: call(dilation_mode=mode) for mode in ("residue", "keys", "longnet")}
    outs = list(results.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])
    (same,) = (mode for mode, out in results.items() if torch.equal(out, call()))
    assert torch.equal(call(dilation_mode=None), results[same])
    return same


def test_functions_of_one_segment_size():
    for function in (h.hilbert_attention, h.ring_attention):
        assert by_mode(partial(function, *qkv(), **ONE)) == "residue"


@pytest.mark.parametrize("combine", ("lse", "heads", None))
def test_functions_of_several_branches(combine):
    options = LISTS if combine is None else dict(LISTS, combine=combine)
    for function in (h.dilated_attention, h.ring_dilated_attention):
        mode = by_mode(partial(function, *qkv(), **options))
        assert mode == default_mode(combine or "lse")


@pytest.mark.parametrize("combine", ("lse", "heads", None))
def test_layers(combine):
    options = LISTS if combine is None else dict(LISTS, combine=combine)

    class Mixed(h.HilbertAttentionMixin): pass

    def mixin(**settings):
        module = Mixed()
        module.setup_hilbert(**settings)
        return module.hilbert

    makers = [
        h.DilatedAttention,
        h.HilbertDilatedAttention,
        RingDilatedAttention,
        mixin,
        lambda **s: h.HilbertAttentionTritonFixed(num_heads=H, **s),
        lambda **s: h.MultiheadDilatedAttention(32, H, **s).attention,
        lambda **s: h.RingDilatedAttentionHilbertCore(32, H, **s).attention,
        lambda **s: h.RingDilatedAttentionHilbertOptimizedFixed(32, H, **s),
    ]
    for make in makers:
        def call(make=make, **mode): return make(**options, **mode)(*qkv("BNHD"))
        assert by_mode(call) == make(**options).dilation_mode == default_mode(combine or "lse")


def test_the_core():
    x = torch.randn(2, N, 32)

    def call(**mode):
        torch.manual_seed(0)
        return h.HilbertAttentionCore(32, H, **ONE, **mode)(x)

    assert torch.equal(call(), call(dilation_mode="residue"))
    assert not torch.equal(call(), call(dilation_mode="longnet"))


BRANCHED = ("standard", "improved", "hilbert", "ring")


@pytest.mark.parametrize("name", BRANCHED)
@pytest.mark.parametrize("combine", ("lse", "heads", None))
def test_types_and_their_explanations(name, combine):
    config = h.AttentionConfig(dim=32, heads=H, **LISTS, combine=combine)
    mixed = combine or ("heads" if name == "improved" else "lse")
    def call(**mode): return h.create_dilated_attention(name, config, **mode)(*qkv("BNHD"))
    assert by_mode(call) == default_mode(mixed)

    def pairs(**mode):
        explained = h.explain_attention_type(config.replace(**mode), N, attention_type=name)
        return explained.backend.pairs

    assert pairs() == pairs(dilation_mode=default_mode(mixed))
    assert pairs(dilation_mode="residue") != pairs(dilation_mode="longnet")


def test_no_type_with_branches_is_forgotten():
    layers = {name: h.create_dilated_attention(name, **LISTS) for name in ATTENTION_TYPES}
    branched = [name for name, layer in layers.items() if hasattr(layer, "dilation_mode")]
    assert tuple(branched) == BRANCHED


def test_function_layer_and_type_of_the_same_meaning_agree():
    q, k, v = qkv("BNHD")
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    for combine in ("lse", "heads"):
        options = dict(LISTS, combine=combine)
        expected = h.dilated_attention(*heads_first, **options, grid=(4, 6)).transpose(1, 2)
        layer = h.HilbertDilatedAttention(**options, grid=(4, 6))
        made = h.create_dilated_attention("hilbert", **options, grid=(4, 6))
        assert torch.equal(layer(q, k, v), expected) and torch.equal(made(q, k, v), expected)


def test_explain_backend_patterns_and_plans():
    shape = 1, H, N, D
    one = SegmentPattern.for_heads(N, H, 12, 3, "residue")
    assert h.explain_backend(shape, **ONE).pairs == one.pairs(H)
    for combine in ("lse", "heads"):
        options = dict(LISTS, combine=combine)
        expected = DilatedPattern.for_heads(N, H, **options, mode=default_mode(combine))
        assert h.explain_backend(shape, **options).pairs == expected.pairs()
        assert DilatedPattern.for_heads(N, H, **options) == expected
    assert SegmentPattern.for_heads(N, H, 12, 3).mode == "residue"
    alone = dict(segment_lengths=24, dilation_rates=3)
    for options, mode in ((LISTS, "longnet"), (alone, "residue")):
        plan = partial(plan_ring, N, 2, **options, heads=H)
        assert str(plan()) == str(plan(dilation_mode=mode))


def test_settings_of_models():
    assert h.HilbertSettings().dilation_mode == "residue"
    assert inspect.signature(h.create_dilated_mask).parameters["mode"].default == "residue"
