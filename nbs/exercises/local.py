"""Of 11_local."""
import torch

from exercises import exercise
from hilbert_attn.patterns import NeighborhoodPattern, SlidePattern, WindowPattern


@exercise
def windows(answer):
    for n, window, shift in [(12, 4, 0), (12, 4, 1), (10, 4, 3), (3, 4, 2), (5, 8, 0)]:
        _, first, last = WindowPattern(n, window, shift).axis_bounds(0)
        expected = sorted(set(zip(first.tolist(), (last + 1).tolist())))
        found = [tuple(x) for x in answer(n, window, shift)]
        if found != expected: return f"n={n}, window={window}, shift={shift}: {found}, " \
            f"expected {expected}"


@exercise
def slide_pairs(answer):
    for n, window in [(10, 1), (10, 3), (10, 4), (10, 19), (10, 100), (10 ** 6, 101)]:
        found, expected = answer(n, window), SlidePattern(n, window).pairs()
        if found != expected: return f"N={n}, window={window}: {found} instead of {expected}"


@exercise
def keys_of_tile(answer):
    for n, k in [(20, 5), (20, 4), (9, 9)]:
        mask = NeighborhoodPattern(n, k).mask()[0]
        for first in range(0, n, 4):
            keys = mask[first:first + 4].any(0).nonzero().flatten()
            expected = int(keys[0]), int(keys[-1]) + 1
            found = tuple(answer(first, min(first + 4, n), n, k))
            if found != expected:
                case = f"n={n}, k={k}, queries {first} to {min(first + 4, n) - 1}"
                return f"{case}: {found} instead of {expected}"


@exercise
def useful_share(answer):
    n = 60
    for side, k in [(1, 7), (4, 7), (8, 7), (6, 1)]:
        along = NeighborhoodPattern(n, k).mask()[0][24:24 + side]  # far from the border
        box = int(along.any(0).sum())
        expected = float(along.sum()) ** 2 / (side * box) ** 2
        found = answer(side, k)
        if not torch.isclose(torch.tensor(float(found)), torch.tensor(expected)):
            return f"tiles of {side} x {side}, k={k}: {found:.3f} instead of {expected:.3f}"
