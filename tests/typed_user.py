"""What somebody writes who checks types: mypy --strict finds nothing wrong here (see
test_types.py), and it runs."""
from typing import assert_type

import torch
import torch.nn as nn
from torch import Tensor

import hilbert_attn
from hilbert_attn import (
    AttentionConfig,
    BackendChoice,
    BlockLists,
    DilatedSelfAttention,
    HilbertAttentionCore,
    HilbertOrder,
    MultiheadDilatedAttention,
    NeighborhoodPattern,
    RingDilatedAttention,
    SegmentPattern,
    SparsePatternConfig,
    TransformerBlock,
    WindowPattern,
    block_lists,
    block_sparse_attention,
    block_sparse_ring_attention,
    create_dilated_attention,
    create_multihead_dilated_attention,
    create_self_attention,
    curve_order,
    dilated_attention,
    explain_backend,
    hilbert_attention,
    hilbert_slide_attention,
    hilbert_window_attention,
    locality,
    merge_attention,
    neighborhood_attention,
    plan_ring,
    reference_attention,
    register_attention_type,
    ring_attention,
    ring_dilated_attention,
    rotary_embedding,
    set_backend,
    shard_sequence,
    tiles_shared_attention,
    unshard_sequence,
    use_hilbert_attention,
    window_attention,
)


def curves_and_patterns() -> None:
    assert_type(curve_order((8, 8), "tile:4"), Tensor)
    assert_type(curve_order(64), Tensor)
    assert_type(locality([8, 8], 16).spread, float)
    window, near = WindowPattern((8, 8), 4), NeighborhoodPattern(
        (8, 8), (3, 5), causal=[True, False])
    assert_type(window.shift, tuple[int, ...])
    assert_type(near.causal, tuple[bool, ...])
    assert_type(SegmentPattern(64, 16, dilation_rate=2).density, float)
    assert_type(hilbert_attn.attention_mask(window, causal=True, device="cpu"), Tensor)


