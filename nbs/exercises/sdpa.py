"""Of 06_sdpa."""
import torch

from exercises import differs, exercise, first
from exercises.reference import draw
from hilbert_attn.patterns import SegmentPattern


@exercise
def groups(answer):
    x = draw(2, 3, 24, 4)
    found = answer(x, 12, 3)
    if found is None or found.shape != (12, 3, 4, 4):
        return "expected (B * H * segments, r, w / r, D) = (12, 3, 4, 4)"
    if found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        return "it is a copy, not a view"
    expected = torch.stack([x[b, h, 12 * s + c:12 * s + 12:3] for b in range(2) for h in range(3)
                            for s in range(2) for c in range(3)]).view(12, 3, 4, 4)
    return differs(found, expected, "w = 12, r = 3: rows of other groups")


@exercise
def scatter(answer):
    generator = torch.Generator().manual_seed(0)
    x, tokens = draw(2, 24, 4), torch.randperm(24, generator=generator).view(2, 3, 4)
    rows = x[:, tokens]
    kept = rows.clone()
    wrong = differs(answer(rows, tokens), x, "a random order")
    return wrong or differs(rows, kept, "the argument afterwards")


@exercise
def blocks(answer):
    for n, w, r in [(16, 8, 2), (23, 8, 3), (24, 8, 3), (10, 7, 7), (5, 9, 2)]:
        expected = {}
        for q, _ in SegmentPattern(n, w, r).lattices():
            expected[q.num_places] = expected.get(q.num_places, 0) + q.num_tiles
        found = dict(answer(n, w, r))
        if found != expected:
            return f"N={n}, w={w}, r={r}: {found}, expected groups by size {expected}"


@exercise
def lse_from_sdpa(answer):
    def told(n):
        q, k, v = draw(3, 1, 2, n, 8)
        expected = (q @ k.mT / 8 ** 0.5).logsumexp(-1)
        return differs(answer(q, k, v), expected, f"{n} tokens", 1e-8)

    return first(map(told, (1, 5, 40)))
