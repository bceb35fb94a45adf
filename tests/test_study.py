"""The reference study: its tasks, arms, runs on disk, statistics and pages, on toys."""
import json
import subprocess
import sys
from math import exp, log
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from scipy.optimize import minimize

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import run_study
from study import (
    analysis,
    attending,
    exploring,
    mechanism,
    plan,
    prediction,
    runner,
    store,
    timing,
)
from study.arms import ARMS, DILATED_ARMS, GRID_ARMS, POSITIONS, Arm, layer_order, moore, walk
from study.clouds import CloudNetwork, cloud_order, cloud_orders
from study.listops import OPERATORS
from study.masked import nearest_mean
from study.network import Network, OtherAttention, Size, rotary
from study.photos import FOLDS, TESTED, TUNING, Photos, load_photos
from study.scene import Scene, _rotation, load_scene
from study.tasks import Batch
from study.text import LETTERS, Text

from hilbert_attn.bench import results
from hilbert_attn.curves import curve_order
from hilbert_attn.modules import rotary_embedding
from hilbert_attn.patterns import NeighborhoodPattern, WindowPattern
from hilbert_attn.points import point_order

TASKS = list(plan.TASKS)
OTHERS = dict(plan.PICTURES | plan.CLOUDS | plan.SEQUENCES)
STAGES = dict(tune=78, primary=180, explore=339)


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    "A whole study of toys."
    folder = tmp_path_factory.mktemp("study")
    runner.run_study(plan.QUICK, folder)
    return folder


def made_up(effects: dict, seeds: int = 10, noise: float = 0.01) -> list[dict]:
    "Runs whose losses differ from arm to arm by factors, and have seeds and pictures crossed."
    draw = np.random.default_rng(0)
    found = []
    for task in TASKS:
        for seed in range(seeds):
            luck = draw.normal(0, 0.02)
            for arm in ARMS:
                logs = effects.get(arm, 0) + luck + 0.3 * np.arange(8) + draw.normal(0, noise, 8)
                groups = {f"group {i}": exp(x) for i, x in enumerate(logs)}
                loss = float(np.mean(list(groups.values())))
                found.append(dict(
                    stage="primary", task=task, arm=arm, seed=seed, rate=0.003, loss=loss,
                    groups=groups, curve=[[5, 9.0, 2 * loss], [10, 8.0, loss]], seconds=1.0,
                    schedule=dict(steps=10), guesses={"a": 50.0, "b": 60.0},
                    environment=dict(commit="0123456789", date="2026-01-02 03:04 UTC")))
    return found


# tasks

ALL = plan.TASKS | OTHERS


@pytest.mark.parametrize("name", ALL)
def test_examples_depend_on_the_draw_alone(name):
    def drawn(seed):
        return ALL[name](0).batch(3, torch.Generator().manual_seed(seed))

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(one.tokens, same.tokens) and torch.equal(one.target, same.target)
    assert not torch.equal(one.target, other.target)


@pytest.mark.parametrize("name", ALL)
def test_shapes_and_groups(name):
    task = ALL[name](0)
    tests = task.tests()
    examples = len(tests.groups)
    assert tests.batch.tokens.shape == (examples, task.tokens, task.inputs)
    assert tests.batch.target.shape == (examples, task.tokens, task.outputs)
    assert len({tests.groups.count(group) for group in tests.groups}) == 1
    assert task.loss(tests.batch.target, tests.batch).shape == (examples,)
    for guess in task.guesses(tests).values():
        assert guess.shape == (examples,) and guess.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_what_is_asked_is_not_given(name):
    task = ALL[name](0)
    batch = task.batch(4, torch.Generator().manual_seed(0))
    asked = batch.weight > 0
    assert asked.any(1).all()
    if name in ("pathfinder", "cluttered", "listops"): return  # all is given but the answer
    pixels = batch.tokens[..., -1 - task.outputs:-1]
    assert (pixels[asked] == 0).all()
    assert torch.equal(pixels[~asked], batch.target[~asked])


@pytest.mark.parametrize("name", TASKS)
def test_tuning_and_results_share_no_example(name):
    test, tune = (plan.TASKS[name](0, split).tests().batch for split in ("test", "tune"))
    seen = {tuple(x.flatten().tolist()) for x in test.target}
    assert not any(tuple(x.flatten().tolist()) in seen for x in tune.target)


def test_photos_are_crossed_and_held_out():
    assert len(TESTED) == len(set(TESTED)) == 15 and not set(TESTED) & set(TUNING)
    assert set(TESTED) | set(TUNING) == set(load_photos())
    held_out = [Photos(seed).held_out for seed in range(3)]
    assert {name for fold in held_out for name in fold} == set(TESTED)
    for seed in range(3):
        assert not set(Photos(seed).training) & set(held_out[seed])
        assert not set(Photos(seed, "tune").training) & {*held_out[seed], *TUNING}
    assert len(FOLDS) == 3


def test_digits_of_a_group_are_in_no_other_place():
    task, tune = plan.TASKS["digits"](0), plan.TASKS["digits"](0, "tune")
    last = task.first + task.groups * task.images
    assert task.training <= tune.first and tune.first + task.groups * task.images <= task.first
    assert last == len(task.images_of_all)


def test_the_mark_lies_on_the_marked_curve():
    "Where the curve is drawn; dashes have gaps, and other curves may lie there too."
    batch = plan.TASKS["pathfinder"](0).batch(64, torch.Generator().manual_seed(0))
    marks = batch.tokens[..., 4:]
    assert ((3 <= marks.sum((1, 2))) & (marks.sum((1, 2)) <= 6)).all()
    asked = (marks.amax(-1) > 0) & (batch.weight > 0)
    assert asked.any(1).float().mean() > 0.9
    assert batch.target[..., 0][asked].float().mean() > 0.9


def test_the_nearest_visible_patch():
    shown = torch.tensor([[1., 0, 0, 0, 0, 0, 0, 0, 1]])
    found = nearest_mean(shown * torch.arange(1., 10), shown, (3, 3))
    assert found.tolist() == [[1, 1, 5, 1, 5, 9, 5, 9, 9]]


