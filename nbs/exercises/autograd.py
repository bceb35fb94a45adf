"""Of 05_autograd."""
import torch

from exercises import differs, exercise
from exercises.reference import draw


@exercise
def saved(answer):
    names = {"q", "k", "v", "out", "lse"}
    if extra := set(answer) - names: return f"not needed, or computed again: {sorted(extra)}"
    if missing := names - set(answer): return f"without {sorted(missing)} it cannot be computed"


@exercise
def positive(answer):
    q, k = draw(5, 4), draw(7, 4, seed=1)
    for scale in (0.5, -0.5, 0.0):
        found, positive_scale = answer(q, scale)
        if not positive_scale > 0: return f"scale {scale}: {positive_scale} is not positive"
        wrong = differs(positive_scale * found @ k.T, scale * q @ k.T, f"scale {scale}, scores")
        if wrong: return wrong


@exercise
def kept(answer):
    def mask(seed, rows, cols, p):
        return answer(seed, rows[:, None], cols[None, :], p).expand(len(rows), len(cols))

    i, j, p = torch.arange(64), torch.arange(96), 0.3
    whole = mask(7, i, j, p)
    tiles = torch.cat([torch.cat([mask(7, a, b, p) for b in j.split(32)], 1) for a in i.split(16)])
    if not torch.equal(whole, tiles): return "it depends on the tile, or on the call before"
    if torch.equal(whole, mask(8, i, j, p)): return "another seed gives the same mask"
    share = 1 - whole.double().mean()
    if abs(share - p) > 0.04: return f"{share:.0%} of the weights are dropped instead of {p:.0%}"
    if whole.all(1).any() or not whole.any(1).all() or not whole.any(0).all():
        return "whole rows or columns share their fate"
    for name, x in (("rows", whole), ("columns", whole.T)):
        alike = max((x[d:] == x[:-d]).double().mean() for d in range(1, 33))
        if alike > 0.75: return f"{name} some places apart agree in {alike:.0%} of the weights"


@exercise
def log_sum_exp(answer):
    x = draw(5, 7).requires_grad_()
    if wrong := differs(answer.apply(x).detach(), x.logsumexp(-1).detach(), "the forward"):
        return wrong
    torch.autograd.gradcheck(answer.apply, x)
    large = (900 * draw(5, 7)).requires_grad_()
    found, = torch.autograd.grad(answer.apply(large).sum(), large)
    return differs(found, large.softmax(-1).detach(), "the gradient of large numbers")
