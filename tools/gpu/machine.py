"""The device itself: what each kind of task does on it."""
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import triton

from hilbert_attn.kernels import tuning

from . import cases, checks, compiling, contenders, timing
from .problems import DRY, device, large_problem, small_problem, walked
from .session import TIME_IS_UP, Store

ROOT = Path(__file__).resolve().parent.parent.parent
Emit = Callable[[dict], None]


def words_of(*command: str) -> str:
    "What a program prints, and nothing where it is missing or fails."
    if not shutil.which(command[0]): return ""
    try: ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired: return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


class Blacklisted(RuntimeError):
    "A kernel that was wrong is not timed."


def check_blacklist(kernels: list[str], case: dict, wrong: set[str]) -> None:
    "What is wrong without a mask is not trusted with one."
    cases_ = case, case | dict(causal=False)
    names = {checks.name_of_kernel(kernel, one) for kernel in kernels for one in cases_}
    if found := sorted(wrong & names):
        raise Blacklisted(f"not timed: {', '.join(found)} computed wrong results")


_candidates = tuning.Workload.candidates


def sound_candidates(bad: set[str]) -> Callable:
    "The tuner's tiles without those; the default stays, for which the kernel stands."
    def candidates(work, default):
        kernel = "block_" * ("blocks" in work.traits) + work.kernel
        return [tile for tile in _candidates(work, default)
                if tile == default or checks.name_of_tile(kernel, work.head_dim, tile) not in bad]
    return candidates


class Machine:
    "An NVIDIA GPU; in the dry run a CPU with Triton's interpreter, at toy sizes."
    def __init__(self, store: Store, state: Path, workers: int, earlier: list[dict] = ()):
        self.store, self.state, self.workers = store, state, workers
        self.earlier = list(earlier)  # rows of other parts, events among them
        self.compilers = None

    def stop(self) -> None:
        if self.compilers: self.compilers.stop()

    def rows(self) -> list[dict]: return self.earlier + self.store.rows

    def wrong(self) -> set[str]:
        return {name for row in self.rows() for name in row.get("wrong", ())}

    def stuck(self) -> set[str]:
        "Tiles that took a process down, or its GPU, or that did not come back."
        failed = {row["task"] for row in self.rows() if row.get("failed", TIME_IS_UP) != TIME_IS_UP}
        tried = {event: Counter((row["task"], row["tile"]) for row in self.rows()
                                if row.get("event") == event) for event in ("trying", "tried")}
        return {tile for task, tile in tried["trying"] - tried["tried"] if task in failed}

    # ---- the machine

    def environment(self, case: dict, emit: Emit) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        info = dict(date=now, commit=words_of("git", "rev-parse", "HEAD") or "unknown",
                    python=sys.version.split()[0], torch=torch.__version__,
                    triton=triton.__version__, dry_run=DRY)
        if not DRY: info |= self.describe_gpu()
        emit(dict(environment=info | (dict(gpu="none, interpreted on CPU") if DRY else {})))

    def describe_gpu(self) -> dict:
        p = torch.cuda.get_device_properties(0)
        asked = dict(driver="driver_version", sm_clock="clocks.sm", memory_clock="clocks.mem",
                     power="power.draw", power_limit="power.limit", temperature="temperature.gpu")
        query = f"--query-gpu={','.join(asked.values())}"
        told = words_of("nvidia-smi", query, "--format=csv,noheader").split(", ")
        return dict(gpu=p.name, capability=f"{p.major}.{p.minor}", cores=os.cpu_count(),
                    multiprocessors=p.multi_processor_count, cuda=torch.version.cuda,
                    memory_gib=round(p.total_memory / 2 ** 30),
                    cudnn=torch.backends.cudnn.version(), **dict(zip(asked, told)))

    def rates(self, case: dict, emit: Emit) -> None:
        "bf16 matrix products, the best of three shapes, and copies larger than any cache."
        dtype, where = torch.float32 if DRY else torch.bfloat16, device()
        found = {}
        for n in (64,) if DRY else (4096, 8192, 16384):
            a, b = (torch.randn(n, n, device=where, dtype=dtype) for _ in range(2))
            multiply = partial(torch.mm, a, b, out=torch.empty_like(a))
            spent = timing.milliseconds(multiply, 1.0)
            found[f"{n}"] = 2 * n ** 3 / spent["ms"] / 1e9
        source = torch.ones((1 << 16) if DRY else (1 << 30), dtype=torch.int8, device=where)
        target = torch.empty_like(source)
        spent = timing.milliseconds(lambda: target.copy_(source), 1.0)
        emit(dict(rates=dict(matmul_tflops=max(found.values()), by_size=found,
                             copy_gbs=2 * source.numel() / spent["ms"] / 1e6)))

    # ---- compiling

    def precompile(self, case: dict, emit: Emit) -> None:
        "All kernels that some cases need, and are not compiled yet."
        if DRY: return emit(dict(kernels=0))
        known = {row["key"] for row in self.rows() if "registers" in row}
        p = torch.cuda.get_device_properties(0)
        found = {}
        for size, build in (("small", small_problem), ("large", large_problem)):
            with compiling.recording((p.major, p.minor), all_tiles=size == "large") as launches:
                for one in case.get(size, ()): self.record(partial(build, one, "meta"), emit)
            found |= launches
        missing = [launch for key, launch in found.items() if key not in known]
        self.compilers = self.compilers or compiling.Compilers(self.workers)
        for row in self.compilers.compile(missing, p.major * 10 + p.minor): emit(row)
        emit(dict(kernels=len(found), compiled=len(missing)))

    def record(self, build: Callable, emit: Emit) -> None:
        try: build().launch()
        except Exception as error: emit(dict(failed=f"not recorded: {error}"[:300]))

    # ---- correctness

    def check(self, case: dict, emit: Emit) -> None:
        os.environ["HILBERT_ATTN_AUTOTUNE"] = "0"  # the tile is the default, or forced
        tile = checks.name_of_forced(case)
        if tile in self.stuck(): raise Blacklisted(f"not tried again: {tile}")
        with trying(tile, emit): found = checks.check(case)
        emit(dict(case=cases.name_of(case)) | found)

    def strides(self, case: dict, emit: Emit) -> None:
        if not DRY: emit(dict(case="offsets beyond 2^31") | checks.check_large_strides())

    def graph(self, case: dict, emit: Emit) -> None:
        os.environ["HILBERT_ATTN_AUTOTUNE"] = "0"
        if not DRY: emit(dict(case="replayed graph") | checks.check_graph(case))

    # ---- speed

    def sweep(self, case: dict, emit: Emit) -> None:
        "Every candidate tile of the kernels that a case launches; the best go to the tuner."
        problem, label = large_problem(case), cases.speed_name(case)
        self.tuner()
        with sweeping(lambda row: emit(dict(case=label) | row), self.wrong()):
            problem.launch()
        if case["w"] // case["r"] <= 64: self.time(case, "triton", problem, emit)

    def tuner(self) -> None:
        "Where tuned tiles are remembered: beside the results, for the next part."
        os.environ["HILBERT_ATTN_CACHE"] = str(self.state)
        os.environ["HILBERT_ATTN_AUTOTUNE"] = "1"
        tuning.Workload.candidates = sound_candidates(self.wrong() | self.stuck())

    def speed(self, case: dict, emit: Emit) -> None:
        "One contender, forward, and forward and backward."
        self.tuner()
        name = case["contender"]
        check_blacklist(contenders.kernels_of(name, case)[:1], case, self.wrong())
        (function, x), problem = contenders.contender(name, case)
        self.time(case, name, problem, emit, function, x)

    def time(self, case, name, problem, emit, function=None, x=None) -> None:
        x = x or [t.requires_grad_() for t in (problem.q, problem.k, problem.v)]
        function = function or (lambda *t: problem.attend(*t)[0])
        upstream = torch.randn_like(x[0])

        def forward():
            with torch.no_grad(): return function(*x)

        def both(): return torch.autograd.grad(function(*x), x, upstream)

        label = {k: v for k, v in case.items() if k not in ("peers", "contender")}
        for kind, run in (("forward", forward), ("forward+backward", both)):
            if kind != "forward":
                check_blacklist(contenders.kernels_of(name, case), case, self.wrong())
            row = dict(case=label | dict(name=cases.speed_name(case)), kind=kind, name=name)
            if "pattern" in case and name == "triton": row["walked"] = walked(case)
            peak = timing.peak_mib(run)
            emit(row | timing.milliseconds(run) | dict(peak_mib=peak, pairs=problem.pairs))

    def front(self, case: dict, emit: Emit) -> None:
        "The public function: Python's time a call, beside the GPU's."
        self.tuner()
        (function, x), problem = contenders.contender("front door", case)
        self.time(case, "front door", problem, emit, function, x)
        for name in ("front door", "triton"):
            (function, x), _ = contenders.contender(name, case)
            call = partial(function, *x)
            with torch.no_grad(): spent = timing.call_us(call, 5 if DRY else 100)
            emit(dict(case=cases.speed_name(case), name=name, call_us=spent))

    # ---- other programs

    def program(self, case: dict, emit: Emit) -> None:
        "A program that may be missing, run on a few launches of ours; its text is kept."
        from .outside import run_program
        emit(run_program(case, self.state))

    def ring(self, case: dict, emit: Emit) -> None:
        from .outside import ring_on_one_rank
        emit(ring_on_one_rank(case))

    def long(self, case: dict, emit: Emit) -> None:
        "A long sequence, forward and backward once it fits, and its memory."
        self.tuner()
        problem = large_problem(case)
        self.time(case, "triton", problem, emit)


