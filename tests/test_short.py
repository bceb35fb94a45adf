"""Short sequences on a CPU: one SDPA call with a mask that was made once, for every function."""
import numpy as np
import pytest
import torch
import torch.distributed as dist

import hilbert_attn.backends as backends
import hilbert_attn.block_sparse as block_sparse
import hilbert_attn.blocks.schedule as schedule
import hilbert_attn.calls as calls_module
import hilbert_attn.cross as cross_module
import hilbert_attn.ring as ring
import hilbert_attn.sdpa as sdpa
from hilbert_attn import (
    DilatedAttention,
    block_sparse_attention,
    dilated_attention,
    hilbert_attention,
    hilbert_slide_attention,
    hilbert_window_attention,
    neighborhood_attention,
    ring_attention,
    ring_dilated_attention,
    set_backend,
    tiles_shared_attention,
    window_attention,
)
from hilbert_attn.backends import POLICY
from hilbert_attn.blocks.planner import block_lists
from hilbert_attn.cross import hilbert_cross_attention
from hilbert_attn.patterns import NeighborhoodPattern
from hilbert_attn.points import point_attention

REAL_POLICY = True
LIMITS = next(row for row in POLICY if row.max_tokens).max_tokens  # of one thread
BLOCKS = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()  # the last one sees nothing
GRID = (6, 8)
POINTS = torch.randperm(48, generator=torch.Generator().manual_seed(4))


def blocks(*x, **options):
    return block_sparse_attention(*x, BLOCKS, block_size=16, **options)


FUNCTIONS = {
    "segments": lambda *x, **o: hilbert_attention(*x, segment_size=10, **o),
    "causal": lambda *x, **o: hilbert_attention(*x, segment_size=20, causal=True, **o),
    "longnet": lambda *x, **o: hilbert_attention(
        *x, grid=GRID, segment_size=12, dilation_rate=3, dilation_mode="longnet", **o),
    "branches": lambda *x, **o: dilated_attention(*x, [8, 16, 64], [1, 2, 4], **o),
    "heads": lambda *x, **o: dilated_attention(*x, [8, 16], [1, 2], combine="heads", **o),
    "window": lambda *x, **o: window_attention(*x, GRID, 4, shift=1, **o),
    "neighborhood": lambda *x, **o: neighborhood_attention(*x, GRID, 3, **o),
    "hilbert_window": lambda *x, **o: hilbert_window_attention(*x, GRID, 10, **o),
    "hilbert_slide": lambda *x, **o: hilbert_slide_attention(*x, GRID, 3, **o),
    "tiles_shared": lambda *x, **o: tiles_shared_attention(*x, tiles=4, shared=3, **o),
    "blocks": blocks,
    "packed": lambda *x, **o: dilated_attention(
        *x, [8, 16], [1, 2], cu_seqlens=[0, 20, 48], curve=None, **o),
    "packed, heads": lambda *x, **o: dilated_attention(
        *x, [8, 16], [1, 2], combine="heads", cu_seqlens=[0, 20, 48], curve=None, causal=True, **o),
    "points": lambda q, k, v, **o: point_attention(q, k, v, POINTS, patch_size=10, **o),
    "cross": lambda *x, **o: hilbert_cross_attention(*x, segment_size=10, key_curve="morton", **o),
}

ALONE = {  # a ring of one process; it has no key mask
    "ring": lambda *x, **o: ring_attention(*x, segment_size=10, dilation_rate=2, **o),
    "ring, dense": lambda *x, **o: ring_attention(*x, causal=True, layout="zigzag", **o),
    "ring, order": lambda *x, **o: ring_attention(*x, segment_size=10, order=POINTS, **o),
    "ring, branches": lambda *x, **o: ring_dilated_attention(*x, [8, None], [1, 2], **o),
    "ring, heads": lambda *x, **o: ring_dilated_attention(
        *x, (8, 16), (1, 2), combine="heads", **o),
}
KNOWN_AGAIN = FUNCTIONS | ALONE


