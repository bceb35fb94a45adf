"""Arguments, tensors and caches: what every module leans on."""
import importlib
import os
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hilbert_attn import hilbert_attention, window_attention
from hilbert_attn.common import (
    Cache,
    after_import,
    hide_masked,
    is_plain,
    shown,
    true_or_false,
    unit_stride,
    whole_number,
    whole_numbers,
)
from hilbert_attn.curves import curve_order


def test_cache_is_bounded():
    cache = Cache(max_entries=3, max_bytes=100)
    for key in range(10):
        cache.get(key, lambda: torch.zeros(4, dtype=torch.int64))  # 32 bytes each
    assert len(cache.entries) == 3 and cache.nbytes == 96
    cache.get("large", lambda: torch.zeros(50, dtype=torch.int64))
    assert len(cache.entries) == 1 and cache.nbytes == 400


def test_cache_keeps_what_was_used_last():
    made, cache = [], Cache(max_entries=2)
    for key in "abacab":
        cache.get(key, lambda key=key: made.append(key) or torch.zeros(1))
    assert "".join(made) == "abcb"  # a, used last, outlives b


def test_cache_notices_writes_into_value_and_source():
    cache, source = Cache(), torch.arange(4)
    double = lambda: cache.get("double", lambda: source * 2, source)  # noqa: E731
    first = double()
    assert double() is first
    source[0] = 9
    assert double()[0] == 18
    double()[1] = 100
    assert double()[1] == 2


POISONS = ["fake mode", "make_fx", "functionalize", "vmap", "meta", "failure"]


@pytest.mark.parametrize("poison", POISONS)
def test_no_call_spoils_an_order(poison):
    grid = (5, 11 + len(poison))  # of this test alone
    expected = np.arange(grid[0] * grid[1])
    def call(x): return x[..., curve_order(grid)]
    x = torch.randn(len(expected))
    try:
        if poison == "fake mode":
            with FakeTensorMode() as mode: call(mode.from_tensor(x))
        if poison == "make_fx": make_fx(call, tracing_mode="fake")(x)
        if poison == "functionalize": torch.func.functionalize(call)(x)
        if poison == "vmap": torch.vmap(call)(x[None])
        if poison == "meta": curve_order(grid, device="meta")
        if poison == "failure": curve_order(grid, "peano")
    except Exception: assert poison in ("make_fx", "failure")
    order = curve_order(grid)
    assert is_plain(order) and (order.sort().values.numpy() == expected).all()
    assert torch.equal(call(x).sort().values, x.sort().values)


def test_forks_do_not_wait_for_a_lock_that_nobody_holds():
    if not hasattr(os, "fork"): pytest.skip("no fork on this system")
    stop = threading.Event()
    def work():
        n = 0
        while not stop.is_set():
            n += 1
            curve_order((3, 50 + n % 300))
    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads: thread.start()
    try:
        children = [fork_and_order() for _ in range(60)]
        assert not [child for child in children if not ends_well(child)]
    finally:
        stop.set()
        for thread in threads: thread.join(10)


def fork_and_order() -> int:
    child = os.fork()
    if child: return child
    try: curve_order((7, 9)).sum()
    finally: os._exit(0)


