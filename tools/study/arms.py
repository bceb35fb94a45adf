"Who may look at whom: the arms, and their order in each layer."
from dataclasses import dataclass

import torch
from torch import Tensor

from hilbert_attn.curves import curve_order

from .tasks import Task

ARMS = ("dense", "random", "row_major", "tile", "morton", "hilbert")
GRID_ARMS = ("windows", "neighbourhood") # exploratory: patterns of the grid, whatever the order
# exploratory, along Hilbert: segments 4 times as long, every 4th position; half of the heads in
# plain segments and half in segments 8 times as long, every 8th position
DILATED_ARMS = ("dilated", "near_far")
AT_RATE_OF_HILBERT = (*GRID_ARMS, *DILATED_ARMS, "moore") # exploratory, none is tuned

# scheme -> (walk, shift by half a segment) in layers 0, 1, ..., and again from the first.
# 0 is the curve, 1 the transposed one, 2 the curve turned by half a turn, 3 that one transposed.
SCHEMES = {
    "alternating": ((0, False), (1, True)),
    "one": ((0, False),),
    "shifted": ((0, False), (0, True)),
    "transposed": ((0, False), (1, False)),
    "four": ((0, False), (1, False), (2, False), (3, False)),
    "four shifted": ((0, False), (1, True), (2, False), (3, True)),
}


# What the rotary embedding turns by: coordinates, the place in memory or on the curve, nothing.
POSITIONS = ("grid", "rows", "curve", "none")


@dataclass(frozen=True)
class Arm:
    "How the orders of a curve (`ARMS`, `GRID_ARMS`) change from layer to layer (`SCHEMES`)."
    name: str
    scheme: str = "alternating"
    positions: str | None = None # one of `POSITIONS`; None: those of the task

    @classmethod
    def read(cls, title: str) -> "Arm":
        "From a title such as `hilbert`, `hilbert four shifted`, `hilbert positions none`."
        what, _, positions = title.partition(" positions ")
        name, _, scheme = what.partition(" ")
        return cls(name, scheme or "alternating", positions or None)

    def segment_size(self, task: Task) -> int | None:
        return None if self.name == "dense" else task.segment_size


def order_of(name: str, grid: tuple[int, ...], tile: int, draw: int = 0) -> Tensor: # int64 (N,)
    "The token at each position. `draw` is which random order."
    if name == "dense" or name in GRID_ARMS: return curve_order(grid, "row_major")
    if name == "random":
        size = curve_order(grid, "row_major").numel()
        return torch.randperm(size, generator=torch.Generator().manual_seed(77 + draw))
    if name == "moore": return moore(grid[0])
    curve = "hilbert" if name in DILATED_ARMS else name
    return curve_order(grid, f"tile:{tile}" if name == "tile" else curve)


def moore(side: int) -> Tensor: # int64 (N,)
    "The token at each position of Moore's closed curve: four of Hilbert, turned."
    half = side // 2
    y, x = torch.unravel_index(curve_order((half, half), "hilbert"), (half, half))
    if y[-1]: y, x = x, y  # so that it ends where it began, at the other end of the row
    up = half - 1 - x, half - 1 - y
    down = half - 1 - up[0], half - 1 - up[1]
    quarters = ((up, half, 0), (up, 0, 0), (down, 0, half), (down, half, half))
    return torch.cat([(y + dy) * side + x + dx for (y, x), dy, dx in quarters])


def transposed(name: str, grid: tuple[int, ...], tile: int) -> Tensor: # int64 (N,)
    "The same walk with the axes in reverse: rows become columns."
    order = order_of(name, grid[::-1], tile)
    token = torch.arange(order.numel()).view(grid)
    return token.permute(*reversed(range(len(grid)))).flatten()[order]


def walk(name: str, task: Task, number: int) -> Tensor: # int64 (N,)
    "One of the four walks of `SCHEMES`. Half a turn takes token i to N - 1 - i."
    make = transposed if number % 2 else order_of
    order = make(name, task.grid, task.tile)
    return order if number < 2 else task.tokens - 1 - order


def layer_order(arm: Arm, task: Task, layer: int) -> Tensor: # int64 (N,)
    "The order of one layer."
    steps = SCHEMES[arm.scheme]
    number, shift = steps[layer % len(steps)]
    if arm.name == "dense" or arm.name in GRID_ARMS:
        return order_of(arm.name, task.grid, task.tile)
    if arm.name == "random":
        return order_of("random", task.grid, task.tile, layer if len(steps) > 1 else 0)
    order = walk(arm.name, task, number)
    return order.roll(-(task.segment_size // 2)) if shift else order


def layer_orders(arm: Arm, task: Task, layers: int) -> list[Tensor]:
    return [layer_order(arm, task, layer) for layer in range(layers)]
