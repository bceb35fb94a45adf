"""Layers inside a curve: tokens, masks and angles are permuted together, and come back."""
import pytest
import torch
import torch.nn as nn

import hilbert_attn as h
from hilbert_attn.modules import (
    HilbertAttentionCore,
    HilbertOrder,
    TransformerBlock,
    apply_rotary,
    rotary_embedding,
)

GRID, N, WIDTH, D = (4, 6), 24, 32, 16


def core(**options):
    torch.manual_seed(0)
    return HilbertAttentionCore(WIDTH, 2, segment_size=8, **options)


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_one_permutation_at_the_door_is_one_in_each_call(masked, turned):
    "A layer inside, without a curve, computes what a layer with the curve computes outside."
    x = random(2, N, WIDTH)
    key_mask = random(2, N) > -0.5 if masked else None
    rope = rotary_embedding(GRID, D) if turned else None
    inside = HilbertOrder(core(curve=None), GRID, rope_dim=D if turned else None)
    outside = core(curve="hilbert", grid=GRID)
    expected = outside(x, key_mask=key_mask, rope=rope)
    torch.testing.assert_close(inside(x, key_mask=key_mask), expected)


def test_queries_and_keys_are_turned():
    x, rope, layer = random(2, N, WIDTH), rotary_embedding(GRID, D), core(grid=GRID)
    q, k, v = layer.qkv_proj(x).unflatten(-1, (6, D)).transpose(1, 2).split(2, 1)
    q, k = apply_rotary(q, rope), apply_rotary(k, rope)
    out = h.hilbert_attention(q, k, v, grid=GRID, segment_size=8)
    expected = layer.out_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, rope=rope), expected)


def test_a_pair_is_turned_as_a_complex_number():
    x = random(2, 3, N, D)
    cos, sin = rotary_embedding(GRID, D)
    pairs = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
    expected = torch.cat([pairs.real, pairs.imag], -1)
    torch.testing.assert_close(apply_rotary(x, (cos, sin)), expected)


@pytest.mark.parametrize("grid, rope_dim, least", [(None, 3, 2), (GRID, 2, 4), (GRID, 0, 4)])
def test_a_width_that_cannot_be_turned_is_named_at_once(grid, rope_dim, least):
    with pytest.raises(ValueError, match=rf"head_dim={rope_dim}: .* at least {least} for a grid"):
        HilbertOrder(core(curve=None), grid, rope_dim=rope_dim)


@pytest.mark.parametrize("options, message", [
    (dict(causal=True, curve=None), "is causal: inside HilbertOrder"),
    (dict(curve="hilbert"), "has curve='hilbert'"),
])
def test_layers_that_do_not_belong_inside(options, message):
    with pytest.raises(ValueError, match=message): HilbertOrder(core(**options), GRID)


class Nothing(nn.Module):
    def forward(self, x): return torch.zeros_like(x)


def test_a_block_adds_to_what_it_is_given():
    x = random(2, N, WIDTH)
    block = TransformerBlock(Nothing(), WIDTH)
    block.mlp = Nothing()
    assert torch.equal(block(x), x)


class Mixed(h.HilbertAttentionMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.setup_hilbert(segment_lengths=8, dilation_rates=1, grid=GRID)


def test_a_mixin_orders_tokens_and_puts_them_back():
    mixed, order, x = Mixed(), h.curve_order(GRID), random(2, 3, N)
    assert torch.equal(mixed.get_hilbert_ordering(N), order)
    ordered = mixed.apply_hilbert_ordering(x, dim=2)
    assert torch.equal(ordered, x[..., order])
    assert torch.equal(mixed.apply_hilbert_ordering(ordered, inverse=True, dim=2), x)


@pytest.mark.parametrize("shape", [
    (N, 1), (1, D // 2), (N, D), (D // 2, N), (2, N, D // 2), (3, 1, N, D // 2)])
def test_angles_fit_the_tokens(shape):
    x = random(2, 3, N, D)
    cos, sin = rotary_embedding(GRID, D)
    for rope in ((torch.ones(shape), sin), (cos, torch.ones(shape))):
        with pytest.raises(ValueError, match=r"rope has shape .*: expected \(N, D / 2\) = "):
            apply_rotary(x, rope)
    with pytest.raises(ValueError, match="rope has shape"): apply_rotary(x[..., 1:], (cos, sin))


def test_angles_of_each_sequence():
    x = random(2, 3, N, D)
    cos, sin = rotary_embedding(GRID, D)
    several = [torch.stack([r, 2 * r])[:, None] for r in (cos, sin)]
    expected = [apply_rotary(x[i:i + 1], (r * cos, r * sin)) for i, r in enumerate((1, 2))]
    torch.testing.assert_close(apply_rotary(x, several), torch.cat(expected))
