"""The experiment on orders: trainings differ in the order alone, and words follow the figures.

Trainings can be repeated and resumed.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from notebook_runs import run_notebook

from hilbert_attn.bench import load_runs
from hilbert_attn.patterns import SegmentPattern

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("train_orders", ROOT / "tools" / "train_orders.py")
orders = sys.modules["train_orders"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(orders)
QUICK, Variant = orders.QUICK, orders.Variant
TINY = QUICK | {task: QUICK[task] | dict(steps=2, evaluate_every=2) for task in orders.VARIANTS}
TRAININGS = sum(map(len, orders.VARIANTS.values()))


@pytest.fixture(scope="module")
def photos(): return orders.Photos(QUICK["photos"])


@pytest.fixture(scope="module")
def at_once() -> dict:
    "The whole experiment with two steps a training."
    return orders.run_suite(TINY, True, store=False)


@pytest.mark.parametrize("task", orders.VARIANTS)
def test_all_variants_of_a_seed_start_alike_and_see_the_same_data(task):
    data = orders.DATA[task](QUICK[task])
    models = [orders.new_model(data, v, 3)[0] for v in orders.VARIANTS[task]]
    for model in models[1:]:
        torch.testing.assert_close(model.state_dict(), models[0].state_dict(), rtol=0, atol=0)
    first, again = (data.batch(torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(
        torch.equal(a, b)
        for a, b in zip(data.validation, orders.DATA[task](QUICK[task]).validation)
    )


def test_held_out_photos_stay_out(photos):
    assert len({*orders.TRAINING_PHOTOS, *orders.HELD_OUT_PHOTOS}) == len(
        orders.TRAINING_PHOTOS
    ) + len(orders.HELD_OUT_PHOTOS)
    for name in orders.HELD_OUT_PHOTOS:
        photos.photos[name] = np.full_like(photos.photos[name], np.nan)
    draw = torch.Generator().manual_seed(0)
    assert all(photos.batch(draw)[0].isfinite().all() for _ in range(30))
    photos.__init__(QUICK["photos"])


def test_hidden_tokens_are_hidden_and_only_they_count(photos):
    tokens, hidden = photos.batch(torch.Generator().manual_seed(0))
    assert (hidden.sum(1) == round(0.75 * 14 * 14)).all()
    model, _ = orders.new_model(photos, Variant("hilbert", True), 0)
    poisoned = torch.where(hidden[..., None], torch.full_like(tokens, 1e6), tokens)
    torch.testing.assert_close(model(poisoned, hidden), model(tokens, hidden), rtol=0, atol=0)
    wrong_where_shown = torch.where(hidden[..., None], tokens, tokens + 7)
    assert (photos.losses(wrong_where_shown, tokens, hidden) == 0).all()
    assert torch.allclose(photos.losses(tokens + 2, tokens, hidden), torch.tensor(4.0))
    side = 14 * 4
    assert photos.picture(tokens).shape == (side, 2 * side)


@pytest.mark.parametrize(
    "variant",
    [Variant("row_major"), Variant("tile", True), Variant("hilbert", True), Variant(None)],
    ids=lambda v: v.name,
)
def test_a_token_depends_on_exactly_the_tokens_that_its_segments_hold(photos, variant):
    torch.manual_seed(0)
    model, _ = orders.new_model(photos, variant, 0)  # two layers
    n = 14 * 14
    tokens = torch.randn(1, n, 16, requires_grad=True)
    masks = [
        SegmentPattern(n, n if variant.curve is None else 16).mask(o)[0]
        for o in orders.layer_orders((14, 14), 16, 2, variant)
    ]
    reach = masks[1].double() @ masks[0].double() > 0
    for i in (0, 57, 130, n - 1):
        (grad,) = torch.autograd.grad(
            model(tokens, torch.zeros(1, n, dtype=torch.bool))[0, i].sum(), tokens
        )
        assert torch.equal(grad[0].abs().sum(-1) > 0, reach[i])


def test_orders_cost_the_same_pairs():
    pairs = {v.name: orders.attended_pairs(orders.PHOTOS, v) for v in orders.PHOTO_VARIANTS}
    assert pairs.pop("dense") == 784**2
    assert set(pairs.values()) == {12 * 64**2 + 16**2}
    for v in orders.PHOTO_VARIANTS:
        for o in orders.layer_orders((28, 28), 64, 3, v):
            assert torch.equal(o.sort().values, torch.arange(784))


def test_trainings_repeat_to_the_last_bit_and_learn(photos):
    config = QUICK["photos"] | dict(steps=40, warmup=5, evaluate_every=20, rate=4e-3)
    data = orders.Photos(config)
    (a, _), (b, _) = (orders.train(data, Variant("hilbert", True), 1) for _ in range(2))
    assert a == b
    assert a["final"] < 0.8 * a["validation"][0][1] and a["final"] == a["validation"][-1][1]
    assert np.isclose(np.mean(list(a["final_by_name"].values())), a["final"], atol=2e-5)


def test_learning_rate_rises_and_falls():
    config = dict(rate=1.0, warmup=4, steps=20)
    rates = [orders.rate_at(step, config) for step in range(20)]
    assert (
        np.argmax(rates) == 4
        and rates[4] == 1
        and rates[0] == 0.2
        and all(np.diff(rates[4:]) < 0)
        and orders.rate_at(20, config) == 0
    )


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, at_once):
    lines = []

    def stop_after_three(line):
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        orders.run_suite(TINY, True, tmp_path, log=stop_after_three)
    (part,) = load_runs("orders", tmp_path)
    assert len(part["photos"]) == 3 and len(orders.missing(part)) == TRAININGS - 3
    more = []
    whole = orders.run_suite(TINY, True, tmp_path, log=more.append)
    assert len(more) == TRAININGS - 3 and not orders.missing(whole)
    (stored,) = load_runs("orders", tmp_path)
    assert stored == json.loads(json.dumps(whole))
    for task in orders.VARIANTS:
        assert at_once[task] == whole[task]
    assert {"truth", "dense", "hilbert, shifted"} <= set(whole["pictures"])
    assert (
        not (tmp_path / "nothing").exists()
        and orders.run_suite(TINY, True, tmp_path, log=pytest.fail) == stored
    )


def test_times_are_added_to_the_run(tmp_path, at_once):
    with pytest.raises(RuntimeError, match="train first"):
        orders.add_times(TINY, tmp_path)
    path = orders._store(at_once, tmp_path)
    (timed,) = json.loads(orders.add_times(TINY, tmp_path).read_text())
    assert path.exists() and {(r["task"], r["variant"]) for r in timed["timing"]} == {
        (t, v.name) for t, vs in orders.VARIANTS.items() if t != "long" for v in vs
    }
    assert all(r["median"] > 0 for r in timed["timing"]) and timed["photos"] == at_once["photos"]


def _run(
    losses: dict, text: dict | None = None, short: dict | None = None, long: dict | None = None
) -> dict:
    "A run with these final losses per variant and seed; other variants get 1."
    rng = np.random.default_rng(0)

    def rows(task, given):
        return [
            dict(variant=v.name, seed=s, final=float(x))
            for v in orders.VARIANTS[task]
            for s, x in enumerate(given.get(v.name, 1 + 0.001 * rng.standard_normal(3)))
        ]

    pairs = {
        task: {v.name: 100 if v.curve is None else 10 for v in vs}
        for task, vs in orders.VARIANTS.items()
    }
    settings = {task: dict(segment_size=16, steps=1200) for task in orders.VARIANTS}
    return dict(
        config=dict(seeds=[0, 1, 2], **settings),
        photos=rows("photos", losses),
        short=rows("short", short or {}),
        long=rows("long", long or {}),
        text=rows("text", text or {}),
        pairs=pairs,
        guesses={"mean of the nearest visible patches": 2.0},
        timing=[
            dict(task="photos", variant=v.name, median=3.0 if v.curve is None else 1.5)
            for v in orders.PHOTO_VARIANTS
        ],
    )


def test_comparisons_are_paired():
    run = _run(
        {"hilbert": [0.9, 1.9, 2.9], "row_major": [1.0, 2.0, 3.01]}
    )  # seeds differ far more than the orders
    c = orders.compare(run, "photos", "hilbert", "row_major")
    d = np.array([-0.1, -0.1, -0.11])
    half = 4.303 * d.std(ddof=1) / math.sqrt(3)
    base = np.mean([1.0, 2.0, 3.01])
    assert (c.verdict, c.seeds, c.seeds_lower) == ("lower", 3, 3)
    assert np.allclose(
        [c.change, c.low, c.high], np.array([d.mean(), d.mean() - half, d.mean() + half]) / base
    )
    assert orders.compare(run, "photos", "row_major", "hilbert").verdict == "higher"
    with pytest.raises(ValueError, match="share 1 seeds"):
        orders.compare(
            run | dict(photos=[r for r in run["photos"] if r["seed"] == 0]),
            "photos",
            "hilbert",
            "tile",
        )


def test_families_are_means_per_seed():
    run = _run(
        {
            "tile": [1, 2, 3.0],
            "morton": [2, 3, 4.0],
            "hilbert": [3, 4, 5.0],
            "row_major": [4, 5, 6.1],
            "snake": [4, 5, 6.1],
        }
    )
    c = orders.compare(run, "photos", "blocks", "stripes")
    assert (c.verdict, c.seeds_lower) == ("lower", 3) and np.isclose(
        c.change, np.mean([-2, -2, -2.1]) / np.mean([4, 5, 6.1])
    )
    assert (
        orders.compare(run, "photos", "blocks, shifted", "stripes, shifted").verdict == "undecided"
    )


def test_quantiles_of_t_cover_95_percent():
    rng = np.random.default_rng(0)
    for n in range(2, 11):
        x = rng.standard_normal((200_000, n))
        t = x.mean(1) / (x.std(1, ddof=1) / math.sqrt(n))
        assert abs((np.abs(t) < orders._T95[n - 2]).mean() - 0.95) < 0.003


@pytest.mark.parametrize(
    "hilbert, verdict, words",
    [
        ([0.9, 0.901, 0.899], "lower", "Yes, with shifts and without"),
        ([1.1, 1.101, 1.099], "higher", "the wrong way round"),
        ([0.9, 1.1, 1.0], "undecided", "Not shown by these seeds"),
    ],
)
def test_words_follow_the_figures(hilbert, verdict, words):
    run = _run({"hilbert": hilbert, "hilbert, shifted": hilbert})
    first, _, second, *_ = orders.conclusions(run)
    assert words in first and ("cannot be told apart" in first) == (verdict == "undecided")
    rivals = [f"`{c}{s}`" for s in ("", ", shifted") for c in ("tile", "morton")]
    part = {"lower": "lower than ", "higher": "higher than ", "undecided": "not told apart from "}[
        verdict
    ] + ", ".join(rivals)
    assert part in second and second.count("none") == 2


def test_words_for_a_mixed_outcome_and_for_the_other_tasks():
    run = _run(
        {"hilbert": [0.9, 0.901, 0.899], "hilbert, shifted": [0.9, 1.1, 1.0]},
        {"hilbert": [1.5, 1.6, 1.7], "row_major": [1.0, 1.1, 1.2]},
        {"morton": [0.5, 0.501, 0.499]},
        {"dense": [0.7, 0.701, 0.699]},
    )
    lines = orders.conclusions(run)
    assert "It depends: without shifts Hilbert is lower, with shifts not told apart" in lines[0]
    assert (
        "`hilbert` ends higher than `row_major`" in lines[-1]
        and "lower in 0 of 3 seeds" in lines[-1]
    )
    assert "10.0 times the pairs" in lines[4] and "2.0 times as long" in lines[5]
    assert (
        "with segments of 16?" in lines[-3]
        and "`hilbert` ends higher than `morton`" in lines[-3]
        and "`morton, shifted` ends higher than `morton`" in lines[-3]
        and "`hilbert` and `row_major` cannot be told apart" in lines[-3]
    )
    assert (
        "over 1,200 steps?" in lines[-2]
        and "`hilbert, shifted` ends higher than `dense`" in lines[-2]
        and "`hilbert` and `row_major` cannot be told apart" in lines[-2]
    )


def test_the_stored_run_is_whole():
    runs = [r for r in load_runs("orders") if not r["quick"]]
    assert runs, "nbs/results has no run of the experiment: python tools/train_orders.py"
    run = runs[-1]
    assert not orders.missing(run) and len(run["config"]["seeds"]) >= 3 and run["timing"]
    assert run["config"] == json.loads(json.dumps(orders.CONFIG))
    for task in orders.VARIANTS:
        assert all(
            r["final"] == r["validation"][-1][1] and math.isfinite(r["final"]) for r in run[task]
        )
        assert run["pairs"][task] == {
            v.name: orders.attended_pairs(orders.CONFIG[task], v) for v in orders.VARIANTS[task]
        }
    assert run["guesses"] == pytest.approx(
        orders.simple_guesses(orders.Photos(orders.PHOTOS)), rel=1e-4
    )


@pytest.mark.full
def test_quick_from_the_command_line_writes_nothing_unless_told(tmp_path):
    found = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train_orders.py"), "--quick"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == TRAININGS and not list(tmp_path.iterdir())


NO_RESULT = """
from pathlib import Path
from hilbert_attn.bench import results
results.results_folder = lambda: Path('no results')
"""


@pytest.mark.timeout(400)
def test_the_notebook_says_so_when_there_is_no_result(tmp_path):
    path = ROOT / "nbs" / "22_orders_on_photos.ipynb"
    shown = [str(output) for output in run_notebook(path, tmp_path, NO_RESULT)]
    notebook = nbformat.read(path, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    dependent = sum("\nfrom_run(" in f"\n{source}" for source in code)
    assert sum("No stored run." in text for text in shown) == dependent
    assert not any("ends lower" in text or "ends higher" in text for text in shown)
