"The network: the same for all arms, but for who looks at whom."
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hilbert_attn.curves import inverse_order
from hilbert_attn.modules import HilbertAttentionCore, TransformerBlock, rotary_embedding

from .arms import Arm, layer_orders
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
        segment = arm.segment_size(task)
        self.blocks = nn.ModuleList(_block(segment, size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.predict = nn.Linear(size.width, task.outputs)
        self._lay_out(task, arm, size)

    def _lay_out(self, task: Task, arm: Arm, size: Size) -> None:
        """Tokens move straight from the order of one layer to that of the next.

        The rotary embedding is that of the true coordinates, whatever the order."""
        rope = rotary_embedding(task.grid, size.width // size.heads, base=size.rope_base)
        now = home = torch.arange(task.tokens)
        self.moves, self.ropes = [], []
        for order in layer_orders(arm, task, size.layers):
            self.moves.append(inverse_order(now)[order])
            self.ropes.append(tuple(part[order] for part in rope))
            now = order
        self.home = inverse_order(now)[home]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block, move, rope in zip(self.blocks, self.moves, self.ropes):
            x = block(x[:, move], rope=rope)
        return self.predict(self.norm(x[:, self.home]))


def _block(segment: int | None, size: Size) -> nn.Module:
    attention = HilbertAttentionCore(
        size.width, size.heads, segment, curve=None, backend="sdpa")
    return TransformerBlock(attention, size.width, mlp_ratio=size.mlp_ratio)
