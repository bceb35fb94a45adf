"""Of 02cb_kernel_ladder."""
import math

import torch

from exercises import exercise, first
from exercises.triton_basics import draw, ran
from hilbert_attn.patterns import SlidePattern

D = 16


def seen(n, BM, BN, reach):
    "Of each tile of queries: tiles of keys that it needs, and those that it sees whole."
    place = torch.arange(n)
    mask = (place[:, None] - place).abs() <= reach
    for i in range(0, n, BM):
        rows = mask[i:i + BM]
        some = [j for j in range(0, n, BN) if rows[:, j:j + BN].any()]
        whole = [j for j in range(0, n, BN) if rows[:, j:j + BN].all() and j + BN <= n]
        yield some, whole


@exercise
def tiles_visited(answer):
    for count, BM, BN in [(64, 16, 16), (256, 64, 64), (100, 32, 16), (33, 16, 32), (1, 64, 64)]:
        expected = sum(math.ceil(min(i + BM, count) / BN) for i in range(0, count, BM))
        found = answer(count, BM, BN)
        if found != expected:
            return f"{count} rows, BM={BM}, BN={BN}: {found} instead of {expected}"


@exercise
def slide_range(answer):
    for n, BM, BN, reach in [(128, 16, 16, 20), (100, 32, 16, 5), (64, 16, 16, 64), (50, 16, 8, 0)]:
        for tile, (some, whole) in enumerate(seen(n, BM, BN, reach)):
            lo, hi, full_lo, full_hi = answer(tile, n, BM, BN, reach)
            case = f"N={n}, BM={BM}, BN={BN}, reach={reach}, tile {tile}"
            if list(range(lo, hi, BN)) != some:
                return f"{case}: visits {list(range(lo, hi, BN))}, needed are {some}"
            if list(range(full_lo, full_hi, BN)) != whole:
                return f"{case}: unmasked {list(range(full_lo, full_hi, BN))}, possible {whole}"


@exercise
def with_lse(answer):
    def told(n, scale):
        q, k = draw(n, D), scale * draw(n, D, seed=1)
        expected = (q @ k.T / D ** 0.5).logsumexp(1)
        case = f"{n} rows" + ", large scores" * (scale > 1)
        base_2 = D ** -0.5 * math.log2(math.e)
        return ran(answer, -(-n // 16), [q, k], (n,), expected, case, n, base_2, D=D, BM=16, BN=16)

    return first([told(16, 1), told(50, 1), told(48, 50)])


@exercise
def slide(answer):
    def told(n, window):
        q, k, v = (draw(n, D, seed=i) for i in range(3))
        s = (q @ k.T / D ** 0.5).cpu().masked_fill(~SlidePattern(n, window).mask()[0], -torch.inf)
        expected = s.softmax(1) @ v.cpu()
        base_2 = D ** -0.5 * math.log2(math.e)
        return ran(answer, -(-n // 16), [q, k, v], (n, D), expected, f"{n} rows, window {window}",
                   n, window // 2, base_2, D=D, BM=16, BN=16)

    return first([told(16, 100), told(50, 9), told(50, 1)])
