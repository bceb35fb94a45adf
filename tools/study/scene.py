"Masked points of a scene in space: the grey of three quarters of them is to be predicted."
from functools import cache
from math import pi

import torch
from torch import Generator, Tensor

from .masked import hide
from .tasks import Batch, Task, Tests, experiments, group_names, randint

# of scikit-image's `stereo_motorcycle`, by its documentation (Middlebury 2014), in pixels
FOCAL, ACROSS, DOWN, APART = 994.978, 311.193, 254.877, 31.086
BASELINE = 193.001 # mm
NEAREST = (1, 3, 5) # visible points that a guess is the mean of


@cache
def load_scene() -> tuple[Tensor, Tensor]: # (H, W, 3) in mm, NaN where unknown; grey (H, W) 0 .. 1
    "A point and its grey for each pixel of the left picture."
    with experiments("the scene"):
        from skimage import data
    picture, _, disparity = data.stereo_motorcycle()
    found = torch.from_numpy(disparity).float()
    depth = FOCAL * BASELINE / (found.where(found.isfinite(), torch.nan) + APART)
    rows, columns = depth.shape
    x = torch.arange(float(columns)) - ACROSS
    y = torch.arange(float(rows))[:, None] - DOWN
    rays = x * depth / FOCAL, y * depth / FOCAL, depth
    grey = torch.from_numpy(picture).float().mean(-1) / 255
    return torch.stack(rays, -1), grey


class Scene(Task):
    "Points behind square crops, turned at random. What is asked lies in the right third."
    name = "scene"
    cloud, positions = True, "none"
    grid, segment_size, tile = (324,), 16, 4
    crop, border = 160, 500 # pixels: side, and the first column that is held out
    waves = 4 # of each coordinate, each of half the length of the one before
    inputs, outputs = 3 + 3 * 2 * waves + 2, 1
    hidden_share = 0.75
    groups, per_group = 12, 8
    measure = "mean squared error of hidden points, in units of the variance of grey"

    def __init__(self, seed: int):
        self.points, grey = load_scene()
        known = grey[:, :self.border]
        self.grey = (grey - known.mean()) / known.std()

    def _crop(self, columns: range, draw: Generator) -> tuple[slice, slice]:
        "A place where most points are known."
        inside = range(len(self.grey)), columns
        ends = [of[-1] + 1 - self.crop for of in inside]
        while True:
            y, x = (
                int(randint(of[0], end + 1, (), draw))
                for of, end in zip(inside, ends)
            )
            found = slice(y, y + self.crop), slice(x, x + self.crop)
            known = self.points[found][..., 0].isfinite()
            if 2 * known.sum() > known.numel(): return found

    def _cloud(self, place: tuple[slice, slice], draw: Generator) -> tuple[Tensor, Tensor]:
        "Points (N, 3) around 0, nearly all within 1/2, and their grey (N,)."
        points = self.points[place].flatten(0, 1)
        grey = self.grey[place].flatten()
        known = points[:, 0].isfinite().nonzero().flatten()
        mixed = torch.randperm(len(known), generator=draw)
        chosen = known[mixed[:self.tokens]]
        centred = points[chosen] - points[chosen].mean(0)
        size = 2 * centred.abs().quantile(0.95)
        return centred / size @ _rotation(draw), grey[chosen]

    def _examples(self, places: list[tuple[slice, slice]], draw: Generator) -> Batch:
        clouds = [self._cloud(place, draw) for place in places]
        points, grey = (torch.stack(part) for part in zip(*clouds))
        size = len(clouds)
        hidden = hide(size, self.tokens, self.hidden_share, draw)
        lengths = 2.0 ** torch.arange(self.waves)
        angles = pi * points[..., None] * lengths
        waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(2)
        seen = torch.stack([grey * ~hidden, hidden.float()], -1)
        tokens = torch.cat([points, waves, seen], -1)
        return Batch(tokens, grey[..., None], hidden.float())

    def batch(self, size: int, draw: Generator) -> Batch:
        known = range(self.border)
        places = [self._crop(known, draw) for _ in range(size)]
        return self._examples(places, draw)

    def tests(self) -> Tests:
        draw = Generator().manual_seed(20_258)
        held_out = range(self.border, self.grey.shape[1])
        places = [self._crop(held_out, draw) for _ in range(self.groups)]
        examples = [place for place in places for _ in range(self.per_group)]
        names = group_names("place", self.groups, self.per_group)
        return Tests(self._examples(examples, draw), names)

    def guesses(self, tests: Tests) -> dict[str, Tensor]:
        "Means of visible points: of all, and of the nearest ones."
        batch = tests.batch
        grey, shown = batch.target[..., 0], 1 - batch.weight
        points = batch.tokens[..., :3]
        mean = (grey * shown).sum(1) / shown.sum(1)
        found = {"mean of the visible points": mean[:, None].expand_as(grey)}

        away = torch.cdist(points, points)
        away = away.masked_fill(shown[:, None] == 0, torch.inf)
        near = away.topk(max(NEAREST), largest=False).indices
        values = grey[:, None].expand_as(away).gather(2, near)
        for n in NEAREST:
            found[f"mean of the {n} nearest visible"] = values[..., :n].mean(-1)
        return {
            name: self.loss(guess[..., None], batch)
            for name, guess in found.items()
        }


def _rotation(draw: Generator) -> Tensor: # (3, 3)
    "A random one: with a further sign where it would be a mirror."
    turned, triangle = torch.linalg.qr(torch.randn(3, 3, generator=draw))
    turned = turned * triangle.diagonal().sign()
    return turned * turned.det().sign()
