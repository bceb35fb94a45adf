"The network: the same for all arms, but for who looks at whom."
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hilbert_attn import dilated_attention
from hilbert_attn.curves import inverse_order
from hilbert_attn.local import neighborhood_attention, window_attention
from hilbert_attn.modules import (
    HilbertAttentionCore,
    TransformerBlock,
    apply_rotary,
    rotary_embedding,
)

from .arms import DILATED_ARMS, GRID_ARMS, Arm, layer_order, layer_orders
from .tasks import Task


@dataclass(frozen=True)
class Size:
    "Of the network."
    width: int = 64
    heads: int = 2
    layers: int = 4
    mlp_ratio: int = 2
    rope_base: float = 100.0


class Network(nn.Module):
    "Tokens (B, N, inputs) to predictions (B, N, outputs), both in token order."

    def __init__(self, task: Task, arm: Arm, size: Size):
        super().__init__()
        self.embed = nn.Linear(task.inputs, size.width)
        layers = range(size.layers)
        self.blocks = nn.ModuleList(_block(task, arm, size, layer) for layer in layers)
        self.norm = nn.LayerNorm(size.width)
        self.predict = nn.Linear(size.width, task.outputs)
        self._lay_out(task, arm, size)

    def _lay_out(self, task: Task, arm: Arm, size: Size) -> None:
        """Tokens move straight from the order of one layer to that of the next.

        The rotary embedding is that of the token, whatever the order of the layer."""
        rope = rotary(task, arm, size)
        now = home = torch.arange(task.tokens)
        self.moves, self.ropes = [], []
        for order in layer_orders(arm, task, size.layers):
            self.moves.append(inverse_order(now)[order])
            self.ropes.append(rope and tuple(part[order] for part in rope))
            now = order
        self.home = inverse_order(now)[home]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block, move, rope in zip(self.blocks, self.moves, self.ropes):
            x = block(x[:, move], rope=rope)
        return self.predict(self.norm(x[:, self.home]))


def rotary(
    task: Task,
    arm: Arm,
    size: Size,
) -> tuple[Tensor, Tensor] | None:
    "Cos and sin of each token's position, in token order. A curve is that of the first layer."
    positions, head_dim = arm.positions or task.positions, size.width // size.heads
    if positions == "none": return None
    if positions == "grid": return rotary_embedding(task.grid, head_dim, base=size.rope_base)
    along_rows = rotary_embedding(task.tokens, head_dim)
    if positions == "rows": return along_rows
    place = inverse_order(layer_order(arm, task, 0))
    cos, sin = along_rows
    return cos[place], sin[place]


class OtherAttention(nn.Module):
    """What is no segment: patterns of the grid, as large as a tile, and dilated segments.

    Windows are shifted by half in odd layers. The projections are those of
    `HilbertAttentionCore`."""

    def __init__(self, task: Task, name: str, size: Size, layer: int):
        super().__init__()
        self.qkv_proj = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out_proj = nn.Linear(size.width, size.width, bias=False)
        self.heads, self.grid, self.name = size.heads, task.grid, name
        self.segment_size = task.segment_size
        self.side = (task.tile,) * len(task.grid)
        self.shift = task.tile // 2 if layer % 2 else 0

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor: # (B, N, E)
        heads = self.qkv_proj(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, 1)
        out = self.attend(apply_rotary(q, rope), apply_rotary(k, rope), v)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: # (B, H, N, D)
        if self.name in DILATED_ARMS:
            branches = branches_of(self.name, self.segment_size)
            return dilated_attention(q, k, v, *branches, combine="heads", curve=None)
        if self.name == "neighbourhood":
            return neighborhood_attention(q, k, v, self.grid, self.side, curve=None)
        return window_attention(q, k, v, self.grid, self.side, shift=self.shift, curve=None)


def branches_of(name: str, segment_size: int) -> tuple[list[int], list[int]]:
    "Segment lengths and dilation rates of `DILATED_ARMS`: each query has as many keys."
    rates = dict(dilated=[4], near_far=[1, 8])[name]
    return [segment_size * rate for rate in rates], rates


def _block(task: Task, arm: Arm, size: Size, layer: int) -> nn.Module:
    if arm.name in (*GRID_ARMS, *DILATED_ARMS):
        attention: nn.Module = OtherAttention(task, arm.name, size, layer)
    else:
        segment = arm.segment_size(task)
        attention = HilbertAttentionCore(
            size.width, size.heads, segment, curve=None, backend="sdpa")
    return TransformerBlock(attention, size.width, mlp_ratio=size.mlp_ratio)
