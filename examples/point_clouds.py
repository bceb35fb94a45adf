"""Point clouds: a small serialised transformer finds shapes, and the depth of a photo is smoothed.

    python examples/point_clouds.py            # under five minutes on two cores
    python examples/point_clouds.py --quick    # a few steps, to see that it runs

A scene holds three of five shapes (rod, ring, sheet, sphere, blob), turned and noisy, and the
network says of each point to which kind of shape it belongs. Scenes of different sizes are packed
in one sequence. Each layer sorts the points along another curve and attends inside patches of it.
The baseline is the same network, as large and trained as long, with patches of one point: it knows
where a point is, and nothing of those around it.
"""
import argparse
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hilbert_attn import merge_attention
from hilbert_attn.points import POINT_CURVES, OrderSchedule, point_attention, point_order


def rod(n: int) -> Tensor: return (2 * torch.rand(n, 1) - 1) * torch.tensor([1.0, 0.0, 0.0])


def ring(n: int) -> Tensor:
    around = 2 * math.pi * torch.rand(n)
    return 0.7 * torch.stack([around.cos(), around.sin(), torch.zeros(n)], 1)


def sheet(n: int) -> Tensor:
    return (1.6 * torch.rand(n, 3) - 0.8) * torch.tensor([1.0, 1.0, 0.0])


def sphere(n: int) -> Tensor: return 0.7 * F.normalize(torch.randn(n, 3), dim=1)
def blob(n: int) -> Tensor: return 0.4 * torch.randn(n, 3)


SHAPES = (rod, ring, sheet, sphere, blob)


def turned(x: Tensor) -> Tensor: return x @ torch.linalg.qr(torch.randn(3, 3))[0]


def scene(noise: float) -> tuple[Tensor, Tensor]: # points (n, 3), the shape of each (n,)
    "Three shapes, turned and moved at random, with noise."
    points, kinds = [], []
    for place in 1.5 * torch.eye(3):
        kind, n = int(torch.randint(len(SHAPES), ())), int(torch.randint(64, 161, ()))
        x = turned(SHAPES[kind](n)) + place + 0.3 * torch.randn(3)
        points.append(x + noise * torch.randn(n, 3))
        kinds.append(torch.full((n,), kind))
    x = turned(torch.cat(points))
    return x - x.mean(0), torch.cat(kinds)


def pack(count: int, noise: float) -> tuple[Tensor, Tensor, list[int]]:
    "Scenes one behind the other: points (N, 3), the shape of each, and the borders of scenes."
    scenes = [scene(noise) for _ in range(count)]
    borders = [0]
    for x, _ in scenes: borders.append(borders[-1] + len(x))
    points, kinds = map(torch.cat, zip(*scenes))
    return points, kinds, borders


class Block(nn.Module):
    "A transformer block; attention inside patches of an order."

    def __init__(self, dim: int, heads: int, patch_size: int):
        super().__init__()
        self.heads, self.patch_size = heads, patch_size
        self.norm, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, order: Tensor, borders: list[int]) -> Tensor: # (N, dim)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        y = point_attention(
            q[None], k[None], v[None], order, patch_size=self.patch_size, cu_seqlens=borders)
        x = x + self.out(y[0].transpose(0, 1).flatten(1))
        return x + self.mlp(x)


class Segmenter(nn.Module):
    "Points to the kinds of their shapes."

    def __init__(self, patch_size: int, dim: int = 48, heads: int = 4, layers: int = 4):
        super().__init__()
        self.patch_size, self.schedule = patch_size, OrderSchedule(POINT_CURVES)
        self.embed = nn.Sequential(nn.Linear(8, dim), nn.GELU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, patch_size) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, len(SHAPES)))

    def features(self, points: Tensor, order: Tensor, borders: list[int]) -> Tensor: # (N, 8)
        "Where a point is, in its scene and in its patch."
        x = points[None, None]
        middle = point_attention( # queries of zeros attend all keys alike
            torch.zeros_like(x), x, x, order, patch_size=self.patch_size, cu_seqlens=borders)
        inside = 5 * (points - middle[0, 0])
        lengths = [y.norm(dim=1, keepdim=True) for y in (points, inside)]
        return torch.cat([points, inside, *lengths], 1)

    def forward(self, points: Tensor, borders: list[int]) -> Tensor: # (N, kinds)
        make = partial(point_order, points, grid_size=0.02, cu_seqlens=borders)
        orders = self.schedule.orders(make, len(self.blocks))
        x = self.embed(self.features(points, orders[0], borders))
        for block, order in zip(self.blocks, orders): x = block(x, order, borders)
        return self.head(x)


