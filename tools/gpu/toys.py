"""The plan at sizes for a CPU, so that the motions can be gone through without a GPU."""
from dataclasses import replace

import numpy
import torch
import triton
import triton.language as tl

from .session import Task

PATTERNS = dict(neighborhood=["neighborhood", [5, 8], 3], window=["window", [5, 8], 3],
                slide=["slide", 40, 9], tiles_shared=["tiles_shared", 50, 3, 7, 10],
                segment=["segment", 40, 20, 3], random=["random", 40])
LARGE = dict(neighborhood=["neighborhood", [8, 8], 3], window=["window", [8, 8], 4],
             tiles_shared=["tiles_shared", 80, 4, 0, 20])
SLOW = 20  # seconds; the interpreter is
NO_GPU = {"cudnn, groups given", "flash, groups given", "cudnn, dense N x N",
          "flex", "flex, flash"}


@triton.jit
def _count(out, n):
    count = 0
    for _ in tl.range(0, n): count += 1
    tl.store(out, count)


def why_not() -> str:
    "Why Triton's interpreter cannot run here, or nothing. GPUs don't mind."
    out = torch.zeros(1, dtype=torch.int32)
    try: _count[(1,)](out, 3)
    except Exception as error:
        return (f"Triton {triton.__version__}'s interpreter does not run with numpy "
                f"{numpy.__version__} ({error}); numpy below 2.4 does")
    return ""


def small_case(case: dict) -> dict:
    "For a check."
    if "pattern" in case:
        sizes = dict(pattern=PATTERNS[case["pattern"][0]], block=[16, 32])
        return {k: v for k, v in case.items() if k not in ("tile", "kernel")} | sizes | dict(
            d=min(case["d"], 32), kv_heads=1)
    sizes = dict(n=40, w=min(case["w"], 40), r=min(case["r"], 4), d=min(case["d"], 32))
    return {k: v for k, v in case.items() if k not in ("tile", "kernel")} | sizes | dict(
        heads=min(case["heads"], 2), kv_heads=1)


def large_case(case: dict) -> dict:
    "For a timing."
    heads = dict(h=2, kv=2 if case["kv"] == case["h"] else 1, d=16)
    if "pattern" not in case:
        r = min(case["r"], 2)
        return case | heads | dict(n=64, w=64 if case["w"] > 4096 else 32, r=r)
    if "around" in case:
        return case | heads | dict(pattern=LARGE["tiles_shared"], n=80, around=8, block=[16, 16])
    if "grid" not in case:
        return case | heads | dict(pattern=["neighborhood", 64, 9], n=64, block=[16, 32])
    return case | heads | dict(pattern=LARGE[case["pattern"][0]], n=64, grid=[8, 8], block=[16, 16])


def small_version(tasks: list[Task], checks: int = 12, races: int = 24) -> list[Task]:
    "A few tasks of each kind, shrunk; those that need a GPU's own libraries are left out."
    kept, count = [], {}
    usual = {"check": checks, "speed": races, "sweep": 3, "front": 2, "long": 1, "program": 2}
    stride = {kind: max(1, sum(t.kind == kind for t in tasks) // n) for kind, n in usual.items()}
    for task in tasks:
        place = count[task.kind] = count.get(task.kind, -1) + 1
        if place % stride.get(task.kind, 1) or task.case.get("contender") in NO_GPU: continue
        if task.kind in ("check", "graph"): task = replace(task, case=small_case(task.case))
        elif task.kind in ("speed", "sweep", "front", "long"):
            task = replace(task, case=large_case(task.case))
        kept.append(replace(task, seconds=SLOW))
    return kept
