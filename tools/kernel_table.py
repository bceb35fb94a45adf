"""What compilers make of the kernels, without a GPU: `python tools/kernel_table.py LABEL`.

Appends to nbs/results/kernels.jsonl, for every tile that the tuner may take on sm_90, and for
small groups: registers, spilled bytes, shared memory, ptxas' advice, instructions, and of each
inner loop that multiplies matrices how many instructions and how many matrix instructions a tile
takes. What is stored under the same label and version of Triton is not compiled again, so that
labels can be compared, and a run that was stopped goes on. Another version of Triton is installed
into a folder (`pip install --target FOLDER --no-deps triton==3.6.0`) that PYTHONPATH begins with.
"""
import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]
STORED = ROOT / "nbs" / "results" / "kernels.jsonl"
KEPT = ("registers", "spilled", "shared", "advice", "instructions", "loops", "failed")


def stored() -> list[dict]:
    return [json.loads(line) for line in STORED.read_text().splitlines()] if STORED.exists() else []


def append(row: dict) -> None:
    with STORED.open("a") as file: file.write(json.dumps(row) + "\n")


def cases() -> list:
    "What the table holds: of a kernel without a cap what the tuner may take, of others defaults."
    from compile_cases import blocks_of_the_gpu_tool, capped, small_groups, tiles_of_the_tuner
    found = tiles_of_the_tuner() + blocks_of_the_gpu_tool() + small_groups() + capped()
    return list(dict.fromkeys(found))


def measure(label: str) -> None:
    "One row a case, stored when it is known."
    import triton
    from compile_worker import compile_case
    where = dict(label=label, triton=triton.__version__)
    known = {row["case"] for row in stored() if where.items() <= row.items()}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for case in cases():
            if str(case) in known: continue
            result = compile_case(asdict(case))
            append(where | dict(case=str(case)) | {k: result[k] for k in KEPT if k in result})


def compare(before: str, after: str) -> None:
    "Cases of both labels whose registers, spills or instructions differ."
    table = {(row["label"], row["triton"], row["case"]): row for row in stored()}
    for (label, version, case), old in table.items():
        new = table.get((after, version, case))
        if label != before or new is None: continue
        words = [f"{k} {old.get(k)} -> {new.get(k)}" for k in KEPT if old.get(k) != new.get(k)]
        if words: print(version, case, ", ".join(words))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("label", help="of the rows to append; or, beside another, to compare")
    parser.add_argument("other", nargs="?", help="compare the rows of two labels, compile nothing")
    asked = parser.parse_args()
    if asked.other: compare(asked.label, asked.other)
    else: measure(asked.label)
