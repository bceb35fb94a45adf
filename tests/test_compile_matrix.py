"""Kernels compiled ahead of time for GPUs that are not here: they compile, nothing spills, they fit shared memory, and the matrix units are used."""
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from hilbert_attn.kernels import backward, block_sparse, forward
from hilbert_attn.kernels.block_sparse import default_block_tile, fit_block_tile
from hilbert_attn.kernels.forward import Tile, Workload, default_tile, fit_tile, split_head_dim

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
KERNELS = {"forward": ("forward", "_forward_kernel"), "dq": ("backward", "_dq_kernel"), "dkv": ("backward", "_dkv_kernel"), "small": ("backward", "_small_kernel"),
           **{f"block_{name}": ("block_sparse", f"_block_{name}_kernel") for name in ("forward", "dq", "dkv")}}


@dataclass(frozen=True)
class Case:
    "One kernel, one specialisation, one architecture; every kernel of the package can be described like this."
    kernel: str
    arch: int
    dtype: str = "bf16"
    head_dim: int = 64
    order: bool = False
    rows: int = 4096 # rows of a group
    traits: tuple = () # of CAUSAL, HAS_KEY_MASK, HAS_DROPOUT, HAS_DLSE
    tile: Tile | None = None # None is the default of the architecture
    axes: int = 0 # coordinates per slot, for block kernels
    block: tuple = (128, 128) # for block kernels

    @property
    def half(self): return self.dtype in ("bf16", "fp16")

    def __str__(self):
        return "-".join(map(str, [self.kernel, f"sm{self.arch}", self.dtype, f"D{self.head_dim}", *["order"] * self.order, *[f"rows{self.rows}"] * (self.rows != 4096), *self.traits,
                                  *([f"axes{self.axes}", "x".join(map(str, self.block))] if self.kernel.startswith("block") else []),
                                  *([f"{self.tile.block_m}x{self.tile.block_n}w{self.tile.num_warps}s{self.tile.num_stages}" + "o" * self.tile.overlap + "t" * self.tile.tma] if self.tile else [])]))

    def spec(self) -> dict:
        "What `compile_worker.py` needs to know."
        dtype, capability = DTYPES[self.dtype], (self.arch // 10, self.arch % 10)
        module, name = KERNELS[self.kernel]
        arg_names = getattr(import_module(f"hilbert_attn.kernels.{module}"), name).arg_names
        block_d, block_e = split_head_dim(self.head_dim)
        flags = dict(HEAD_GROUP=1, MODE="residue", HAS_ORDER=self.order, CAUSAL=False, HAS_KEY_MASK=False, HAS_DROPOUT=False, HAS_DLSE=False, OVERLAP=False, TMA=False, EVEN=True, SINGLE=False, PACK=1,
                     HEAD_DIM=self.head_dim, BLOCK_D=block_d, BLOCK_E=block_e, PRECISION="ieee", ALIGN=math.gcd(16, self.head_dim)) | {t: True for t in self.traits}
        if self.kernel.startswith("block"):
            kind = self.kernel.removeprefix("block_")
            wanted = self.tile or default_block_tile(kind, self.head_dim, dtype, capability, "HAS_DROPOUT" in self.traits, self.axes)
            tile = fit_block_tile(wanted, self.block, int(kind == "dkv"))
            flags |= dict(AXES=self.axes, OWN_ORDER=self.order, EVEN=not self.order, SPLIT_M=self.block[0] // tile.block_m, SPLIT_N=self.block[1] // tile.block_n, OVERLAP=tile.overlap, TMA=tile.tma)
            if not self.order: flags |= dict(q_token_ptr=None, k_token_ptr=None)
        elif self.kernel == "small":
            fit = backward.fit_small(default_tile("dq", self.head_dim, dtype, capability), self.rows, self.head_dim, dtype, capability)
            tile = fit.tile
            flags |= dict(PACK=fit.pack)
        else:
            tile = self.tile or default_tile(self.kernel, self.head_dim, dtype, capability, "HAS_DROPOUT" in self.traits)
            if self.kernel != "dkv":
                fit = fit_tile(tile, self.rows, self.rows, self.head_dim, dtype, capability)
                tile = fit.tile
                flags |= dict(PACK=fit.pack, SINGLE=fit.single)
            flags |= dict(OVERLAP=tile.overlap, TMA=tile.tma)
        flags |= dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n)
        if not self.order: flags["order_ptr"] = None
        wide = "fp64" if self.dtype == "fp64" else "fp32"
        pointers = dict(lse=wide, dlse=wide, lse2=wide, delta=wide, order="i64", mask="u1", offset="i32", seed="i64", **dict.fromkeys(("q_token", "k_token", "lo", "hi", "at", "turn", "start", "index", "full"), "i32"))
        types = {n: f"*{pointers.get(n[:-4], self.dtype)}" if n.endswith("_ptr") else ["i32"] * 3 if n.endswith("_strides") else "fp64" if n.endswith("scale") else "i32" for n in arg_names}
        for desc in ("k_desc", "v_desc", "q_desc", "do_desc"):
            if tile.tma: types[desc] = f"tensordesc<{self.dtype}[1,1,1,{tile.block_m if self.kernel.endswith('dkv') else tile.block_n},{self.head_dim}]>"
            else: flags[desc] = None
        constants = {n: x for n, x in flags.items() if n in arg_names}
        return dict(module=f"hilbert_attn.kernels.{module}", kernel=name, arch=self.arch, num_warps=tile.num_warps, num_stages=tile.num_stages, constants=constants,
                    types={n: t for n, t in types.items() if n not in constants}, aligned=[n for n in arg_names if n.endswith("_strides")] if self.head_dim % 16 == 0 else [])


LOOPS = ("forward", "dq", "dkv")
BLOCKS = tuple(f"block_{kernel}" for kernel in LOOPS)
TRAITS = dict(CAUSAL="causal", HAS_KEY_MASK="mask", HAS_DROPOUT="dropout")  # of kernels, of tuning


def kernels_of_segments() -> list[Case]:
    "Every architecture, head dim and dtype where they could differ."
    dims = (32, 64, 80, 128, 256)
    cases = [Case(kernel, 90, head_dim=d, order=order)
             for kernel in LOOPS for d in dims for order in (False, True)]
    cases += [Case(kernel, arch, head_dim=d, order=(i + arch // 20) % 2 == 0)
              for kernel in LOOPS for arch in (80, 100) for i, d in enumerate(dims)]
    others = ((90, "fp16", 64), (90, "fp16", 128), (90, "fp32", 64), (90, "fp32", 128),
              (80, "fp32", 64), (100, "fp32", 128), (90, "fp32", 80), (90, "fp32", 256))
    cases += [Case(kernel, arch, dtype, d, order=d == 64)
              for kernel in LOOPS for arch, dtype, d in others]
    cases += [Case(kernel, 90, head_dim=40) for kernel in LOOPS]  # strides are multiples of 8 only
    return cases + [Case(kernel, 90, "fp64") for kernel in LOOPS]


def small_groups() -> list[Case]:
    cases = [Case(kernel, 90, head_dim=d, rows=rows, order=rows == 32)
             for kernel in ("forward", "small") for d in (64, 128) for rows in (16, 32, 64)]
    cases += [Case("small", 90, rows=64, traits=(trait,)) for trait in TRAITS]
    cases += [Case("forward", 80, rows=64), Case("small", 80, rows=64),
              Case("forward", 90, rows=128), Case("forward", 90, head_dim=128, rows=128)]
    return cases + [Case("small", 90, rows=128), Case("small", 90, "fp32", rows=16)]


def kernels_of_blocks() -> list[Case]:
    "Every number of axes, blocks wider than tiles, other architectures and dtypes."
    cases = [Case(kernel, 90, head_dim=d, order=(axes + d // 64) % 2 == 0, axes=axes,
                  traits=("CAUSAL",) * (axes == 3 or d == 64 and axes == 0))
             for kernel in BLOCKS for d in (64, 128) for axes in range(4)]
    cases += [Case(kernel, arch, head_dim=d, order=d == 128, traits=("CAUSAL",) * (arch == 80),
                   axes=3 if arch == 80 else 2)
              for kernel in BLOCKS for arch in (80, 100) for d in (64, 128)]
    splits = ((128, (128, 64)), (80, (64, 64)), (256, (128, 128)))
    cases += [Case(kernel, 90, head_dim=d, axes=2, block=block, order=d == 80)
              for kernel in BLOCKS for d, block in splits]
    return cases + [Case(kernel, 90, dtype, axes=1) for kernel in BLOCKS for dtype in ("fp16", "fp32")]


def choices(kernel: str, d: int, traits: tuple, order: bool, blocks: bool) -> list[Tile]:
    "What the tuner may take, the default first."
    words = ("blocks",) * blocks + ("order",) * order + tuple(TRAITS[t] for t in traits)
    work = Workload(kernel, d, 4096, (16, 16), torch.bfloat16, words, tma=not order)
    default = default_tile(kernel, d, torch.bfloat16, (9, 0), "HAS_DROPOUT" in traits)
    return work.candidates(default)[1:]


def tiles_of_the_tuner() -> list[Case]:
    "Defaults and candidates with everything that they may meet, on sm_90."
    cases = []
    for kernel in LOOPS:
        for d in (64, 128):
            for traits in ((), ("CAUSAL",), ("HAS_KEY_MASK",), ("HAS_DROPOUT",)):
                for order in (False, True):
                    common = dict(head_dim=d, order=order, traits=traits)
                    found = [None, *choices(kernel, d, traits, order, blocks=False)]
                    cases += [Case(kernel, 90, tile=tile, **common) for tile in found]
                    found = [None, *choices(kernel, d, traits, order, blocks=True)]
                    cases += [Case(f"block_{kernel}", 90, tile=tile, axes=2 + order, **common)
                              for tile in found if may_describe(kernel, tile, traits)]
    return cases


def may_describe(kernel: str, tile: Tile | None, traits: tuple) -> bool:
    "Block kernels that walk keys take no descriptors where keys are masked."
    return tile is None or not tile.tma or kernel == "dkv" or "HAS_KEY_MASK" not in traits


def matrix() -> list[Case]:
    "All of it; most only where everything is tested."
    cases = kernels_of_segments() + small_groups() + kernels_of_blocks() + tiles_of_the_tuner()
    return list(dict.fromkeys(cases))


def sampled(cases: list[Case]) -> list[Case]:
    "One in a dozen, which together hold every kernel, and every architecture."
    return cases[::12]


EVERY = matrix()
SAMPLE = sampled(EVERY)
FULL = os.environ.get("FULL") == "1"
CASES = EVERY if FULL else SAMPLE


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
    tool = HERE.parent / "tools" / "gpu" / "compiling.py"
    files = [Path(x.__file__) for x in (forward, backward, block_sparse)]
    sources = [path.read_bytes() for path in (*files, HERE / "compile_worker.py", tool)]
    parts = [given.encode(), triton.__version__.encode(), *sources]
    return "hilbert_attn/" + sha256(b"".join(parts)).hexdigest()


@pytest.fixture(scope="module")
def compiled(request) -> dict:
    "The cases that run, compiled by two processes beside this one, or remembered."
    given = json.dumps([case.spec() for case in CASES])
    key, cache = remembered_as(given), getattr(request.config, "cache", None)
    results = cache and cache.get(key, None)  # no cache under `-p no:cacheprovider`
    if not results:
        results = worker("compile_worker.py", "2", given=given)
        if cache: cache.set(key, results)
    return dict(zip(CASES, results))


@pytest.mark.timeout(600)
def test_what_the_launcher_passes_compiles():
    launched = worker("launch_worker.py")
    names = {kernel: name for kernel, (_, name) in KERNELS.items()}
    assert {entry["kernel"] for entry in launched} == set(names.values())
    for entry in launched:
        assert entry["wgmma"] > 0 and entry["programs"] > 0
        assert entry["shared"] <= SHARED_LIMIT[90]
        assert (entry["tma"] > 0) == entry["describes"]
        assert entry["ahead"], f"{entry['kernel']}: compiled ahead is not what is launched"
    described = {entry["kernel"] for entry in launched if entry["describes"]}
    assert described == set(names.values()) - {names["small"]}


def rare(case: Case):
    "Left to `make full`, unless it is in the sample."
    return case if case in SAMPLE else pytest.param(case, marks=pytest.mark.full)


@pytest.mark.timeout(3600 if FULL else 600)
@pytest.mark.parametrize("case", [rare(case) for case in EVERY], ids=[str(case) for case in EVERY])
def test_compiles(compiled, case):
    result = compiled[case]
    assert "error" not in result, result.get("error")
    assert result["shared"] <= SHARED_LIMIT[case.arch], f"{result['shared']} bytes of shared memory"
    if not case.half: return
    assert result["mma"] + result["wgmma"] + result["tcgen05"] > 0, "no matrix unit"
    assert {80: result["mma"], 90: result["wgmma"], 100: True}[case.arch] > 0
    assert result["scalar_loads"] == 0, "rows are not read in 16-byte pieces"
    if case.head_dim > 128: return
    registers = f"at {result['registers']} registers"
    assert result["spilled"] == result["stack"] == 0, f"{result['stack']} bytes spilled, {registers}"
    if case.arch == 90: assert not result["advice"], f"the assembler warns: {result['advice']}"
