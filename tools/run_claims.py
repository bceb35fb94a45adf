"""Puts circulating claims about Hilbert and dilated attention to the test on this machine.

`python tools/run_claims.py [NUMBER ...]` appends one run to nbs/results/<machine>/claims.json. Each
claim is a function that repeats the configuration as exactly as a CPU allows and returns figures.
Verdicts are drawn in nbs/20_claims_on_trial.ipynb, from the figures alone.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from hilbert_attn.backends import hilbert_attention
from hilbert_attn.bench.machine import environment, peak_memory
from hilbert_attn.bench.measuring import measure
from hilbert_attn.bench.results import save_run
from hilbert_attn.block_sparse import block_sparse_attention
from hilbert_attn.blocks.planner import block_lists
from hilbert_attn.blocks.schedule import PostPatternHilbertOptimizer, SparsePatternConfig
from hilbert_attn.curves import curve_order, locality, segment_map
from hilbert_attn.modules import HilbertAttentionCore
from hilbert_attn.patterns import NeighborhoodPattern, SegmentPattern, WindowPattern
from hilbert_attn.sdpa import sdpa_attention

REPEATS = 20


def randn(*shapes, seed=0, grad=False):
    "Standard normal tensors, always the same."
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).requires_grad_(grad) for shape in shapes]


def seconds(calls, repeats=REPEATS):
    "Medians and spreads, JSON-ready."
    keys = ("median", "p20", "p80", "repeats")
    timings = measure(calls, repeats)
    return {name: {key: getattr(t, key) for key in keys} for name, t in timings.items()}


COLD = """
import sys, time, torch, torch.nn.functional as F
torch.manual_seed(0)
q, k, v = (torch.randn(1, 4, 256, 32) for _ in range(3))
def manual(): return (q @ k.transpose(-2, -1) * 32 ** -0.5).softmax(-1) @ v
def sdpa(): return F.scaled_dot_product_attention(q, k, v)
calls = dict(manual=manual, sdpa=sdpa)
for name in sys.argv[1:]:
    start = time.perf_counter(); calls[name](); print(name, time.perf_counter() - start)
