"Masked patches: three quarters of a photo's patches are hidden and to be predicted."
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .tasks import Batch, Task, Tests, patches, randint

FOLDS = (
    ("astronaut", "brick", "chelsea", "clock", "moon"),
    ("camera", "china", "coins", "grass", "retina"),
    ("cell", "coffee", "flower", "gravel", "hubble"),
)
TUNING = ("ihc", "motorcycle", "page", "rocket", "text", "hopper")
TESTED = tuple(name for fold in FOLDS for name in fold)


@cache
def load_photos() -> dict[str, Tensor]: # name -> float32 (height, width) in 0 .. 1
    "All photos that the packages bring, in grey, at half their size."
    try:
        from matplotlib import cbook
        from PIL import Image
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError as e:
        hint = "pip install 'hilbert_attn[experiments]'"
        raise RuntimeError(f"the photos need scikit-image and scikit-learn ({e}): {hint}") from None
    with cbook.get_sample_data("grace_hopper.jpg") as file: hopper = np.asarray(Image.open(file))
    china, flower = load_sample_images().images
    photos = dict(china=china, flower=flower, hopper=hopper)
    photos |= dict(motorcycle=data.stereo_motorcycle()[0], hubble=data.hubble_deep_field())
    photos |= dict(ihc=data.immunohistochemistry())
    for name in (*TESTED, *TUNING):
        if name not in photos: photos[name] = getattr(data, name)()
    return {name: _grey(Image.fromarray(photo)) for name, photo in sorted(photos.items())}


def _grey(photo) -> Tensor:
    return torch.from_numpy(np.asarray(photo.convert("L").reduce(2), np.float32) / 255)


class Photos(Task):
    "Crops of photos. A third of the tested photos is held out, another third for other seeds."
    name = "photos"
    grid, segment_size, tile = (18, 18), 16, 4
    side, hidden_share = 4, 0.75
    inputs, outputs = 17, 16
    crops = 12 # of each held-out photo
    measure = "mean squared error of hidden pixels, in units of the pixels' variance"

    def __init__(self, seed: int, split: str = "test"):
        tested = FOLDS[seed % len(FOLDS)]
        self.held_out = tested if split == "test" else TUNING
        self.training = [n for n in (*TESTED, *TUNING) if n not in (*tested, *self.held_out)]
        photos = load_photos()
        known = torch.cat([photos[name].flatten() for name in self.training])
        self.mean, self.std = known.mean(), known.std()
        self.photos = {name: (photo - self.mean) / self.std for name, photo in photos.items()}

    def _crop(self, name: str, draw: Generator) -> Tensor:
        photo, size = self.photos[name], self.grid[0] * self.side
        y, x = (int(randint(0, n - size + 1, (), draw)) for n in photo.shape)
        crop = photo[y:y + size, x:x + size]
        return crop.flip(1) if randint(0, 2, (), draw) else crop

    def _examples(self, names: list[str], draw: Generator) -> Batch:
        crops = torch.stack([self._crop(name, draw) for name in names])
        target = patches(crops, self.side).flatten(1, 2)
        hidden = _hide(len(names), self.tokens, self.hidden_share, draw)[..., None]
        tokens = torch.cat([target * ~hidden, hidden.float()], -1)
        return Batch(tokens, target, hidden[..., 0].float())

    def batch(self, size: int, draw: Generator) -> Batch:
        chosen = randint(0, len(self.training), (size,), draw).tolist()
        return self._examples([self.training[i] for i in chosen], draw)

    def tests(self) -> Tests:
        names = [name for name in self.held_out for _ in range(self.crops)]
        return Tests(self._examples(names, Generator().manual_seed(20_250)), names)

    def guesses(self, tests: Tests) -> dict[str, Tensor]:
        "Means of visible patches: of all, and of the nearest ones."
        shown = 1 - tests.batch.weight
        value = tests.batch.target.mean(-1) * shown
        everywhere = (value.sum(1) / shown.sum(1))[:, None].expand_as(shown)
        near = _nearest_mean(value, shown, self.grid)
        found = {"mean of the visible patches": everywhere, "mean of the nearest visible": near}
        return {n: self.loss(guess[..., None], tests.batch) for n, guess in found.items()}


def _hide(examples: int, tokens: int, share: float, draw: Generator) -> Tensor: # bool (B, N)
    chance = torch.rand(examples, tokens, generator=draw)
    return chance.argsort(1) < round(share * tokens)


def _nearest_mean(value: Tensor, shown: Tensor, grid: tuple[int, int]) -> Tensor: # (B, N)
    "Mean over the smallest square around each token that has visible patches."
    planes = [x.unflatten(1, (1, *grid)) for x in (value, shown)]
    found = torch.full_like(value, torch.nan)
    for reach in range(max(grid)):
        square = torch.ones(1, 1, 2 * reach + 1, 2 * reach + 1)
        total, count = (F.conv2d(x, square, padding=reach).flatten(1) for x in planes)
        new = found.isnan() & (count > 0.5)
        found[new] = (total / count)[new]
    return found
