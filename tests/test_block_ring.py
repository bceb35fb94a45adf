"""Block-sparse attention over a sharded sequence: exact, and what travels is the plan.

The processes run block_ring_worker.py."""
import pytest
import torch
from block_ring_worker import NAMES
from ring_cases import WORLDS
from ring_processes import run_ranks, said

from hilbert_attn.block_ring import _planned, lists_order, plan_block_ring
from hilbert_attn.blocks.lists import lists_from_block_mask
from hilbert_attn.blocks.planner import block_lists
from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import NeighborhoodPattern, TilesSharedPattern, WindowPattern

WORKER = "block_ring_worker.py"


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    "Results for each number of processes."
    def run(world):
        return run_ranks(WORKER, ["exact"], world, tmp_path_factory.mktemp("exact"), 120)
    return {world: run(world) for world in WORLDS}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return run_ranks(WORKER, ["faults"], 3, tmp_path_factory.mktemp("faults"), 120)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", WORLDS)
def test_against_the_oracle_and_the_plan(exact, world, name):
    said(exact[world], "exact", name, range(world))


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name, kind, text", [
    ("other lists", "ValueError", "blocks is "),
    ("other blocks", "ValueError", "lists is "),
    ("other bounds", "ValueError", "lists is "),
    ("other gradients", "ValueError", "keys_require_grad is "),
    ("a short shard", "ValueError", "this rank holds"),
    ("no memory", "MemoryError", "no memory left (on rank 1)"),
    ("no number", "ValueError", "scale='1'"),
    ("no backend", "ValueError", "backend='bogus'"),
    ("backwards in other orders", "ValueError", "call is ")])
def test_what_goes_wrong_on_one_rank_is_an_error_on_all(faults, name, kind, text):
    for entry in said(faults, "faults", name, range(3)):
        assert entry["type"] == kind and text in entry["message"] and entry["took"] < 10
    said(faults, "faults", name + ", then usable", range(3))


def test_windows_inside_a_shard_need_nothing():
    "Along the Hilbert curve, a window of 8 x 8 of 32 x 32 lies inside each of 4 or 16 shards."
    lists = block_lists(WindowPattern((32, 32), 8), order=curve_order((32, 32)), block_size=64)
    for ranks in (2, 4, 16):
        plan = plan_block_ring(lists, ranks)
        assert not any(plan.rows_received(rank) for rank in range(ranks))


@pytest.mark.parametrize("curve", ("row_major", "hilbert"))
def test_what_is_read_is_what_the_mask_says(curve):
    "A rank reads every key of its queries, and nothing outside of the blocks that hold one."
    grid, pattern = (9, 13), NeighborhoodPattern((9, 13), 5)
    lists = block_lists(pattern, order=curve_order(grid, curve), block_size=8)
    plan, order, mask = plan_block_ring(lists, 3), lists_order(lists), pattern.mask()[0]
    for rank in range(3):
        queries = order[plan.edges[rank]:plan.edges[rank + 1]]
        keys = mask[queries].any(0).nonzero()[:, 0]
        reads = order[torch.from_numpy(plan.needed[rank])]
        assert set(keys.tolist()) <= set(reads.tolist())
        local = plan.local_lists(rank)
        assert torch.equal(local.mask()[0], mask[queries][:, reads])
    assert "rank 2: 39 positions" in str(plan)


@pytest.mark.parametrize("tiling, shared, block", [
    ((64, 4), 6, 32), ((64, 2), 20, 16), ((61, 3), 5, 8)])
def test_shared_tokens_stay_causal(tiling, shared, block):
    lists = block_lists(TilesSharedPattern(*tiling, 0, shared), causal=True, block_size=block)
    plan = plan_block_ring(lists, 3)
    order = lists_order(lists)
    mask = lists.mask()[0]
    for rank in range(3):
        queries = order[plan.edges[rank]:plan.edges[rank + 1]]
        reads = order[torch.from_numpy(plan.needed[rank])]
        assert torch.equal(plan.local_lists(rank).mask()[0], mask[queries][:, reads])


def test_a_plan_follows_a_write_into_the_lists():
    lists = lists_from_block_mask(torch.eye(4, dtype=torch.bool), 64, 64, (16, 16))
    before = _planned(lists, 2, 0)
    assert _planned(lists, 2, 0) is before and before[0].rows_received(0) == 0
    for rows in (lists.rows, lists.columns): rows.index.copy_(rows.index.flip(0))
    assert _planned(lists, 2, 0)[0].rows_received(0) == 32
