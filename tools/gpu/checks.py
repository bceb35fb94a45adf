"""Correctness on the GPU: against the float64 oracle, and against itself."""
import math
from dataclasses import astuple

import torch
from torch import Tensor

from hilbert_attn.blocks.planner import block_lists
from hilbert_attn.kernels import block_sparse as blocks
from hilbert_attn.kernels import forward
from hilbert_attn.kernels.tuning import Tile
from hilbert_attn.patterns import SegmentPattern
from hilbert_attn.reference import compare_to_oracle

from .problems import Problem, device, is_small, small_problem

USUAL = dict(dtype="bfloat16", mode="residue")
GROSS = 8  # times the tolerance: wrong, and not merely less exact than the rule allows
KERNEL_OF = dict(out="forward", lse="forward", dq="dq", dk="dkv", dv="dkv")


def name_of_kernel(kernel: str, case: dict) -> str:
    "With what it was asked for, so that what is wrong with dropout, say, says nothing of others."
    words = [kernel, f"D{case['d']}"]
    words += [case[name] for name, usual in USUAL.items() if case.get(name, usual) != usual]
    words += [name for name in ("causal", "masked", "dropout") if case.get(name)]
    return " ".join(words)


def name_of_tile(kernel: str, head_dim: int, tile: Tile) -> str:
    "Head dims that share a row of the tuner's tables share its tiles."
    row = next(d for d in (64, 128, 256) if head_dim <= d)
    return f"{kernel} D{row} tile {list(astuple(tile))}"


def name_of_forced(case: dict) -> str | None:
    "The tile that a case asks for."
    if "tile" not in case: return None
    kernel = "block_" * ("pattern" in case) + case["kernel"]
    return name_of_tile(kernel, case["d"], Tile(*case["tile"]))


def kernel_names(case: dict, names: list[str]) -> list[str]:
    "Which kernels computed what is wrong."
    prefix = "block_" if "pattern" in case else ""
    found = [prefix + KERNEL_OF[name] for name in names]
    if not prefix and is_small(case):
        found = ["forward" if name == "forward" else "small" for name in found]
    if "tile" in case and prefix + case["kernel"] in found: return [name_of_forced(case)]
    return [name_of_kernel(kernel, case) for kernel in dict.fromkeys(found)]


def check(case: dict) -> dict:
    "What is wrong, in words, and by which kernels; or nothing."
    problem = small_problem(case)
    if "dropout" in case: return check_dropout(problem, case)
    x = problem.q, problem.k, problem.v
    report = compare_to_oracle(problem.attend, *x, problem.mask())
    if not report.ok:
        over = [n for n, e in report.errors.items() if not e <= report.allowed[n]]
        gross = [n for n in over if not report.errors[n] <= GROSS * report.allowed[n]]
        return dict(wrong=kernel_names(case, gross), inexact=not gross, report=str(report)[:1500])
    once, twice = both_ways(problem), both_ways(problem)
    moved = [n for n, a, b in zip(KERNEL_OF, once, twice) if not torch.equal(a, b)]
    if not moved: return dict(wrong=[])
    return dict(wrong=kernel_names(case, moved), report="two runs differ")


def both_ways(problem: Problem) -> list[Tensor]:
    "out, lse, dq, dk and dv, for a fixed upstream gradient."
    x = problem.q, problem.k, problem.v
    out, lse = problem.forward(*x)
    return [out, lse, *problem.backward(*x, out, lse, torch.ones_like(out), None)]


# ---- dropout

def kept_weights(problem: Problem) -> Tensor:
    "The mask that the kernel drew: values that are unit vectors make it visible."
    q, k, v = problem.q, problem.k, problem.v
    m, d = k.shape[2:]
    kept = torch.zeros(*q.shape[:3], m, device=q.device)
    for start in range(0, m, d):
        size = min(d, m - start)
        probe = torch.zeros_like(v)
        probe[:, :, start:start + size, :size] = torch.eye(size, dtype=v.dtype, device=v.device)
        kept[..., start:start + size] = (problem.forward(q, k, probe)[0][..., :size] != 0).float()
    return kept


def plain_dropout(x: list[Tensor], mask: Tensor, kept: Tensor, p: float) -> Tensor:
    q, k, v = x
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) * kept / (1 - p) @ v


def check_dropout(problem: Problem, case: dict) -> dict:
    "Forward and backward against the plain expression with the same mask."
    p, mask, kept = case["dropout"], problem.mask(), kept_weights(problem)
    drawn = kept[mask.expand_as(kept)]
    if abs(drawn.mean().item() - (1 - p)) > 5 * math.sqrt(p * (1 - p) / drawn.numel()):
        share = f"keeps {drawn.mean():.3f} of the weights"
        return dict(wrong=kernel_names(case, ["out"]), report=share)
    x = [t.detach().clone().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    exact = [t.detach().double().requires_grad_() for t in x]
    out = problem.attend(*x)[0]
    expected = plain_dropout(exact, mask, kept, p)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    ours = out, *torch.autograd.grad(out, x, upstream)
    theirs = expected, *torch.autograd.grad(expected, exact, upstream.double())
    errors = {name: ((a.double() - b).norm() / b.norm()).item()
              for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs)}
    wrong = kernel_names(case, [name for name, e in errors.items() if not e <= 0.02])
    return dict(wrong=wrong, report=f"relative errors {errors}") if wrong else dict(wrong=[])


# ---- what the grid does not see

def check_large_strides() -> dict:
    "Offsets beyond 2^31 elements."
    step = 2 ** 30
    storage = torch.empty(2 * step + 512, dtype=torch.float16, device=device())
    far = [storage.as_strided((1, 1, 3, 64), (step, step, step, 1), 64 * i) for i in range(3)]
    near = [torch.randn(1, 1, 3, 64, device=device(), dtype=torch.float16) for _ in far]
    for a, b in zip(far, near): a.copy_(b)
    lists = block_lists(SegmentPattern(3, 3), block_size=(128, 128), device=device())
    runs = {"forward": lambda x: forward.attention_forward(*x, 3)[0],
            "block_forward": lambda x: blocks.block_attention_forward(*x, lists)[0]}
    return dict(wrong=[name for name, run in runs.items() if not torch.equal(run(far), run(near))])


def check_graph(case: dict) -> dict:
    "Captured in a CUDA graph and replayed on other values."
    from .timing import capture
    problem = small_problem(case)
    results = []

    def run(): results[:] = both_ways(problem)

    graph = capture(run, 1)
    for t in (problem.q, problem.k, problem.v): t.normal_()
    graph.replay()
    replayed = [x.clone() for x in results]
    expected = both_ways(problem)
    names = [n for n, a, b in zip(KERNEL_OF, replayed, expected) if not torch.equal(a, b)]
    return dict(wrong=kernel_names(case, names))
