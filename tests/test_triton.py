"""The Triton kernels, in Triton's interpreter where there is no GPU: against the oracle, forward and backward, in everything that they claim."""
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from sampling import examples

pytest.importorskip("triton")
from hilbert_attn.autograd import HilbertAttentionFunction, HybridAttentionFunction, triton_attention, triton_backward, triton_forward
from hilbert_attn.curves import curve_order
from hilbert_attn.kernels import forward
from hilbert_attn.kernels.backward import attention_backward
from hilbert_attn.kernels.forward import Tile, TileCache, Workload, attention_forward, default_tile, fit_tile, hilbert_attention_kernel, split_head_dim, standard_attention_kernel
from hilbert_attn.patterns import DILATION_MODES, SegmentPattern, attention_mask
from hilbert_attn.reference import assert_matches_oracle, masked_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not forward.interpreted, reason="needs an NVIDIA GPU, or TRITON_INTERPRET=1 before Python starts")


@pytest.fixture(autouse=True, scope="module")
def quick_interpreter():
    """Takes two thirds off the interpreter's time. It patches triton.language anew whenever a kernel calls a helper; once per kernel is enough, and once for Triton's own library.
    And a kernel runs below a frame with 40,000 variables, because CPython otherwise maps and unmaps memory at each call whose frame happens to cross a 16 KB boundary of its stack."""
    if not forward.interpreted: yield; return
    from triton.runtime import interpreter
    original, patched = interpreter.InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if not module.startswith("hilbert_attn") and module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    names = {}
    exec(f"def roomy(run):\n    if run is None: {' = '.join(f'x{i}' for i in range(40_000))} = 0\n    return run()", names)
    launch = interpreter.GridExecutor.__call__
    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = lambda self, *args, **kwargs: names["roomy"](lambda: launch(self, *args, **kwargs))
    yield
    interpreter.InterpretedFunction.__call__, interpreter.GridExecutor.__call__ = original, launch


def poison(run):
    "Runs with memory in which nobody wrote filled with NaN."
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        return run()
    finally: torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned():
    "The same for a whole test."
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float32, seed=0): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def on_device(q, k, v, pattern, *, order, causal, key_mask, scale):
    "`triton_attention`, wherever the tensors come from."
    move = lambda x: None if x is None else x.to(DEVICE)
    out, lse = triton_attention(*map(move, (q, k, v)), pattern, order=move(order), causal=causal, key_mask=move(key_mask), scale=scale)
    return out.to(q.device), lse.to(q.device)


class Kernels(torch.autograd.Function):
    "The kernels with given tiles, below the operators."
    @staticmethod
    def forward(ctx, q, k, v, pattern, options, tile):
        ctx.rest = (pattern.segment_size, pattern.dilation_rate, pattern.mode, pattern.offsets), options, tile
        out, lse = attention_forward(q, k, v, *ctx.rest[0], **options, tile=tile)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        fields, options, tile = ctx.rest
        tiles = tile and {"dq": Tile(tile.block_m, tile.block_n, tma=tile.tma), "dkv": Tile(tile.block_n, tile.block_m, tma=tile.tma)}
        return *attention_backward(*ctx.saved_tensors, dout, dlse, *fields, **options, tiles=tiles), None, None, None


@examples(30, 100)
@given(cases(max_n=48, head_dims=(16, 20, 24, 32, 40, 48, 64, 80)))
def test_equals_the_oracle(case): poison(lambda: case.check(on_device))


@st.composite
def tiles(draw):
    "A small call that several tiles share, and how it is cut."
    n = draw(st.integers(20, 64))
    w = draw(st.integers(17, n))
    r = draw(st.integers(1, 3))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    mode = draw(st.sampled_from(DILATION_MODES))
    pattern = SegmentPattern(n, w, r, mode, (0,) if mode == "residue" else draw(st.tuples(*[st.integers(0, r - 1)] * heads)))
    d, ordered = draw(st.sampled_from([16, 32, 48])), draw(st.booleans())
    tile = Tile(*draw(st.sampled_from([(16, 16), (32, 16), (16, 32)])), overlap=draw(st.booleans()), tma=draw(st.booleans()))  # tma where descriptors are possible
    return pattern, tile, (heads, kv_heads, d), ordered, draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])), draw(st.integers(0, 999))


