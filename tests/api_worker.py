"""Run by `test_api.py` in two gloo processes: every registered type under DistributedDataParallel, against one process with the whole batch."""
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from ring_processes import check_tree
from torch.nn.parallel import DistributedDataParallel

from hilbert_attn import HilbertAttentionCore, HilbertAttentionCoreWithSDPA, RingDilatedAttentionHilbertCore
from hilbert_attn.api import ATTENTION_TYPES, create_standardized_ring_attention

SETTINGS = dict(dim=32, heads=4, segment_lengths=[8, 24], dilation_rates=[1, 2], grid=(4, 6), block_size=8)


def step(module, x):
    "Gradients of a loss that is a mean over the batch."
    target = torch.linspace(-1, 1, x.numel()).view(x.shape)
    ((module(x) * target).sum() / len(x)).backward()
    return [p.grad.clone() for p in module.parameters()]


def main(rank: int, store: str):
    check_tree()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    groups = [dist.new_group([r]) for r in range(2)]  # a ring of one: the processes share the batch, not the sequence
    makers = {name: lambda name=name: create_standardized_ring_attention(name, **SETTINGS, group=groups[rank]) for name in ATTENTION_TYPES}
    makers |= {"HilbertAttentionCore": lambda: HilbertAttentionCore(32, 4, 8), "HilbertAttentionCoreWithSDPA": lambda: HilbertAttentionCoreWithSDPA(32, 4, 8),
               "RingDilatedAttentionHilbertCore": lambda: RingDilatedAttentionHilbertCore(32, 4, [8, 24], [1, 2], group=groups[rank])}
    for name, make in makers.items():
        torch.manual_seed(0)
        module = make()
        x = torch.randn(1, 24, 32).expand(4, 24, 32).contiguous()  # the upstream gradient below is the same for both halves of the batch
        torch.manual_seed(0)
        alone = make()
        expected = step(alone, x[:2])
        actual = step(DistributedDataParallel(module), x[2 * rank:2 * rank + 2])
        for a, e in zip(actual, expected): torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
        if rank == 0: print(name, flush=True)
    for name in [t.name for t in ATTENTION_TYPES.values() if t.shares_sequence] + ["hilbert"]:
        share_a_sequence(name, groups[rank])
        if rank == 0: print(name, "shared", flush=True)
    dist.destroy_process_group()


def share_a_sequence(name, alone):
    "Output, gradient of the input, and gradients of the parameters, summed over the ranks, are those of one process."
    torch.manual_seed(0)
    x, upstream = torch.randn(2, 24, 32), torch.randn(2, 24, 32)
    results = []
    for options in (dict(ring_size=2), dict(group=alone)):
        torch.manual_seed(1)
        module, leaf = create_standardized_ring_attention(name, **SETTINGS, causal=True, **options), x.clone().requires_grad_()
        inside = module.attention
        out = module(leaf) if not hasattr(inside, "shard") else inside.unshard(module(inside.shard(leaf)))
        grads = torch.autograd.grad(out, (leaf, *module.parameters()), upstream)
        if "ring_size" in options: grads = [sum_over_ranks(g) for g in grads]  # each rank has the share of its own positions
        results.append([out, *grads])
    for a, e in zip(*results): torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def sum_over_ranks(x):
    x = x.contiguous()
    dist.all_reduce(x)
    return x


if __name__ == "__main__": main(int(sys.argv[1]), sys.argv[2])
