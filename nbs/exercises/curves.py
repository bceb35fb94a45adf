"""Of 00b_curves."""
import torch

from exercises import differs, exercise, first
from hilbert_attn.curves import curve_order, inverse_order, locality

GRIDS = [(1, 1), (4, 4), (5, 7), (8, 3)]


@exercise
def rank_of(answer):
    orders = [curve_order(grid, "morton") for grid in GRIDS] + [torch.randperm(97)]
    return first(differs(answer(x), inverse_order(x), f"an order of {len(x)}") for x in orders)


@exercise
def is_walk(answer):
    def told(order, grid, expected, why):
        if answer(order, grid) is not expected: return f"on {grid}, {why}: expected {expected}"

    jump = torch.tensor([0, 1, 2, 3, 4, 5])
    return first([
        told(curve_order((6, 8)), (6, 8), True, "the Hilbert curve"),
        told(curve_order((6, 8), "snake"), (6, 8), True, "the snake"),
        told(curve_order((6, 8), "morton"), (6, 8), False, "the Morton order"),
        told(jump, (2, 3), False, "the row-major order (tokens 2 and 3 are no neighbours)"),
        told(curve_order((5, 4)), (5, 4), False, "a curve with a diagonal step"),
        told(curve_order((5, 7)), (5, 7), True, "the Hilbert curve"),
        told(curve_order((4, 4))[:-1], (4, 4), False, "a walk that leaves out a cell"),
    ])


@exercise
def hilbert(answer):
    for m in range(5):
        found = torch.as_tensor(answer(m))
        side = 2 ** m
        if found.shape != (4 ** m, 2): return f"m = {m}: expected {4 ** m} cells (row, column)"
        if len({tuple(x) for x in found.tolist()}) < 4 ** m: return f"m = {m}: a cell comes twice"
        steps = found.diff(dim=0).abs().sum(1)
        if (steps != 1).any():
            return f"m = {m}: step {int((steps != 1).nonzero()[0]) + 1} is no step to a neighbour"
        order = curve_order((side, side))
        if not torch.equal(found[:, 0] * side + found[:, 1], order):
            return f"m = {m}: it is a walk, but not the one of curve_order (compare m = 1)"


@exercise
def where_hilbert_loses(answer):
    grid, w = answer
    kept = {c: locality(grid, w, c).neighbors_kept for c in ("hilbert", "tile", "morton")}
    best = max(kept["tile"], kept["morton"])
    if not w < grid[0] * grid[1]: return "one segment holds everything"
    if best <= kept["hilbert"]:
        return f"Hilbert keeps {kept['hilbert']:.1%} of the neighbours, the others {best:.1%}"