@examples(20, 60)
@given(tiles())
def test_every_tile_equals_the_oracle(case):
    pattern, tile, (heads, kv_heads, d), ordered, causal, masked, dtype, seed = case
    generator, n = torch.Generator().manual_seed(seed), pattern.seq_len
    q, k, v = (randn(1, h, n, d, dtype=dtype, seed=seed + i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    options = dict(order=torch.randperm(n, generator=generator).to(DEVICE) if ordered else None, causal=causal,
                   key_mask=(torch.rand(1, n, generator=generator) < 0.7).to(DEVICE) if masked else None)
    poison(lambda: assert_matches_oracle(lambda *x: Kernels.apply(*x, pattern, options, tile), q, k, v, attention_mask(pattern, **options, device=DEVICE)))


@pytest.mark.parametrize("n, w, r, mode", [(1, 1, 1, "residue"), (63, 63, 2, "residue"), (65, 30, 7, "keys"), (65, 64, 3, "longnet"), (1000, 700, 7, "residue"), (1000, 1000, 3, "keys"), (1000, 333, 2, "longnet")])
def test_odd_sizes(poisoned, n, w, r, mode):
    pattern = SegmentPattern.for_heads(n, 2, w, r, mode)
    q, k, v = (randn(1, h, n, 16, seed=h) for h in (2, 1, 1))
    options = dict(order=torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(DEVICE))
    tile = Tile(128, 64) if n == 1000 else None
    assert_matches_oracle(lambda *x: Kernels.apply(*x, pattern, options, tile), q, k, v, attention_mask(pattern, **options, device=DEVICE))


@pytest.mark.parametrize("causal", [False, True])
def test_odd_sizes_without_an_order(poisoned, causal):
    pattern = SegmentPattern(1000, 700, 3)
    q, k, v = (randn(1, 1, 1000, 16, seed=h) for h in range(3))
    assert_matches_oracle(lambda *x: Kernels.apply(*x, pattern, dict(causal=causal), Tile(128, 64, overlap=True)), q, k, v, attention_mask(pattern, causal=causal, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [16, 17, 48, 72, 80, 96, 100, 128, 160, 192, 256])
def test_head_dims(poisoned, d, dtype):
    pattern = SegmentPattern(40, 36, 2)
    q, k, v = (randn(1, h, 40, d, dtype=dtype, seed=h) for h in (2, 1, 1))
    options = dict(order=torch.randperm(40, generator=torch.Generator().manual_seed(d)).to(DEVICE))
    for tile in (None, Tile(16, 16)):
        assert_matches_oracle(lambda *x: Kernels.apply(*x, pattern, options, tile), q, k, v, attention_mask(pattern, **options, device=DEVICE))


def test_columns_are_split_into_powers_of_two():
    assert {d: split_head_dim(d) for d in (16, 20, 48, 64, 80, 96, 112, 160, 192, 256)} == {
        16: (16, 0), 20: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 112: (128, 0), 160: (128, 32), 192: (128, 64), 256: (256, 0)}
    for d in range(16, 257):
        a, b = split_head_dim(d)
        assert a + b >= d and math.log2(a).is_integer() and (b == 0 or math.log2(b).is_integer())


@pytest.mark.parametrize("mode", DILATION_MODES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(mode, causal):
    pattern = SegmentPattern(9, 7, 2, mode, (0,) if mode == "residue" else (1, 0))
    q, k, v = (randn(1, h, 9, 2, dtype=torch.float64, seed=h).requires_grad_() for h in (2, 1, 1))
    order, key_mask = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE), torch.tensor([[True] * 6 + [False] + [True] * 2], device=DEVICE)

    def attend(q, k, v):
        out, lse = triton_attention(q, k, v, pattern, order=order, causal=causal, key_mask=key_mask)
        return out, lse.masked_fill(lse == -torch.inf, 0)  # numerical differences of infinities are NaN

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=mode != "residue" or causal)


def test_scales_of_any_sign():
    q, k, v = (randn(1, 1, 20, 16, seed=i) for i in range(3))
    pattern = SegmentPattern(20, 20)
    for scale in (-0.5, 0.0, 2.0): assert_matches_oracle(lambda *x: triton_attention(*x, pattern, scale=scale), q, k, v, attention_mask(pattern, device=DEVICE), scale=scale)


@pytest.mark.parametrize("mode", DILATION_MODES)
def test_what_lies_in_masked_tokens_does_not_matter(mode):
    pattern = SegmentPattern.for_heads(40, 2, 40, 2, mode)
    q, k, v = (randn(1, 2, 40, 16, seed=i) for i in range(3))
    key_mask = torch.rand(1, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    dirty = [x.masked_fill(~key_mask[:, None, :, None], bad) for x, bad in ((k, torch.nan), (v, torch.inf))]
    runs = []
    for kv in ((k, v), dirty):
        x = [q.clone().requires_grad_(), *(t.clone().requires_grad_() for t in kv)]
        out, lse = triton_attention(*x, pattern, key_mask=key_mask)
        runs.append([out, lse, *torch.autograd.grad(out, x, q)])
    assert all(torch.equal(a, b) for a, b in zip(*runs)) and runs[1][0].isfinite().all()


def test_a_key_mask_with_any_strides(poisoned):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 16, generator=generator).to(DEVICE) for _ in range(3))
    key_mask = (torch.rand(40, 2, generator=generator) < 0.5).to(DEVICE).T
    pattern = SegmentPattern(40, 20, 2)
    assert_matches_oracle(lambda q, k, v: triton_attention(q, k, v, pattern, key_mask=key_mask), q, k, v, attention_mask(pattern, key_mask=key_mask, device=q.device))


def test_rows_without_keys_are_zero_and_pass_no_gradient(poisoned):
    pattern = SegmentPattern(9, 4, 3, "keys", (2,))  # the last segment has one position: no key of residue 2
    q, k, v = (randn(1, 1, 9, 16, seed=i).requires_grad_() for i in range(3))
    out, lse = triton_attention(q, k, v, pattern)
    assert (out[:, :, 8] == 0).all() and (lse[:, :, 8] == -torch.inf).all() and out.isfinite().all()
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.full_like(lse, torch.nan).where(lse == -torch.inf, 1.0)))
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, 8] == 0).all()


