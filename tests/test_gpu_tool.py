"""The tool that measures on a GPU, without one: its plan under a virtual clock, its memory, its
reports. What needs kernels is gone through by `tools/gpu_run.py --dry-run`."""
import json
import math
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))
from gpu import cases, report, session, timing
from gpu.parts import MINUTES, RESERVE, plan
from gpu.session import Clock, ContextLost, Store, Task, set_aside, watch, work

RECORD = 0.2  # seconds for the launches of one case


class VirtualTime:
    "A clock that moves when somebody works."
    now = 0.0
    def __call__(self): return self.now


class PretendGPU:
    """A stand-in that takes the time that the real thing would.

    A compilation takes 2.3 to 4.7 s of one core, as measured on a slow one; a kernel runs at 300
    TFLOP/s forward, 3.5 times as long forward and backward, and is replayed as `timing` would.
    """
    def __init__(self, clock: VirtualTime, cores: int = 16):
        self.clock, self.cores, self.random = clock, cores, random.Random(0)
        self.compiled, self.done, self.alone = set(), [], 0

    def spend(self, seconds: float): self.clock.now += seconds

    def kernels(self, case: dict) -> set[str]:
        "Names of what a case needs: three kernels for a check, every candidate for a timing."
        if "dtype" in case: shape, many = {k: v for k, v in case.items() if k != "n"}, 3
        elif "w" in case:
            keys = case["w"] // case["r"]
            traits = [case["order"], case["causal"], case["kv"] < case["h"]]
            shape = [case["d"], *traits, min(keys, 128)]
            many = 12
        else: shape, many = [case["pattern"][0], len(case.get("grid", [0])), case["block"]], 12
        return {f"{json.dumps(shape)} {i}" for i in range(many)}

    def compile(self, names: set[str], cores: int):
        missing = sorted(names - self.compiled)
        self.compiled |= names
        if cores == 1: self.alone += len(missing)
        self.spend(sum(self.random.uniform(2.3, 4.7) for _ in missing) / cores)

    def kernel_seconds(self, case: dict, contender: str) -> float:
        keys = case["w"] / case["r"] if "w" in case else case["n"] / 4
        if "dense" in contender or contender in ("sdpa_mask", "naive"): keys = case["n"]
        return max(2e-5, 4 * case["n"] * keys * case["d"] * case["h"] / 300e12)

    def replay(self, seconds: float):
        "What `timing.milliseconds` does: runs, a graph, six replays or a fifth of a second."
        launches = max(1, min(timing.LAUNCHES, int(0.2 / seconds)))
        self.spend(5 * seconds + max(6 * launches * seconds, 0.2) + 0.15)

    def environment(self, case, emit):
        self.spend(6)
        emit(dict(environment={}))

    def rates(self, case, emit):
        self.spend(5)
        emit(dict(rates={}))

    def strides(self, case, emit): self.spend(2)
    def ring(self, case, emit): self.spend(30)
    def program(self, case, emit): self.spend(20 if case["program"] == "ncu" else 35)

    def precompile(self, case, emit):
        every = case.get("small", []) + case.get("large", [])
        self.spend(RECORD * len(every) + (0 if self.compiled else 12))  # the processes' start
        self.compile(set().union(*map(self.kernels, every)) if every else set(), self.cores)

    def check(self, case, emit):
        self.compile(self.kernels(case), 1)
        self.spend(0.4)
        emit(dict(case=cases.name_of(case), wrong=[]))

    graph = check

    def sweep(self, case, emit):
        self.compile(self.kernels(case), 1)
        for _ in range(15):
            self.replay(1.5 * self.kernel_seconds(case, "triton"))
            emit(dict(ms=1.0))

    def speed(self, case, emit):
        name = case["contender"]
        if name == "triton": self.compile(self.kernels(case), 1)
        if name == "flex": self.spend(45)
        self.spend(0.8)  # tensors, orders, lists
        for passes in (1, 3.5):
            self.replay(passes * self.kernel_seconds(case, name))
            emit(dict(ms=1.0))

    def front(self, case, emit): self.speed(case | dict(contender="triton"), emit)
    def long(self, case, emit): self.speed(case | dict(contender="triton"), emit)