def inputs(n=48, dtype=torch.float32, kv_heads=2):
    torch.manual_seed(n)
    shapes = (2, 4, n, 16), *[(2, kv_heads, n, 16)] * 2
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def results(function, x, **options):
    "Output, gradients with a random upstream one, and where asked for the LSE."
    found = function(*x, **options)
    out, *lse = found if isinstance(found, tuple) else (found,)
    g = torch.Generator().manual_seed(5)
    total = (out * torch.randn(out.shape, generator=g).to(out.dtype)).sum()
    for part in lse:
        total = total + (part.clamp(min=-9) * torch.randn(part.shape, generator=g)).sum()
    return [out, *lse, *torch.autograd.grad(total, x)]


@pytest.fixture
def calls(monkeypatch):
    "What is called, by name."
    found = []

    def count(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **o: found.append(name) or function(*a, **o))
    count(torch.nn.functional, "scaled_dot_product_attention")
    count(sdpa, "attention_mask")
    count(schedule, "lists_from_block_mask")
    return found


@pytest.mark.parametrize("return_lse", (False, True))
@pytest.mark.parametrize("name", KNOWN_AGAIN)
def test_one_call_with_a_kept_mask_is_right(name, return_lse, calls):
    x, function = inputs(), KNOWN_AGAIN[name]
    options = dict(return_lse=return_lse)
    expected = results(function, [y.detach().double().requires_grad_() for y in x],
                       **options, backend="reference")
    sdpa._biases.clear()
    first = results(function, x, **options)
    del calls[:]
    again = results(function, x, **options)
    assert calls == ["scaled_dot_product_attention"]
    for a, b, e in zip(first, again, expected):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_key_mask_is_of_its_call(name):
    x, function = inputs(), FUNCTIONS[name]
    function(*x)
    key_mask = torch.rand(2, 48, generator=torch.Generator().manual_seed(1)) < 0.7
    expected = function(*(y.double() for y in x), key_mask=key_mask, backend="reference")
    torch.testing.assert_close(
        function(*x, key_mask=key_mask).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("branches", "blocks", "longnet"))
def test_half_precision(name, dtype):
    x = inputs(dtype=dtype)
    out = FUNCTIONS[name](*x)
    assert out.dtype == dtype
    exact = FUNCTIONS[name](*(y.double() for y in x), backend="reference")
    assert (out.double() - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("key_mask", (None, torch.arange(96).view(2, 48) % 7 > 0))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_sums_under_autocast(name, dtype, key_mask):
    "The LSE has the precision and the dtype that it has from the engines."
    x, options = inputs(), dict(return_lse=True, key_mask=key_mask)
    with torch.autocast("cpu", dtype): out, lse = FUNCTIONS[name](*x, **options)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    rounded = [y.to(dtype) for y in x]
    exact = FUNCTIONS[name](*(y.double() for y in rounded), **options, backend="reference")[1]
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


def test_how_often_a_key_counts_is_not_rounded():
    "ln 3 in bfloat16 would make a weight of 3 one of 3.009."
    n = 24
    q, k = torch.zeros(2, 1, 1, n, 16, dtype=torch.bfloat16)
    v = torch.zeros(1, 1, n, 16, dtype=torch.bfloat16)
    v[:, :, :8] = 1
    out = dilated_attention(q, k, v, [8, 8, 8, 24], [1, 1, 1, 1], curve=None)
    assert out[0, 0, 0, 0] == torch.tensor(32 / 48).bfloat16()  # 4 times 8 keys, and 16


def test_a_mask_is_made_anew_for_what_changes_it(calls):
    x = inputs()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(2))

    def run(q=x, **options): return hilbert_attention(*q, order=order, segment_size=10, **options)
    sdpa._biases.clear()
    for made, options in ((1, {}), (0, {}), (1, dict(causal=True)), (0, dict(scale=2.0))):
        del calls[:]
        run(**options)
        assert calls.count("attention_mask") == made, options
    before = run()
    order.copy_(order.flip(0).roll(3))
    assert not torch.allclose(run(), before)
    torch.testing.assert_close(run(), run(backend="reference"), rtol=1e-4, atol=1e-5)


def test_block_lists_of_a_mask_are_made_once(calls):
    x, mask = inputs(), BLOCKS.clone()

    def run(): return block_sparse_attention(*x, mask, block_size=16)
    first = run()
    run()
    assert calls.count("lists_from_block_mask") == 1
    mask[2, 2] = True
    assert not torch.equal(run(), first)
    assert calls.count("lists_from_block_mask") == 2