def test_offsets_beyond_int32(monkeypatch):
    "Three tokens, each 2^30 elements after the one before, in memory that is never touched."
    if forward.interpreted:  # it would copy the storage onto itself
        from triton.runtime.interpreter import GridExecutor
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    step = 2 ** 30
    storage = torch.empty(2 * step + 256, dtype=torch.float16, device=DEVICE)
    q, k, v, do = (storage.as_strided((1, 1, 3, 32), (step, step, step, 1), 32 * i) for i in range(4))
    small = [randn(1, 1, 3, 32, dtype=torch.float16, seed=i) for i in range(4)]
    for x, y in zip((q, k, v, do), small): x.copy_(y)
    for order in (None, torch.tensor([2, 0, 1], device=DEVICE)):
        far, near = ([*attention_forward(*x[:3], 3, order=order)] for x in ((q, k, v), small))
        far += attention_backward(q, k, v, *far, do, None, 3, order=order)
        near += attention_backward(*small[:3], *near, small[3], None, 3, order=order)
        assert all(torch.equal(a, b) for a, b in zip(far, near))
        for tiles in (dict(dq=Tile(16, 16), dkv=Tile(16, 16)),):
            assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(attention_backward(q, k, v, *near[:2], do, None, 3, mode="keys", order=order, tiles=tiles), near[2:]))


