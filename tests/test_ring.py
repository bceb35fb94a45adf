"""Many ranks: exact against the oracle, nothing sent that the plan does not say, and clear words when something goes wrong. The processes run ring_worker.py."""
import json
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ring_processes import ROOT, run_ranks, said
from ring_worker import CASES, WORLDS, branch_masks
from torch._subclasses.fake_tensor import FakeTensorMode

from hilbert_attn import ring
from hilbert_attn.dilated import dilated_attention
from hilbert_attn.patterns import SegmentPattern, attention_mask
from hilbert_attn.reference import assert_matches_oracle, masked_attention
from hilbert_attn.ring import (
    LAYOUTS,
    plan_ring,
    ring_attention,
    ring_dilated_attention,
    shard_positions,
    shard_sequence,
    shard_sizes,
    unshard_sequence,
)
from hilbert_attn.tiles import flash_backward as _flash_backward


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "Everything that needs no rank to be lost, in one set of processes."
    return run_ranks("ring_worker.py", ["numbers", "sharding", "memory", "torch_ring", "meshes", "strides"], 4, tmp_path_factory.mktemp("ring"), 400)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle_and_the_plan(results, world, case): said(results, "numbers", f"{world} {case}", range(world))


@pytest.mark.timeout(500)
def test_gradients_of_sharding(results):
    checks = [name for name in results["sharding"] if name.startswith("n=")]
    assert len(checks) == 24
    for name in checks: said(results, "sharding", name, range(4))


@pytest.mark.timeout(500)
def test_lengths_may_vary(results): said(results, "sharding", "lengths vary", range(4))


@pytest.mark.timeout(500)
def test_runs_are_bit_identical(results): said(results, "sharding", "twice", range(4))


@pytest.mark.timeout(500)
def test_calls_open_and_close_with_64_bytes(results):
    for entry in said(results, "sharding", "agreements", range(4)):
        twice = {"c10d.allgather_.default": 2}
        assert entry["counts"] == [[twice, {}], [twice, twice], [twice, twice]]


