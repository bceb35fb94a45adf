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
from pathlib import Path

from hilbert_attn.bench.machine import environment
from hilbert_attn.bench.results import save_run
from hilbert_attn.bench.short import (
    MICROSECONDS,
    RATIO,
    SHORT_CONFIG,
    SHORT_QUICK,
    profile_table,
    short_profile,
    short_run,
    short_table,
    short_tables,
)

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


def whole(folder, config, quick):
    "All pieces as one run."
    folder.mkdir(parents=True, exist_ok=True)
    runs = [
        measured(folder / f"{threads}-{n}.json", config, threads, n, quick)
        for threads, n in pieces(config)]
    rows = [row for run in runs for row in run["rows"]]
    return runs[-1] | dict(config=config, rows=rows, profile=short_profile(config))


def tell(run):
    "The calls that are slow; how many there are."
    lines = short_table(run)
    slow = sorted((x for x in lines if x["slow"]), key=lambda x: -x["ratio"])
    for table in (short_tables(run)[0], profile_table(run)): print(table)
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
