"The control: hidden characters of program texts. Nothing in them is two-dimensional."
import sysconfig
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .masked import hide
from .tasks import Batch, Choice, Tests, group_names, randint

LETTERS = "\n" + "".join(map(chr, range(32, 127)))
LEAST = 8_000 # characters of a module


@cache
def load_modules() -> tuple[Tensor, ...]: # int64 (characters,) each, indices into LETTERS
    "Modules of Python's standard library in alphabetical order; other characters become `?`."
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    index = dict(zip(LETTERS, range(len(LETTERS))))
    return tuple(
        torch.tensor([index.get(letter, index["?"]) for letter in text])
        for text in texts if len(text) >= LEAST
    )


class Text(Choice):
    "A fifth of the characters is hidden. A sequence is folded onto a square, row by row."
    name = "text"
    grid, segment_size, tile = (18, 18), 16, 4
    positions = "rows"
    inputs, outputs = len(LETTERS) + 1, len(LETTERS)
    hidden_share = 0.2
    groups, per_group = 12, 8 # a group is a module
    measure = "cross-entropy of hidden characters, in nats"

    def __init__(self, seed: int, split: str = "test"):
        modules = load_modules()
        tested = {"test": 0, "tune": 1}[split]
        self.held_out = [x for i, x in enumerate(modules) if i % 10 == tested][:self.groups]
        self.training = [x for i, x in enumerate(modules) if i % 10 > 1]

    def _examples(self, modules: list[Tensor], draw: Generator) -> Batch:
        starts = [int(randint(0, len(x) - self.tokens + 1, (), draw)) for x in modules]
        letters = torch.stack([x[i:i + self.tokens] for x, i in zip(modules, starts)])
        hidden = hide(len(letters), self.tokens, self.hidden_share, draw)
        target = F.one_hot(letters, len(LETTERS)).float()
        tokens = torch.cat([target * ~hidden[..., None], hidden[..., None].float()], -1)
        return Batch(tokens, target, hidden.float())

    def batch(self, size: int, draw: Generator) -> Batch:
        chosen = randint(0, len(self.training), (size,), draw).tolist()
        return self._examples([self.training[i] for i in chosen], draw)

    def tests(self) -> Tests:
        modules = [x for x in self.held_out for _ in range(self.per_group)]
        names = group_names("module", len(self.held_out), self.per_group)
        return Tests(self._examples(modules, Generator().manual_seed(20_253)), names)

    def guesses(self, tests: Tests) -> dict[str, Tensor]:
        "How often a character is there: anywhere, and behind the visible one before."
        known = self.batch(256, Generator().manual_seed(1)).target
        often = known.sum((0, 1)) + 1
        pairs = torch.einsum("bni,bnj->ij", known[:, :-1], known[:, 1:])
        after = pairs + often / often.sum()
        seen = tests.batch.tokens[..., :-1]
        before = F.pad(seen, (0, 0, 1, 0))[:, :-1]
        alone = often.expand_as(seen)
        known_before = before.any(-1, keepdim=True)
        pair = torch.where(known_before, before @ after, alone)
        found = {"frequency": alone, "frequency after the one before": pair}
        return {name: self.loss(count.log(), tests.batch) for name, count in found.items()}
