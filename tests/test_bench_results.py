"""What becomes of measurements: files, comparisons, tables, ratios and targets."""
import json

import pytest

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
from hilbert_attn.bench.cpu import CPU_CONFIG, bench_rows, bench_targets
from hilbert_attn.bench.machine import environment, machine_slug
from hilbert_attn.bench.results import (
    Table,
    compare_runs,
    from_gpu_run,
    latest_runs,
    load_run,
    load_runs,
    measurements,
    race_rows,
    results_folder,
    save_run,
)
from hilbert_attn.bench.suites import (
    BRANCH_CALLS,
    ONE_CALL,
    SUITES,
    format_run,
    report_run,
)

FIRST, SECOND = "2026-01-01 00:00 UTC", "2026-01-02 00:00 UTC"


def made_up(suite="dilated", date=FIRST, **times) -> dict:
    "A run; times are a median and two percentiles by name."
    about = dict(mode="m", direction="forward", repeats=9)
    rows = [
        dict(name=name, median=median, p20=p20, p80=p80, **about)
        for name, (median, p20, p80) in times.items()
    ]
    return dict(
        suite=suite,
        quick=True,
        config=dict(target=1.15),
        environment=environment() | dict(date=date),
        limits=dict(matmul_flops_per_s=2.0),
        rows=rows,
    )


def elsewhere(run: dict, date: str) -> dict:
    "The same, on another machine."
    env = run["environment"] | dict(cpu="Other", date=date)
    return run | dict(environment=env)


def test_runs_survive_their_file(tmp_path):
    first = made_up(a=(1, 1, 1))
    later = made_up(date="2999-01-01 00:00 UTC", a=(1, 1, 1))
    other = elsewhere(first, "1999-01-01 00:00 UTC")
    for run in (later, first, other):
        path = save_run(run, tmp_path)
    assert path.parent.name.startswith("other")
    assert not list(tmp_path.rglob("*.part"))
    # oldest first, whatever the file
    assert load_runs("dilated", tmp_path) == [other, first, later]
    assert load_runs("gpu", tmp_path) == []


def test_files_have_a_line_for_each_row_and_machines_a_newest_run(tmp_path):
    old = made_up(a=(1, 1, 1), b=(2, 2, 2))
    new = made_up(date=SECOND, a=(1, 1, 1))
    other = elsewhere(made_up(), "2025-01-01 00:00 UTC")
    for run in (old, new, other):
        save_run(run, tmp_path)
    mine = tmp_path / machine_slug(new["environment"]) / "dilated.json"
    lines = mine.read_text().splitlines()
    assert len([line for line in lines if '"median"' in line]) == 3
    assert latest_runs("dilated", tmp_path) == [new, other]


def test_the_run_to_compare_with(tmp_path):
    save_run(made_up(), tmp_path)
    path = save_run(made_up(date=SECOND), tmp_path)
    assert load_run(path, "dilated")["environment"]["date"] == SECOND
    one = tmp_path / "one.json"
    one.write_text(json.dumps(report_run(made_up("ring", ring=(1, 1, 1)))))
    assert load_run(one, "ring")["rows"]
    with pytest.raises(ValueError, match="no run of the suite 'cpu'"):
        load_run(path, "cpu")
    words = tmp_path / "words.json"
    words.write_text("words")
    with pytest.raises(ValueError, match="no JSON"):
        load_run(words, "cpu")
    with pytest.raises(OSError):
        load_run(tmp_path / "nothing.json", "cpu")


def test_stored_results_can_be_read():
    for path in results_folder().glob("*/*.json"):
        if path.stem not in SUITES:
            continue
        for run in json.loads(path.read_text()):
            assert machine_slug(run["environment"]) == path.parent.name
            assert not run["quick"] and run["suite"] == path.stem
            assert measurements(run) and format_run(run)
            assert json.dumps(report_run(run))