@pytest.mark.parametrize("mode", DILATION_MODES)
def test_bit_identical_repeats(mode):
    pattern = SegmentPattern.for_heads(70, 4, 50, 2, mode)
    x = [randn(2, h, 70, 16, dtype=torch.bfloat16, seed=h).requires_grad_() for h in (4, 2, 2)]
    runs = []
    for _ in range(2):
        out, lse = triton_attention(*x, pattern, order=curve_order((7, 10), device=DEVICE))
        runs.append([out, lse, *torch.autograd.grad((out, lse), x, (out, lse.nan_to_num(neginf=0)))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_layouts_are_kept():
    q, k, v = (randn(2, 30, 3, 16, seed=i).transpose(1, 2).requires_grad_() for i in range(3))
    out, _ = triton_attention(q, k, v, SegmentPattern(30, 10))
    assert out.stride() == q.stride()
    assert all(g.stride() == q.stride() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_historic_names():
    q, k, v = (randn(1, 2, 24, 16, seed=i) for i in range(3))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for ours, theirs in ((hilbert_attention_kernel(q, k, v, order, 12, 2), triton_attention(q, k, v, SegmentPattern(24, 12, 2), order=order)),
                         (standard_attention_kernel(q, k, v), triton_attention(q, k, v, SegmentPattern(24, 24)))):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


# operators

def operator_arguments(requires_grad=True, **changes):
    x = [randn(1, h, 20, 16, dtype=torch.float64, seed=h).requires_grad_(requires_grad) for h in (2, 1, 1)]
    settings = dict(order=torch.randperm(20, generator=torch.Generator().manual_seed(0)).to(DEVICE), key_mask=None, seed=None, segment_size=10, dilation_rate=2, mode="longnet", offsets=[0, 1], causal=True, scale=0.25, dropout_p=0.0)
    return (*x, *(settings | changes).values())


@pytest.mark.parametrize("changes", [{}, dict(order=None, causal=False, mode="residue", offsets=[0]), dict(seed=torch.tensor([3], device=DEVICE), dropout_p=0.5), dict(key_mask=torch.ones(1, 20, dtype=torch.bool, device=DEVICE))], ids=["order", "plain", "dropout", "mask"])
def test_opcheck_forward(changes): torch.library.opcheck(triton_forward, operator_arguments(**changes))


def test_opcheck_backward():
    q, k, v, *settings = operator_arguments(False)
    out, lse = triton_forward(q, k, v, *settings)
    for dlse in (None, randn(1, 2, 20, dtype=torch.float64)):
        torch.library.opcheck(triton_backward, (q, k, v, out, lse, randn(1, 2, 20, 16, dtype=torch.float64), dlse, *settings))


def test_the_function_and_the_operator_are_one():
    arguments = operator_arguments()
    ours, theirs = (torch.autograd.grad(f(*arguments)[0].square().sum(), arguments[:3]) for f in (HilbertAttentionFunction.apply, triton_forward))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_only_the_lse():
    q, k, v, *settings = operator_arguments(order=None, causal=False, mode="residue", offsets=[0])
    _, lse = triton_forward(q, k, v, *settings)
    mask = SegmentPattern(20, 10, 2).mask().to(DEVICE)
    expected = torch.autograd.grad(masked_attention(q, k, v, mask, 0.25)[1].sum(), (q, k))
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), (q, k)), expected)


class Attend(torch.nn.Module):
    def forward(self, q, k, v, order=None):
        out, lse = triton_attention(q, k, v, SegmentPattern(q.shape[2], 8, 2), order=order, causal=True)
        return out * 2 + lse[..., None].to(out.dtype)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Attend(), fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (16, 27) if dynamic else (16,):
        x = [randn(1, h, n, 16, seed=h).requires_grad_() for h in (2, 1, 1)]
        for order in (None, torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(DEVICE)):
            ours, theirs = ((out := f(*x, order), *torch.autograd.grad(out.square().sum(), x)) for f in (compiled, Attend()))
            torch.testing.assert_close(ours, theirs)


