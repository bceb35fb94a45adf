"""Of 10_block_lists."""
import torch

from exercises import differs, exercise, first
from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import WindowPattern


def masks():
    generator = torch.Generator().manual_seed(0)
    window = WindowPattern((8, 8), 4).mask(None)[0]
    yield "windows of 4 x 4", window
    yield "all pairs", torch.ones(16, 16, dtype=torch.bool)
    yield "random pairs", torch.rand(24, 32, generator=generator) < 0.02
    yield "a triangle", torch.ones(16, 16, dtype=torch.bool).triu(-3)


def kinds_of(mask, BM, BN):
    tiles = mask.unflatten(1, (-1, BN)).unflatten(0, (-1, BM)).movedim(1, 2).flatten(2)
    return tiles.any(-1).int() + tiles.all(-1).int()


@exercise
def kinds(answer):
    return first(differs(answer(mask, 8, 4), kinds_of(mask, 8, 4), case) for case, mask in masks())


@exercise
def lists(answer):
    for case, mask in masks():
        kind = kinds_of(mask, 4, 4)
        start, index = answer(kind)
        rows = [kind_of.nonzero().flatten().tolist() for kind_of in kind]
        rows = [sorted(js, key=lambda j: (-int(kind[i, j]), j)) for i, js in enumerate(rows)]
        expected = [0]
        for js in rows: expected.append(expected[-1] + len(js))
        if list(start) != expected: return f"{case}: start is {list(start)}, expected {expected}"
        flat = [j for js in rows for j in js]
        if list(index) != flat: return f"{case}: index is {list(index)}, expected {flat}"


@exercise
def touched(answer):
    for grid, window, block in [((8, 8), 4, 16), ((16, 16), 4, 16), ((12, 8), 3, 8)]:
        mask = WindowPattern(grid, window).mask()[0]
        for curve in ("row_major", "hilbert"):
            order = curve_order(grid, curve)
            expected = int((kinds_of(mask[order][:, order], block, block) > 0).sum())
            found = int(answer(mask, order, block))
            if found != expected:
                return f"grid {grid}, windows of {window}, {curve}: {found} instead of {expected}"


@exercise
def attended(answer):
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(0, 9, (2, 40), generator=generator)
    lo = torch.randint(0, 6, (2, 5), generator=generator)
    hi = lo + torch.randint(0, 4, (2, 5), generator=generator)
    inside = (lo[:, :, None] <= at[:, None]) & (at[:, None] <= hi[:, :, None])
    return differs(answer(lo, hi, at), inside.all(0), "two axes, 5 queries, 40 keys")
