"""A ring's plan, by arithmetic: what is attended is sent and computed, once, and nothing else."""
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hilbert_attn.patterns import SegmentPattern, attention_mask
from hilbert_attn.reference import assert_matches_oracle
from hilbert_attn.ring import ring_attention
from hilbert_attn.ring_blocks import ring_tasks, shared_work
from hilbert_attn.ring_plan import LAYOUTS, TURN_BYTES, list_ranks, plan_ring, shard_positions

MODES = ("residue", "keys", "longnet")


@st.composite
def plans(draw):
    "One branch; residues that the last segment lacks among them."
    world, kv = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2]))
    n, heads = draw(st.integers(max(5, world), 60)), kv * draw(st.sampled_from([1, 2]))
    w, mode = draw(st.integers(1, n + 3)), draw(st.sampled_from(MODES))
    r, offsets = draw(st.integers(1, min(w, 12))), None
    if mode != "residue" and draw(st.booleans()):
        residues = st.lists(st.integers(0, r - 1), min_size=heads, max_size=heads)
        offsets = tuple(draw(residues))
    return dict(seq_len=n, world_size=world, segment_lengths=(w,), dilation_rates=(r,),
                heads=heads, kv_heads=kv, head_dim=8, causal=draw(st.booleans()),
                layout=draw(st.sampled_from(LAYOUTS)), dilation_mode=mode, offsets=offsets)


def short_of_keys(n, world, **more):
    "The last segment has no row of residue 11."
    return dict(seq_len=n, world_size=world, segment_lengths=(24,), dilation_rates=(12,), heads=1,
                kv_heads=1, head_dim=8, dilation_mode="keys", offsets=(11,)) | more


def mask_of(plan):
    "Who attends whom: (heads, n, n)."
    mask = attention_mask(plan.branches[0].pattern, causal=plan.causal)[0]
    return mask.expand(plan.heads, plan.seq_len, plan.seq_len)


def held_by(plan):
    "The positions of each rank."
    return [shard_positions(plan.sizes, rank, plan.layout) for rank in range(plan.world_size)]


