"""Measuring: statistics on a clock that we turn, refusals, limits, memory readings."""
import gc
import getpass
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hilbert_attn.bench.contenders import (
    GATHERED,
    MATMUL,
    OURS,
    OURS_HILBERT,
    RESHAPED,
    Candidate,
    Case,
    check_exact,
    random_inputs,
)
from hilbert_attn.bench.cpu import CPU_QUICK, cpu_candidates
from hilbert_attn.bench.machine import (
    environment,
    machine_limits,
    machine_slug,
    matmul_shape,
    peak_memory,
)
from hilbert_attn.bench.measuring import measure
from hilbert_attn.patterns import SegmentPattern, attention_mask
from hilbert_attn.reference import masked_attention


class Clock:
    "Time passes only when a scripted call says so."
    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def call(self, name, seconds):
        durations = iter(seconds)

        def run():
            self.log.append(name)
            self.now += next(durations)

        return run


def test_measure_reports_percentiles_without_the_warmup():
    clock = Clock()
    a = clock.call("a", [100, 5, 1, 4, 2, 3])
    b = clock.call("b", [100] + [7] * 5)
    found = measure({"a": a, "b": b}, 5, clock=clock)
    assert list(found) == ["a", "b"]
    a, b = found["a"], found["b"]
    assert (a.median, a.p20, a.p80, a.repeats) == pytest.approx((3, 1.8, 4.2, 5))
    assert (b.median, b.p20, b.p80) == (7, 7, 7)