def test_a_kept_mask_of_lists_follows_what_is_written_into_them():
    x, lists = inputs(), block_lists(NeighborhoodPattern(GRID, 3), block_size=16)
    first = block_sparse_attention(*x, lists)
    lists.hi.copy_(lists.lo)
    assert not torch.equal(block_sparse_attention(*x, lists), first)


def test_a_block_is_not_longer_than_the_sequence():
    x, whole = inputs(100), torch.ones(1, 1).bool()
    lists = block_sparse._resolve_lists(whole, 10 ** 6, None, False, *x[:2])
    assert lists.block_size == (112, 112)
    for backend in ("auto", "sdpa", "triton"):
        out = block_sparse_attention(*x, whole, block_size=10 ** 6, backend=backend)
        expected = torch.nn.functional.scaled_dot_product_attention(*x, enable_gqa=True)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=(1, 2))
def limits(request):
    "The longest sequences, by family, that are one call with a mask at this number of threads."
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    rows = [row for row in POLICY if row.max_tokens and row.min_threads <= request.param]
    yield {name: max(row.max_tokens[name] for row in rows) for name in rows[0].max_tokens}
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ("segments", "branches", "heads"))
def test_beyond_the_limit_the_engine_computes(name, limits, calls):
    for length, masked in ((limits[name], True), (limits[name] + 1, False)):
        FUNCTIONS[name](*inputs(length))
        assert ("scaled_dot_product_attention" in calls) == masked
        del calls[:]


def test_several_threads_share_one_call_for_longer(calls):
    before, x = torch.get_num_threads(), inputs(LIMITS["cross"] + 1)
    try:
        for threads, masked in ((1, False), (2, True), (1, False)):
            torch.set_num_threads(threads)
            del calls[:]
            hilbert_cross_attention(*x, segment_size=10, key_curve=None)
            assert ("scaled_dot_product_attention" in calls) == masked
    finally: torch.set_num_threads(before)


def test_a_layer_goes_by_its_family(limits, calls):
    x = [torch.randn(1, limits["segments"] + 8, 2, 16) for _ in "qkv"]
    DilatedAttention([8, 16], [1, 2])(*x)
    assert calls.count("scaled_dot_product_attention") == 1
    del calls[:]
    DilatedAttention([8], [1])(*x)
    assert not calls


@pytest.fixture
def checked(monkeypatch):
    "How many calls had their arguments checked: those that did not come again."
    found, check = [], calls_module.check_tensors

    def count(*a, **o): return found.append(1) or check(*a, **o)
    monkeypatch.setattr(calls_module, "check_tensors", count)
    request = ring.Request.check
    monkeypatch.setattr(ring.Request, "check", lambda own: found.append(1) or request(own))
    backends._short_calls.clear()
    return found


@pytest.mark.parametrize("name", KNOWN_AGAIN)
def test_the_same_call_again_is_one_sdpa(name, checked, calls):
    x, function = inputs(), KNOWN_AGAIN[name]
    function(*x)
    del checked[:], calls[:]
    again = function(*[y.detach().roll(1, 2) for y in x])
    assert calls == ["scaled_dot_product_attention"] and not checked
    backends._short_calls.clear()
    assert torch.equal(again, function(*[y.detach().roll(1, 2) for y in x]))


def test_a_ring_goes_by_what_others_found(checked, calls):
    "A call that the ring comes down to may be known already."
    x = inputs()
    for _ in range(2): hilbert_attention(*x, curve=None, segment_size=10, dilation_rate=2)
    ALONE["ring"](*x)
    del checked[:], calls[:]
    ALONE["ring"](*x)
    assert calls == ["scaled_dot_product_attention"] and not checked


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_only_a_ring_of_one_sends_nothing(group_of_one, monkeypatch, checked):
    x, met = inputs(), []
    expected = ALONE["ring"](*x)

    def begin(group, *rest):
        met.append(group)
        raise RuntimeError("would send")
    monkeypatch.setattr(ring, "begin_call", begin)
    for group in (None, group_of_one): assert torch.equal(ALONE["ring"](*x, group=group), expected)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    for group in (None, group_of_one):
        with pytest.raises(RuntimeError, match="would send"): ALONE["ring"](*x, group=group)
    assert met == [None, group_of_one]


