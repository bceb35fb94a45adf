"Moving digits: the last frame of a video is hidden and to be predicted."
from functools import cache

import torch
from torch import Generator, Tensor

from .tasks import Batch, Task, Tests, experiments, group_names, patches, randint


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    "Images, float32 (1797, 8, 8) in 0 .. 1, and which digit each is, int64 (1797,)."
    with experiments("the digits"):
        from sklearn.datasets import load_digits as load
    found = load()
    return torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target)


class Digits(Task):
    "Two digits that fly straight on and bounce off the borders."
    name = "digits"
    grid, segment_size, tile = (6, 9, 9), 27, 3
    side, digits, speed = 2, 2, 2
    inputs, outputs = 5, 4
    groups, per_group, images = 16, 16, 20 # images: digits of a group, in no other group
    measure = "mean squared error of the hidden frame, in units of the pixels' variance"

    def __init__(self, seed: int, split: str = "test"):
        self.images_of_all, _ = load_digits()
        tested = self.groups * self.images
        self.first = len(self.images_of_all) - tested * {"test": 1, "tune": 2}[split]
        self.test_seed = {"test": 20_252, "tune": 20_262}[split]
        self.training = len(self.images_of_all) - 2 * tested
        self.mean, self.std = 0.14, 0.29 # about those of a frame

    def batch(self, size: int, draw: Generator) -> Batch:
        return self._films(randint(0, self.training, (size, self.digits), draw), draw)

    def _films(self, chosen: Tensor, draw: Generator) -> Batch:
        canvas, frames = self.grid[1] * self.side, self.grid[0]
        places = _flight(chosen.shape, frames, canvas - 8, self.speed, draw)
        film = _paint(self.images_of_all[chosen], places, canvas)
        film = (film - self.mean) / self.std
        target = patches(film, self.side)
        hidden = torch.zeros(target.shape[:-1], dtype=torch.bool)
        hidden[:, -1] = True
        tokens = torch.cat([target * ~hidden[..., None], hidden[..., None].float()], -1)
        return Batch(tokens.flatten(1, 3), target.flatten(1, 3), hidden.flatten(1).float())

    def tests(self) -> Tests:
        draw = Generator().manual_seed(self.test_seed)
        shape = (self.per_group, self.digits)
        chosen = [self.first + i * self.images + randint(0, self.images, shape, draw)
                  for i in range(self.groups)]
        names = group_names("group", self.groups, self.per_group)
        return Tests(self._films(torch.cat(chosen), draw), names)

    def guesses(self, tests: Tests) -> dict[str, Tensor]:
        "The frame before, and the mean frame."
        known = self.batch(256, Generator().manual_seed(1)).target
        frame = self.grid[1] * self.grid[2]
        films = tests.batch.target
        copied = films.clone()
        copied[:, -frame:] = films[:, -2 * frame:-frame]
        mean = known.mean(0, keepdim=True).expand_as(films)
        found = {"the mean frame": mean, "the frame before": copied}
        return {name: self.loss(guess, tests.batch) for name, guess in found.items()}


def _flight(shape, frames: int, room: int, speed: int, draw: Generator) -> Tensor:
    "Corners (B, digits, frames, 2) in whole pixels, 0 .. room."
    start = randint(0, room + 1, (*shape, 1, 2), draw)
    pace = randint(-speed, speed + 1, (*shape, 1, 2), draw)
    way = (start + pace * torch.arange(frames)[:, None]) % (2 * room)
    return torch.minimum(way, 2 * room - way)


def _paint(images: Tensor, places: Tensor, canvas: int) -> Tensor: # (B, frames, canvas, canvas)
    "The brightest digit at each pixel."
    size, digits, frames = places.shape[:3]
    film = torch.zeros(size, digits, frames, canvas, canvas)
    inside = torch.arange(8)
    y, x = (places[..., axis, None] + inside for axis in (0, 1))
    b, d, t = torch.meshgrid(*(torch.arange(n) for n in (size, digits, frames)), indexing="ij")
    at = (n[..., None, None] for n in (b, d, t))
    film[*at, y[..., :, None], x[..., None, :]] = images[:, :, None].expand(-1, -1, frames, -1, -1)
    return film.amax(1)
