"""A ring over a slow cable: `sudo python tools/bench_link.py`, on Linux.

Two ranks of one thread each, in network namespaces of their own, between them a cable (`veth`)
that a token bucket (`tc`, `tbf`) slows down to one rate after the other. At each: this package's
ring with and without overlap, and the obvious way, which gathers all of K and V first. What the
cable carries is measured with messages alone. The run is written to `nbs/results/ring_link.json`.
`--quick` takes a toy size and writes nothing unless `--out` names a file.
"""
import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_ring import (
    CONFIG,
    GATHER,
    OURS,
    QUICK,
    SERIAL,
    TORCH,
    check,
    contenders,
    link_of_rank,
    run_rank,
    run_world,
    timings_of_rank,
    traffic_of,
)

from hilbert_attn.bench import Table, describe_environment, dump_rows, environment

RATES = (None, 4000, 2000, 1000, 500, 250, 125) # Mbit/s; None: as fast as the kernel copies
BURST, QUEUE = "128kb", "64mb" # what goes through at once, and what may wait: nothing is lost
RESULT = Path(__file__).resolve().parent.parent / "nbs" / "results" / "ring_link.json"


def run(*command: str):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def needs_namespaces():
    "Raises where no cable can be laid."
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing: raise RuntimeError(f"no {' and no '.join(missing)} here: install iproute2")
    if os.geteuid(): raise RuntimeError("network namespaces need root: run it with sudo")


@contextmanager
def cable(
    rate: int | None, # Mbit/s in each direction
) -> Iterator[Callable[[int], list[str]]]: # of a rank: words before its command
    "Two namespaces and what joins them, as long as it is needed."
    needs_namespaces()
    names = [f"ring-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        for name in names: run("ip", "netns", "add", name)
        run("ip", "link", "add", "cable", "netns", names[0], "type", "veth",
            "peer", "name", "cable", "netns", names[1])
        for rank, name in enumerate(names): plug_in(name, f"10.77.0.{rank + 1}/24", rate)
        yield lambda rank: ["ip", "netns", "exec", names[rank],
                            "env", "GLOO_SOCKET_IFNAME=cable"]
    finally:
        for name in names: subprocess.run(["ip", "netns", "del", name], capture_output=True)


def plug_in(name: str, address: str, rate: int | None):
    "One end of the cable."
    run("ip", "-n", name, "address", "add", address, "dev", "cable")
    for device in ("lo", "cable"): run("ip", "-n", name, "link", "set", device, "up")
    if rate is None: return
    bucket = "tbf", "rate", f"{rate}mbit", "burst", BURST, "limit", QUEUE
    run("tc", "-n", name, "qdisc", "add", "dev", "cable", "root", *bucket)


def times_of_rank(config: dict, rank: int, world: int) -> dict:
    "Checks and times; what the cable carries and what the ring sends."
    def compared(n): return [c for c in contenders(config, n, world) if c.name in config["names"]]
    checks = {c.name: check(c, 2, config["head_dim"]) for c in compared(64 * world)}
    chosen = compared(config["tokens"])
    rows = timings_of_rank(config, chosen, rank, world)
    ours = next(c for c in chosen if c.name == OURS)
    return dict(
        checks=checks,
        rows=rows,
        link=link_of_rank(config, rank, world),
        traffic_bytes=traffic_of(config, ours, world),
    )


def table(found: dict) -> str:
    "Milliseconds by rate."
    rows = []
    for cable in found["cables"]:
        link = cable["link"]
        megabits = 8e-6 * link["bytes"] / link["seconds"]
        row = dict(rate=cable["rate"] or "none", link=megabits)
        for x in cable["rows"]: row[f"{x['name']}, {x['direction']}"] = 1e3 * x["median"]
        rows.append(row)
    formats = {name: "" if name == "rate" else ".0f" for name in rows[0]}
    shown = Table("limit (Mbit/s)", rows, formats, dict(link="measured (Mbit/s)"))
    return f"{describe_environment(found['environment'])}\n\n{shown}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy size, at one rate")
    parser.add_argument("--out", type=Path, help="a file for the results")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job: return run_rank(args.job, args.rank, times_of_rank)
    config = QUICK if args.quick else CONFIG | dict(repeats=9)
    config |= dict(names=[OURS, SERIAL, TORCH, GATHER])
    cables = []
    for rate in ((100,) if args.quick else RATES):
        with tempfile.TemporaryDirectory() as folder, cable(rate) as inside:
            measured = run_world(config, 2, "times", Path(folder), __file__, inside)
            cables.append(dict(rate=rate, **measured))
    found = dict(config=config, environment=environment(), cables=cables)
    print(table(found))
    out = args.out or (None if args.quick else RESULT)
    if out: out.write_text(dump_rows(found) + "\n")


if __name__ == "__main__": main()
