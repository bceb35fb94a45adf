"""Starts one process per rank for a test, and collects what they found.

The ranks are forked from one process that has imported everything: importing torch takes longer
than most of what they try.

A worker is a script with functions `suite(results, rank, world)` that call `attempt`; it ends in
`main(globals())`. Workers run on the tree that this file lies in, installed package or not.
"""
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
Found = dict[str, dict[str, list[dict]]] # suite -> name -> what each rank wrote


def tree_environment(**more: str) -> dict[str, str]:
    "The environment of a process that is to import the package of this tree."
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **more}


def check_tree():
    "Fails where the package that is imported is not the one under test."
    import hilbert_attn
    found = Path(hilbert_attn.__file__).resolve().parent.parent
    assert found == ROOT, f"testing {found}, not {ROOT}"


def run_group(command: Sequence, folder: Path, seconds: float):
    "Runs a process and all that it forks, and leaves none behind."
    environment = tree_environment(TRITON_INTERPRET="0")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=log,
                                   env=environment, start_new_session=True)
    try: process.wait(seconds)
    except subprocess.TimeoutExpired: pass
    finally:
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_ranks(worker: str, suites: list[str], world: int, folder: Path, seconds: float) -> Found:
    "Runs suites of a worker in `world` processes."
    command = [ROOT / "tests" / worker, ",".join(suites), world, folder]
    run_group(command, folder, seconds)
    found: Found = {}
    for suite in suites:
        for rank in range(world):
            path = folder / f"{suite}-{rank}.jsonl"
            for line in path.read_text().splitlines() if path.exists() else ():
                entry = json.loads(line) | dict(rank=rank)
                found.setdefault(suite, {}).setdefault(entry.pop("name"), []).append(entry)
    found["logs"] = {"all ranks": [dict(text=(folder / "log").read_text()[-4000:])]}
    return found


def said(found: Found, suite: str, name: str, ranks: Sequence[int]) -> list[dict]:
    "What the ranks wrote about a check; fails where one is missing or went wrong."
    entries = found.get(suite, {}).get(name, [])
    for entry in entries: assert entry["ok"], f"rank {entry['rank']}: {entry['error']}"
    spoke = [entry["rank"] for entry in entries]
    assert spoke == list(ranks), f"{name}: ranks {spoke}, not {list(ranks)}; logs: {found['logs']}"
    return entries


def attempt(results, name: str, function: Callable, *arguments, **options) -> bool:
    "Runs one check and writes down how it went."
    start = time.perf_counter()
    try: entry = dict(ok=True, **(function(*arguments, **options) or {}))
    except Exception: entry = dict(ok=False, error=traceback.format_exc()[-3000:])
    entry |= dict(name=name, seconds=round(time.perf_counter() - start, 3))
    results.write(json.dumps(entry) + "\n")
    results.flush()
    return entry["ok"]


def outcome(function: Callable) -> dict:
    "Name, text and seconds of what a call raises; an error if it returns."
    start = time.perf_counter()
    try: function()
    except Exception as error:
        took = round(time.perf_counter() - start, 2)
        return dict(type=type(error).__name__, message=str(error), took=took)
    raise AssertionError("returned a result")


def main(suites: dict[str, Callable]):
    "What a worker does: it forks one process per rank, which find everything imported."
    names, world, folder = sys.argv[1].split(","), int(sys.argv[2]), Path(sys.argv[3])
    check_tree()
    torch.set_num_threads(1)
    ranks = []
    for rank in range(world):
        if child := os.fork(): ranks.append(child)
        else: run_rank([suites[name] for name in names], rank, world, folder)
    for child in ranks: os.waitpid(child, 0)


def run_rank(suites: list[Callable], rank: int, world: int, folder: Path):
    "Joins the others, and runs suites; never returns."
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                world_size=world, timeout=timedelta(seconds=60))
        for suite in suites:
            with open(folder / f"{suite.__name__}-{rank}.jsonl", "w") as results:
                suite(results, rank, world)
    except BaseException: traceback.print_exc()
    sys.stderr.flush()
    os._exit(0)  # without waiting for ranks that a test has left behind
