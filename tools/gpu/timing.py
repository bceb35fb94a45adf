"""Milliseconds of the GPU alone: ten launches in a CUDA graph, replayed."""
import time

import torch

LAUNCHES = 10


def quantiles(times: list[float]) -> dict:
    times = sorted(times)

    def pick(share): return times[min(len(times) - 1, int(share * len(times)))]

    return dict(ms=pick(0.5), p20=pick(0.2), p80=pick(0.8), repeats=len(times))


def capture(run, launches: int = LAUNCHES) -> torch.cuda.CUDAGraph:
    "A graph of that many runs. What it writes stays alive with it."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2): run()  # compiles, fills caches
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches): run()
    return graph


def stopwatch(replay, launches: int, seconds: float, least: int = 5, most: int = 40) -> list[float]:
    "Milliseconds of one launch, per replay."
    end, times = time.monotonic() + seconds, []
    while len(times) < least or (time.monotonic() < end and len(times) < most):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / launches)
    return times


def on_cpu(run, repeats: int = 2) -> dict:
    "For the dry run, whose times mean nothing."
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return quantiles(times)


def as_many(run) -> int:
    "Launches in a graph: ten, fewer where those would take more than a fifth of a second."
    run()
    torch.cuda.synchronize()
    once = stopwatch(run, 1, 0, least=1)[0]
    return max(1, min(LAUNCHES, int(200 / once)))


def milliseconds(run, seconds: float = 0.2) -> dict:
    "Median, p20, p80 and repeats; and why no graph could be captured, where none could."
    if not torch.cuda.is_available(): return on_cpu(run)
    launches = as_many(run)
    try:
        graph = capture(run, launches)
    except Exception as error:
        if "out of memory" in str(error).lower(): raise
        torch.cuda.synchronize()
        return quantiles(stopwatch(run, 1, seconds)) | dict(not_captured=str(error)[:200])
    graph.replay()
    return quantiles(stopwatch(graph.replay, launches, seconds)) | dict(launches=launches)


def call_us(run, calls: int = 100) -> float:
    "Microseconds that a call keeps Python busy; the GPU works beside it."
    for _ in range(10): run()
    synchronize()
    begin = time.perf_counter()
    for _ in range(calls): run()
    spent = time.perf_counter() - begin
    synchronize()
    return spent * 1e6 / calls


def synchronize():
    if torch.cuda.is_available(): torch.cuda.synchronize()


def peak_mib(run) -> float | None:
    "Memory that a run needs on top of its inputs."
    if not torch.cuda.is_available(): return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