def test_clutter_is_not_asked_and_digits_are_held_out():
    task, draw = plan.PICTURES["cluttered"](0), torch.Generator().manual_seed(0)
    batch = task.batch(8, draw)
    asked = batch.weight > 0
    assert (batch.target[asked].sum(-1) == 1).all() and (batch.tokens[asked].amax(-1) > 0).all()
    ink = batch.tokens.amax(-1) > 0
    assert 0.2 < asked.sum() / ink.sum() < 0.9
    tests = task.tests()
    assert task.training + task.groups * task.images == len(task.digits)
    assert torch.equal(tests.batch.target, task.tests().batch.target)
    chosen = torch.full((2, task.whole), len(task.digits) - 1)
    answer = task._examples(chosen, draw).target.argmax(-1)
    assert set(answer.unique().tolist()) <= {0, int(task.answers[-1])}


def test_digits_without_clutter_are_read_off_the_canvas():
    from study.cluttered import _painted
    images = torch.rand(2, 1, 8, 8) + 0.1
    picture = _painted(images, 36, torch.Generator().manual_seed(0))
    assert picture.shape == (2, 1, 36, 36)
    for drawn, image in zip(picture[:, 0], images[:, 0]):
        assert torch.equal(drawn[drawn > 0], image.flatten()) and drawn.gt(0).any(1).sum() == 8


def test_faces_are_crossed_and_held_out():
    named = [plan.PICTURES["faces"](seed) for seed in range(5)]
    assert sorted(i for task in named for i in task.names) == list(range(100))
    seen = {tuple(x.flatten().tolist()) for x in named[0].training}
    assert len(named[0].training) == 80
    assert not any(tuple(x.flatten().tolist()) in seen for x in named[0].held_out)


