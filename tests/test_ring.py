"""Many ranks: exact against the oracle, and nothing is sent that the plan does not say.

The processes run ring_worker.py and ring_mesh_worker.py. What goes wrong is in test_ring_faults.py.
"""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from ring_cases import REST, SAMPLE, WORLDS, attended
from ring_processes import ROOT, run_ranks, said, tree_environment

from hilbert_attn.dilated import dilated_attention
from hilbert_attn.reference import assert_matches_oracle
from hilbert_attn.ring import ring_attention, ring_dilated_attention
from hilbert_attn.ring_exchange import shard_sequence, unshard_sequence
from hilbert_attn.ring_plan import LAYOUTS, shard_sizes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    suites = ["numbers", "strides", "parts", "memory", "torch_ring", "leaving"]
    folder = tmp_path_factory.mktemp("ring")
    return run_ranks("ring_worker.py", suites, 4, folder, 400)


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return run_ranks("ring_worker.py", ["rest"], 4, tmp_path_factory.mktemp("rest"), 400)


@pytest.fixture(scope="module")
def meshed(tmp_path_factory):
    suites, folder = ["sharding", "meshes"], tmp_path_factory.mktemp("meshes")
    return run_ranks("ring_mesh_worker.py", suites, 4, folder, 200)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_matches_the_oracle_and_the_plan(results, world, case):
    said(results, "numbers", f"{world} {case}", range(world))


