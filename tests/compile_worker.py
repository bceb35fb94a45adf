"""Compiles kernels for GPUs that are not here.

Reads a JSON list of cases on stdin, writes a JSON list of what came out; run in a process without
TRITON_INTERPRET. A case names a module and a kernel in it, and gives everything that a launch
would: constants, types of the other arguments, tile, architecture.
"""
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from gpu.compiling import compile_listening, examine


def _tuples(x): return tuple(map(_tuples, x)) if isinstance(x, list) else x


def signature(kernel, case: dict) -> tuple[dict, dict, dict]:
    "Types, constants and alignments, as a launch would find them."
    types, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in case["constants"]:
            types[name], constants[name] = "constexpr", case["constants"][name]
            continue
        types[name] = _tuples(case["types"][name])
        if name in case.get("aligned", ()) or str(types[name]).startswith("*"):
            several = isinstance(types[name], tuple)
            paths = [(i, j) for j in range(len(types[name]))] if several else [(i,)]
            attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    return types, constants, attributes


def compile_case(case: dict) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    try:
        kernel = getattr(import_module(case["module"]), case["kernel"])
        source = ASTSource(kernel, *signature(kernel, case))
        target = GPUTarget("cuda", case["arch"], 32)
        options = dict(num_warps=case["num_warps"], num_stages=case["num_stages"],
                       enable_fp_fusion=True)
        compiled, log = compile_listening(
            lambda: triton.compile(source, target=target, options=options))
        return examine(compiled, log)
    except Exception as e:
        return dict(error=f"{type(e).__name__}: {e}"[:2000])


def main():
    cases, workers = json.load(sys.stdin), int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a cached kernel comes without ptxas' words
        if workers == 1: results = list(map(compile_case, cases))
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                results = list(pool.map(compile_case, cases, chunksize=1))
    json.dump(results, sys.stdout)


if __name__ == "__main__": main()