def test_a_dense_segment_follows_a_symbolic_length():
    torch._dynamo.reset()
    dense = lambda q: triton_attention(q, q, q, SegmentPattern.for_heads(q.shape[2], 1))[0]
    compiled = torch.compile(dense, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (20, 33): assert torch.equal(compiled(q := randn(1, 1, n, 16)), dense(q))


@pytest.mark.parametrize("dynamic", [False, True])
def test_exports(dynamic):
    x = [randn(1, h, 24, 16, seed=h) for h in (2, 1, 1)]
    shapes = {**{name: {2: torch.export.Dim("tokens", min=8, max=1 << 20)} for name in "qkv"}, "order": None} if dynamic else None
    program = torch.export.export(Attend(), (*x, None), dynamic_shapes=shapes)
    y = [randn(1, h, 33 if dynamic else 24, 16, seed=h) for h in (2, 1, 1)]
    torch.testing.assert_close(program.module()(*y, None), Attend()(*y))


# dropout

def dropped(p, seed, n=32, order=None, **options):
    "The mask of kept weights, made visible by values that are the unit matrix."
    q, k = (randn(1, 2, n, n, dtype=torch.float64, seed=i) for i in range(2))
    eye = torch.eye(n, dtype=torch.float64, device=DEVICE).expand(1, 2, n, n)
    return attention_forward(q, k, eye, n, order=order, dropout_p=p, seed=torch.tensor([seed], device=DEVICE), **options)[0] != 0


def test_dropout_depends_on_seed_head_and_tokens_only():
    kept = dropped(0.4, 1)
    assert torch.equal(kept, dropped(0.4, 1, tile=Tile(16, 16))) and torch.equal(kept, dropped(0.4, 1, order=torch.randperm(32, generator=torch.Generator().manual_seed(0)).to(DEVICE)))
    assert not torch.equal(kept, dropped(0.4, 2)) and not torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(dropped(0.4, 1, n=64)[:, 0, :32, :32], kept[:, 0])
    shares = [dropped(p, 3, n=64).double().mean().item() for p in (0.1, 0.5, 0.9)]
    assert all(abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / 2 / 64 ** 2) for share, p in zip(shares, (0.1, 0.5, 0.9)))


@pytest.mark.parametrize("tile", [None, Tile(16, 16)])
@pytest.mark.parametrize("mode", ["residue", "keys"])
def test_dropout_backward_has_the_same_mask(mode, tile):
    n, p = 32, 0.3
    q, k, v = (randn(1, 2, n, n, dtype=torch.float64, seed=i).requires_grad_() for i in range(3))
    options = dict(order=torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(DEVICE), causal=True, dropout_p=p, seed=torch.tensor([5], device=DEVICE))
    pattern = SegmentPattern(n, n, 2 if mode == "keys" else 1, mode, (1,) if mode == "keys" else (0,))
    eye = torch.eye(n, dtype=torch.float64, device=DEVICE).expand(1, 2, n, n)
    kept = Kernels.apply(q.detach(), k.detach(), eye, pattern, options, tile)[0] != 0
    mask = attention_mask(pattern, order=options["order"], causal=True, device=DEVICE)

    def plain(q, k, v):
        scores = (q @ k.mT * n ** -0.5).masked_fill(~mask, -torch.inf)
        lse = scores.masked_fill(~mask.any(-1, keepdim=True), 0).logsumexp(-1)
        return ((scores - lse[..., None]).exp() * kept / (1 - p)) @ v, lse.masked_fill(~mask.any(-1), 0)

    upstream = randn(1, 2, n, n, dtype=torch.float64, seed=9), randn(1, 2, n, dtype=torch.float64, seed=8)
    ours = Kernels.apply(q, k, v, pattern, options, tile)
    theirs = plain(q, k, v)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), (upstream[0], upstream[1] * mask.any(-1))))


def test_dropout_keeps_the_mean_and_follows_torchs_generator():
    q, k, v = (randn(1, 1, 16, 16, seed=i) for i in range(3))
    pattern = SegmentPattern(16, 16)
    exact, _ = triton_attention(q, k, v, pattern)
    runs = torch.stack([triton_attention(q, k, v, pattern, dropout_p=0.2)[0] for _ in range(150)])
    assert (runs.mean(0) - exact).abs().max() < 5 * (runs.std(0) / math.sqrt(150)).max()
    torch.manual_seed(3); first = triton_attention(q, k, v, pattern, dropout_p=0.2)[0]
    torch.manual_seed(3); assert torch.equal(first, triton_attention(q, k, v, pattern, dropout_p=0.2)[0])
    assert (triton_attention(q, k, v, pattern, dropout_p=1.0)[0] == 0).all()