def test_changes_within_the_spread_are_no_changes():
    steady = (1, 0.9, 1.1)
    old = made_up(a=steady, b=steady, c=steady, d=steady, gone=(1, 1, 1))
    new = made_up(
        a=(1.15, 1.05, 1.2),
        b=(1.3, 1.2, 1.4),
        c=(0.5, 0.4, 0.89),
        d=(0.5, 0.4, 0.95),
        added=(1, 1, 1),
    )
    found = {row["what"][0]: (row["change"], row["ratio"]) for row in compare_runs(new, old)}
    assert found == {
        "a": ("within the spread", 1.15),
        "b": ("slower", 1.3),
        "c": ("faster", 0.5),
        "d": ("within the spread", 0.5),
    }
    with pytest.raises(ValueError, match="suite 'cpu'"):
        compare_runs(new, old | dict(suite="cpu"))


def test_memory_is_compared_in_its_own_words():
    def peak(size):
        spread = dict(median=size, p20=size, p80=size, repeats=1)
        row = dict(name="sdpa", tokens=9, unit="bytes", **spread)
        return made_up("memory") | dict(rows=[row])

    (row,) = compare_runs(peak(2 ** 21), peak(2 ** 20))
    assert row["what"] == "sdpa, tokens 9" and row["unit"] == "MiB"
    assert (row["before"], row["now"], row["ratio"]) == (1.0, 2.0, 2.0)
    assert row["change"] == "more"
    nothing = format_run(made_up("ring", x=(1, 1, 1)), made_up("ring"))
    assert "which measured nothing at these settings" in nothing


def test_race():
    times = {BRANCH_CALLS: (0.5, 0.4, 0.6), ONE_CALL: (0.25, 0.2, 0.3)}
    rows = race_rows(made_up(**times), BRANCH_CALLS)
    keys = ("name", "ms", "relative", "setting")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (BRANCH_CALLS, 500, 1, "m"),
        (ONE_CALL, 250, 0.5, "m"),
    ]


def test_table_of_text():
    rows = [dict(name="a", x=1.25, y=None), dict(name="long name", x=10.0, y=3)]
    table = Table("name", rows, dict(name="", x=".1f", y=""), dict(x="x ms"))
    assert str(table).splitlines() == [
        "name       x ms  y",
        "------------------",
        "a           1.2  -",
        "long name  10.0  3",
    ]


NAMES = dict(
    matmul=MATMUL,
    naive=NAIVE,
    masked=MASKED,
    masked_hilbert=MASKED_HILBERT,
    dense=DENSE,
    reshaped=RESHAPED,
    gathered=GATHERED,
    ours=OURS,
    hilbert=OURS_HILBERT,
    lse=OURS_LSE,
    hilbert_lse=OURS_HILBERT_LSE,
)


def synthetic(**times) -> dict:
    "Times in seconds, forward; backward takes three times as long."
    rows = []
    for direction, factor in (("forward", 1), ("forward+backward", 3)):
        for name, t in times.items():
            if direction == "forward" and "lse" in name:
                continue
            pairs = 1600 if name == "dense" else 100
            spread = dict.fromkeys(("median", "p20", "p80"), factor * t)
            about = dict(name=NAMES[name], direction=direction)
            rows.append(about | spread | dict(repeats=3, pairs=pairs))
    memory = dict(ordered=True, backward=True, tokens=32768)
    memory |= dict(peak_extra_bytes=50, qkv_bytes=20)
    run = dict(quick=False, suite="cpu", config=CPU_CONFIG)
    return run | dict(environment=environment(), rows=rows, memory=[memory])


WITHOUT_GROUPS = dict(
    matmul=1.0,
    naive=100.0,
    masked=30.0,
    masked_hilbert=36.0,
    dense=20.0,
    ours=2.0,
    hilbert=4.0,
    lse=2.2,
    hilbert_lse=5.0,
)


def by_name(run: dict) -> dict:
    return {(row["name"], row["direction"]): row for row in bench_rows(run)}


