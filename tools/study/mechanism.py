"What the orders make possible before anything is learned, computed exactly."
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from hilbert_attn.curves import inverse_order

from .arms import Arm, layer_order
from .tasks import Task


def segments_of(arm: Arm, task: Task, layer: int) -> Tensor: # int64 (N,), by token
    "Which segment each token lies in."
    size = arm.segment_size(task) or task.tokens
    return inverse_order(layer_order(arm, task, layer)) // size


def together(arm: Arm, task: Task, layer: int) -> Tensor: # bool (N, N)
    "Who looks at whom in one layer."
    segment = segments_of(arm, task, layer)
    return segment[:, None] == segment


def partition(arm: Arm, task: Task, layer: int) -> frozenset[frozenset[int]]:
    "The segments as sets of tokens: equal sets are the same function."
    order = layer_order(arm, task, layer)
    parts = order.split(arm.segment_size(task) or task.tokens)
    return frozenset(frozenset(part.tolist()) for part in parts)


def neighbours_together(arm: Arm, task: Task, reach: int, layers: int = 2) -> np.ndarray:
    "Share of pairs at (dy, dx), -reach .. reach, that share a segment in some layer; 2-D grids."
    height, width = task.grid
    parts = [segments_of(arm, task, layer).view(task.grid) for layer in range(layers)]
    found = np.empty((2 * reach + 1, 2 * reach + 1))
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            here, there = _shifted(height, dy), _shifted(width, dx)
            same = [p[here[0], there[0]] == p[here[1], there[1]] for p in parts]
            found[dy + reach, dx + reach] = torch.stack(same).any(0).double().mean()
    return found


def _shifted(size: int, by: int) -> tuple[slice, slice]:
    "Where a cell and its partner `by` cells further both lie on the axis."
    first = slice(max(0, -by), size - max(0, by))
    return first, slice(first.start + by, first.stop + by)


def receptive_field(arm: Arm, task: Task, layers: int) -> list[float]: # after 1, 2, ... layers
    "Share of pairs of tokens that are connected by attention."
    shares: list[float] = []
    before, heard = None, torch.empty(0) # segments of the last layer; float (segments, N), 0 or 1
    for layer in range(layers):
        if len(shares) > 4 and shares[-1] == shares[-5]:  # a whole period of layers adds nothing
            return shares + shares[-1:] * (layers - layer)
        segment = segments_of(arm, task, layer)
        sizes = segment.bincount()
        if before is None:
            heard = (segment == torch.arange(len(sizes))[:, None]).float()
        else:
            met = torch.zeros(len(sizes), len(heard))  # segments that share a token
            met[segment, before] = 1
            heard = (met @ heard > 0).float()
        before = segment
        pairs = sizes @ heard.sum(1).long()
        shares.append(pairs.item() / task.tokens ** 2)
    return shares


def layers_to_all(arm: Arm, task: Task, most: int = 64) -> int | None:
    "Layers until every pair of tokens is connected; None: not within `most`."
    shares = receptive_field(arm, task, most)
    return next((i + 1 for i, share in enumerate(shares) if share == 1), None)


def near_share(arm: Arm, task: Task, layers: int = 2) -> float:
    "Share of pairs of direct neighbours of the grid that share a segment in some layer."
    parts = [segments_of(arm, task, layer).view(task.grid) for layer in range(layers)]
    kept = []
    for axis, n in enumerate(task.grid):
        pairs = [p.narrow(axis, 0, n - 1) == p.narrow(axis, 1, n - 1) for p in parts]
        kept.append(torch.stack(pairs).any(0).flatten())
    return torch.cat(kept).double().mean().item()


def around_share(arm: Arm, task: Task, reach: int = 2, layers: int = 2) -> float:
    "Share of pairs at most `reach` cells apart along each axis that share a segment in some layer."
    parts = [segments_of(arm, task, layer).view(task.grid) for layer in range(layers)]
    near, pairs = 0, 0
    for offset in product(range(-reach, reach + 1), repeat=len(task.grid)):
        if offset <= (0,) * len(offset): continue  # the same pairs the other way round
        ends = [_shifted(size, by) for size, by in zip(task.grid, offset)]
        here, there = (tuple(end[side] for end in ends) for side in (0, 1))
        same = torch.stack([part[here] == part[there] for part in parts]).any(0)
        near, pairs = near + int(same.sum()), pairs + same.numel()
    return near / pairs


def pairs_per_layer(arm: Arm, task: Task) -> int:
    "Query-key pairs of a head: the same for all sparse arms."
    full, rest = divmod(task.tokens, arm.segment_size(task) or task.tokens)
    size = arm.segment_size(task) or prod(task.grid)
    return full * size ** 2 + rest ** 2
