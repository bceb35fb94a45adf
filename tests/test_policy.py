"""The policy table and the newest stored measurement of each machine say the same; and pages without results say so."""
import ast
import json
from pathlib import Path

import pytest

from hilbert_attn import bench
from hilbert_attn.backends import POLICY
from hilbert_attn.bench import crossover_table, latest_runs, mean_ratio, policy_choice, policy_verdict

NBS = Path(__file__).resolve().parent.parent / "nbs"
LIMIT = next(row.max_tokens for row in POLICY if (row.device, row.backend) == ("cpu", "sdpa_mask"))


@pytest.mark.parametrize("run", latest_runs("crossover"), ids=lambda run: bench.machine_slug(run["environment"]))
def test_the_policy_agrees_with_the_newest_measurement(run):
    verdict = policy_verdict(run)
    assert verdict["agrees"], f"POLICY and the stored crossover have drifted apart: {verdict}"
    if verdict["device"] == "cpu": assert verdict["mask_wins_up_to"] <= verdict["max_tokens"] < verdict["sdpa_wins_from"]


def measured(masked: dict[int, float], spread: float = 0.01, device: str = "cpu", **others: float) -> dict:
    "A run in which `sdpa` takes a second, `sdpa_mask` what is given by length, and others what is given."
    def row(name, n, order, direction, t): return dict(name=name, tokens=n, head_dim=64, segment_size=n, dilation_rate=4, order=order, direction=direction, median=t, p20=t * (1 - spread), p80=t * (1 + spread), repeats=9)
    rows = [row(name, n, order, direction, t) for n, m in masked.items() for order in ("none", "hilbert") for direction in bench.FLOPS_PER_PAIR for name, t in (("sdpa", 1.0), ("sdpa_mask", m), *others.items())]
    return dict(suite="crossover", quick=False, config=dict(tokens=list(masked), orders=["none", "hilbert"], device=device, backends=["sdpa_mask", "sdpa", *others]), environment=dict(date=""), rows=rows)


def test_drift_is_found():
    half, double = LIMIT // 2, 2 * LIMIT
    assert policy_verdict(measured({half: 0.5, LIMIT: 0.9, double: 2.0})) == dict(device="cpu", max_tokens=LIMIT, mask_wins_up_to=LIMIT, sdpa_wins_from=double, agrees=True)
    assert policy_verdict(measured({half: 0.5, LIMIT: 1.001, double: 0.999}))["agrees"]  # too close to call
    assert not policy_verdict(measured({half: 0.5, LIMIT: 0.5, double: 0.5}))["agrees"]  # the mask wins beyond the limit
    assert not policy_verdict(measured({half: 0.5, LIMIT: 2.0, double: 2.0}))["agrees"]  # sdpa wins at the limit
    assert policy_verdict(measured({half: 0.5, LIMIT: 1.5, double: 2.0}, spread=0.5))["agrees"]  # a spread as wide as the difference
    assert policy_verdict(measured({LIMIT: 2.0, double: 4.0}, device="cuda", triton=0.5)) == dict(device="cuda", max_tokens=None, mask_wins_up_to=None, sdpa_wins_from=LIMIT, agrees=True)
    assert not policy_verdict(measured({LIMIT: 2.0}, device="cuda", triton=1.5))["agrees"]  # sdpa beats what the policy takes


def test_choice_and_ratio():
    assert [policy_choice("cpu", n, ["sdpa_mask", "sdpa"]) for n in (1, LIMIT, LIMIT + 1, 10 ** 6)] == ["sdpa_mask", "sdpa_mask", "sdpa", "sdpa"]
    assert policy_choice("cuda", 16, ["sdpa_mask", "sdpa", "triton"]) == "triton" and policy_choice("cuda", 16, ["sdpa_mask", "sdpa"]) == "sdpa"
    run = measured({16: 0.5, 32: 2.0}, spread=0.0)
    assert mean_ratio(run["rows"], "sdpa_mask", "sdpa") == pytest.approx((1, 1, 1))  # half and double: level
    assert [(row["tokens"], row["winner"], row["ratio"]) for row in crossover_table(run)] == [(16, "sdpa_mask", 0.5), (32, "sdpa", 2.0)]
    with pytest.raises(ValueError, match="no setting was measured with both"): mean_ratio(run["rows"], "triton", "sdpa")


def shown(notebook: str, after: str = "", names: dict | None = None) -> list[str]:
    "What a page shows: the Markdown and text of its cells, from a heading on."
    cells = json.loads((NBS / notebook).read_text())["cells"]
    first = next((i for i, cell in enumerate(cells) if "".join(cell["source"]).startswith(after)), 0) if after else 0
    found, names = [], names if names is not None else {}
    for cell in cells[first:]:
        if cell["cell_type"] != "code": continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, notebook, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), notebook, "eval"), names)
        if value is not None: found.append(value.data if hasattr(value, "data") else str(value))
    import matplotlib.pyplot
    matplotlib.pyplot.close("all")
    return found


@pytest.fixture
def plain_plots():
    pytest.importorskip("pandas")
    pytest.importorskip("IPython")
    pytest.importorskip("matplotlib").use("Agg")


def test_the_page_speaks_from_what_is_stored(plain_plots, monkeypatch, tmp_path):
    if latest_runs("crossover"): assert "agree" in shown("21_which_backend_when.ipynb")[0]
    monkeypatch.setattr(bench.results, "results_folder", lambda: tmp_path)
    empty = "\n".join(shown("21_which_backend_when.ipynb"))
    assert empty.count("No run of the suite") >= 6 and not any(words in empty for words in ("clearly wins", "Measured on", "disagree", "on average", "MemoryRow", "times the estimate"))


def test_a_drifted_measurement_is_said_on_the_page(plain_plots, monkeypatch, tmp_path):
    run = measured({16: 0.5, LIMIT: 2.0, 512: 4.0}) | dict(environment=bench.environment(), limits={}, checks={})
    run["config"] |= dict(patterns=[[1, 4]], head_dims=[64], repeats=9)
    bench.save_run(run, tmp_path)
    monkeypatch.setattr(bench.results, "results_folder", lambda: tmp_path)
    assert "the policy does not agree with this measurement any more" in shown("21_which_backend_when.ipynb")[0]


@pytest.mark.parametrize("notebook", ["15e_cpu", "15f_memory", "15g_crossover", "15h_suites"])
def test_the_benchmark_pages_without_results(plain_plots, monkeypatch, tmp_path, notebook):
    import pandas as pd
    from IPython.display import Markdown
    monkeypatch.setattr(bench.results, "results_folder", lambda: tmp_path)
    module = getattr(bench, notebook.partition("_")[2])
    names = vars(bench) | vars(module) | dict(pd=pd, Markdown=Markdown)
    empty = "\n".join(shown(f"{notebook}.ipynb", "## What was found", names))
    assert "is stored: `hilbert-attn bench" in empty and "faster" not in empty
