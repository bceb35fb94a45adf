"""Forcing a backend for a call, a block or the process; threads and recomputation keep to it."""
import asyncio
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hilbert_attn import DilatedAttention, HilbertAttentionCore, backends
from hilbert_attn.backends import _process_default, choose_backend, explain_backend, set_backend
from hilbert_attn.block_layers import BlockSparseAttention, RingBlockSparseAttention
from hilbert_attn.ring_layers import RingDilatedAttention

CPU = torch.device("cpu")
NAMES = ("reference", "sdpa_mask", "sdpa")


def replace_choice(monkeypatch, noted):
    "In every module that has taken the function by name."
    ours = [module for name, module in sys.modules.items() if name.startswith("hilbert_attn.")]
    for module in ours:
        for name in ("choose_backend",):
            if name in vars(module): monkeypatch.setattr(module, name, noted)


def chosen(**options) -> str: return choose_backend("auto", CPU, **options)[0]


@pytest.fixture(autouse=True)
def nothing_stays_forced():
    yield
    assert chosen() == "sdpa" and _process_default.name == "auto"


@pytest.fixture
def process_default():
    set_backend("sdpa_mask")
    yield "sdpa_mask"
    set_backend("auto")


def in_thread(function):
    with ThreadPoolExecutor(1) as pool: return pool.submit(function).result(timeout=60)


def test_interleaved_blocks_of_two_threads():
    turn = [threading.Event() for _ in range(4)]
    seen = []

    def first():
        with set_backend("reference"):
            turn[0].set()
            assert turn[1].wait(30)
            seen.append(chosen())
        turn[2].set()

    def second():
        assert turn[0].wait(30)
        with set_backend("sdpa_mask"):
            turn[1].set()
            assert turn[2].wait(30)
            seen.append(chosen())

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]: done.result(timeout=60)
    assert seen == ["reference", "sdpa_mask"] and chosen() == "sdpa"


def test_16_threads(process_default):
    def work(seed):
        for i in range(200):
            name, inner = NAMES[(seed + i) % 3], NAMES[(seed + 2 * i) % 3]
            with set_backend(name):
                assert chosen() == name
                with set_backend(inner): assert chosen() == inner
                assert chosen() == name

    with ThreadPoolExecutor(16) as pool: list(pool.map(work, range(16)))
    assert chosen() == process_default


def test_a_block_is_its_own_threads_and_a_plain_call_everybodys(process_default):
    assert in_thread(chosen) == process_default
    with set_backend("reference"):
        assert chosen() == "reference" and in_thread(chosen) == process_default
        set_backend("sdpa")  # for the process: the block wins until it ends
        assert chosen() == "reference" and in_thread(chosen) == "sdpa"
        with set_backend("auto"): assert chosen() == "sdpa"
    assert chosen() == "sdpa"


def test_one_block_opened_twice():
    block = set_backend("reference")
    with block:
        with block: pass
        assert chosen() == "reference"


def test_tasks_have_their_own_blocks():
    async def work(name):
        with set_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                assert chosen() == name

    async def all_of_them(): await asyncio.gather(*(work(name) for name in NAMES * 4))
    asyncio.run(all_of_them())