OTHER_CALLS = {
    "length": lambda x: hilbert_attention(*(y[:, :, :-1] for y in x), segment_size=10),
    "dtype": lambda x: hilbert_attention(*(y.double() for y in x), segment_size=10),
    "key/value heads": lambda x: hilbert_attention(x[0], x[1][:, :1], x[2][:, :1], segment_size=10),
    "option": lambda x: hilbert_attention(*x, segment_size=11),
    "function": lambda x: hilbert_window_attention(*x, 48, 10, curve="morton"),
    "scale": lambda x: hilbert_attention(*x, segment_size=10, scale=0.5),
    "LSE": lambda x: hilbert_attention(*x, segment_size=10, return_lse=True)[1],
    "key mask": lambda x: hilbert_attention(
        *x, segment_size=10, key_mask=torch.arange(96).view(2, 48) % 3 > 0),
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_another_call_is_another_one(name, checked):
    x, other = inputs(), OTHER_CALLS[name]
    expected = other(x)
    backends._short_calls.clear()
    hilbert_attention(*x, segment_size=10)
    hilbert_window_attention(*x, 48, 10)
    del checked[:]
    assert torch.equal(other(x), expected) and checked


AROUND = {
    "forced": lambda f: set_backend_around("sdpa", f),
    "the process": lambda f: set_backend_of_the_process("sdpa", f),
    "autocast": lambda f: autocast_around(f),
    "forward-mode": lambda f: torch.func.jvp(lambda q: f(q), (torch.ones(1, 2, 48, 8),),
                                             (torch.ones(1, 2, 48, 8),)),
    "transform": lambda f: torch.func.vmap(f)(torch.ones(2, 1, 2, 48, 8)),
}


def set_backend_around(name, f):
    with set_backend(name): f(torch.ones(1, 2, 48, 8))


def set_backend_of_the_process(name, f):
    set_backend(name)
    try: f(torch.ones(1, 2, 48, 8))
    finally: set_backend("auto")


def autocast_around(f):
    with torch.autocast("cpu", torch.bfloat16):
        assert f(torch.ones(1, 2, 48, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", AROUND)
def test_what_is_around_a_call_counts(name, checked):
    def f(q): return hilbert_attention(q, q, q, segment_size=10)
    f(torch.ones(1, 2, 48, 8))
    f(torch.ones(1, 2, 48, 8))
    assert len(checked) == 1
    AROUND[name](f)
    assert len(checked) == 2


def test_another_policy_is_another_call(checked, monkeypatch):
    x = inputs()
    unmasked = tuple(row for row in POLICY if row.backend != "sdpa_mask")
    for rows in (POLICY, unmasked, POLICY):
        monkeypatch.setattr(backends, "POLICY", rows)
        hilbert_attention(*x, segment_size=10)
    assert len(checked) == 2


def test_what_is_refused_is_refused_after_a_call_that_looks_like_it():
    x = inputs()
    hilbert_attention(*x, segment_size=10, causal=True)
    with pytest.raises(ValueError, match="causal=1"):
        hilbert_attention(*x, segment_size=10, causal=1)
    with pytest.raises(ValueError, match="segment_size=10.0"):
        hilbert_attention(*x, segment_size=10.0, causal=True)
    with pytest.raises(ValueError, match="dtypes"):
        hilbert_attention(x[0], x[1].double(), x[2].double(), segment_size=10, causal=True)


def test_dropout_drops_every_time():
    x = inputs()
    whole = hilbert_attention(*x, segment_size=10)
    for _ in range(3):
        out = hilbert_attention(*x, segment_size=10, dropout_p=0.5)
        assert not torch.allclose(out, whole)


def test_orders_and_masks_that_are_written_into():
    x, mask = inputs(), BLOCKS.clone()
    order = torch.arange(48)
    for change, run in (
        (lambda: order.copy_(order.roll(3)),
         lambda **o: hilbert_attention(*x, order=order, segment_size=10, **o)),
        (lambda: mask.fill_(True),
         lambda **o: block_sparse_attention(*x, mask, block_size=16, **o)),
    ):
        first = run()
        assert torch.equal(run(), first)
        change()
        assert not torch.allclose(run(), first)
        torch.testing.assert_close(run(), run(backend="reference"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option, first, second, refused", (
    ("causal", np.bool_(True), np.int8(1), "causal"),
    ("segment_size", np.int64(4), np.array([[4]]), "segment_size"),
    ("scale", np.int64(1), np.int64(1).view(np.float64), None),
))
def test_numbers_of_numpy_keep_their_types(option, first, second, refused):
    x = [torch.randn(1, 2, 16, 8) for _ in "qkv"]
    hilbert_attention(*x, **dict(segment_size=4) | {option: first})
    def again(): return hilbert_attention(*x, **dict(segment_size=4) | {option: second})
    if refused is None:
        kept = again()
        backends._short_calls.clear()
        assert torch.equal(kept, again())
        return
    with pytest.raises(ValueError, match=refused): again()


def test_an_order_in_other_memory_is_another_one():
    x, order = inputs(), torch.arange(48)
    first = hilbert_attention(*x, order=order, segment_size=10)
    order.data = torch.arange(48).roll(3)
    again = hilbert_attention(*x, order=order, segment_size=10)
    assert not torch.equal(again, first)


def test_a_backend_that_is_named_does_not_ask_the_environment(monkeypatch):
    monkeypatch.setenv("HILBERT_ATTN_BACKEND", "typo")
    x = inputs()
    hilbert_attention(*x, segment_size=10, backend="sdpa")
    with pytest.raises(ValueError, match="HILBERT_ATTN_BACKEND='typo'"):
        hilbert_attention(*x, segment_size=10)


def test_a_call_that_came_before_asks_the_environment_again(monkeypatch):
    x = inputs()
    for _ in range(2): hilbert_attention(*x, segment_size=10)
    monkeypatch.setenv("HILBERT_ATTN_BACKEND", "typo")
    with pytest.raises(ValueError, match="HILBERT_ATTN_BACKEND='typo'"):
        hilbert_attention(*x, segment_size=10)
    monkeypatch.setenv("HILBERT_ATTN_BACKEND", "reference")
    named = hilbert_attention(*x, segment_size=10, backend="reference")
    assert torch.equal(hilbert_attention(*x, segment_size=10), named)


def test_lists_of_other_numbers_are_another_call():
    x = inputs()
    calls = [([8, 16], [1, 2]), ([16, 8], [1, 2]), ([8, 16], [2, 1]), ([8, 16], [1, 2])]
    first, *others, again = [dilated_attention(*x, *call) for call in calls]
    assert torch.equal(first, again)
    for call, found in zip(calls[1:], others):
        assert not torch.equal(found, first)
        exact = dilated_attention(*x, *call, backend="reference")
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_many_keys_make_a_cross_attention_long(monkeypatch):
    masked = []
    def spy(q, k, *args, **options):
        masked.append(k.shape[2])
        return sdpa.attend_kept(q, k, *args, **options)
    monkeypatch.setattr(cross_module, "attend_kept", spy)
    backends._short_calls.clear()
    q = torch.randn(1, 1, 200, 8)
    for m in (200, 4096):
        k = torch.randn(1, 1, m, 8)
        hilbert_cross_attention(q, k, k, segment_size=10)
    assert masked == [200]
    assert not sdpa._can_keep(q, k, None) and sdpa._can_keep(q[:, :, :1], k, None)


DENSE = {
    "segments": hilbert_attention,
    "long segments": lambda *x, **o: hilbert_attention(*x, segment_size=9000, **o),
    "ring": ring_attention,
}


@pytest.mark.parametrize("name", DENSE)
def test_one_segment_of_any_length_is_one_sdpa(name, monkeypatch):
    "Unless something is asked for that only the operator has."
    called = []
    real = sdpa._groups_attention
    monkeypatch.setattr(sdpa, "_groups_attention", lambda *x: called.append(1) or real(*x))
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 16, 700).transpose(2, 3).requires_grad_() for _ in range(3))
    ours = DENSE[name](q, k, v)
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.contiguous() for x in (q, k, v)))
    dout = torch.randn_like(ours)
    grads = [torch.autograd.grad(out, (q, k, v), dout) for out in (ours, theirs)]
    for a, b in zip((ours, *grads[0]), (theirs, *grads[1])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not called
    out, lse = DENSE[name](q, k, v, return_lse=True)
    torch.testing.assert_close(out, ours, rtol=1e-5, atol=1e-6)
    assert len(called) == 1 and lse.shape == (1, 2, 700)
    DENSE[name](q, k, v, causal=True)
    assert len(called) == 2
