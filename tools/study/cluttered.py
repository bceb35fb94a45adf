"Cluttered digits: which ones are they, on a large canvas among pieces of others?"
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .digits import load_digits
from .tasks import Batch, Choice, Tests, group_names, patches, randint


class Cluttered(Choice):
    "Digits on a large canvas, among quarters of others. For each token with ink of one: which?"
    name = "cluttered"
    grid, segment_size, tile = (18, 18), 16, 4
    side = 2
    inputs, outputs = 4, 10
    whole, pieces = 5, 8 # digits, and quarters of others
    groups, per_group, images = 16, 8, 20 # images: digits of a group, in no other group
    measure = "cross-entropy of ten digits, in nats"

    def __init__(self, seed: int):
        self.digits, self.answers = load_digits()
        self.quarters = patches(self.digits, 4).unflatten(-1, (4, 4))
        self.training = len(self.digits) - self.groups * self.images

    def _examples(self, chosen: Tensor, draw: Generator) -> Batch: # (B, whole) int64
        "Clutter is cut from digits of the training. Nothing is asked where ink meets other ink."
        size, canvas = len(chosen), self.grid[0] * self.side
        digit, y, x = (randint(0, n, (size, self.pieces), draw) for n in (self.training, 2, 2))
        clutter = _painted(self.quarters[digit, y, x], canvas, draw)
        picture = torch.cat([clutter, _painted(self.digits[chosen], canvas, draw)], 1)
        tokens = patches(picture.amax(1), self.side).flatten(1, 2)
        inked = patches(picture, self.side).amax(-1).flatten(2) > 0 # (B, pieces + whole, N)
        mine = inked[:, self.pieces:]
        answer = F.one_hot(self.answers[chosen], self.outputs).float()
        target = torch.einsum("bpn,bpa->bna", mine.float(), answer)
        return Batch(tokens, target, (mine.any(1) & (inked.sum(1) == 1)).float())

    def batch(self, size: int, draw: Generator) -> Batch:
        return self._examples(randint(0, self.training, (size, self.whole), draw), draw)

    def tests(self) -> Tests:
        draw = Generator().manual_seed(20_256)
        shape = (self.per_group, self.whole)
        chosen = []
        for i in range(self.groups):
            first = self.training + i * self.images
            chosen.append(first + randint(0, self.images, shape, draw))
        names = group_names("group", self.groups, self.per_group)
        return Tests(self._examples(torch.cat(chosen), draw), names)

    def guesses(self, tests: Tests) -> dict[str, Tensor]:
        "How often a token with ink is of a digit."
        known = self.batch(256, Generator().manual_seed(1))
        often = (known.target * known.weight[..., None]).sum((0, 1)).log()
        return {"frequency": self.loss(often.expand_as(tests.batch.target), tests.batch)}


def _painted(images: Tensor, canvas: int, draw: Generator) -> Tensor: # (B, n, canvas, canvas)
    "Squares (B, n, side, side), each alone at a random place."
    size, count, side = images.shape[:3]
    room = canvas - side
    y, x = (randint(0, room + 1, (size, count), draw)[..., None] for _ in range(2))
    picture = torch.zeros(size, count, canvas, canvas)
    inside = torch.arange(side)
    example, number = (torch.arange(n) for n in (size, count))
    at = example[:, None, None, None], number[:, None, None]
    picture[*at, (y + inside)[..., :, None], (x + inside)[..., None, :]] = images
    return picture