@given(plans())
@example(short_of_keys(60, 4))
def test_plan_sends_what_is_attended_and_nothing_else(options):
    plan = plan_ring(**options)
    n, kv, held = plan.seq_len, plan.kv_heads, held_by(plan)
    needed = mask_of(plan).unflatten(0, (kv, plan.heads // kv)).any(1)  # kv head, query, key
    for dst in range(plan.world_size):
        elements = 0
        for src in range(plan.world_size):
            sent = torch.zeros(kv, n, dtype=torch.bool)
            for parcel in plan.parcels(src, dst):
                rows = parcel.rows.positions()
                for head in parcel.kv_heads:
                    assert not sent[head, rows].any()  # no row twice
                    sent[head, rows] = True
            wanted = torch.zeros_like(sent)
            if src != dst and plan.kind(0) == "exchange":
                wanted[:, held[src]] = needed[:, held[dst]].any(1)[:, held[src]]
            assert not (wanted & ~sent).any()
            if plan.branches[0].pattern.mode != "residue": assert sent.equal(wanted)
            elements += 2 * 8 * int(sent.sum())
        if plan.kind(0) == "ring": elements = 2 * 8 * kv * (n - plan.sizes[dst])
        assert plan.traffic(dst).elements == elements


def shared_blocks(plan, rank):
    "Task, key/value heads of its source, positions of its queries and keys."
    work = shared_work(plan, rank)
    for task in work.tasks:
        mine = task.source < len(work.parts)
        kv_heads = range(plan.kv_heads)
        if not mine: kv_heads = work.arriving[task.source - len(work.parts)].kv_heads
        yield task, kv_heads, task.query_positions.positions(), task.key_positions.positions()


def ring_blocks(plan, rank):
    turn, = plan.turns(0)
    held = held_by(plan)
    for src in range(plan.world_size):
        for task in ring_tasks(plan, 0, rank, src, turn):
            queries, keys = held[rank][task.queries.positions()], held[src][task.keys.positions()]
            yield task, range(plan.kv_heads), queries, keys


def computed_pairs(plan, rank):
    "How often each pair of positions is computed for each query head, from the tasks of a rank."
    kv_of = plan.branches[0].kv_of
    counts = torch.zeros(plan.heads, plan.seq_len, plan.seq_len, dtype=torch.long)
    blocks = shared_blocks if plan.kind(0) == "exchange" else ring_blocks
    for task, kv_held, queries, keys in blocks(plan, rank):
        seen = torch.ones(len(queries), len(keys), dtype=torch.bool)
        if task.visible != "all": seen = keys <= queries[:, None]
        for pair in task.heads:
            heads, kv_heads = (torch.arange(64)[x].tolist() for x in pair)
            assert [kv_of[h] for h in heads] == [kv_held[kv] for kv in kv_heads]
            for h in heads: counts[h, queries[:, None], keys] += seen
    return counts


def queries_elsewhere(plan, rank):
    "Queries whose segments lie inside the shard are computed by other functions."
    inside = torch.zeros(plan.seq_len, dtype=torch.bool)
    if plan.kind(0) != "exchange": return inside
    for part in plan.parts(0, rank):
        if not part.shared: inside[part.start:part.stop] = True
    return inside


@settings(max_examples=200)
@given(plans())
@example(short_of_keys(60, 4))
@example(short_of_keys(59, 3))
@example(short_of_keys(36, 3, heads=2, offsets=(11, 0), causal=True))
def test_every_attended_pair_is_computed_once(options):
    plan = plan_ring(**options)
    if plan.kind(0) == "local": return
    for rank, positions in enumerate(held_by(plan)):
        held = torch.zeros(plan.seq_len, dtype=torch.bool)
        held[positions] = True
        expected = mask_of(plan) & (held & ~queries_elsewhere(plan, rank))[:, None]
        assert computed_pairs(plan, rank).equal(expected.long())


@pytest.mark.parametrize("n", [60, 59, 35, 24])
def test_residues_that_a_short_last_segment_lacks(n):
    "Its rows are empty, not wrong."
    mask = attention_mask(SegmentPattern.for_heads(n, 1, 24, 12, "keys", 11))
    q, k, v = (torch.randn(1, 1, n, 16, dtype=torch.float64) for _ in range(3))
    options = dict(segment_size=24, dilation_rate=12, dilation_mode="keys", offsets=11)
    def attention(*x): return ring_attention(*x, **options, return_lse=True)
    assert_matches_oracle(attention, q, k, v, mask)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world, w, r", [(4, 64, 4), (4, 128, 2), (4, 256, 8), (8, 256, 1),
                                         (2, 256, 16)])
