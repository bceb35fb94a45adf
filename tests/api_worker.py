"""Every registered type in two processes, against one that does everything: for test_api.py."""
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from ring_processes import check_tree
from torch.nn.parallel import DistributedDataParallel

from hilbert_attn import (
    HilbertAttentionCore,
    HilbertAttentionCoreWithSDPA,
    RingDilatedAttentionHilbertCore,
)
from hilbert_attn.api import ATTENTION_TYPES
from hilbert_attn.compat import create_standardized_ring_attention

BRANCHES = dict(segment_lengths=[8, 24], dilation_rates=[1, 2])
SETTINGS = dict(dim=32, heads=4, **BRANCHES, grid=(4, 6), block_size=8)


def step(module, x):
    "Gradients of a loss that is a mean over the batch."
    target = torch.linspace(-1, 1, x.numel()).view(x.shape)
    ((module(x) * target).sum() / len(x)).backward()
    return [p.grad.clone() for p in module.parameters()]


def makers(alone) -> dict:
    "What to test, by name; rings of one: the processes share the batch, not the sequence."
    def registered(name):
        return lambda: create_standardized_ring_attention(name, **SETTINGS, group=alone)
    found = {name: registered(name) for name in ATTENTION_TYPES}
    branches = BRANCHES["segment_lengths"], BRANCHES["dilation_rates"]
    return found | {
        "HilbertAttentionCore": lambda: HilbertAttentionCore(32, 4, 8),
        "HilbertAttentionCoreWithSDPA": lambda: HilbertAttentionCoreWithSDPA(32, 4, 8),
        "RingDilatedAttentionHilbertCore":
            lambda: RingDilatedAttentionHilbertCore(32, 4, *branches, group=alone)}


def share_a_batch(make, rank):
    "The upstream gradient is the same for both halves of the batch."
    torch.manual_seed(0)
    module = make()
    x = torch.randn(1, 24, 32).expand(4, 24, 32).contiguous()
    torch.manual_seed(0)
    expected = step(make(), x[:2])
    actual = step(DistributedDataParallel(module), x[2 * rank:2 * rank + 2])
    for a, e in zip(actual, expected): torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def share_a_sequence(name, alone):
    "Output and gradients, those of parameters summed over the ranks, are those of one process."
    torch.manual_seed(0)
    x, upstream = torch.randn(2, 24, 32), torch.randn(2, 24, 32)
    results = []
    for options in (dict(ring_size=2), dict(group=alone)):
        torch.manual_seed(1)
        settings = SETTINGS | dict(causal=True)
        module = create_standardized_ring_attention(name, **settings, **options)
        leaf, inside = x.clone().requires_grad_(), module.attention
        sharded = hasattr(inside, "shard")
        out = inside.unshard(module(inside.shard(leaf))) if sharded else module(leaf)
        grads = torch.autograd.grad(out, (leaf, *module.parameters()), upstream)
        if "ring_size" in options: grads = [sum_over_ranks(g) for g in grads]
        results.append([out, *grads])
    for a, e in zip(*results): torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def sum_over_ranks(x):
    "Each rank has the share of its own positions."
    x = x.contiguous()
    dist.all_reduce(x)
    return x


def main(rank: int, store: str):
    check_tree()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    groups = [dist.new_group([r]) for r in range(2)]
    for name, make in makers(groups[rank]).items():
        share_a_batch(make, rank)
        if rank == 0: print(name, flush=True)
    sharing = [kind.name for kind in ATTENTION_TYPES.values() if kind.shares_sequence]
    for name in [*sharing, "hilbert"]:
        share_a_sequence(name, groups[rank])
        if rank == 0: print(name, "shared", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__": main(int(sys.argv[1]), sys.argv[2])
