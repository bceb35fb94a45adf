"ListOps: values of nested lists, such as [MAX 2 9 [MIN 4 7 ] 0 ]. Nothing is two-dimensional."
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .tasks import Batch, Choice, Tests, group_names, randint

DIGITS = 10
OPERATORS: dict[str, Callable[[list[int]], int]] = { # of digits, to a digit
    "MIN": min,
    "MAX": max,
    "MED": lambda values: sorted(values)[(len(values) - 1) // 2],
    "SM": lambda values: sum(values) % DIGITS,
}
CLOSE, NOTHING = DIGITS + len(OPERATORS), DIGITS + len(OPERATORS) + 1 # behind digits, operators
LETTERS = NOTHING + 1
NESTED, DEPTH, LONGEST = 0.4, 6, 5 # chance of a list, nested at most, entries at most


class Letter(NamedTuple):
    "What is read at a place, and the value of the list that ends there."
    index: int
    value: int = 0


def expression(draw: random.Random, depth: int = 0) -> tuple[list[Letter], int]:
    "Letters, and the value."
    if depth and (depth == DEPTH or draw.random() > NESTED):
        digit = draw.randrange(DIGITS)
        return [Letter(digit)], digit
    operator = draw.randrange(len(OPERATORS))
    letters, values = [Letter(DIGITS + operator)], []
    for _ in range(draw.randint(2, LONGEST)):
        inner, value = expression(draw, depth + 1)
        letters += inner
        values.append(value)
    value = list(OPERATORS.values())[operator](values)
    return [*letters, Letter(CLOSE, value)], value


def sequence(draw: random.Random, length: int) -> list[Letter]:
    "Expressions one after the other, and nothing behind the last one that fits."
    letters: list[Letter] = []
    while True:
        more, _ = expression(draw)
        if len(letters) + len(more) <= length: letters += more
        elif letters: break
    return letters + [Letter(NOTHING)] * (length - len(letters))


class ListOps(Choice):
    "Asked at the end of each list. The sequence is folded onto a square, row by row."
    name = "listops"
    grid, segment_size, tile = (18, 18), 16, 4
    positions = "rows"
    inputs, outputs = LETTERS, DIGITS
    groups, per_group = 12, 8
    measure = "cross-entropy of the values of lists, in nats"

    def __init__(self, seed: int):
        pass

    def batch(self, size: int, draw: Generator) -> Batch:
        start = random.Random(int(randint(0, 2 ** 31, (), draw)))
        letters = torch.tensor([sequence(start, self.tokens) for _ in range(size)])
        index, value = letters.unbind(-1)
        target = F.one_hot(value, DIGITS).float()
        return Batch(F.one_hot(index, LETTERS).float(), target, (index == CLOSE).float())

    def tests(self) -> Tests:
        examples = self.batch(self.groups * self.per_group, Generator().manual_seed(20_257))
        names = group_names("group", self.groups, self.per_group)
        return Tests(examples, names)

    def guesses(self, tests: Tests) -> dict[str, Tensor]:
        "How often a value is that of a list: of any, and of one with this operator."
        known = self.batch(256, Generator().manual_seed(1))
        asked = known.weight > 0
        counts = torch.ones(len(OPERATORS), DIGITS).index_add(
            0, _operators(known)[asked], known.target[asked])
        alone = counts.sum(0).log().expand_as(tests.batch.target)
        of_operator = counts[_operators(tests.batch)].log()
        found = {"frequency": alone, "frequency of the operator": of_operator}
        return {name: self.loss(guess, tests.batch) for name, guess in found.items()}


def _operators(batch: Batch) -> Tensor: # int64 (B, N)
    "That of the list that ends at a place, 0 where none does."
    index = batch.tokens.argmax(-1)
    found = torch.zeros_like(index)
    for row, letters in zip(found, index.tolist()):
        opened = []
        for place, letter in enumerate(letters):
            if letter == CLOSE: row[place] = opened.pop()
            elif DIGITS <= letter < CLOSE: opened.append(letter - DIGITS)
    return found
