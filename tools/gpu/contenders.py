"""Everything that is timed on the same tensors: the kernels, and what one would use instead."""
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hilbert_attn.kernels import block_sparse as blocks

from .problems import Attend, Problem, is_small, large_problem, lists_of, order_of

Contender = tuple[Callable, list[Tensor]]  # a function, and the tensors that it takes


def in_groups(x: Tensor, w: int, r: int) -> Tensor:
    """Rows in group order: (B H N / w, r, w / r, D), a copy.

    Two dimensions of groups, since kernels launch at most 65,535 programs along one.
    """
    B, H, N, D = x.shape
    return x.reshape(B * H * N // w, w // r, r, D).transpose(1, 2).contiguous()


class Permute(torch.autograd.Function):
    """Rows by `order`. The gradient is a gather too, by the inverse: PyTorch's own index gradients
    would add atomically, which a permutation does not need."""
    @staticmethod
    def forward(ctx: Any, x, order, rank):
        ctx.save_for_backward(order, rank)
        return x.index_select(2, order)

    @staticmethod
    def backward(ctx: Any, grad):
        order, rank = ctx.saved_tensors
        return grad.index_select(2, rank), None, None


def through(attention: Callable, tokens: Tensor | None) -> Callable:
    "Attention on permuted tokens, the permutation of q, k, v and of the output included."
    if tokens is None: return attention
    rank = tokens.argsort()

    def run(*x):
        out = attention(*(Permute.apply(t, tokens, rank) for t in x))
        return Permute.apply(out, rank, tokens)

    return run


def dense(backend: SDPBackend, causal: bool = False) -> Callable:
    def run(q, k, v):
        with sdpa_kernel(backend): return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def triton(case: dict, problem: Problem, x: list) -> Contender:
    return lambda *t: problem.attend(*t)[0], x


def cudnn_groups(case: dict, problem: Problem, x: list) -> Contender:
    "Dense attention on groups that somebody else has gathered: the same FLOPs, nothing moved."
    given = [in_groups(t.detach(), case["w"], case["r"]).requires_grad_() for t in x]
    return dense(SDPBackend.CUDNN_ATTENTION, case["causal"]), given


def flash_groups(case: dict, problem: Problem, x: list) -> Contender:
    given = [in_groups(t.detach(), case["w"], case["r"]).requires_grad_() for t in x]
    return dense(SDPBackend.FLASH_ATTENTION, case["causal"]), given


def cudnn_dense(case: dict, problem: Problem, x: list) -> Contender:
    return dense(SDPBackend.CUDNN_ATTENTION, case.get("causal", False)), x


def gather(case: dict, problem: Problem, x: list) -> Contender:
    "The best that can be had without a kernel of one's own."
    w, r = case["w"], case["r"]

    def grouped(q, k, v):
        out = F.scaled_dot_product_attention(*(in_groups(t, w, r) for t in (q, k, v)))
        return out.transpose(1, 2).reshape(q.shape)

    order = order_of(case)
    return through(grouped, None if order is None else order.to(x[0].device)), x


def sdpa_mask(case: dict, problem: Problem, x: list) -> Contender:
    mask = problem.mask()
    return lambda *t: F.scaled_dot_product_attention(*t, attn_mask=mask), x


def naive(case: dict, problem: Problem, x: list) -> Contender:
    mask = problem.mask()

    def run(q, k, v):
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v

    return run, x


def front_door(case: dict, problem: Problem, x: list) -> Contender:
    from hilbert_attn import hilbert_attention
    order = order_of(case)
    options = dict(segment_size=case["w"], dilation_rate=case["r"], curve=None)
    if order is not None: options |= dict(order=order.to(x[0].device))
    return lambda *t: hilbert_attention(*t, **options), x


# ---- of block lists

def lists_in_order(case: dict, x: list):
    """The lists over tokens that lie in the order of their slots, and that order.

    Where slots are empty a layout stays, which counts the others.
    """
    lists = lists_of(case, str(x[0].device.type))
    tokens = lists.q_tokens
    if tokens is None: return lists, None
    if not torch.equal(tokens, lists.k_tokens):
        raise ValueError("queries and keys lie in slots of their own")
    filled, layout = tokens >= 0, None
    if not filled.all(): layout = (filled.cumsum(0) - 1).where(filled, -1).to(tokens.dtype)
    return replace(lists, q_tokens=layout, k_tokens=layout), tokens[filled].long()


def on_lists(lists) -> Callable:
    def run(*x): return blocks.block_attention_forward(*x, lists)
    def differentiate(*x): return blocks.block_attention_backward(*x, lists)

    def attend(*x):
        problem = Problem(*x, run, differentiate, lists.mask, 0)
        return Attend.apply(*x, problem)[0]

    return attend


def permuted(case: dict, problem: Problem, x: list) -> Contender:
    "Tokens are moved into slots before, and back after."
    lists, tokens = lists_in_order(case, x)
    return through(on_lists(lists), tokens), x


def laid_out(case: dict, problem: Problem, x: list) -> Contender:
    "Tokens lie in their slots already."
    lists, tokens = lists_in_order(case, x)
    if tokens is None: return on_lists(lists), x
    return on_lists(lists), [t.detach()[:, :, tokens].requires_grad_() for t in x]


# ---- FlexAttention

def flex_mask(case: dict, lists, order: Tensor | None) -> Callable:
    "Which pairs attend, as FlexAttention wants to be told."
    if lists is None:
        n, w, r = case["n"], case["w"], case["r"]
        position = torch.arange(n, device="cuda") if order is None else order.argsort()
        segment, residue = position // w, position % w % r
        return lambda b, h, i, j: (segment[i] == segment[j]) & (residue[i] == residue[j])
    if lists.q_tokens is not None: raise ValueError("some slots are empty")
    lo, hi, at = lists.lo, lists.hi, lists.at
    if at is None: raise ValueError("no bounds: every listed block is full")

    def attended(b, h, i, j):
        seen = (lo[0][i] <= at[0][j]) & (at[0][j] <= hi[0][i])
        for a in range(1, len(at)): seen = seen & (lo[a][i] <= at[a][j]) & (at[a][j] <= hi[a][i])
        return seen | (at[0][j] == -1)

    return attended


def flash_is_installed() -> bool:
    "FlashAttention 4, whose kernels FlexAttention can run on: its fastest path where it is there."
    try: return find_spec("flash_attn.cute") is not None
    except ImportError: return False


def flex_block_size(backend: str) -> tuple[int, int]:
    "FlashAttention's programs own 256 queries on Blackwell."
    blackwell = torch.cuda.get_device_capability() >= (10, 0)
    return (256, 128) if backend == "FLASH" and blackwell else (128, 128)


def flex(case: dict, problem: Problem, x: list, backend: str = "TRITON") -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    lists, tokens = lists_in_order(case, x) if "pattern" in case else (None, None)
    order = None if lists is not None else order_of(case)
    rule = flex_mask(case, lists, None if order is None else order.to("cuda"))
    n = case["n"]
    mask = create_block_mask(rule, None, None, n, n, device="cuda", _compile=True,
                             BLOCK_SIZE=flex_block_size(backend))
    compiled = torch.compile(flex_attention, dynamic=False)
    options = dict(BACKEND=backend)

    def run(*t): return compiled(*t, block_mask=mask, kernel_options=options)

    return through(run, tokens), x


CONTENDERS: dict[str, Callable] = {
    "triton": triton, "cudnn, groups given": cudnn_groups, "flash, groups given": flash_groups,
    "cudnn, dense N x N": cudnn_dense, "gather + SDPA": gather,
    "sdpa_mask": sdpa_mask, "naive": naive, "triton, permuted": permuted,
    "triton, laid out": laid_out, "flex": flex,
    "flex, flash": partial(flex, backend="FLASH"), "front door": front_door}
PEERS = dict(groups=["cudnn, groups given", "flash, groups given"], gather=["gather + SDPA"],
             dense=["cudnn, dense N x N"], sdpa_mask=["sdpa_mask"],
             naive=["naive"], permuted=["triton, permuted"])
FLEX = ["flex", *["flex, flash"] * flash_is_installed()]
PEERS["laid out"] = ["triton, laid out"]


def contender(name: str, case: dict) -> tuple[Contender, Problem]:
    problem = large_problem(case)
    x = [t.requires_grad_() for t in (problem.q, problem.k, problem.v)]
    return CONTENDERS[name](case, problem, x), problem


def kernels_of(name: str, case: dict) -> list[str]:
    "The kernels of ours that a contender launches, forward first."
    if not name.startswith(("triton", "front door")): return []
    if "pattern" in case: return ["block_forward", "block_dq", "block_dkv"]
    return ["forward", "small"] if is_small(case) else ["forward", "dq", "dkv"]
