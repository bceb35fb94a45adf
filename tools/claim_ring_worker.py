"""One process of the ring that `run_claims.py` times: prints seconds, bytes received, and the error against one process that holds everything."""
import statistics
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hilbert_attn.ring import plan_ring, ring_attention, shard_sequence

rank, size, tokens = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=size, timeout=timedelta(seconds=120))
torch.manual_seed(0)
whole = [torch.randn(1, 4, tokens, 64) for _ in range(3)]
q, k, v = (shard_sequence(x, None, 2) for x in whole)
times = []
for _ in range(4):
    dist.barrier()
    start = time.perf_counter()
    out = ring_attention(q, k, v)
    dist.barrier()
    times.append(time.perf_counter() - start)
rows = shard_sequence(torch.arange(tokens), None, 0)[:64]
exact = F.scaled_dot_product_attention(whole[0][:, :, rows].double(), *(x.double() for x in whole[1:]))
plan = plan_ring(tokens, size, heads=4)
print(statistics.median(times[1:]), plan.traffic(rank).bytes, (out[:, :, :64] - exact).abs().max().item())
dist.destroy_process_group()