@contextmanager
def sweeping(emit: Emit, wrong: set[str]):
    "Instead of being tuned in silence, every tile is timed into a row."
    def sweep(work, fallback, q, run):
        times = {}
        for tile in work.candidates(fallback):
            row = dict(kernel=work.kernel, work=str(work), tile=asdict(tile), keys=work.keys)
            if checks.name_of_kernel(work.kernel, dict(d=work.head_dim)) in wrong:
                emit(row | dict(failed="it computed wrong results"))
                continue
            with trying(checks.name_of_tile(work.kernel, work.head_dim, tile), emit):
                times[tile] = time_tile(row, tile, run, emit)
        known = {tile: ms for tile, ms in times.items() if ms is not None}
        best = min(known, key=known.__getitem__, default=fallback)
        if q.is_cuda and known: tuning.tile_cache.put(work.key(q.device), best)
        return best

    with compiling.replaced(tuning, tuned_tile=sweep): yield


@contextmanager
def trying(tile: str | None, emit: Emit):
    "Written down before, so that what did not come back is known."
    if tile: emit(dict(event="trying", tile=tile))
    yield
    if tile: emit(dict(event="tried", tile=tile))


def time_tile(row: dict, tile, run: Callable, emit: Emit) -> float | None:
    from .session import lost_the_gpu
    try: spent = timing.milliseconds(lambda: run(tile))
    except Exception as error:
        emit(row | dict(failed=f"{type(error).__name__}: {error}"[:300]))
        if lost_the_gpu(error): raise
        return None
    emit(row | spent)
    return spent["ms"]
