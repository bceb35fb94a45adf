"""Every suite at its toy size: what it refuses, what it returns, what it prints and draws."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hilbert_attn
from hilbert_attn.bench import contenders, cpu, crossover, decode, machine, memory, short, suites
from hilbert_attn.bench.contenders import (
    DENSE,
    GATHERED,
    MASKED,
    MASKED_HILBERT,
    MATMUL,
    NAIVE,
    OURS,
    OURS_HILBERT,
    OURS_HILBERT_LSE,
    OURS_LSE,
    RESHAPED,
)
from hilbert_attn.bench.memory import CHECKPOINTED, STORED
from hilbert_attn.bench.results import measurements
from hilbert_attn.bench.suites import (
    BRANCH_CALLS,
    ONE_CALL,
    dilated_targets,
    format_run,
    plot_run,
    report_run,
    run_suite,
    run_tables,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import run_short  # noqa: E402

LOCAL = ("cpu", "memory", "curves", "crossover", "short", "decode", "dit", "dilated")


def fail(*_, **__):
    pytest.fail("measured")


def peak_here(where, **options):
    "Memory without a process for each number."
    return max(1 << 20, machine._peak_of(where, options))


@pytest.fixture(scope="module")
def toys() -> dict:
    "Every suite that needs no other program, at its toy size."
    found = {"cpu": run_suite("cpu", quick=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peak_memory", peak_here)
        for name in LOCAL[1:]:
            found[name] = run_suite(name, quick=True)
    return found


def names_of(rows, direction):
    return {row["name"] for row in rows if row["direction"] == direction}


def test_the_suite_cpu_runs_all_its_rows(toys):
    toy = toys["cpu"]
    by_others = {NAIVE, MASKED, MASKED_HILBERT, DENSE, RESHAPED, GATHERED, MATMUL}
    forward = by_others | {OURS, OURS_HILBERT}
    assert names_of(toy["rows"], "forward") == forward
    both = forward | {OURS_LSE, OURS_HILBERT_LSE}
    assert names_of(toy["rows"], "forward+backward") == both
    assert set(toy["checks"]) == both - {MATMUL}
    for row in toy["rows"] + toy["sweep"]:
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
    assert all(0 < case["peak_extra_bytes"] for case in toy["memory"])


def test_nothing_is_timed_when_a_candidate_is_wrong(monkeypatch):
    real = cpu.cpu_candidates

    def spoiled(config):
        *most, last = real(config)

        def wrong(q, k, v):
            return tuple(1.01 * x for x in last.attention(q, k, v))

        return [*most, replace(last, attention=wrong)]

    monkeypatch.setattr(cpu, "cpu_candidates", spoiled)
    monkeypatch.setattr(contenders, "measure", fail)
    with pytest.raises(RuntimeError, match=f"refusing to time {OURS_HILBERT_LSE!r}"):
        run_suite("cpu", quick=True)


def cell(value, spec):
    "As a table shows it."
    if value is None:
        return "-"
    if isinstance(value, bool):
        return ("no", "yes")[value]
    return format(value, spec)


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("compared", [False, True])
def test_what_is_printed_is_what_is_in_the_json(toys, name, compared):
    toy, earlier = toys[name], json.loads(json.dumps(toys[name]))
    for row in earlier["rows"]:
        row.update({key: 1.5 * row[key] for key in ("median", "p20", "p80")})
    old = earlier if compared else None
    lines = format_run(toy, old).splitlines()
    report = json.loads(json.dumps(report_run(toy, old)))
    tables = run_tables(toy, old)
    assert {key: report[key] for key in toy} == toy
    assert len(report["tables"]) == len(tables) > compared
    for table in tables:
        top = lines.index(str(table).splitlines()[0])
        rows = report["tables"][table.name]
        assert len(rows) == len(table.rows) > 0
        for line, row in zip(lines[top + 2:], rows):
            cells = [cell(value, table.formats[key]) for key, value in row.items()]
            assert line.split() == " ".join(cells).split()


@pytest.mark.parametrize("name", LOCAL)
def test_every_suite_says_where_and_what_and_can_be_drawn(toys, name):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    run = toys[name]
    assert run["suite"] == name and run["quick"] and run["environment"]["date"]
    assert run["limits"]["matmul_flops_per_s"] > 0
    for m in measurements(run):
        assert 0 <= m["p20"] <= m["median"] <= m["p80"] and m["repeats"] >= 1
    text = format_run(run)
    assert "a toy size" in text and run["environment"]["cpu"] in text
    plot_run(run)
    from matplotlib import pyplot
    assert pyplot.get_fignums()
    pyplot.close("all")


def test_rows_of_crossover(toys):
    c, found = toys["crossover"]["config"], measurements(toys["crossover"])
    lists = (c[key] for key in ("tokens", "head_dims", "patterns", "orders"))
    combinations = np.prod([len(values) for values in lists])
    assert len(found) == 2 * len(c["backends"]) * combinations
    assert len({json.dumps([m["name"], m["settings"]]) for m in found}) == len(found)


def test_rows_of_the_others(toys):
    names = {name: {m["name"] for m in measurements(toys[name])} for name in LOCAL}
    assert names["dilated"] == {ONE_CALL, BRANCH_CALLS, MATMUL}
    assert len(dilated_targets(toys["dilated"])) == 8
    assert {"row_major", "hilbert", "morton"} < names["curves"]
    for row in toys["curves"]["locality"]:
        assert 0 < row["neighbors_kept"] < 1
    assert names["memory"] == {STORED, CHECKPOINTED, OURS, MASKED}
    assert {m["unit"] for m in measurements(toys["memory"])} == {"bytes"}
    for name in ("memory", "crossover", "short", "dilated"):
        for check in toys[name]["checks"].values():
            assert 0 < check["worst_share_of_allowed"] <= 1


def test_rows_of_short(toys):
    c, lines = toys["short"]["config"], short.short_table(toys["short"])
    settings = [s.name for n in c["tokens"] for s in short._settings(n, c["heads"])]
    assert [x["setting"] for x in lines] == [name for name in settings for _ in range(2)]
    assert {f"blocks of {size}" for size in (16, 4096)} < set(settings)


def test_where_the_time_of_a_short_call_goes():
    *parts, whole = run_short.profile(short.SHORT_QUICK, 3)
    assert min(whole["again"], whole["new"]) > 0
    for call in ("again", "new"):
        assert sum(row[call] or 0 for row in parts) == whole[call]


def test_what_is_slow():
    def row(name, tokens, us):
        return dict(name=name, threads=1, tokens=tokens, setting="s", direction="forward",
                    median=us * 1e-6)

    def verdict(ours, dense, masked):
        times = (short.OURS_SHORT, ours), (short.DENSE, dense), (short.MASKED, masked)
        (line,) = short.short_table(dict(rows=[row(name, 9, us) for name, us in times]))
        return round(line["ratio"], 6), round(line["behind"], 6), line["slow"]

    assert verdict(69, 10, 20) == (6.9, 59, False)
    assert verdict(71, 20, 10) == (7.1, 61, True)
    assert verdict(290, 200, 210) == (1.45, 90, False)
    assert verdict(90, 200, 100) == (0.9, -10, False)


def test_what_seems_slow_is_measured_again_and_longer(monkeypatch):
    def row(case, name, us):
        return case.about | dict(name=name, direction="forward", median=us * 1e-6)

    def run(suite, quick, config, cases):
        limits.append((config["repeats"], config["max_seconds"]))
        ours = {"slow": 300, "seems slow": 300 if len(limits) == 1 else 110, "quick": 90}
        times = {short.DENSE: 100, short.MASKED: 120}
        return dict(rows=[
            row(case, name, us) for case in cases
            for name, us in ({short.OURS_SHORT: ours[case.about["setting"]]} | times).items()])

    limits = []
    monkeypatch.setattr(short, "run_cases", run)
    cases = [contenders.Case(dict(threads=1, tokens=9, setting=name), (1, 1, 9, 4), list)
             for name in ("slow", "quick", "seems slow")]
    lines = short.short_table(short._settled(short.SHORT_CONFIG, False, cases))
    told = {x["setting"]: (round(x["us"]), x["slow"]) for x in lines}
    assert told == {"slow": (300, True), "quick": (90, False), "seems slow": (110, False)}
    assert limits == [(41, 0.2), (410, 2.0)]
    run_once = short._settled(short.SHORT_CONFIG, False, cases[1:2])
    assert len(run_once["rows"]) == 3 and len(limits) == 3


PLACES = {"memory": cpu, "crossover": crossover, "short": short, "dilated": suites}


@pytest.mark.parametrize("name", PLACES)
def test_no_suite_measures_what_is_wrong(monkeypatch, name):
    right = PLACES[name].hilbert_attention

    def wrong(*arguments, **options):
        return 1.001 * right(*arguments, **options)

    monkeypatch.setattr(PLACES[name], "hilbert_attention", wrong)
    monkeypatch.setattr(contenders, "measure", fail)
    monkeypatch.setattr(memory, "peak_memory", fail)
    with pytest.raises(RuntimeError, match="refusing to time"):
        run_suite(name, quick=True)


@pytest.mark.parametrize("name", ["decode_attention", "hilbert_cross_attention"])
def test_no_step_is_measured_that_is_wrong(monkeypatch, name):
    right = getattr(decode, name)

    def wrong(*arguments, **options):
        factor = 1.001 if "window" in options or "segment_size" in options else 1.0
        return factor * right(*arguments, **options)

    monkeypatch.setattr(decode, name, wrong)
    monkeypatch.setattr(contenders, "measure", fail)
    with pytest.raises(RuntimeError, match="refusing to time"):
        run_suite("decode", quick=True)


def test_no_layers_are_measured_whose_gradients_differ(monkeypatch):
    real = memory._layers_call

    def spoiled(config, name, *arguments, **options):
        call = real(config, name, *arguments, **options)
        factor = 1.001 if name == CHECKPOINTED else 1.0
        return lambda: [factor * x for x in call()]

    monkeypatch.setattr(memory, "_layers_call", spoiled)
    monkeypatch.setattr(memory, "peak_memory", fail)
    with pytest.raises(RuntimeError, match="refusing to measure 'layers, checkpointed'"):
        run_suite("memory", quick=True)


WRONG_ORDERS = {
    "morton": lambda order: np.where(order == 1, 0, order),
    "hilbert": lambda order: np.concatenate([order[::2], order[1::2]]),
}


@pytest.mark.parametrize("curve", WRONG_ORDERS)
def test_no_order_is_timed_that_is_wrong(monkeypatch, curve):
    right = suites._compute_order

    def spoiled(grid, name):
        order = np.asarray(right(grid, name))
        return WRONG_ORDERS[curve](order) if name == curve else order

    monkeypatch.setattr(suites, "_compute_order", spoiled)
    monkeypatch.setattr(contenders, "measure", fail)
    with pytest.raises(RuntimeError, match=f"refusing to time '{curve}' on 16x16"):
        run_suite("curves", quick=True)


RING = """
import json, pathlib, sys
assert sys.argv[1] == "--out" and sys.argv[3:] == ["--quick"]
folder = pathlib.Path(sys.argv[2]) / "machine"
folder.mkdir()
print("measuring")
run = dict(suite="ring", environment=dict(date=""), rows=[dict(name="ring")])
(folder / "ring.json").write_text(json.dumps([run]))
"""


def test_suites_of_other_programs(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "bench_ring.py").write_text(RING)
    package = tmp_path / "hilbert_attn" / "__init__.py"
    monkeypatch.setattr(hilbert_attn, "__file__", str(package))
    expected = dict(suite="ring", environment=dict(date=""), rows=[dict(name="ring")])
    assert run_suite("ring", quick=True) == expected
    (tools / "bench_ring.py").write_text("print('one'); raise SystemExit('no network')")
    with pytest.raises(RuntimeError, match="exit code 1:\none\nno network"):
        run_suite("ring", quick=True)
    with pytest.raises(RuntimeError, match="part of the repository"):
        run_suite("local", quick=True)


GPU = """
import json, os, pathlib, sys
assert sys.argv[1:] == ["--again", "--minutes", "3"]
folder = pathlib.Path(os.environ["OUT"])
folder.mkdir(parents=True)
(folder / "gpu_run.json").write_text(json.dumps(RUN))
"""


def test_the_program_for_gpus(tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    told = dict(date="2026-01-01T00:00:00+00:00", commit=40 * "a", driver="550", torch="told")
    row = dict(name="triton", case=dict(name="c"), kind="forward", ms=2.0, p20=1.0, p80=3.0,
               repeats=9, share_of_matmul=0.5, share_of_copy=0.25, peak_mib=7.0)
    run = dict(environment=told, rates=dict(matmul_tflops=600.0, copy_gbs=4000.0), rows=[row],
               correctness=dict(cases=1, wrong=[]), skipped=[], verdicts=[])
    tool = tmp_path / "tools" / "gpu_run.py"
    tool.write_text(GPU.replace("RUN", repr(run)))
    monkeypatch.setattr(hilbert_attn, "__file__", str(tmp_path / "hilbert_attn" / "__init__.py"))
    monkeypatch.setattr(suites.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suites, "environment", lambda: dict(torch="here", date="now"))
    found = run_suite("gpu", quick=True)
    assert found["quick"] and found["rows"][0]["median"] == 0.002
    env = dict(torch="here", date="now", driver="550", commit=10 * "a")
    assert found["environment"] == env
    tool.write_text(GPU.replace("RUN", repr(run | dict(rows=[]))))
    with pytest.raises(RuntimeError, match="measured nothing"):
        run_suite("gpu", quick=True)


def test_unknown_suites_are_refused():
    with pytest.raises(ValueError, match="suite='disk': known suites are cpu, memory"):
        run_suite("disk")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        run_suite("gpu")
