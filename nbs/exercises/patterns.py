"""Of 01_patterns."""
from exercises import differs, exercise, first
from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import NeighborhoodPattern, SegmentPattern

SETTINGS = [(12, 4, 2), (22, 8, 3), (23, 8, 3), (7, 7, 5), (30, 50, 4), (5, 1, 1)]


@exercise
def keys_of(answer):
    for n, w, r in SETTINGS:
        mask = SegmentPattern(n, w, r).mask()[0]
        for p in range(n):
            expected = mask[p].nonzero().flatten().tolist()
            found = list(answer(p, n, w, r))
            if found != expected:
                return f"N={n}, w={w}, r={r}, position {p}: {found} instead of {expected}"


@exercise
def pairs(answer):
    for n, w, r in [*SETTINGS, (10 ** 9, 2048, 4)]:
        found, expected = answer(n, w, r), SegmentPattern(n, w, r).pairs()
        if found != expected: return f"N={n}, w={w}, r={r}: {found} instead of {expected}"


@exercise
def mask_along(answer):
    def told(grid, w, r):
        order = curve_order(grid)
        expected = SegmentPattern(len(order), w, r).mask(order)[0].tril()
        return differs(answer(order, w, r), expected, f"grid {grid}, w={w}, r={r}")

    return first([told((4, 4), 16, 1), told((4, 4), 4, 1), told((5, 7), 12, 3), told((3, 3), 9, 2)])


@exercise
def neighbours(answer):
    for n, k in [(9, 3), (9, 4), (5, 5), (12, 7), (1, 1)]:
        mask = NeighborhoodPattern(n, k).mask()[0]
        for x in range(n):
            expected = mask[x].nonzero().flatten().tolist()
            found = list(answer(x, n, k))
            if found != expected: return f"n={n}, k={k}, x={x}: {found} instead of {expected}"
