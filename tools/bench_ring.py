"""The ring on this machine's CPU: `python tools/bench_ring.py`.

One process per rank, one thread each, gloo between them. In turn and on the same tensors: this
package's ring with and without overlap, its segments inside and across shards, PyTorch's own
(private) ring with the CPU's flash operator, and the obvious way: gather all of K and V, then
dense attention. Every contender is checked before it is timed. The run is appended to
`nbs/results/<machine>/ring.json`. `--quick` takes a toy size and writes nothing unless `--out`
names a folder.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tree of this file
from hilbert_attn.bench import (
    FLOPS_PER_PAIR,
    Table,
    describe_environment,
    environment,
    measure,
    resident_memory,
    save_run,
    timing_rows,
)
from hilbert_attn.patterns import SegmentPattern, attention_mask
from hilbert_attn.reference import assert_matches_oracle, default_scale
from hilbert_attn.ring import plan_ring, ring_attention, shard_sequence, unshard_sequence
from hilbert_attn.tiles import dense_backward as _dense_backward
from hilbert_attn.tiles import flash as _flash

CONFIG = dict(
    batch=1, heads=2, tokens=4096, head_dim=64, dtype="float32", repeats=5, worlds=[1, 2],
    memory_worlds=[1, 2, 4], inside=1024, across=4096, rate=4, memory_tokens=8192,
    memory_heads=12, link_bytes=1 << 24)
QUICK = CONFIG | dict(
    heads=2, tokens=256, repeats=2, inside=64, across=256, memory_worlds=[2], memory_tokens=512,
    memory_heads=2, link_bytes=1 << 16)
OURS, SERIAL = "ring", "ring, no overlap"
CAUSAL, ZIGZAG = "ring, causal", "ring, causal, zigzag"
INSIDE, ACROSS = "segments inside, dilated", "segments across, dilated"
TORCH, GATHER = "torch's ring", "all-gather, then dense"


class _GatherDense(torch.autograd.Function):
    "The obvious way: every rank gets all of K and V."
    @staticmethod
    def forward(ctx, q, k, v):
        whole = []
        for x in (k, v):
            like = torch.contiguous_format
            parts = [torch.empty_like(x, memory_format=like) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, x.contiguous())
            whole.append(torch.cat(parts, 2))
        out, lse = _flash(q, *whole, scale=default_scale(q))
        ctx.save_for_backward(q, *whole, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        scale, first = default_scale(q), dist.get_rank() * q.shape[2]
        dq, dk, dv = _dense_backward(dout, None, q, k, v, out, lse, False, None, scale)
        for x in (dk, dv): dist.all_reduce(x)  # gloo has no reduce-scatter
        return dq, *(x.narrow(2, first, q.shape[2]) for x in (dk, dv))


class _TorchRing(torch.autograd.Function):
    "PyTorch's templated ring, forward and backward."
    @staticmethod
    def forward(ctx, q, k, v):
        from torch.distributed.tensor.experimental._context_parallel import _attention as theirs
        ctx.theirs, group = theirs, dist.group.WORLD
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        run = theirs._templated_ring_attention
        with mock.patch.object(theirs._cp_options, "enable_load_balance", False):
            out, lse, *_ = run(group, 2, flash, q, k, v, is_causal=False)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        run, options = ctx.theirs._templated_ring_attention_backward, ctx.theirs._cp_options
        arguments = dist.group.WORLD, 2, flash, dout, "grad_out", *ctx.saved_tensors
        with mock.patch.object(options, "enable_load_balance", False):
            return tuple(run(*arguments, is_causal=False, dropout_p=0.0)[:3])


@dataclass(frozen=True)
class Contender:
    "A way to compute, and what it claims."
    name: str
    attention: Callable # attention(q, k, v) -> (out, lse)
    pattern: SegmentPattern
    causal: bool = False
    layout: str = "contiguous"

    @property
    def pairs(self) -> int:
        whole = self.pattern.pairs()
        return (whole + self.pattern.seq_len) // 2 if self.causal else whole

    @property
    def ours(self) -> bool: return self.name not in (TORCH, GATHER)


def contenders(config: dict, n: int, world: int) -> list[Contender]:
    "For so many tokens: segments shrink with them."
    rate, dense = config["rate"], SegmentPattern(n, n)
    def ours(**options): return lambda *qkv: ring_attention(*qkv, return_lse=True, **options)
    def segments(name, length):
        w = max(rate, length * n // config["tokens"])
        attention = ours(segment_size=w, dilation_rate=rate)
        return Contender(name, attention, SegmentPattern(n, w, rate))
    found = [
        Contender(OURS, ours(), dense),
        Contender(CAUSAL, ours(causal=True), dense, True),
        Contender(ZIGZAG, ours(causal=True, layout="zigzag"), dense, True, "zigzag"),
        segments(INSIDE, config["inside"]), segments(ACROSS, config["across"])]
    if world == 1: return found
    return found + [
        Contender(SERIAL, ours(overlap=False), dense),
        Contender(TORCH, _TorchRing.apply, dense),
        Contender(GATHER, _GatherDense.apply, dense)]


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
    shape, layout = (1, heads, contender.pattern.seq_len, head_dim), contender.layout
    whole = [torch.randn(shape, generator=generator) for _ in range(3)]

    def attention(*whole):
        shards = [shard_sequence(_AddUp.apply(x), None, 2, layout=layout) for x in whole]
        results = contender.attention(*shards)
        return tuple(unshard_sequence(x, None, 2, layout=layout) for x in results)
    mask = attention_mask(contender.pattern, causal=contender.causal)
    return assert_matches_oracle(attention, *whole, mask, lse_grad=contender.ours).errors


def peak(call: Callable) -> int: # bytes beyond what was there before
    "Resident memory that a call adds at its peak."
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_memory()
    result = call()
    found = max(0, resident_memory("VmHWM") - before)
    del result
    return found


def _tensors(config: dict, n: int, rank: int, world: int) -> list[Tensor]:
    "q, k, v and the upstream gradient of one rank."
    generator = torch.Generator().manual_seed(rank)
    shape = config["batch"], config["heads"], n // world, config["head_dim"]
    return [torch.randn(shape, generator=generator) for _ in range(4)]


def memory_of_rank(config: dict, rank: int, world: int) -> dict:
    "Resident memory that forward and backward add at their peak, the largest of all ranks."
    rows, config = [], config | dict(heads=config["memory_heads"])
    measured = contenders(config, config["memory_tokens"], world)
    for c in (c for c in measured if c.name in (OURS, INSIDE)):
        for tokens in (128 * world, config["memory_tokens"]):  # once small: nothing is loaded anew
            *qkv, dout = _tensors(config, tokens, rank, world)
            leaves = [x.requires_grad_() for x in qkv]
            def call(c=c, leaves=leaves, dout=dout):
                return torch.autograd.grad(c.attention(*leaves)[0], leaves, dout)
            dist.barrier()
            found = torch.tensor(peak(call))
            dist.all_reduce(found, dist.ReduceOp.MAX)
        rows.append(dict(name=c.name, tokens=tokens, heads=config["heads"],
                         peak_extra_bytes=found.item(), inputs=4 * dout.nbytes))
    return dict(world=world, memory=rows)


def timings_of_rank(
    config: dict,
    chosen: list[Contender],
    rank: int,
    world: int,
) -> list[dict]: # rows
    "Forward, and forward and backward, of contenders in turn."
    *qkv, dout = _tensors(config, config["tokens"], rank, world)
    leaves = [x.clone().requires_grad_() for x in qkv]
    def forward(c): return lambda: c.attention(*qkv)
    def both(c): return lambda: torch.autograd.grad(c.attention(*leaves)[0], leaves, dout)
    rows = []
    for direction, build in {"forward": forward, "forward+backward": both}.items():
        calls = {c.name: build(c) for c in chosen}
        timings = measure(calls, config["repeats"], synchronize=dist.barrier)
        one = config["batch"] * config["heads"] * config["head_dim"] * FLOPS_PER_PAIR[direction]
        flops = {c.name: one * c.pairs for c in chosen}
        for row in timing_rows(timings, direction=direction):
            rows.append(row | dict(flops=flops[row["name"]]))
    return rows


def link_of_rank(config: dict, rank: int, world: int) -> dict:
    "Seconds for a message, while every rank sends and receives, as in the ring."
    if world == 1: return {}
    ours, theirs = (torch.zeros(config["link_bytes"] // 4) for _ in range(2))
    after, before = (rank + 1) % world, (rank - 1) % world

    def pass_on():
        send = dist.P2POp(dist.isend, ours, group_peer=after)
        receive = dist.P2POp(dist.irecv, theirs, group_peer=before)
        for work in dist.batch_isend_irecv([send, receive]): work.wait()
    timing = measure({"link": pass_on}, config["repeats"], synchronize=dist.barrier)["link"]
    return dict(seconds=timing.median, bytes=ours.nbytes)


def traffic_of(config: dict, c: Contender, world: int) -> dict:
    "What the plan of a contender sends to the first rank."
    shape = dict(batch=config["batch"], heads=config["heads"], head_dim=config["head_dim"])
    pattern = (c.pattern.segment_size,), (c.pattern.dilation_rate,)
    options = dict(causal=c.causal, layout=c.layout, dilation_mode=c.pattern.mode)
    traffic = plan_ring(config["tokens"], world, *pattern, **shape, **options).traffic(0)
    return dict(forward=traffic.bytes, backward=traffic.backward_bytes)


def times_of_rank(config: dict, rank: int, world: int) -> dict:
    "Checks, times, the link between ranks, and what the plans send."
    short = contenders(config, 64 * world, world)
    checks = {c.name: check(c, 2, config["head_dim"]) for c in short}
    chosen = contenders(config, config["tokens"], world)
    rows = timings_of_rank(config, chosen, rank, world)
    link = link_of_rank(config, rank, world)
    traffic = {c.name: traffic_of(config, c, world) for c in chosen if c.ours}
    return dict(world=world, threads_per_rank=1, checks=checks, rows=rows, link=link,
                traffic_bytes=traffic)


def run_rank(job: dict, rank: int, part: Callable[[dict, int, int], dict]):
    "What one process does; rank 0 writes the result."
    torch.set_num_threads(1)
    store, world = job["store"], job["world"]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = part(job["config"], rank, world)
    if not rank: Path(job["out"]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run_world(
    config: dict,
    world: int,
    part: str,
    folder: Path,
    tool: str = __file__,
    inside: Callable[[int], list[str]] = lambda rank: [], # words before the command of a rank
) -> dict:
    "Starts the processes of one measurement and waits for them."
    store, out = folder / f"store-{part}-{world}", folder / f"{part}-{world}.json"
    job = dict(config=config, world=world, part=part, store=str(store), out=str(out))
    command = [sys.executable, tool, "--job", json.dumps(job), "--rank"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if part == "memory":  # freed memory goes back at once
        env |= dict(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
    commands = [[*inside(rank), *command, str(rank)] for rank in range(world)]
    processes = [subprocess.Popen(command, env=env) for command in commands]
    try: codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None: process.kill()
    if any(codes): raise RuntimeError(f"{world} ranks: exit codes {codes}")
    return json.loads(out.read_text())


def table_of(world: dict, direction: str) -> str:
    rows = []
    for row in world["rows"]:
        if row["direction"] != direction: continue
        spread = f"{1e3 * row['p20']:.1f} to {1e3 * row['p80']:.1f}"
        rate = row["flops"] / world["world"] / row["median"] / 1e9
        rows.append(row | dict(ms=1e3 * row["median"], spread=spread, rate=rate))
    titles = dict(spread="p20 to p80", rate="GFLOP/s per rank")
    formats = dict(name="", ms=".1f", spread="", rate=".1f")
    return str(Table(f"{world['world']} ranks, {direction}", rows, formats, titles))


def table(run: dict) -> str:
    "Times of all worlds, and memory, readable."
    lines, memory = [describe_environment(run["environment"])], []
    for world in run["worlds"]:
        lines += [table_of(world, direction) for direction in FLOPS_PER_PAIR]
        link = world["link"]
        if not link: continue
        lines.append(f"link: {link['bytes'] / link['seconds'] / 1e9:.2f} GB/s in each direction")
    for world in run["memory"]:
        for row in world["memory"]:
            mib = (row["peak_extra_bytes"] + row["inputs"]) / 2 ** 20
            memory.append(row | dict(ranks=world["world"], mib=mib))
    formats = dict(name="", ranks="", tokens=",", mib=".1f")
    titles = dict(mib="MiB with q, k, v, dout")
    lines.append(str(Table("memory per rank, forward+backward", memory, formats, titles)))
    return "\n\n".join(lines)


def arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    quick = "a toy size, to see that everything runs"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", help="a folder for the results, instead of nbs/results")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    parts = dict(times=times_of_rank, memory=memory_of_rank)
    if args.job: return run_rank(args.job, args.rank, parts[args.job["part"]])
    config = QUICK if args.quick else CONFIG
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worlds = [run_world(config, n, "times", folder) for n in config["worlds"]]
        memory = [run_world(config, n, "memory", folder) for n in config["memory_worlds"]]
    run = dict(suite="ring", quick=args.quick, config=config, environment=environment(),
               worlds=worlds, memory=memory)
    print(table(run))
    if args.out or not args.quick: print(f"\nwritten to {save_run(run, args.out)}")


if __name__ == "__main__": main()
