"""The measuring harness: its statistics on a clock that we turn, its refusals, its memory readings, and its files."""
import gc
import getpass
import json
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hilbert_attn
from hilbert_attn import bench
from hilbert_attn.bench import (BRANCH_CALLS, CHECKPOINTED, DENSE, MASKED, MASKED_HILBERT, MATMUL, NAIVE, ONE_CALL, OURS, OURS_HILBERT, OURS_HILBERT_LSE, OURS_LSE, RESHAPED, GATHERED, STORED, SUITES, Candidate, Case, bench_cpu, bench_rows,
                                bench_targets, check_exact, compare_runs, dilated_targets, environment, format_run, format_table, latest_runs, load_run, load_runs, machine_limits, machine_slug, measure, measurements,
                                peak_memory, plot_run, race_rows, report_run, results_folder, run_suite, run_tables, save_run)
from hilbert_attn.patterns import SegmentPattern, attention_mask
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
    forward = {NAIVE, MASKED, MASKED_HILBERT, DENSE, RESHAPED, GATHERED, OURS, OURS_HILBERT, MATMUL}
    assert {row["name"] for row in toy["rows"] if row["direction"] == "forward"} == forward
    assert {row["name"] for row in toy["rows"] if row["direction"] == "forward+backward"} == forward | {OURS_LSE, OURS_HILBERT_LSE}
    assert set(toy["checks"]) == {row["name"] for row in toy["rows"]} - {MATMUL}
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] for row in toy["rows"] + toy["sweep"])
    assert all(0 < case["peak_extra_bytes"] for case in toy["memory"])


def test_groups_made_by_hand_give_the_same_bits():
    by_hand = {RESHAPED: OURS, GATHERED: OURS_HILBERT}
    of = {candidate.name: candidate for candidate in bench._cpu_candidates(bench.CPU_QUICK)}
    q, k, v, upstream = (torch.randn(1, 2, 256, 64) for _ in range(4))
    for theirs, ours in by_hand.items():
        assert torch.equal(of[theirs].forward(q, k, v)(), of[ours].forward(q, k, v)())
        gradients = [of[name].backward(q, k, v, upstream, None)() for name in (theirs, ours)]
        assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("side, depth", [(2, 2), (2, 15), (64, 100), (256, 1024), (1024, 1024), (1024, 8191)])
def test_the_matrix_product_has_the_size_that_was_asked_for(side, depth):
    assert bench._matmul_of(2 * side * side * depth) == (side, side, depth)


def test_the_limit_does_as_many_operations_as_the_attention():
    case = Case({}, (1, 2, 256, 64), list, pairs=8192)
    for direction, products in (("forward", 2), ("forward+backward", 7)):
        rows, columns = case.calls(direction)[MATMUL]().shape
        assert 2 * rows * rows * columns == products * 2 * 64 * 8192


def test_runs_survive_their_file(toy, tmp_path):
    later = toy | dict(environment=toy["environment"] | dict(date="2999-01-01 00:00 UTC"))
    elsewhere = toy | dict(environment=toy["environment"] | dict(date="1999-01-01 00:00 UTC", cpu="Other"))
    for run in (later, toy, elsewhere): path = save_run(run, tmp_path)
    assert path.parent.name.startswith("other") and not list(tmp_path.rglob("*.part"))
    assert load_runs("cpu", tmp_path) == [elsewhere, toy, later]  # oldest first, whatever the file
    assert load_runs("gpu", tmp_path) == []


