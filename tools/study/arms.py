"Who may look at whom: the arms, and their order in each layer."
from dataclasses import dataclass

import torch
from torch import Tensor

from hilbert_attn.curves import curve_order

from .tasks import Task

ARMS = ("dense", "random", "row_major", "tile", "morton", "hilbert")


@dataclass(frozen=True)
class Arm:
    "A name in `ARMS`, and how its orders change from layer to layer."
    name: str
    alternating: bool = True # odd layers: transposed, and shifted by half a segment

    def segment_size(self, task: Task) -> int | None:
        return None if self.name == "dense" else task.segment_size


def order_of(name: str, grid: tuple[int, ...], tile: int, layer: int) -> Tensor: # int64 (N,)
    "The token at each position. Random orders differ from layer to layer."
    if name == "dense": return curve_order(grid, "row_major")
    if name == "random":
        size = curve_order(grid, "row_major").numel()
        return torch.randperm(size, generator=torch.Generator().manual_seed(77 + layer))
    return curve_order(grid, f"tile:{tile}" if name == "tile" else name)


def transposed(name: str, grid: tuple[int, ...], tile: int) -> Tensor: # int64 (N,)
    "The same walk with the axes in reverse: rows become columns."
    order = order_of(name, grid[::-1], tile, 0)
    token = torch.arange(order.numel()).view(grid)
    return token.permute(*reversed(range(len(grid)))).flatten()[order]


def layer_order(arm: Arm, task: Task, layer: int) -> Tensor: # int64 (N,)
    "The order of one layer."
    even = not arm.alternating or layer % 2 == 0
    if even or arm.name in ("dense", "random"):
        return order_of(arm.name, task.grid, task.tile, layer if arm.alternating else 0)
    return transposed(arm.name, task.grid, task.tile).roll(-(task.segment_size // 2))


def layer_orders(arm: Arm, task: Task, layers: int) -> list[Tensor]:
    return [layer_order(arm, task, layer) for layer in range(layers)]