def test_the_scene_is_seen_by_the_camera_that_took_it():
    "Projected back, each point lies in its pixel."
    points, grey = load_scene()
    y, x = points[..., 0].isfinite().nonzero().unbind(1)
    across, down, depth = points[y, x].double().unbind(-1)
    torch.testing.assert_close(across / depth * 994.978 + 311.193, x.double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(down / depth * 994.978 + 254.877, y.double(), rtol=0, atol=1e-3)
    assert points.shape[:2] == grey.shape and 0 <= grey.min() < grey.max() <= 1
    assert 2000 < depth.min() < depth.max() < 6000 # mm: a workshop


def test_the_right_third_of_the_scene_is_held_out():
    task, draw = Scene(0), torch.Generator().manual_seed(0)
    known, held_out = range(task.border), range(task.border, task.grey.shape[1])
    for columns in (known, held_out):
        crops = [task._crop(columns, draw)[1] for _ in range(300)]
        assert min(crop.start for crop in crops) == columns[0]
        assert max(crop.stop for crop in crops) == columns[-1] + 1


def test_clouds_are_turned_and_never_mirrored():
    turns = [_rotation(torch.Generator().manual_seed(i)) for i in range(50)]
    for turn in turns:
        torch.testing.assert_close(turn @ turn.T, torch.eye(3), rtol=0, atol=1e-5)
        assert turn.det() > 0
    assert torch.stack(turns).mean(0).abs().max() < 0.3


def value_of(words: list[str]) -> int:
    "Of one list; takes its words away."
    operator, values = words.pop(0), []
    while words[0] != "]": values.append(value_of(words) if words[0][0] == "[" else words.pop(0))
    words.pop(0)
    digits = sorted(map(int, values))
    middle = digits[(len(digits) - 1) // 2]
    found = {"[MIN": digits[0], "[MAX": digits[-1], "[MED": middle, "[SM": sum(digits) % 10}
    return found[operator]


def test_lists_have_their_values():
    batch = plan.SEQUENCES["listops"](0).batch(3, torch.Generator().manual_seed(0))
    names = [*map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]", ""]
    for index, target, weight in zip(batch.tokens.argmax(-1), batch.target, batch.weight):
        words = [names[i] for i in index.tolist()]
        opened = []
        for place, word in enumerate(words):
            if word.startswith("["): opened.append(place)
            assert (weight[place] > 0) == (word == "]")
            if word == "]":
                part = words[opened.pop():place + 1]
                assert value_of(part) == target[place].argmax()
        assert not opened and "".join(words).rstrip() == "".join(words)


def test_the_operator_of_a_list():
    from study.listops import _operators
    task = plan.SEQUENCES["listops"](0)
    tests = task.tests()
    losses = {name: x.mean().item() for name, x in task.guesses(tests).items()}
    assert losses["frequency of the operator"] < losses["frequency"] - 0.1
    names = [*range(10), *OPERATORS, "]"]
    words = "[MAX 3 [SM 4 4 ] ]".replace("[", "").split()
    letters = torch.tensor([[names.index(int(x) if x.isdigit() else x) for x in words]])
    one = torch.nn.functional.one_hot(letters, len(names) + 1)
    assert _operators(Batch(one, one, one)).tolist() == [[0, 0, 0, 0, 0, 3, 1]]


# arms

def test_moores_curve_is_closed():
    for side in (4, 16, 18):
        order = moore(side)
        path = torch.stack(torch.unravel_index(order, (side, side)), 1)
        assert torch.equal(order.sort().values, torch.arange(side ** 2))
        assert ((path - path.roll(1, 0)).abs().sum(1) == 1).all()
    task = plan.TASKS["photos"](0)
    for layer in (0, 1):
        both = {mechanism.partition(Arm(name), task, layer) for name in ("hilbert", "moore")}
        assert len(both) == 2


@pytest.mark.parametrize("name", TASKS)
def test_six_names_are_six_functions(name):
    task = plan.TASKS[name](0)
    for layer in (0, 1):
        assert len({mechanism.partition(Arm(arm), task, layer) for arm in ARMS}) == len(ARMS)


def test_four_walks_are_turned_and_transposed():
    task = plan.TASKS["digits"](0)
    curve, across, turned, both = (
        layer_order(Arm("hilbert", "four"), task, layer) for layer in range(4))
    assert torch.equal(turned, 485 - curve) and torch.equal(both, 485 - across)
    assert torch.equal(across.sort().values, torch.arange(486))
    shifted = layer_order(Arm("hilbert", "shifted"), task, 1)
    assert torch.equal(shifted, curve.roll(-13))
    assert torch.equal(layer_order(Arm("hilbert", "four"), task, 4), curve)


def test_odd_layers_are_transposed_and_shifted():
    task = plan.TASKS["photos"](0)
    even, odd = (layer_order(Arm("row_major"), task, layer) for layer in (0, 1))
    assert even.tolist() == list(range(324))
    columns = torch.arange(324).view(18, 18).t().flatten()
    assert torch.equal(odd, columns.roll(-8))
    still = Arm("hilbert", "one")
    assert torch.equal(layer_order(still, task, 0), layer_order(still, task, 1))


@pytest.mark.parametrize("arm", ARMS)
def test_a_layer_mixes_its_segments_and_nothing_else(arm):
    task = plan.TASKS["photos"](0)
    torch.manual_seed(0)
    network = Network(task, Arm(arm), Size(width=16, layers=1))
    tokens = torch.randn(1, task.tokens, task.inputs, requires_grad=True)
    network(tokens)[0, 40].sum().backward()
    felt = tokens.grad[0].abs().sum(1) > 0
    assert torch.equal(felt, mechanism.together(Arm(arm), task, 0)[40])


@pytest.mark.parametrize("layer", (0, 1))
@pytest.mark.parametrize("name", GRID_ARMS)
def test_patterns_of_the_grid(name, layer):
    task, size = plan.TASKS["digits"](0), Size(width=16, heads=2)
    torch.manual_seed(0)
    attention = OtherAttention(task, name, size, layer)
    rope = rotary_embedding(task.grid, 8)
    x = torch.randn(1, task.tokens, 16, requires_grad=True)
    attention(x, rope)[0, 200].sum().backward()
    shifted = WindowPattern(task.grid, (3, 3, 3), (layer,) * 3)
    near = NeighborhoodPattern(task.grid, (3, 3, 3))
    mask = (near if name == "neighbourhood" else shifted).mask()
    assert torch.equal(x.grad[0].abs().sum(1) > 0, mask.flatten(0, -3)[0, 200])


@pytest.mark.parametrize("name", DILATED_ARMS)
def test_dilated_arms_have_as_many_pairs_along_hilbert(name):
    task, arm = plan.TASKS["photos"](0), Arm(name)
    seen = attending.seen_by(arm, task, 0, 2)
    whole = seen[:, :task.tokens // 128 * 128].sum(-1)  # segments that are whole
    assert (whole == task.segment_size).all()
    for layer in (0, 1):
        assert torch.equal(layer_order(arm, task, layer), layer_order(Arm("hilbert"), task, layer))


@pytest.mark.parametrize("name", [*GRID_ARMS, *DILATED_ARMS])
def test_patterns_of_the_grid_have_the_same_weights(name):
    task = plan.TASKS["photos"](0)
    counts = {
        sum(p.numel() for p in Network(task, Arm(arm), Size()).parameters())
        for arm in ("hilbert", name)
    }
    assert len(counts) == 1


def test_positions_are_those_of_the_token():
    task, size = plan.TASKS["photos"](0), Size()
    at = {name: rotary(task, Arm("hilbert", positions=name), size) for name in POSITIONS}
    assert at["none"] is None and torch.equal(at["grid"][0], rotary(task, Arm("tile"), size)[0])
    along = layer_order(Arm("hilbert"), task, 0)
    for curve, rows in zip(at["curve"], at["rows"]): assert torch.equal(curve[along], rows)
    assert not torch.equal(at["rows"][0], at["grid"][0])


def test_positions_reach_the_attention():
    task = plan.TASKS["photos"](0)
    x = task.batch(1, torch.Generator().manual_seed(0)).tokens
    found = []
    for name in POSITIONS:
        torch.manual_seed(0)
        found.append(Network(task, Arm("hilbert", positions=name), Size())(x))
    for i, one in enumerate(found):
        for other in found[:i]: assert not torch.allclose(one, other)


def test_titles_of_arms():
    for arm in (Arm("hilbert"), Arm("hilbert", "four shifted"), Arm("tile", positions="none")):
        title = arm.name if arm.scheme == "alternating" else f"{arm.name} {arm.scheme}"
        if arm.positions: title += f" positions {arm.positions}"
        assert Arm.read(title) == arm


@pytest.mark.parametrize("name", ["dense", "hilbert", "row_major", *GRID_ARMS, *DILATED_ARMS])
def test_what_a_network_looks_at(name):
    task, arm, size = plan.TASKS["photos"](0), Arm(name), Size(width=16, heads=2, layers=2)
    network = Network(task, arm, size)
    x = torch.randn(2, task.tokens, 16)
    for layer, (block, rope) in enumerate(zip(network.blocks, network.ropes)):
        seen = attending.seen_by(arm, task, layer, size.heads)
        weights, v = attending.weights_and_values(block, x, rope, seen, size.heads)
        out = block.attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        expected = block.attention(block.attention_norm(x), rope=rope)
        torch.testing.assert_close(out, expected)
    near, far = (
        attending.attention_distances(Network(task, one, size), task, one, 2)
        for one in (Arm("tile"), Arm("dense")))
    assert max(map(max, near)) < 4 < min(map(min, far))


def test_weights_depend_on_the_seed_alone():
    from study.training import Schedule, new_network
    task = plan.TASKS["photos"](0)
    schedule = Schedule(1, 1, 0.001, size=Size(width=16))
    one, other = (
        torch.cat([p.flatten() for p in new_network(task, Arm(arm), schedule, 3)[0].parameters()])
        for arm in ("dense", "hilbert")
    )
    assert torch.equal(one, other)


# mechanism

@pytest.mark.parametrize("arm", ["row_major", "tile", "morton", "hilbert"])
@pytest.mark.parametrize("name", ["photos", "digits"])
def test_transposed_walks_are_those_of_the_package(name, arm):
    task = plan.TASKS[name](0)
    curve = f"tile:{task.tile}" if arm == "tile" else arm
    assert walk(arm, task, 1).equal(curve_order(task.grid, f"{curve}-trans"))


@pytest.mark.parametrize("arm", ["row_major", "hilbert"])
def test_near_pairs_by_hand(arm):
    task = plan.TASKS["digits"](0)
    cell = torch.stack(torch.unravel_index(torch.arange(task.tokens), task.grid), 1)
    apart = (cell[:, None] - cell).abs().amax(2)
    near = (apart <= 2) & (apart > 0)
    met = mechanism.together(Arm(arm), task, 0) | mechanism.together(Arm(arm), task, 1)
    share = met[near].double().mean().item()
    assert mechanism.around_share(Arm(arm), task) == pytest.approx(share)


def test_receptive_field_of_rows_and_columns():
    task = plan.TASKS["photos"](0)
    dense, rows = (mechanism.receptive_field(Arm(a), task, 3) for a in ("dense", "row_major"))
    assert dense == [1, 1, 1] and rows[0] == pytest.approx(
        mechanism.pairs_per_layer(Arm("row_major"), task) / 324 ** 2)
    assert mechanism.layers_to_all(Arm("row_major"), task) == 3
    assert mechanism.layers_to_all(Arm("tile"), task, 3) is None


@pytest.mark.parametrize("arm", ARMS)
def test_receptive_field_by_matrices(arm):
    task = plan.TASKS["digits"](0)
    first, second = (mechanism.together(Arm(arm), task, layer).float() for layer in (0, 1))
    share = (second @ first > 0).double().mean().item()
    assert mechanism.receptive_field(Arm(arm), task, 2)[1] == pytest.approx(share)


def test_neighbours_together_in_one_layer():
    task = plan.TASKS["photos"](0)
    share = mechanism.neighbours_together(Arm("row_major"), task, 1, layers=1)
    segment = torch.arange(324).view(18, 18) // 16
    assert share[1, 1] == 1 and share[1, 2] == share[1, 0]
    assert share[1, 2] == (segment[:, 1:] == segment[:, :-1]).double().mean()
    assert share[2, 1] == (segment[1:] == segment[:-1]).double().mean()


# text

def test_texts_are_held_out_by_module():
    tested, tuned = Text(0), Text(0, "tune")
    assert len(tested.held_out) == Text.groups
    parts = [{x.data_ptr() for x in some}
             for some in (tested.held_out, tuned.held_out, tested.training)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_letters_are_hidden_and_the_rest_is_given():
    batch = Text(0).batch(3, torch.Generator().manual_seed(0))
    letters, flag = batch.tokens[..., :-1], batch.tokens[..., -1]
    assert torch.equal(flag, batch.weight) and batch.weight.sum(1).eq(round(0.2 * 324)).all()
    assert torch.equal(letters, batch.target * (1 - flag)[..., None])
    assert letters.shape[-1] == len(LETTERS) and batch.target.sum(-1).eq(1).all()


def test_guesses_at_letters():
    task = Text(0)
    tests = task.tests()
    losses = {name: x.mean().item() for name, x in task.guesses(tests).items()}
    assert losses["frequency after the one before"] < losses["frequency"] < np.log(len(LETTERS))
    certain = 50 * tests.batch.target
    assert task.loss(certain, tests.batch).max() < 1e-6


# runs on disk

def test_every_cell_of_the_quick_study(toys):
    cells = plan.QUICK.tuning() + plan.QUICK.primary()
    assert not runner.missing(cells, toys) and not list(toys.rglob("*.part"))
    for run in store.load_stage("primary", toys):
        assert len(run["curve"]) <= 40 and run["groups"] and len(run["guesses"]) == 2
        assert run["environment"]["commit"] and run["environment"]["torch"]


def test_it_goes_on_where_it_stopped(toys, monkeypatch):
    gone = store.path_of(plan.QUICK.primary()[3], toys)
    kept = gone.read_text()
    gone.unlink()
    assert runner.run_study(plan.QUICK, toys) == 1
    old, new = json.loads(kept), store.load(gone)
    assert {k: v for k, v in old.items() if k not in ("seconds", "environment")} == {
        k: v for k, v in new.items() if k not in ("seconds", "environment")}


def test_trained_again_every_digit_is_the_same(toys, capsys, monkeypatch):
    assert runner.reproduce(plan.QUICK, toys, 2, 0, print) == []
    assert capsys.readouterr().out.count("equal") == 2
    first = plan.QUICK.primary()[0]
    path = store.path_of(first, toys)
    kept = path.read_text()
    run = store.load(path)
    run["curve"][-1][2] += 1e-5
    store.save(run, path)
    monkeypatch.setattr(runner.random.Random, "sample", lambda self, cells, n: [first])
    assert runner.reproduce(plan.QUICK, toys, 1, 0, print) == [first.name]
    path.write_text(kept)


def test_the_lowest_rate_is_chosen_and_waited_for(toys, tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0}
    runs = [dict(task="photos", arm="tile", rate=r, loss=x) for r, x in losses.items()]
    assert store.chosen_rates(runs) == {("photos", "tile"): 2}
    with pytest.raises(RuntimeError, match="not tuned yet"):
        runner.rate_of(plan.QUICK.primary()[0], plan.QUICK, tmp_path)


def test_seeds_are_outermost():
    cells = plan.FULL.primary()
    assert len(cells) == 180 and [c.seed for c in cells] == sorted(c.seed for c in cells)
    assert len(plan.FULL.tuning()) == 78


def test_exploratory_cells_come_last_and_name_their_scheme(toys):
    cells = plan.FULL.exploratory()
    assert plan.arm_of(cells[0]) == Arm("row_major", "one") and len(cells) == STAGES["explore"]
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert plan.arm_of(plan.FULL.primary()[5]) == Arm("hilbert", "alternating")
    cell = plan.Cell("explore", "photos", "hilbert four shifted", 0)
    rate = runner.rate_of(cell, plan.QUICK, toys)
    assert rate in plan.QUICK.rates["photos"]
    assert runner.rate_of(cell._replace(arm="moore"), plan.QUICK, toys) == rate
    schedule = plan.QUICK.schedule(cell, 0.001)
    run = runner.run_cell(cell, schedule)
    other = runner.run_cell(cell._replace(arm="hilbert one"), schedule)
    assert run["arm"] == "hilbert four shifted" and run["loss"] != other["loss"]
    assert len(run["distances"]) == schedule.size.layers
    assert "distances" not in store.load(store.path_of(plan.QUICK.primary()[0], toys))


@pytest.mark.parametrize("name", plan.EXPLORED["tasks"])
@pytest.mark.parametrize("scale", plan.SCALES)
def test_what_is_larger(scale, name):
    cell = plan.Cell("explore", name, "hilbert", 0, variant=scale)
    was = cell._replace(variant="")
    task, size = plan.task_of(cell), plan.FULL.schedule(cell, 0.0).size
    given = task.batch(1, torch.Generator().manual_seed(0))
    assert given.tokens.shape == (1, task.tokens, task.inputs)
    assert Network(task, plan.arm_of(cell), size)(given.tokens).shape == given.target.shape
    assert (task.grid, task.segment_size, size) != (
        plan.task_of(was).grid, plan.task_of(was).segment_size, plan.FULL.schedule(was, 0.0).size)


def test_finer_patches_show_the_same_pictures():
    cell = plan.Cell("explore", "pathfinder", "hilbert", 0)
    coarse, fine = plan.task_of(cell), plan.task_of(cell._replace(variant="tokens 1296"))
    ink = [task.batch(2, torch.Generator().manual_seed(0)).tokens.sum((1, 2))
           for task in (coarse, fine)]
    assert torch.equal(*ink)
    tests = fine.tests()
    losses = {name: x.mean().item() for name, x in fine.guesses(tests).items()}
    assert losses["frequency at the distance"] < losses["frequency"]


def test_as_many_steps_as_fit_into_the_same_seconds(tmp_path):
    cell = plan.Cell("explore", "digits", "dense", 0, variant=plan.SAME_SECONDS)
    schedule = plan.FULL.schedule(cell, 0.001)
    with pytest.raises(RuntimeError, match="needs times of a step"):
        runner.in_same_seconds(schedule, cell, tmp_path)
    times = {arm: {"median": x} for arm, x in dict(dense=0.3, hilbert=0.1).items()}
    store.save_times({"digits": times}, tmp_path)
    assert runner.in_same_seconds(schedule, cell, tmp_path).steps == round(schedule.steps / 3)
    assert store.load(store.times_file(tmp_path))["environment"]["commit"]


def test_times_of_a_step_are_of_every_arm():
    task = plan.TASKS["photos"](0)
    found = timing.times_per_step(task, plan.QUICK.schedules["photos"], rounds=2, warmup=1)
    assert set(found) == {*ARMS, *GRID_ARMS}
    assert all(0 < x["p20"] <= x["median"] <= x["p80"] for x in found.values())


def test_only_some(tmp_path):
    only = runner.wanted(plan.FULL.primary(), "photos/hilbert")
    assert {(c.task, c.arm) for c in only} == {("photos", "hilbert")} and len(only) == 10
    with pytest.raises(ValueError, match="only='photo'"):
        runner.wanted(plan.FULL.primary(), "photo")


def test_the_command(tmp_path, monkeypatch, capsys):
    def call(*options):
        monkeypatch.setattr(sys, "argv", ["run_study.py", *options])
        return run_study.main()

    with pytest.raises(SystemExit): call("--quick")
    assert "toys are no results" in capsys.readouterr().err
    assert call("--status", "--out", str(tmp_path)) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [f"{stage}: 0 of {n} stored" for stage, n in STAGES.items()]
    assert call("--quick", "--out", str(tmp_path), "--only", "digits/hilbert") == 0
    assert "3 of 3: primary/digits/hilbert-seed-0" in capsys.readouterr().out


# statistics

def test_verdicts_of_known_effects():
    rows = analysis.as_rows(made_up(dict(random=0.3, row_major=-0.1, morton=0.012)))
    found = {c.b: c for c in analysis.family(rows) if c.task == "photos"}
    assert found["random"].verdict == "lower"
    assert found["row_major"].verdict == "higher"
    assert found["tile"].verdict == "equal within the margin"
    assert found["morton"].verdict == "lower, by less than the margin"
    assert found["random"].mean == pytest.approx(-0.3, abs=0.01)
    low, high = found["tile"].interval
    assert low < 0 < high


def test_hypotheses_hold_where_every_arm_agrees():
    rows = analysis.as_rows(made_up(dict(random=0.3, row_major=-0.1, tile=0.1, morton=0.1)))
    table = analysis.hypotheses(analysis.family(rows))
    assert list(table["holds in"]) == ["3 of 3", "0 of 3", "3 of 3", "3 of 3"]
    assert set(table.photos) == {"lower", "higher", "equal within the margin"}
    rows = analysis.as_rows(made_up(dict(tile=0.1)))
    table = analysis.hypotheses(analysis.family(rows))
    assert table["holds in"].iloc[2] == "0 of 3"
    assert table.digits.iloc[2] == "lower; equal within the margin"


def test_noise_leaves_it_undecided():
    rows = analysis.as_rows(made_up({}, noise=0.5))
    assert {c.verdict for c in analysis.family(rows)} == {"undecided"}


def test_one_run_less_changes_n_and_silences_the_verdict():
    runs = made_up(dict(tile=0.3))
    gone = [r for r in runs if (r["task"], r["arm"], r["seed"]) != ("photos", "tile", 7)]
    now = {(c.task, c.b): c for c in analysis.family(analysis.as_rows(gone))}
    assert now["photos", "tile"].seeds == 9
    assert now["photos", "tile"].verdict == "9 of 10 seeds done"
    assert "no verdict" in analysis.sentence(now["photos", "tile"])
    assert now["digits", "tile"].verdict == "waits for the rest of the family"
    assert now["digits", "tile"].holm_differ < 0.05


def test_a_training_that_ended_in_nan_is_stored_and_tells_nothing():
    runs = made_up(dict(tile=0.3))
    broken = next(r for r in runs if (r["task"], r["arm"], r["seed"]) == ("photos", "tile", 7))
    broken["groups"] = dict.fromkeys(broken["groups"], np.nan)
    found = {(c.task, c.b): c for c in analysis.family(analysis.as_rows(runs))}
    assert (found["photos", "tile"].stored, found["photos", "tile"].seeds) == (10, 9)
    assert found["photos", "tile"].verdict == found["digits", "tile"].verdict == "lower"
    rates = [dict(task="photos", arm="tile", rate=r, loss=x) for r, x in ((1, np.nan), (2, 3.0))]
    assert store.chosen_rates(rates) == {("photos", "tile"): 2}


def test_which_error_still_allows_a_tie():
    "Just below it an arm that does not differ counts as equal, just above it does not."
    for factor, equal in ((0.99, True), (1.01, False)):
        error = factor * analysis.error_for_a_tie(9)
        t = analysis.stats.t(9)
        assert (t.sf(analysis.MARGIN / error) < analysis.LEVEL) == equal
    assert analysis.error_for_a_tie(9) == pytest.approx(0.0108, abs=1e-4)
    assert analysis.error_for_a_tie(9, 15) == pytest.approx(0.0056, abs=1e-4)


def test_without_runs_and_with_few():
    assert {c.verdict for c in analysis.family(analysis.as_rows([]))} == {"0 of 10 seeds done"}
    two = analysis.family(analysis.as_rows(made_up({}, seeds=2)))
    assert all(np.isnan(c.mean) for c in two) and two[0].verdict == "2 of 10 seeds done"


def test_pictures_widen_the_interval():
    "An effect that only some pictures have is no effect on pictures."
    rows = analysis.as_rows(made_up({}))
    mine = rows.arm.eq("hilbert") & rows.picture.eq("group 0")
    rows.loc[mine, "loss"] *= exp(0.8)
    found = analysis.contrast(rows, "photos", "hilbert", "tile")
    assert found.mean == pytest.approx(0.1, abs=0.01) and found.p_differ > 0.15


def test_holm_is_over_the_family():
    rows = analysis.as_rows(made_up(dict(random=0.3)))
    family = analysis.family(rows)
    p = sorted(c.p_differ for c in family)
    corrected = sorted(c.holm_differ for c in family)
    assert len(family) == 15 and corrected[0] == pytest.approx(15 * p[0])


def test_an_arm_that_does_not_beat_the_guess_is_void():
    runs = made_up(dict(random=log(40.0)))
    assert analysis.void_arms(runs) == {(task, "random") for task in TASKS}
    assert analysis.arm_table(runs, "photos").loc["random", "beats it"] == "no: void"
    found = analysis.family(analysis.as_rows(runs), analysis.void_arms(runs))
    said = [analysis.sentence(c) for c in found if c.b == "random"]
    assert all("void**: `random` ended no better" in words for words in said)


def test_steps_to_a_loss():
    curve = [[10, 0, 4.0], [20, 0, 2.0], [30, 0, 1.0]]
    assert analysis.steps_to(curve, 3.0) == 15 and analysis.steps_to(curve, 4.0) == 10
    assert np.isnan(analysis.steps_to(curve, 0.5))


@pytest.mark.parametrize("there, middle", [([1, 2, 3], 3), ([1, 2], np.nan), ([], np.nan)])
def test_a_median_is_over_the_seeds_that_never_get_there_too(there, middle):
    pairs = np.array([(n, n) for n in there] + [(np.nan, np.nan)] * (5 - len(there)))
    count, found = analysis._reached(pairs.reshape(5, 2))
    assert count == len(there) and np.array_equal(found, [middle, middle], equal_nan=True)



def restricted_maximum(ratios) -> float:
    "The standard error of the mean where the likelihood is highest, from many starts, by numpy."
    d, n = ratios.d.to_numpy(), len(ratios)
    shared = [np.equal.outer(x, x).astype(float)
              for x in (ratios.seed.to_numpy(), ratios.picture.to_numpy())]

    def fit(shares):
        "Twice the negative log-likelihood, and the error, of two variances over the rest."
        among = np.eye(n) + sum(np.exp(share) * s for share, s in zip(shares, shared))
        inverse = np.linalg.inv(among)
        weight = inverse.sum()
        rest = d - (inverse @ d).sum() / weight
        variance = rest @ inverse @ rest / (n - 1)
        penalty = np.linalg.slogdet(among)[1] + np.log(weight)
        return (n - 1) * np.log(variance) + penalty, np.sqrt(variance / weight)

    starts = [(a, b) for a in (-6, 0, 3) for b in (-6, 0, 3)]
    found = [minimize(lambda x: fit(x)[0], start, method="Nelder-Mead") for start in starts]
    return fit(min(found, key=lambda f: f.fun).x)[1]


@pytest.mark.parametrize("arm", ["random", "tile", "dense"])
def test_the_mixed_model_is_at_its_maximum(arm):
    rows = analysis.as_rows(store.load_stage("primary"))
    ratios = analysis.log_ratios(rows, "photos", "hilbert", arm)
    error = analysis.mixed_mean(ratios)[1]
    assert error == pytest.approx(restricted_maximum(ratios), rel=2e-3)

def test_times_as_fast_at_a_loss():
    "Losses fall in steps of 100 from 1 to 0; b is half as fast a learner, and c never gets there."
    def run(arm, losses):
        curve = [[100 * (i + 1), 0.0, x] for i, x in enumerate(losses)]
        return dict(task="photos", arm=arm, seed=0, curve=curve)

    runs = [run("a", [0.6, 0.2, 0.1]), run("b", [0.8, 0.5, 0.2]), run("c", [0.9, 0.9, 0.9])]
    times = {arm: {"median": x} for arm, x in dict(a=0.02, b=0.01, c=0.01).items()}
    assert analysis.times_as_fast(runs, times, "photos", "a", "b") == [300 * 0.01 / (200 * 0.02)]
    assert analysis.times_as_fast(runs, times, "photos", "c", "b") == [0.0]
    assert analysis.times_as_fast(runs[:1], times, "photos", "c", "b") == []


def test_geometry_is_tried_on_a_task_that_it_has_not_seen():
    near = {arm: prediction.features(arm, "photos")[0] for arm in prediction.SPARSE}
    seen = prediction.observed(analysis.as_rows(made_up({a: -x for a, x in near.items()})))
    assert len(seen) == len(TASKS) * len(prediction.SPARSE)
    shares = prediction.explained(prediction.held_out(seen))
    assert set(shares.index) == set(TASKS) and shares["pathfinder"] > 0.9
    planes = prediction.held_out(seen)
    elsewhere = prediction.by_name(planes)
    row = elsewhere[(elsewhere.task == "photos") & (elsewhere.arm == "tile")].iloc[0]
    others = planes[(planes.task != "photos") & (planes.arm == "tile")]
    assert row.predicted == pytest.approx(others.relative.mean()) and len(others) == 2
    assert prediction.observed(analysis.as_rows([])).empty


# the page

def cells_of_the_page() -> list:
    "Code cells of the results page."
    notebook = nbformat.read(ROOT / "nbs" / "26_study_results.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def page(folder: Path, monkeypatch, cells: int | None = None) -> dict:
    "What the first cells of code of the results page define, with the runs of a folder."
    monkeypatch.setattr(results, "results_folder", lambda: folder)
    names: dict = {}
    for cell in cells_of_the_page()[:cells]: exec(cell.source, names)
    pyplot.close("all")
    return names


def test_the_page_without_runs(tmp_path, monkeypatch):
    names = page(tmp_path, monkeypatch)
    assert "under way" in names["state"]().data and "0 of 180" in names["state"]().data
    said = analysis.in_one_sentence(names["contrasts"], "photos")
    assert said == "**photos**: too early, 0 of 10 seeds done."


def test_the_page_with_all_runs_and_with_one_less(tmp_path, monkeypatch):
    for run in made_up(dict(random=0.3, row_major=-0.1)):
        cell = plan.Cell("primary", run["task"], run["arm"], run["seed"])
        store.save(run, store.path_of(cell, tmp_path / "study"))
    names = page(tmp_path, monkeypatch)
    assert names["state"]().data.startswith("The study is complete.")
    said = analysis.in_one_sentence(names["contrasts"], "digits")
    assert "lower: `random`" in said and "higher: `row_major`" in said
    store.path_of(plan.Cell("primary", "digits", "tile", 3), tmp_path / "study").unlink()
    names = page(tmp_path, monkeypatch, 7)
    assert "under way" in names["state"]().data and "179 of 180" in names["state"]().data
    said = analysis.in_one_sentence(names["contrasts"], "digits")
    assert said == "**digits**: too early, 9 of 10 seeds done."
    said = analysis.in_one_sentence(names["contrasts"], "photos")
    assert said == "**photos**: 10 seeds done, verdicts wait for the other tasks."
    assert "not shown" in names["abstract"](names["contrasts"]).data


def test_the_abstract_is_that_of_the_stored_verdicts():
    runs = store.load_stage("primary")
    found = analysis.family(analysis.as_rows(runs), analysis.void_arms(runs))
    names: dict = dict(Markdown=lambda text: text, contrasts=found)
    exec(next(c.source for c in cells_of_the_page() if "ABSTRACT" in c.source), names)
    assert names["abstract"](found).startswith("**In short.**")
    assert "not shown" in names["abstract"](found[1:])


# what is stored

def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_protocol_is_older_than_every_run():
    runs = [run for stage in STAGES for run in store.load_stage(stage)]
    for commit in {run["environment"]["commit"] for run in runs}:
        assert "changes" not in commit
        git("merge-base", "--is-ancestor", commit, "HEAD")
        assert git("ls-tree", "--name-only", commit, "nbs/25_study_protocol.ipynb")


def test_stored_runs_are_those_of_the_plan():
    for stage, cells in run_study.stages(plan.FULL):
        names = {cell.name for cell in cells}
        paths = (store.study_folder() / stage).glob("*/*.json")
        assert {p.relative_to(store.study_folder()).as_posix()[:-5] for p in paths} <= names


# clouds of points

def some_points(size: int = 3) -> torch.Tensor:
    return torch.randn(size, 324, 3, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("curve", ["hilbert", "morton"])
def test_each_cloud_has_the_order_of_its_own_points(curve):
    points, arm = some_points(), Arm(curve, "four shifted")
    orders = list(cloud_orders(arm, Scene(0), points, 4))
    for i, cloud in enumerate(points):
        assert torch.equal(orders[0][i], point_order(cloud, curve))
        assert torch.equal(orders[1][i], point_order(cloud, f"{curve}-trans").roll(-8))
        assert torch.equal(orders[2][i], point_order(-cloud, curve))
        assert torch.equal(orders[3][i], point_order(-cloud, f"{curve}-trans").roll(-8))


def test_rows_of_voxels():
    voxels = torch.cartesian_prod(*[torch.arange(8.)] * 3)[None] # in the order of rows
    mixed = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    points = 3 * voxels[:, mixed] - 5
    assert torch.equal(mixed[cloud_order("row_major", points)[0]], torch.arange(512))
    columns = list(cloud_orders(Arm("row_major", "transposed"), Scene(0), points, 2))[1]
    assert torch.equal(voxels[0, mixed[columns[0]]].flip(1), voxels[0])


def test_random_clouds_change_with_layer_and_example():
    layers = torch.stack([*cloud_orders(Arm("random"), Scene(0), some_points(), 4)])
    assert torch.equal(layers.sort(-1).values, torch.arange(324).expand(4, 3, 324))
    assert len(layers.flatten(0, 1).unique(dim=0)) == 12
    still = torch.stack([*cloud_orders(Arm("random", "one"), Scene(0), some_points(), 4)])
    assert len(still.flatten(0, 1).unique(dim=0)) == 3


@pytest.mark.parametrize("title", ["dense", "hilbert", "morton shifted"])
def test_points_may_come_in_any_order(title):
    "What is predicted of a point does not depend on its place in memory."
    task = Scene(0)
    network = CloudNetwork(task, Arm.read(title), Size())
    tokens = task.batch(2, torch.Generator().manual_seed(1)).tokens
    mixed = torch.randperm(task.tokens, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(network(tokens[:, mixed]), network(tokens)[:, mixed])


@pytest.mark.parametrize("name", ["dense", "row_major", "random", "hilbert", "morton"])
def test_points_see_their_segment_in_a_cloud(name):
    "One layer: a change of one point reaches its segment alone."
    task, arm = Scene(0), Arm(name, "one")
    network = CloudNetwork(task, arm, Size(layers=1))
    tokens = task.batch(2, torch.Generator().manual_seed(3)).tokens
    changed = tokens.clone()
    changed[1, 100, -2:] += 1.0
    moved = (network(tokens) - network(changed)).abs().amax(-1) > 0
    order = cloud_order(name, tokens[..., :3])[1]
    place = int((order == 100).nonzero())
    segment = order[place // 16 * 16:][:16] if name != "dense" else order
    assert not moved[0].any()
    assert moved[1].nonzero().flatten().tolist() == sorted(segment.tolist())


# exploratory tables

def tried(**changes) -> dict:
    "An exploratory run of seed 0; losses grow with the length of the title."
    run = dict(stage="explore", task="photos", arm="hilbert", seed=0, guesses={"a": 9.0}) | changes
    run.setdefault("loss", float(len(run["arm"] + run.get("variant", ""))))
    return run


def all_tried(seeds: int = 2) -> list[dict]:
    "Every exploratory cell, and the primary ones, of some seeds."
    cells = [cell for seed in range(seeds) for cell in plan.explored(seed)]
    cells += [cell for cell in plan.FULL.primary() if cell.seed < seeds]
    return [
        tried(stage=c.stage, task=c.task, arm=c.arm, seed=c.seed, variant=c.variant,
              distances=[[i, 1.0] for i in (1.0, 2.0, 3.0, 4.0)])
        for c in cells
    ]


def test_tables_of_exploratory_runs():
    frame = exploring.as_frame(all_tried())
    table, seeds, guesses = exploring.diversity(frame)
    assert seeds == 2
    assert table.shape == guesses.shape == (2 * 6, 3)
    assert table.loc[("photos", "four"), "morton"] == len("morton four")
    assert exploring.other_patterns(frame).losses.shape == (2, 11)
    placed = exploring.positions(frame).losses
    assert placed.loc[("photos", "hilbert"), "grid"] == len("hilbert")
    assert placed.loc[("pathfinder", "row_major"), "none"] == len("row_major positions none")
    named = dict(text=plan.SEQUENCE_ARMS, faces=plan.PICTURE_ARMS, scene=plan.CLOUD_ARMS)
    for name, arms in named.items():
        table, seeds, _ = found = exploring.other_task(frame, name)
        assert not found.void["(no learning)"].any()
        assert seeds == 2 and set(table) == {"(no learning)", *arms}
        assert table.loc[name, "(no learning)"] == 9
    larger = exploring.scales(frame).losses
    assert len(larger) == 10
    assert larger.loc[("pathfinder", "(primary)"), "row_major"] == len("row_major")
    assert set(exploring.same_seconds(frame).losses) == {
        "dense", "hilbert", f"dense, {plan.SAME_SECONDS}"}
    far = exploring.looks(frame)
    assert far.losses.shape == (12, 4)
    assert (far.losses[3] == 3).all()
    assert not far.void.any(axis=None) # distances, which no guess has
    assert exploring.trained_again(frame) == (2 * 2 * 6, 2 * 2 * 6)


def test_what_changing_the_order_helps():
    frame = exploring.as_frame(all_tried())
    table = exploring.diversity(frame).losses
    over = exploring.over_one(table)
    assert len(over) == 2 * 5 and "one" not in over.index.get_level_values("scheme")
    titles = len("hilbert four") / len("hilbert one")
    assert over.loc[("photos", "four"), "hilbert"] == pytest.approx(100 * (titles - 1))
    rows = exploring.hilbert_over_rows(table)
    assert rows.shape == (6, 2)
    titles = len("hilbert shifted") / len("row_major shifted")
    assert rows.loc["shifted", "pathfinder"] == pytest.approx(100 * (titles - 1))


def test_a_sentence_where_no_layer_turns():
    runs = all_tried(1)
    for run in runs:
        lost = run["task"] == "pathfinder" and run["arm"] == "row_major shifted"
        run["guesses"] = {"a": 99.0, "b": run["loss"] if lost else 98.0}
    frame = exploring.as_frame(runs)
    assert exploring.not_learned(exploring.diversity(frame)) == [("pathfinder", "shifted")]
    said = exploring.where_no_layer_turns(frame)
    assert said == (
        "Without transposed layers both learn more than a guess knows in 3 of 4 settings "
        "(pathfinder, one; photos, one; photos, shifted): there Hilbert ended 12 to 15 % below "
        "rows, in 1 exploratory training of each kind.")
    for run in runs:
        if run["arm"] == "hilbert one" and run["task"] == "photos": run["loss"] = 90.0
    assert exploring.where_no_layer_turns(exploring.as_frame(runs)) == ""
    for run in runs: run["guesses"] = {"a": 0.0}
    assert exploring.where_no_layer_turns(exploring.as_frame(runs)) == ""
    nothing = exploring.as_frame([tried(stage="primary")])
    assert exploring.where_no_layer_turns(nothing) == ""


def test_figures_in_words():
    losses = dict(one=-32.4, shifted=-14, alternating=27.6, four=21, transposed=30.2)
    one = pd.Series(losses | {"four shifted": 25.0})
    rows = pd.DataFrame({0: pd.concat(dict(photos=one, pathfinder=one / 2))})
    assert exploring.in_words(rows).split("; ")[0] == (
        "photos: -32 % with one order throughout, -14 % where it is only shifted, +21 to +30 % "
        "where layers take turns with transposed walks")
    said = exploring.in_words(rows, [("photos", "one"), ("photos", "four")]).split("; ")
    assert said[0] == (
        "photos: -32 % with one order throughout (void), -14 % where it is only shifted, "
        "+21 to +30 % where layers take turns with transposed walks (void)")
    assert "void" not in said[1]
    rows[1] = rows[0] + 2
    assert exploring.in_words(rows).split("; ")[1] == (
        "pathfinder: -16 to -14 % with one order throughout, -7 to -5 % where it is only shifted, "
        "+10 to +17 % where layers take turns with transposed walks")


def test_every_seed_stands_for_itself():
    runs = all_tried()
    for run in runs:
        if (run["seed"], run["arm"]) == (1, "hilbert one"): run["loss"] *= 2
    rows = exploring.each_seed(exploring.as_frame(runs))
    assert list(rows) == [0, 1] and len(rows) == 2 * 6
    assert rows.loc[("photos", "one"), 1] == pytest.approx(2 * rows.loc[("photos", "one"), 0] + 100)
    first = [run for run in runs if (run["seed"], run["arm"]) != (1, "morton four")]
    assert list(exploring.each_seed(exploring.as_frame(first))) == [0]


def test_a_table_is_of_whole_seeds_alone():
    runs = all_tried()
    for run in runs:
        if run["seed"] == 1 and run["arm"] == "hilbert four": run["loss"] = np.nan
        elif run["seed"] == 1: run["loss"] += 100
    table, seeds, guesses = exploring.diversity(exploring.as_frame(runs))
    assert seeds == 1
    assert table.max().max() < 100
    assert (guesses == 9).all(axis=None)
    first = [run for run in runs if run["seed"] == 0 and run["arm"] != "morton one"]
    assert exploring.diversity(exploring.as_frame(first)).seeds == 0


def test_no_exploratory_runs_no_table():
    frame = exploring.as_frame([tried(stage="primary")])
    for make in (exploring.diversity, exploring.other_patterns, exploring.positions,
                 exploring.scales, exploring.same_seconds, exploring.looks):
        assert make(frame) is None
    assert exploring.other_task(frame, "text") is None
    assert exploring.trained_again(frame) == (0, 0)
    changed = [tried(stage="primary", loss=1.0), tried(loss=1.0000001)]
    assert exploring.trained_again(exploring.as_frame(changed)) == (0, 1)
