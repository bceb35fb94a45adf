"""One process of the ring that `run_claims.py` times.

Prints seconds, bytes received, and the error against one process that holds everything.
"""
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tree of this file
from hilbert_attn.ring import plan_ring, ring_attention, shard_sequence


def seconds_of(call) -> float:
    "Of one call on all ranks."
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start


def error_of(out, whole) -> float:
    "The largest, of the first rows of this rank."
    rows = shard_sequence(torch.arange(whole[0].shape[2]), None, 0)[:64]
    q, k, v = (x.double() for x in whole)
    exact = F.scaled_dot_product_attention(q[:, :, rows], k, v)
    return (out[:, :, :64] - exact).abs().max().item()


def main(rank: int, size: int, threads: int, store: str, tokens: int):
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size,
                            timeout=timedelta(seconds=120))
    torch.manual_seed(0)
    whole = [torch.randn(1, 4, tokens, 64) for _ in range(3)]
    shards = [shard_sequence(x, None, 2) for x in whole]
    times = [seconds_of(lambda: ring_attention(*shards)) for _ in range(4)]
    received = plan_ring(tokens, size, heads=4).traffic(rank).bytes
    error = error_of(ring_attention(*shards), whole)
    print(statistics.median(times[1:]), received, error)
    dist.destroy_process_group()


if __name__ == "__main__":
    *numbers, folder, length = sys.argv[1:]
    main(*map(int, numbers), folder, int(length))
