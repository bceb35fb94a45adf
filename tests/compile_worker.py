"""Compiles kernels for GPUs that are not here.

Reads a JSON list of cases on stdin, writes a JSON list of what came out; run in a process without
TRITON_INTERPRET.
"""
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from compile_cases import Case, Tile
from gpu.compiling import compile_launch


def compile_case(fields: dict) -> dict:
    "What came out, or why nothing did."
    tile = fields["tile"] and Tile(**fields["tile"])
    more = dict(tile=tile, traits=tuple(fields["traits"]), block=tuple(fields["block"]))
    try: launch = Case(**fields | more).launch()
    except Exception as error: return dict(failed=f"not launched: {error!r}")
    return compile_launch(launch, fields["arch"])


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
