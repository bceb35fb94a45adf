"""What a compiler makes of the ladder's kernels, without a GPU: `python tools/ladder_table.py`.

Writes nbs/results/ladder.json, which nbs/02cb_kernel_ladder.ipynb shows: for compute capability
9.0, registers, spilled bytes and shared memory of each rung, and the instructions that one turn of
its innermost loop takes.
"""
import argparse
import ast
import importlib.util
import json
import re
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]
from gpu.compiling import AbsentGPU, compile_listening, disassemble, inner_loops, spilled

NOTEBOOK = ROOT / "nbs" / "02cb_kernel_ladder.ipynb"
STORED = ROOT / "nbs" / "results" / "ladder.json"
ARCH = 90
TILE = dict(D=64, BM=64)
FLOAT, HALF = torch.float32, torch.bfloat16
RUNGS = {  # name shown: kernel, dtype, kinds of its arguments, more constants
    "1 all keys (256)": ("all_keys", HALF, "xxxxnf", dict(KEYS=256)),
    "2 online": ("online", HALF, "xxxxnf", dict(BN=64)),
    "3 gathered": ("gathered", HALF, "xxxxinnf", dict(BN=64)),
    "4 dilated": ("dilated", HALF, "xxxxinnnf", dict(BN=64)),
    "5 packed": ("packed", HALF, "xxxxinnnnf", dict(PACK=4)),
    "6 split": ("split", HALF, "xxxxinnnf", dict(BN=64)),
    "7 causal, naive": ("causal_naive", HALF, "xxxxtinnnf", dict(BN=64)),
    "8 causal, sorted": ("causal_sorted", HALF, "xxxxtinnnf", dict(BN=64)),
    "6 in float32": ("split", FLOAT, "xxxxinnnf", dict(BN=64)),
    "9 half precision": ("half", HALF, "xxxxnf", dict(BN=64, CARELESS=False)),
    "10 overlapped": ("overlapped", HALF, "xxxxnf", dict(BN=64)),
    "11 described": ("described", HALF, "xddxnnnf", dict(BN=64)),
}


def kernel_sources() -> str:
    "The kernels of the notebook, as a module."
    found = ["import triton", "import triton.language as tl"]
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "@triton.jit" not in source: continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                found.append("@triton.jit\n" + ast.get_source_segment(source, node))
    return "\n\n".join(found) + "\n"


def fingerprint() -> str:
    "Of the kernels that were compiled."
    return sha256(kernel_sources().encode()).hexdigest()[:16]


def argument(kind: str, dtype: torch.dtype):
    "One that the compiler takes for the real one: a number is no multiple of anything."
    from triton.tools.tensor_descriptor import TensorDescriptor
    def tensor(dtype): return torch.empty(0, dtype=dtype, device="meta")
    if kind == "x": return tensor(dtype)
    if kind == "i": return tensor(torch.int64)
    if kind == "t": return tensor(torch.int32)
    if kind == "d": return TensorDescriptor(tensor(dtype), [16] * 3, [16, 16, 1], [1, 64, 64])
    return 0.5 if kind == "f" else 3


def compile_rung(module, kernel: str, dtype: torch.dtype, kinds: str, constants: dict) -> dict:
    arguments = [argument(kind, dtype) for kind in kinds]
    how = TILE | constants | dict(num_warps=4, num_stages=2)
    def warm(): return getattr(module, kernel).warmup(*arguments, grid=(1,), **how)
    compiled, log = compile_listening(warm)
    sass = disassemble(compiled.asm["cubin"])
    loops = inner_loops(sass, "FFMA" if dtype == FLOAT else "MMA")
    loop, products = loops[0] if loops else (None, None)  # the first is the one without masks
    return dict(
        registers=int(re.search(r"REG:(\d+)", sass)[1]), spilled=spilled(log),
        shared=compiled.metadata.shared, loop=loop, products=products,
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", sass)))


def last_rung() -> dict:
    "The package's kernel, along an order, with its own tile."
    from dataclasses import asdict

    from compile_cases import Case
    from compile_worker import compile_case
    found = compile_case(asdict(Case("forward", ARCH, "bf16", 64, order=True)))
    loop, products = found["loops"][0]
    kept = {name: found[name] for name in ("registers", "spilled", "shared", "instructions")}
    return kept | dict(loop=loop, products=products)


def measure() -> dict:
    import triton
    from triton.runtime.driver import driver
    driver.set_active(AbsentGPU(ARCH))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ladder.py"
        path.write_text(kernel_sources())
        spec = importlib.util.spec_from_file_location("ladder", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        rungs = {name: compile_rung(module, *rung) for name, rung in RUNGS.items()}
    rungs["the package's kernel"] = last_rung()
    return dict(arch=ARCH, triton=triton.__version__, kernels=fingerprint(), rungs=rungs)


if __name__ == "__main__":
    import os
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a cached kernel comes without ptxas' words
        STORED.write_text(json.dumps(measure(), indent=1) + "\n")
