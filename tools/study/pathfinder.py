"Pathfinder: which dashes belong to the curve that is marked at one end?"
from functools import cache
from math import pi

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .tasks import (
    Batch,
    Task,
    Tests,
    cross_entropy,
    group_names,
    patches,
    randint,
    uniform,
    weighted_mean,
)


class Pathfinder(Task):
    """Dashed curves drawn on a canvas; an end of one long curve is marked.

    For each token with a dash: does it belong to the marked curve?"""
    name = "pathfinder"
    grid, segment_size, tile = (18, 18), 16, 4
    side = 2
    inputs, outputs = 8, 1
    steps = (32, 32, 16) # pixels along each curve; the marked one is the first
    dash, gap = 6, 1
    bend = 0.1 # radians a step, standard deviation of the change of direction
    marked = 6 # pixels at one end
    tries = 8 # walks for each curve: the one that meets the others least is drawn
    groups, per_group = 16, 8
    measure = "cross-entropy of dashes, marked curve or not, in nats"

    def __init__(self, seed: int, split: str = "test"):
        self.test_seed = {"test": 20_251, "tune": 20_261}[split]

    def batch(self, size: int, draw: Generator) -> Batch:
        canvas = self.grid[0] * self.side
        walks, drawn = [], []
        taken = torch.zeros(size, canvas, canvas)
        for steps in self.steps:
            tried = _walk(size * self.tries, steps, canvas, self.bend, draw)
            walks.append(_freest(tried.unflatten(0, (size, -1)), taken))
            drawn.append(self._draw(walks[-1], draw, canvas))
            taken = taken + F.max_pool2d(drawn[-1], 5, 1, 2)
        mark = torch.zeros(size, canvas, canvas)
        y, x = walks[0][:, :self.marked].long().unbind(2)
        mark[torch.arange(size)[:, None], y, x] = 1
        others = torch.stack(drawn[1:]).amax(0)
        return self._tokens(drawn[0], others, mark)

    def _draw(self, walk: Tensor, draw: Generator, canvas: int) -> Tensor: # (B, canvas, canvas)
        "Dashes: some steps along the curve are drawn, some not."
        size, steps = walk.shape[:2]
        period = self.dash + self.gap
        start = randint(0, period, (size, 1), draw)
        on = (torch.arange(steps) + start) % period < self.dash
        picture = torch.zeros(size, canvas, canvas)
        y, x = walk.long().unbind(2)
        picture[torch.arange(size)[:, None].expand_as(y)[on], y[on], x[on]] = 1
        return picture

    def _tokens(self, marked: Tensor, others: Tensor, mark: Tensor) -> Batch:
        of_marked, of_others, marks, seen = (
            patches(x, self.side).flatten(1, 2)
            for x in (marked, others, mark, torch.maximum(marked, others))
        )
        target, other = of_marked.amax(-1), of_others.amax(-1)
        weight = (target != other).float()  # nothing is asked where curves meet
        tokens = torch.cat([seen, marks], -1)
        return Batch(tokens, target[..., None], weight)

    def tests(self) -> Tests:
        draw = Generator().manual_seed(self.test_seed)
        examples = self.batch(self.groups * self.per_group, draw)
        names = group_names("group", self.groups, self.per_group)
        return Tests(examples, names)

    def loss(self, predicted: Tensor, batch: Batch) -> Tensor:
        return weighted_mean(cross_entropy(predicted, batch.target)[..., 0], batch.weight)

    def guesses(self, tests: Tests) -> dict[str, Tensor]:
        "How often it is the marked curve: anywhere, and at a distance from the mark."
        found = {}
        for name, width in (("frequency", 10 ** 6), ("frequency at the distance", 1)):
            share = _share_by_distance(width, self.grid, self.side)
            at = (_distances(tests.batch, self.grid) / width).long()
            chance = share[at.clamp(max=len(share) - 1)]
            found[name] = self.loss(torch.logit(chance)[..., None], tests.batch)
        return found


def _freest(tried: Tensor, taken: Tensor) -> Tensor: # (B, steps, 2)
    "Of several walks (B, tries, steps, 2), the one that meets least of what is taken."
    example = torch.arange(len(tried))
    y, x = tried.long().unbind(3)
    met = taken[example[:, None, None], y, x].sum(2)
    return tried[example, met.argmin(1)]


def _walk(size: int, steps: int, canvas: int, bend: float, draw: Generator) -> Tensor:
    "Smooth walks (B, steps, 2) of unit steps that turn away from the border."
    place = uniform(0.1 * canvas, 0.9 * canvas, (size, 2), draw)
    heading, turn = uniform(-pi, pi, (size,), draw), torch.zeros(size)
    found = []
    for noise in bend * torch.randn(steps, size, generator=draw):
        found.append(place.clamp(0, canvas - 1e-3))
        turn = 0.7 * turn + noise
        step = torch.stack([heading.sin(), heading.cos()], 1)
        place = place + step
        ahead = place + 6 * step
        out = ((ahead < 0) | (ahead > canvas)).any(1)
        heading = heading + torch.where(out, _inwards(place, canvas, heading), turn)
    return torch.stack(found, 1)


def _inwards(place: Tensor, canvas: int, heading: Tensor) -> Tensor:
    "A turn of at most 0.3 radians towards the middle."
    y, x = (canvas / 2 - place).unbind(1)
    wrong = torch.atan2(y, x) - heading
    return ((wrong + pi) % (2 * pi) - pi).clamp(-0.3, 0.3)


def _distances(batch: Batch, grid: tuple[int, int]) -> Tensor: # (B, N), in tokens
    "From the nearest token with the mark."
    marked = batch.tokens.chunk(2, -1)[1].amax(-1) > 0
    cells = torch.stack(torch.unravel_index(torch.arange(grid[0] * grid[1]), grid), 1).float()
    away = torch.cdist(cells, cells)
    return torch.stack([away[:, at].amin(1) for at in marked])


@cache
def _share_by_distance(width: int, grid: tuple[int, int], side: int) -> Tensor:
    "How often a dash belongs to the marked curve, by distance in units of `width`."
    task = Pathfinder(0)
    task.grid, task.side = grid, side
    known = task.batch(512, Generator().manual_seed(1))
    at = (_distances(known, task.grid) / width).long()
    marked = known.weight * known.target[..., 0]
    hits, count = (
        torch.zeros(int(at.max()) + 1).index_add_(0, at.flatten(), x.flatten())
        for x in (marked, known.weight)
    )
    return ((hits + 1) / (count + 2)).clamp(1e-3, 1 - 1e-3)
