"""What goes wrong on one rank is the same error on all of them, in seconds, and the group works on.

The processes run ring_faults_worker.py.
"""
import pytest
from ring_processes import run_ranks, said

WORLD = 3
RANKS = range(WORLD)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "All that leaves the group usable, one after the other in the same processes."
    suites = ["mismatches", "errors", "orders"]
    folder = tmp_path_factory.mktemp("shared")
    return run_ranks("ring_faults_worker.py", suites, WORLD, folder, 150)


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    return run_ranks("ring_faults_worker.py", ["lost"], WORLD, folder, 60)


def same_error(found, suite, name):
    "What all ranks say alike, within ten seconds; and that the group was usable afterwards."
    entries = said(found, suite, name, RANKS)
    assert max(entry["took"] for entry in entries) < 10
    said(found, suite, name + ", then usable", RANKS)
    assert len({(entry["type"], entry["message"]) for entry in entries}) == 1, entries
    return entries[0]["type"], entries[0]["message"]


MISMATCHES = dict(
    shape="heads is 2 on ranks 0, 2, 4 on rank 1",
    dtype="dtype is torch.float32 on ranks 0, 2, torch.float64 on rank 1",
    order="order is 24 tokens #",
    layout="layout is contiguous on ranks 0, 2, zigzag on rank 1",
    segments="dilation_rates is (1, 2) on ranks 0, 2, (1, 3) on rank 1",
    function="function is ring_attention on ranks 0, 2, ring_dilated_attention on rank 1",
    argument="B, N and D must agree (on rank 1)",
    everywhere="dilation_rate=5: must not exceed segment_size=4",
    uneven_zigzag="layout='zigzag' needs 9, 8, 8",
    unshard="dim is 1 on ranks 0, 2, 2 on rank 1",
    no_number="scale='0.5': expected a number (on rank 1)",
    no_whole_number="segment_size=2.5: expected a whole number (on rank 1)",
    no_switch="causal='False': expected True or False (on rank 1)",
    no_backend="backend='bogus': known backends are",
    no_tensor="q is a list: expected a tensor (on rank 1)",
    layer_shape="expected (B, N, H, D) (on rank 1)",
    layer_mask="shorten the sequence instead (on rank 1)",
    layer_switch="is_causal='no': expected True or False (on rank 1)",
    layer_sizes="expected (B, n, 2, 16) (on rank 1)",
    layer_length="seq_len is missing",
    layer_grid="expected an int64 tensor of shape (24,)",
    block_layer_shape="expected (B, N, H, D) (on rank 1)",
    block_layer_mask="shorten the sequence instead (on rank 1)")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", MISMATCHES)
def test_wrong_arguments_are_the_same_error_on_all_ranks(shared, name):
    kind, message = same_error(shared, "mismatches", name)
    assert kind == "ValueError" and MISMATCHES[name] in message


@pytest.mark.timeout(200)
def test_a_backend_that_one_rank_cannot_run(shared):
    kind, message = same_error(shared, "mismatches", "cannot_run")
    assert kind == "RuntimeError" and "'triton'" in message and "(on rank 1)" in message


@pytest.mark.timeout(200)
def test_transforms_of_functions_are_refused_before_anything_is_sent(shared):
    kind, message = same_error(shared, "mismatches", "transform")
    assert kind == "NotImplementedError"
    assert "torch.func have no way over other ranks" in message


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["numbers alike", "batch of nothing"])
def test_unusual_arguments_are_right(shared, name):
    said(shared, "mismatches", name, RANKS)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", [
    "dense, first step", "dense, last step", "dense, backward, first step",
    "dense, backward, last step", "exchange", "exchange, backward", "segments beside an exchange",
    "merge after an exchange", "segments before a ring", "a ring before an exchange",
    "segments inside", "dense, backward, repeated", "dense, backward, tensors kept",
    "exchange, backward, tensors kept",
    "code before a call", "code after a call", "code at the end"])
def test_an_error_on_one_rank_is_raised_on_all(shared, name):
    kind, message = same_error(shared, "errors", name)
    assert kind == "MemoryError" and "MemoryError: no memory left (on rank 1)" in message
    if "backward" in name: assert ", backward" in message


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["alike", "exchanges", "unlike"])
def test_backwards_in_different_orders_are_an_error(shared, name):
    "Identical calls too: they are told apart by their numbers."
    kind, message = same_error(shared, "orders", name)
    assert kind == "ValueError" and "ring_attention, backward" in message
    assert "call is " in message and "on ranks 0, 2" in message


@pytest.mark.timeout(200)
def test_forward_on_one_rank_beside_backward_on_others(shared):
    kind, message = same_error(shared, "orders", "forward beside backward")
    assert kind == "ValueError"
    assert "ring_attention, backward on ranks 0, 2, ring_attention on rank 1" in message


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["stalls forward", "stalls backward"])
def test_a_rank_that_stalls_is_an_error_everywhere(lost, name):
    for entry in said(lost, "lost", name, RANKS):
        assert entry["type"] == "RuntimeError" and entry["took"] < 10
        assert "lost contact with the other ranks" in entry["message"]
        assert "The process group cannot be used any more" in entry["message"]
        assert "destroy_process_group" in entry["message"]
        assert name.split()[1] in entry["message"]
        again = entry["again"]
        assert again["type"] == "RuntimeError" and "still unusable" in again["message"]
        assert again["took"] < 1


@pytest.mark.timeout(200)
def test_an_interrupt_stays_one_and_marks_the_group(lost):
    entries = said(lost, "lost", "interrupted", RANKS)
    assert {entry["type"] for entry in entries} == {"RuntimeError"}
    assert "stopped in the middle of a round: KeyboardInterrupt" in entries[1]["message"]


@pytest.mark.timeout(200)
def test_a_rank_that_exits_is_an_error_on_the_others(lost):
    for entry in said(lost, "lost", "exits", (0, 2)):
        assert entry["type"] == "RuntimeError" and entry["took"] < 10
        assert "lost contact with the other ranks" in entry["message"]
