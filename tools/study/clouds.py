"Clouds of points: each example has orders of its own, so they are sorted as they come."
from collections.abc import Iterator

import torch
from torch import Tensor

from hilbert_attn.points import point_order

from .arms import SCHEMES, Arm
from .network import Network, Size
from .tasks import Task

VOXELS = 32 # along the longest side of a cloud: `row_major` goes along rows of them


def cloud_order(
    name: str, # of an arm
    points: Tensor, # (B, N, 3)
    draw: int = 0, # which random order
) -> Tensor: # int64 (B, N): the point at each position
    "What `order_of` is to a grid."
    size, count = points.shape[:2]
    if name == "dense": return torch.arange(count).expand(size, count)
    if name == "random":
        start = torch.Generator().manual_seed(77 + draw)
        return torch.rand(size, count, generator=start).argsort(1)
    if name == "row_major": return _along_rows(points)
    cloud = torch.arange(size).repeat_interleave(count)
    order = point_order(points.flatten(0, 1), name, batch=cloud)
    return order.view(size, count) % count


def _along_rows(points: Tensor) -> Tensor: # int64 (B, N)
    "Row by row of voxels; points of one voxel as they came."
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    side = (high - low).amax(-1, keepdim=True) / VOXELS
    voxel = ((points - low) / side).long().clamp(max=VOXELS - 1)
    place = voxel @ torch.tensor([VOXELS ** 2, VOXELS, 1])
    return place.argsort(dim=1, stable=True)


def cloud_orders(
    arm: Arm,
    task: Task,
    points: Tensor, # (B, N, 3)
    layers: int,
) -> Iterator[Tensor]: # int64 (B, N)
    "What `layer_orders` is to a grid: a walk is transposed by its axes, turned by their signs."
    steps = SCHEMES[arm.scheme]
    for layer in range(layers):
        number, shift = steps[layer % len(steps)]
        turned = points.flip(-1) if number % 2 else points
        draw = layer if len(steps) > 1 else 0
        order = cloud_order(arm.name, -turned if number > 1 else turned, draw)
        yield order.roll(-(task.segment_size // 2), 1) if shift else order


class CloudNetwork(Network):
    "Points (B, N, inputs), the first three inputs their coordinates. Nothing rotates queries."

    def _lay_out(self, task: Task, arm: Arm, size: Size) -> None:
        self.task, self.arm = task, arm

    def forward(self, tokens: Tensor) -> Tensor:
        x, points = self.embed(tokens), tokens[..., :3]
        orders = cloud_orders(self.arm, self.task, points, len(self.blocks))
        for block, order in zip(self.blocks, orders):
            index = order[..., None].expand_as(x)
            after = block(x.gather(1, index), rope=None)
            x = torch.empty_like(x).scatter(1, index, after)
        return self.predict(self.norm(x))
