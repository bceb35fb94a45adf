"""Measures the suite `short` piece by piece, stores it, and names the calls that miss its rule.

    python tools/run_short.py [--out FOLDER]

A piece is a number of threads and a length; it is kept in `build/short` until all are there, so
that a run which was stopped goes on where it was. Ends with 1 where a call is slow.
"""
import argparse
import json
import shutil
import sys
import time
from inspect import unwrap
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from hilbert_attn import curve_order, hilbert_attention
from hilbert_attn.bench.machine import environment
from hilbert_attn.bench.measuring import measure
from hilbert_attn.bench.results import Table, save_run
from hilbert_attn.bench.short import (
    MICROSECONDS,
    RATIO,
    SHORT_CONFIG,
    SHORT_QUICK,
    short_run,
    short_table,
    short_tables,
)
from hilbert_attn.calls import check_call, on_segments
from hilbert_attn.patterns import SegmentPattern, attention_mask

ROOT = Path(__file__).resolve().parent.parent


def pieces(config):
    return [(threads, n) for threads in config["threads"] for n in config["tokens"]]


def measured(path, config, threads, n, quick):
    "The run of a piece, from its file if it is there."
    if path.exists(): return json.loads(path.read_text())
    start = time.monotonic()
    run = short_run(config | dict(threads=[threads], tokens=[n]), quick)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(run))
    scratch.replace(path)
    print(f"threads {threads}, {n:4} tokens: {time.monotonic() - start:4.0f} s", flush=True)
    return run


def profiled_calls(config, n=32, segment=16):
    "A short call and its parts."
    shape = config["batch"], config["heads"], n, config["head_dim"]
    q, k, v = (torch.randn(shape) for _ in range(3))
    mask = attention_mask(SegmentPattern(n, segment), order=curve_order(n))
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    new = unwrap(hilbert_attention)
    def placed(): on_segments(check_call(q, k, v), segment, 1, None, None, curve="hilbert")
    return dict(
        dense=lambda: scaled_dot_product_attention(q, k, v),
        masked=lambda: scaled_dot_product_attention(q, k, v, bias),
        again=lambda: hilbert_attention(q, k, v, segment_size=segment),
        checked=lambda: check_call(q, k, v),
        placed=placed,
        new=lambda: new(q, k, v, segment_size=segment),
    )


def profile(config, repeats=400):
    "Where the microseconds of a call go that came before (`again`), and of a new one."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: found = measure(profiled_calls(config), repeats, warmup=20)
    finally: torch.set_num_threads(before)
    us = {name: round(timing.median * 1e6) for name, timing in found.items()}
    mask = us["masked"] - us["dense"]
    parts = {
        "SDPA": (us["dense"], us["dense"]),
        "its mask": (mask, mask),
        "known again": (us["again"] - us["masked"], ""),
        "arguments checked": ("", us["checked"]),
        "pattern and order": ("", us["placed"] - us["checked"]),
        "backend chosen, mask found": ("", us["new"] - us["placed"] - us["masked"]),
        "in all": (us["again"], us["new"]),
    }
    return [dict(part=part, again=again, new=new) for part, (again, new) in parts.items()]


def whole(folder, config, quick):
    "All pieces as one run."
    folder.mkdir(parents=True, exist_ok=True)
    runs = [
        measured(folder / f"{threads}-{n}.json", config, threads, n, quick)
        for threads, n in pieces(config)]
    rows = [row for run in runs for row in run["rows"]]
    return runs[-1] | dict(config=config, rows=rows, profile=profile(config))


def tell(run):
    "The calls that are slow; how many there are."
    lines = short_table(run)
    slow = sorted((x for x in lines if x["slow"]), key=lambda x: -x["ratio"])
    for table in short_tables(run)[:1]: print(table)
    print(Table("part", run["profile"], dict(part="", again="", new="")))
    for x in slow:
        place = f"{x['threads']} threads, {x['tokens']:4} tokens, {x['direction']:16}"
        print(f"slow: {place} {x['ratio']:5.2f} x, {x['behind']:6.0f} µs behind: {x['setting']}")
    backward = [x for x in lines if x["direction"] != "forward"]
    near = [x for x in backward if x["ratio"] > RATIO and not x["slow"]]
    print(f"{len(slow)} of {len(lines)} calls miss the rule; {len(near)} more with the backward "
          f"take over {RATIO} times as long, but are less than {MICROSECONDS:.0f} µs behind")
    return len(slow)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy; needs --out")
    parser.add_argument("--out", help="folder of results instead of nbs/results")
    options = parser.parse_args()
    if options.quick and not options.out: parser.error("--quick needs --out: toys are no results")
    config = SHORT_QUICK if options.quick else SHORT_CONFIG
    kind = "quick" if options.quick else environment()["commit"]
    folder = ROOT / "build" / "short" / kind
    run = whole(folder, config, options.quick)
    print(save_run(run, options.out))
    shutil.rmtree(folder)
    return 1 if tell(run) else 0


if __name__ == "__main__": sys.exit(main())
