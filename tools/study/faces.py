"Masked pixels of small faces: the same question as on photos, in another collection."
from functools import cache

import torch
from torch import Generator, Tensor

from .masked import MaskedPatches
from .tasks import Batch, Tests, experiments, randint

FACES = 100 # the rest of the collection are patches without a face


@cache
def load_faces() -> Tensor: # float32 (100, 25, 25) in 0 .. 1
    "Those of scikit-image's `lfw_subset`. Who is on them is not recorded."
    with experiments("the faces"):
        from skimage import data
    return torch.from_numpy(data.lfw_subset()[:FACES]).float()


class Faces(MaskedPatches):
    "A token is a pixel. A seed holds a fifth of the faces out."
    name = "faces"
    grid, segment_size, tile = (24, 24), 16, 4
    side = 1
    inputs, outputs = 2, 1
    folds, per_face = 5, 6

    def __init__(self, seed: int):
        faces = load_faces()
        held_out = torch.arange(len(faces)) % self.folds == seed % self.folds
        self.names = held_out.nonzero().flatten().tolist()
        known = faces[~held_out]
        self.training, self.held_out = (
            (part - known.mean()) / known.std() for part in (known, faces[held_out]))

    def _examples(self, faces: Tensor, draw: Generator) -> Batch:
        "Shifted by a pixel or not, mirrored or not."
        mirrored = randint(0, 2, (len(faces),), draw).bool()[:, None, None]
        faces = torch.where(mirrored, faces.flip(2), faces)
        y, x = randint(0, faces.shape[1] - self.grid[0] + 1, (2,), draw).tolist()
        height, width = self.grid
        return self.masked(faces[:, y:y + height, x:x + width], draw)

    def batch(self, size: int, draw: Generator) -> Batch:
        return self._examples(self.training[randint(0, len(self.training), (size,), draw)], draw)

    def tests(self) -> Tests:
        faces = self.held_out.repeat_interleave(self.per_face, 0)
        names = [f"face {i}" for i in self.names for _ in range(self.per_face)]
        return Tests(self._examples(faces, Generator().manual_seed(20_254)), names)
