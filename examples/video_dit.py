"""A video diffusion transformer learns moving digits: dense attention, Hilbert tiles, row tiles.

    python examples/video_dit.py            # under ten minutes on two cores
    python examples/video_dit.py --quick    # a few steps, to see that it runs

Digits of scikit-learn move over a small canvas and bounce off its borders. A transformer of
diffusers' Wan class, small and with random weights, learns to make such videos by flow matching; it
is told the digit by two tokens of text. Three of them start with the same weights and see the same
batches for the same number of seconds. One has dense attention. The others attend inside six
tiles, cut along the Hilbert curve or along rows, which move by half a tile from layer to layer.
Losses and videos are written to out/video_dit/.
"""
import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from hilbert_attn import use_hilbert_attention

FRAMES, SIDE, DIGIT = 6, 20, 14 # of a video (FRAMES, SIDE, SIDE), and of a digit in it
PATCH = (1, 2, 2)
TEXT = 16 # numbers of a text token
ARMS = {
    "dense": None,
    "Hilbert tiles": dict(tiles=6, layer_shift=0.5),
    "row tiles": dict(tiles=6, layer_shift=0.5, curve="row_major"),
}


class MovingDigits:
    "Videos (B, 1, FRAMES, SIDE, SIDE) in -1 ... 1, and their digits (B,)."

    def __init__(self, held_out: bool):
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
        own = torch.arange(len(images)) % 10 == 0 if held_out else torch.arange(len(images)) % 10 > 0
        self.images = F.interpolate(images[own], size=DIGIT, mode="bilinear")
        self.kinds = torch.from_numpy(digits.target)[own]

    def paths(self, count: int, draw: torch.Generator) -> Tensor: # int64 (count, FRAMES, 2)
        "Places of the digits' corners, which bounce."
        room = SIDE - DIGIT
        start = torch.rand(count, 1, 2, generator=draw) * room
        speed = 2 * torch.randn(count, 1, 2, generator=draw)
        at = (start + speed * torch.arange(FRAMES)[:, None]) % (2 * room)
        return torch.where(at > room, 2 * room - at, at).round().long()

    def batch(self, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        "So many videos, and their digits."
        which = torch.randint(len(self.images), (count,), generator=draw)
        videos = torch.full((count, 1, FRAMES, SIDE, SIDE), -1.0)
        for video, image, path in zip(videos, self.images[which], self.paths(count, draw)):
            for frame, (y, x) in enumerate(path.tolist()):
                video[:, frame, y:y + DIGIT, x:x + DIGIT] = image
        return videos, self.kinds[which]


class Network(nn.Module):
    "The flow at a noisy video, given its digit."

    def __init__(self, layers: int):
        super().__init__()
        self.words = nn.Embedding(10, 2 * TEXT)
        self.transformer = WanTransformer3DModel(
            patch_size=PATCH, num_attention_heads=4, attention_head_dim=24, in_channels=1,
            out_channels=1, text_dim=TEXT, freq_dim=64, ffn_dim=192, num_layers=layers)

    def forward(self, noisy: Tensor, t: Tensor, kinds: Tensor) -> Tensor: # like noisy
        text = self.words(kinds).unflatten(1, (2, TEXT))
        return self.transformer(noisy, 1000 * t, text).sample


def flow_loss(model: Network, videos: Tensor, kinds: Tensor, draw: torch.Generator) -> Tensor:
    "How far the flow is off, at random times between video (0) and noise (1)."
    t = torch.rand(len(videos), generator=draw)
    noise = torch.randn(videos.shape, generator=draw)
    noisy = videos.lerp(noise, t[:, None, None, None, None])
    return F.mse_loss(model(noisy, t, kinds), noise - videos)


@torch.no_grad()
def sample(model: Network, kinds: Tensor, steps: int) -> Tensor: # videos
    "From noise to videos, by Euler's method."
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(len(kinds), 1, FRAMES, SIDE, SIDE, generator=draw)
    times = torch.linspace(1, 0, steps + 1)
    for now, then in zip(times[:-1], times[1:]):
        x = x + (then - now) * model(x, now.expand(len(kinds)), kinds)
    return x.clamp(-1, 1)


@dataclass
class Curve:
    "Losses on held-out digits, in the course of a training."
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, step: int, seconds: float, loss: float):
        for values, value in zip((self.steps, self.seconds, self.losses), (step, seconds, loss)):
            values.append(value)


