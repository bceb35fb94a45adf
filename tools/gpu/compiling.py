"""Kernels compiled ahead of their launch, by many processes at once, and what the compiler said."""
import io
import os
import re
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch

from hilbert_attn.kernels import launch, tuning

FUSION_UNSET = "TRITON_DEFAULT_FP_FUSION"  # every launch says it itself


# ---- what came out

def spilled(log: str) -> int:
    "Bytes that ptxas stores because registers ran out, per thread."
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", log)))


def advice(log: str) -> list[str]:
    "What ptxas calls a potential loss: C7508 to C7514, such as serialised matrix products."
    return sorted(set(re.findall(r"C75\d\d", log)))


def inner_loops(sass: str, products: str = "MMA") -> list[tuple[int, int]]:
    "Of each innermost loop that multiplies: instructions, and those that do, matrix ones or FFMA."
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            loops.append((place[int(target[1], 16)], i))
    def holds(a, b): return a != b and a[0] <= b[0] and b[1] <= a[1]

    wanted = r"\b[HQI]G?MMA" if products == "MMA" else rf"\b{products}\b"
    innermost = [a for a in loops if not any(holds(a, b) for b in loops)]
    counts = []
    for first, last in innermost:
        body = [text for _, text in lines[first:last + 1]]
        counts.append((len(body), sum(bool(re.search(wanted, text)) for text in body)))
    return [count for count in counts if count[1]]


def disassemble(cubin: bytes) -> str:
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        ran = subprocess.run([tool, "-sass", "-res-usage", path], capture_output=True, text=True)
    return ran.stdout + ran.stderr


def examine(compiled, log: str) -> dict:
    "Registers, spills, shared memory, advice and instructions of a compiled kernel."
    ptx, sass = compiled.asm["ptx"], disassemble(compiled.asm["cubin"])
    loops = inner_loops(sass)
    return dict(
        registers=int(re.search(r"REG:(\d+)", sass)[1]),
        stack=int(re.search(r"STACK:(\d+)", sass)[1]),
        spilled=spilled(log), advice=advice(log), shared=compiled.metadata.shared,
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", sass)), loops=loops,
        wgmma=ptx.count("wgmma.mma_async"), mma=len(re.findall(r"\bmma\.sync", ptx)),
        tcgen05=ptx.count("tcgen05.mma"), tma=ptx.count("cp.async.bulk.tensor"),
        async_copies=len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        vector_loads=len(re.findall(r"ld\.global\S*\.v4", ptx)),
        scalar_loads=len(re.findall(r"ld\.global\S*\.b16", ptx)))


def compile_listening(compile) -> tuple:
    "Runs `compile` with a cache of its own, since a cached kernel comes without ptxas' words."
    from triton import knobs
    warnings.filterwarnings("ignore", message=FUSION_UNSET)
    words = io.StringIO()
    with knobs.nvidia.scope(), redirect_stdout(words):
        knobs.nvidia.dump_ptxas_log = True
        compiled = compile()
    return compiled, words.getvalue()


# ---- launches, recorded without a GPU

@dataclass(frozen=True)
class Pointer:
    "A tensor, of which a compiler sees the type of its elements."
    dtype: torch.dtype


@dataclass(frozen=True)
class Box:
    "A tensor descriptor, of which it sees type and block."
    dtype: torch.dtype
    rank: int
    block: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    "A kernel and all that decides how it is compiled."
    module: str
    kernel: str
    arguments: tuple
    constants: tuple
    warps: int
    stages: int

    @property
    def key(self) -> str:
        return f"{self.kernel} {sha256(repr(self).encode()).hexdigest()[:12]}"


def _seen_by_compiler(x):
    "An argument, as far as the compiler specialises for it."
    if isinstance(x, torch.Tensor): return Pointer(x.dtype)
    if hasattr(x, "block_shape"): return Box(x.base.dtype, len(x.shape), tuple(x.block_shape))
    if isinstance(x, tuple): return type(x)(*map(_seen_by_compiler, x)) if hasattr(x, "_fields") \
        else tuple(map(_seen_by_compiler, x))
    if isinstance(x, int) and not isinstance(x, bool):
        return x if x in (0, 1) or x >= 2 ** 31 else 16 if x % 16 == 0 else 3
    return 0.5 if isinstance(x, float) else x


