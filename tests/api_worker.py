"""Run by `test_api.py` in two gloo processes: every registered type under DistributedDataParallel, against one process with the whole batch."""
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hilbert_attn.api import ATTENTION_TYPES, create_standardized_ring_attention

SETTINGS = dict(dim=32, heads=4, segment_lengths=[8, 24], dilation_rates=[1, 2], grid=(4, 6), block_size=8)


def step(module, x):
    "Gradients of a loss that is a mean over the batch."
    target = torch.linspace(-1, 1, x.numel()).view(x.shape)
    ((module(x) * target).sum() / len(x)).backward()
    return [p.grad.clone() for p in module.parameters()]


def main(rank: int, store: str):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    groups = [dist.new_group([r]) for r in range(2)]  # a ring of one: the processes share the batch, not the sequence
    for name in ATTENTION_TYPES:
        torch.manual_seed(0)
        module = create_standardized_ring_attention(name, **SETTINGS, group=groups[rank])
        x = torch.randn(1, 24, 32).expand(4, 24, 32).contiguous()  # the upstream gradient below is the same for both halves of the batch
        torch.manual_seed(0)
        alone = create_standardized_ring_attention(name, **SETTINGS, group=groups[rank])
        expected = step(alone, x[:2])
        actual = step(DistributedDataParallel(module), x[2 * rank:2 * rank + 2])
        for a, e in zip(actual, expected): torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
        if rank == 0: print(name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__": main(int(sys.argv[1]), sys.argv[2])