"""


def cold(*order):
    "Seconds of the first call of each in a new process: the median of five processes."
    runs = []
    for _ in range(5):
        command = [sys.executable, "-c", COLD, *order]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(dict(line.split() for line in done.stdout.splitlines()))
    return {name: sorted(float(run[name]) for run in runs)[2] for name in order}


def claim_1():
    "SDPA is 40x faster than the manual computation: B1 N256 H4 D32 float32, one cold call each."
    q, k, v = randn(*[(1, 4, 256, 32)] * 3)

    def manual():
        return (q @ k.transpose(-2, -1) * 32 ** -0.5).softmax(-1) @ v

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v)

    warm = seconds({"manual": manual, "SDPA": sdpa}, 200)
    first, second = cold("manual", "sdpa"), cold("sdpa", "manual")
    return dict(
        times=warm,
        cold={"first manual": first, "first sdpa": second},
        ratio=warm["manual"]["median"] / warm["SDPA"]["median"],
        cold_ratio=first["manual"] / first["sdpa"],
        cold_ratio_reversed=second["manual"] / second["sdpa"],
    )


DILATED = dict(segment_size=256, dilation_rate=2, dilation_mode="longnet", offsets=0)
KINDS = ("naive", "dense", "masked", "groups")


def dilated_call(kind: str, small: bool = False):
    "The calls of claim 2, for `peak_memory`."
    n = 256 if small else 1024
    q, k, v = randn(*[(2, 8, n, 64)] * 3)

    def naive():
        return (q @ k.transpose(-2, -1) / 8).softmax(-1) @ v

    def dense():
        return F.scaled_dot_product_attention(q, k, v)

    def masked():
        mask = SegmentPattern(n, 256, 2, "longnet").mask()[None] | torch.eye(n, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, mask)

    def groups():
        return hilbert_attention(q, k, v, curve=None, backend="sdpa", **DILATED)

    return dict(naive=naive, dense=dense, masked=masked, groups=groups)[kind]


def claim_2():
    "2.69 ms and 93.8 % less memory with a dilated SDPA mask: B2 N1024 H8 D64, segment 256, rate 2."
    mask = SegmentPattern(1024, 256, 2, "longnet").mask()
    lengths = (256, 1024, 4096, 16384)
    zeros = {n: 1 - SegmentPattern(n, 256, 2, "longnet").density for n in lengths}
    memory = {kind: peak_memory("run_claims:dilated_call", kind=kind) for kind in KINDS}
    return dict(
        mask_sparsity=1 - mask.double().mean().item(),
        sparsity_by_length=zeros,
        peak_extra_bytes=memory,
        times=seconds({kind: dilated_call(kind) for kind in KINDS}),
    )


def layer_calls():
    "Forward and backward of the same layer, by both ways."
    (x,) = randn((2, 2048, 768))
    options = dict(grid=(32, 64))
    custom = HilbertAttentionCore(768, 12, 128, use_custom_backward=True, **options)
    autograd = HilbertAttentionCore(768, 12, 128, use_custom_backward=False, **options)
    autograd.load_state_dict(custom.state_dict())

    def both(layer):
        def call():
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(layer(leaf).sum(), (leaf, *layer.parameters()))

        return call

    return dict(custom=both(custom), autograd=both(autograd))


def attention_calls():
    "Forward and backward of attention alone, by both ways."
    q, k, v = randn(*[(2, 12, 2048, 64)] * 3, grad=True)
    (upstream,) = randn((2, 12, 2048, 64), seed=1)
    pattern, order = SegmentPattern(2048, 128), curve_order((32, 64))

    def both(custom):
        def call():
            out, _ = sdpa_attention(q, k, v, pattern, order=order, custom_backward=custom)
            return torch.autograd.grad(out, (q, k, v), upstream)

        return call

    return dict(custom=both(True), autograd=both(False))


def claim_3():
    "The custom backward is 4x faster than autograd: B2 N2048 E768 H12, segment 128, rate 1."
    found = dict(layer=seconds(layer_calls(), 12), attention=seconds(attention_calls(), 12))
    for what, times in list(found.items()):
        found[f"ratio_{what}"] = times["autograd"]["median"] / times["custom"]["median"]
    return found


def segments_in_order(n):
    "Segments of 1024 in row-major and in Hilbert order."
    side = int(n ** 0.5)
    plain = randn(*[(1, 4, n, 64)] * 3)
    order = curve_order((side, side))
    moved = [x[:, :, order].contiguous() for x in plain]

    def run(x, **options):
        return lambda: hilbert_attention(*x, grid=(side, side), segment_size=1024, **options)

    calls = {
        "row-major": run(plain, curve=None),
        "Hilbert, gathered in the call": run(plain),
        "Hilbert, laid out before": run(moved, curve=None),
    }
    return dict(tokens=n, times=seconds(calls, 9))


def neighbourhood_in_order(side):
    "Blocks of 64 of a neighbourhood in both orders."
    grid, pattern = (side, side), NeighborhoodPattern((side, side), 13)
    q, k, v = randn(*[(1, 4, side * side, 64)] * 3)
    lists = {
        curve: block_lists(pattern, order=curve_order(grid, curve), block_size=64)
        for curve in ("row_major", "hilbert")
    }

    def run(blocks):
        return lambda: block_sparse_attention(q, k, v, blocks)

    times = seconds({curve: run(x) for curve, x in lists.items()}, 7)
    counts = {curve: len(x.rows.index) for curve, x in lists.items()}
    return dict(tokens=side * side, times=times, blocks=counts)


def claim_5():
    "The Hilbert order improves cache locality: segments of 1024, gathered or laid out once."
    return dict(
        segments=[segments_in_order(n) for n in (4096, 16384, 65536)],
        neighbourhood_13x13_blocks_of_64=[neighbourhood_in_order(side) for side in (64, 128)],
    )


def difference(a, b):
    "The largest."
    return (a - b).abs().max().item()


def claim_6():
    "Ordering tokens inside segments is 1.57x faster on average, 2.60x at N 8192: B1 H8 D64, 1024."
    rows, inside = [], curve_order((32, 32))
    for n in (2048, 4096, 8192, 16384):
        q, k, v = randn(*[(1, 8, n, 64)] * 3)
        order = (torch.arange(0, n, 1024)[:, None] + inside).flatten()

        def plain(q=q, k=k, v=v):
            return hilbert_attention(q, k, v, segment_size=1024, curve=None)

        def ordered(q=q, k=k, v=v, order=order):
            return hilbert_attention(q, k, v, segment_size=1024, order=order)

        times = seconds({"as they lie": plain, "ordered inside segments": ordered}, 11)
        rows.append(dict(tokens=n, difference=difference(plain(), ordered()), times=times))
    return dict(rows=rows)


def claim_7():
    "Ordering the blocks of a pattern along the curve is up to 2.53x faster at 8K: B1 H8 D64."
    rows, options = [], dict(window=512, dilation_rates=(1, 2, 4), global_tokens=128)
    q, k, v = randn(*[(1, 8, 8192, 64)] * 3)

    def run(lists):
        return lambda: block_sparse_attention(q, k, v, lists)

    for kind in ("local_window", "dilated_sparse", "global_local"):
        config, calls = SparsePatternConfig(kind, 64, **options), {}
        for name, enabled in (("off", False), ("on", True)):
            optimizer = PostPatternHilbertOptimizer(enabled=enabled)
            calls[name] = run(optimizer.lists(config, seq_len=8192))
        apart = difference(calls["on"](), calls["off"]())
        rows.append(dict(pattern=kind, difference=apart, times=seconds(calls, 10)))
    return dict(rows=rows)


def claim_8():
    "A snake is as good as a Hilbert curve: do segments change, how compact are they? 64 x 64."
    rows, grid = [], (64, 64)
    for w in (64, 256, 512):
        base = segment_map(grid, w, "row_major")
        for curve in ("row_major", "snake", "tile", "morton", "hilbert"):
            found = locality(grid, w, curve)
            moved = (segment_map(grid, w, curve) != base).double().mean().item()
            keys = ("spread", "neighbors_kept", "boundary")
            measures = {key: getattr(found, key) for key in keys}
            about = dict(segment=w, curve=curve, tokens_in_another_segment=moved)
            rows.append(about | measures)
    return dict(rows=rows)


def ring_of(size, threads, tokens):
    "Dense attention over so many processes of so many threads each."
    worker = Path(__file__).resolve().parent / "claim_ring_worker.py"
    with tempfile.TemporaryDirectory() as folder:
        store, workers = Path(folder) / "store", []
        for rank in range(size):
            words = [worker, rank, size, threads, store, tokens]
            command = [sys.executable, *map(str, words)]
            workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        try:
            said = [process.communicate(timeout=300)[0].split() for process in workers]
        finally:
            for process in workers:
                process.kill()
    return dict(
        seconds=max(float(words[0]) for words in said),
        received_bytes=int(said[0][1]),
        error=max(float(words[2]) for words in said),
    )


RINGS = ((1, 1), (1, 2), (2, 1), (4, 1))  # processes, threads of each


def claim_11(tokens: int = 16384, rounds: int = 3):
    "A ring over 2 devices is 2.0x: dense attention, B1 H4 D64 16K; with as many threads without."
    found = {ring: [] for ring in RINGS}
    for _ in range(rounds):
        for ring in RINGS: found[ring].append(ring_of(*ring, tokens))
    rows = []
    for (processes, threads), runs in found.items():
        seconds = [run["seconds"] for run in runs]
        spread = dict(least_seconds=min(seconds), most_seconds=max(seconds))
        about = dict(processes=processes, threads=threads, **runs[0])
        rows.append(about | dict(seconds=statistics.median(seconds)) | spread)
    return dict(tokens=tokens, rows=rows, cores=len(os.sched_getaffinity(0)), rounds=rounds)


def empty_blocks(grid, pattern, curve):
    "How many blocks of 128 an order leaves empty."
    lists = block_lists(pattern, order=curve_order(grid, curve), block_size=128)
    rows, columns = lists.num_blocks
    filled, blocks = len(lists.rows.index), rows * columns
    return dict(blocks=blocks, not_empty=filled, empty_share=1 - filled / blocks)


def claim_papers():
    "Blocks of windows and slides by order, as in arXiv 2511.05832: blocks of 128."
    curves = ("row_major", "snake", "tile:16", "morton", "hilbert")
    large, small = (96, 96), (64, 64)
    settings = {
        "96 x 96, window 16 x 16": (large, WindowPattern(large, 16)),
        "64 x 64, neighbourhood 7 x 7": (small, NeighborhoodPattern(small, 7)),
    }
    return {
        name: {curve: empty_blocks(*setting, curve) for curve in curves}
        for name, setting in settings.items()
    }


CLAIMS = {
    "1": claim_1,
    "2": claim_2,
    "3": claim_3,
    "5": claim_5,
    "6": claim_6,
    "7": claim_7,
    "8": claim_8,
    "11": claim_11,
    "papers": claim_papers,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = "which to try; default: all"
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], help=which)
    parser.add_argument("--out", help="folder of results instead of nbs/results")
    args = parser.parse_args()
    results = {}
    for name in args.claims or CLAIMS:
        start = time.perf_counter()
        results[name] = dict(about=CLAIMS[name].__doc__, **CLAIMS[name]())
        print(f"claim {name}: {time.perf_counter() - start:.0f} s", flush=True)
    config = dict(repeats=REPEATS)
    about = dict(suite="claims", quick=False, config=config, environment=environment())
    print(save_run(about | dict(claims=results), args.out))


if __name__ == "__main__":
    main()