def synthetic(**times) -> dict:
    "A run with these times in seconds, forward; backward takes three times as long."
    names = dict(matmul=MATMUL, naive=NAIVE, reshaped=RESHAPED, gathered=GATHERED, masked=MASKED, masked_hilbert=MASKED_HILBERT, dense=DENSE, ours=OURS, hilbert=OURS_HILBERT, lse=OURS_LSE, hilbert_lse=OURS_HILBERT_LSE)
    rows = [dict(name=names[name], direction=direction, median=factor * t, p20=factor * t, p80=factor * t, repeats=3, pairs=1600 if name == "dense" else 100)
            for direction, factor in (("forward", 1), ("forward+backward", 3)) for name, t in times.items() if direction != "forward" or "lse" not in name]
    return dict(quick=False, suite="cpu", config=bench.CPU_CONFIG, environment=environment(), rows=rows, memory=[dict(ordered=True, backward=True, tokens=32768, peak_extra_bytes=50, qkv_bytes=20)])


def test_ratios_and_targets():
    run = synthetic(matmul=1.0, naive=100.0, masked=30.0, masked_hilbert=36.0, dense=20.0, ours=2.0, hilbert=4.0, lse=2.2, hilbert_lse=5.0)
    of = {(row["name"], row["direction"]): row for row in bench_rows(run)}
    assert of[OURS, "forward"]["over_masked"] == 15 and of[OURS_HILBERT, "forward"]["over_masked"] == 9  # each against the mask of its own order
    assert of[OURS_HILBERT, "forward+backward"]["over_naive"] == 25
    assert of[OURS, "forward"]["share_of_limit"] == 0.5 and of[DENSE, "forward"]["share_of_limit"] == 0.8  # dense has 16 times the pairs
    assert all(row["over_reshaped"] is None for row in bench_rows(run))  # as in runs from before these were contenders
    by_hand = synthetic(matmul=1.0, naive=100.0, masked=30.0, masked_hilbert=36.0, reshaped=1.5, gathered=3.0, dense=20.0, ours=2.0, hilbert=4.0)
    relative = {(row["name"], row["direction"]): row["over_reshaped"] for row in bench_rows(by_hand)}
    assert relative[OURS, "forward"] == relative[OURS_HILBERT, "forward"] == relative[OURS, "forward+backward"] == 0.75
    assert relative[GATHERED, "forward"] == relative[RESHAPED, "forward"] == 1
    met = {target["what"]: target["met"] for target in bench_targets(run)}
    assert [met[f"{name}: {what}"] for name in (OURS, OURS_HILBERT) for what in (
        "forward, times faster than masked SDPA", "forward, times faster than naive PyTorch", "forward, time / one matmul of the same FLOPs",
        "forward+backward, times faster than masked SDPA", "time with an LSE gradient / without")] == [True, True, False, True, True, True, False, False, True, False]
    assert met[f"{OURS_HILBERT}: forward+backward, N 32,768, peak extra memory / (q+k+v)"]
    assert "1.25  <= 1.2   no" in format_run(run) and "2.50  <= 3    yes" in format_run(run)


def test_table_of_text():
    rows = [dict(name="a", x=1.25, y=None), dict(name="long name", x=10.0, y=3)]
    assert format_table(rows, dict(name="", x=".1f", y=""), dict(x="x ms")).splitlines() == [
        "name       x ms  y", "------------------", "a           1.2  -", "long name  10.0  3"]


def test_stored_results_can_be_read():
    found = [path for path in results_folder().glob("*/*.json") if path.stem in SUITES]
    for path in found:
        for run in json.loads(path.read_text()):
            assert machine_slug(run["environment"]) == path.parent.name and not run["quick"] and run["suite"] == path.stem
            assert measurements(run) and format_run(run) and json.dumps(report_run(run))


@pytest.fixture(scope="module")
def toys(toy) -> dict:
    "Every suite that needs no other program, at its toy size; memory without a process for each number."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "peak_memory", lambda where, **options: max(1 << 20, bench._peak_of(where, options)))
        return {"cpu": toy} | {name: run_suite(name, quick=True, progress=False) for name in ("memory", "curves", "crossover", "dilated")}


LOCAL = ("cpu", "memory", "curves", "crossover", "dilated")


