"""The measuring harness: its statistics on a clock that we turn, its refusals, its memory readings, and its files."""
import gc
import getpass
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hilbert_attn import bench
from hilbert_attn.bench import (DENSE, MASKED, MASKED_HILBERT, MATMUL, NAIVE, OURS, OURS_HILBERT, OURS_HILBERT_LSE, OURS_LSE, Candidate, bench_cpu, bench_rows, bench_targets, check_exact,
                                environment, format_run, format_table, load_runs, machine_limits, machine_slug, measure, peak_memory, results_folder, save_run)
from hilbert_attn.patterns import SegmentPattern
from hilbert_attn.reference import masked_attention


class Clock:
    "Time passes only when a scripted call says so."
    def __init__(self): self.now, self.log = 0.0, []
    def __call__(self): return self.now

    def call(self, name, seconds):
        durations = iter(seconds)

        def run():
            self.log.append(name)
            self.now += next(durations)
        return run


def test_measure_reports_percentiles_without_the_warmup():
    clock = Clock()
    found = measure({"a": clock.call("a", [100, 5, 1, 4, 2, 3]), "b": clock.call("b", [100] + [7] * 5)}, 5, clock=clock)
    assert list(found) == ["a", "b"]
    assert (found["a"].median, found["a"].p20, found["a"].p80, found["a"].repeats) == pytest.approx((3, 1.8, 4.2, 5))
    assert (found["b"].median, found["b"].p20, found["b"].p80) == (7, 7, 7)


def test_measure_takes_turns():
    clock = Clock()
    measure({name: clock.call(name, [1] * 9) for name in "abc"}, 8, clock=clock)
    rounds = [clock.log[i:i + 3] for i in range(0, 27, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 2  # and not always in the same order


def test_measure_stops_early_but_not_before_three_rounds():
    clock = Clock()
    assert measure({"a": clock.call("a", [10] * 99)}, 50, max_seconds=1, clock=clock)["a"].repeats == 3
    assert measure({"a": clock.call("a", [10] * 99)}, 50, max_seconds=105, clock=clock)["a"].repeats == 10


def test_measure_frees_results_after_the_clock_has_stopped_and_waits_for_the_device():
    clock, events = Clock(), []

    class Result:
        def __del__(self): events.append("freed")

    def call():
        events.append("called")
        return Result()
    measure({"a": call}, 1, warmup=0, clock=lambda: events.append("clock") or 0.0, synchronize=lambda: events.append("waited"))
    assert events[1:] == ["waited", "clock", "called", "waited", "clock", "freed"]  # events[0] is the start of it all


def test_measure_leaves_the_garbage_collector_as_it_was():
    def broken(): raise KeyError("broken")
    with pytest.raises(KeyError): measure({"a": broken}, 1)
    assert gc.isenabled()
    with pytest.raises(ValueError, match="repeats=0"): measure({}, 0)


def inputs(n=24, heads=3, d=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, n, d, generator=g) for _ in range(3)]


def test_candidates_that_are_exact_pass():
    mask = SegmentPattern(24, 7, 2).mask()[0]
    right = Candidate("right", lambda q, k, v: masked_attention(q, k, v, mask)[0], mask, 0)
    assert set(check_exact(right, *inputs()).errors) == {"out", "lse", "dq", "dk", "dv"}
    assert check_exact(replace(right, attention=lambda q, k, v: masked_attention(q, k, v, mask), lse_grad=True), *inputs(), heads=[2]).ok
    assert check_exact(Candidate("dense", torch.nn.functional.scaled_dot_product_attention, None, 0), *inputs(), heads=[0, 1]).ok


@pytest.mark.parametrize("wrong", ["output", "gradient", "shape", "another head"])
def test_what_is_not_exact_is_refused(wrong):
    mask = SegmentPattern(24, 7).mask()[0]

    def attention(q, k, v):
        out = masked_attention(q, k, v, mask)[0]
        if wrong == "output": return out * 1.001
        if wrong == "gradient": return out.detach() + 1.01 * (out - out.detach())
        if wrong == "shape": return out[:, :, 1:]
        return out.roll(1, dims=1)
    with pytest.raises(RuntimeError, match="refusing to time 'sloppy'"): check_exact(Candidate("sloppy", attention, mask, 0), *inputs())


def test_the_suite_times_nothing_when_a_candidate_is_wrong(monkeypatch):
    real = bench._cpu_candidates

    def spoiled(config):
        *most, last = real(config)
        return [*most, replace(last, attention=lambda q, k, v: tuple(1.01 * x for x in last.attention(q, k, v)))]
    monkeypatch.setattr(bench, "_cpu_candidates", spoiled)
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=f"refusing to time {OURS_HILBERT_LSE!r}"): bench_cpu(quick=True)


def takes_memory(mib, small=False):  # in a process of its own: see below
    return lambda: torch.ones(1 if small else mib << 18).sum()


def test_memory_is_what_was_resident():
    assert 60 << 20 < peak_memory("test_bench:takes_memory", mib=64) < 80 << 20
    with pytest.raises(RuntimeError, match="measuring the memory"): peak_memory("test_bench:no_such_function")