def simulate(part: int, store: Store, cores: int = 16, gpu: PretendGPU | None = None):
    "Seconds that a part takes, what it left, and the device that it ran on."
    clock = VirtualTime()
    gpu = gpu or PretendGPU(clock, cores)
    gpu.clock = clock
    limit = MINUTES * 60 - RESERVE
    left = work(plan(part, cores), gpu, store, Clock(limit, clock), tell=lambda text: None)
    return clock.now, left, gpu


# ---- the clock

def test_each_part_ends_within_nine_minutes(tmp_path):
    "And does all of it."
    gpu = None
    for part in (1, 2, 3):
        taken, left, gpu = simulate(part, Store(tmp_path / f"{part}.jsonl"), gpu=gpu)
        assert 60 < taken <= MINUTES * 60, f"part {part} takes {taken:.0f} s"
        assert left == [], f"part {part} leaves {left} after {taken:.0f} s"
        assert gpu.alone == 0, f"part {part} compiles {gpu.alone} kernels one by one"


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_slow_machine_stops_in_time_and_goes_on(tmp_path, part):
    "With two cores a part does not fit: it says what is left, and further runs do that."
    gpu, seen = None, []
    for _ in range(8):
        store = Store(tmp_path / "rows.jsonl")
        taken, left, gpu = simulate(part, store, 2, gpu)
        assert taken <= MINUTES * 60
        seen.append(len(left))
        if not left: break
    assert seen == sorted(seen, reverse=True) and seen[-1] == 0 and len(seen) > 1
    begun = [row["task"] for row in store.of("begun")]
    assert len(begun) == len(set(begun)) == len(plan(part, 2))


