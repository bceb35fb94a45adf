"""Puts circulating claims about Hilbert and dilated attention to the test on this machine: `python tools/run_claims.py [NUMBER ...]` appends one run to nbs/results/<machine>/claims.json.

Each claim is a function that repeats the configuration as exactly as a CPU allows and returns figures. Verdicts are drawn in nbs/20_claims_on_trial.ipynb, from the figures alone.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

from hilbert_attn.backends import hilbert_attention
from hilbert_attn.bench import environment, measure, naive_attention, peak_memory, save_run
from hilbert_attn.block_sparse import PostPatternHilbertOptimizer, SparsePatternConfig, block_lists, block_sparse_attention, block_stats
from hilbert_attn.curves import curve_order, locality, segment_map
from hilbert_attn.modules import HilbertAttentionCore
from hilbert_attn.patterns import NeighborhoodPattern, SegmentPattern, SlidePattern, WindowPattern

REPEATS = 20


def randn(*shapes, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).requires_grad_(grad) for shape in shapes]


def seconds(calls, repeats=REPEATS):
    return {name: dict(median=t.median, p20=t.p20, p80=t.p80, repeats=t.repeats) for name, t in measure(calls, repeats).items()}


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


def claim_1():
    "SDPA is 40x faster than the manual computation: B1 N256 H4 D32 float32, one cold call each, the manual one first."
    q, k, v = randn(*[(1, 4, 256, 32)] * 3)
    warm = seconds({"manual": lambda: (q @ k.transpose(-2, -1) * 32 ** -0.5).softmax(-1) @ v, "SDPA": lambda: F.scaled_dot_product_attention(q, k, v)}, 200)
    cold = {}
    for order in (("manual", "sdpa"), ("sdpa", "manual")):
        runs = [dict(line.split() for line in subprocess.run([sys.executable, "-c", COLD, *order], capture_output=True, text=True, check=True).stdout.splitlines()) for _ in range(5)]
        cold["first " + order[0]] = {name: sorted(float(run[name]) for run in runs)[2] for name in order}
    return dict(times=warm, cold=cold, ratio=warm["manual"]["median"] / warm["SDPA"]["median"], cold_ratio=cold["first manual"]["manual"] / cold["first manual"]["sdpa"],
                cold_ratio_reversed=cold["first sdpa"]["manual"] / cold["first sdpa"]["sdpa"])


def dilated_call(kind: str, small: bool = False):
    "The calls of claim 2, for `peak_memory`."
    n = 256 if small else 1024
    q, k, v = randn(*[(2, 8, n, 64)] * 3)
    if kind == "dense": return lambda: F.scaled_dot_product_attention(q, k, v)
    if kind == "masked": return lambda: F.scaled_dot_product_attention(q, k, v, SegmentPattern(n, 256, 2, "longnet").mask()[None] | torch.eye(n, dtype=torch.bool))
    if kind == "naive": return lambda: (q @ k.transpose(-2, -1) / 8).softmax(-1) @ v
    return lambda: hilbert_attention(q, k, v, curve=None, segment_size=256, dilation_rate=2, dilation_mode="longnet", offsets=0, backend="sdpa")


def claim_2():
    "2.69 ms and 93.8 % less memory with a dilated SDPA mask: B2 N1024 H8 D64, segment 256, rate 2, queries and keys dilated, offset 0."
    mask = SegmentPattern(1024, 256, 2, "longnet").mask()
    longer = {n: 1 - SegmentPattern(n, 256, 2, "longnet").density for n in (256, 1024, 4096, 16384)}
    memory = {kind: peak_memory("run_claims:dilated_call", kind=kind) for kind in ("naive", "dense", "masked", "groups")}
    return dict(mask_sparsity=1 - mask.double().mean().item(), sparsity_by_length=longer, peak_extra_bytes=memory, times=seconds({kind: dilated_call(kind) for kind in ("naive", "dense", "masked", "groups")}))


def claim_3():
    "The custom backward is 4x faster than autograd: B2 N2048 E768 H12, segment 128, rate 1."
    (x,) = randn((2, 2048, 768))
    layers = {name: HilbertAttentionCore(768, 12, 128, grid=(32, 64), use_custom_backward=custom) for name, custom in (("custom", True), ("autograd", False))}
    layers["autograd"].load_state_dict(layers["custom"].state_dict())
    def both(layer):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf).sum(), (leaf, *layer.parameters()))
    q, k, v = randn(*[(2, 12, 2048, 64)] * 3, grad=True)
    up, = randn((2, 12, 2048, 64), seed=1)
    from hilbert_attn.sdpa import sdpa_attention
    pattern, order = SegmentPattern(2048, 128), curve_order((32, 64))
    def attention(custom): return lambda: torch.autograd.grad(sdpa_attention(q, k, v, pattern, order=order, custom_backward=custom)[0], (q, k, v), up)
    layer_times, attention_times = seconds({name: (lambda layer=layer: both(layer)) for name, layer in layers.items()}, 12), seconds({"custom": attention(True), "autograd": attention(False)}, 12)
    return dict(layer=layer_times, attention=attention_times, ratio_layer=layer_times["autograd"]["median"] / layer_times["custom"]["median"],
                ratio_attention=attention_times["autograd"]["median"] / attention_times["custom"]["median"])


def claim_5():
    "The Hilbert order improves cache locality for long sequences: segments of 1024 in row-major and in Hilbert order, gathering in every call or laid out once."
    rows = []
    for n in (4096, 16384, 65536):
        side = int(n ** 0.5)
        q, k, v = randn(*[(1, 4, n, 64)] * 3)
        order = curve_order((side, side))
        moved = [x[:, :, order].contiguous() for x in (q, k, v)]
        def run(x, **options): return lambda: hilbert_attention(*x, grid=(side, side), segment_size=1024, **options)
        times = seconds({"row-major": run((q, k, v), curve=None), "Hilbert, gathered in the call": run((q, k, v)), "Hilbert, laid out before": run(moved, curve=None)}, 9)
        rows.append(dict(tokens=n, times=times))
    blocks = []
    for n in (64, 128):
        pattern = NeighborhoodPattern((n, n), 13)
        q, k, v = randn(*[(1, 4, n * n, 64)] * 3)
        lists = {curve: block_lists(pattern, order=curve_order((n, n), curve), block_size=64) for curve in ("row_major", "hilbert")}
        times = seconds({curve: (lambda x=x: block_sparse_attention(q, k, v, x)) for curve, x in lists.items()}, 7)
        blocks.append(dict(tokens=n * n, times=times, blocks={curve: len(x.rows.index) for curve, x in lists.items()}))
    return dict(segments=rows, neighbourhood_13x13_blocks_of_64=blocks)


def claim_6():
    "Ordering tokens inside each segment by a Hilbert curve is 1.57x faster on average, 2.60x at N 8192: B1 H8 D64, segments of 1024."
    rows = []
    for n in (2048, 4096, 8192, 16384):
        q, k, v = randn(*[(1, 8, n, 64)] * 3)
        inside = curve_order((32, 32))
        order = (torch.arange(0, n, 1024)[:, None] + inside).flatten()
        def run(**options): return lambda: hilbert_attention(q, k, v, segment_size=1024, **options)
        plain, ordered = run(curve=None), run(order=order)
        rows.append(dict(tokens=n, difference=(plain() - ordered()).abs().max().item(), times=seconds({"as they lie": plain, "ordered inside segments": ordered}, 11)))
    return dict(rows=rows)


def claim_7():
    "Ordering the blocks of a pattern along the curve is up to 2.53x faster at 8K: B1 H8 D64, blocks of 64, the output unchanged."
    rows = []
    for kind in ("local_window", "dilated_sparse", "global_local"):
        config = SparsePatternConfig(kind, 64, window=512, dilation_rates=(1, 2, 4), global_tokens=128)
        q, k, v = randn(*[(1, 8, 8192, 64)] * 3)
        lists = {name: PostPatternHilbertOptimizer(enabled=on).lists(config, seq_len=8192) for name, on in (("off", False), ("on", True))}
        calls = {name: (lambda x=x: block_sparse_attention(q, k, v, x)) for name, x in lists.items()}
        rows.append(dict(pattern=kind, difference=(calls["on"]() - calls["off"]()).abs().max().item(), times=seconds(calls, 10)))
    return dict(rows=rows)


def claim_8():
    "A snake is as good as a Hilbert curve: do segments change their tokens, and how compact are they? 64 x 64 tokens."
    rows, grid = [], (64, 64)
    for w in (64, 256, 512):
        base = segment_map(grid, w, "row_major")
        for curve in ("row_major", "snake", "tile", "morton", "hilbert"):
            m = locality(grid, w, curve)
            rows.append(dict(segment=w, curve=curve, tokens_in_another_segment=(segment_map(grid, w, curve) != base).double().mean().item(), spread=m.spread, neighbors_kept=m.neighbors_kept, boundary=m.boundary))
    return dict(rows=rows)


def claim_11(tokens: int = 16384):
    "A ring over 2 devices is 2.0x: dense causal-free attention of B1 H4 D64 and 16K tokens over 1, 2 and 4 processes of one thread each, on this machine's cores."
    worker = os.path.join(os.path.dirname(os.path.abspath(__file__)), "claim_ring_worker.py")
    rows = []
    for size in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            workers = [subprocess.Popen([sys.executable, worker, str(rank), str(size), os.path.join(folder, "store"), str(tokens)], stdout=subprocess.PIPE, text=True) for rank in range(size)]
            try: said = [w.communicate(timeout=300)[0] for w in workers]
            finally:
                for w in workers: w.kill()
        rows.append(dict(processes=size, seconds=max(float(text.split()[0]) for text in said), received_bytes=int(said[0].split()[1]), error=max(float(text.split()[2]) for text in said)))
    return dict(tokens=tokens, rows=rows, cores=len(os.sched_getaffinity(0)))


def claim_papers():
    "Blocks of windows and slides by order, as in arXiv 2511.05832: 96 x 96, window 16 x 16, and 64 x 64, slide 7 x 7, blocks of 128."
    found = {}
    for name, grid, pattern in (("96 x 96, window 16 x 16", (96, 96), WindowPattern((96, 96), 16)), ("64 x 64, neighbourhood 7 x 7", (64, 64), NeighborhoodPattern((64, 64), 7))):
        found[name] = {}
        for curve in ("row_major", "snake", "tile:16", "morton", "hilbert"):
            lists = block_lists(pattern, order=curve_order(grid, curve), block_size=128)
            nq, nk = lists.num_blocks
            found[name][curve] = dict(blocks=nq * nk, not_empty=len(lists.rows.index), empty_share=1 - len(lists.rows.index) / (nq * nk))
    return found


CLAIMS = {name.removeprefix("claim_"): function for name, function in list(globals().items()) if name.startswith("claim_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], help="which to try; default: all")
    parser.add_argument("--out", help="folder of results instead of nbs/results")
    args = parser.parse_args()
    results = {}
    for name in args.claims or CLAIMS:
        start = time.perf_counter()
        results[name] = dict(about=CLAIMS[name].__doc__, **CLAIMS[name]())
        print(f"claim {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(save_run(dict(suite="claims", quick=False, config=dict(repeats=REPEATS), environment=environment(), claims=results), args.out))


if __name__ == "__main__": main()