def checker(count: int) -> Callable[[Network], float]:
    "The loss on the same held-out videos, times and noise, each time it is asked for."
    videos, kinds = MovingDigits(held_out=True).batch(count, torch.Generator().manual_seed(1))

    @torch.no_grad()
    def check(model: Network) -> float:
        return flow_loss(model, videos, kinds, torch.Generator().manual_seed(2)).item()

    return check


def rate_at(done: float, highest: float) -> float:
    "The learning rate, of a training that is done to this share: a short rise, then a cosine to 0."
    return highest * min(1.0, done / 0.03) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def train(name: str, args: argparse.Namespace) -> tuple[Network, Curve]:
    "One network, for so many seconds or steps; time spent on checks is not counted."
    torch.manual_seed(0)
    model = Network(args.layers)
    if ARMS[name]: use_hilbert_attention(model.transformer, **ARMS[name])
    digits, draw = MovingDigits(held_out=False), torch.Generator().manual_seed(0)
    check, curve = checker(8 if args.quick else 32), Curve()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate)
    curve.add(0, 0.0, check(model))
    seconds, step = 0.0, 0
    what = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s{postfix}"
    with tqdm(total=args.seconds, desc=name, bar_format=what) as bar:
        while seconds < args.seconds and step < args.steps:
            start = time.perf_counter()
            videos, kinds = digits.batch(args.batch, draw)
            loss = flow_loss(model, videos, kinds, draw)
            optimizer.zero_grad()
            loss.backward()
            done = max(seconds / args.seconds, step / args.steps)
            optimizer.param_groups[0]["lr"] = rate_at(done, args.rate)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            passed, step = time.perf_counter() - start, step + 1
            seconds += passed
            if step % args.every == 0: curve.add(step, seconds, check(model))
            bar.update(min(passed, args.seconds - bar.n))
            bar.set_postfix(step=step, loss=f"{curve.losses[-1]:.3f}")
    if curve.steps[-1] != step: curve.add(step, seconds, check(model))
    return model, curve


def draw_losses(curves: dict[str, Curve], path: Path):
    "Loss against steps, and against seconds."
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for name, curve in curves.items():
        axes[0].plot(curve.steps, curve.losses, label=name)
        axes[1].plot(curve.seconds, curve.losses, label=name)
    for ax, what in zip(axes, ("steps", "seconds of training")): ax.set_xlabel(what)
    axes[0].set(ylabel="loss on held-out digits", yscale="log")
    axes[0].legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def draw_videos(strips: dict[str, Tensor], path: Path):
    "Videos as strips of frames, one row each."
    rows = [(name, video[0]) for name, videos in strips.items() for video in videos]
    fig, axes = plt.subplots(
        len(rows), FRAMES, figsize=(FRAMES, len(rows) + 0.3), layout="constrained")
    for (name, video), row in zip(rows, axes):
        for ax, frame in zip(row, video):
            ax.imshow(frame, cmap="gray", vmin=-1, vmax=1)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=7)
    fig.savefig(path, dpi=80)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=160, help="of training, for each network")
    parser.add_argument("--steps", type=int, default=10**6, help="at most, for each network")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=25, help="steps between two checks")
    parser.add_argument("--out", type=Path, default=Path("out/video_dit"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.quick: args.steps, args.layers, args.batch = 2, 2, 1
    args.out.mkdir(parents=True, exist_ok=True)
    kinds, curves, strips = torch.tensor([3, 7]), {}, {}
    real, _ = MovingDigits(held_out=True).batch(2, torch.Generator().manual_seed(4))
    strips["real"] = real
    for name in ARMS:
        model, curves[name] = train(name, args)
        strips[name] = sample(model, kinds, 2 if args.quick else 30)
    draw_losses(curves, args.out / "losses.png")
    draw_videos(strips, args.out / "videos.png")
    stored = {name: vars(curve) for name, curve in curves.items()}
    (args.out / "losses.json").write_text(json.dumps(stored) + "\n")
    for name, curve in curves.items():
        each = 1000 * curve.seconds[-1] / curve.steps[-1]
        print(f"{name:14} {curve.steps[-1]:5} steps of {each:5.0f} ms, "
              f"loss {curve.losses[0]:.3f} -> {curve.losses[-1]:.3f}")
    print(f"Losses and videos are in {args.out}/")


if __name__ == "__main__": main()