def test_what_is_planned():
    everything = {n: plan(n, 16) for n in (1, 2, 3)}
    checks = {n: [t.case for t in tasks if t.kind == "check"] for n, tasks in everything.items()}
    assert len(checks[1]) == 60 and not checks[2]
    names = [cases.name_of(c) for c in checks[1] + checks[3]]
    assert sorted(names) == sorted({cases.name_of(c) for c in cases.all_cases()})
    shapes = {(t.case["d"], t.case["w"] // 4, t.case["order"])
              for t in everything[1] if t.kind == "sweep"}
    assert shapes == {(d, keys, o) for d in (64, 128) for keys in (64, 256, 1024, 4096)
                      for o in (False, True)}
    programs = [t.case["program"] for t in everything[2] + everything[3] if t.kind == "program"]
    assert {p: programs.count(p) for p in programs} == dict(ncu=5, memcheck=2, racecheck=2)
    assert [t.case["contender"] for t in everything[2][-4:]] == ["flex"] * 4


# ---- contenders

@pytest.mark.parametrize("setting", [0, 1])
def test_moved_tokens_give_the_same_result(setting):
    "Also where tiles do not fill their blocks, so that some slots are empty."
    from gpu import contenders, problems, toys
    case = toys.large_case(cases.hilbert_a_cases()[setting])
    results = {}
    for name in ("triton", "triton, permuted", "triton, laid out"):
        (function, x), _ = contenders.contender(name, case)
        out = function(*x)
        results[name] = [out, *torch.autograd.grad(out, x, torch.ones_like(out))]
    tokens = problems.lists_of(case, "cpu").q_tokens
    assert (tokens < 0).any()
    order = tokens[tokens >= 0].long()
    torch.testing.assert_close(results["triton, permuted"], results["triton"])
    moved = [t[:, :, order] for t in results["triton"]]
    torch.testing.assert_close(results["triton, laid out"], moved)


# ---- rows, failures, kills

class Flaky:
    "Tasks that work, fail, lose the GPU, or emit before they fail."
    def fine(self, case, emit): emit(dict(value=case["n"]))

    def half(self, case, emit):
        emit(dict(value=1))
        raise ValueError("no more")

    def lost(self, case, emit): raise RuntimeError("CUDA error: an illegal memory access")
    def large(self, case, emit): raise RuntimeError("CUDA out of memory")


def fine(n: int) -> Task: return Task(f"fine {n}", "fine", 1, dict(n=n))


def test_a_failure_costs_its_own_row(tmp_path):
    store = Store(tmp_path / "rows.jsonl")
    tasks = [fine(0), Task("half", "half", 1), Task("large", "large", 1), fine(1)]
    assert work(tasks, Flaky(), store, Clock(99), lambda text: None) == []
    rows = {row["task"]: row for row in Store(*store.paths).measured()}
    assert rows["fine 0"]["value"] == 0 and rows["fine 1"]["value"] == 1
    assert rows["half"]["failed"] == "ValueError: no more" and "half" in rows["half"]["where"]
    assert sum(row["task"] == "half" for row in store.measured()) == 2  # its first row stays
    with pytest.raises(ContextLost):
        work([Task("lost", "lost", 1), fine(2)], Flaky(), store, Clock(99), lambda text: None)
    assert "lost" in store.done() and "fine 2" not in store.done()
    work([Task("lost", "lost", 1), fine(2)], Flaky(), store, Clock(99), lambda text: None)
    assert "fine 2" in store.done() and store.began("lost") == 1


def test_rows_outlive_a_torn_line_and_a_lost_file(tmp_path):
    one, two = tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"
    store = Store(one, two)
    store.add(dict(task="x", value=1))
    one.write_text(one.read_text() + '{"task": "y", "val')  # a kill in the middle of a write
    Store(one, two).add(dict(task="z", value=3))
    two.unlink()
    assert Store(one, two).measured() == [dict(task="x", value=1), dict(task="z", value=3)]


def test_rows_of_other_sources_are_set_aside(tmp_path):
    paths = [tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"]

    def rows(stamp, again=False):
        set_aside(paths, stamp, again)
        return Store(*paths).measured()

    assert rows("one") == []
    Store(*paths).add(dict(task="x", value=1))
    assert len(rows("one")) == 1 and rows("two") == [] and len(list(paths[0].parent.iterdir())) == 2
    Store(*paths).add(dict(task="y", value=1))
    paths[1].unlink()
    assert len(rows("two")) == 1 and rows("two", again=True) == []


WORKER = textwrap.dedent("""
    import os, sys, time
    sys.path.insert(0, {tools!r})
    from pathlib import Path
    from gpu.session import Clock, ContextLost, LOST, Store, Task, work
    class Device:
        def fine(self, case, emit): emit(dict(value=1))
        def hang(self, case, emit): time.sleep(60)
        def dies(self, case, emit): os._exit(11)
        def lost(self, case, emit): raise RuntimeError("CUDA error: misaligned address")
    kinds = ["fine", "dies", "fine", "lost", "fine", "hang", "fine"]
    tasks = [Task(f"{{kind}} {{i}}", kind, 0.1) for i, kind in enumerate(kinds)]
    try: work(tasks, Device(), Store(Path({path!r})), Clock(99, start={start}), lambda text: None)
    except ContextLost: sys.exit(LOST)
""")


def test_what_takes_a_worker_down_is_blamed_and_passed(tmp_path, monkeypatch):
    path, clock = tmp_path / "rows.jsonl", Clock(99)
    program = WORKER.format(tools=str(TOOLS), path=str(path), start=clock.start)
    begun = []

    def start():
        begun.append(time.time())
        return subprocess.Popen([sys.executable, "-c", program])

    def soon(store, clock, seconds):  # instead of half a minute
        row = session.open_task(store)
        return row is not None and clock.elapsed() - row["at"] > 2

    monkeypatch.setattr(session, "overdue", soon)
    news = list(watch(start, [path], {}, clock, pause=0.05))
    store = Store(path)
    failed = {row["task"]: row["failed"] for row in store.measured() if "failed" in row}
    assert set(failed) == {"dies 1", "lost 3", "hang 5"} and len(begun) == 4 and len(news) == 2
    assert "exit code 11" in failed["dies 1"] and "hung" in failed["hang 5"]
    assert len(store.done()) == 7 and sum("value" in row for row in store.measured()) == 4


def scripted(path: Path, program: str, **options) -> subprocess.Popen:
    "A worker that leads a group of its own, and writes its rows by hand."
    lines = f"""
        import os, subprocess, sys, time
        sys.path.insert(0, {str(TOOLS)!r})
        from pathlib import Path
        from gpu.session import Store
        store = Store(Path({str(path)!r}))
        begun = dict(event="begun", task="x", at=0.0)
    """
    command = [sys.executable, "-c", textwrap.dedent(lines) + program]
    return subprocess.Popen(command, process_group=0, **options)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("last", ["os._exit(0)", "os._exit(11)", "time.sleep(99)"])
def test_nothing_outlives_a_worker(tmp_path, monkeypatch, last):
    "What it started would hold the output of `make gpu` open."
    path, (reader, writer) = tmp_path / "rows.jsonl", os.pipe()
    program = f"subprocess.Popen(['sleep', '99'])\nstore.add(begun)\n{last}"
    monkeypatch.setattr(session, "overdue", lambda store, *rest: bool(session.open_task(store)))
    def start(): return scripted(path, program, stdout=writer)
    news = list(watch(start, [path], {}, Clock(99), pause=0.05, restarts=1))
    os.close(writer)
    assert os.read(reader, 1) == b""  # comes when nobody holds the other end
    assert len(news) == (last != "os._exit(0)")


@pytest.mark.parametrize("rows, workers", [("", 1), ("store.add(dict(event='done', task='x'))", 2)])
def test_a_worker_that_dies_between_tasks_is_followed_if_it_came_further(tmp_path, rows, workers):
    path, count = tmp_path / "rows.jsonl", []

    def start():
        count.append(1)
        return scripted(path, f"if not store.done(): {rows or 'pass'}\nos._exit(6)")

    news = list(watch(start, [path], {}, Clock(99), pause=0.05))
    assert len(count) == workers and all("outside of any task" in line for line in news)


# ---- what is not trusted

def machine_of(rows: list[dict], tmp_path):
    from gpu.machine import Machine
    store = Store(tmp_path / "rows.jsonl")
    for row in rows: store.add(row)
    return Machine(store, tmp_path, 1)


def test_a_tile_that_did_not_come_back_is_left_alone(tmp_path):
    "By the tuner, and by other checks; one that was stopped by the clock is tried again."
    from gpu.machine import Blacklisted, sound_candidates
    from gpu.session import TIME_IS_UP

    from hilbert_attn.kernels.tuning import PRODUCERS, Workload, default_tile
    checks = [c for c in cases.tile_cases(("segments",)) if c["d"] == 64 and c["tile"][-1]]
    first, twin = (next(c for c in checks if c["mode"] == m and c["tile"] == checks[0]["tile"])
                   for m in ("residue", "keys"))
    task, tile = f"check {cases.name_of(first)}", f"forward D64 tile {first['tile']}"
    trying = dict(task=task, event="trying", tile=tile)
    hung = [trying, dict(task=task, failed="stopped: it hung")]
    clock, other = dict(task=task, failed=TIME_IS_UP), trying | dict(event="tried")
    fine = [trying, clock], [trying, other, hung[1]]
    for i, rows in enumerate(fine): assert machine_of(rows, tmp_path / str(i)).stuck() == set()
    device = machine_of(hung, tmp_path / "c")
    assert device.stuck() == {tile}
    with pytest.raises(Blacklisted, match="not tried again"): device.check(twin, print)
    work = Workload("forward", 64, 4096, (16, 16), torch.bfloat16, ("residue", "whole"), tma=True)
    default = default_tile("forward", 64, torch.bfloat16, (9, 0))
    left = sound_candidates(device.stuck())(work, default)
    assert set(work.candidates(default)) - set(left) == {PRODUCERS[0]}
    named = f"forward D64 tile {[128, 64, 8, 3, False, False, False]}"
    assert sound_candidates({named})(work, default)[0] == default


def test_what_is_wrong_with_dropout_is_timed_without():
    from gpu.checks import kernel_names
    from gpu.machine import Blacklisted, check_blacklist
    timed = cases.segments(32768, 4096, 4)
    for more in (dict(dropout=0.25), dict(masked=True), dict(causal=True), dict(mode="keys", r=2),
                 dict(dtype="float64"), dict(d=80), dict()):
        wrong = set(kernel_names(cases.SEGMENTS | more, ["dq"]))
        check_blacklist(["forward", "dkv"], timed, wrong)
        if not more:
            with pytest.raises(Blacklisted): check_blacklist(["dq"], timed, wrong)
            with pytest.raises(Blacklisted):
                check_blacklist(["dq"], timed | dict(causal=True), wrong)
        else: check_blacklist(["dq"], timed, wrong)
        if "causal" in more:
            with pytest.raises(Blacklisted): check_blacklist(["dq"], timed | more, wrong)


def test_a_part_that_was_killed_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    program = WORKER.format(tools=str(TOOLS), path=str(path), start=time.time())
    program = program.replace('"dies", ', "").replace('"lost", ', "")
    first = subprocess.Popen([sys.executable, "-c", program])
    while not (path.exists() and '"hang' in path.read_text()): time.sleep(0.02)
    first.kill()
    first.wait()
    before = Store(path).done()
    assert len(before) == 3
    second = subprocess.run([sys.executable, "-c", program.replace("time.sleep(60)", "pass")])
    store = Store(path)
    assert second.returncode == 0 and len(store.done()) == 5
    assert all(store.began(key) == 1 for key in before)


# ---- reports

def timed(case: dict, kind: str, name: str, ms: float, pairs: int = 10 ** 9) -> dict:
    return dict(task="", case=case | dict(name=cases.speed_name(case)), kind=kind, name=name, ms=ms,
                p20=ms, p80=ms, repeats=5, peak_mib=1.0, pairs=pairs)


def test_the_report_judges_what_is_there(tmp_path):
    case, image = cases.segments(32768, 4096, 4), cases.hilbert_a_cases()[0]
    flux = cases.flux_case()
    env = dict(gpu="X", commit="unknown", date="2026-01-01T00:00:00+00:00", dry_run=False)
    rows = [dict(task="a", environment=env),
            dict(task="b", rates=dict(matmul_tflops=600.0, copy_gbs=4000.0)),
            dict(task="c", case="c", wrong=["dq"], report="off"),
            dict(task="d", failed="no memory"), timed(case, "forward", "triton", 1.0),
            timed(case, "forward", "cudnn, groups given", 0.9),
            timed(image, "forward", "triton", 1.0, image["n"] ** 2 * 6),
            timed(image, "forward", "cudnn, dense N x N", 3.8),
            timed(flux, "forward", "triton", 1.0, flux["n"] ** 2 * 2),
            timed(flux, "forward", "cudnn, dense N x N", 6.0),
            timed(flux, "forward", "flex", 3.0), timed(flux, "forward", "flex, flash", 0.8)]
    path = report.write(rows, ["not measured: e"], tmp_path)
    found = json.loads(path.read_text())
    assert found["correctness"] == dict(cases=1, wrong=["c: off"])
    assert found["skipped"] == ["d: no memory", "not measured: e"] and len(found["rows"]) == 8
    by_target = {v["target"]: v for v in found["verdicts"] if v["case"] != cases.speed_name(flux)}
    assert len(by_target) == 2
    rate = by_target["share of cuDNN's rate on given groups, forward"]
    assert math.isclose(rate["measured"], 0.9) and rate["met"]
    share = by_target["share of the pair-count ceiling, triton"]
    assert math.isclose(share["measured"], 3.8 / 4) and share["met"]
    on_flux = {v["target"]: v for v in found["verdicts"] if v["case"] == cases.speed_name(flux)}
    flex = on_flux["times faster than FlexAttention, triton"]  # than the better of its two
    assert math.isclose(flex["measured"], 0.8) and not flex["met"]
    dense = on_flux["times faster than dense attention, triton"]
    assert math.isclose(dense["measured"], 6.0) and dense["met"] and dense["needed"] == 5.2
    assert report.write(rows[:1], [], tmp_path) is None
    assert all(row["share_of_matmul"] > 0 for row in found["rows"])
    from hilbert_attn.bench.results import from_gpu_run
    assert from_gpu_run(found)["limits"]["copy_bytes_per_s"] == 4e12