# the hybrid, tiles, and where it can't run

@pytest.mark.parametrize("ordered", [False, True])
def test_hybrid(ordered):
    order = curve_order((6, 8), device=DEVICE) if ordered else None
    q, k, v = (randn(1, 2, 48, 16, seed=i) for i in range(3))
    pattern = SegmentPattern(48, 24, 3)
    assert_matches_oracle(lambda *x: HybridAttentionFunction.apply(*x, order, 24, 3, 0.25), q, k, v, attention_mask(pattern, order=order, device=DEVICE), scale=0.25, lse_grad=False)
    with pytest.raises(ValueError, match="r to divide w"): HybridAttentionFunction.apply(q, k, v, order, 20, 3, 0.25)


def test_tiles_fit_their_groups():
    for capability in ((0, 0), (8, 0), (9, 0), (10, 0)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for d in (16, 64, 80, 128, 256):
                for q_rows, k_rows in ((1, 1), (5, 5), (16, 16), (33, 33), (64, 64), (100, 100), (128, 128), (1000, 1000), (64, 16), (4096, 20), (7, 3)):
                    fit = fit_tile(default_tile("forward", d, dtype, capability), q_rows, k_rows, d, dtype, capability)
                    m, n = fit.tile.block_m, fit.tile.block_n
                    assert m >= 16 and n >= 16 and m % fit.pack == 0 and n % fit.pack == 0
                    if fit.pack > 1: assert fit.single and m // fit.pack >= q_rows
                    if fit.single: assert n // fit.pack >= k_rows


def test_tuned_tiles_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("HILBERT_ATTN_CACHE", str(tmp_path / "cache"))
    one, other = TileCache(), TileCache()
    assert one.get("a") is None and other.get("b") is None
    one.put("a", Tile(64, 32, 4, 2, overlap=True)); other.put("b", Tile(128, 64))  # two processes that know nothing of each other
    fresh = TileCache()
    assert fresh.get("a") == Tile(64, 32, 4, 2, overlap=True) and fresh.get("b") == Tile(128, 64)
    forward.tile_cache_path().write_text("{ not json")
    assert TileCache().get("a") is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("HILBERT_ATTN_CACHE", str(blocked))
    (cache := TileCache()).put("a", Tile(16, 16))
    assert cache.get("a") == Tile(16, 16)  # in memory, where the disk refuses


def run_python(code, **environment):
    "A fresh process, without the interpreter unless asked for."
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=inherited | environment, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


ATTEMPT = """
import torch
from hilbert_attn.autograd import triton_attention
from hilbert_attn.patterns import SegmentPattern
x = torch.randn(1, 1, 8, 16)
try: triton_attention(x, x, x, SegmentPattern(8, 8))
except RuntimeError as e: print(e)
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="is about CPUs")
def test_says_why_it_cannot_run():
    said = run_python(ATTEMPT)
    assert "NVIDIA GPU" in said and "TRITON_INTERPRET=1" in said and "backend='sdpa'" in said


def test_imports_where_triton_is_missing():
    said = run_python("import torch, sys\nsys.modules['triton'] = None\nimport hilbert_attn, hilbert_attn.kernels.forward, hilbert_attn.kernels.backward\n" + ATTEMPT)
    assert "package triton" in said and "backend='sdpa'" in said


def test_tf32_only_where_torch_was_told_so():
    assert forward._precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try: assert forward._precision(torch.float32) == "tf32" and forward._precision(torch.float64) == "ieee"
    finally: torch.backends.cuda.matmul.fp32_precision = "none"


def test_the_tuner_knows_what_a_tile_may_depend_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    usual = dict(kernel="dkv", head_dim=128, keys=1000, heads=(8, 2), dtype=torch.bfloat16)
    changes = [{}, dict(kernel="dq"), dict(head_dim=64), dict(keys=100), dict(heads=(8, 8)), dict(dtype=torch.float16),
               dict(traits=("dropout",)), dict(traits=("mask",)), dict(tma=True)]
    keys = {Workload(**usual | change).key(torch.device("cuda")) for change in changes}
    assert len(keys) == len(changes) and all("NVIDIA X" in key for key in keys)
    assert Workload(**usual | dict(keys=5000)).key(None) == Workload(**usual | dict(keys=2048)).key(None)


def test_the_tuner_takes_the_fastest_tile(tmp_path, monkeypatch):
    monkeypatch.setenv("HILBERT_ATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(forward, "interpreted", False)
    monkeypatch.setattr(forward, "tile_cache", TileCache())
    monkeypatch.setattr(forward, "_may_time", lambda q: True)
    default = default_tile("forward", 64, torch.bfloat16, (9, 0))
    work = Workload("forward", 64, 1024, (8, 8), torch.bfloat16)
    slow, *others = work.candidates(default)
    seconds = {tile: 3.0 - i for i, tile in enumerate([slow, *others[:2]])}
    monkeypatch.setattr(forward, "_time", lambda launch: seconds.get(launch(), 9.0))
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16)
    assert forward.tuned_tile(work, default, q, lambda tile: tile) == others[1]


def test_candidates_are_those_that_nothing_spoils():
    default = default_tile("forward", 64, torch.bfloat16, (9, 0))

    def candidates(*traits, tma=False, kernel="forward"):
        return Workload(kernel, 64, 1024, (8, 8), torch.bfloat16, traits, tma).candidates(default)

    assert candidates()[0] == default and len(candidates()) == len(set(candidates())) > 2
    assert not any(tile.tma for tile in candidates()) and any(tile.tma for tile in candidates(tma=True))
    assert not any(tile.overlap for tile in candidates("order", tma=True))
    for trait in ("dropout", "mask", "causal", "blocks"): assert len(candidates(trait, tma=True)) < len(candidates(tma=True))
    assert candidates("causal", kernel="dkv", tma=True) == [default]


def test_a_tile_is_timed_as_a_graph_of_ten(monkeypatch):
    "With a stand-in for CUDA, whose clock counts replayed launches."
    launched, clock, graphs = [], [0.0], []

    class Event:
        def __init__(self, enable_timing): pass
        def record(self): self.at = clock[0]
        def synchronize(self): pass
        def elapsed_time(self, other): return other.at - self.at

    class Graph:
        def replay(self): clock[0] += 3.0 * len(self.runs)

    class Capture:
        def __init__(self, graph, capture_error_mode): self.graph = graph
        def __enter__(self): self.before = len(launched)
        def __exit__(self, *_): self.graph.runs = launched[self.before:]; graphs.append(self.graph)

    class Stream:
        def wait_stream(self, other): pass
        def __enter__(self): pass
        def __exit__(self, *_): pass

    fakes = dict(Event=Event, CUDAGraph=Graph, graph=Capture, Stream=Stream, stream=lambda s: s, current_stream=Stream)
    for name, fake in fakes.items(): monkeypatch.setattr(torch.cuda, name, fake)
    assert forward._time(lambda: launched.append(1)) == 3.0
    assert len(graphs) == 1 and len(graphs[0].runs) == 10 and len(launched) == 11


def test_offsets_are_not_copied_from_the_host(monkeypatch):
    monkeypatch.setattr(forward, "_offset_tables", {})
    monkeypatch.setattr(torch, "tensor", None)
    device = torch.device("cpu")
    table = forward._offset_table((2, 0, 1), 5, device)
    assert table.tolist() == [2, 0, 1, 2, 0] and table.dtype == torch.int32
    assert forward._offset_table((2, 0, 1), 5, device) is table
    monkeypatch.setattr(forward, "_capturing", lambda device: True)
    assert forward._offset_table((2, 0, 1), 5, device) is table  # read while a graph is captured
    captured = forward._offset_table((1,), 2, device)
    assert forward._offset_table((1,), 2, device) is not captured  # and not kept
