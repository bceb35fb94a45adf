"""The policy table and the newest stored measurement of each machine say the same.

And pages without results say that there are none.
"""
import ast
import json
from pathlib import Path

import pytest

from hilbert_attn import bench
from hilbert_attn.backends import POLICY
from hilbert_attn.bench import (
    crossover_table,
    latest_runs,
    mean_ratio,
    policy_choice,
    policy_verdict,
)

NBS = Path(__file__).resolve().parent.parent / "nbs"
CPU_MASK = next(row for row in POLICY if (row.device, row.backend) == ("cpu", "sdpa_mask"))
LIMIT = CPU_MASK.max_tokens["segments"]
SEVERAL = next(row for row in POLICY if row.min_threads > 1).max_tokens["segments"]
REAL_POLICY = True


def slug(run: dict) -> str: return bench.machine_slug(run["environment"])


@pytest.mark.parametrize("run", latest_runs("crossover"), ids=slug)
def test_the_policy_agrees_with_the_newest_measurement(run):
    verdict = policy_verdict(run)
    assert verdict["agrees"], f"POLICY and the stored crossover have drifted apart: {verdict}"
    if verdict["device"] != "cpu": return
    assert verdict["mask_wins_up_to"] <= verdict["max_tokens"] < verdict["sdpa_wins_from"]


def measured(masked: dict[int, float], spread=0.01, device="cpu", **others: float) -> dict:
    "A run: `sdpa` takes a second, `sdpa_mask` what is given by length, others what is given."
    def row(name, n, order, direction, t):
        setting = dict(tokens=n, head_dim=64, segment_size=n, dilation_rate=4, order=order)
        times = dict(median=t, p20=t * (1 - spread), p80=t * (1 + spread), repeats=9)
        return dict(name=name, direction=direction, **setting, **times)

    rows = [
        row(name, n, order, direction, t)
        for n, mask in masked.items()
        for order in ("none", "hilbert")
        for direction in bench.FLOPS_PER_PAIR
        for name, t in (("sdpa", 1.0), ("sdpa_mask", mask), *others.items())
    ]
    config = dict(tokens=list(masked), orders=["none", "hilbert"], device=device)
    config["backends"] = ["sdpa_mask", "sdpa", *others]
    environment = dict(date="")
    return dict(suite="crossover", quick=False, config=config, environment=environment, rows=rows)


def verdict(masked, **options): return policy_verdict(measured(masked, **options))


def test_drift_is_found():
    half, double = LIMIT // 2, 2 * LIMIT
    limits = dict(device="cpu", max_tokens=LIMIT, mask_wins_up_to=LIMIT, sdpa_wins_from=double)
    assert verdict({half: 0.5, LIMIT: 0.9, double: 2.0}) == limits | dict(agrees=True)
    too_close_to_call = {half: 0.5, LIMIT: 1.001, double: 0.999}
    assert verdict(too_close_to_call)["agrees"]
    mask_wins_beyond_the_limit = {half: 0.5, LIMIT: 0.5, double: 0.5}
    assert not verdict(mask_wins_beyond_the_limit)["agrees"]
    sdpa_wins_at_the_limit = {half: 0.5, LIMIT: 2.0, double: 2.0}
    assert not verdict(sdpa_wins_at_the_limit)["agrees"]
    as_wide_as_the_difference = 0.5
    assert verdict({half: 0.5, LIMIT: 1.5, double: 2.0}, spread=as_wide_as_the_difference)["agrees"]


def test_drift_is_found_on_a_gpu():
    limits = dict(device="cuda", max_tokens=None, mask_wins_up_to=None, sdpa_wins_from=LIMIT)
    found = verdict({LIMIT: 2.0, 2 * LIMIT: 4.0}, device="cuda", triton=0.5)
    assert found == limits | dict(agrees=True)
    sdpa_beats_what_the_policy_takes = verdict({LIMIT: 2.0}, device="cuda", triton=1.5)
    assert not sdpa_beats_what_the_policy_takes["agrees"]


