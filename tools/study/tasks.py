"What is learned: examples as tokens, what is to be predicted, and what one gets without learning."
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class Batch:
    "Examples in token order."
    tokens: Tensor # (B, N, inputs)
    target: Tensor # (B, N, outputs)
    weight: Tensor # (B, N), 0 where nothing is asked

    def split(self, size: int) -> list["Batch"]:
        parts = (x.split(size) for x in (self.tokens, self.target, self.weight))
        return [Batch(*part) for part in zip(*parts)]


@dataclass(frozen=True)
class Tests:
    "Examples to judge by: as many for each group."
    batch: Batch
    groups: list[str] # one name an example

    def means(self, losses: Tensor) -> dict[str, float]:
        "Mean loss of each group."
        names = list(dict.fromkeys(self.groups))
        index = torch.tensor([names.index(name) for name in self.groups])
        return {name: losses[index == i].mean().item() for i, name in enumerate(names)}


class Task:
    "A source of examples. `split` is 'test' for results, 'tune' for choosing learning rates."
    name: str
    grid: tuple[int, ...]
    segment_size: int
    tile: int # side of the tiles of `tile`
    cloud = False # points in space instead of cells of a grid: the first three inputs
    positions = "grid" # what the rotary embedding turns by, see `arms.POSITIONS`
    inputs: int
    outputs: int
    measure: str # what the loss is

    @property
    def tokens(self) -> int:
        return prod(self.grid)

    def batch(self, size: int, draw: Generator) -> Batch:
        "Training examples."
        raise NotImplementedError

    def tests(self) -> Tests:
        "The same for every arm."
        raise NotImplementedError

    def loss(self, predicted: Tensor, batch: Batch) -> Tensor: # (B,)
        "Mean squared error where something is asked."
        error = (predicted - batch.target).square().mean(-1)
        return weighted_mean(error, batch.weight)

    def guesses(self, tests: Tests) -> dict[str, Tensor]: # name -> losses (B,)
        "What needs no network."
        raise NotImplementedError


class Choice(Task):
    "One answer of several, for each token that is asked."

    def loss(self, predicted: Tensor, batch: Batch) -> Tensor: # (B,)
        "Cross-entropy, in nats."
        entropy = -(predicted.log_softmax(-1) * batch.target).sum(-1)
        return weighted_mean(entropy, batch.weight)


@contextmanager
def experiments(what: str) -> Iterator[None]:
    "Around imports of packages that bring data."
    try: yield
    except ImportError as e:
        hint = "pip install 'hilbert_attn[experiments]'"
        raise RuntimeError(f"{what} need scikit-image and scikit-learn ({e}): {hint}") from None


def weighted_mean(error: Tensor, weight: Tensor) -> Tensor: # (B,)
    return (error * weight).sum(1) / weight.sum(1)


def patches(
    pictures: Tensor, # (..., H, W)
    side: int, # pixels
) -> Tensor: # (..., H / side, W / side, side * side)
    "Cuts pictures into square patches."
    height, width = (n // side for n in pictures.shape[-2:])
    rows = pictures.unflatten(-2, (height, side)).unflatten(-1, (width, side))
    return rows.transpose(-3, -2).flatten(-2)


def group_names(what: str, groups: int, each: int) -> list[str]:
    "A name for each example of each group."
    return [f"{what} {i}" for i in range(groups) for _ in range(each)]


def randint(low: int, high: int, shape: tuple[int, ...], draw: Generator) -> Tensor:
    "Whole numbers from low to high - 1."
    return torch.randint(low, high, shape, generator=draw)


def uniform(low: float, high: float, shape: tuple[int, ...], draw: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=draw)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    "Of yes or no, in nats."
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
