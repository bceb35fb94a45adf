"Masked patches: most patches of a picture are hidden and to be predicted."
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .tasks import Batch, Task, Tests, patches


class MaskedPatches(Task):
    "What photos and faces have in common."
    side: int # of a patch, in pixels
    hidden_share = 0.75
    measure = "mean squared error of hidden pixels, in units of the pixels' variance"

    def masked(
        self,
        pictures: Tensor, # (B, H, W)
        draw: Generator,
    ) -> Batch:
        "Hides patches at random."
        target = patches(pictures, self.side).flatten(1, 2)
        hidden = hide(len(pictures), self.tokens, self.hidden_share, draw)[..., None]
        tokens = torch.cat([target * ~hidden, hidden.float()], -1)
        return Batch(tokens, target, hidden[..., 0].float())

    def guesses(self, tests: Tests) -> dict[str, Tensor]:
        "Means of visible patches: of all, and of the nearest ones."
        shown = 1 - tests.batch.weight
        value = tests.batch.target.mean(-1) * shown
        everywhere = (value.sum(1) / shown.sum(1))[:, None].expand_as(shown)
        near = nearest_mean(value, shown, self.grid)
        found = {"mean of the visible patches": everywhere, "mean of the nearest visible": near}
        return {n: self.loss(guess[..., None], tests.batch) for n, guess in found.items()}


def hide(examples: int, tokens: int, share: float, draw: Generator) -> Tensor: # bool (B, N)
    "This share of the tokens of each example, at random."
    chance = torch.rand(examples, tokens, generator=draw)
    return chance.argsort(1) < round(share * tokens)


def nearest_mean(value: Tensor, shown: Tensor, grid: tuple[int, ...]) -> Tensor: # (B, N)
    "Mean over the smallest square around each token that has visible patches."
    planes = [x.unflatten(1, (1, *grid)) for x in (value, shown)]
    found = torch.full_like(value, torch.nan)
    for reach in range(max(grid)):
        square = torch.ones(1, 1, 2 * reach + 1, 2 * reach + 1)
        total, count = (F.conv2d(x, square, padding=reach).flatten(1) for x in planes)
        new = found.isnan() & (count > 0.5)
        found[new] = (total / count)[new]
    return found
