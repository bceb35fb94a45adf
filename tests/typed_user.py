"""What somebody writes who checks types: mypy --strict finds nothing wrong, and it runs.

See test_types.py.
"""
from typing import assert_type

import torch
import torch.nn as nn
from torch import Tensor

import hilbert_attn as h

Pair = tuple[Tensor, Tensor]


def curves_and_patterns() -> None:
    assert_type(h.curve_order((8, 8), "tile:4"), Tensor)
    assert_type(h.curve_order(64), Tensor)
    assert_type(h.locality([8, 8], 16).spread, float)
    window = h.WindowPattern((8, 8), 4)
    assert_type(window.shift, tuple[int, ...])
    near = h.NeighborhoodPattern((8, 8), (3, 5), causal=[True, False])
    assert_type(near.causal, tuple[bool, ...])
    assert_type(h.SegmentPattern(64, 16, dilation_rate=2).density, float)
    assert_type(h.attention_mask(window, causal=True, device="cpu"), Tensor)


def functions(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> Tensor:
    assert_type(h.hilbert_attention(q, k, v), Tensor)
    assert_type(h.hilbert_attention(q, k, v, return_lse=False).shape, torch.Size)
    out, lse = h.hilbert_attention(
        q, k, v, grid=(8, 8), segment_size=16, dilation_rate=2, return_lse=True)
    assert_type(lse, Tensor)
    assert_type(h.hilbert_attention(q, k, v, return_lse=with_lse), Tensor | Pair)
    near = h.hilbert_attention(q, k, v, segment_size=16, causal=True, scale=0.5, backend="sdpa")
    assert_type(near, Tensor)
    far, far_lse = h.dilated_attention(
        q, k, v, [16, 64], [1, 2], combine="lse", offsets=[0, 1, 0, 1], return_lse=True)
    assert_type(h.dilated_attention(q, k, v, 64, 2, key_mask=None), Tensor)
    assert_type(h.merge_attention([out, far], [lse, far_lse]), Pair)
    pattern = h.SegmentPattern(64, 16)
    assert_type(h.reference_attention(q, k, v, pattern, causal=True), Pair)
    return out


def on_a_grid(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> None:
    grid = 8, 8
    registers = k[:, :, :2], v[:, :, :2]
    windows = h.window_attention(q, k, v, grid, 4, shift=(1, 2), registers=registers)
    assert_type(windows, Tensor)
    assert_type(h.window_attention(q, k, v, 64, [4], return_lse=with_lse), Tensor | Pair)
    causal = True, False
    near = h.neighborhood_attention(q, k, v, grid, 3, causal=causal, return_lse=True)
    assert_type(near, Pair)
    assert_type(h.hilbert_window_attention(q, k, v, grid, 16, curve=None), Tensor)
    assert_type(h.hilbert_slide_attention(q, k, v, grid, 9, dropout_p=0.1), Tensor)
    assert_type(h.tiles_shared_attention(q, k, v, tiles=4, shared=8, return_lse=True), Pair)


def blocks(q: Tensor, k: Tensor, v: Tensor) -> None:
    lists = h.block_lists(h.NeighborhoodPattern((8, 8), 3), curve="hilbert", block_size=16)
    assert_type(lists, h.BlockLists)
    assert_type(lists.to("cpu").kinds(), Tensor)
    assert_type(h.block_sparse_attention(q, k, v, lists), Tensor)
    mask = torch.ones(4, 4, dtype=torch.bool)
    both = h.block_sparse_attention(q, k, v, mask, block_size=16, return_lse=True)
    assert_type(both, Pair)
    assert_type(h.block_sparse_ring_attention(q, k, v, lists, return_lse=True), Pair)


def rings(q: Tensor, k: Tensor, v: Tensor) -> None:
    order = h.curve_order((8, 8))
    shard = h.shard_sequence(q, None, 2, order, "zigzag")
    assert_type(h.unshard_sequence(shard, dim=2, order=order, layout="zigzag"), Tensor)
    out = h.ring_attention(q, k, v, segment_size=16, layout="zigzag")
    assert_type(out.shape, torch.Size)
    out, lse = h.ring_dilated_attention(
        q, k, v, [16, None], [2, 1], combine="lse", return_lse=True)
    assert_type(lse, Tensor)
    plan = h.plan_ring(
        (32, 32), segment_lengths=16, dilation_rates=1, batch=1, heads=4, kv_heads=2, head_dim=8)
    assert_type(plan.traffic(0).bytes, int)
    assert_type(plan.world_size, int)


class Model(nn.Module):
    "Blocks along a curve, and a head."

    def __init__(self, width: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()

        def block() -> h.TransformerBlock:
            core = h.HilbertAttentionCore(dim=width, heads=heads, segment_size=16, curve=None)
            return h.TransformerBlock(core, width)

        self.body = h.HilbertOrder([block(), block()], grid, "hilbert")
        self.mix = h.DilatedSelfAttention(
            width, heads, segment_lengths=[16, 64], dilation_rates=[1, 2], causal=True,
            combine="heads")
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body.forward(x)
        mixed: Tensor = self.mix(x, is_causal=True)
        return self.head.forward(mixed.mean(1))


def modules(x: Tensor) -> Tensor:
    layer = h.MultiheadDilatedAttention(
        32, 4, batch_first=True, segment_lengths=16, dilation_rates=1, grid=(8, 8),
        curve="morton")
    rope = h.rotary_embedding((8, 8), 8)
    assert_type(layer.forward(x, x, x, rope=rope), tuple[Tensor, None])
    ring = h.RingDilatedAttention([16], [1], layout="zigzag", offsets=None, backend="sdpa")
    assert_type(ring.unshard(ring.shard(x)), Tensor)
    far_and_near = h.SparsePatternConfig("global_local", 16)
    sparse = h.BlockSparseAttention(far_and_near, block_size=16)
    assert_type(sparse.block_lists(64), h.BlockLists)
    return Model(32, 4, (8, 8)).forward(x)


@h.register_attention_type("dense here", "One segment.", "short sequences")
def dense(config: h.AttentionConfig) -> nn.Module:
    return h.DilatedAttention(1 << 30, 1, causal=config.causal)


def factory() -> None:
    config = h.AttentionConfig(
        embed_dim=32, num_heads=4, segment_lengths=[16], dilation_rates=[1], grid=(8, 8))
    assert_type(config.replace(causal=True, dtype="float32").hidden_dim, int | None)
    made = h.create_dilated_attention("dense here", config, causal=True)
    assert_type(made, nn.Module)
    multihead = h.create_multihead_dilated_attention("hilbert", config)
    assert_type(multihead, h.MultiheadDilatedAttention)
    ring = h.create_self_attention(
        "ring", dim=32, heads=4, segment_lengths=[16], dilation_rates=[1])
    assert_type(ring, h.DilatedSelfAttention)
    print(h.explain_attention_type(config).reason)
    old = h.StandardizedRingConfig(dim=32, heads=4, checkpointing=True)
    assert_type(old.checkpoint, bool)
    improved = h.create_standardized_ring_attention(
        "improved", old, segment_lengths=[16], dilation_rates=[1])
    assert_type(improved, h.DilatedSelfAttention)


def explaining(q: Tensor) -> None:
    choice = h.explain_backend(
        (1, 4, 64, 8), segment_lengths=[16, 64], dilation_rates=[1, 2], combine="heads",
        layers=2, memory=1 << 30)
    assert_type(choice, h.BackendChoice)
    assert_type(choice.rejected.get("triton"), str | None)
    with h.set_backend("sdpa_mask"):
        assert_type(h.explain_backend(q, segment_size=16).backend, str)
    assert_type(h.detect_gpu_architecture().block_sizes, tuple[int, int])


def switch(model: Model) -> Model:
    return h.use_hilbert_attention(model, segment_size=256, curve="auto", prefix_tokens=1)


def kernel(q: Tensor, order: Tensor) -> Pair:
    return h.hilbert_attention_kernel(q, q, q, order, 16, scale=0.5)


def tour() -> None:
    "Everything but what needs a GPU or another library."
    q, k, v = (torch.randn(1, heads, 64, 8) for heads in (4, 2, 2))
    curves_and_patterns()
    functions(q, k, v, True)
    on_a_grid(q, k, v, True)
    blocks(q, k, v)
    rings(q, k, v)
    modules(torch.randn(1, 64, 32))
    factory()
    explaining(q)