def ends_well(child: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done: return status == 0
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


@pytest.mark.parametrize("value", [2.0, 2.5, float("nan"), "2", True, None, [2], np.float32(2)])
def test_only_whole_numbers_pass(value):
    with pytest.raises(ValueError, match="size=.*: expected a whole number"):
        whole_number("size", value)


@pytest.mark.parametrize("values", ["24", [2.0], [2, True], [], np.array([2.5]), [[2]], None, 2.0])
def test_only_sequences_of_whole_numbers_pass(values):
    with pytest.raises(ValueError, match="sizes="): whole_numbers("sizes", values)


def test_numpy_numbers_pass():
    assert type(whole_number("size", np.int16(3))) is int
    assert whole_numbers("sizes", np.arange(3)) == whole_numbers("sizes", (0, 1, 2)) == (0, 1, 2)
    assert whole_numbers("sizes", np.int64(3)) == whole_numbers("sizes", np.array(3)) == (3,)
    assert true_or_false("flag", np.bool_(False)) is False


@pytest.mark.parametrize("value", ["False", 0, 1, None, 1.0, torch.tensor([True, False])])
def test_only_switches_pass(value):
    with pytest.raises(ValueError, match="flag=.*: expected True or False"):
        true_or_false("flag", value)


def test_numbers_have_a_least_value():
    with pytest.raises(ValueError, match="size=0: must be at least 1"): whole_number("size", 0, 1)
    with pytest.raises(ValueError, match="sizes=-1: must be at least 0"):
        whole_numbers("sizes", [3, -1], 0)


@pytest.mark.parametrize(("value", "text"), [
    (2.5, "2.5"),
    ((3, 4), "(3, 4)"),
    (np.float32(2), repr(np.float32(2))),
    (torch.tensor([4, 8]), "tensor([4, 8])"),
    (torch.zeros(2, 1, 7, dtype=torch.half), "<Tensor float16 (2, 1, 7)>"),
    (np.zeros((5, 3)), "<ndarray float64 (5, 3)>"),
    ([3, torch.zeros(9)], "list of 3, <Tensor float32 (9,)>"),
    ("ab" * 99 + "cde", "'" + "ab" * 99 + "c..."),
])
def test_messages_stay_short(value, text):
    assert shown(value) == text
    with pytest.raises(ValueError) as refused: whole_number("size", value)
    assert str(refused.value) == f"size={text}: expected a whole number"


def test_a_tensor_in_the_place_of_a_size_is_told_by_its_shape():
    q = torch.randn(1, 2, 16, 8)
    with pytest.raises(ValueError, match=r"segment_size=<Tensor float32 \(1, 2, 16, 8\)>: "):
        hilbert_attention(q, q, q, segment_size=q)
    with pytest.raises(ValueError, match=r"window=<Tensor float32 \(1, 2, 16, 8\)>: "):
        window_attention(q, q, q, (4, 4), q)


def test_unit_stride_copies_only_what_needs_it():
    x = torch.randn(2, 3, 4, 5)
    expanded = x[..., :1].expand(2, 3, 4, 1), x[:, :1].expand(2, 7, 4, 5)
    for y in (x, x[:, :, ::2], x.transpose(0, 2), *expanded):
        assert unit_stride(y) is y
    hidden = torch.randn(3, 5).as_strided((1, 3, 4, 5), (1, 5, 0, 1))  # as a permuted, expanded one
    assert torch.empty_like(hidden).stride(-1) != 1
    for y in (x.transpose(-1, -2), x[..., ::2], x[..., :1].expand(2, 3, 4, 6), hidden):
        assert unit_stride(y).stride(-1) == 1 and torch.equal(unit_stride(y), y)
        assert torch.empty_like(unit_stride(y)).stride(-1) == 1
    assert unit_stride(None) is None


def test_unit_stride_of_rows_that_overlap():
    "`empty_like` may put another dim innermost."
    x = torch.arange(40.0)
    one = x.as_strided((2, 2, 3, 8), (1, 1, 1, 1))
    window = x[None, None].unfold(2, 8, 1)
    for y in (one, one[:, :, :1], window):
        whole = unit_stride(y)
        alike = torch.empty_like(whole)
        assert torch.equal(whole, y)
        assert whole.stride(-1) == alike.stride(-1) == 1


def test_masked_rows_hold_nothing_and_have_no_gradient():
    x = torch.randn(2, 3, 6, 4)
    mask = torch.rand(2, 6) < 0.5
    x[~mask[:, None].expand(2, 3, 6)] = torch.nan
    x.requires_grad_()
    y = hide_masked(x, mask)
    y.backward(torch.ones_like(y))
    seen = mask[:, None, :, None].expand_as(x)
    assert (y[~seen] == 0).all() and torch.equal(y[seen], x[seen])
    assert torch.equal(x.grad, seen.float())


def test_a_module_may_be_waited_for_twice(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    called = []
    after_import("colorsys", lambda: called.append("first"))
    after_import("colorsys", lambda: called.append("second"))
    importlib.import_module("colorsys")
    assert called == ["first", "second"]
