"""Many ranks: exact against the oracle, nothing sent that the plan does not say, and clear words when something goes wrong. The processes run ring_worker.py."""
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from hilbert_attn import ring
from hilbert_attn.dilated import dilated_attention
from hilbert_attn.patterns import attention_mask
from hilbert_attn.reference import assert_matches_oracle, masked_attention
from hilbert_attn.ring import LAYOUTS, plan_ring, ring_attention, ring_dilated_attention, shard_positions, shard_sequence, shard_sizes, unshard_sequence
from hilbert_attn.sdpa import _flash_backward
from ring_worker import CASES, WORLDS, branch_masks

WORKER, ROOT = Path(__file__).with_name("ring_worker.py"), Path(__file__).resolve().parent.parent


def run_ranks(suites: list[str], world: int, folder: Path, seconds: float) -> dict[str, dict[str, list[dict]]]: # suite -> name -> what each rank wrote
    "Runs the suites in `world` processes, and leaves none behind."
    command = [sys.executable, str(WORKER), ",".join(suites)]
    logs = [open(folder / f"log{rank}", "w+") for rank in range(world)]
    processes = [subprocess.Popen([*command, str(rank), str(world), str(folder / "store"), str(folder)], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}) for rank, log in enumerate(logs)]
    try:
        for process in processes: process.wait(seconds)
    except subprocess.TimeoutExpired: pass
    finally:
        for process in processes:
            if process.poll() is None: process.kill()
            process.wait()
    found: dict[str, dict[str, list[dict]]] = {}
    for suite in suites:
        for rank in range(world):
            path = folder / f"{suite}-{rank}.jsonl"
            for line in path.read_text().splitlines() if path.exists() else ():
                entry = json.loads(line)
                found.setdefault(suite, {}).setdefault(entry.pop("name"), []).append(entry | dict(rank=rank))
    found["logs"] = {str(rank): [dict(text=Path(log.name).read_text()[-2000:])] for rank, log in enumerate(logs)}
    for log in logs: log.close()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "Everything that needs no rank to be lost, in one set of processes."
    return run_ranks(["numbers", "sharding", "memory", "torch_ring", "meshes"], 4, tmp_path_factory.mktemp("ring"), 400)


@pytest.fixture(scope="module")
def faults(tmp_path_factory): return run_ranks(["faults"], 3, tmp_path_factory.mktemp("faults"), 120)


def said(results, suite, name, ranks):
    "What the ranks wrote about a check; fails where one is missing or went wrong."
    entries = results.get(suite, {}).get(name, [])
    for entry in entries: assert entry["ok"], f"rank {entry['rank']}: {entry['error']}"
    assert [entry["rank"] for entry in entries] == list(ranks), f"{name}: results of ranks {[entry['rank'] for entry in entries]}, expected {list(ranks)}; logs: {results['logs']}"
    return entries


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
def test_local_segments_send_nothing(results):
    for entry in said(results, "sharding", "agreements", range(4)):
        assert entry["counts"] == dict(every=[{"c10d.allgather_.default": 1}] * 3, once=[{"c10d.allgather_.default": 1}, {}, {}])


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


MISMATCHES = dict(
    shape="heads is 2 on ranks 0, 2, 4 on rank 1", dtype="dtype is torch.float32 on ranks 0, 2, torch.float64 on rank 1", order="order is 24 tokens #", layout="layout is contiguous on ranks 0, 2, zigzag on rank 1",
    segments="dilation_rates is (1, 2) on ranks 0, 2, (1, 3) on rank 1", function="function is ring_attention on ranks 0, 2, ring_dilated_attention on rank 1", argument="B, N and D must agree (on rank 1)",
    everywhere="dilation_rate=5: must not exceed segment_size=4", uneven_zigzag="layout='zigzag' needs 9, 8, 8", check="check='never': known ways are 'every', 'once' (on rank 1)", unshard="dim is 1 on ranks 0, 2, 2 on rank 1")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatch_is_the_same_error_on_all_ranks(faults, name):
    entries = said(faults, "faults", name, range(3))
    assert {entry["type"] for entry in entries} == {"ValueError"} and len({entry["message"] for entry in entries}) == 1
    assert MISMATCHES[name] in entries[0]["message"] and max(entry["took"] for entry in entries) < 10
    said(faults, "faults", name + ", then usable", range(3))


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name, ranks", [("remembered", range(3)), ("stalls forward", range(3)), ("stalls backward", range(3)), ("raises forward", range(3)), ("raises backward", range(3)), ("exits", (0, 2))])
def test_a_lost_rank_is_an_error_on_the_others(faults, name, ranks):
    entries = said(faults, "faults", name, ranks)
    for entry in entries:
        failed = name.startswith("raises") and entry["rank"] == 1
        assert entry["type"] == "RuntimeError" and entry["took"] < 10
        assert ("stopped in the middle of a round: MemoryError: no memory left" if failed else "lost contact with the other ranks") in entry["message"]
        assert "The process group cannot be used any more" in entry["message"] and "destroy_process_group" in entry["message"]
        if name != "remembered": assert ("backward" if "backward" in name else "forward") in entry["message"]
        if name != "exits": assert entry["again"]["type"] == "RuntimeError" and "still unusable" in entry["again"]["message"] and entry["again"]["took"] < 1


@pytest.mark.timeout(200)
def test_an_error_beside_the_exchange_leaves_the_group_usable(faults):
    assert [entry["type"] for entry in said(faults, "faults", "raises beside", range(3))] == [False, "MemoryError", False]


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
    (dict(order=torch.arange(5)), "shape (6,)"), (dict(dilation_rate=7), "must not exceed segment_size"), (dict(dilation_mode="heads"), "known modes"), (dict(offsets=(1, 2, 3)), "offsets has 3 entries")])
def test_wrong_arguments(arguments, message):
    q = torch.randn(1, 2, 6, 16)
    with pytest.raises(ValueError) as error: ring_attention(q, q, q, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("arguments, message", [
    (dict(segment_lengths=(2, 4), dilation_rates=(1,)), "segment_lengths=[2, 4] and dilation_rates=[1]: expected as many"), (dict(segment_lengths=(), dilation_rates=()), "at least one"), (dict(combine="sum"), "known ways are 'lse', 'heads'"),
    (dict(segment_lengths=(2, 3, 6), dilation_rates=(1, 1, 1), combine="heads"), "each branch needs a head"), (dict(offsets=(0, 1, 2)), "expected one per head (2)")])
def test_wrong_branches(arguments, message):
    q = torch.randn(1, 2, 6, 16)
    with pytest.raises(ValueError) as error: ring_dilated_attention(q, q, q, **(dict(segment_lengths=(2, 6), dilation_rates=(1, 2)) | arguments))
    assert message in str(error.value)


def test_shards_without_a_group():
    x = torch.arange(10.)[None, :, None]
    for layout in LAYOUTS: assert shard_sequence(x, layout=layout).equal(x) and unshard_sequence(x, layout=layout).equal(x)
    with pytest.raises(ValueError, match="dim=3: x has 3 dimensions"): shard_sequence(x, dim=3)
    with pytest.raises(ValueError, match="grad='mean'"): unshard_sequence(x, grad="mean")
    with pytest.raises(ValueError, match="seq_len=0"): shard_sizes(0, 1)
