"""The ring on this machine's CPU: `python tools/bench_ring.py`. One process per rank, one thread each, gloo between them.

In turn and on the same tensors: this package's ring with and without overlap, its segments inside and across shards, PyTorch's own (private) ring with the CPU's flash operator, and the obvious way: gather all
of K and V, then dense attention. Every contender is checked before it is timed. The run is appended to `nbs/results/<machine>/ring.json`. `--quick` takes a toy size and writes nothing unless `--out` names a folder.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor

from hilbert_attn.bench import FLOPS_PER_PAIR, resident_memory, timing_rows, describe_environment, environment, format_table, measure, save_run
from hilbert_attn.patterns import SegmentPattern, attention_mask
from hilbert_attn.reference import assert_matches_oracle, default_scale
from hilbert_attn.ring import plan_ring, ring_attention, shard_sequence, unshard_sequence
from hilbert_attn.sdpa import _dense_backward, _flash

CONFIG = dict(batch=1, heads=2, tokens=4096, head_dim=64, dtype="float32", repeats=5, worlds=[1, 2], memory_worlds=[1, 2, 4], inside=1024, across=4096, rate=4, memory_tokens=8192, memory_heads=12, link_bytes=1 << 24)
QUICK = CONFIG | dict(heads=2, tokens=256, repeats=2, inside=64, across=256, memory_worlds=[2], memory_tokens=512, memory_heads=2, link_bytes=1 << 16)
OURS, SERIAL, CAUSAL, ZIGZAG, INSIDE, ACROSS = "ring", "ring, no overlap", "ring, causal", "ring, causal, zigzag", "segments inside, dilated", "segments across, dilated"
TORCH, GATHER = "torch's ring", "all-gather, then dense"


class _GatherDense(torch.autograd.Function):
    "The obvious way: every rank gets all of K and V."
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.rank, world = dist.get_rank(), dist.get_world_size()
        whole = []
        for x in (k, v):
            parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
            dist.all_gather(parts, x.contiguous())
            whole.append(torch.cat(parts, 2))
        out, lse = _flash(q, *whole, scale=default_scale(q))
        ctx.save_for_backward(q, *whole, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _dense_backward(dout, None, q, k, v, out, lse, False, None, default_scale(q))
        for x in (dk, dv): dist.all_reduce(x)  # gloo has no reduce-scatter
        return dq, *(x.narrow(2, ctx.rank * q.shape[2], q.shape[2]) for x in (dk, dv))


class _TorchRing(torch.autograd.Function):
    "PyTorch's templated ring, forward and backward."
    @staticmethod
    def forward(ctx, q, k, v):
        from torch.distributed.tensor.experimental._context_parallel import _attention as theirs
        ctx.theirs = theirs
        with mock.patch.object(theirs._cp_options, "enable_load_balance", False):
            out, lse, *_ = theirs._templated_ring_attention(dist.group.WORLD, 2, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, q, k, v, is_causal=False)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        with mock.patch.object(ctx.theirs._cp_options, "enable_load_balance", False):
            return tuple(ctx.theirs._templated_ring_attention_backward(dist.group.WORLD, 2, operator, dout, "grad_out", *ctx.saved_tensors, is_causal=False, dropout_p=0.0)[:3])


@dataclass(frozen=True)
class Contender:
    name: str
    attention: object # attention(q, k, v) -> (out, lse)
    pattern: SegmentPattern
    causal: bool = False
    layout: str = "contiguous"

    @property
    def pairs(self) -> int: return self.pattern.pairs() if not self.causal else (self.pattern.pairs() + self.pattern.seq_len) // 2


def contenders(c: dict, n: int, world: int) -> list[Contender]:
    dense = SegmentPattern(n, n)
    def ours(**options): return lambda q, k, v: ring_attention(q, k, v, return_lse=True, **options)
    def segments(w): return ours(segment_size=w, dilation_rate=c["rate"])
    scale = n / c["tokens"]
    inside, across = (max(c["rate"], int(c[name] * scale)) for name in ("inside", "across"))
    found = [Contender(OURS, ours(), dense), Contender(CAUSAL, ours(causal=True), dense, True), Contender(ZIGZAG, ours(causal=True, layout="zigzag"), dense, True, "zigzag"),
             Contender(INSIDE, segments(inside), SegmentPattern(n, inside, c["rate"])), Contender(ACROSS, segments(across), SegmentPattern(n, across, c["rate"]))]
    if world > 1: found += [Contender(SERIAL, ours(overlap=False), dense), Contender(TORCH, lambda q, k, v: _TorchRing.apply(q, k, v), dense), Contender(GATHER, lambda q, k, v: _GatherDense.apply(q, k, v), dense)]
    return found


class _AddUp(torch.autograd.Function):
    "Identity whose gradient is added up over the ranks."
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def check(contender: Contender, heads: int, head_dim: int) -> dict:
    "Holds a contender against the float64 oracle on a short sequence."
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(1, heads, contender.pattern.seq_len, head_dim, generator=generator) for _ in range(3)]
    def attention(*x):
        done = contender.attention(*(shard_sequence(_AddUp.apply(t), None, 2, layout=contender.layout) for t in x))
        return tuple(unshard_sequence(t, None, 2, layout=contender.layout) for t in done)
    return assert_matches_oracle(attention, *x, attention_mask(contender.pattern, causal=contender.causal), lse_grad=contender.name not in (TORCH, GATHER)).errors


def peak(call) -> int: # bytes beyond what was there before
    "Resident memory that a call adds at its peak."
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_memory()
    result = call()
    found = max(0, resident_memory("VmHWM") - before)
    del result
    return found


def _tensors(config: dict, n: int, rank: int, world: int) -> list[Tensor]: # q, k, v and the upstream gradient of one rank
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(config["batch"], config["heads"], n // world, config["head_dim"], generator=generator) for _ in range(4)]


def memory_of_rank(config: dict, rank: int, world: int) -> dict:
    "Resident memory that forward and backward add at their peak, the largest of all ranks."
    rows, config = [], config | dict(heads=config["memory_heads"])
    for c in [c for c in contenders(config, config["memory_tokens"], world) if c.name in (OURS, INSIDE)]:
        for tokens in (128 * world, config["memory_tokens"]):  # once small, so that nothing is loaded for the first time
            *qkv, dout = _tensors(config, tokens, rank, world)
            leaves = [x.requires_grad_() for x in qkv]
            dist.barrier()
            found = torch.tensor(peak(lambda: torch.autograd.grad(c.attention(*leaves)[0], leaves, dout)))
            dist.all_reduce(found, dist.ReduceOp.MAX)
        rows.append(dict(name=c.name, tokens=tokens, heads=config["heads"], peak_extra_bytes=found.item(), inputs=4 * dout.nbytes))
    return dict(world=world, memory=rows)


def times_of_rank(config: dict, rank: int, world: int) -> dict:
    "Checks, times, the link between ranks, and what the plans send."
    checks = {c.name: check(c, 2, config["head_dim"]) for c in contenders(config, 64 * world, world)}

    *qkv, dout = _tensors(config, config["tokens"], rank, world)
    rows, link = [], {}
    leaves = [x.clone().requires_grad_() for x in qkv]
    chosen = contenders(config, config["tokens"], world)
    per_pair = dict(forward=lambda c: lambda: c.attention(*qkv), **{"forward+backward": lambda c: lambda: torch.autograd.grad(c.attention(*leaves)[0], leaves, dout)})
    for direction, build in per_pair.items():
        timings = measure({c.name: build(c) for c in chosen}, config["repeats"], synchronize=dist.barrier)
        flops = {c.name: config["batch"] * config["heads"] * FLOPS_PER_PAIR[direction] * config["head_dim"] * c.pairs for c in chosen}
        rows += [row | dict(flops=flops[row["name"]]) for row in timing_rows(timings, direction=direction)]

    ours, theirs = torch.zeros(config["link_bytes"] // 4), torch.zeros(config["link_bytes"] // 4)
    if world > 1:  # every rank sends and receives at once, as in the ring
        def pass_on():
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, ours, group_peer=(rank + 1) % world), dist.P2POp(dist.irecv, theirs, group_peer=(rank - 1) % world)]): work.wait()
        link = dict(seconds=measure({"link": pass_on}, config["repeats"], synchronize=dist.barrier)["link"].median, bytes=ours.nbytes)

    plans = {c.name: plan_ring(config["tokens"], world, (c.pattern.segment_size,), (c.pattern.dilation_rate,), batch=config["batch"], heads=config["heads"], head_dim=config["head_dim"], causal=c.causal, layout=c.layout).traffic(0)
             for c in contenders(config, config["tokens"], world) if c.name not in (TORCH, GATHER)}
    traffic = {name: dict(forward=t.bytes, backward=t.backward_bytes) for name, t in plans.items()}
    return dict(world=world, threads_per_rank=1, checks=checks, rows=rows, link=link, traffic_bytes=traffic)


def run_rank(job: dict, rank: int):
    "What one process does; rank 0 writes the result."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{job['store']}", rank=rank, world_size=job["world"])
    found = (memory_of_rank if job["part"] == "memory" else times_of_rank)(job["config"], rank, job["world"])
    if not rank: Path(job["out"]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run_world(config: dict, world: int, part: str, folder: Path) -> dict:
    "Starts the processes of one measurement and waits for them."
    store, out = folder / f"store-{part}-{world}", folder / f"{part}-{world}.json"
    command = [sys.executable, __file__, "--job", json.dumps(dict(config=config, world=world, part=part, store=str(store), out=str(out)))]
    tidy = dict(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072") if part == "memory" else {}  # freed memory goes back at once
    processes = [subprocess.Popen([*command, "--rank", str(rank)], env={**os.environ, "OMP_NUM_THREADS": "1", **tidy}) for rank in range(world)]
    try: codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None: process.kill()
    if any(codes): raise RuntimeError(f"{world} ranks: exit codes {codes}")
    return json.loads(out.read_text())


def table(run: dict) -> str:
    "Times of all worlds, readable."
    lines = [describe_environment(run["environment"])]
    for world in run["worlds"]:
        for direction in FLOPS_PER_PAIR:
            rows = [row | dict(ms=1e3 * row["median"], spread=f"{1e3 * row['p20']:.1f} to {1e3 * row['p80']:.1f}", rate=row["flops"] / world["world"] / row["median"] / 1e9) for row in world["rows"] if row["direction"] == direction]
            lines.append(format_table(rows, dict(name="", ms=".1f", spread="", rate=".1f"), dict(name=f"{world['world']} ranks, {direction}", spread="p20 to p80", rate="GFLOP/s per rank")))
        if world["link"]: lines.append(f"link: {world['link']['bytes'] / world['link']['seconds'] / 1e9:.2f} GB/s in each direction")
    rows = [m | dict(ranks=world["world"], mib=(m["peak_extra_bytes"] + m["inputs"]) / 2 ** 20) for world in run["memory"] for m in world["memory"]]
    lines.append(format_table(rows, dict(name="", ranks="", tokens=",", mib=".1f"), dict(name="memory per rank, forward+backward", mib="MiB with q, k, v, dout")))
    return "\n\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy size, to see that everything runs")
    parser.add_argument("--out", help="a folder for the results, instead of nbs/results")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job: return run_rank(args.job, args.rank)
    config = QUICK if args.quick else CONFIG
    with tempfile.TemporaryDirectory() as folder:
        worlds = [run_world(config, world, "times", Path(folder)) for world in config["worlds"]]
        memory = [run_world(config, world, "memory", Path(folder)) for world in config["memory_worlds"]]
    run = dict(suite="ring", quick=args.quick, config=config, environment=environment(), worlds=worlds, memory=memory)
    print(table(run))
    if args.out or not args.quick: print(f"\nwritten to {save_run(run, args.out)}")


if __name__ == "__main__": main()
