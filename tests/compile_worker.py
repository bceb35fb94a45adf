"""Compiles kernels for GPUs that are not here. Reads a JSON list of cases on stdin, writes a JSON list of what came out; run in a process without TRITON_INTERPRET.

A case names a module and a kernel in it, and gives everything that a launch would: constants, types of the other arguments, tile, architecture. It knows nothing of any particular kernel.
"""
import json
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


def _tuples(x): return tuple(map(_tuples, x)) if isinstance(x, list) else x


def compile_case(case: dict) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    try:
        kernel = getattr(import_module(case["module"]), case["kernel"])
        types, constants, attributes = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name in case["constants"]:
                types[name], constants[name] = "constexpr", case["constants"][name]
                continue
            types[name] = _tuples(case["types"][name])
            if name in case.get("aligned", ()) or str(types[name]).startswith("*"):
                paths = [(i, j) for j in range(len(types[name]))] if isinstance(types[name], tuple) else [(i,)]
                attributes |= {path: [["tt.divisibility", 16]] for path in paths}
        options = dict(num_warps=case["num_warps"], num_stages=case["num_stages"], enable_fp_fusion=True)
        compiled = triton.compile(ASTSource(kernel, types, constants, attributes), target=GPUTarget("cuda", case["arch"], 32), options=options)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        ptx = compiled.asm["ptx"]
        return dict(registers=int(re.search(r"REG:(\d+)", usage)[1]), stack=int(re.search(r"STACK:(\d+)", usage)[1]), shared=compiled.metadata.shared,
                    wgmma=ptx.count("wgmma.mma_async"), mma=len(re.findall(r"\bmma\.sync", ptx)), tcgen05=ptx.count("tcgen05.mma"), tma=ptx.count("cp.async.bulk.tensor"),
                    async_copies=len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)), vector_loads=len(re.findall(r"ld\.global\S*\.v4", ptx)),
                    scalar_loads=len(re.findall(r"ld\.global\S*\.b16", ptx)))
    except Exception as e:
        return dict(error=f"{type(e).__name__}: {e}"[:2000])


if __name__ == "__main__":
    cases, workers = json.load(sys.stdin), int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool: json.dump(list(pool.map(compile_case, cases, chunksize=1)), sys.stdout)
