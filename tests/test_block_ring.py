"""Block-sparse attention over a sharded sequence: exact on 1 to 4 processes, and what travels is the plan."""
from pathlib import Path

import pytest
import torch
from ring_processes import run_processes

from hilbert_attn.block_ring import lists_order, plan_block_ring
from hilbert_attn.block_sparse import block_lists
from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import NeighborhoodPattern, WindowPattern

HERE = Path(__file__).parent


@pytest.mark.timeout(150)
@pytest.mark.parametrize("size", (1, 2, 3, 4))
def test_against_the_oracle_and_the_plan(size, tmp_path):
    commands = [[HERE / "block_ring_worker.py", rank, size, tmp_path / "store"] for rank in range(size)]
    done = run_processes(commands, tmp_path, 120)
    assert all(code == 0 for code, _ in done), "\n".join(output for _, output in done)


def test_windows_inside_a_shard_need_nothing():
    "Along the Hilbert curve, a window of 8 x 8 on a grid of 32 x 32 lies inside each of 4 or 16 shards."
    lists = block_lists(WindowPattern((32, 32), 8), order=curve_order((32, 32)), block_size=64)
    for ranks in (2, 4, 16): assert [plan_block_ring(lists, ranks).rows_received(rank) for rank in range(ranks)] == [0] * ranks


@pytest.mark.parametrize("curve", ("row_major", "hilbert"))
def test_what_is_read_is_what_the_mask_says(curve):
    "A rank reads every key of its queries, and nothing outside of the blocks that hold one."
    grid = (9, 13)
    lists = block_lists(NeighborhoodPattern(grid, 5), order=curve_order(grid, curve), block_size=8)
    plan, order, mask = plan_block_ring(lists, 3), lists_order(lists), NeighborhoodPattern(grid, 5).mask()[0]
    for rank in range(3):
        queries = order[plan.edges[rank]:plan.edges[rank + 1]]
        keys = mask[queries].any(0).nonzero()[:, 0]
        reads = order[torch.from_numpy(plan.needed[rank])]
        assert set(keys.tolist()) <= set(reads.tolist())
        local = plan.local_lists(rank)
        assert torch.equal(local.mask()[0], mask[queries][:, reads])
    assert "rank 2: 39 positions" in str(plan)
