"""Point clouds: a small serialised transformer tells shapes apart, and a photo's depth is smoothed.

    python examples/point_clouds.py            # under five minutes on two cores
    python examples/point_clouds.py --quick    # a few steps, to see that it runs

Clouds of different sizes are packed in one sequence. Each layer sorts the points along another
curve and attends inside patches of it. The baseline is the same network, as large and trained as
long, with patches of one point: each point sees itself alone, until those of a cloud are averaged.
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


def ball(n: int) -> Tensor: return F.normalize(torch.randn(n, 3), dim=1)


def cube(n: int) -> Tensor:
    x = 2 * torch.rand(n, 3) - 1
    side = torch.randint(3, (n, 1))
    return x.scatter(1, side, x.gather(1, side).sign()) * 0.8


def torus(n: int) -> Tensor:
    around, across = 2 * math.pi * torch.rand(2, n)
    ring = 0.8 + 0.3 * across.cos()
    return torch.stack([ring * around.cos(), ring * around.sin(), 0.3 * across.sin()], 1)


def cylinder(n: int) -> Tensor:
    around = 2 * math.pi * torch.rand(n)
    return torch.stack([0.7 * around.cos(), 0.7 * around.sin(), 1.6 * torch.rand(n) - 0.8], 1)


def cone(n: int) -> Tensor:
    around, height = 2 * math.pi * torch.rand(n), torch.rand(n).sqrt()
    return torch.stack([height * around.cos(), height * around.sin(), 1.6 * height - 1], 1)


SHAPES = (ball, cube, torus, cylinder, cone)


def cloud(kind: int, n: int, noise: float) -> Tensor: # (n, 3)
    "Points on a shape, stretched and turned at random, with noise."
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    x = SHAPES[kind](n) * (0.7 + 0.6 * torch.rand(3)) @ turn + noise * torch.randn(n, 3)
    return x - x.mean(0)


def pack(count: int, noise: float) -> tuple[Tensor, Tensor, list[int]]:
    "Clouds one behind the other: points (N, 3), the shape of each cloud, and their borders."
    kinds, sizes = torch.randint(len(SHAPES), (count,)), torch.randint(64, 193, (count,))
    clouds = [cloud(int(kind), int(n), noise) for kind, n in zip(kinds, sizes)]
    borders = [0]
    for x in clouds: borders.append(borders[-1] + len(x))
    return torch.cat(clouds), kinds, borders


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


class Classifier(nn.Module):
    "Points to the shape of their cloud."

    def __init__(self, patch_size: int, dim: int = 48, heads: int = 4, layers: int = 4):
        super().__init__()
        self.patch_size, self.schedule = patch_size, OrderSchedule(POINT_CURVES)
        self.embed = nn.Sequential(nn.Linear(8, dim), nn.GELU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, patch_size) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, len(SHAPES)))

    def features(self, points: Tensor, order: Tensor, borders: list[int]) -> Tensor: # (N, 8)
        "Where a point is, in its cloud and in its patch."
        x = points[None, None]
        middle = point_attention( # queries of zeros attend all keys alike
            torch.zeros_like(x), x, x, order, patch_size=self.patch_size, cu_seqlens=borders)
        inside = points - middle[0, 0]
        lengths = [y.norm(dim=1, keepdim=True) for y in (points, inside)]
        return torch.cat([points, inside, *lengths], 1)

    def forward(self, points: Tensor, borders: list[int]) -> Tensor: # (clouds, shapes)
        make = partial(point_order, points, grid_size=0.02, cu_seqlens=borders)
        orders = self.schedule.orders(make, len(self.blocks))
        x = self.embed(self.features(points, orders[0], borders))
        for block, order in zip(self.blocks, orders): x = block(x, order, borders)
        sizes = torch.tensor(borders).diff()
        cloud = torch.arange(len(sizes)).repeat_interleave(sizes)
        mean = x.new_zeros(len(sizes), x.shape[1]).index_add(0, cloud, x) / sizes[:, None]
        return self.head(mean)


def train(name: str, patch_size: int, steps: int, count: int, noise: float) -> float:
    "The share of new clouds whose shape is told right."
    torch.manual_seed(0)
    model = Classifier(patch_size)
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
    torch.manual_seed(1)  # new clouds, the same for all
    with torch.no_grad():
        points, kinds, borders = pack(400, noise)
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
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--clouds", type=int, default=32, help="in a step")
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    steps, count = (5, 8) if args.quick else (args.steps, args.clouds)
    baseline = train("patches of 1 point", 1, steps, count, args.noise)
    ours = train("patches of 32 points", 32, steps, count, args.noise)
    print(f"Shapes told right: {ours:.1%}; with patches of one point {baseline:.1%}, "
          f"by chance {1 / len(SHAPES):.0%}")
    show_photo(50 if args.quick else 4)


if __name__ == "__main__": main()
