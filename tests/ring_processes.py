"""Starts one process per rank for a test, and collects what they found.

A worker is a script with functions `suite(results, rank, world)` that call `attempt`; it ends in
`main(globals())`. Workers run on the tree that this file lies in, installed package or not.
"""
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
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


def run_processes(commands: Sequence[Sequence[str]], folder: Path, seconds: float) -> list[tuple]:
    "Runs commands side by side, and leaves none behind; exit code and output of each."
    logs = [folder / f"log{i}" for i in range(len(commands))]
    processes = []
    for command, log in zip(commands, logs):
        with open(log, "w") as out:
            run = [sys.executable, *map(str, command)]
            environment = tree_environment(TRITON_INTERPRET="0")
            processes.append(subprocess.Popen(run, stdout=out, stderr=out, env=environment))
    deadline = time.monotonic() + seconds
    try:
        for process in processes: process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired: pass
    finally:
        for process in processes:
            if process.poll() is None: process.kill()
            process.wait()
    return [(process.returncode, log.read_text()) for process, log in zip(processes, logs)]


def run_ranks(worker: str, suites: list[str], world: int, folder: Path, seconds: float) -> Found:
    "Runs suites of a worker in `world` processes."
    first = [str(ROOT / "tests" / worker), ",".join(suites)]
    commands = [[*first, rank, world, folder / "store", folder] for rank in range(world)]
    outputs = run_processes(commands, folder, seconds)
    found: Found = {}
    for suite in suites:
        for rank in range(world):
            path = folder / f"{suite}-{rank}.jsonl"
            for line in path.read_text().splitlines() if path.exists() else ():
                entry = json.loads(line) | dict(rank=rank)
                found.setdefault(suite, {}).setdefault(entry.pop("name"), []).append(entry)
    found["logs"] = {str(rank): [dict(text=text[-2000:])] for rank, (_, text) in enumerate(outputs)}
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
    "What a worker does: it joins the others, and runs the suites that it is told."
    names, rank, world, store, folder = sys.argv[1:6]
    check_tree()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank),
                            world_size=int(world), timeout=timedelta(seconds=60))
    for name in names.split(","):
        with open(Path(folder) / f"{name}-{rank}.jsonl", "w") as results:
            suites[name](results, int(rank), int(world))
    os._exit(0)  # without waiting for ranks that a test has left behind
