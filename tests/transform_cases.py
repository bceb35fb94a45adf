"""Every public function and layer, on tensors of any length: what transforms and graphs are given.

A case is a function of q, k, v (B, H, N, D), or a layer and the shape of its tokens."""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn

import hilbert_attn as ha
from hilbert_attn.api import ATTENTION_TYPES
from hilbert_attn.cross import hilbert_cross_attention
from hilbert_attn.points import point_attention

HEADS, WIDTH = 2, 8  # H, D
BRANCHES = dict(segment_lengths=[16, 32, 2048], dilation_rates=[1, 2, 4])


def near(q, reach):
    "A mask of blocks of 16 tokens: those at most `reach` blocks away."
    block = torch.arange(-(-q.shape[2] // 16), device=q.device)
    return (block[:, None] - block).abs() <= reach


def blocks(q, k, v, **options):
    return ha.block_sparse_attention(q, k, v, near(q, 1), block_size=16, **options)


def causal_blocks(q, k, v, **options):
    options |= dict(order=ha.curve_order(q.shape[2], device=q.device), causal=True)
    return ha.block_sparse_attention(q, k, v, near(q, 9), block_size=16, **options)


def window(q, k, v, **options):
    return ha.window_attention(q, k, v, (q.shape[2] // 4, 4), 3, shift=1, **options)


def neighborhood(q, k, v, **options):
    return ha.neighborhood_attention(q, k, v, (q.shape[2] // 4, 4), 3, **options)


def curve_window(q, k, v, **options):
    return ha.hilbert_window_attention(q, k, v, q.shape[2], 16, **options)


def slide(q, k, v, **options):
    return ha.hilbert_slide_attention(q, k, v, q.shape[2], 9, **options)


def points(q, k, v, **options):
    order = ha.curve_order(q.shape[2], device=q.device)
    return point_attention(q, k, v, order, patch_size=16, **options)


def decoder(q, k, v, **options):
    how = dict(window=(8, 0), sinks=3, curve=None)
    return ha.hilbert_slide_attention(q, k, v, q.shape[2], **how, **options)


def packed(q, k, v, **options):
    borders = [0, q.shape[2] // 3, q.shape[2]]
    return ha.dilated_attention(q, k, v, 16, 1, cu_seqlens=borders, curve=None, **options)


def cross(q, k, v, **options):
    k, v = (x[:, :, ::2] for x in (k, v))
    if "key_mask" in options: options |= dict(key_mask=options["key_mask"][:, ::2])
    return hilbert_cross_attention(q, k, v, segment_size=16, **options)


def causal_ring(q, k, v):
    order = ha.curve_order(q.shape[2], device=q.device)
    return ha.ring_attention(q, k, v, segment_size=16, causal=True, order=order)


DROPPING = dict(  # functions that can drop weights
    hilbert=partial(ha.hilbert_attention, segment_size=16, dilation_rate=3),
    causal=partial(ha.hilbert_attention, segment_size=16, causal=True),
    dense=ha.hilbert_attention,
    keys=partial(ha.hilbert_attention, segment_size=16, dilation_rate=2, dilation_mode="keys"),
    longnet=partial(ha.dilated_attention, **BRANCHES),
    by_heads=partial(ha.dilated_attention, segment_lengths=[16, 2048], dilation_rates=[1, 2],
                     combine="heads"),
    blocks=blocks, causal_blocks=causal_blocks, window=window, neighborhood=neighborhood,
    curve_window=curve_window, slide=slide, decoder=decoder, packed=packed, points=points,
    cross=cross,
    tiles=partial(ha.tiles_shared_attention, tiles=3, offset=2, shared=2))
RINGS = dict(
    ring=partial(ha.ring_attention, segment_size=16, dilation_rate=2), causal_ring=causal_ring,
    ring_branches=partial(ha.ring_dilated_attention, segment_lengths=[16, None],
                          dilation_rates=[1, 2]))
FUNCTIONS = DROPPING | RINGS


class Attend(nn.Module):
    "A function of q, k, v (B, H, N, D) as a module."

    def __init__(self, function: Callable, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, q, k, v): return self.function(q, k, v, **self.options)


TOKENS, FREE = (HEADS * WIDTH,), (HEADS, WIDTH)  # what follows (B, N)
SIZES = dict(hidden_dim=HEADS * WIDTH, num_heads=HEADS)
BLOCKS = dict(block_size=16, sparsity=0.5)


def sparse(kind, **options):
    pattern = ha.SparsePatternConfig(kind, 16, window=32, global_tokens=16)
    return partial(ha.BlockSparseAttention, pattern, **options)


def factory(name):
    def make(dropout=0.0):
        return ha.create_dilated_attention(
            name, dropout=dropout, dim=HEADS * WIDTH, heads=HEADS, segment_lengths=[16, 32],
            dilation_rates=[1, 2], sparsity=0.5, block_size=16)
    return make


# name: maker, shape of its tokens, does it drop weights?
LAYERS = {
    "core": (partial(ha.HilbertAttentionCore, **SIZES, segment_size=16), TOKENS, True),
    "core, checkpoint": (
        partial(ha.HilbertAttentionCore, **SIZES, segment_size=16, checkpoint=True), TOKENS, False),
    "core, plain": (
        partial(ha.HilbertAttentionCore, **SIZES, segment_size=16, dilation_rate=3,
                use_custom_backward=False), TOKENS, True),
    "branches, plain": (
        partial(ha.HilbertDilatedAttention, **BRANCHES, use_custom_backward=False), FREE, True),
    "heads, plain": (
        partial(ha.MultiheadDilatedAttention, **SIZES, segment_lengths=[16, 2048],
                dilation_rates=[1, 2], combine="heads", batch_first=True,
                use_custom_backward=False), TOKENS, True),
    "DilatedAttention": (partial(ha.DilatedAttention, **BRANCHES), FREE, True),
    "HilbertDilatedAttention": (partial(ha.HilbertDilatedAttention, **BRANCHES), FREE, True),
    "MultiheadDilatedAttention": (
        partial(ha.MultiheadDilatedAttention, **SIZES, **BRANCHES, batch_first=True), TOKENS, True),
    "BlockSparseAttention": (partial(ha.BlockSparseAttention, **BLOCKS), FREE, True),
    "blocks, no curve": (partial(ha.BlockSparseAttention, **BLOCKS, curve=None), FREE, False),
    "dilated blocks": (sparse("dilated_sparse", causal=True), FREE, False),
    "global blocks": (sparse("global_local", placement="post_pattern"), FREE, False),
    "RingDilatedAttention": (partial(ha.RingDilatedAttention, **BRANCHES), FREE, False),
    "RingBlockSparseAttention": (partial(ha.RingBlockSparseAttention, **BLOCKS), FREE, False),
}
LAYERS |= {
    f"type {name}": (factory(name), FREE, not kind.shares_sequence)
    for name, kind in ATTENTION_TYPES.items()}


THREE = "MultiheadDilatedAttention", "heads, plain" # of tokens, that take q, k, v


def layer_case(name: str, dropout: float = 0.0) -> tuple[nn.Module, Callable]:
    "A layer, and what makes its inputs for N tokens."
    torch.manual_seed(0)
    make, shape, _ = LAYERS[name]
    module = make(dropout=dropout) if dropout else make()
    several = 3 if shape == FREE or name in THREE else 1
    return module, lambda n, **at: [torch.randn(2, n, *shape, **at) for _ in range(several)]


def function_case(name: str, dropout: float = 0.0) -> tuple[nn.Module, Callable]:
    "A function as a module, and what makes its inputs for N tokens."
    options = dict(dropout_p=dropout) if dropout else {}
    return Attend(FUNCTIONS[name], **options), lambda n, **at: [
        torch.randn(2, HEADS, n, WIDTH, **at) for _ in range(3)]
