"Masked patches: three quarters of a photo's patches are hidden and to be predicted."
from functools import cache

import numpy as np
import torch
from torch import Generator, Tensor

from .masked import MaskedPatches
from .tasks import Batch, Tests, experiments, randint

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
    with experiments("the photos"):
        from matplotlib import cbook
        from PIL import Image
        from skimage import data
        from sklearn.datasets import load_sample_images
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


class Photos(MaskedPatches):
    "Crops of photos. A third of the tested photos is held out, another third for other seeds."
    name = "photos"
    grid, segment_size, tile = (18, 18), 16, 4
    side = 4
    inputs, outputs = 17, 16
    crops = 12 # of each held-out photo

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
        return self.masked(torch.stack([self._crop(name, draw) for name in names]), draw)

    def batch(self, size: int, draw: Generator) -> Batch:
        chosen = randint(0, len(self.training), (size,), draw).tolist()
        return self._examples([self.training[i] for i in chosen], draw)

    def tests(self) -> Tests:
        names = [name for name in self.held_out for _ in range(self.crops)]
        return Tests(self._examples(names, Generator().manual_seed(20_250)), names)
