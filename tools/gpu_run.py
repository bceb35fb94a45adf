"""Correctness, then speed, on this machine's NVIDIA GPU: `make gpu`, or `python3 tools/gpu_run.py`. Needs torch, triton and numpy, nothing else.

First a grid of small problems against the float64 oracle; if one is wrong, nothing is timed. Then every contender takes turns on the same tensors, and medians go into one JSON file:
`$OUT/gpu_run.json` if OUT is set, else `nbs/results/<gpu>/gpu_run.json` (`gpu_run_segments.json` and `gpu_run_blocks.json` with `--only`, which halves the work).
`--dry-run` does all of it on CPU, in Triton's interpreter, at toy sizes, and writes nothing to nbs/.
"""
import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from dataclasses import replace
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path

START = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if "--dry-run" in sys.argv: os.environ["TRITON_INTERPRET"] = "1"
os.environ["HILBERT_ATTN_CACHE"] = tempfile.mkdtemp()  # tiles are timed afresh

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from hilbert_attn.autograd import HybridAttentionFunction, triton_attention, triton_forward
from hilbert_attn.block_sparse import block_lists, lists_from_block_mask, lists_to_operands
from hilbert_attn.curves import curve_order
from hilbert_attn.kernels import block_sparse as block_kernels
from hilbert_attn.kernels import forward as kernels
from hilbert_attn.kernels.block_sparse import block_triton_attention
from hilbert_attn.patterns import NeighborhoodPattern, SegmentPattern, SlidePattern, TilesSharedPattern, WindowPattern, attention_mask
from hilbert_attn.reference import compare_to_oracle

DRY = kernels.interpreted
DEVICE = "cpu" if DRY else "cuda"


def note(*text): print(f"[{time.monotonic() - START:5.0f} s]", *text, flush=True)


# ---- correctness

