"""Of 04_triton_backward."""
import torch

from exercises import differs, exercise, first
from exercises.reference import draw

SCALE = 0.3


def problem(heads: int = 1) -> dict:
    "Inputs, upstream gradients, and what autograd says; (H, N, D), one key head."
    q, do = draw(heads, 7, 4), draw(heads, 7, 4, seed=1)
    k, v = draw(9, 4, seed=2), draw(9, 4, seed=3)
    dlse = draw(heads, 7, seed=4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    s = q @ k.T * SCALE
    lse = s.logsumexp(-1)
    out = (s - lse[..., None]).exp() @ v
    found = torch.autograd.grad((out, lse), leaves, (do, dlse))
    x = dict(q=q, k=k, v=v, do=do, dlse=dlse, out=out, lse=lse)
    return {name: t.detach() for name, t in x.items()} | dict(zip(("dq", "dk", "dv"), found))


def delta_of(x: dict) -> torch.Tensor:
    return (x["do"] * x["out"]).sum(-1) - x["dlse"]


@exercise
def delta(answer):
    x = problem()
    found = answer(x["do"][0], x["out"][0], x["dlse"][0])
    return differs(found, delta_of(x)[0], "seven rows")


@exercise
def dq_tiles(answer):
    x = problem()
    q, do, lse, row = x["q"][0], x["do"][0], x["lse"][0], delta_of(x)[0]
    def told(block):
        found = answer(q, x["k"], x["v"], do, lse, row, SCALE, block)
        return differs(found, x["dq"][0], f"9 keys in tiles of {block}")

    return first(map(told, (9, 3, 4)))


@exercise
def dkv(answer):
    def told(heads):
        x = problem(heads)
        found = answer(x["q"], x["k"], x["v"], x["do"], x["lse"], delta_of(x), SCALE)
        pairs = zip(found, (x["dk"], x["dv"]), ("dk", "dv"))
        return first(differs(*pair, f"{heads} query heads, {name}") for *pair, name in pairs)

    return first(map(told, (1, 3)))


@exercise
def with_dropout(answer):
    x, p = problem(), 0.25
    kept = draw(7, 9, seed=5) > -0.7
    q = x["q"][0].clone().requires_grad_()
    weights = (q @ x["k"].T * SCALE).softmax(-1)
    out = (weights * kept / (1 - p)) @ x["v"]
    s, = torch.autograd.grad(out, q, x["do"][0])
    arguments = weights.detach(), kept, p, out.detach(), x["do"][0], x["v"]
    ds = answer(*arguments)
    if ds is None or ds.shape != (7, 9): return "expected ds, (7, 9)"
    return differs(ds @ x["k"] * SCALE, s, "dq from this ds, p = 0.25")
