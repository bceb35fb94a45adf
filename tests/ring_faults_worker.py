"""What goes wrong on one rank, and what all ranks say: the processes of `test_ring_faults.py`."""
import os
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from ring_processes import attempt, main, outcome
from torch.utils.checkpoint import checkpoint

from hilbert_attn import ring, ring_blocks
from hilbert_attn.block_layers import RingBlockSparseAttention
from hilbert_attn.compat import RingDilatedAttentionHilbertOptimizedFixed
from hilbert_attn.reference import masked_attention
from hilbert_attn.ring import ring_attention, ring_dilated_attention
from hilbert_attn.ring_exchange import share_errors, unshard_sequence
from hilbert_attn.ring_layers import RingDilatedAttention

FORWARD, BACKWARD = (ring_blocks, "block_forward"), (ring_blocks, "block_backward")
INSIDE, MERGE = (ring, "hilbert_attention"), (ring, "merge_attention")
N = 8 # positions of each rank


def tensors(batch=1, heads=2, n=N, dtype=torch.float32):
    return [torch.randn(batch, heads, n, 16, dtype=dtype, requires_grad=True) for _ in range(3)]


def works(group=None):
    "A dense call that is right, forward and backward: nothing of an earlier call is in the way."
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    generator = torch.Generator().manual_seed(7)
    whole = [torch.randn(1, 2, N * size, 16, generator=generator).double() for _ in range(4)]
    mine = [x[:, :, N * rank:N * rank + N].clone() for x in whole]
    leaves = [x.requires_grad_() for x in mine[:3]]
    out = ring_attention(*leaves, group=group)
    found = [out, *torch.autograd.grad(out, leaves, mine[3])]
    leaves = [x.requires_grad_() for x in whole[:3]]
    exact, _ = masked_attention(*leaves, torch.ones(1, dtype=torch.bool))
    expected = [exact, *torch.autograd.grad(exact, leaves, whole[3])]
    for a, e in zip(found, expected):
        assert (a - e[:, :, N * rank:N * rank + N]).abs().max() < 1e-12


@contextmanager
def on_call(odd: bool, place: tuple, action: Callable, which: int = 1):
    "On one rank, `action` runs before a call of a function of a module."
    original, calls = getattr(*place), []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == which: action()
        return original(*args, **kwargs)
    with mock.patch.object(*place, wrapped) if odd else nullcontext(): yield


def no_memory(): raise MemoryError("no memory left")


def mismatches(results, rank, world):
    "Arguments that are wrong, or that differ."
    odd = rank == 1
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    orders = [torch.randperm(N * world, generator=generator) for generator in generators]
    dtype = torch.float64 if odd else torch.float32
    def call(**options): return ring_attention(*tensors(), **options)
    def strange(**options): return call(**options if odd else {})
    def branches(*arguments): return ring_dilated_attention(*tensors(), *arguments)
    calls = dict(
        shape=lambda: ring_attention(*tensors(heads=4 if odd else 2)),
        dtype=lambda: ring_attention(*tensors(dtype=dtype)),
        order=lambda: call(causal=True, order=orders[odd]),
        layout=lambda: call(causal=True, layout="zigzag" if odd else "contiguous"),
        segments=lambda: branches((8, 16), (1, 2 + odd)),
        function=lambda: branches((24,), (1,)) if odd else call(),
        argument=lambda: ring_attention(tensors()[0], *tensors(n=7 if odd else 8)[1:]),
        everywhere=lambda: call(segment_size=4, dilation_rate=5),
        uneven_zigzag=lambda: ring_attention(*tensors(n=9 if odd else 8), layout="zigzag"),
        unshard=lambda: unshard_sequence(tensors()[0], dim=2 if odd else 1),
        no_number=lambda: strange(scale="0.5"),
        no_whole_number=lambda: strange(segment_size=2.5),
        no_switch=lambda: strange(causal="False"),
        no_backend=lambda: strange(backend="bogus"),
        no_tensor=lambda: ring_attention(*([[1.0]] * 3 if odd else tensors())),
        cannot_run=lambda: call(segment_size=4, backend="triton" if odd else "sdpa"))
    for name, function in (calls | layer_calls(odd)).items():
        attempt(results, name, outcome, function)
        attempt(results, name + ", then usable", works)
    attempt(results, "numbers alike", numbers_alike, odd)
    attempt(results, "batch of nothing", batch_of_nothing)


def layer_calls(odd):
    "What layers find out, while others are in the call already; what is no tensor of now."
    world = dist.get_world_size()
    branches = (8,), (1,)
    layer = RingDilatedAttention(*branches, curve="hilbert")
    whole = RingDilatedAttention(*branches, curve="hilbert", grid=(N, 1))
    sized = RingDilatedAttentionHilbertOptimizedFixed(32, 2, *branches)
    blocks = RingBlockSparseAttention(grid=N * world, block_size=4)

    def tokens(heads=2):
        return [x.transpose(1, 2) for x in tensors(heads=heads)]

    def one_less():
        found = tokens()
        return [x[0] for x in found] if odd else found

    def masked():
        if not odd: return None
        return torch.ones(1, N, dtype=torch.bool)

    def loss(q):
        _, k, v = tensors()
        return ring_attention(q, k, v).sum()

    def unshard():
        x = tokens()[0]
        layer.unshard(x, seq_len=None if odd else N * world)

    return dict(
        layer_shape=lambda: layer(*one_less()),
        layer_mask=lambda: layer(*tokens(), key_mask=masked()),
        layer_switch=lambda: layer(*tokens(), "no" if odd else False),
        layer_sizes=lambda: sized(*tokens(4 if odd else 2)),
        layer_length=unshard,
        layer_grid=lambda: whole(*tokens()),
        block_layer_shape=lambda: blocks(*one_less()),
        block_layer_mask=lambda: blocks(*tokens(), key_mask=masked()),
        transform=lambda: torch.func.grad(loss)(tensors()[0]))