@pytest.mark.parametrize("name", LOCAL)
def test_what_is_printed_is_what_is_in_the_json(toys, name):
    earlier = json.loads(json.dumps(toys[name]))
    for row in earlier["rows"]: row.update({key: 1.5 * row[key] for key in ("median", "p20", "p80")})
    for old in (None, earlier):
        lines, report = format_run(toys[name], old).splitlines(), json.loads(json.dumps(report_run(toys[name], old)))
        assert {key: report[key] for key in toys[name]} == toys[name]
        assert len(report["tables"]) == len(run_tables(toys[name], old)) > (old is not None)
        for table in run_tables(toys[name], old):
            top = next(i for i, line in enumerate(lines) if line == str(table).splitlines()[0])
            assert len(report["tables"][table.name]) == len(table.rows) > 0
            for line, row in zip(lines[top + 2:], report["tables"][table.name]):
                cells = ["-" if value is None else ("no", "yes")[value] if isinstance(value, bool) else format(value, table.formats[column]) for column, value in row.items()]
                assert line.split() == " ".join(cells).split()  # every figure that is printed is in the JSON, and the reverse


@pytest.mark.parametrize("name", LOCAL)
def test_every_suite_says_where_and_what_and_can_be_drawn(toys, name, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    run = toys[name]
    assert run["suite"] == name and run["quick"] and run["environment"]["commit" if "commit" in run["environment"] else "date"] and run["limits"]["matmul_flops_per_s"] > 0
    assert all(0 <= m["p20"] <= m["median"] <= m["p80"] and m["repeats"] >= 1 for m in measurements(run))
    assert "a toy size" in format_run(run) and run["environment"]["cpu"] in format_run(run)
    plot_run(run)
    from matplotlib import pyplot
    assert pyplot.get_fignums()
    pyplot.close("all")


def test_rows_of_each_suite(toys):
    settings = {name: [m["settings"] for m in measurements(toys[name])] for name in LOCAL}
    c = toys["crossover"]["config"]
    assert len(settings["crossover"]) == 2 * 2 * len(c["tokens"]) * len(c["head_dims"]) * len(c["patterns"]) * len(c["orders"]) == len({json.dumps([m["name"], m["settings"]]) for m in measurements(toys["crossover"])})
    assert {m["name"] for m in measurements(toys["dilated"])} == {ONE_CALL, BRANCH_CALLS, MATMUL} and len(dilated_targets(toys["dilated"])) == 8
    assert {"row_major", "hilbert", "morton"} < {m["name"] for m in measurements(toys["curves"])} and all(0 < row["neighbors_kept"] < 1 for row in toys["curves"]["locality"])
    memory = {row["name"]: row for row in toys["memory"]["rows"]}
    assert {STORED, CHECKPOINTED, OURS, MASKED} == set(memory) and all(m["unit"] == "bytes" for m in measurements(toys["memory"]))
    assert all(0 < check["worst_share_of_allowed"] <= 1 for name in ("memory", "crossover", "dilated") for check in toys[name]["checks"].values())


@pytest.mark.parametrize("name", ("memory", "crossover", "dilated"))
def test_no_suite_measures_what_is_wrong(monkeypatch, name):
    right = bench.hilbert_attention
    monkeypatch.setattr(bench, "hilbert_attention", lambda *args, **options: 1.001 * right(*args, **options))
    for clock in ("measure", "peak_memory"): monkeypatch.setattr(bench, clock, lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(RuntimeError, match="refusing to time"): run_suite(name, quick=True, progress=False)


def test_no_layers_are_measured_whose_gradients_differ(monkeypatch):
    real = bench._layers_call
    monkeypatch.setattr(bench, "_layers_call", lambda config, name, *args, **options: (lambda: [1.001 * x for x in real(config, name, *args, **options)()]) if name == CHECKPOINTED else real(config, name, *args, **options))
    monkeypatch.setattr(bench, "peak_memory", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(RuntimeError, match="refusing to measure 'layers, checkpointed'"): run_suite("memory", quick=True, progress=False)


@pytest.mark.parametrize("curve, wrong", [("morton", lambda order: np.where(order == 1, 0, order)), ("hilbert", lambda order: order[::2].tolist() + order[1::2].tolist())])
def test_no_order_is_timed_that_is_wrong(monkeypatch, curve, wrong):
    right = bench._compute_order
    monkeypatch.setattr(bench, "_compute_order", lambda grid, name: np.asarray(wrong(np.asarray(right(grid, name))) if name == curve else right(grid, name)))
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=f"refusing to time '{curve}' on 16x16"): run_suite("curves", quick=True, progress=False)


def test_masks_may_differ_from_head_to_head():
    pattern = SegmentPattern.for_heads(24, 3, 12, 3, "longnet")
    mask = attention_mask(pattern)
    right = Candidate("right", lambda q, k, v: masked_attention(q, k, v, mask)[0], mask, 0)
    assert check_exact(right, *inputs(), heads=[0, 2]).ok
    with pytest.raises(RuntimeError, match="refusing"): check_exact(replace(right, mask=mask.flip(1)), *inputs(), heads=[0, 2])


def made_up(suite="dilated", date="2026-01-01 00:00 UTC", **times) -> dict:
    rows = [dict(name=name, mode="m", direction="forward", median=median, p20=p20, p80=p80, repeats=9) for name, (median, p20, p80) in times.items()]
    return dict(suite=suite, quick=True, config=dict(target=1.15), environment=environment() | dict(date=date), limits=dict(matmul_flops_per_s=2.0), rows=rows)


def test_changes_within_the_spread_are_no_changes():
    old = made_up(a=(1, 0.9, 1.1), b=(1, 0.9, 1.1), c=(1, 0.9, 1.1), d=(1, 0.9, 1.1), gone=(1, 1, 1))
    new = made_up(a=(1.15, 1.05, 1.2), b=(1.3, 1.2, 1.4), c=(0.5, 0.4, 0.89), d=(0.5, 0.4, 0.95), added=(1, 1, 1))
    assert [(row["what"][0], row["change"], row["ratio"]) for row in compare_runs(new, old)] == [("a", "within the spread", 1.15), ("b", "slower", 1.3), ("c", "faster", 0.5), ("d", "within the spread", 0.5)]
    with pytest.raises(ValueError, match="suite 'cpu'"): compare_runs(new, old | dict(suite="cpu"))
    memory = [made_up("memory") | dict(rows=[dict(name="sdpa", tokens=9, unit="bytes", median=x, p20=x, p80=x, repeats=1)]) for x in (2 ** 21, 2 ** 20)]
    assert compare_runs(*memory) == [dict(what="sdpa, tokens 9", unit="MiB", before=1.0, now=2.0, ratio=2.0, change="more")]
    assert "which measured nothing at these settings" in format_run(made_up("ring", x=(1, 1, 1)), made_up("ring"))


def test_the_run_to_compare_with(tmp_path):
    save_run(made_up(date="2026-01-01 00:00 UTC"), tmp_path)
    path = save_run(made_up(date="2026-01-02 00:00 UTC"), tmp_path)
    assert load_run(path, "dilated")["environment"]["date"] == "2026-01-02 00:00 UTC"
    (tmp_path / "one.json").write_text(json.dumps(report_run(made_up("ring", ring=(1, 1, 1)))))
    assert load_run(tmp_path / "one.json", "ring")["rows"]
    with pytest.raises(ValueError, match="no run of the suite 'cpu'"): load_run(path, "cpu")
    (tmp_path / "words.json").write_text("words")
    with pytest.raises(ValueError, match="no JSON"): load_run(tmp_path / "words.json", "cpu")
    with pytest.raises(OSError): load_run(tmp_path / "nothing.json", "cpu")


def test_files_have_a_line_for_each_row_and_machines_a_newest_run(tmp_path):
    old, new = made_up(a=(1, 1, 1), b=(2, 2, 2)), made_up(date="2026-02-01 00:00 UTC", a=(1, 1, 1))
    other = made_up(date="2025-01-01 00:00 UTC") | dict(environment=environment() | dict(cpu="Other", date="2025-01-01 00:00 UTC"))
    for run in (old, new, other): save_run(run, tmp_path)
    lines = next(path for path in tmp_path.glob("*/dilated.json") if "other" not in path.parent.name).read_text().splitlines()
    assert len([line for line in lines if '"median"' in line]) == 3
    assert latest_runs("dilated", tmp_path) == [new, other]


def test_race():
    run = made_up(**{BRANCH_CALLS: (0.5, 0.4, 0.6), ONE_CALL: (0.25, 0.2, 0.3)})
    assert [(row["name"], row["ms"], row["relative"], row["setting"]) for row in race_rows(run, BRANCH_CALLS)] == [(BRANCH_CALLS, 500, 1, "m"), (ONE_CALL, 250, 0.5, "m")]


def fake_checkout(tmp_path, monkeypatch, name, program):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / name).write_text(program)
    monkeypatch.setattr(hilbert_attn, "__file__", str(tmp_path / "hilbert_attn" / "__init__.py"))


def test_suites_of_other_programs(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fake_checkout(tmp_path, patch, "bench_ring.py", "import json, pathlib, sys\nassert sys.argv[1] == '--out' and sys.argv[3:] == ['--quick']\n"
                      "folder = pathlib.Path(sys.argv[2]) / 'machine'\nfolder.mkdir()\nprint('measuring')\n(folder / 'ring.json').write_text(json.dumps([dict(suite='ring', environment=dict(date=''), rows=[])]))")
        assert run_suite("ring", quick=True) == dict(suite="ring", environment=dict(date=""), rows=[])
        (tmp_path / "tools" / "bench_ring.py").write_text("print('one'); raise SystemExit('no network')")
        with pytest.raises(RuntimeError, match="exit code 1:\none\nno network"): run_suite("ring", quick=True)
        with pytest.raises(RuntimeError, match="part of the repository"): run_suite("local", quick=True)
    with pytest.raises(ValueError, match="suite='disk': known suites are cpu, memory"): run_suite("disk")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(): pytest.raises(RuntimeError, run_suite, "gpu").match("needs an NVIDIA GPU")


def test_what_the_gpu_program_wrote(monkeypatch):
    row = dict(case=dict(name="N64 w64"), kind="forward", name="triton", ms=2.0, p20=1.0, p80=3.0, repeats=9, tflops=1.0, share_of_matmul=0.5, gbs_minimal=1.0, share_of_copy=0.25, peak_mib=7.0)
    found = dict(environment=dict(driver="550"), rates=dict(matmul_tflops=600.0, copy_gbs=4000.0), skipped=[], correctness=dict(cases=3, wrong=[]), rows=[row, row | dict(name="flex", ms=4.0), dict(case=row["case"], kind="forward", name="mask", failed="memory")],
                 verdicts=[dict(target="faster", case="N64 w64", kind="forward", measured=0.9, needed=1.0, met=False)])
    run = bench._from_gpu_run(found, quick=False)
    assert [(m["name"], m["median"], m["settings"]) for m in measurements(run)] == [("triton", 0.002, dict(case="N64 w64", direction="forward")), ("flex", 0.004, dict(case="N64 w64", direction="forward"))]
    assert run["limits"] == dict(matmul_flops_per_s=600e12, copy_bytes_per_s=4000e9) and run["environment"]["driver"] == "550"
    assert "x triton" in format_run(run) and ">= 1.0" in format_run(run) and report_run(run)["tables"]["gpu"][1]["relative"] == 2
