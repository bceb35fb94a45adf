"""Run by `test_block_ring.py` in each of P gloo processes: block-sparse attention over shards, against float64 and against the plan."""
import sys
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from ring_processes import check_tree, outcome

import hilbert_attn.block_ring as block_ring
from hilbert_attn.block_ring import (
    block_sparse_ring_attention,
    lists_order,
    plan_block_ring,
)
from hilbert_attn.block_sparse import block_lists, lists_from_block_mask
from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import (
    NeighborhoodPattern,
    SegmentPattern,
    SlidePattern,
    WindowPattern,
)
from hilbert_attn.reference import assert_matches_oracle
from hilbert_attn.ring import shard_sequence, unshard_sequence


def cases():
    generator = torch.Generator().manual_seed(0)
    def mask(*shape): return torch.rand(shape, generator=generator) < 0.4
    grid = (7, 11)
    yield "neighbourhood", block_lists(NeighborhoodPattern(grid, (3, 5)), order=curve_order(grid), block_size=16), {}
    yield "dilated, causal", block_lists(NeighborhoodPattern(grid, 3, (1, 2)), order=curve_order(grid), block_size=(8, 16), causal=True), dict(kv_heads=1)
    yield "window, bf16", block_lists(WindowPattern(grid, (3, 4), (1, 2)), order=curve_order(grid, "morton"), block_size=16), dict(dtype=torch.bfloat16)
    yield "slide, float64", block_lists(SlidePattern(77, 9), order=curve_order(grid), block_size=16), dict(dtype=torch.float64, scale=0.3)
    yield "segments", block_lists(SegmentPattern(77, 30, 3), order=torch.randperm(77, generator=generator), block_size=16), {}
    yield "a mask per head", lists_from_block_mask(mask(4, 5, 5), 77, 77, (16, 16), order=curve_order(grid)), dict(kv_heads=2)
    yield "a mask per batch and head, causal", lists_from_block_mask(mask(2, 4, 5, 10), 77, 77, (16, 8), causal=True), {}
    yield "nothing", lists_from_block_mask(torch.zeros(5, 5, dtype=torch.bool), 77, 77, (16, 16)), {}
    yield "everything", lists_from_block_mask(torch.ones(5, 5, dtype=torch.bool), 77, 77, (16, 16)), {}


def check(rank, size, name, lists, kv_heads=4, dtype=torch.float32, scale=None):
    "The whole tensors on every rank, the same; out, LSE and gradients of the whole from the shards."
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 77, 16, dtype=torch.float64, generator=generator).to(dtype) for h in (4, kv_heads, kv_heads))
    order, moved = lists_order(lists), []
    swap = block_ring.swap
    def counted(ring, what, number, sends, receives):
        moved.append(sum(x.numel() for x in receives.values()))
        swap(ring, what, number, sends, receives)
    block_ring.swap = counted

    def attention(q, k, v):
        shards = [shard_sequence(x, None, 2, order) for x in (q, k, v)]
        results = block_sparse_ring_attention(*shards, lists, scale=scale, return_lse=True)
        return tuple(unshard_sequence(x, None, 2, order) for x in results)

    class Whole(torch.autograd.Function):  # sums over the ranks what each of them has of the gradients
        @staticmethod
        def forward(ctx, x): return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.double().contiguous()
            dist.all_reduce(grad)
            return grad.to(dtype)

    G = lists.groups
    dense = lists.mask().view(*G, 77, 77).expand(2 if G[0] > 1 else 1, 4 if G[1] > 1 else 1, 77, 77)
    assert_matches_oracle(lambda q, k, v: attention(*(Whole.apply(x) for x in (q, k, v))), q, k, v, dense, scale=scale)
    block_ring.swap = swap
    plan = plan_block_ring(lists, size)
    expected = plan.elements_received(rank, 2, kv_heads, 16)
    back = 2 * 2 * kv_heads * 16 * sum(len(plan.parcel(rank, dst)) for dst in range(size) if dst != rank)
    assert moved == ([expected, back] if size > 1 else []), (name, moved, expected, back)
    assert sum(plan.rows_received(r) for r in range(size)) == sum(len(plan.parcel(a, b)) for a in range(size) for b in range(size) if a != b)


def errors(rank, size, lists):
    "What goes wrong on rank 1 is the same error on all ranks, and the next call works."
    n = plan_block_ring(lists, size).sizes[rank]
    q = torch.randn(1, 1, n, 16, requires_grad=True)
    def failing(name): return mock.patch.object(block_ring, name, side_effect=MemoryError("no memory left"))

    def attend():
        if rank == 1:
            with failing("attend_blocks"): block_sparse_ring_attention(q, q, q, lists)
        else: block_sparse_ring_attention(q, q, q, lists)
    def scale(): block_sparse_ring_attention(q, q, q, lists, scale="1" if rank == 1 else None)
    def backend(): block_sparse_ring_attention(q, q, q, lists, backend="bogus" if rank == 1 else "auto")
    def orders():
        outs = [block_sparse_ring_attention(q, q, q, lists) for _ in range(2)]
        for out in outs if rank != 1 else outs[::-1]: out.sum().backward()

    wanted = {attend: ("MemoryError", "no memory left (on rank 1)"), scale: ("ValueError", "scale='1'"), backend: ("ValueError", "backend='bogus'"), orders: ("ValueError", "call is ")}
    for function, (kind, text) in wanted.items():
        found = outcome(function)
        assert found["type"] == kind and text in found["message"] and found["took"] < 10, (function, found)
        block_sparse_ring_attention(q, q, q, lists).sum().backward()


def main(rank: int, size: int, store: str):
    check_tree()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=40))
    for name, lists, options in cases(): check(rank, size, name, lists, **options)
    if size > 1:
        q = torch.randn(1, 1, *plan_block_ring(lists, size).sizes[rank:rank + 1], 16)
        other = next(iter(cases()))[1] if rank == 0 else lists
        try: block_sparse_ring_attention(q, q, q, other)
        except ValueError as error: assert "the ranks of the group called it differently" in str(error) and "blocks is" in str(error), error
        else: raise AssertionError("different lists were not noticed")
        short = q[:, :, :-1] if rank == 1 else q
        try: block_sparse_ring_attention(short, short, short, lists)
        except ValueError as error: assert "this rank holds" in str(error) and "rank 1" in str(error), error
        else: raise AssertionError("a short shard was not noticed")
        block_sparse_ring_attention(q, q, q, lists)  # and the group still works
        errors(rank, size, next(iter(cases()))[1])
    dist.destroy_process_group()


if __name__ == "__main__": main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