def test_choice_and_ratio():
    both = ["sdpa_mask", "sdpa"]
    for n in (1, LIMIT): assert policy_choice("cpu", n, both, 1) == "sdpa_mask"
    for n in (LIMIT + 1, 10**6): assert policy_choice("cpu", n, both, 1) == "sdpa"
    assert policy_choice("cpu", SEVERAL, both, 2) == "sdpa_mask"
    assert policy_choice("cpu", SEVERAL + 1, both, 2) == "sdpa"
    assert policy_choice("cuda", 16, [*both, "triton"]) == "triton"
    assert policy_choice("cuda", 16, both) == "sdpa"
    run = measured({16: 0.5, 32: 2.0}, spread=0.0)
    half_and_double = mean_ratio(run["rows"], "sdpa_mask", "sdpa")
    assert half_and_double == pytest.approx((1, 1, 1))
    table = [(row["tokens"], row["winner"], row["ratio"]) for row in crossover_table(run)]
    assert table == [(16, "sdpa_mask", 0.5), (32, "sdpa", 2.0)]
    with pytest.raises(ValueError, match="no setting was measured with both"):
        mean_ratio(run["rows"], "triton", "sdpa")


def value_of(source: str, names: dict):
    "Runs a cell; the value that it ends with, or None."
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is None: return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def shown(notebook: str, after: str = "", names: dict | None = None) -> list[str]:
    "What a page shows: the Markdown and text of its cells, from a heading on."
    import matplotlib.pyplot
    cells = json.loads((NBS / notebook).read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    first = next(i for i, source in enumerate(sources) if source.startswith(after))
    names = dict(display=print) | (names or {})  # as in a notebook
    code = [
        source
        for source, cell in zip(sources[first:], cells[first:])
        if cell["cell_type"] == "code"
    ]
    values = [value_of(source, names) for source in code]
    matplotlib.pyplot.close("all")
    return [getattr(value, "data", str(value)) for value in values if value is not None]


@pytest.fixture
def plain_plots():
    pytest.importorskip("pandas")
    pytest.importorskip("IPython")
    pytest.importorskip("matplotlib").use("Agg")


PAGE = "21_which_backend_when.ipynb"
CLAIMS = [
    "clearly wins",
    "Measured on",
    "disagree",
    "on average",
    "MemoryRow",
    "times the estimate",
]


def test_the_page_speaks_from_what_is_stored(plain_plots, monkeypatch, tmp_path):
    if latest_runs("crossover"): assert "agree" in shown(PAGE)[0]
    monkeypatch.setattr(bench.results, "results_folder", lambda: tmp_path)
    empty = "\n".join(shown(PAGE))
    assert empty.count("No run of the suite") >= 6
    assert not any(words in empty for words in CLAIMS)


def test_a_drifted_measurement_is_said_on_the_page(plain_plots, monkeypatch, tmp_path):
    run = measured({16: 0.5, LIMIT: 2.0, 512: 4.0})
    run |= dict(environment=bench.environment(), limits={}, checks={})
    run["config"] |= dict(patterns=[[1, 4]], head_dims=[64], repeats=9)
    bench.save_run(run, tmp_path)
    monkeypatch.setattr(bench.results, "results_folder", lambda: tmp_path)
    assert "the policy does not agree with this measurement any more" in shown(PAGE)[0]


@pytest.mark.parametrize(
    "notebook", ["15e_cpu", "15f_memory", "15g_crossover", "15h_short", "15i_suites"])
def test_the_benchmark_pages_without_results(plain_plots, monkeypatch, tmp_path, notebook):
    import pandas as pd
    from IPython.display import Markdown
    monkeypatch.setattr(bench.results, "results_folder", lambda: tmp_path)
    module = getattr(bench, notebook.partition("_")[2])
    names = vars(bench) | vars(module) | dict(pd=pd, Markdown=Markdown)
    empty = "\n".join(shown(f"{notebook}.ipynb", "## What was found", names))
    assert "is stored: `hilbert-attn bench" in empty and "faster" not in empty
