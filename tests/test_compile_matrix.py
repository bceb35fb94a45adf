"""Kernels compiled ahead of time for GPUs that are not here: they compile, nothing spills, nothing
is serialised, they fit shared memory, and the matrix units are used."""
import json
import os
import subprocess
import sys
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from compile_cases import KERNELS, Case, matrix, sampled

from hilbert_attn.kernels.tuning import tiles

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

EVERY = matrix()
SAMPLE = sampled(EVERY)
FULL = os.environ.get("FULL") == "1"
REGISTERS = {  # what decides how many programs a multiprocessor holds, or whether one spills
    Case("forward", 90, head_dim=128, tile=tiles("128x64w8s3ot")[0]): 160,
    Case("forward", 90, tile=tiles("128x64w8s3ot")[0]): 128,
    Case("small", 90, head_dim=128, rows=128): 240,
    Case("block_dkv", 90, head_dim=128, order=True, axes=3): 255}
CASES = list(dict.fromkeys([*(EVERY if FULL else SAMPLE), *REGISTERS]))


def worker(*command, given=""):
    "A script beside this one, in a process without the interpreter; what it prints, read as JSON."
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], input=given,
                         capture_output=True, text=True, env=environment | {"PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


def remembered_as(given: str) -> str:
    "A name for results that hold until a kernel, the worker or the compiler changes."
    kernels = sorted((HERE.parent / "hilbert_attn" / "kernels").glob("*.py"))
    mine = [HERE / "compile_worker.py", HERE / "compile_cases.py"]
    mine.append(HERE.parent / "tools" / "gpu" / "compiling.py")
    sources = [path.read_bytes() for path in (*kernels, *mine)]
    parts = [given.encode(), triton.__version__.encode(), *sources]
    return "hilbert_attn/" + sha256(b"".join(parts)).hexdigest()


@pytest.fixture(scope="module")
def compiled(request) -> dict:
    "The cases that run, compiled by two processes beside this one, or remembered."
    given = json.dumps([asdict(case) for case in CASES])
    key, cache = remembered_as(given), getattr(request.config, "cache", None)
    results = cache and cache.get(key, None)  # no cache under `-p no:cacheprovider`
    if not results:
        results = worker("compile_worker.py", "2", given=given)
        if cache: cache.set(key, results)
    return dict(zip(CASES, results))


@pytest.mark.timeout(600)
def test_what_the_launcher_passes_compiles():
    launched = worker("launch_worker.py")
    assert {entry["kernel"] for entry in launched} == set(KERNELS.values())
    for entry in launched:
        assert entry["wgmma"] > 0 and entry["programs"] > 0
        assert entry["shared"] <= SHARED_LIMIT[90]
        assert (entry["tma"] > 0) == entry["describes"]
        assert entry["ahead"], f"{entry['kernel']}: compiled ahead is not what is launched"
    described = {entry["kernel"] for entry in launched if entry["describes"]}
    assert described == set(KERNELS.values()) - {KERNELS["small"]}


def rare(case: Case):
    "Left to `make full`, unless it is in the sample."
    return case if case in SAMPLE else pytest.param(case, marks=pytest.mark.full)


def narrow(case: Case) -> bool:
    "Whether 256 threads share 16 rows of 16 columns: an element each."
    return case.kernel == "small" and case.arch in (80, 120) and case.head_dim == 48


@pytest.mark.timeout(3600 if FULL else 600)
@pytest.mark.parametrize("case", [rare(case) for case in EVERY], ids=[str(case) for case in EVERY])
def test_compiles(compiled, case):
    result = compiled[case]
    assert "failed" not in result, result.get("failed")
    assert result["shared"] <= SHARED_LIMIT[case.arch], f"{result['shared']} bytes of shared memory"
    if case.half:
        assert result["mma"] + result["wgmma"] + result["tcgen05"] > 0, "no matrix unit"
        assert {90: result["wgmma"], 100: True}.get(case.arch, result["mma"]) > 0
        assert result["scalar_loads"] == 0 or narrow(case), "rows are not read in 16-byte pieces"
    elif case.kernel != "small": return
    if case.head_dim > 128: return
    spilled = f"{result['stack']} bytes spilled, at {result['registers']} registers"
    assert result["spilled"] == result["stack"] == 0, spilled
    assert result["advice"] == [], "matrix products wait for each other"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", REGISTERS, ids=map(str, REGISTERS))
def test_registers(compiled, case):
    assert compiled[case]["spilled"] == 0 and compiled[case]["registers"] <= REGISTERS[case]