def test_plain_calls_do_not_pile_up():
    for _ in range(1000): set_backend("auto")
    assert len(_process_default.calls) < 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_can_force_whatever_the_parent_was_doing():
    with _process_default.lock:
        if not (child := os.fork()):
            set_backend("reference")
            os._exit(0 if chosen() == "reference" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Deep(torch.autograd.Function):
    "A backward inside a backward, so deep that autograd goes on in a thread of its own."
    seen: list = []

    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Deep.seen.append((threading.get_ident(), chosen()))
        with torch.enable_grad():
            leaf = torch.ones((), requires_grad=True)
            if ctx.depth: Deep.apply(leaf, ctx.depth - 1).backward()
        return gradient, None


def test_threads_of_a_backward_see_the_block_around_it():
    Deep.seen.clear()
    with set_backend("reference"): Deep.apply(torch.ones((), requires_grad=True), 64).backward()
    others = [name for thread, name in Deep.seen if thread != threading.get_ident()]
    assert others and others[0] == "reference"
    Deep.seen.clear()
    Deep.apply(torch.ones((), requires_grad=True), 64).backward()
    assert {name for _, name in Deep.seen} == {"sdpa"}


def free(layer): return layer, [torch.randn(1, 80, 2, 8) for _ in range(3)]


CHECKPOINTED = {
    "core": lambda: (HilbertAttentionCore(16, 2, 8, checkpoint=True), [torch.randn(1, 80, 16)]),
    "dilated": lambda: free(DilatedAttention([8, 40], [1, 2], checkpoint=True)),
    "ring": lambda: free(RingDilatedAttention([8, 40], [1, 2], checkpoint=True)),
    "blocks": lambda: free(BlockSparseAttention(block_size=16, checkpoint=True)),
    "block ring": lambda: free(RingBlockSparseAttention(block_size=16, checkpoint=True)),
}


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.parametrize("block_in_backward", (False, True))
def test_recomputation_runs_what_the_forward_ran(name, block_in_backward, monkeypatch):
    "Whatever is forced when the backward comes."
    used, choose = [], backends.choose_backend

    def noted(backend, *a, **options):
        found = choose(backend, *a, **options)
        used.append(found[0])
        return found

    layer, inputs = CHECKPOINTED[name]()
    replace_choice(monkeypatch, noted)
    leaves = [x.requires_grad_() for x in inputs]
    with set_backend("auto" if block_in_backward else "reference"): out = layer(*leaves)
    forward = set(used)
    used.clear()
    with set_backend("sdpa_mask"): out.sum().backward()
    assert forward == ({"sdpa"} if block_in_backward else {"reference"})
    assert set(used) <= forward


def test_a_compiled_graph_is_made_anew_for_another_block():
    def f(x): return x + NAMES.index(chosen())
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    x = torch.zeros(())
    assert compiled(x) == 2
    with set_backend("sdpa_mask"):
        assert compiled(x) == 1
        assert in_thread(lambda: compiled(x)) == 2
        with set_backend("reference"): assert compiled(x) == 0
        assert compiled(x) == 1
    assert compiled(x) == 2
    set_backend("reference")
    assert compiled(x) == 0
    set_backend("auto")
    assert compiled(x) == 2


PLAIN = {
    "core": lambda **o: (HilbertAttentionCore(16, 2, 8, **o), [torch.randn(1, 80, 16)]),
    "one branch": lambda **o: free(DilatedAttention(8, 1, **o)),
    "mixed": lambda **o: free(DilatedAttention([8, 40], [1, 2], **o)),
    "heads": lambda **o: free(DilatedAttention([8, 40], [1, 2], combine="heads", **o)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_without_the_custom_backward_a_forced_backend_runs_or_is_an_error(name, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    counts = dict.fromkeys(("reference", "sdpa_mask", "sdpa"), 0)

    def counted(which, function):
        def call(*a, **options):
            counts[which] += 1
            assert which != "sdpa" or options["custom_backward"] is False
            return function(*a, **options)
        return call

    for which in counts:
        place = f"{which}_attention"
        monkeypatch.setattr(backends, place, counted(which, getattr(backends, place)))
    for forced in ("auto", *counts):
        layer, inputs = PLAIN[name](use_custom_backward=False, backend=forced)
        counts.update(dict.fromkeys(counts, 0))
        layer(*inputs)
        taken = [which for which, n in counts.items() if n]
        assert taken == ["sdpa" if forced == "auto" else forced]
    layer, inputs = PLAIN[name](use_custom_backward=False, backend="triton")
    refused = "asked for by the argument backend, .* no plain PyTorch"
    with pytest.raises(RuntimeError, match=refused): layer(*inputs)
    layer, inputs = PLAIN[name](use_custom_backward=False)
    with set_backend("triton"):
        refused = "asked for by set_backend, .* no plain PyTorch"
        with pytest.raises(RuntimeError, match=refused): layer(*inputs)


def test_a_ring_has_no_plain_expression():
    refused = "use_custom_backward=False: attention over a ring has its own"
    with pytest.raises(ValueError, match=refused):
        RingDilatedAttention([8], [1], use_custom_backward=False)


def test_names_are_checked():
    for name in ("fast", None, 3):
        with pytest.raises(ValueError, match="known backends are 'auto'"): set_backend(name)
    assert explain_backend((1, 1, 200, 16)).backend == "sdpa"
