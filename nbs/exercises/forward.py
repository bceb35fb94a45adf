"""Of 03_triton_forward."""
import torch

from exercises import differs, exercise, first
from exercises.reference import draw
from hilbert_attn.kernels.forward import ascending


def state(s, v):
    "m, l and acc of a softmax over some keys."
    m = s.amax(1)
    shift = m.masked_fill(m == -torch.inf, 0)
    p = (s - shift[:, None]).exp()
    return m, p.sum(1), p @ v


@exercise
def join(answer):
    s, v = 300 * draw(5, 12), draw(12, 3, seed=1)
    s[2, :4] = -torch.inf  # no key in the first part
    left, right = state(s[:, :4], v[:4]), state(s[:, 4:], v[4:])
    def told(one, two, case):
        pairs = zip(answer(one, two), state(s, v), ("m", "l", "acc"))
        return first(differs(*pair, f"{case}, {name}") for *pair, name in pairs)

    return first([told(left, right, "two parts"), told(right, left, "the other way round")])


@exercise
def rows_of_group(answer):
    for n, w, r in [(24, 8, 2), (23, 8, 3), (9, 8, 4), (5, 8, 3)]:
        for segment in range(-(-n // w)):
            for residue in range(r):
                every = range(segment * w + residue, min(segment * w + w, n), r)
                first_one, count = answer(segment, residue, n, w, r)
                if count != len(every) or (count and first_one != every[0]):
                    case = f"N={n}, w={w}, r={r}, segment {segment}, residue {residue}"
                    return f"{case}: {(first_one, count)}, expected {(every.start, len(every))}"


@exercise
def sorted_inside(answer):
    def told(n, w, r):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        return differs(answer(order, w, r), ascending(order, w, r), f"N={n}, w={w}, r={r}")

    return first([told(8, 8, 1), told(24, 8, 2), told(23, 7, 3)])


@exercise
def seen_range(answer):
    for count, BM, BN in [(64, 16, 16), (100, 32, 16), (100, 16, 32), (7, 16, 16)]:
        for tile in range(-(-count // BM)):
            queries = range(tile * BM, min(tile * BM + BM, count))
            whole = [j for j in range(0, count, BN) if j + BN <= queries[0] + 1]
            expected = len(whole) * BN, queries[-1] + 1
            found = tuple(answer(tile, count, BM, BN))
            if found != expected:
                case = f"{count} rows, BM={BM}, BN={BN}, tile {tile}"
                return f"{case}: {found} instead of {expected}"
