"""A vision transformer goes on at four times the resolution that it was trained at.

    python examples/long_images.py            # some minutes on two cores
    python examples/long_images.py --quick    # a few steps, to see that it runs

Which digit stands on a cluttered canvas? A ViT of the transformers library, with random weights,
learns it at 64 x 64 pixels, with dense attention over 64 patches. Then it goes on with the same
scenes at 256 x 256 pixels, 1,024 patches, for the same number of steps: once with dense attention,
and twice in segments of 128 patches, along a Hilbert curve or along rows, where a patch attends its
segment, and the class token everything. Positions are interpolated as the library does it. What is
told is the share of held-out digits that are read right, before and after, and the time of a step.
It is written to out/long_images/, with a picture of some scenes.
"""
import argparse
import json
import time
from copy import deepcopy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from hilbert_attn import use_hilbert_attention

SMALL, LARGE, PATCH = 64, 256, 8
CLUTTER = 5 # pieces of other digits on a canvas
ARMS = { # settings of `use_hilbert_attention` at 256 x 256
    "dense": None,
    "Hilbert segments": dict(curve="hilbert"),
    "row segments": dict(curve="row_major"),
}


class Scenes:
    "Digits on a canvas, among pieces of other digits; drawn at any resolution."

    def __init__(self, held_out: bool):
        digits = load_digits()
        is_ninth = torch.arange(len(digits.target)) % 9 == 0
        own = is_ninth if held_out else ~is_ninth
        self.images = torch.from_numpy(digits.images).float()[own] / 16
        self.kinds = torch.from_numpy(digits.target)[own]

    def paste(self, canvas: Tensor, image: Tensor, size: int, draw: torch.Generator):
        "Draws an image in the resolution of the canvas, at a random place."
        side, at = canvas.shape[-1], torch.rand(2, generator=draw)
        drawn = F.interpolate(image[None, None], size=size, mode="bilinear")[0, 0]
        y, x = (at * (side - size)).long().tolist()
        window = canvas[y:y + size, x:x + size]
        torch.maximum(window, drawn, out=window)

    def batch(self, count: int, side: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        "Canvases (count, 3, side, side), and their digits (count,)."
        which = torch.randint(len(self.images), (count, 1 + CLUTTER), generator=draw)
        canvases = torch.zeros(count, side, side)
        for canvas, (first, *others) in zip(canvases, which.tolist()):
            for other in others:
                self.paste(canvas, self.images[other, :3, :3], side // 8, draw)
            self.paste(canvas, self.images[first], side // 2, draw)
        return canvases[:, None].expand(-1, 3, -1, -1) - 0.5, self.kinds[which[:, 0]]


def new_model(width: int, layers: int) -> ViTForImageClassification:
    "A small ViT for 64 x 64 pixels."
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, image_size=SMALL, patch_size=PATCH, num_labels=10)
    return ViTForImageClassification(config)


@torch.no_grad()
def share_right(model: ViTForImageClassification, side: int, count: int) -> float:
    "Of held-out digits."
    model.eval()
    scenes, draw, right = Scenes(held_out=True), torch.Generator().manual_seed(1), 0
    for _ in range(0, count, 10):
        canvases, kinds = scenes.batch(10, side, draw)
        found = model(canvases, interpolate_pos_encoding=True).logits.argmax(1)
        right += int((found == kinds).sum())
    return right / count


def train(
    model: ViTForImageClassification, name: str, side: int, steps: int, batch: int, rate: float,
) -> float: # median milliseconds of a step
    "Trains in place."
    model.train()
    scenes, draw, times = Scenes(held_out=False), torch.Generator().manual_seed(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in (bar := tqdm(range(steps), desc=name)):
        canvases, kinds = scenes.batch(batch, side, draw)
        start = time.perf_counter()
        logits = model(canvases, interpolate_pos_encoding=True).logits
        loss = F.cross_entropy(logits, kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return 1000 * torch.tensor(times).median().item()


def draw_scenes(path: Path):
    "The same four scenes at both resolutions."
    fig, axes = plt.subplots(2, 4, figsize=(5, 2.6), layout="constrained")
    for side, row in zip((SMALL, LARGE), axes):
        canvases, kinds = Scenes(held_out=True).batch(4, side, torch.Generator().manual_seed(1))
        for ax, canvas, kind in zip(row, canvases, kinds):
            ax.imshow(canvas[0], cmap="gray")
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{side} x {side}: a {kind}", fontsize=7)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def go_on(small: ViTForImageClassification, name: str, args: argparse.Namespace) -> dict:
    "A copy of the model, further trained at the large size: what came of it."
    model, how = deepcopy(small), ARMS[name]
    if how: use_hilbert_attention(model, segment_size=args.segment, **how)
    before = share_right(model, LARGE, args.held_out)
    each = train(model, f"{LARGE} pixels, {name}", LARGE, args.more, args.batch, 3e-4)
    return dict(before=before, after=share_right(model, LARGE, args.held_out), ms=each)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="at 64 x 64 pixels")
    parser.add_argument("--more", type=int, default=180, help="steps at 256 x 256 pixels")
    parser.add_argument("--segment", type=int, default=128, help="patches that attend each other")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out/long_images"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.quick: args.steps, args.more, args.layers = 3, 2, 2
    args.held_out, args.batch = (20, 2) if args.quick else (200, 8)
    args.out.mkdir(parents=True, exist_ok=True)
    small = new_model(args.width, args.layers)
    each = train(small, f"{SMALL} pixels", SMALL, args.steps, 4 * args.batch, 1e-3)
    right = share_right(small, SMALL, args.held_out)
    print(f"{SMALL} x {SMALL}: {right:.1%} right")
    found = dict(steps=args.steps, more=args.more, small=dict(after=right, ms=each), large={})
    for name in ARMS:
        row = found["large"][name] = go_on(small, name, args)
        print(f"{LARGE} x {LARGE}, {name}: {row['before']:.1%} right before, {row['after']:.1%} "
              f"after {args.more} steps of {row['ms']:.0f} ms")
    (args.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    draw_scenes(args.out / "scenes.png")


if __name__ == "__main__": main()