def test_limits():
    limits = machine_limits(1e6, 1 << 16, 1)
    assert limits["matmul_flops_per_s"] > 0 and limits["copy_bytes_per_s"] > 0 and limits["copy_bytes"] == 1 << 16


def test_environment_names_no_host_user_or_path():
    env = environment()
    text = json.dumps(env)
    assert {"cpu", "cores", "threads", "python", "torch", "hilbert_attn", "date"} <= set(env)
    assert "/" not in text.replace(env["cpu"], "")
    for name in (socket.gethostname(), getpass.getuser(), Path.home().name):
        if len(name) > 3: assert name not in text


@pytest.mark.parametrize("env, slug", [
    (dict(cpu="AMD EPYC", cores=2), "amd-epyc-2-cores"),
    (dict(cpu="Xeon Platinum 8481C", cores=8, gpu="NVIDIA H200"), "nvidia-h200"),
    (dict(cpu="Überchip (x/y)", cores=1), "berchip-x-y-1-cores")])
def test_slug(env, slug): assert machine_slug(env) == slug


@pytest.fixture(scope="module")
def toy() -> dict: return bench_cpu(quick=True, progress=False)


def test_the_suite_runs_all_its_rows(toy):
    forward = {NAIVE, MASKED, MASKED_HILBERT, DENSE, OURS, OURS_HILBERT, MATMUL}
    assert {row["name"] for row in toy["rows"] if row["direction"] == "forward"} == forward
    assert {row["name"] for row in toy["rows"] if row["direction"] == "forward+backward"} == forward | {OURS_LSE, OURS_HILBERT_LSE}
    assert set(toy["checks"]) == {row["name"] for row in toy["rows"]} - {MATMUL}
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] for row in toy["rows"] + toy["sweep"])
    assert all(0 < case["peak_extra_bytes"] for case in toy["memory"])


def test_runs_survive_their_file(toy, tmp_path):
    later = toy | dict(environment=toy["environment"] | dict(date="2999-01-01 00:00 UTC"))
    elsewhere = toy | dict(environment=toy["environment"] | dict(date="1999-01-01 00:00 UTC", cpu="Other"))
    for run in (later, toy, elsewhere): path = save_run(run, tmp_path)
    assert path.parent.name.startswith("other") and not list(tmp_path.rglob("*.part"))
    assert load_runs("cpu", tmp_path) == [elsewhere, toy, later]  # oldest first, whatever the file
    assert load_runs("gpu", tmp_path) == []


def synthetic(**times) -> dict:
    "A run with these times in seconds, forward; backward takes three times as long."
    names = dict(matmul=MATMUL, naive=NAIVE, masked=MASKED, masked_hilbert=MASKED_HILBERT, dense=DENSE, ours=OURS, hilbert=OURS_HILBERT, lse=OURS_LSE, hilbert_lse=OURS_HILBERT_LSE)
    rows = [dict(name=names[name], direction=direction, median=factor * t, p20=factor * t, p80=factor * t, repeats=3, pairs=1600 if name == "dense" else 100)
            for direction, factor in (("forward", 1), ("forward+backward", 3)) for name, t in times.items() if direction != "forward" or "lse" not in name]
    return dict(quick=False, suite="cpu", config=bench.CPU_CONFIG, environment=environment(), rows=rows, memory=[dict(ordered=True, backward=True, tokens=32768, peak_extra_bytes=50, qkv_bytes=20)])


def test_ratios_and_targets():
    run = synthetic(matmul=1.0, naive=100.0, masked=30.0, masked_hilbert=36.0, dense=20.0, ours=2.0, hilbert=4.0, lse=2.2, hilbert_lse=5.0)
    of = {(row["name"], row["direction"]): row for row in bench_rows(run)}
    assert of[OURS, "forward"]["over_masked"] == 15 and of[OURS_HILBERT, "forward"]["over_masked"] == 9  # each against the mask of its own order
    assert of[OURS_HILBERT, "forward+backward"]["over_naive"] == 25
    assert of[OURS, "forward"]["share_of_limit"] == 0.5 and of[DENSE, "forward"]["share_of_limit"] == 0.8  # dense has 16 times the pairs
    met = {target["what"]: target["met"] for target in bench_targets(run)}
    assert [met[f"{name}: {what}"] for name in (OURS, OURS_HILBERT) for what in (
        "forward, times faster than masked SDPA", "forward, times faster than naive PyTorch", "forward, time / one matmul of the same FLOPs",
        "forward+backward, times faster than masked SDPA", "time with an LSE gradient / without")] == [True, True, False, True, True, True, False, False, True, False]
    assert met[f"{OURS_HILBERT}: forward+backward, N 32,768, peak extra memory / (q+k+v)"]
    assert "missed" in format_run(run) and "2.50" in format_run(run)


def test_table_of_text():
    rows = [dict(name="a", x=1.25, y=None), dict(name="long name", x=10.0, y=3)]
    assert format_table(rows, dict(name="", x=".1f", y=""), dict(x="x ms")).splitlines() == [
        "name       x ms  y", "------------------", "a           1.2  -", "long name  10.0  3"]


def test_stored_results_can_be_read():
    for path in results_folder().glob("*/cpu.json"):
        for run in json.loads(path.read_text()):
            assert machine_slug(run["environment"]) == path.parent.name and not run["quick"]
            format_run(run)
