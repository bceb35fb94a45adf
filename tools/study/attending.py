"How far a trained network looks."
import torch
from torch import Tensor

from hilbert_attn.modules import TransformerBlock, apply_rotary
from hilbert_attn.patterns import (
    DilatedPattern,
    NeighborhoodPattern,
    WindowPattern,
    attention_mask,
)

from .arms import DILATED_ARMS, GRID_ARMS, Arm, layer_orders
from .network import Network, branches_of
from .tasks import Task


def seen_by(
    arm: Arm,
    task: Task,
    layer: int,
    heads: int,
) -> Tensor: # bool (1 or H, N, N)
    "Which keys a query attends to, in the order of the layer."
    if arm.name in DILATED_ARMS:
        branches = branches_of(arm.name, task.segment_size)
        pattern = DilatedPattern.for_heads(task.tokens, heads, *branches, combine="heads")
        return attention_mask(pattern)[0] > 0
    if arm.name not in GRID_ARMS:
        segment = torch.arange(task.tokens) // (arm.segment_size(task) or task.tokens)
        return (segment[:, None] == segment)[None]
    side = (task.tile,) * len(task.grid)
    near = NeighborhoodPattern(task.grid, side)
    if arm.name == "neighbourhood": return attention_mask(near)[0]
    shift = task.tile // 2 if layer % 2 else 0
    return attention_mask(WindowPattern(task.grid, side, shift=shift))[0]


def weights_and_values(
    block: TransformerBlock, # of `Network`
    x: Tensor, # (B, N, E), in the order of the layer
    rope: tuple[Tensor, Tensor] | None, # in the same order
    seen: Tensor, # bool (1 or H, N, N)
    heads: int,
) -> tuple[Tensor, Tensor]: # softmax weights (B, H, N, N), values (B, H, N, D)
    "The attention of a block, written out."
    inside = block.attention.qkv_proj(block.attention_norm(x))
    q, k, v = inside.unflatten(-1, (3 * heads, -1)).transpose(1, 2).chunk(3, 1)
    if rope is not None: q, k = apply_rotary(q, rope), apply_rotary(k, rope)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1), v


@torch.no_grad()
def attention_distances(
    network: Network, # trained
    task: Task,
    arm: Arm,
    heads: int,
    examples: int = 8, # spread over all groups of the test examples
) -> list[tuple[float, float]]: # by layer, in cells: by its weights, and if all were equal
    "Mean distance from a query to what it attends to, on test examples."
    tests = task.tests().batch.tokens
    x = network.embed(tests[::max(1, len(tests) // examples)][:examples])
    coords = torch.unravel_index(torch.arange(task.tokens), task.grid)
    cells, found = torch.stack(coords, 1).float(), []
    orders = layer_orders(arm, task, len(network.blocks))
    steps = zip(network.blocks, network.moves, network.ropes, orders)
    for layer, (block, move, rope, order) in enumerate(steps):
        x = x[:, move]
        seen = seen_by(arm, task, layer, heads)
        weights, _ = weights_and_values(block, x, rope, seen, heads)
        away = torch.cdist(cells[order], cells[order])
        equal = seen / seen.sum(-1, keepdim=True)
        found.append(tuple((w * away).sum(-1).mean().item() for w in (weights, equal)))
        x = block(x, rope=rope)
    return found