def describe_launch(kernel, tile, arguments, constants) -> Launch:
    "What `launch.start` was given, without the sizes that are not specialised for."
    free = {p.name for p in kernel.params if p.do_not_specialize}
    pairs = zip(kernel.arg_names, arguments)
    seen = tuple(3 if name in free else _seen_by_compiler(x) for name, x in pairs)
    return Launch(kernel.fn.__module__, kernel.fn.__name__, seen, tuple(sorted(constants.items())),
                  tile.num_warps, tile.num_stages)


@contextmanager
def replaced(module, **fakes) -> Iterator[None]:
    "Attributes of a module, for a while."
    kept = {name: getattr(module, name) for name in fakes}
    for name, fake in fakes.items(): setattr(module, name, fake)
    try: yield
    finally:
        for name, value in kept.items(): setattr(module, name, value)


@contextmanager
def recording(capability: tuple[int, int], all_tiles: bool) -> Iterator[dict[str, Launch]]:
    "Launches of the package's kernels are written down, key -> launch, and nothing runs."
    found: dict[str, Launch] = {}

    def start(kernel, programs, tile, *arguments, **constants):
        entry = describe_launch(kernel, tile, arguments, constants)
        found[entry.key] = entry

    def tuned(work, fallback, q, run):
        if all_tiles:
            for tile in work.candidates(fallback): run(tile)
        return fallback

    with ExitStack() as stack:
        stack.enter_context(replaced(tuning, tuned_tile=tuned))
        stack.enter_context(replaced(launch, start=start, check_triton=lambda device: None,
                                     capability=lambda device: capability))
        yield found


# ---- compiling them

class AbsentGPU:
    "The little that a launch asks of a driver before it has a kernel."
    def __init__(self, arch: int): self.arch = arch
    def get_current_device(self): return self.arch  # kernels are remembered by device
    def get_current_stream(self, device): return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", self.arch, 32)


def _as_argument(x):
    "The inverse of `_seen_by_compiler`, without memory behind it."
    if isinstance(x, Pointer): return torch.empty(0, dtype=x.dtype, device="meta")
    if isinstance(x, tuple):
        parts = map(_as_argument, x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if not isinstance(x, Box): return x
    from triton.tools.tensor_descriptor import TensorDescriptor
    base = torch.empty(0, dtype=x.dtype, device="meta")
    return TensorDescriptor(base, [16] * x.rank, [16] * (x.rank - 1) + [1], list(x.block))


def warm(entry: Launch, arch: int):
    "Compiles into Triton's cache, for a GPU that this process need not see."
    from triton.runtime.driver import driver
    driver.set_active(AbsentGPU(arch))
    kernel = getattr(import_module(entry.module), entry.kernel)
    options = dict(num_warps=entry.warps, num_stages=entry.stages, enable_fp_fusion=True)
    arguments = map(_as_argument, entry.arguments)
    return kernel.warmup(*arguments, grid=(1,), **dict(entry.constants), **options)


def compile_launch(entry: Launch, arch: int) -> dict:
    "What came out of it; never raises."
    row = dict(key=entry.key, kernel=entry.kernel, warps=entry.warps, stages=entry.stages,
               static=str(dict(entry.constants).get("S")))
    try:
        return row | examine(*compile_listening(lambda: warm(entry, arch)))
    except Exception as error:
        return row | dict(failed=f"{type(error).__name__}: {error}"[:600],
                          where=traceback.format_exc(limit=-2)[:1200])


def _hide_gpu():
    "Compilers need none; each would take half a gigabyte of it."
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


class Compilers:
    "Processes that stay, since each takes seconds to start."
    def __init__(self, workers: int):
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"),
                                        initializer=_hide_gpu)

    def compile(self, launches: list[Launch], arch: int) -> Iterator[dict]:
        "Rows as they come."
        waiting = {self.pool.submit(compile_launch, x, arch): x for x in launches}
        for done in as_completed(waiting):
            entry, error = waiting[done], done.exception()
            row = dict(key=entry.key, kernel=entry.kernel)
            yield row | dict(failed=str(error)) if error else done.result()

    def stop(self):
        for process in list(self.pool._processes.values()): process.kill()
        self.pool.shutdown(wait=False, cancel_futures=True)
