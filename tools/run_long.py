"""Long sequences on this machine, every token computed: `python tools/run_long.py [--quick]`.

Appends time, memory and errors by length to nbs/results/<machine>/long.json. Forward and
forward+backward, in segments of 1024 along the Hilbert curve with every 4th position attended, and
in LongNet's branches. At every length, 256 random rows of output and gradients are held against a
float64 softmax written out for their group.
"""
import argparse
import time

import torch

from hilbert_attn.backends import hilbert_attention
from hilbert_attn.bench.machine import environment, machine_limits, peak_memory
from hilbert_attn.bench.results import save_run
from hilbert_attn.curves import curve_order, inverse_order
from hilbert_attn.dilated import dilated_attention

HEADS, DIM, SEGMENT, RATE, CHECKED = 2, 64, 1024, 4, 256
LENGTHS, RATES = [1 << 10, 1 << 15, 1 << 20], [1, 32, 1024]
KINDS = {
    "segments": "w = 1024, r = 4, Hilbert order",
    "branches": "w = 1024, 32K, 1M and r = 1, 32, 1024, longnet, tokens as they lie",
}


def attention(kind, grid):
    "The function that is measured."
    def segments(q, k, v):
        return hilbert_attention(q, k, v, grid=grid, segment_size=SEGMENT, dilation_rate=RATE)

    def branches(q, k, v):
        return dilated_attention(q, k, v, LENGTHS, RATES, curve=None)

    return segments if kind == "segments" else branches


def inputs(n):
    "q, k, v and an upstream gradient."
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, n, DIM, generator=g) for _ in range(4)]


def grid_of(n):
    "A power of two as two sides."
    rows = 1 << (n.bit_length() - 1) // 2
    return rows, n // rows


def memory_call(kind: str, n: int, backward: bool, small: bool = False):
    "For `peak_memory`."
    n = 4096 if small else n
    *qkv, upstream = inputs(n)
    call = attention(kind, grid_of(n))
    if not backward:
        return lambda: call(*qkv)
    leaves = [x.requires_grad_() for x in qkv]
    return lambda: torch.autograd.grad(call(*leaves), leaves, upstream)


def exact_group(leaves, upstream, members):
    "Output and gradients of one group of tokens, in float64."
    q, k, v = (x.detach()[0][:, members].double().requires_grad_() for x in leaves)
    out = (q @ k.mT * DIM ** -0.5).softmax(-1) @ v
    grads = torch.autograd.grad(out, (q, k, v), upstream[0][:, members].double())
    return out, *grads


def errors(n, leaves, upstream, results):
    "Largest error of output and gradients at random tokens."
    order = curve_order(grid_of(n))
    rank, found = inverse_order(order), dict(out=0.0, dq=0.0, dk=0.0, dv=0.0)
    g = torch.Generator().manual_seed(1)
    for token in torch.randint(n, (CHECKED,), generator=g).tolist():
        p = rank[token].item()
        start = p // SEGMENT * SEGMENT
        places = torch.arange(start + (p - start) % RATE, min(start + SEGMENT, n), RATE)
        members = order[places]
        at = (members == token).nonzero()[0, 0]
        exact = exact_group(leaves, upstream, members)
        for name, ours, true in zip(found, results, exact):
            error = (ours[0][:, token].double() - true[:, at]).abs().max().item()
            found[name] = max(found[name], error)
    return found


def time_once(call, leaves, upstream):
    "Seconds forward, seconds with the backward, output and gradients."
    start = time.perf_counter()
    with torch.no_grad():
        call(*leaves)
    middle = time.perf_counter()
    out = call(*leaves)
    grads = torch.autograd.grad(out, leaves, upstream)
    end = time.perf_counter()
    return middle - start, end - middle, (out.detach(), *grads)


def summary(kind, n, direction, seconds):
    "Times without the first call, and peak memory."
    t = sorted(seconds[1:])
    backward = "backward" in direction
    peak = peak_memory("run_long:memory_call", kind=kind, n=n, backward=backward)
    times = dict(median=t[len(t) // 2], fastest=t[0], slowest=t[-1], repeats=len(t))
    return times | dict(peak_extra_bytes=peak)


def measure(kind, n, repeats):
    "A row of the result."
    *leaves, upstream = inputs(n)
    leaves = [x.requires_grad_() for x in leaves]
    call, forward, both = attention(kind, grid_of(n)), [], []
    for _ in range(repeats):
        first, second, results = time_once(call, leaves, upstream)
        forward.append(first)
        both.append(second)
    with_output = (results[0][0, 0] != 0).any(-1).double().mean().item()
    row = dict(kind=kind, tokens=n, qkv_bytes=3 * 4 * HEADS * DIM * n)
    row |= dict(rows_with_output=with_output)
    for direction, seconds in (("forward", forward), ("forward+backward", both)):
        row[direction] = summary(kind, n, direction, seconds)
    if kind == "segments":
        row["errors"] = errors(n, leaves, upstream, results)
        row["rows_checked"] = CHECKED
    return row


def tell(row):
    "A line for the terminal."
    forward, both = (row[key]["median"] for key in ("forward", "forward+backward"))
    about = f"{row['tokens']:9,} {row['kind']:9}"
    print(f"{about} {forward:8.3f} s {both:8.3f} s {row.get('errors', '')}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    small = "up to 16K tokens; not stored unless --out is given"
    parser.add_argument("--quick", action="store_true", help=small)
    parser.add_argument("--out", help="folder of results instead of nbs/results")
    args = parser.parse_args()
    lengths = (12, 14) if args.quick else (12, 14, 16, 18, 20)
    rows = []
    for n in (1 << s for s in lengths):
        for kind in KINDS:
            rows.append(measure(kind, n, 2 if args.quick else 3))
            tell(rows[-1])
    config = dict(heads=HEADS, head_dim=DIM, segment_size=SEGMENT, dilation_rate=RATE, kinds=KINDS)
    about = dict(suite="long", quick=args.quick, config=config, environment=environment())
    run = about | dict(limits=machine_limits(), rows=rows)
    if args.out or not args.quick:
        print(save_run(run, args.out))


if __name__ == "__main__":
    main()
