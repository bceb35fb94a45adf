"""What a failed or a fake call leaves behind: nothing. The same valid call is right after it, in threads and in forks."""
import os
import signal
import threading
import time

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.func import functionalize, vmap

from hilbert_attn import (
    block_lists, block_sparse_attention, dilated_attention, hilbert_attention, hilbert_slide_attention,
    hilbert_window_attention, neighborhood_attention, tiles_shared_attention, window_attention)
from hilbert_attn.patterns import NeighborhoodPattern

GRID, N = (9, 11), 99


def blocks(q, k, v, size=16, **options):
    lists = block_lists(NeighborhoodPattern(GRID, 3), curve="hilbert", block_size=size, device=q.device)
    return block_sparse_attention(q, k, v, lists, **options)


FUNCTIONS = {
    "hilbert": lambda q, k, v, size=24, **o: hilbert_attention(q, k, v, grid=GRID, segment_size=size, **o),
    "dilated": lambda q, k, v, size=24, **o: dilated_attention(q, k, v, [size, 99], [1, 3], grid=GRID, **o),
    "window": lambda q, k, v, size=3, **o: window_attention(q, k, v, GRID, size, **o),
    "neighborhood": lambda q, k, v, size=3, **o: neighborhood_attention(q, k, v, GRID, size, **o),
    "hilbert_window": lambda q, k, v, size=24, **o: hilbert_window_attention(q, k, v, GRID, size, **o),
    "hilbert_slide": lambda q, k, v, size=24, **o: hilbert_slide_attention(q, k, v, GRID, size, **o),
    "tiles_shared": lambda q, k, v, size=4, **o: tiles_shared_attention(q, k, v, tiles=size, grid=GRID, **o),
    "blocks": blocks,
}
each = pytest.mark.parametrize("name", FUNCTIONS)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, N, 16, generator=generator) for heads in (2, 1, 1)]


def results(function):
    leaves = [x.requires_grad_() for x in tensors()]
    out, lse = function(*leaves, return_lse=True)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), leaves)]


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


SPOILERS = (spoil_by_tracing, spoil_by_symbols, spoil_by_functionalize, spoil_by_vmap, spoil_by_meta, spoil_by_inference,
            spoil_by_fakes, spoil_by_floats, spoil_by_wrong_shapes)


def forget():
    "Empties the package's caches, so that the spoiling call would be the one to fill them."
    import gc

    from hilbert_attn.common import Cache
    for x in gc.get_objects():
        if type(x) is Cache: x.clear()


@each
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__)
def test_a_valid_call_is_right_afterwards(name, spoil):
    function = FUNCTIONS[name]
    expected = results(function)
    forget()
    try: spoil(function)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error: print(f"{spoil.__name__} of {name}: {error}")  # that it cannot is no harm
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks():
    "Sixty children, forked while another thread fills the caches: none hangs, each computes."
    q, k, v = tensors()
    stop = threading.Event()

    def fill():
        for n in range(100, 100_000):
            if stop.is_set(): return
            hilbert_attention(torch.zeros(1, 1, n, 4), *(torch.zeros(1, 1, n, 4),) * 2, segment_size=7)

    expected = [FUNCTIONS[name](q, k, v) for name in ("hilbert", "neighborhood")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    filler = threading.Thread(target=fill)
    filler.start()
    try:
        for _ in range(60):
            child = os.fork()
            if not child:
                try: os._exit(0 if all(FUNCTIONS[name](q, k, v).equal(x) for name, x in zip(("hilbert", "neighborhood"), expected)) else 1)
                finally: os._exit(2)
            deadline = time.monotonic() + 30
            while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline: time.sleep(0.005)
            if done[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert done == (child, 0)
    finally:
        stop.set()
        filler.join()
        torch.set_num_threads(threads)