@pytest.mark.timeout(500)
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("name", ["dense", "causal", "inside", "across", "both"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_strides(results, world, name, dtype):
    said(results, "strides", f"{world} {name} {dtype}", range(world))


@pytest.mark.timeout(500)
def test_memory_falls_with_the_number_of_ranks(results):
    def peak(world, name): return max(entry["bytes"] for entry in said(results, "memory", f"{world} {name}", range(world)))
    shard = 2048 * 8 * 64 * 4  # bytes of q, of one rank alone
    for direction, tensors in (("forward", 5), ("forward and backward", 8)):  # q, k, v, the upstream gradient and the output; then the gradients too
        for world in (1, 2, 4):
            assert peak(world, f"segments inside, {direction}") < 1.01 * tensors * shard / world
            # head by head: besides those, the block at hand and the next one, backward their gradients and those that arrive, and the kernel's results, each an eighth of a shard
            assert peak(world, f"dense, {direction}") < (1.01 * tensors + (world > 1) * (11 if "backward" in direction else 5) / 8) * shard / world
        for name in ("dense", "dense, grouped queries"): # grouped queries: blocks are halves of K and V, which are quarters of q
            one, two, four = (peak(world, f"{name}, {direction}") for world in (1, 2, 4))
            assert two < 0.63 * one and four < 0.54 * two, (name, direction, one, two, four)


@pytest.mark.parametrize("limit", [1, 6144, 20000, 1 << 30])
@pytest.mark.parametrize("combine", ["lse", "heads"])
def test_turns_take_every_head_once(limit, combine):
    plan = plan_ring(96, 4, (8, None), (2, 1), batch=3, heads=6, kv_heads=3, head_dim=16, dtype=torch.float64, dilation_mode="residue", combine=combine)
    branch, each = plan.branches[1], 2 * 24 * 16 * 8  # bytes of one head's K and V in a shard
    with mock.patch.dict(ring._TURN_BYTES, cpu=limit): turns = plan.turns(1)
    sizes = [(t.batch[1] - t.batch[0]) * (t.kv_heads[1] - t.kv_heads[0]) for t in turns]
    count = branch.kv_heads[1] - branch.kv_heads[0]
    assert all(size == 1 or size * each <= limit for size in sizes) and (limit > 1 or len(turns) == 3 * count) and (limit < 1 << 30 or len(turns) == 1)
    assert sorted((b, kv) for t in turns for b in range(*t.batch) for kv in range(*t.kv_heads)) == [(b, kv) for b in range(3) for kv in range(count)]
    assert all(branch.kv_of[h] in range(*t.kv_heads) for t in turns for h in range(*t.heads)) and sorted((b, h) for t in turns for b in range(*t.batch) for h in range(*t.heads)) == [(b, h) for b in range(3) for h in range(len(branch.kv_of))]


@pytest.mark.timeout(500)
def test_agrees_with_torchs_own_ring(results):
    for world in (2, 3, 4):
        for causal, balanced in ((False, False), (True, False), (True, True)): said(results, "torch_ring", f"{world} causal={causal} balanced={balanced}", range(world))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("attention", ["dense", "exchange", "branches"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_beside_data_parallelism(results, kind, attention): said(results, "meshes", f"{kind} {attention}", range(4))


@pytest.mark.timeout(500)
def test_whole_mesh_is_refused(results):
    for entry in said(results, "meshes", "whole mesh", range(4)): assert entry["type"] == "ValueError" and "2-D device mesh" in entry["message"] and "mesh['ring']" in entry["message"]


@st.composite
def plans(draw):
    world, n, heads, kv = draw(st.integers(1, 5)), draw(st.integers(5, 60)), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    w = draw(st.integers(1, n + 3))
    return dict(seq_len=n, world_size=world, segment_lengths=(w,), dilation_rates=(draw(st.integers(1, min(w, 6))),), heads=heads * kv, kv_heads=kv, head_dim=8, causal=draw(st.booleans()),
                layout=draw(st.sampled_from(LAYOUTS)), dilation_mode=draw(st.sampled_from(["residue", "keys", "longnet"])))


@given(plans())
def test_plan_sends_what_is_attended_and_nothing_else(options):
    plan = plan_ring(**options)
    branch, group, n = plan.branches[0], plan.heads // plan.kv_heads, plan.seq_len
    mask = attention_mask(branch.pattern, causal=plan.causal)[0].expand(plan.heads, n, n)
    needed = mask.unflatten(0, (plan.kv_heads, group)).any(1)  # key/value head, query, key
    held = [shard_positions(plan.sizes, rank, plan.layout) for rank in range(plan.world_size)]
    for dst in range(plan.world_size):
        elements = 0
        for src in range(plan.world_size):
            sent = torch.zeros(plan.kv_heads, n, dtype=torch.bool)
            for parcel in plan.parcels(src, dst):
                rows = parcel.rows.positions()
                for kv in parcel.kv_heads:
                    assert not sent[kv, rows].any()  # no row twice
                    sent[kv, rows] = True
            wanted = torch.zeros_like(sent)
            if src != dst and plan.kind(0) == "exchange": wanted[:, held[src]] = needed[:, held[dst]].any(1)[:, held[src]]
            assert not (wanted & ~sent).any()
            if branch.pattern.mode != "residue": assert sent.equal(wanted)
            elements += 2 * 8 * int(sent.sum())
        if plan.kind(0) == "ring": elements = 2 * 8 * plan.kv_heads * (n - plan.sizes[dst])
        assert plan.traffic(dst).elements == elements


def computed_pairs(plan, rank):
    "How often each pair of positions is computed for each query head, from the tasks of a rank."
    n, branch = plan.seq_len, plan.branches[0]
    counts = torch.zeros(plan.heads, n, n, dtype=torch.long)
    held = [shard_positions(plan.sizes, r, plan.layout) for r in range(plan.world_size)]
    work = [] # task, key/value heads of its source, positions of its queries and keys
    if plan.kind(0) == "exchange":
        parts, arriving, tasks = ring._exchange_tasks(plan, rank)
        for task in tasks:
            kv_held = range(plan.kv_heads) if task.source < len(parts) else arriving[task.source - len(parts)].kv_heads
            work.append((task, kv_held, task.query_positions.positions(), task.key_positions.positions()))
    else:
        turn, = plan.turns(0)
        for src in range(plan.world_size):
            for task in ring._ring_tasks(plan, 0, rank, src, turn):
                queries, keys = held[rank][task.queries.positions()], held[src][task.keys.positions()]
                work.append((task, range(plan.kv_heads), queries, keys))
    for task, kv_held, queries, keys in work:
        seen = torch.ones(len(queries), len(keys), dtype=torch.bool)
        if task.visible != "all": seen = keys <= queries[:, None]
        for heads, kv_heads in task.heads:
            heads, kv_heads = (torch.arange(64)[x].tolist() for x in (heads, kv_heads))
            assert [branch.kv_of[h] for h in heads] == [kv_held[kv] for kv in kv_heads]
            for h in heads: counts[h, queries[:, None], keys] += seen
    return counts


@st.composite
def shared_segments(draw):
    "One branch whose segments cross shards, with residues at the end of short segments among them."
    w, world = draw(st.integers(2, 30)), draw(st.integers(2, 4))
    n, kv = draw(st.integers(world, 60)), draw(st.sampled_from([1, 2]))
    r, heads = draw(st.integers(1, min(w, 12))), kv * draw(st.sampled_from([1, 2]))
    mode = draw(st.sampled_from(["residue", "keys", "longnet"]))
    offsets = None if mode == "residue" else tuple(draw(st.lists(st.integers(0, r - 1), min_size=heads, max_size=heads)))
    return dict(seq_len=n, world_size=world, segment_lengths=(w,), dilation_rates=(r,), heads=heads, kv_heads=kv, head_dim=8, causal=draw(st.booleans()), dilation_mode=mode, offsets=offsets,
                layout=draw(st.sampled_from(LAYOUTS)))


@settings(max_examples=150)
@given(shared_segments())
@example(dict(seq_len=60, world_size=4, segment_lengths=(24,), dilation_rates=(12,), heads=1, kv_heads=1, head_dim=8, causal=False, dilation_mode="keys", offsets=(11,)))
@example(dict(seq_len=36, world_size=3, segment_lengths=(24,), dilation_rates=(12,), heads=2, kv_heads=1, head_dim=8, causal=True, dilation_mode="keys", offsets=(11, 0)))
def test_every_attended_pair_is_computed_once(options):
    plan = plan_ring(**options)
    if plan.kind(0) == "local": return
    n, branch = plan.seq_len, plan.branches[0]
    mask = attention_mask(branch.pattern, causal=plan.causal)[0].expand(plan.heads, n, n)
    for rank in range(plan.world_size):
        inside = torch.zeros(n, dtype=torch.bool) # queries in segments of the shard itself, computed elsewhere
        for part in plan.parts(0, rank) if plan.kind(0) == "exchange" else ():
            if not part.shared: inside[part.start:part.stop] = True
        held = torch.zeros(n, dtype=torch.bool)
        held[shard_positions(plan.sizes, rank, plan.layout)] = True
        expected = mask & (held & ~inside)[:, None]
        assert computed_pairs(plan, rank).equal(expected.long())


@pytest.mark.parametrize("world, n, w, r, offset", [(4, 60, 24, 12, 11), (3, 59, 24, 12, 11), (3, 35, 24, 12, 11), (1, 35, 24, 12, 11)])
def test_residues_that_a_short_last_segment_lacks(world, n, w, r, offset):
    "In mode keys, the last segment may have no key at all: its rows are empty, not wrong."
    plan = plan_ring(n, world, (w,), (r,), dilation_mode="keys", offsets=offset)
    mask = attention_mask(SegmentPattern.for_heads(n, 1, w, r, "keys", offset))[0, 0]
    if plan.kind(0) == "exchange":
        for rank in range(world):
            found = computed_pairs(plan, rank)[0]
            rows = found.any(1)
            assert found[rows].equal(mask[rows].long())
    q, k, v = (torch.randn(1, 1, n, 16, dtype=torch.float64) for _ in range(3))
    assert_matches_oracle(lambda *x: ring_attention(*x, segment_size=w, dilation_rate=r, dilation_mode="keys", offsets=offset, return_lse=True), q, k, v, mask)


@pytest.mark.parametrize("triangle, masked", [(False, False), (True, False), (False, True)])
def test_plain_kernels(triangle, masked):
    "The matrix products for devices without a kernel, some rows at a time: against the definition, with a scale of their own."
    n, m = (19, 19) if triangle else (19, 23)
    q, k, v, dout = (torch.randn(2, 3, size, 16, dtype=torch.float64) for size in (n, m, m, n))
    mask = torch.ones(n, m, dtype=torch.bool)
    if triangle: mask = mask.tril()
    if masked: mask = torch.rand(n, m) < 0.4
    mask[5, 0] = True
    bias = torch.zeros(n, m, dtype=torch.float64).masked_fill(~mask, -torch.inf) if masked else None
    dlse = torch.randn(2, 3, n, dtype=torch.float64).masked_fill(~mask.any(-1), 0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = masked_attention(*leaves, mask, scale=0.37)
    wanted = torch.autograd.grad(exact, leaves, (dout, dlse))
    rows = [slice(start, min(start + 4, n)) for start in range(0, n, 4)]
    with mock.patch.object(ring, "_row_chunks", lambda q, k: rows):
        out, lse = ring._plain_kernel(q, k, v, triangle, bias, 0.37)
        grads = ring._plain_backward(dout, dlse, q, k, v, out, lse.masked_fill(lse.isneginf(), 0), triangle, bias, 0.37)
    for a, e in zip((out, lse, *grads), (*exact, *wanted)): torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 1 << 14)])
def test_row_chunks_cover_the_rows(shape):
    b, h, m = shape
    q, k = torch.empty(b, h, 1000, 1), torch.empty(b, h, m, 1)
    rows = [i for chunk in ring._row_chunks(q, k) for i in range(chunk.start, chunk.stop)]
    assert rows == list(range(1000))


@pytest.mark.parametrize("mode", ["residue", "keys", "longnet"])
@pytest.mark.parametrize("world, w, r", [(4, 64, 4), (4, 128, 2), (4, 256, 8), (8, 256, 1), (2, 256, 16)])
def test_plan_equals_the_formula(world, w, r, mode):
    n, b, h, d = 256, 2, 4, 16
    plan, l = plan_ring(n, world, (w,), (r,), batch=b, heads=h, head_dim=d, dilation_mode=mode), n // world
    for rank in range(world):
        expected = 2 * b * h * d * max(0, w - l) // (1 if mode == "residue" else r)
        traffic = plan.traffic(rank)
        assert (traffic.elements, traffic.bytes) == (expected, 4 * expected)
        if plan.kind(0) == "exchange": assert (traffic.backward_elements, traffic.messages) == (expected, w // l - 1)
    assert plan.kind(0) == ("local" if w <= l else "ring" if (w, r) == (n, 1) else "exchange")


def test_plan_reads_well():
    text = str(plan_ring(1024, 4, (128, 512, None), (1, 2, 1), heads=4))
    assert "4 ranks, 1,024 positions, 256 each, contiguous; B=1 H=4 H_kv=4 D=64 float32" in text
    assert "branch 0: w=128 r=1 residue, local: every segment lies inside a shard, nothing is sent" in text
    assert "  rank 0 receives from rank 1: 131,072 elements, 524,288 bytes in 1 messages forward" in text
    assert "branch 2: w=1024 r=1 residue, ring: K and V go once around" in text and "  rank 3 receives 393,216 elements" in text
    assert len(str(plan_ring(1 << 20, 1024, (1 << 12,), (4,))).splitlines()) < 12  # a thousand ranks fit on a screen


SINGLE = [case for case in CASES if case.layout == "contiguous" and not case.sizes and (len(case.w) == 1 or case.combine == "heads")] # a multiset of keys is compared by ring_worker.py


@pytest.mark.parametrize("case", SINGLE[::3], ids=str)
def test_without_a_group(case):
    "One rank, no process group: the same functions, on the whole sequence."
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, case.dtype)
    q, k, v = (torch.randn(2, h, case.n, case.d, generator=generator, dtype=torch.float64).to(dtype) for h in (case.heads[0], case.heads[1], case.heads[1]))
    order = None if case.order == "none" else torch.randperm(case.n, generator=generator)
    masks = list(branch_masks(case, case.heads[0], order))
    options = dict(dilation_mode=case.mode, causal=case.causal, order=order, scale=case.scale, return_lse=True)

    def attention(*x):
        x = [shard_sequence(t, None, 2, order) for t in x]
        if len(case.w) == 1: done = ring_attention(*x, segment_size=case.w[0], dilation_rate=case.r[0], offsets=case.offsets, **options)
        else: done = ring_dilated_attention(*x, case.w, case.r, combine=case.combine, offsets=case.offsets, **options)
        return tuple(unshard_sequence(t, None, 2, order) for t in done)
    assert_matches_oracle(attention, q, k, v, torch.cat(masks, 1), scale=case.scale)


@pytest.mark.parametrize("combine", ["lse", "heads"])
def test_branches_without_a_group_are_dilated_attention(combine):
    q, k, v = (torch.randn(2, h, 50, 16, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    arguments = ((8, 20, 20, 99), (1, 3, 3, 5))
    found, expected = ring_dilated_attention(q, k, v, *arguments, combine=combine, return_lse=True), dilated_attention(q, k, v, *arguments, combine=combine, curve=None, return_lse=True)
    upstream = [torch.randn_like(x).masked_fill(x.isneginf(), 0) for x in expected]
    for a, b in zip((*found, *torch.autograd.grad(found, (q, k, v), upstream)), (*expected, *torch.autograd.grad(expected, (q, k, v), upstream))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_cuda_flash_backward_takes_the_gradient_of_the_lse():
    "What PyTorch's CUDA kernel would be given, handed to the CPU's: three bfloat16 columns carry a float32 gradient of the LSE."
    q, k, v, dout = (torch.randn(2, 3, n, 24, dtype=torch.bfloat16) for n in (9, 14, 14, 9))
    dlse = torch.randn(2, 3, 9)
    out, lse = ring._kernel(q, k, v, False, None, 0.2)
    out = out.bfloat16()
    def given(dout, q, k, v, out, lse, cq, ck, m, j, dropout, triangle, seed, offset, scale=None):
        assert (cq, ck, m, j, dropout) == (None, None, 9, 14, 0.0) and q.shape[-1] % 8 == 0
        return _flash_backward(*(x.float() for x in (dout, q, k, v, out)), lse, 0.0, triangle, scale=scale) + (None,)
    with mock.patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", given):
        for gradient in (None, dlse):
            for a, b in zip(ring._cuda_flash_backward(dout, gradient, q, k, v, out, lse, False, 0.2), ring._kernel_backward(dout, gradient, q, k, v, out, lse, False, None, 0.2)):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_cuda_kernels_accept_the_calls():
    "Shapes and dtypes of PyTorch's CUDA flash operators, without a GPU."
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 3, n, 64, device="cuda", dtype=torch.bfloat16) for n in (128, 256, 256))
        out, lse = ring._kernel(q, k, v, False, None, 0.125)
        assert (out.dtype, lse.dtype, out.shape, lse.shape) == (torch.float32, torch.float32, q.shape, q.shape[:3])
        grads = ring._kernel_backward(torch.empty_like(q), None, q, k, v, out.bfloat16(), lse, False, None, 0.125)
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes, triangle", [((100, 300), False), ((257, 257), True), ((1, 70), False)])
def test_kernels_on_cuda(dtype, sizes, triangle):
    q, k, v, dout = (torch.randn(2, 3, n, 64, device="cuda").to(dtype) for n in (sizes[0], sizes[1], sizes[1], sizes[0]))
    dlse, mask = torch.randn(2, 3, sizes[0], device="cuda"), torch.ones(sizes, dtype=torch.bool, device="cuda")
    if triangle: mask = mask.tril()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = masked_attention(*leaves, mask)
    expected = (*exact, *torch.autograd.grad(exact, leaves, (dout.double(), dlse.double())))
    out, lse = ring._kernel(q, k, v, triangle, None, 0.125)
    found = (out, lse, *ring._kernel_backward(dout, dlse, q, k, v, out.to(dtype), lse, triangle, None, 0.125))
    for a, e in zip(found, expected): assert (a - e).abs().max() < (1e-4 if dtype == torch.float32 else 0.05) * max(1.0, e.abs().max().item())


@pytest.mark.timeout(240)
def test_example_trains_like_one_process(tmp_path):
    "The losses of two processes, each with half of the sequence, are those of one; so are the weights."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    found = []
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])):
        command = [sys.executable, *launcher, str(ROOT / "examples" / "train_ring.py"), "--steps", "6", "--tokens", "301", "--json", str(tmp_path / name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
        assert not done.returncode, done.stderr[-3000:]
        found.append(json.loads((tmp_path / name).read_text()))
    one, two = found
    assert one["losses"][-1] < one["losses"][0] - 0.5 and max(abs(a - b) for a, b in zip(one["losses"], two["losses"])) < 1e-5
    assert abs(one["norm"] - two["norm"]) < 1e-3


def test_autocast_and_strides():
    q = torch.randn(1, 6, 2, 16).transpose(1, 2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16): out, lse = ring_attention(q, q, q, segment_size=3, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    (out.sum() + lse.sum()).backward()
    assert q.grad.dtype == torch.float32 and q.grad.isfinite().all()


def test_inference_mode():
    with torch.inference_mode():
        order, q = torch.randperm(12), torch.randn(1, 2, 12, 16)
        shards = [shard_sequence(q, None, 2, order)] * 3
        out = unshard_sequence(ring_attention(*shards, segment_size=5, causal=True, order=order), None, 2, order)
    assert out.shape == q.shape and out.isfinite().all()


@pytest.mark.parametrize("arguments, message", [
    (dict(layout="ring"), "known layouts are 'contiguous', 'zigzag'"), (dict(scale=-1.0), "scale=-1.0: must be positive"), (dict(group=3), "expected a process group"), (dict(order=torch.zeros(6).long()), "order is no permutation"),
    (dict(order=torch.arange(5)), "shape (6,)"), (dict(backend="bogus"), "backend='bogus': known backends are"), (dict(causal="False"), "causal='False': expected True or False"), (dict(segment_size=2.5), "segment_size=2.5: expected a whole number"),
    (dict(segment_size=[3]), "segment_size=[3]: expected a whole number"), (dict(dilation_rate=True), "dilation_rate=True: expected a whole number"), (dict(offsets=1.5), "offsets=1.5: expected a whole number"), (dict(scale="1"), "scale='1': must be positive"), (dict(scale=float("nan")), "scale=nan"),
    (dict(overlap=1), "overlap=1: expected True or False"), (dict(dilation_rate=7), "must not exceed segment_size"), (dict(dilation_mode="heads"), "known modes"), (dict(offsets=(1, 2, 3)), "offsets has 3 entries")])
def test_wrong_arguments(arguments, message):
    q = torch.randn(1, 2, 6, 16)
    with pytest.raises(ValueError) as error: ring_attention(q, q, q, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("arguments, message", [
    (dict(segment_lengths=(2, 4), dilation_rates=(1,)), "segment_lengths=[2, 4] and dilation_rates=[1]: expected as many"), (dict(segment_lengths=(), dilation_rates=()), "at least one"), (dict(segment_lengths="24"), "segment_lengths='24': expected a whole number"), (dict(segment_lengths=[20.9, 6]), "expected a whole number"), (dict(dilation_rates=("1", 2)), "expected whole numbers"), (dict(combine="sum"), "known ways are 'lse', 'heads'"),
    (dict(segment_lengths=(2, 3, 6), dilation_rates=(1, 1, 1), combine="heads"), "each branch needs a head"), (dict(offsets=(0, 1, 2)), "expected one per head (2)")])
def test_wrong_branches(arguments, message):
    q = torch.randn(1, 2, 6, 16)
    with pytest.raises(ValueError) as error: ring_dilated_attention(q, q, q, **(dict(segment_lengths=(2, 6), dilation_rates=(1, 2)) | arguments))
    assert message in str(error.value)


def test_numpy_integers_are_numbers():
    q = torch.randn(1, 2, 6, 16)
    expected = ring_attention(q, q, q, segment_size=4, dilation_rate=2)
    assert ring_attention(q, q, q, segment_size=np.int64(4), dilation_rate=np.int32(2)).equal(expected)
    expected = ring_dilated_attention(q, q, q, (2, 6), (1, 2))
    assert ring_dilated_attention(q, q, q, np.array([2, 6]), np.array([1, 2])).equal(expected)


def test_shards_without_a_group():
    x = torch.arange(10.)[None, :, None]
    for layout in LAYOUTS: assert shard_sequence(x, layout=layout).equal(x) and unshard_sequence(x, layout=layout).equal(x)
    with pytest.raises(ValueError, match="dim=3: x has 3 dimensions"): shard_sequence(x, dim=3)
    with pytest.raises(ValueError, match="grad='mean'"): unshard_sequence(x, grad="mean")
    with pytest.raises(ValueError, match="seq_len=0"): shard_sizes(0, 1)