def correctness_cases() -> list[dict]:
    "The grid: every dtype, mode and trait, sizes that are a multiple of nothing, and every tile that the tuner may choose."
    base = dict(n=200, w=200, r=1, mode="residue", heads=2, kv_heads=2, d=64, dtype="bfloat16", order=False, causal=False, masked=False)
    cases = [base | dict(dtype=t, d=d, order=o, n=190, w=150, r=3) for t in ("bfloat16", "float16", "float32", "float64") for d in (16, 64, 80) for o in (False, True)]
    cases += [base | dict(d=d, n=700, w=700, order=o, heads=1, kv_heads=1) for d in (32, 64, 96, 128, 192, 256) for o in (False, True)]
    cases += [base | dict(d=d, n=700, w=600, r=2, causal=c, masked=m, order=o) for d in (64, 128) for c, m, o in ((True, False, False), (True, False, True), (False, True, False), (True, True, True))]
    cases += [base | dict(mode=m, n=430, w=w, r=r, heads=4, kv_heads=2, order=o, causal=c) for m in ("residue", "keys", "longnet") for w, r in ((300, 2), (64, 4), (33, 3), (7, 7)) for o, c in ((False, False), (True, False), (False, True))]
    cases += [base | dict(d=d, n=n, w=n // s, r=r, order=o) for d in (64, 128) for n, s, r in ((512, 4, 8), (512, 2, 4), (512, 4, 2), (512, 4, 1)) for o in (False, True)]  # small groups
    cases += [base | dict(d=d, n=700, w=700, dropout=0.25, order=o) for d in (64, 128) for o in (False, True)]
    cases += [base | dict(d=d, n=1024, w=512, r=2, heads=1, kv_heads=1, kernel=kernel, tile=index) for (kernel, d), tiles in kernels._CANDIDATES.items() for index in range(len(tiles))]
    if DRY: cases = [c | dict(n=40, w=min(c["w"], 40), r=min(c["r"], 4), d=min(c["d"], 32), heads=min(c["heads"], 2), kv_heads=1) for c in random.Random(0).sample(cases, 24)]
    return cases


PATTERNS = dict(window=WindowPattern, neighborhood=NeighborhoodPattern, slide=SlidePattern, tiles_shared=TilesSharedPattern, segment=SegmentPattern)


def block_correctness_cases() -> list[dict]:
    "The same for the block kernels. A pattern is its name and arguments, or \"random\" for block masks that differ from head to head."
    base = dict(pattern=("neighborhood", (20, 22), 9), curve="hilbert", block=(128, 128), heads=2, kv_heads=2, d=64, dtype="bfloat16", causal=False, masked=False, registers=0)
    patterns = [("window", (20, 22), (5, 8), (1, 2)), ("neighborhood", (20, 22), (7, 5), (2, 1), (True, False)), ("neighborhood", (5, 9, 8), 4), ("slide", 430, 91), ("tiles_shared", 500, 3, 17, 70), ("segment", 430, 200, 3), ("random", 430)]
    cases = [base | dict(dtype=t, d=d, curve=c, registers=3) for t in ("bfloat16", "float16", "float32", "float64") for d in (16, 64, 80) for c in ("hilbert", None)]
    cases += [base | dict(d=d, curve=c) for d in (32, 96, 128, 192, 256) for c in ("hilbert", None)]
    cases += [base | dict(pattern=p, block=b, curve=c, registers=r, causal=r > 0, kv_heads=1) for p in patterns for b, c, r in (((128, 128), "hilbert", 0), ((128, 64), None, 3), ((64, 64), "hilbert", 3), ((48, 80), None, 0))]
    cases += [base | dict(d=d, causal=c, masked=True, pattern=p) for d in (64, 128) for c in (False, True) for p in patterns[2:5]]
    cases += [base | dict(d=d, dropout=0.25, pattern=p) for d in (64, 128) for p in patterns[2:4]]
    cases += [base | dict(pattern=("slide", 1000, 400), d=d, heads=1, kv_heads=1, curve=None if tile.tma else "hilbert", kernel=kernel, tile=(d, index)) for (kernel, d), tiles in kernels._CANDIDATES.items() for index, tile in enumerate(tiles)]
    if DRY:
        small = dict(neighborhood=("neighborhood", (5, 8), 3), window=("window", (5, 8), 3), slide=("slide", 40, 9), tiles_shared=("tiles_shared", 50, 3, 7, 10), segment=("segment", 40, 20, 3), random=("random", 40))
        cases = [c | dict(pattern=small[c["pattern"][0]], block=(16, 32), d=min(c["d"], 32), kv_heads=1) for c in random.Random(0).sample(cases, 16)]
    return cases


INEXACT = "less exact than the rule allows: "  # reported, but no reason not to time

broken = None  # the case after which this process' GPU context was lost


def no_tuning(): os.environ["HILBERT_ATTN_AUTOTUNE"] = "0"  # a dozen processes share the GPU: nothing can be timed


def check_case(case: dict) -> str | None:
    "None if the case agrees with the oracle, else what is wrong."
    global broken
    if broken: return f"{case}: not run, the GPU context was lost in {broken}"
    try:
        if "pattern" in case: return check_block_case(case)
        n, d, dtype = case["n"], case["d"], getattr(torch, case["dtype"])
        generator = torch.Generator().manual_seed(n * d)
        q, k, v = (torch.randn(1, h, n, d, generator=generator).to(DEVICE, dtype) for h in (case["heads"], case["kv_heads"], case["kv_heads"]))
        pattern = SegmentPattern.for_heads(n, case["heads"], case["w"], case["r"], case["mode"])
        options = dict(order=torch.randperm(n, generator=generator).to(DEVICE) if case["order"] else None, causal=case["causal"],
                       key_mask=(torch.rand(1, n, generator=generator) < 0.7).to(DEVICE) if case["masked"] else None)
        mask = attention_mask(pattern, **options, device=DEVICE)
        if "dropout" in case:
            settings = (options["order"], options["key_mask"], torch.tensor([11], device=DEVICE), pattern.segment_size, pattern.dilation_rate, pattern.mode, [0], options["causal"], d ** -0.5, case["dropout"])
            return check_dropout(lambda *x: triton_forward(*x, *settings)[0], q, k, v, mask, case["dropout"])
        run = lambda *x: triton_attention(*x, pattern, **options)
        if "tile" in case: run = lambda *x: with_tile(x, pattern, options, case["kernel"], kernels._row_of(kernels._CANDIDATES, case["kernel"], d)[case["tile"]])
        return compare(case, run, q, k, v, mask)
    except Exception as e:
        if "CUDA error" in str(e): broken = case
        return f"{case}\n{traceback.format_exc(limit=-3)}"


def compare(case: dict, run, q, k, v, mask) -> str | None:
    "Against the oracle, and a second run against the first."
    report = compare_to_oracle(run, q, k, v, mask)
    if not report.ok:
        gross = any(not report.errors[name] <= 8 * report.allowed[name] for name in report.errors)
        return f"{'' if gross else INEXACT}{case}\n{report}"
    with torch.no_grad(): first, second = run(q, k, v), run(q, k, v)
    if not all(torch.equal(a, b) for a, b in zip(first, second)): return f"{case}: two runs differ"


def check_block_case(case: dict) -> str | None:
    name, *arguments = case["pattern"]
    n, d, dtype, registers, block = *((math.prod(arguments[0]) if isinstance(arguments[0], tuple) else arguments[0]), case["d"]), getattr(torch, case["dtype"]), case["registers"], case["block"]
    generator, m = torch.Generator().manual_seed(n * d), n + registers
    q, k, v = (torch.randn(1, h, count, d, generator=generator).to(DEVICE, dtype) for h, count in ((case["heads"], n), (case["kv_heads"], m), (case["kv_heads"], m)))
    key_mask = (torch.rand(1, m, generator=generator) < 0.7).to(DEVICE) if case["masked"] else None
    if name == "random":
        kept = torch.rand(1, case["heads"], -(-n // block[0]), -(-m // block[1]), generator=generator) < 0.5
        lists = lists_from_block_mask(kept, n, m, block, order=case["curve"] and curve_order(n, case["curve"]), causal=case["causal"])
        mask = lists.mask()
    else:
        pattern = PATTERNS[name](*arguments)
        order = case["curve"] and curve_order(getattr(pattern, "grid", n - getattr(pattern, "shared", 0)), case["curve"])
        lists = block_lists(pattern, order=order, block_size=block, causal=case["causal"], registers=registers)
        mask = F.pad(pattern.mask(order) & (torch.ones(n, n, dtype=torch.bool).tril() | (not case["causal"])), (0, registers), value=True)
    lists, mask = lists.to(DEVICE), mask.to(DEVICE)
    if key_mask is not None: mask = mask & key_mask[:, None, None]
    if "dropout" in case:
        return check_dropout(lambda *x: torch.ops.hilbert_attn.block_triton_forward(*x, key_mask, torch.tensor([11], device=DEVICE), d ** -0.5, case["dropout"], *lists_to_operands(lists))[0], q, k, v, mask, case["dropout"])
    run = lambda *x: block_triton_attention(*x, lists, key_mask=key_mask)
    if "tile" in case: run = lambda *x: WithBlockTile.apply(*x, lists, case["kernel"], kernels._CANDIDATES[case["kernel"], case["tile"][0]][case["tile"][1]])
    return compare(case, run, q, k, v, mask)


class WithBlockTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lists, kernel, tile):
        ctx.rest = lists, kernel, tile
        out, lse = block_kernels.block_attention_forward(q, k, v, lists, tile=tile if kernel == "forward" else None)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        lists, kernel, tile = ctx.rest
        return *block_kernels.block_attention_backward(*ctx.saved_tensors, dout, dlse, lists, tiles=None if kernel == "forward" else {kernel: tile}), None, None, None


class WithTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pattern, options, kernel, tile):
        ctx.rest = pattern, options, kernel, tile
        out, lse = kernels.attention_forward(q, k, v, pattern.segment_size, pattern.dilation_rate, pattern.mode, pattern.offsets, **options, tile=tile if kernel == "forward" else None)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        from hilbert_attn.kernels.backward import attention_backward
        pattern, options, kernel, tile = ctx.rest
        tiles = None if kernel == "forward" else {kernel: tile}
        return *attention_backward(*ctx.saved_tensors, dout, dlse, pattern.segment_size, pattern.dilation_rate, pattern.mode, pattern.offsets, **options, tiles=tiles), None, None, None, None


def with_tile(x, pattern, options, kernel, tile): return WithTile.apply(*x, pattern, options, kernel, tile)


def check_dropout(run, q, k, v, mask, p) -> str | None:
    "Forward and backward against the plain expression with the mask that the kernel drew, which values made of unit vectors make visible."
    m, d = k.shape[2:]
    kept = torch.zeros(*q.shape[:3], m, device=DEVICE)
    for start in range(0, m, d):
        probe = torch.zeros_like(v)
        size = min(d, m - start)
        probe[:, :, start:start + size, :size] = torch.eye(size, dtype=v.dtype, device=DEVICE)
        kept[..., start:start + size] = (run(q, k, probe)[..., :size] != 0).float()
    share = kept[mask.expand_as(kept)].mean().item()
    if abs(share - (1 - p)) > 5 * math.sqrt(p * (1 - p) / mask.expand_as(kept).sum().item()): return f"dropout keeps {share:.3f} of the weights, expected {1 - p}"
    x = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, q.dtype)
    ours = torch.autograd.grad(run(*x), x, upstream)
    weights = (exact[0] @ exact[1].repeat_interleave(q.shape[1] // k.shape[1], 1).mT * d ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1) * kept / (1 - p)
    theirs = torch.autograd.grad(weights @ exact[2].repeat_interleave(q.shape[1] // k.shape[1], 1), exact, upstream.double())
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs)]
    if max(errors) > 0.02: return f"gradients under dropout are off by {errors}"


def correctness(only: str, seconds: float = 240) -> dict:
    wrong, cases = [], [*(correctness_cases() if only != "blocks" else []), *(block_correctness_cases() if only != "segments" else [])]

    def take(message, done):
        if message: wrong.append(message); note("WRONG:", message)
        if done % 20 == 0: note(f"checked {done} of {len(cases)}")

    if DRY:
        for done, case in enumerate(cases, 1): take(check_case(case), done)
    else:
        pool = ProcessPoolExecutor(min(12, max(1, (os.cpu_count() or 2) - 2)), mp_context=get_context("spawn"), initializer=no_tuning)
        waiting = {pool.submit(check_case, case): case for case in cases}
        try:
            for done, future in enumerate(as_completed(list(waiting), timeout=seconds), 1):
                case = waiting.pop(future)
                take(f"{case}\n{future.exception()}" if future.exception() else future.result(), done)
        except TimeoutError:
            for case in waiting.values(): take(f"{case}: no result after {seconds} s", 1)
            for process in list(pool._processes.values()): process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
    wrong += [message for check in (check_large_strides, check_graph) if (message := check())]
    return dict(cases=len(cases), wrong=wrong)


def check_large_strides() -> str | None:
    "Offsets beyond 2^31 elements."
    if DRY: return None
    step = 2 ** 30
    storage = torch.empty(2 * step + 512, dtype=torch.float16, device=DEVICE)
    x = [storage.as_strided((1, 1, 3, 64), (step, step, step, 1), 64 * i) for i in range(3)]
    near = [torch.randn(1, 1, 3, 64, device=DEVICE, dtype=torch.float16) for _ in x]
    for a, b in zip(x, near): a.copy_(b)
    lists = block_lists(SegmentPattern(3, 3), block_size=(128, 128), device=DEVICE)
    for name, run in (("segments", lambda *t: triton_attention(*t, SegmentPattern(3, 3))), ("blocks", lambda *t: block_triton_attention(*t, lists))):
        far_out, near_out = (run(*t)[0] for t in (x, near))
        if not torch.equal(far_out, near_out): return f"{name}: offsets beyond 2^31 elements go elsewhere"


def check_graph() -> str | None:
    "Captured in a CUDA graph and replayed on other values."
    if DRY: return None
    x = [torch.randn(1, 4, 2048, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    pattern, order, upstream = SegmentPattern(2048, 1024, 4), curve_order(2048, device=DEVICE), torch.randn_like(x[0])
    lists = block_lists(TilesSharedPattern(2048, 3, shared=300), block_size=(128, 64), device=DEVICE)
    for name, attention in (("segments", lambda: triton_attention(*x, pattern, order=order)), ("blocks", lambda: block_triton_attention(*x, lists))):
        def run(): out = attention()[0]; return out, *torch.autograd.grad(out, x, upstream)
        replay, outputs = captured(run)
        with torch.no_grad():
            for t in x: t.normal_()
        replay()
        if not all(torch.equal(a, b) for a, b in zip(outputs, run())): return f"{name}: a replayed CUDA graph gives other results"


# ---- timing

def captured(run):
    "A function that replays `run` as a CUDA graph, so that the time is the GPU's and not Python's, and what it writes to."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): outputs = run()
    return graph.replay, outputs


def quantiles(times: list[float]) -> dict:
    times = sorted(times)
    pick = lambda share: times[min(len(times) - 1, int(share * len(times)))]
    return dict(ms=pick(0.5), p20=pick(0.2), p80=pick(0.8), repeats=len(times))


_flush = None


def interleaved(runs: dict, seconds: float) -> dict:
    "Milliseconds of each run, taking turns, with a cold L2 cache."
    global _flush
    times = {name: [] for name in runs}
    if DRY:
        for _ in range(2):
            for name, run in runs.items():
                begin = time.perf_counter(); run(); times[name].append((time.perf_counter() - begin) * 1e3)
        return {name: quantiles(t) for name, t in times.items()}
    if _flush is None: _flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 7 or (time.monotonic() < end and rounds < 60):
        marks = {}
        for name, run in runs.items():
            _flush.zero_()
            marks[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            marks[name][0].record(); run(); marks[name][1].record()
        torch.cuda.synchronize()
        for name, (a, b) in marks.items(): times[name].append(a.elapsed_time(b))
        rounds += 1
    return {name: quantiles(t) for name, t in times.items()}


def device_rates() -> dict:
    "What this device reaches: bf16 matrix products (the best of three shapes) and copies."
    dtype = torch.float32 if DRY else torch.bfloat16
    sizes, copy_bytes = ((64,), 1 << 16) if DRY else ((4096, 8192, 16384), 2 << 30)
    products, count = {}, {}
    for n in sizes:
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        products[str(n)] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
        count[str(n)] = 2 * n ** 3
    source = torch.empty(copy_bytes // 2, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    timed = interleaved(products | {"copy": lambda: target.copy_(source)}, 4)
    return dict(matmul_tflops=max(count[n] / timed[n]["ms"] / 1e9 for n in count), copy_gbs=2 * source.numel() / timed["copy"]["ms"] / 1e6, details=timed)


def launch_us() -> float | None:
    "Microseconds of Python per forward call, GPU not counted."
    if DRY: return None
    x = [torch.randn(1, 1, 64, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    run = lambda: triton_attention(*x, SegmentPattern(64, 64))
    for _ in range(20): run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(200): run()
    return (time.perf_counter() - begin) * 1e6 / 200


# ---- contenders

def grouped(x, order, w, r):
    "Rows in group order: (B H N / w, r, w / r, D), a copy. Two dimensions of groups, since kernels launch at most 65,535 programs along one."
    B, H, N, D = x.shape
    if order is not None: x = x[:, :, order]
    return x.reshape(B * H * N // w, w // r, r, D).transpose(1, 2).contiguous()


class Permute(torch.autograd.Function):
    "Rows by `order`. The gradient is a gather too, by the inverse: PyTorch's own index gradients would add atomically, which a permutation does not need."
    @staticmethod
    def forward(ctx, x, order, rank):
        ctx.save_for_backward(order, rank)
        return x.index_select(2, order)

    @staticmethod
    def backward(ctx, grad):
        order, rank = ctx.saved_tensors
        return grad.index_select(2, rank), None, None


class GatherSDPA:
    "Permute into groups, PyTorch's fastest dense attention, permute back: the best that can be had without a kernel of one's own."
    def __init__(self, order, w, r): self.order, self.w, self.r, self.rank = order, w, r, None if order is None else order.argsort()
    def __call__(self, q, k, v):
        B, H, N, D = q.shape
        if self.order is not None: q, k, v = (Permute.apply(x, self.order, self.rank) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*(grouped(x, None, self.w, self.r) for x in (q, k, v)))
        out = out.transpose(1, 2).reshape(B, H, N, D)
        return out if self.order is None else Permute.apply(out, self.rank, self.order)


def naive(q, k, v, mask): return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def flex(n, w, r, order):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    position = torch.arange(n, device=DEVICE) if order is None else order.argsort()
    segment, residue = position // w, position % w % r
    mask = create_block_mask(lambda b, h, i, j: (segment[i] == segment[j]) & (residue[i] == residue[j]), None, None, n, n, device=DEVICE, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def contenders(case: dict, x: list) -> dict:
    "Name -> (function of q, k, v, tensors that it takes)."
    n, w, r, order, causal = case["n"], case["w"], case["r"], case["order_tensor"], case.get("causal", False)
    pattern = SegmentPattern(n, w, r)
    runs = {"triton": (lambda *t: triton_attention(*t, pattern, order=order, causal=causal)[0], x)}
    wanted = case["peers"]
    if "groups" in wanted and not DRY:  # dense kernels on groups that somebody else has gathered: the same FLOPs, nothing permuted
        already = [grouped(t.detach(), order, w, r).requires_grad_() for t in x]
        def forced(backend):
            def run(*t):
                with sdpa_kernel(backend): return F.scaled_dot_product_attention(*t, is_causal=causal)
            return run
        runs["cudnn, groups given"] = forced(SDPBackend.CUDNN_ATTENTION), already
        runs["flash, groups given"] = forced(SDPBackend.FLASH_ATTENTION), already
    if "dense" in wanted and not DRY:
        def dense(*t):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION): return F.scaled_dot_product_attention(*t, is_causal=causal)
        runs["cudnn, dense N x N"] = dense, x
    if "gather" in wanted: runs["gather + SDPA"] = GatherSDPA(order, w, r), x
    if "hybrid" in wanted: runs["hybrid"] = (lambda *t: HybridAttentionFunction.apply(*t, order, w, r, t[0].shape[-1] ** -0.5)[0]), x
    if "mask" in wanted:
        mask = attention_mask(pattern, order=order, device=DEVICE)
        runs["sdpa_mask"] = (lambda *t: F.scaled_dot_product_attention(*t, attn_mask=mask)), x
        runs["naive"] = (lambda *t: naive(*t, mask)), x
    if "flex" in wanted and not DRY: runs["flex"] = flex(n, w, r, order), x
    return runs


def flex_blocks(lists):
    "FlexAttention with the mask of these lists, whose slots are its tokens."
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    lo, hi, at, (BM, BN), kinds = lists.lo, lists.hi, lists.at, lists.block_size, lists.kinds()[0].to(DEVICE)
    def attended(b, h, i, j):
        if at is None: return kinds[i // BM, j // BN] > 0
        seen = (lo[0][i] <= at[0][j]) & (at[0][j] <= hi[0][i])
        for a in range(1, len(at)): seen = seen & (lo[a][i] <= at[a][j]) & (at[a][j] <= hi[a][i])
        return seen | (at[0][j] == -1)
    mask = create_block_mask(attended, None, None, lists.num_queries, lists.num_keys, device=DEVICE, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def through(attention, tokens, rank):
    "Attention on permuted tokens, the permutation of q, k, v and of the output included."
    if tokens is None: return attention
    return lambda q, k, v: Permute.apply(attention(*(Permute.apply(x, tokens, rank) for x in (q, k, v))), rank, tokens)


def block_contenders(case: dict, x: list) -> dict:
    "The same for block lists. `triton` gathers inside the kernel; `permuted` moves tokens into slots before and back after; `laid out` finds them there."
    runs, pattern = {}, case["pattern_object"]
    for number, block in enumerate(case["blocks"]):
        lists = block_lists(pattern, order=case["order_tensor"], block_size=block, device=DEVICE)
        name = "triton" if number == 0 else f"triton {block[0]}x{block[1]}"
        runs[name] = (lambda *t, lists=lists: block_triton_attention(*t, lists)[0]), x
        tokens = rank = None
        flat = lists
        if lists.q_tokens is not None:
            if not torch.equal(lists.q_tokens, lists.k_tokens) or (lists.q_tokens < 0).any(): continue  # slots are no permutation of the tokens
            tokens, flat = lists.q_tokens.long(), replace(lists, q_tokens=None, k_tokens=None)
            rank = tokens.argsort()
            laid_out = lambda *t, flat=flat: block_triton_attention(*t, flat)[0]
            runs[f"{name}, permuted"] = through(laid_out, tokens, rank), x
            runs[f"{name}, laid out"] = laid_out, [t.detach()[:, :, tokens].requires_grad_() for t in x]
        if number == 0 and not DRY: runs["flex, permuted" if tokens is not None else "flex"] = through(flex_blocks(flat), tokens, rank), x
    if not DRY:
        def dense(*t):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION): return F.scaled_dot_product_attention(*t)
        runs["cudnn, dense N x N"] = dense, x
    return runs


def peak_mib(run) -> float | None:
    "Memory that a run needs on top of its inputs."
    if DRY: return None
    torch.cuda.synchronize(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def minimal_bytes(case: dict, kind: str, size: int) -> int:
    "The least that has to be moved: each tensor once."
    q, kv = case["h"] * case["n"] * case["d"] * size, case["kv"] * case["n"] * case["d"] * size
    forward = 2 * q + 2 * kv
    return forward if kind == "forward" else forward + (3 * q + 2 * kv) + (q + 2 * kv)  # backward: q, o, do, k, v in; dq, dk, dv out


def measure(case: dict, rates: dict) -> list[dict]:
    n, h, kv, d = (case[key] for key in ("n", "h", "kv", "d"))
    dtype = torch.float32 if DRY else torch.bfloat16
    if blocks := "pattern" in case:
        name, *arguments = case["pattern"]
        pattern = case["pattern_object"] = PATTERNS[name](*arguments)
        case["order_tensor"] = around_centre(case["around"]).to(DEVICE) if "around" in case else curve_order(case["grid"], case["curve"], device=DEVICE) if case["curve"] else None
    else:
        pattern = SegmentPattern(n, case["w"], case["r"])
        case["order_tensor"] = curve_order(n, device=DEVICE) if case["order"] else None
    torch.manual_seed(0)
    x = [torch.randn(1, heads, n, d, device=DEVICE, dtype=dtype).requires_grad_() for heads in (h, kv, kv)]
    pairs = pattern.pairs(h) / (2 if case.get("causal") else 1)
    rows, label = [], {k: v for k, v in case.items() if k not in ("order_tensor", "pattern_object", "peers")}
    functions = (block_contenders if blocks else contenders)(case, x)
    if blocks:
        lists = block_lists(pattern, order=case["order_tensor"], block_size=case["blocks"][0], device=DEVICE)
        visited = lists.rows.index.numel() * math.prod(lists.block_size)
        label |= dict(ceiling=n * n * h / pairs, visited_pairs_that_count=pairs / h / visited)  # how much faster than dense the pairs alone allow
    for kind in ("forward", "forward+backward"):
        runs, peaks, failed, eager = {}, {}, {}, {}
        for name, (function, tensors) in functions.items():
            upstream = torch.randn(tensors[0].shape, device=DEVICE, dtype=dtype)
            def run(function=function, tensors=tensors, upstream=upstream, kind=kind):
                if kind == "forward":
                    with torch.no_grad(): return function(*tensors)
                return torch.autograd.grad(function(*tensors), tensors, upstream)
            try:
                run()
                peaks[name] = peak_mib(run)
            except Exception as e:
                failed[name] = f"{type(e).__name__}: {e}".splitlines()[0][:300]
                continue
            try: runs[name] = run if DRY else captured(run)[0]
            except Exception as e: runs[name], eager[name] = run, f"{type(e).__name__}: {e}".splitlines()[0][:300]
        timed = interleaved(runs, case.get("seconds", 0.8))
        flops = pairs * 4 * d * (1 if kind == "forward" else 3.5)
        moved = minimal_bytes(case, kind, x[0].element_size())
        for name, t in timed.items():
            tflops, gbs = flops / t["ms"] / 1e9, moved / t["ms"] / 1e6
            dense = timed.get("cudnn, dense N x N") if blocks else None
            against = dict(over_dense=dense["ms"] / t["ms"], share_of_ceiling=dense["ms"] / t["ms"] / label["ceiling"]) if dense else {}
            rows.append(dict(case=label, kind=kind, name=name, **t, tflops=tflops, share_of_matmul=tflops / rates["matmul_tflops"], gbs_minimal=gbs, share_of_copy=gbs / rates["copy_gbs"], peak_mib=peaks[name], **against, **({"not_captured": eager[name]} if name in eager else {})))
        for name, why in failed.items(): rows.append(dict(case=label, kind=kind, name=name, failed=why))
        ours = timed["triton"]["ms"]
        note(f"{case['name']:34} {kind:17} triton {ours:8.3f} ms {flops / ours / 1e9:6.0f} TFLOP/s {moved / ours / 1e6:6.0f} GB/s |", ", ".join(f"{name} {t['ms'] / ours:.2f}x" for name, t in timed.items() if name != "triton"),
             *(f"| {name} failed: {why[:80]}" for name, why in failed.items()))
    return rows


def speed_cases() -> list[dict]:
    "What is timed, most wanted first, since time may run out."
    base = dict(h=16, kv=16, d=64, order=False)
    large = [base | dict(n=32768, w=w, r=4, d=d, order=o, peers=("groups", "gather") + ("hybrid",) * (w == 4096)) for w in (4096, 16384) for d in (64, 128) for o in (False, True)]
    claim = [base | dict(n=8192, w=2048, r=4, h=12, kv=12, d=64, order=o, peers=("groups", "gather", "mask", "hybrid", "dense") + ("flex",) * (not o)) for o in (False, True)]
    small = [base | dict(n=131072, w=4 * keys, r=4, d=d, order=o, peers=("gather", "groups")) for keys in (16, 64, 128) for d in (64, 128) for o in (False, True)]
    middle = [base | dict(n=65536, w=4 * keys, r=4, d=d, order=o, peers=("gather", "groups")) for keys in (256, 512) for d in (64, 128) for o in (False, True)]
    more = [base | dict(n=16384, w=16384, r=1, d=d, causal=True, peers=("groups",)) for d in (64, 128)] + [base | dict(n=32768, w=4096, r=4, kv=4, d=128, peers=())]
    more += [base | dict(n=32768, w=4096, r=4, d=80, order=o, peers=("gather",)) for o in (False, True)] + [base | dict(n=131072, w=4 * 32, r=4, order=True, peers=("gather",)), base | dict(n=16384, w=4096, r=1, order=True, peers=("groups", "gather", "flex", "dense"))]
    cases = large[:4] + claim + small[:4] + middle[:4] + large[4:] + small[4:] + middle[4:] + more
    if DRY: cases = [c | dict(n=64, w=64 // (2 if i % 2 else 1), r=2 if c["r"] > 1 else 1, h=2, kv=2 if c["kv"] == c["h"] else 1, d=16) for i, c in enumerate(large[:2] + claim[:1] + small[:1] + more[:3])]
    for c in cases:
        c["name"] = f"N{c['n']} w{c['w']} r{c['r']} D{c['d']}{' order' if c['order'] else ''}{' causal' if c.get('causal') else ''}{' GQA' if c['kv'] != c['h'] else ''}"
    return cases


def around_centre(side: int) -> torch.Tensor:
    "The Hilbert order of an image without its centre, a square of a quarter of the side: for tokens that lie row by row."
    cells = torch.arange(side * side)
    y, x = cells // side - side * 3 // 8, cells % side - side * 3 // 8
    outside = (torch.minimum(y, x) < 0) | (torch.maximum(y, x) >= side // 4)
    order = curve_order((side, side))
    return (outside.cumsum(0) - 1)[order[outside[order]]]


def block_speed_cases() -> list[dict]:
    "HilbertA's four settings (arXiv 2509.26538; shared: the text and the image's centre, which gives the paper's ceilings) and NATTEN's two, with the windows' blocks also half as wide, since that decides how many visited pairs count."
    base = dict(h=24, kv=24, d=128, curve="hilbert", blocks=[(128, 128)])
    cases = [base | dict(name=f"{16 * side}^2 image, {tiles} tiles, 512 text", n=side ** 2 + 512, pattern=("tiles_shared", side ** 2 + 512, tiles, 0, 512 + side ** 2 // 16), around=side) for side in (64, 128) for tiles in (4, 16)]
    cases += [base | dict(name="256x256, window 80x80", n=65536, pattern=("neighborhood", (256, 256), 80), grid=(256, 256), blocks=[(128, 128), (128, 64), (64, 64)], seconds=2.5),
              base | dict(name="32768, window 2048", n=32768, pattern=("neighborhood", 32768, 2048), curve=None, blocks=[(128, 128), (128, 64)], seconds=1.5)]
    small = dict(h=2, kv=1, d=16, blocks=[(16, 16), (16, 32)])
    if DRY: cases = [cases[0] | small | dict(n=80, pattern=("tiles_shared", 80, 4, 0, 20), around=8), cases[4] | small | dict(n=64, pattern=("neighborhood", (8, 8), 3), grid=(8, 8)), cases[5] | small | dict(n=64, pattern=("neighborhood", 64, 9))]
    return cases


def block_verdicts(rows: list[dict]) -> list[dict]:
    "The targets for blocks: a share of what the number of pairs allows, with moving tokens about counted, by the fastest of our variants."
    found = []
    for name in dict.fromkeys(row["case"]["name"] for row in rows if "pattern" in row["case"]):
        mine = [row for row in rows if row["case"]["name"] == name and "ms" in row]
        both = {kind: {row["name"]: row for row in mine if row["kind"] == kind} for kind in ("forward", "forward+backward")}
        ours = [key for key in both["forward"] if key.startswith("triton") and not key.endswith("laid out") and key in both["forward+backward"]]
        dense = "cudnn, dense N x N"
        if not ours or any(dense not in table for table in both.values()): continue
        label = both["forward"][dense]["case"]
        forward = {key: both["forward"][key]["ms"] for key in (*ours, dense)}
        backward = {key: both["forward+backward"][key]["ms"] - forward[key] for key in (*ours, dense)}
        for kind, times, share in (("forward", forward, 0.9), ("backward", backward, 0.8)):
            best = min(ours, key=times.get)
            value, needed = times[dense] / times[best] / label["ceiling"], share * label["visited_pairs_that_count"]
            found.append(dict(target=f"share of the pair-count ceiling, {best}", case=name, kind=kind, measured=value, needed=needed, met=value >= needed))
    return found


def verdicts(rows: list[dict]) -> list[dict]:
    "The targets, as set for an H200, each with what was measured."
    rows = [row for row in rows if "pattern" not in row["case"]]
    at = lambda row: row["case"]["w"] // row["case"]["r"]
    table = {(row["case"]["name"], row["kind"], row["name"]): row for row in rows if "ms" in row}
    found = []

    def judge(row, target, value, needed): found.append(dict(target=target, case=row["case"]["name"], kind=row["kind"], measured=value, needed=needed, met=value >= needed))

    for row in table.values():
        if row["name"] != "triton" or row["case"]["kv"] != row["case"]["h"] or row["case"].get("causal"): continue
        peer = lambda name, kind=row["kind"]: table.get((row["case"]["name"], kind, name))
        rate, cudnn, gather, masked = at(row), peer("cudnn, groups given"), peer("gather + SDPA"), peer("sdpa_mask")
        if rate >= 1024 and cudnn:
            if row["kind"] == "forward": judge(row, "share of cuDNN's rate on given groups, forward", cudnn["ms"] / row["ms"], 0.85)
            else:
                ours, theirs = (r["ms"] - f["ms"] for r, f in ((row, table[row["case"]["name"], "forward", "triton"]), (cudnn, peer("cudnn, groups given", "forward"))))
                judge(row, "share of cuDNN's rate on given groups, backward", theirs / ours, 0.75)
        if rate <= 512 and gather: judge(row, "times faster than gather + SDPA", gather["ms"] / row["ms"], 1.0)
        if rate <= 128: judge(row, "share of the copy rate on minimal bytes", row["share_of_copy"], 0.6)
        if masked and row["case"]["n"] == 8192 and row["kind"] == "forward+backward": judge(row, "times faster than sdpa_mask", masked["ms"] / row["ms"], 40)
    return found


def environment() -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    info = dict(date=datetime.now(timezone.utc).isoformat(timespec="seconds"), commit=commit, python=sys.version.split()[0], torch=torch.__version__, triton=triton.__version__, dry_run=DRY)
    if DRY: return info | dict(gpu="none, interpreted on CPU")
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip() if any((Path(p) / "nvidia-smi").exists() for p in os.environ["PATH"].split(":")) else ""
    return info | dict(gpu=properties.name, capability=f"{properties.major}.{properties.minor}", multiprocessors=properties.multi_processor_count, memory_gib=round(properties.total_memory / 2 ** 30),
                       cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), driver=driver)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on CPU, in Triton's interpreter, at toy sizes; writes its JSON to $OUT only")
    parser.add_argument("--anyway", action="store_true", help="time even if something was wrong")
    parser.add_argument("--only", choices=("segments", "blocks"), default="", help="half of the work")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop starting new measurements after this long")
    arguments = parser.parse_args()
    if not DRY and not torch.cuda.is_available(): sys.exit("no NVIDIA GPU here: `python3 tools/gpu_run.py --dry-run` goes through the motions on CPU")
    info = environment()
    note(info)
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else None if DRY else ROOT / "nbs" / "results" / "-".join(info["gpu"].lower().split())
    result, file = dict(environment=info, rows=[], skipped=[]), f"gpu_run{arguments.only and '_'}{arguments.only}.json"

    def save():
        result["seconds"] = round(time.monotonic() - START)
        if folder: folder.mkdir(parents=True, exist_ok=True); (folder / file).write_text(json.dumps(result, indent=1))

    result["correctness"] = correctness(arguments.only)
    save()
    found = result["correctness"]["wrong"]
    wrong = sum(not message.startswith(INEXACT) for message in found)
    note(f"{result['correctness']['cases']} cases, {wrong} wrong, {len(found) - wrong} less exact than the rule allows")
    if wrong and not arguments.anyway:
        note("nothing is timed while something is wrong; --anyway overrules")
        return 1
    result["launch_us"] = launch_us()
    result["rates"] = device_rates()
    note(f"this device: {result['rates']['matmul_tflops']:.0f} TFLOP/s in matrix products, {result['rates']['copy_gbs']:.0f} GB/s in copies")
    segments, blocks = speed_cases() if arguments.only != "blocks" else [], block_speed_cases() if arguments.only != "segments" else []
    for case in [*segments[:6], *blocks, *segments[6:]]:
        if time.monotonic() - START > arguments.minutes * 60: result["skipped"].append(case["name"]); continue
        try: result["rows"] += measure(case, result["rates"])
        except Exception as e:
            traceback.print_exc(limit=-3)
            result["skipped"].append(f"{case['name']}: {type(e).__name__}: {e}"[:400])
        save()
        if not DRY: torch.cuda.empty_cache()
    result["verdicts"] = verdicts(result["rows"]) + block_verdicts(result["rows"])
    if DRY: note(f"{len(result['rows'])} rows, {len(result['verdicts'])} verdicts; times on CPU mean nothing"); result["verdicts"] = []
    result["tile_times_ms"] = {key: {str(tile): ms for tile, ms in times.items()} for key, times in kernels.tile_times.items()}
    for v in result["verdicts"]: note("met   " if v["met"] else "MISSED", f"{v['case']:34} {v['kind']:17} {v['target']}: {v['measured']:.2f}, needed {v['needed']}")
    if result["skipped"]: note("not measured:", *result["skipped"])
    save()
    note("done", folder / file if folder else "")
    return 1 if found else 0


if __name__ == "__main__": sys.exit(main())
