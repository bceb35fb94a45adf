"""Long sequences on this machine, every token computed: `python tools/run_long.py [--quick]` appends time, memory and errors by length to nbs/results/<machine>/long.json.

Forward and forward+backward, in segments of 1024 along the Hilbert curve with every 4th position attended, and in LongNet's branches. At every length, 256 random rows of output and
gradients are held against a float64 softmax written out for their group.
"""
import argparse
import time

import torch

from hilbert_attn.backends import hilbert_attention
from hilbert_attn.bench import environment, machine_limits, peak_memory, save_run
from hilbert_attn.curves import as_grid, curve_order, inverse_order
from hilbert_attn.dilated import dilated_attention

HEADS, DIM, SEGMENT, RATE = 2, 64, 1024, 4
KINDS = {"segments": "w = 1024, r = 4, Hilbert order", "branches": "w = 1024, 32K, 1M and r = 1, 32, 1024, longnet, tokens as they lie"}


def attention(kind, grid):
    if kind == "segments": return lambda q, k, v: hilbert_attention(q, k, v, grid=grid, segment_size=SEGMENT, dilation_rate=RATE)
    return lambda q, k, v: dilated_attention(q, k, v, [1 << 10, 1 << 15, 1 << 20], [1, 32, 1024], curve=None)


def inputs(n):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, n, DIM, generator=g) for _ in range(4)]


def memory_call(kind: str, n: int, backward: bool, small: bool = False):
    n = 4096 if small else n
    *qkv, upstream = inputs(n)
    call = attention(kind, grid_of(n))
    if not backward: return lambda: call(*qkv)
    leaves = [x.requires_grad_() for x in qkv]
    return lambda: torch.autograd.grad(call(*leaves), leaves, upstream)


def grid_of(n): return (1 << (n.bit_length() - 1) // 2, n // (1 << (n.bit_length() - 1) // 2))


def errors(n, leaves, upstream, out, grads, rows=256):
    "Largest error of output and gradients at random tokens, each from the whole float64 attention of its group."
    order = curve_order(grid_of(n))
    rank, found = inverse_order(order), dict(out=0.0, dq=0.0, dk=0.0, dv=0.0)
    for token in torch.randint(n, (rows,), generator=torch.Generator().manual_seed(1)).tolist():
        p = rank[token].item()
        start = p // SEGMENT * SEGMENT
        members = order[torch.arange(start + (p - start) % RATE, min(start + SEGMENT, n), RATE)]
        q, k, v = (x.detach()[0][:, members].double().requires_grad_() for x in leaves)
        exact = (q @ k.mT * DIM ** -0.5).softmax(-1) @ v
        exact_grads = torch.autograd.grad(exact, (q, k, v), upstream[0][:, members].double())
        at = (members == token).nonzero()[0, 0]
        for name, a, e in zip(found, (out, *grads), (exact, *exact_grads)): found[name] = max(found[name], (a[0][:, token].double() - e[:, at]).abs().max().item())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 16K tokens; not stored unless --out is given")
    parser.add_argument("--out", help="folder of results instead of nbs/results")
    args = parser.parse_args()
    rows = []
    for n in [1 << s for s in ((12, 14) if args.quick else (12, 14, 16, 18, 20))]:
        for kind in KINDS:
            *leaves, upstream = inputs(n)
            leaves, call, times = [x.requires_grad_() for x in leaves], attention(kind, grid_of(n)), {"forward": [], "forward+backward": []}
            for _ in range(2 if args.quick else 3):
                start = time.perf_counter()
                with torch.no_grad(): call(*leaves)
                middle = time.perf_counter()
                out = call(*leaves)
                grads = torch.autograd.grad(out, leaves, upstream)
                times["forward"].append(middle - start)
                times["forward+backward"].append(time.perf_counter() - middle)
            row = dict(kind=kind, tokens=n, qkv_bytes=3 * 4 * HEADS * DIM * n, rows_with_output=(out.detach()[0, 0] != 0).any(-1).double().mean().item())
            for direction, t in times.items():
                t = sorted(t[1:])
                row[direction] = dict(median=t[len(t) // 2], fastest=t[0], slowest=t[-1], repeats=len(t), peak_extra_bytes=peak_memory("run_long:memory_call", kind=kind, n=n, backward="backward" in direction))
            if kind == "segments": row["errors"], row["rows_checked"] = errors(n, leaves, upstream, out.detach(), grads), 256
            rows.append(row)
            print(f"{n:9,} {kind:9} {row['forward']['median']:8.3f} s {row['forward+backward']['median']:8.3f} s {row.get('errors', '')}", flush=True)
            del out, grads, leaves
    run = dict(suite="long", quick=args.quick, config=dict(heads=HEADS, head_dim=DIM, segment_size=SEGMENT, dilation_rate=RATE, kinds=KINDS), environment=environment(), limits=machine_limits(), rows=rows)
    if args.out or not args.quick: print(save_run(run, args.out))


if __name__ == "__main__": main()