def train(name: str, patch_size: int, steps: int, count: int, noise: float) -> float:
    "The share of points of new scenes whose shape is told right."
    torch.manual_seed(0)
    model = Segmenter(patch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in (bar := tqdm(range(steps), desc=name)):
        points, kinds, borders = pack(count, noise)
        loss = F.cross_entropy(model(points, borders), kinds)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    torch.manual_seed(1)  # new scenes, the same for all
    with torch.no_grad():
        points, kinds, borders = pack(100, noise)
        right = model(points, borders).argmax(1) == kinds
    return right.float().mean().item()


def photo() -> tuple[Tensor, Tensor] | None: # points (N, 3) in metres, colours (N, 3)
    "The stereo pair that comes with scikit-image, as points in space; None without it."
    try:
        from skimage.data import stereo_motorcycle
    except ImportError: return None
    left, _, disparity = stereo_motorcycle()
    y, x = torch.nonzero(torch.from_numpy(disparity).isfinite(), as_tuple=True)
    z = 0.193 * 994.978 / (torch.from_numpy(disparity)[y, x] + 31.086)
    points = torch.stack([(y - 254.877) / 994.978 * z, (x - 311.193) / 994.978 * z, z], 1)
    return points, torch.from_numpy(left)[y, x] / 255


def smooth(points: Tensor, colours: Tensor, noisy: Tensor, curves: tuple[str, ...]) -> Tensor:
    "Depths averaged over points that are near and alike: a bilateral filter that is attention."
    near = noisy[:, None] * torch.tensor([1.0]) / 0.1
    features = torch.cat([points[:, :2] / 0.03, near, colours / 0.1], 1)
    features = features - features.mean(0)
    # q . k = x . y - |y|^2 / 2: up to what a row shares, minus half of the squared distance
    q = torch.cat([features, torch.ones(len(features), 1)], 1)
    k = torch.cat([features, -features.square().sum(1, keepdim=True) / 2], 1)
    v = torch.zeros_like(q)
    v[:, 0] = noisy
    space = torch.cat([points[:, :2], noisy[:, None]], 1)
    parts = []
    for curve in curves:
        order = point_order(space, curve, grid_size=0.005)
        parts.append(point_attention(
            q[None, None], k[None, None], v[None, None], order, patch_size=256, scale=1.0,
            return_lse=True))
    out, _ = merge_attention(*map(list, zip(*parts)))
    return out[0, 0, :, 0]


def show_photo(every: int):
    "How far smoothing brings noisy depths back."
    found = photo()
    if found is None: return print("The photo needs scikit-image: pip install scikit-image")
    points, colours = (x[::every].float() for x in found)
    torch.manual_seed(0)
    noisy = points[:, 2] + 0.05 * torch.randn(len(points))

    def off(z): return 1000 * (z - points[:, 2]).square().mean().sqrt().item()

    one, all_four = (smooth(points, colours, noisy, x) for x in (POINT_CURVES[:1], POINT_CURVES))
    print(f"A photo of {len(points):,} points whose depths are {off(noisy):.0f} mm off: "
          f"{off(one):.0f} mm after attention along one curve, {off(all_four):.0f} mm along four")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--scenes", type=int, default=8, help="in a step")
    parser.add_argument("--noise", type=float, default=0.03)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    steps, count = (5, 2) if args.quick else (args.steps, args.scenes)
    baseline = train("patches of 1 point", 1, steps, count, args.noise)
    ours = train("patches of 32 points", 32, steps, count, args.noise)
    print(f"Points told right: {ours:.1%}; with patches of one point {baseline:.1%}, "
          f"by chance {1 / len(SHAPES):.0%}")
    show_photo(50 if args.quick else 4)


if __name__ == "__main__": main()
