"""Correctness, then speed, on this machine's NVIDIA GPU: `make gpu`, or `python3 tools/gpu_run.py`. Needs torch, triton and numpy, nothing else.

First a grid of small problems against the float64 oracle; if one is wrong, nothing is timed. Then every contender takes turns on the same tensors, and medians go into one JSON file:
`$OUT/gpu_run.json` if OUT is set, else `nbs/results/<gpu>/gpu_run.json`. `--dry-run` does all of it on CPU, in Triton's interpreter, at toy sizes, and writes nothing to nbs/.
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
from hilbert_attn.curves import curve_order
from hilbert_attn.kernels import forward as kernels
from hilbert_attn.patterns import SegmentPattern, attention_mask
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


INEXACT = "less exact than the rule allows: "  # reported, but no reason not to time

broken = None  # the case after which this process' GPU context was lost


def no_tuning(): os.environ["HILBERT_ATTN_AUTOTUNE"] = "0"  # a dozen processes share the GPU: nothing can be timed


def check_case(case: dict) -> str | None:
    "None if the case agrees with the oracle, else what is wrong."
    global broken
    if broken: return f"{case}: not run, the GPU context was lost in {broken}"
    try:
        n, d, dtype = case["n"], case["d"], getattr(torch, case["dtype"])
        generator = torch.Generator().manual_seed(n * d)
        q, k, v = (torch.randn(1, h, n, d, generator=generator).to(DEVICE, dtype) for h in (case["heads"], case["kv_heads"], case["kv_heads"]))
        pattern = SegmentPattern.for_heads(n, case["heads"], case["w"], case["r"], case["mode"])
        options = dict(order=torch.randperm(n, generator=generator).to(DEVICE) if case["order"] else None, causal=case["causal"],
                       key_mask=(torch.rand(1, n, generator=generator) < 0.7).to(DEVICE) if case["masked"] else None)
        mask = attention_mask(pattern, **options, device=DEVICE)
        if "dropout" in case: return check_dropout(q, k, v, pattern, options, mask, case["dropout"])
        run = lambda *x: triton_attention(*x, pattern, **options)
        if "tile" in case: run = lambda *x: with_tile(x, pattern, options, case["kernel"], kernels._row_of(kernels._CANDIDATES, case["kernel"], d)[case["tile"]])
        report = compare_to_oracle(run, q, k, v, mask)
        if not report.ok:
            gross = any(not report.errors[name] <= 8 * report.allowed[name] for name in report.errors)
            return f"{'' if gross else INEXACT}{case}\n{report}"
        with torch.no_grad(): first, second = run(q, k, v), run(q, k, v)
        if not all(torch.equal(a, b) for a, b in zip(first, second)): return f"{case}: two runs differ"
    except Exception as e:
        if "CUDA error" in str(e): broken = case
        return f"{case}\n{traceback.format_exc(limit=-3)}"


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


def check_dropout(q, k, v, pattern, options, mask, p) -> str | None:
    "Forward and backward against the plain expression with the mask that the kernel drew, which values made of unit vectors make visible."
    n, d = q.shape[2:]
    seed = torch.tensor([11], device=DEVICE)
    settings = (options["order"], options["key_mask"], seed, pattern.segment_size, pattern.dilation_rate, pattern.mode, [0], options["causal"], d ** -0.5, p)
    kept = torch.zeros(*q.shape[:2], n, n, device=DEVICE)
    for start in range(0, n, d):
        probe = torch.zeros_like(v)
        size = min(d, n - start)
        probe[:, :, start:start + size, :size] = torch.eye(size, dtype=v.dtype, device=DEVICE)
        kept[..., start:start + size] = (triton_forward(q, k, probe, *settings)[0][..., :size] != 0).float()
    share = kept[mask.expand_as(kept)].mean().item()
    if abs(share - (1 - p)) > 5 * math.sqrt(p * (1 - p) / mask.expand_as(kept).sum().item()): return f"dropout keeps {share:.3f} of the weights, expected {1 - p}"
    x = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, q.dtype)
    ours = torch.autograd.grad(triton_forward(*x, *settings)[0], x, upstream)
    weights = (exact[0] @ exact[1].mT * d ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1) * kept / (1 - p)
    theirs = torch.autograd.grad(weights @ exact[2], exact, upstream.double())
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs)]
    if max(errors) > 0.02: return f"gradients under dropout are off by {errors}"


def correctness(seconds: float = 240) -> dict:
    cases, wrong = correctness_cases(), []

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
    far_out, near_out = (triton_attention(*t, SegmentPattern(3, 3))[0] for t in (x, near))
    return None if torch.equal(far_out, near_out) else "offsets beyond 2^31 elements go elsewhere"


def check_graph() -> str | None:
    "Captured in a CUDA graph and replayed on other values."
    if DRY: return None
    x = [torch.randn(1, 4, 2048, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    pattern, order, upstream = SegmentPattern(2048, 1024, 4), curve_order(2048, device=DEVICE), torch.randn_like(x[0])
    def run(): out = triton_attention(*x, pattern, order=order)[0]; return out, *torch.autograd.grad(out, x, upstream)
    replay, outputs = captured(run)
    with torch.no_grad():
        for t in x: t.normal_()
    replay()
    return None if all(torch.equal(a, b) for a, b in zip(outputs, run())) else "a replayed CUDA graph gives other results"


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
    n, w, r, h, kv, d = (case[key] for key in ("n", "w", "r", "h", "kv", "d"))
    dtype = torch.float32 if DRY else torch.bfloat16
    case["order_tensor"] = curve_order(n, device=DEVICE) if case["order"] else None
    torch.manual_seed(0)
    x = [torch.randn(1, heads, n, d, device=DEVICE, dtype=dtype).requires_grad_() for heads in (h, kv, kv)]
    pairs = SegmentPattern(n, w, r).pairs(h) / (2 if case.get("causal") else 1)
    rows, label = [], {k: v for k, v in case.items() if k not in ("order_tensor", "peers")}
    functions = contenders(case, x)
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
            rows.append(dict(case=label, kind=kind, name=name, **t, tflops=tflops, share_of_matmul=tflops / rates["matmul_tflops"], gbs_minimal=gbs, share_of_copy=gbs / rates["copy_gbs"], peak_mib=peaks[name], **({"not_captured": eager[name]} if name in eager else {})))
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


def verdicts(rows: list[dict]) -> list[dict]:
    "The targets, as set for an H200, each with what was measured."
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
    parser.add_argument("--minutes", type=float, default=8.5, help="stop starting new measurements after this long")
    arguments = parser.parse_args()
    if not DRY and not torch.cuda.is_available(): sys.exit("no NVIDIA GPU here: `python3 tools/gpu_run.py --dry-run` goes through the motions on CPU")
    info = environment()
    note(info)
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else None if DRY else ROOT / "nbs" / "results" / "-".join(info["gpu"].lower().split())
    result = dict(environment=info, rows=[], skipped=[])

    def save():
        result["seconds"] = round(time.monotonic() - START)
        if folder: folder.mkdir(parents=True, exist_ok=True); (folder / "gpu_run.json").write_text(json.dumps(result, indent=1))

    result["correctness"] = correctness()
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
    for case in speed_cases():
        if time.monotonic() - START > arguments.minutes * 60: result["skipped"].append(case["name"]); continue
        try: result["rows"] += measure(case, result["rates"])
        except Exception as e:
            traceback.print_exc(limit=-3)
            result["skipped"].append(f"{case['name']}: {type(e).__name__}: {e}"[:400])
        save()
        if not DRY: torch.cuda.empty_cache()
    result["verdicts"] = verdicts(result["rows"])
    if DRY: note(f"{len(result['rows'])} rows, {len(result['verdicts'])} verdicts; times on CPU mean nothing"); result["verdicts"] = []
    result["tile_times_ms"] = {key: {str(tile): ms for tile, ms in times.items()} for key, times in kernels.tile_times.items()}
    for v in result["verdicts"]: note("met   " if v["met"] else "MISSED", f"{v['case']:34} {v['kind']:17} {v['target']}: {v['measured']:.2f}, needed {v['needed']}")
    if result["skipped"]: note("not measured:", *result["skipped"])
    save()
    note("done", folder / "gpu_run.json" if folder else "")
    return 1 if found else 0


if __name__ == "__main__": sys.exit(main())