def test_ratios_are_to_the_baselines_of_the_same_order():
    of = by_name(synthetic(**WITHOUT_GROUPS))
    assert of[OURS, "forward"]["over_masked"] == 15
    assert of[OURS_HILBERT, "forward"]["over_masked"] == 9
    assert of[OURS_HILBERT, "forward+backward"]["over_naive"] == 25
    assert of[OURS, "forward"]["share_of_limit"] == 0.5
    assert of[DENSE, "forward"]["share_of_limit"] == 0.8  # 16 times the pairs
    # as in runs from before these were contenders
    assert all(row["over_reshaped"] is None for row in of.values())


def test_groups_made_by_hand_are_a_baseline():
    of = by_name(synthetic(**WITHOUT_GROUPS, reshaped=1.5, gathered=3.0))
    for name in (OURS, OURS_HILBERT):
        for direction in ("forward", "forward+backward"):
            assert of[name, direction]["over_reshaped"] == 0.75
    assert of[GATHERED, "forward"]["over_reshaped"] == 1
    assert of[RESHAPED, "forward"]["over_reshaped"] == 1


TARGETS = [
    "forward, times faster than masked SDPA",
    "forward, times faster than naive PyTorch",
    "forward, time / one matmul of the same FLOPs",
    "forward+backward, times faster than masked SDPA",
    "time with an LSE gradient / without",
]


def test_targets():
    run = synthetic(**WITHOUT_GROUPS)
    met = {found["what"]: found["met"] for found in bench_targets(run)}
    ours = [met[f"{OURS}: {what}"] for what in TARGETS]
    along = [met[f"{OURS_HILBERT}: {what}"] for what in TARGETS]
    assert ours == [True, True, False, True, True]
    assert along == [True, False, False, True, False]
    memory = "forward+backward, N 32,768, peak extra memory / (q+k+v)"
    assert met[f"{OURS_HILBERT}: {memory}"]
    text = format_run(run)
    assert "1.25  <= 1.2   no" in text and "2.50  <= 3    yes" in text


GPU_ROW = dict(
    case=dict(name="N64 w64"),
    kind="forward",
    name="triton",
    ms=2.0,
    p20=1.0,
    p80=3.0,
    repeats=9,
    tflops=1.0,
    share_of_matmul=0.5,
    gbs_minimal=1.0,
    share_of_copy=0.25,
    peak_mib=7.0,
)
GPU_FAILED = dict(case=GPU_ROW["case"], kind="forward", name="mask", failed="memory")
GPU_TARGET = dict(
    target="faster",
    case="N64 w64",
    kind="forward",
    measured=0.9,
    needed=1.0,
    met=False,
)
GPU_RUN = dict(
    environment=dict(driver="550", date="2026-01-01T00:00:00+00:00", commit=40 * "a"),
    rates=dict(matmul_tflops=600.0, copy_gbs=4000.0),
    skipped=[],
    correctness=dict(cases=3, wrong=[]),
    rows=[GPU_ROW, GPU_ROW | dict(name="flex", ms=4.0), GPU_FAILED],
    verdicts=[GPU_TARGET],
)


def test_what_the_gpu_program_wrote():
    run = from_gpu_run(GPU_RUN)
    setting = dict(case="N64 w64", direction="forward")
    found = [(m["name"], m["median"], m["settings"]) for m in measurements(run)]
    assert found == [("triton", 0.002, setting), ("flex", 0.004, setting)]
    limits = dict(matmul_flops_per_s=600e12, copy_bytes_per_s=4000e9)
    assert run["limits"] == limits and run["environment"]["driver"] == "550"
    assert "x triton" in format_run(run) and ">= 1.0" in format_run(run)
    assert report_run(run)["tables"]["gpu"][1]["relative"] == 2


def test_a_table_in_a_notebook():
    rows = [dict(what="a", ms=1.234, met=True), dict(what="b", ms=None, met=False)]
    table = Table("call", rows, dict(what="", ms=".1f", met=""), dict(ms="time, ms"))
    assert table._repr_markdown_().splitlines() == [
        "| call | time, ms | met |", "| --- | ---: | ---: |", "| a | 1.2 | yes |", "| b | - | no |"]
    assert repr(table) == str(table) and str(table).startswith("call  time, ms  met")
