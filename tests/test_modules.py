"""`HilbertAttentionCore`: every argument, every way a layer is used."""
import copy
import io

import pytest
import torch

from hilbert_attn import HilbertAttentionCore, curve_order
from hilbert_attn.patterns import SegmentPattern, attention_mask
from hilbert_attn.reference import masked_attention

SETTINGS = [
    dict(segment_size=30), dict(segment_size=30, dilation_rate=3, grid=(7, 11)), dict(segment_size=None), dict(segment_size=200, causal=True),
    dict(segment_size=20, dilation_rate=4, dilation_mode="keys", offsets=1, curve="morton"), dict(segment_size=32, dilation_rate=2, dilation_mode="longnet", bias=True),
    dict(segment_size=16, num_kv_heads=2, grid=(11, 7), curve="tile:3", causal=True), dict(segment_size=25, head_dim=20, curve=None),
]


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return HilbertAttentionCore(48, 4, **options)


def tokens(dtype=torch.float32): return torch.randn(2, 77, 48, generator=torch.Generator().manual_seed(1)).to(dtype)


def results(module, x, **options):
    leaf = x.detach().clone().requires_grad_()
    out = module(leaf, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out, *torch.autograd.grad(out, (leaf, *module.parameters()), upstream)]


def by_definition(m: HilbertAttentionCore, x, use_hilbert=True, key_mask=None):
    "The layer from its parameters and the oracle's mask, in float64."
    m = copy.deepcopy(m).double()
    qkv = m.qkv_proj(x.double()).unflatten(-1, (-1, m.head_dim)).transpose(1, 2)
    q, k, v = qkv.split([m.num_heads, m.num_kv_heads, m.num_kv_heads], 1)
    n = x.shape[1]
    pattern = SegmentPattern.for_heads(n, m.num_heads, m.segment_size, m.dilation_rate, m.dilation_mode, m.offsets)
    order = curve_order(m.grid or n, m.curve) if use_hilbert and m.curve else None
    out, _ = masked_attention(q, k, v, attention_mask(pattern, order=order, causal=m.causal, key_mask=key_mask))
    return m.out_proj(out.transpose(1, 2).flatten(2)).detach()


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("use_hilbert", (True, False))
def test_computes_its_definition(options, use_hilbert):
    m, x = layer(**options), tokens()
    key_mask = torch.rand(2, 77, generator=torch.Generator().manual_seed(3)) < 0.8
    torch.testing.assert_close(m(x, use_hilbert).double(), by_definition(m, x, use_hilbert), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m(x, use_hilbert, key_mask=key_mask).double(), by_definition(m, x, use_hilbert, key_mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_gradients_agree_in_every_mode(options):
    x, expected = tokens(), results(layer(**options), tokens())
    for other in (layer(**options, use_custom_backward=False), layer(**options).eval(), layer(**options, checkpoint=True), layer(**options, backend="sdpa_mask"),
                  layer(**options, use_custom_backward=False).eval(), torch.compile(layer(**options), fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(results(other, x), expected, rtol=1e-3, atol=2e-5)
        assert all(g.any() for g in results(other, x))


def test_gradcheck_float64():
    m = layer(segment_size=6, dilation_rate=2, causal=True, dtype=torch.float64)
    x = torch.randn(1, 11, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m, x, fast_mode=True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    m, x = layer(segment_size=30), tokens()
    expected = results(m, x)
    with torch.autocast("cpu", dtype): actual = results(m, x)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    for a, e in zip(actual, expected): assert (a - e).norm() < 0.02 * e.norm()


def test_state_dict_round_trip_is_free_of_the_grid():
    small, large = layer(segment_size=30, grid=(7, 11)), layer(seed=5, segment_size=30, grid=(40, 50))
    assert sorted(small.state_dict()) == ["out_proj.weight", "qkv_proj.weight"]
    large.load_state_dict(small.state_dict())
    x = tokens()
    assert torch.equal(large(x, grid=(7, 11)), small(x))


def test_copies():
    m, x = layer(segment_size=30, grid=(7, 11)), tokens()
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(m), torch.load(buffer, weights_only=False), copy.deepcopy(m).double().float()): assert torch.equal(other(x), m(x))


def test_dropout_acts_in_training_only():
    x = tokens()
    m, plain = layer(segment_size=30, dropout=0.5), layer(segment_size=30)
    assert torch.equal(m.eval()(x), plain(x))
    m.train()
    assert not torch.equal(m(x), m(x))
    torch.manual_seed(1)
    a = m(x)
    torch.manual_seed(1)
    assert torch.equal(a, m(x))
    assert all(g.isfinite().all() and g.any() for g in results(m, x))


def test_checkpointing_repeats_the_same_dropout():
    x = tokens()
    torch.manual_seed(3)
    expected = results(layer(segment_size=30, dropout=0.3), x)
    torch.manual_seed(3)
    actual = results(layer(segment_size=30, dropout=0.3, checkpoint=True), x)
    torch.testing.assert_close(actual, expected)


def test_checkpointing_stores_less():
    stored = {}
    for checkpoint in (False, True):
        m, total = layer(segment_size=30, checkpoint=checkpoint), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.numel()) or t, lambda t: t): m(tokens().requires_grad_())
        stored[checkpoint] = sum(total)
    assert stored[True] < stored[False] / 3


def test_training_learns():
    torch.manual_seed(0)
    m = HilbertAttentionCore(32, 4, segment_size=16, grid=(6, 6))
    x, target = torch.randn(4, 36, 32), torch.randn(4, 36, 32)
    optimiser = torch.optim.Adam(m.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (m(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_names_of_sizes():
    for spelled in (dict(dim=48, heads=4), dict(embed_dim=48, num_heads=4), dict(hidden_dim=48, num_heads=4), dict(dim=48, embed_dim=48, heads=4, num_heads=4)):
        m = HilbertAttentionCore(**spelled)
        assert (m.hidden_dim, m.num_heads, m.head_dim) == (48, 4, 12)


@pytest.mark.parametrize("options, message", [
    (dict(num_heads=4), r"hidden_dim is missing \(also accepted as dim, embed_dim\)"), (dict(dim=48), "num_heads is missing"),
    (dict(dim=48, hidden_dim=64, heads=4), "hidden_dim=64 and dim=48 disagree"), (dict(dim=48, heads=4, num_heads=2), "num_heads=2 and heads=4 disagree"),
    (dict(dim=50, heads=4), "hidden_dim=50 is no multiple of num_heads=4"), (dict(dim=48, heads=4, num_kv_heads=3), "num_kv_heads=3"),
    (dict(dim=48, heads=4, dropout=1.0), "dropout=1.0"), (dict(dim=48, heads=4, segment_size=4, dilation_rate=8), "dilation_rate=8"),
    (dict(dim=48, heads=4, curve="peano"), "known curves"), (dict(dim=48, heads=4, backend="fast"), "known backends"), (dict(dim=48, heads=4, grid=0), "grid=0"),
    (dict(dim=48, heads=4, dilation_mode="both"), "known modes")])
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message): HilbertAttentionCore(**options)


def test_bad_tokens():
    m = layer(segment_size=30, grid=(7, 11))
    with pytest.raises(ValueError, match=r"x has shape \(2, 77, 40\): expected \(B, N, 48\)"): m(tokens()[..., :40])
    with pytest.raises(ValueError, match=r"grid=\(7, 11\) has 77 cells and q has N=70"): m(tokens()[:, :70])