@pytest.mark.full
@pytest.mark.timeout(500)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", REST, ids=str)
def test_matches_the_oracle_and_the_plan_in_all_cases(rest, world, case):
    said(rest, "rest", f"{world} {case}", range(world))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("name", ["dense", "causal", "inside", "across", "both"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_strides(results, world, name, dtype):
    said(results, "strides", f"{world} {name} {dtype}", range(world))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", ["dense", "causal", "inside", "across", "both"])
def test_gradients_of_some_and_twice(results, name): said(results, "parts", name, range(4))


@pytest.mark.timeout(500)
def test_gradients_of_sharding(meshed):
    checks = [name for name in meshed["sharding"] if name.startswith("n=")]
    assert len(checks) == 24
    for name in checks: said(meshed, "sharding", name, range(4))


@pytest.mark.timeout(500)
def test_lengths_may_vary(meshed): said(meshed, "sharding", "lengths vary", range(4))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", ["twice", "one shares nothing", "one is empty"])
def test_runs_are_bit_identical(meshed, name): said(meshed, "sharding", name, range(4))


@pytest.mark.timeout(500)
def test_calls_open_and_close_with_64_bytes(meshed):
    "Inside a shard, across shards, and dense: forward, and backward where something is sent."
    for entry in said(meshed, "sharding", "agreements", range(4)):
        twice = {"c10d.allgather_.default": 2}
        assert entry["counts"] == [[twice, {}], [twice, twice], [twice, twice]]


SHARD = 2048 * 8 * 64 * 4 # bytes of q, of one rank alone


@pytest.mark.timeout(500)
@pytest.mark.parametrize("direction, tensors, blocks", [("forward", 5, 5),
                                                        ("forward and backward", 8, 11)])
def test_memory_falls_with_the_number_of_ranks(results, direction, tensors, blocks):
    """Needed are q, k, v, the upstream gradient and the output; then the gradients too.

    Head by head, each block is an eighth of a shard: the one at hand and the next, the kernel's
    results, and backward their gradients and those that arrive."""
    def peak(world, name):
        entries = said(results, "memory", f"{world} {name}, {direction}", range(world))
        return max(entry["bytes"] for entry in entries)
    for world in (1, 2, 4):
        shard = SHARD / world
        assert peak(world, "segments inside") < 1.01 * tensors * shard
        in_flight = blocks / 8 if world > 1 else 0
        assert peak(world, "dense") < (1.01 * tensors + in_flight) * shard
    for name in ("dense", "dense, grouped queries"):
        one, two, four = (peak(world, name) for world in (1, 2, 4))
        assert two < 0.63 * one and four < 0.54 * two, (name, one, two, four)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("learned", ["qkv", "k", "qv"])
def test_ranks_compare_last(results, learned):
    "A rank with segments of its own does them before it waits to hear how the others did."
    for entry in said(results, "leaving", learned, range(4)):
        own = ["own segments"] * (entry["rank"] in (0, 3))
        assert entry["happened"] == ["begin", *own, "end"] and entry["learns"] == learned


@pytest.mark.timeout(500)
@pytest.mark.parametrize("causal, balanced", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_agrees_with_torchs_own_ring(results, world, causal, balanced):
    said(results, "torch_ring", f"{world} causal={causal} balanced={balanced}", range(world))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("attention", ["dense", "exchange", "branches"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_beside_data_parallelism(meshed, kind, attention):
    said(meshed, "meshes", f"{kind} {attention}", range(4))


@pytest.mark.timeout(500)
def test_whole_mesh_is_refused(meshed):
    for entry in said(meshed, "meshes", "whole mesh", range(4)):
        assert entry["type"] == "ValueError" and "2-D device mesh" in entry["message"]
        assert "mesh['ring']" in entry["message"]


@pytest.mark.parametrize("case", [case for case in SAMPLE if not case.sizes], ids=str)
def test_without_a_group(case):
    "One rank, no process group: the same functions, on the whole sequence."
    generator = torch.Generator().manual_seed(1)
    q, k, v = (case.tensor(h, generator) for h in (case.heads[0], case.heads[1], case.heads[1]))
    order = case.make_order(generator)

    def attention(*x):
        x = [shard_sequence(t, None, 2, order) for t in x]
        options = case.options() | dict(order=order, layout="contiguous")
        if case.several:
            done = ring_dilated_attention(*x, case.w, case.r, combine=case.combine, **options)
        else:
            pattern = dict(segment_size=case.w[0], dilation_rate=case.r[0])
            done = ring_attention(*x, **pattern, **options)
        return tuple(unshard_sequence(t, None, 2, order) for t in done)
    assert_matches_oracle(attention, q, k, v, attended(case, order), scale=case.scale)


@pytest.mark.parametrize("combine", ["lse", "heads"])
def test_branches_without_a_group_are_dilated_attention(combine):
    shapes = [(2, h, 50, 16) for h in (4, 2, 2)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    branches = (8, 20, 20, 99), (1, 3, 3, 5)
    options = dict(combine=combine, return_lse=True)
    found = ring_dilated_attention(*leaves, *branches, **options)
    expected = dilated_attention(*leaves, *branches, curve=None, **options)
    upstream = [torch.randn_like(x).masked_fill(x.isneginf(), 0) for x in expected]
    found = *found, *torch.autograd.grad(found, leaves, upstream)
    expected = *expected, *torch.autograd.grad(expected, leaves, upstream)
    for a, b in zip(found, expected): torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.full
@pytest.mark.timeout(240)
def test_example_trains_like_one_process(tmp_path):
    """Losses and weights of two processes, each with half of the sequence, are those of one.

    Page 09d runs the example too, with an even length, in `make test`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = [str(ROOT / "examples" / "train_ring.py"), "--steps", "6", "--tokens", "301"]
    found = []
    for name, started_by in (("one", []), ("two", launcher)):
        command = [sys.executable, *started_by, *example, "--json", str(tmp_path / name)]
        options = dict(env=tree_environment(), capture_output=True, text=True, timeout=110)
        done = subprocess.run(command, **options)
        assert not done.returncode, done.stderr[-3000:]
        found.append(json.loads((tmp_path / name).read_text()))
    one, two = found
    assert one["losses"][-1] < one["losses"][0] - 0.5
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"])) < 1e-5
    assert abs(one["norm"] - two["norm"]) < 1e-3


def test_autocast_and_strides():
    q = torch.randn(1, 6, 2, 16).transpose(1, 2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = ring_attention(q, q, q, segment_size=3, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    (out.sum() + lse.sum()).backward()
    assert q.grad.dtype == torch.float32 and q.grad.isfinite().all()


def test_inference_mode():
    with torch.inference_mode():
        order, q = torch.randperm(12), torch.randn(1, 2, 12, 16)
        shards = [shard_sequence(q, None, 2, order)] * 3
        out = ring_attention(*shards, segment_size=5, causal=True, order=order)
        out = unshard_sequence(out, None, 2, order)
    assert out.shape == q.shape and out.isfinite().all()


@pytest.mark.parametrize("arguments, message", [
    (dict(layout="ring"), "known layouts are 'contiguous', 'zigzag'"),
    (dict(scale=-1.0), "scale=-1.0: must be positive"),
    (dict(scale="1"), "scale='1': expected a number"),
    (dict(scale=float("nan")), "scale=nan"),
    (dict(group=3), "expected a process group"),
    (dict(order=torch.zeros(6).long()), "order is no permutation"),
    (dict(order=torch.arange(5)), "shape (6,)"),
    (dict(order=[0, 1]), "order is given as list"),
    (dict(backend="bogus"), "backend='bogus': known backends are"),
    (dict(causal="False"), "causal='False': expected True or False"),
    (dict(overlap=1), "overlap=1: expected True or False"),
    (dict(return_lse="yes"), "return_lse='yes': expected True or False"),
    (dict(segment_size=2.5), "segment_size=2.5: expected a whole number"),
    (dict(segment_size=[3]), "segment_size=[3]: expected a whole number"),
    (dict(dilation_rate=True), "dilation_rate=True: expected a whole number"),
    (dict(dilation_rate=7), "must not exceed segment_size"),
    (dict(dilation_mode="heads"), "known modes"),
    (dict(offsets=1.5), "offsets=1.5: expected a whole number"),
    (dict(offsets=(1, 2, 3)), "offsets has 3 entries")])
def test_wrong_arguments(arguments, message):
    q = torch.randn(1, 2, 6, 16)
    with pytest.raises(ValueError) as error: ring_attention(q, q, q, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("arguments, message", [
    (dict(segment_lengths=(2, 4), dilation_rates=(1,)), "expected as many"),
    (dict(segment_lengths=(), dilation_rates=()), "at least one"),
    (dict(segment_lengths="24"), "segment_lengths='24': expected a whole number"),
    (dict(segment_lengths=[20.9, 6]), "expected a whole number"),
    (dict(dilation_rates=("1", 2)), "expected whole numbers"),
    (dict(combine="sum"), "known ways are 'lse', 'heads'"),
    (dict(segment_lengths=(2, 3, 6), dilation_rates=(1, 1, 1), combine="heads"),
     "each branch needs a head"),
    (dict(offsets=(0, 1, 2)), "expected one per head (2)")])
def test_wrong_branches(arguments, message):
    q = torch.randn(1, 2, 6, 16)
    arguments = dict(segment_lengths=(2, 6), dilation_rates=(1, 2)) | arguments
    with pytest.raises(ValueError) as error: ring_dilated_attention(q, q, q, **arguments)
    assert message in str(error.value)


def test_numpy_integers_are_numbers():
    q = torch.randn(1, 2, 6, 16)
    expected = ring_attention(q, q, q, segment_size=4, dilation_rate=2)
    numbers = dict(segment_size=np.int64(4), dilation_rate=np.int32(2))
    assert ring_attention(q, q, q, **numbers).equal(expected)
    expected = ring_dilated_attention(q, q, q, (2, 6), (1, 2))
    branches = np.array([2, 6]), np.array([1, 2])
    assert ring_dilated_attention(q, q, q, *branches).equal(expected)


def test_shards_without_a_group():
    x = torch.arange(10.)[None, :, None]
    for layout in LAYOUTS:
        assert shard_sequence(x, layout=layout).equal(x)
        assert unshard_sequence(x, layout=layout).equal(x)
    with pytest.raises(ValueError, match="dim=3: x has 3 dimensions"): shard_sequence(x, dim=3)
    with pytest.raises(ValueError, match="grad='mean'"): unshard_sequence(x, grad="mean")
    with pytest.raises(ValueError, match="seq_len=0"): shard_sizes(0, 1)
