"""Block-sparse attention over shards, against float64 and the plan: for test_block_ring.py."""
from unittest import mock

import torch
import torch.distributed as dist
from ring_processes import attempt, main, outcome

from hilbert_attn import block_ring, ring_exchange
from hilbert_attn.block_ring import block_sparse_ring_attention, lists_order, plan_block_ring
from hilbert_attn.blocks.lists import lists_from_block_mask
from hilbert_attn.blocks.planner import block_lists
from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import (
    NeighborhoodPattern,
    SegmentPattern,
    SlidePattern,
    TilesSharedPattern,
    WindowPattern,
)
from hilbert_attn.reference import assert_matches_oracle
from hilbert_attn.ring_exchange import shard_sequence, unshard_sequence

N, HEADS, GRID = 77, 4, (7, 11)


def cases():
    "Name, lists, and options of `check`."
    generator = torch.Generator().manual_seed(0)
    hilbert = curve_order(GRID)
    shuffled = torch.randperm(N, generator=generator)
    def lists(pattern, order, block_size=16, **more):
        return block_lists(pattern, order=order, block_size=block_size, **more)
    def of_mask(mask, sizes=(16, 16), **more):
        return lists_from_block_mask(mask, N, N, sizes, **more)
    def random(*shape): return torch.rand(shape, generator=generator) < 0.4
    every = torch.ones(5, 5, dtype=torch.bool)

    yield "neighbourhood", lists(NeighborhoodPattern(GRID, (3, 5)), hilbert), {}
    dilated = NeighborhoodPattern(GRID, 3, (1, 2))
    yield "dilated, causal", lists(dilated, hilbert, (8, 16), causal=True), dict(kv_heads=1)
    window = WindowPattern(GRID, (3, 4), (1, 2))
    yield "window, bf16", lists(window, curve_order(GRID, "morton")), dict(dtype=torch.bfloat16)
    slide = lists(SlidePattern(N, 9), hilbert)
    yield "slide, float64", slide, dict(dtype=torch.float64, scale=0.3)
    yield "segments", lists(SegmentPattern(N, 30, 3), shuffled), {}
    tiles = TilesSharedPattern(N, 5, 0, 7)
    yield "shared tokens, causal", lists(tiles, torch.arange(70), 32, causal=True), {}
    yield "a mask per head", of_mask(random(4, 5, 5), order=hilbert), dict(kv_heads=2)
    yield "per batch and head, causal", of_mask(random(2, 4, 5, 10), (16, 8), causal=True), {}
    yield "nothing", of_mask(~every), {}
    yield "everything", of_mask(every), {}


NAMES = ["neighbourhood", "dilated, causal", "window, bf16", "slide, float64", "segments",
         "shared tokens, causal", "a mask per head", "per batch and head, causal", "nothing",
         "everything"]


class Whole(torch.autograd.Function):
    "Identity; backward, sums over the ranks what each of them has of the gradients."
    @staticmethod
    def forward(ctx, x): return x.clone()

    @staticmethod
    def backward(ctx, grad):
        total = grad.double().contiguous()
        dist.all_reduce(total)
        return total.to(grad.dtype)


def check(rank, world, lists, kv_heads=HEADS, dtype=torch.float32, scale=None):
    "The same tensors on every rank; out, LSE and gradients of the whole from the shards."
    generator = torch.Generator().manual_seed(1)
    def tensor(heads):
        x = torch.randn(2, heads, N, 16, dtype=torch.float64, generator=generator)
        return x.to(dtype)
    order, moved, swap = lists_order(lists), [], ring_exchange.swap

    def attention(q, k, v):
        shards = [shard_sequence(Whole.apply(x), None, 2, order) for x in (q, k, v)]
        options = dict(scale=scale, return_lse=True)
        results = block_sparse_ring_attention(*shards, lists, **options)
        return tuple(unshard_sequence(x, None, 2, order) for x in results)

    def counted(ring, what, number, sends, receives):
        others = [x for other, x in enumerate(receives) if other != ring.rank]
        if what.startswith("block_sparse"): moved.append(sum(x.numel() for x in others))
        swap(ring, what, number, sends, receives)

    batches, heads = lists.groups
    dense = lists.mask().view(batches, heads, N, N)
    dense = dense.expand(2 if batches > 1 else 1, HEADS if heads > 1 else 1, N, N)
    q, k, v = tensor(HEADS), tensor(kv_heads), tensor(kv_heads)
    with mock.patch.object(ring_exchange, "swap", counted):
        assert_matches_oracle(attention, q, k, v, dense, scale=scale)
    check_traffic(plan_block_ring(lists, world), rank, world, kv_heads, moved)


def check_traffic(plan, rank, world, kv_heads, moved):
    "What arrived is what the plan says, and what is sent by all arrives at all."
    ranks = range(world)
    there = plan.elements_received(rank, 2, kv_heads, 16)
    rows = sum(len(plan.parcel(rank, dst)) for dst in ranks if dst != rank)
    back = 2 * 2 * kv_heads * 16 * rows
    assert moved == ([there, back] if world > 1 else []), (moved, there, back)
    sent = sum(len(plan.parcel(a, b)) for a in ranks for b in ranks if a != b)
    assert sum(plan.rows_received(r) for r in ranks) == sent


def exact(results, rank, world):
    for name, lists, options in cases():
        attempt(results, name, check, rank, world, lists, **options)


def faults(results, rank, world):
    "What goes wrong on rank 1 is the same error on all ranks, and the next call works."
    given = {name: lists for name, lists, _ in cases()}
    lists, odd = given["neighbourhood"], rank == 1
    n = plan_block_ring(lists, world).sizes[rank]
    q = torch.randn(1, 1, n, 16, requires_grad=True)
    def call(lists=lists, q=q, **options):
        return block_sparse_ring_attention(q, q, q, lists, **options)

    def attend():
        if not odd: return call()
        error = MemoryError("no memory left")
        with mock.patch.object(block_ring, "attend", side_effect=error): return call()

    def learned(): # keys on the others, queries alone here
        queries, keys = q.detach(), q.detach().clone()
        learning = queries if odd else keys
        learning.requires_grad_()
        x = queries, keys, keys
        block_sparse_ring_attention(*x, lists).sum().backward()

    # as many blocks, others; bounds of pairs alone
    def blocks(mask): return lists_from_block_mask(mask, N, N, (16, 16))
    rows, columns = torch.zeros(2, 5, 5, dtype=torch.bool)
    rows[0] = columns[:, 0] = True
    def slide(width):
        order = torch.arange(N)
        return block_lists(SlidePattern(N, width), order=order, block_size=16)
    narrow, wide = slide(3), slide(5)
    assert len(narrow.rows.index) == len(wide.rows.index)

    def orders():
        outs = [call() for _ in range(2)]
        for out in outs[::-1] if odd else outs: out.sum().backward()

    calls = {
        "other lists": lambda: call(given["everything"] if rank == 0 else lists),
        "other blocks": lambda: call(blocks(rows if odd else columns)),
        "other bounds": lambda: call(narrow if odd else wide),
        "other gradients": learned,
        "a short shard": lambda: call(q=q[:, :, :-1] if odd else q),
        "no memory": attend,
        "no number": lambda: call(scale="1" if odd else None),
        "no backend": lambda: call(backend="bogus" if odd else "auto"),
        "backwards in other orders": orders}
    for name, function in calls.items():
        attempt(results, name, outcome, function)
        attempt(results, name + ", then usable", check, rank, world, lists)


if __name__ == "__main__": main(globals())