def test_measure_takes_turns():
    clock = Clock()
    measure({name: clock.call(name, [1] * 9) for name in "abc"}, 8, clock=clock)
    rounds = [clock.log[i:i + 3] for i in range(0, 27, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 2  # and not always in the same order


def test_measure_makes_a_short_call_several_times_in_a_row():
    clock = Clock()
    calls = {"a": clock.call("a", [100] + 99 * [2]), "b": clock.call("b", [100] + 99 * [50])}
    found = measure(calls, 3, warmup=2, least_seconds=7, clock=clock)
    assert (found["a"].median, found["b"].median, found["a"].repeats) == (2, 50, 3)
    assert sorted(clock.log[:4]) == ["a", "a", "b", "b"]
    rounds = ["".join(clock.log[i:i + 5]) for i in range(4, 19, 5)]
    assert set(rounds) <= {"aaaab", "baaaa"} and len(clock.log) == 19


@pytest.mark.parametrize("limit, repeats", [(1, 3), (105, 10)])
def test_measure_stops_early_but_not_before_three_rounds(limit, repeats):
    clock = Clock()
    slow = clock.call("a", [10] * 99)
    found = measure({"a": slow}, 50, max_seconds=limit, clock=clock)
    assert found["a"].repeats == repeats


def test_measure_frees_results_after_the_clock_and_waits_for_the_device():
    events = []

    class Result:
        def __del__(self):
            events.append("freed")

    def call():
        events.append("called")
        return Result()

    def clock():
        events.append("clock")
        return 0.0

    def wait():
        events.append("waited")

    measure({"a": call}, 1, warmup=0, clock=clock, synchronize=wait)
    # events[0] is the start of it all
    assert events[1:] == ["waited", "clock", "called", "waited", "clock", "freed"]


def test_measure_leaves_the_garbage_collector_as_it_was():
    def broken():
        raise KeyError("broken")

    with pytest.raises(KeyError):
        measure({"a": broken}, 1)
    assert gc.isenabled()
    with pytest.raises(ValueError, match="repeats=0"):
        measure({}, 0)


def inputs(n=24, heads=3, d=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, n, d, generator=g) for _ in range(3)]


MASK = SegmentPattern(24, 7, 2).mask()[0]


def output_alone(q, k, v):
    return masked_attention(q, k, v, MASK)[0]


def with_lse(q, k, v):
    return masked_attention(q, k, v, MASK)


def test_candidates_that_are_exact_pass():
    right = Candidate("right", output_alone, MASK, 0)
    errors = check_exact(right, *inputs()).errors
    assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
    both = replace(right, attention=with_lse, lse_grad=True)
    assert check_exact(both, *inputs(), heads=[2]).ok
    dense = Candidate("dense", F.scaled_dot_product_attention, None, 0)
    assert check_exact(dense, *inputs(), heads=[0, 1]).ok


SLOPPY = {
    "output": lambda out: out * 1.001,
    "gradient": lambda out: out.detach() + 1.01 * (out - out.detach()),
    "shape": lambda out: out[:, :, 1:],
    "another head": lambda out: out.roll(1, dims=1),
}


@pytest.mark.parametrize("wrong", SLOPPY)
def test_what_is_not_exact_is_refused(wrong):
    def attention(q, k, v):
        return SLOPPY[wrong](output_alone(q, k, v))

    with pytest.raises(RuntimeError, match="refusing to time 'sloppy'"):
        check_exact(Candidate("sloppy", attention, MASK, 0), *inputs())


def test_masks_may_differ_from_head_to_head():
    mask = attention_mask(SegmentPattern.for_heads(24, 3, 12, 3, "longnet"))

    def attention(q, k, v):
        return masked_attention(q, k, v, mask)[0]

    right = Candidate("right", attention, mask, 0)
    assert check_exact(right, *inputs(), heads=[0, 2]).ok
    with pytest.raises(RuntimeError, match="refusing"):
        check_exact(replace(right, mask=mask.flip(1)), *inputs(), heads=[0, 2])


def test_groups_made_by_hand_give_the_same_bits():
    of = {candidate.name: candidate for candidate in cpu_candidates(CPU_QUICK)}
    inputs = random_inputs((1, 2, 256, 64))
    for names in ((RESHAPED, OURS), (GATHERED, OURS_HILBERT)):
        outs = [of[name].call("forward", inputs)() for name in names]
        assert torch.equal(*outs)
        gradients = [of[name].call("forward+backward", inputs)() for name in names]
        assert all(map(torch.equal, *gradients))


SIZES = [(2, 2), (2, 15), (64, 100), (256, 1024), (1024, 1024), (1024, 8191)]


@pytest.mark.parametrize("side, depth", SIZES)
def test_the_matrix_product_has_the_size_that_was_asked_for(side, depth):
    assert matmul_shape(2 * side * side * depth) == (side, side, depth)


@pytest.mark.parametrize("direction, products", [("forward", 2), ("forward+backward", 7)])
def test_the_limit_does_as_many_operations_as_the_attention(direction, products):
    case = Case({}, (1, 2, 256, 64), list, pairs=8192)
    rows, columns = case.calls(direction)[MATMUL]().shape
    assert 2 * rows * rows * columns == products * 2 * 64 * 8192


def takes_memory(mib, small=False):  # in a process of its own: see below
    return lambda: torch.ones(1 if small else mib << 18).sum()


def test_memory_is_what_was_resident():
    peak = peak_memory("test_bench:takes_memory", mib=64)
    assert 60 << 20 < peak < 80 << 20
    with pytest.raises(RuntimeError, match="measuring the memory"):
        peak_memory("test_bench:no_such_function")


def test_limits():
    limits = machine_limits(1e6, 1 << 16, 1)
    assert limits["matmul_flops_per_s"] > 0
    assert limits["copy_bytes_per_s"] > 0
    assert limits["copy_bytes"] == 1 << 16


def test_environment_names_no_host_user_or_path():
    env = environment()
    text = json.dumps(env)
    wanted = {"cpu", "cores", "threads", "python", "torch", "hilbert_attn", "date"}
    assert wanted <= set(env)
    assert "/" not in text.replace(env["cpu"], "")
    for name in (socket.gethostname(), getpass.getuser(), Path.home().name):
        if len(name) > 3:
            assert name not in text


SLUGS = {
    "amd-epyc-2-cores": dict(cpu="AMD EPYC", cores=2),
    "nvidia-h200": dict(cpu="Xeon Platinum 8481C", cores=8, gpu="NVIDIA H200"),
    "berchip-x-y-1-cores": dict(cpu="Überchip (x/y)", cores=1),
}


@pytest.mark.parametrize("slug", SLUGS)
def test_slug(slug):
    assert machine_slug(SLUGS[slug]) == slug