def numbers_alike(odd):
    "Equal scales are equal, whatever they are written as."
    half = 0.5, np.float64(0.5)
    for scales in (half, (1, 1.0)):
        x = tensors()
        mixed = ring_attention(*x, scale=scales[odd])
        alike = ring_attention(*x, scale=scales[0])
        assert torch.equal(mixed, alike)


def batch_of_nothing():
    for size in (None, 12, 4):
        x = tensors(batch=0)
        out = ring_attention(*x, segment_size=size)
        backward(out)
        for t in x:
            assert t.grad.shape == t.shape


def backward(out): out.sum().backward()


def around(odd, dense):
    "Code of one's own that fails beside a call, on one rank."
    @share_errors()
    def before():
        if odd: no_memory()
        backward(dense())

    @share_errors()
    def after():
        out = dense()
        if odd: no_memory()
        backward(out)

    @share_errors()
    def at_the_end():
        backward(dense())
        if odd: no_memory()

    return {"code before a call": before, "code after a call": after, "code at the end": at_the_end}


def repeated(odd, call):
    "One rank alone fails where a checkpoint repeats its code."
    runs = []
    def code(*x):
        runs.append(1)
        if odd and len(runs) == 2: no_memory()
        return call(*x)
    return lambda: backward(checkpoint(code, *tensors(), use_reentrant=False))


def unsaved(odd, call):
    "One rank alone has lost what the forward had kept."
    def unpack(x):
        if odd: no_memory()
        return x

    def run():
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda x: x, unpack):
            out = call()
        backward(out)
    return run


def errors(results, rank, world):
    "Rank 1 has no memory left: while it computes, before, after, forward, backward."
    odd = rank == 1
    def dense(): return ring_attention(*tensors())
    def branches(): return ring_dilated_attention(*tensors(), (4, 24), (1, 2))
    def two_rings():
        arguments = (4, 24, 24), (1, 1, 2)
        return ring_dilated_attention(*tensors(), *arguments, dilation_mode="residue")
    def inside(): return ring_attention(*tensors(), segment_size=4)
    def across(): return ring_attention(*tensors(), segment_size=12)

    def during(call, place, which=1):
        def run():
            with on_call(odd, place, no_memory, which): backward(call())
        return run

    calls = {
        "dense, first step": during(dense, FORWARD),
        "dense, last step": during(dense, FORWARD, world),
        "dense, backward, first step": during(dense, BACKWARD),
        "dense, backward, last step": during(dense, BACKWARD, world),
        "exchange": during(branches, FORWARD),
        "exchange, backward": during(branches, BACKWARD),
        "segments beside an exchange": during(branches, INSIDE),
        "merge after an exchange": during(branches, MERGE),
        "segments before a ring": during(two_rings, INSIDE),
        "a ring before an exchange": during(two_rings, FORWARD),
        "segments inside": during(inside, INSIDE),
        "dense, backward, repeated": repeated(odd, ring_attention),
        "dense, backward, tensors kept": unsaved(odd, dense),
        "exchange, backward, tensors kept": unsaved(odd, across),
    } | around(odd, dense)
    for name, function in calls.items():
        attempt(results, name, outcome, function)
        attempt(results, name + ", then usable", works)


def orders(results, rank, world):
    "Two calls in flight, and the ranks go back through them in different orders."
    def backwards(first, second):
        calls = [(x := tensors(), ring_attention(*x, **options)) for options in (first, second)]
        for x, out in calls if rank != 1 else calls[::-1]: torch.autograd.grad(out.sum(), x)

    across = dict(segment_size=12, dilation_rate=2)
    pairs = dict(alike=({}, {}), exchanges=(across, across), unlike=({}, across))
    for name, options in pairs.items():
        attempt(results, name, outcome, partial(backwards, *options))
        attempt(results, name + ", then usable", works)

    def skipped(): # rank 1 goes on to another call, where the others go back
        x = tensors()
        out = ring_attention(*x)
        if rank == 1: ring_attention(*x)
        else: torch.autograd.grad(out.sum(), x)
    attempt(results, "forward beside backward", outcome, skipped)
    attempt(results, "forward beside backward, then usable", works)


def lost(results, rank, world):
    "Rank 1 stalls longer than the group's timeout, or is gone: the last test takes it along."
    ranks = list(range(world))
    groups = [dist.new_group(ranks, timeout=timedelta(seconds=2)) for _ in range(3)]
    odd = rank == 1

    def stalls(place, group):
        dist.barrier()
        with on_call(odd, place, lambda: time.sleep(4)):
            found = outcome(lambda: backward(ring_attention(*tensors(), group=group)))
        return found | dict(again=outcome(lambda: works(group)))
    attempt(results, "stalls forward", stalls, FORWARD, groups[0])
    attempt(results, "stalls backward", stalls, BACKWARD, groups[1])

    def interrupted(): # no exception like others: it is not shared, but marks the group
        def interrupt(): raise KeyboardInterrupt
        try:
            with on_call(odd, FORWARD, interrupt): ring_attention(*tensors(), group=groups[2])
        except KeyboardInterrupt: return outcome(lambda: works(groups[2]))
        except RuntimeError as error: return dict(type="RuntimeError", message=str(error), took=0)
    dist.barrier()
    attempt(results, "interrupted", interrupted)

    dist.barrier()
    def exits():
        with on_call(odd, FORWARD, lambda: os._exit(3)): return outcome(works)
    attempt(results, "exits", exits)


if __name__ == "__main__": main(globals())