def test_plan_equals_the_formula(world, w, r, mode):
    n, b, h, d = 256, 2, 4, 16
    shape = dict(batch=b, heads=h, head_dim=d)
    plan, l = plan_ring(n, world, (w,), (r,), **shape, dilation_mode=mode), n // world
    for rank in range(world):
        expected = 2 * b * h * d * max(0, w - l) // (1 if mode == "residue" else r)
        traffic = plan.traffic(rank)
        assert (traffic.elements, traffic.bytes) == (expected, 4 * expected)
        if plan.kind(0) != "exchange": continue
        assert (traffic.backward_elements, traffic.messages) == (expected, w // l - 1)
    kind = "ring" if (w, r) == (n, 1) else "exchange"
    assert plan.kind(0) == ("local" if w <= l else kind)


@pytest.mark.parametrize("limit", [1, 6144, 20000, 1 << 30])
@pytest.mark.parametrize("combine", ["lse", "heads"])
def test_turns_take_every_head_once(limit, combine):
    options = dict(batch=3, heads=6, kv_heads=3, head_dim=16, dtype=torch.float64)
    plan = plan_ring(96, 4, (8, None), (2, 1), **options, combine=combine)
    branch, one_head = plan.branches[1], 2 * 24 * 16 * 8  # bytes of K and V in a shard
    count = branch.num_kv_heads
    with mock.patch.dict(TURN_BYTES, cpu=limit): turns = plan.turns(1)
    places = [[(b, kv) for b in range(*t.batch) for kv in range(*t.kv_heads)] for t in turns]
    assert all(len(some) == 1 or len(some) * one_head <= limit for some in places)
    if limit == 1: assert len(turns) == 3 * count
    if limit == 1 << 30: assert len(turns) == 1
    assert sorted(sum(places, [])) == [(b, kv) for b in range(3) for kv in range(count)]
    heads = [(b, h) for t in turns for b in range(*t.batch) for h in range(*t.heads)]
    assert sorted(heads) == [(b, h) for b in range(3) for h in range(len(branch.kv_of))]
    for t in turns: assert {branch.kv_of[h] for h in range(*t.heads)} == set(range(*t.kv_heads))


def test_the_same_call_gives_the_same_plan():
    first = plan_ring(64, 2, (8,), (2,), heads=2)
    assert plan_ring(64, 2, [8], [2], heads=2) is first
    assert plan_ring(64, 2, (8,), (2,), heads=2, causal=True) is not first


def test_plan_reads_well():
    text = str(plan_ring(1024, 4, (128, 512, None), (1, 2, 1), heads=4, dilation_mode="residue"))
    assert ("4 ranks, 1,024 positions, 256 each, contiguous;"
            " B=1 H=4 H_kv=4 D=64 float32") in text
    assert ("branch 0: w=128 r=1 residue, local:"
            " every segment lies inside a shard, nothing is sent") in text
    assert ("  rank 0 receives from rank 1: 131,072 elements,"
            " 524,288 bytes in 1 messages forward") in text
    assert "branch 2: w=1024 r=1 residue, ring: K and V go once around" in text
    assert "  rank 3 receives 393,216 elements" in text
    many = str(plan_ring(1 << 20, 1024, (1 << 12,), (4,)))
    assert len(many.splitlines()) < 12  # a thousand ranks fit on a screen


@pytest.mark.parametrize("world, lines", [(8, 8), (9, 6)])
def test_many_ranks_are_cut(world, lines):
    "Up to eight are all shown; of more the first three, a gap and the last two."
    text = str(plan_ring(64, world)).splitlines()[2:]
    assert len(text) == lines and ("  …" in text) == (world > 8)
    assert text[-1].startswith(f"  rank {world - 1} receives")


def test_a_short_last_segment_is_nobody_elses():
    "Though it ends before its length."
    assert plan_ring(19, 2, (5,), (1,)).kind(0) == "local"
    assert plan_ring((12, 7), None, (4,), (1,)).kind(0) == "local"


@pytest.mark.parametrize("sizes", [(8, 8, 8), (20, 0, 4)])
def test_what_a_dense_ring_sends(sizes):
    "K and V to each other rank; back the same, and gradients with every shard until they are home."
    plan, filled = plan_ring(sizes, heads=2, head_dim=16), sum(map(bool, sizes))
    row = 2 * 2 * 16 # of K and V, of two heads
    for rank, size in enumerate(sizes):
        others = 24 - size
        hops = 2 * (filled - bool(size))
        traffic = plan.traffic(rank)
        assert (traffic.messages, traffic.elements) == (hops, row * others)
        assert traffic.backward_messages == hops + 2 * filled
        assert traffic.backward_elements == row * (others + 24)


def test_turns_fit_the_largest_shard():
    plan = plan_ring((40, 2, 6), heads=4, head_dim=16)
    one_head = 2 * 40 * 16 * 4 # bytes of its K and V on the first rank
    with mock.patch.dict(TURN_BYTES, cpu=2 * one_head): assert len(plan.turns(0)) == 2


def test_ranks_in_words():
    assert list_ranks([2]) == "rank 2" and list_ranks([0, 1, 2]) == "ranks 0, 1, 2"
    assert list_ranks([0, 2, 4, 5, 6, 7]) == "ranks 0, 2, 4 to 7"


@pytest.mark.parametrize("arguments, message", [
    (dict(seq_len=8.0), "seq_len=8.0: expected a whole number"),
    (dict(seq_len=0), "seq_len=0: must be at least 1"),
    (dict(seq_len=(4, 4), world_size=3), "they must agree"),
    (dict(seq_len=(4, 5), layout="zigzag"), "layout='zigzag' needs 5, 4"),
    (dict(seq_len=8, layout="snake"), "known layouts are"),
    (dict(seq_len=8, heads=3, kv_heads=2), "must be a multiple"),
    (dict(seq_len=8, causal="yes"), "causal='yes': expected True or False")])
def test_wrong_plans(arguments, message):
    with pytest.raises(ValueError) as error: plan_ring(**arguments)
    assert message in str(error.value)
