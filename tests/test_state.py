"""What a failed or a fake call leaves behind: nothing.

The same valid call is right after it, in threads and in forks.
"""
import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from sampling import FULL
from torch._subclasses import FakeTensorMode
from torch.func import functionalize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import hilbert_attn as h
from hilbert_attn import block_layers

GRID, N = (9, 11), 99


def hilbert(q, k, v, size=24, **options):
    return h.hilbert_attention(q, k, v, grid=GRID, segment_size=size, **options)


def dilated(q, k, v, size=24, **options):
    return h.dilated_attention(q, k, v, [size, 99], [1, 3], grid=GRID, **options)


def on_grid(function, usual):
    def call(q, k, v, size=usual, **options): return function(q, k, v, GRID, size, **options)
    return call


def tiles_shared(q, k, v, size=4, **options):
    return h.tiles_shared_attention(q, k, v, tiles=size, grid=GRID, **options)


def blocks(q, k, v, size=16, **options):
    near = h.NeighborhoodPattern(GRID, 3)
    lists = h.block_lists(near, curve="hilbert", block_size=size, device=q.device)
    return h.block_sparse_attention(q, k, v, lists, **options)


FUNCTIONS = {
    "hilbert": hilbert,
    "dilated": dilated,
    "window": on_grid(h.window_attention, 3),
    "neighborhood": on_grid(h.neighborhood_attention, 3),
    "hilbert_window": on_grid(h.hilbert_window_attention, 24),
    "hilbert_slide": on_grid(h.hilbert_slide_attention, 24),
    "tiles_shared": tiles_shared,
    "blocks": blocks,
}
each = pytest.mark.parametrize("name", FUNCTIONS)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, N, 16, generator=generator) for heads in (2, 1, 1)]


def results(function):
    leaves = [x.requires_grad_() for x in tensors()]
    out, lse = function(*leaves, return_lse=True)
    loss = out.sin().sum() + lse.sin().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def spoil_by_tracing(f): make_fx(f, tracing_mode="fake")(*tensors())
def spoil_by_symbols(f): make_fx(f, tracing_mode="symbolic")(*tensors())
def spoil_by_functionalize(f): functionalize(f)(*tensors())
def spoil_by_vmap(f): vmap(f)(*(x[None] for x in tensors()))
def spoil_by_meta(f): f(*(x.to("meta") for x in tensors()))
def spoil_by_inference(f):
    with torch.inference_mode(): f(*tensors())


def spoil_by_fakes(f):
    with FakeTensorMode() as mode: f(*map(mode.from_tensor, tensors()))


def spoil_by_floats(f):
    for size in (24.0, 3.0, 4.0, 16.0, 2.5, float("nan"), "24"):
        with pytest.raises(ValueError): f(*tensors(), size=size)


def spoil_by_wrong_shapes(f):
    q, k, v = tensors()
    with pytest.raises(ValueError): f(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1])


SPOILERS = [spoil for name, spoil in list(globals().items()) if name.startswith("spoil_by_")]


def forget():
    "Empties the package's caches, so that the spoiling call would be the one to fill them."
    import gc

    from hilbert_attn.common import Cache
    for x in gc.get_objects():
        if type(x) is Cache: x.clear()


REFUSALS = RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError


@pytest.mark.grid
@each
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__)
def test_a_valid_call_is_right_afterwards(name, spoil):
    function = FUNCTIONS[name]
    expected = results(function)
    forget()
    try: spoil(function)
    except REFUSALS as error: print(f"{spoil.__name__} of {name}: {error}") # no harm
    for a, b in zip(results(function), expected): assert a.equal(b)


@each
def test_threads(name):
    "Sixteen threads that start at once, with nothing cached, get what one alone gets."
    function, failures = FUNCTIONS[name], []
    expected = results(function)
    barrier = threading.Barrier(16)

    def work():
        barrier.wait()
        for _ in range(2):
            if not all(a.equal(b) for a, b in zip(results(function), expected)): failures.append(1)

    forget()
    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(120)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_lists_that_another_thread_throws_away(monkeypatch):
    "A layer that has kept many lengths begins anew, while a thread still asks for one of them."
    layer = h.BlockSparseAttention(block_size=16)

    @contextmanager
    def interrupted():
        yield
        layer._lists.clear()  # what a thread does that is switched to here

    monkeypatch.setattr(block_layers, "outside_graphs", interrupted)
    assert layer.block_lists(40).num_queries == 40


FORKED = ("hilbert", "neighborhood")


def exit_code(child: int) -> int | None:
    "Of a process, waited for; None for one that hangs, which is killed."
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@contextmanager
def caches_being_filled():
    "Another thread computes one length after the other."
    stop = threading.Event()

    def fill():
        for n in range(100, 100_000):
            if stop.is_set(): return
            x = torch.zeros(1, 1, n, 4)
            h.hilbert_attention(x, x, x, segment_size=7)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    filler = threading.Thread(target=fill)
    filler.start()
    try: yield
    finally:
        stop.set()
        filler.join()
        torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks():
    "Children, forked while another thread fills the caches: none hangs, each computes."
    x = tensors()
    expected = [FUNCTIONS[name](*x) for name in FORKED]

    def right(): return all(FUNCTIONS[name](*x).equal(e) for name, e in zip(FORKED, expected))

    with caches_being_filled():
        for _ in range(60 if FULL else 20):
            child = os.fork()
            if not child:
                try: os._exit(0 if right() else 1)
                finally: os._exit(2)
            assert exit_code(child) == 0
