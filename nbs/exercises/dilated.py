"""Of 08_dilated."""
import torch

from exercises import differs, exercise
from exercises.reference import draw
from hilbert_attn.patterns import DilatedPattern, SegmentPattern
from hilbert_attn.reference import merge_attention

SETTINGS = [(24, (4, 12), (1, 3)), (23, (5, 10, 23), (1, 2, 4)), (8, (8, 8), (1, 1))]


@exercise
def counts(answer):
    for n, lengths, rates in SETTINGS:
        pattern = DilatedPattern.for_heads(n, 1, lengths, rates, mode="residue")
        expected = pattern.counts()[0]
        for p in range(n):
            case = f"N={n}, w={lengths}, r={rates}, position {p}"
            if wrong := differs(answer(p, n, lengths, rates), expected[p], case): return wrong


@exercise
def weights(answer):
    lses = 900 * draw(3, 7)
    lses[0, 2] = -torch.inf
    expected = (lses - lses.logsumexp(0)).exp()
    return differs(answer(lses), expected, "three branches")


@exercise
def gradient_of_lses(answer):
    outs, lses, do = draw(3, 7, 4), draw(3, 7, seed=1).requires_grad_(), draw(7, 4, seed=2)
    out, _ = merge_attention(outs, lses)
    expected, = torch.autograd.grad(out, lses, do)
    return differs(answer(outs, lses.detach(), do), expected, "three branches")


@exercise
def uncovered(answer):
    for n, w, r, heads in [(16, 8, 4, 4), (16, 8, 4, 2), (22, 8, 3, 2), (9, 9, 5, 8)]:
        pattern = SegmentPattern.for_heads(n, heads, w, r, "longnet")
        seen = pattern.mask().any(-1).any(0)
        expected = (~seen).nonzero().flatten().tolist()
        found = list(answer(n, w, r, heads))
        if found != expected:
            return f"N={n}, w={w}, r={r}, {heads} heads: {found} instead of {expected}"