def functions(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> Tensor:
    assert_type(hilbert_attention(q, k, v), Tensor)
    assert_type(hilbert_attention(q, k, v, return_lse=False).shape, torch.Size)
    out, lse = hilbert_attention(
        q, k, v, grid=(8, 8), segment_size=16, dilation_rate=2, return_lse=True)
    assert_type(lse, Tensor)
    assert_type(hilbert_attention(q, k, v, return_lse=with_lse), Tensor | tuple[Tensor, Tensor])
    near = hilbert_attention(q, k, v, segment_size=16, causal=True, scale=0.5, backend="sdpa")
    assert_type(near, Tensor)
    far, far_lse = dilated_attention(
        q, k, v, [16, 64], [1, 2], combine="lse", offsets=[0, 1, 0, 1], return_lse=True)
    assert_type(dilated_attention(q, k, v, 64, 2, key_mask=None), Tensor)
    assert_type(merge_attention([out, far], [lse, far_lse]), tuple[Tensor, Tensor])
    assert_type(
        reference_attention(q, k, v, SegmentPattern(64, 16), causal=True), tuple[Tensor, Tensor])
    return out


def on_a_grid(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> None:
    registers = k[:, :, :2], v[:, :, :2]
    assert_type(window_attention(q, k, v, (8, 8), 4, shift=(1, 2), registers=registers), Tensor)
    assert_type(
        window_attention(q, k, v, 64, [4], return_lse=with_lse), Tensor | tuple[Tensor, Tensor])
    assert_type(
        neighborhood_attention(q, k, v, (8, 8), 3, causal=(True, False), return_lse=True),
        tuple[Tensor, Tensor])
    assert_type(hilbert_window_attention(q, k, v, (8, 8), 16, curve=None), Tensor)
    assert_type(hilbert_slide_attention(q, k, v, (8, 8), 9, dropout_p=0.1), Tensor)
    assert_type(
        tiles_shared_attention(q, k, v, tiles=4, shared=8, return_lse=True), tuple[Tensor, Tensor])


def blocks(q: Tensor, k: Tensor, v: Tensor) -> None:
    lists = block_lists(NeighborhoodPattern((8, 8), 3), curve="hilbert", block_size=16)
    assert_type(lists, BlockLists)
    assert_type(lists.to("cpu").kinds(), Tensor)
    assert_type(block_sparse_attention(q, k, v, lists), Tensor)
    assert_type(
        block_sparse_attention(
            q, k, v, torch.ones(4, 4, dtype=torch.bool), block_size=16, return_lse=True),
        tuple[Tensor, Tensor])
    assert_type(block_sparse_ring_attention(q, k, v, lists, return_lse=True), tuple[Tensor, Tensor])


def rings(q: Tensor, k: Tensor, v: Tensor) -> None:
    shard = shard_sequence(q, None, 2, curve_order((8, 8)), "zigzag")
    assert_type(unshard_sequence(shard, dim=2, order=curve_order((8, 8)), layout="zigzag"), Tensor)
    assert_type(ring_attention(q, k, v, segment_size=16, layout="zigzag").shape, torch.Size)
    out, lse = ring_dilated_attention(q, k, v, [16, None], [2, 1], combine="lse", return_lse=True)
    assert_type(lse, Tensor)
    plan = plan_ring(
        (32, 32), segment_lengths=16, dilation_rates=1, batch=1, heads=4, kv_heads=2, head_dim=8)
    assert_type(plan.traffic(0).bytes, int)
    assert_type(plan.world_size, int)


class Model(nn.Module):
    "Blocks along a curve, and a head."

    def __init__(self, width: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        layers = [
            TransformerBlock(
                HilbertAttentionCore(dim=width, heads=heads, segment_size=16, curve=None), width)
            for _ in range(2)]
        self.body = HilbertOrder(layers, grid, "hilbert")
        self.mix = DilatedSelfAttention(
            width, heads, segment_lengths=[16, 64], dilation_rates=[1, 2], causal=True,
            combine="heads")
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body.forward(x)
        mixed: Tensor = self.mix(x, is_causal=True)
        return self.head.forward(mixed.mean(1))


def modules(x: Tensor) -> Tensor:
    layer = MultiheadDilatedAttention(
        32, 4, batch_first=True, segment_lengths=16, dilation_rates=1, grid=(8, 8), curve="morton")
    assert_type(layer.forward(x, x, x, rope=rotary_embedding((8, 8), 8)), tuple[Tensor, None])
    ring = RingDilatedAttention([16], [1], layout="zigzag", offsets=None, backend="sdpa")
    assert_type(ring.unshard(ring.shard(x)), Tensor)
    assert_type(
        hilbert_attn.BlockSparseAttention(
            SparsePatternConfig("global_local", 16), block_size=16).block_lists(64),
        BlockLists)
    return Model(32, 4, (8, 8)).forward(x)


@register_attention_type("dense here", "One segment.", "short sequences")
def dense(config: AttentionConfig) -> nn.Module:
    return hilbert_attn.DilatedAttention(1 << 30, 1, causal=config.causal)


def factory() -> None:
    config = AttentionConfig(
        embed_dim=32, num_heads=4, segment_lengths=[16], dilation_rates=[1], grid=(8, 8))
    assert_type(config.replace(causal=True, dtype="float32").hidden_dim, int | None)
    assert_type(create_dilated_attention("dense here", config, causal=True), nn.Module)
    assert_type(create_multihead_dilated_attention("hilbert", config), MultiheadDilatedAttention)
    assert_type(
        create_self_attention("ring", dim=32, heads=4, segment_lengths=[16], dilation_rates=[1]),
        DilatedSelfAttention)
    print(hilbert_attn.explain_attention_type(config).reason)
    old = hilbert_attn.StandardizedRingConfig(dim=32, heads=4, checkpointing=True)
    assert_type(old.checkpoint, bool)
    assert_type(
        hilbert_attn.create_standardized_ring_attention(
            "improved", old, segment_lengths=[16], dilation_rates=[1]),
        DilatedSelfAttention)


def explaining(q: Tensor) -> None:
    choice = explain_backend(
        (1, 4, 64, 8), segment_lengths=[16, 64], dilation_rates=[1, 2], combine="heads", layers=2,
        memory=1 << 30)
    assert_type(choice, BackendChoice)
    assert_type(choice.rejected.get("triton"), str | None)
    with set_backend("sdpa_mask"): assert_type(explain_backend(q, segment_size=16).backend, str)
    assert_type(hilbert_attn.detect_gpu_architecture().block_sizes, tuple[int, int])


def switch(model: Model) -> Model:
    return use_hilbert_attention(model, segment_size=256, curve="auto", prefix_tokens=1)


def kernel(q: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    return hilbert_attn.hilbert_attention_kernel(q, q, q, order, 16, scale=0.5)


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
