"""The block-sparse Triton kernels, in Triton's interpreter where there is no GPU: against the oracle, forward and backward, on lists of any kind."""
import math
from dataclasses import dataclass, replace

import pytest
import torch
from cases import LAYOUTS, laid_out
from hypothesis import given
from hypothesis import strategies as st
from sampling import examples

pytest.importorskip("triton")
from test_triton import DEVICE, poison, poisoned, pytestmark, quick_interpreter, randn  # noqa: F401  fixtures and the mark apply here too

from hilbert_attn.block_sparse import ALWAYS, BlockLists, block_lists, lists_from_block_mask, lists_from_kinds, lists_to_operands
from hilbert_attn.curves import curve_order
from hilbert_attn.kernels import block_sparse, forward
from hilbert_attn.kernels.block_sparse import _turns, block_attention_backward, block_attention_forward, block_triton_attention, fit_block_tile
from hilbert_attn.kernels.forward import Tile
from hilbert_attn.patterns import NeighborhoodPattern, SegmentPattern, SlidePattern, TilesSharedPattern, WindowPattern
from hilbert_attn.reference import assert_matches_oracle, masked_attention


def random_layout(n: int, size: int, generator: torch.Generator) -> torch.Tensor:
    "A layout with holes: every token once, in random slots."
    blocks = -(-n // size) + int(torch.randint(2, (), generator=generator))
    tokens = torch.full((blocks * size,), -1, dtype=torch.int32)
    tokens[torch.randperm(len(tokens), generator=generator)[:n]] = torch.arange(n, dtype=torch.int32)
    return tokens


def random_lists(n: int, registers: int = 0, block_size=(32, 32), axes: int = 1, groups=(1, 1), ordered=(True, True), causal: bool = False, keep: float = 0.7, seed: int = 0) -> BlockLists:
    "Lists of any kind: bounds that hold for nothing or for everything, blocks left out, full blocks that are called partial, keys that all attend."
    generator = torch.Generator().manual_seed(seed)
    m = n + registers
    tokens = [random_layout(count, size, generator) if given else None for count, size, given in zip((n, m), block_size, ordered)]
    slots = [-(-count // size) * size if own is None else len(own) for count, size, own in zip((n, m), block_size, tokens)]
    bounds = dict(lo=None, hi=None, at=None)
    if axes:
        integers = lambda low, high, size: torch.randint(low, high, (axes, size), generator=generator, dtype=torch.int32)
        lo, at = integers(-2, 5, slots[0]), integers(0, 8, slots[1])
        at[0, torch.rand(slots[1], generator=generator) < 0.2] = ALWAYS
        hi = lo + integers(-2, 9, slots[0])
        half = slots[0] // 2  # that many queries attend everything: some blocks are full
        lo[:, :half], hi[:, :half] = 0, 8
        bounds = dict(lo=lo, hi=hi, at=at)
    layout = dict(block_size=block_size, num_queries=n, num_keys=m, q_tokens=tokens[0], k_tokens=tokens[1], causal=causal, **bounds)
    blank = lists_from_kinds(torch.zeros(1, slots[0] // block_size[0], slots[1] // block_size[1], dtype=torch.int8), **layout)
    pairs, no_query = blank.pair_test(), (blank.query_tokens() < 0)[:, :, None, None]
    full = (pairs | no_query).all(3).all(1) & (blank.key_tokens() >= 0).all(1)
    shape = (math.prod(groups), *full.shape)
    kept, called_full = (torch.rand(shape, generator=generator) < keep for _ in range(2))
    return lists_from_kinds(((1 + (full & called_full).to(torch.int8)) * (kept & (full | pairs.any(3).any(1)))).to(torch.int8), groups=groups, **layout).to(DEVICE)


def dense_mask(lists: BlockLists, b: int, h: int, key_mask=None) -> torch.Tensor:
    "bool (B, H, N, M)"
    mask = lists.mask().view(*lists.groups, lists.num_queries, lists.num_keys).expand(b, h, -1, -1)
    return mask if key_mask is None else mask & key_mask[:, None, None]


class Kernels(torch.autograd.Function):
    "The kernels with given tiles, below the operators."
    @staticmethod
    def forward(ctx, q, k, v, lists, options, tile):
        ctx.rest = lists, options, tile
        out, lse = block_attention_forward(q, k, v, lists, **options, tile=tile)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        lists, options, tile = ctx.rest
        tiles = tile and {"dq": tile, "dkv": replace(tile, block_m=tile.block_n, block_n=tile.block_m)}
        return *block_attention_backward(*ctx.saved_tensors, dout, dlse, lists, **options, tiles=tiles), None, None, None


@dataclass
class BlockCase:
    "One call, described by small numbers so that a failing one reads well."
    b: int
    heads: int
    kv_heads: int
    n: int
    registers: int
    d: int
    block_size: tuple[int, int]
    axes: int
    own: tuple[bool, bool] # lists of their own: batches, heads
    ordered: tuple[bool, bool] # layouts given: queries, keys
    causal: bool
    key_mask: bool
    keep: float
    dtype: torch.dtype
    layout: str
    scale: float | None
    lse_grad: bool
    tile: Tile | None
    seed: int

    def check(self):
        groups = tuple(size if own else 1 for size, own in zip((self.b, self.heads), self.own))
        lists = random_lists(self.n, self.registers, self.block_size, self.axes, groups, self.ordered, self.causal, self.keep, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        q = laid_out(self.layout, self.b, (self.heads, 1, 1), self.n, self.d, self.dtype, generator)[0].to(DEVICE)
        k, v = (x.to(DEVICE) for x in laid_out(self.layout, self.b, (1, self.kv_heads, self.kv_heads), self.n + self.registers, self.d, self.dtype, generator)[1:])
        key_mask = (torch.rand(self.b, k.shape[2], generator=generator) < 0.7).to(DEVICE) if self.key_mask else None
        run = lambda *x: block_triton_attention(*x, lists, key_mask=key_mask, scale=self.scale)
        if self.tile: run = lambda *x: Kernels.apply(*x, lists, dict(key_mask=key_mask, scale=self.scale), self.tile)
        return assert_matches_oracle(run, q, k, v, dense_mask(lists, self.b, self.heads, key_mask), scale=self.scale, lse_grad=self.lse_grad, seed=self.seed)


@st.composite
def block_cases(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]))
    pick, pair, dtypes = (lambda *x: draw(st.sampled_from(x))), st.tuples(st.booleans(), st.booleans()), (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    tile = draw(st.none() | st.builds(Tile, st.sampled_from([16, 32]), st.sampled_from([16, 32]), overlap=st.booleans(), tma=st.booleans()))  # tma where descriptors are possible
    return BlockCase(draw(st.integers(1, 2)), kv_heads * group, kv_heads, draw(st.integers(1, 90)), draw(st.integers(0, 5)), pick(16, 20, 24, 32, 48, 64, 80), (pick(16, 32, 48), pick(16, 32, 48)),
                     draw(st.integers(0, 3)), draw(pair), draw(pair), draw(st.booleans()), draw(st.booleans()), pick(0.0, 0.4, 1.0), pick(*dtypes), pick(*LAYOUTS), pick(None, 0.3), draw(st.booleans()),
                     tile, draw(st.integers(0, 2**31)))


@examples(20, 60)
@given(block_cases())
def test_equals_the_oracle(case): poison(case.check)


@pytest.mark.parametrize("pattern", [
    WindowPattern((9, 14), (4, 5), (1, 2)), NeighborhoodPattern((12, 11), (5, 4), (2, 1), (True, False)), NeighborhoodPattern((3, 6, 7), 3), SlidePattern(100, 21),
    TilesSharedPattern(110, 5, 7, 13), SegmentPattern(90, 40, 3)], ids=lambda pattern: type(pattern).__name__.removesuffix("Pattern"))
@pytest.mark.parametrize("curve, causal, registers", [("hilbert", False, 0), (None, False, 3), ("hilbert", True, 3)])
def test_patterns(poisoned, pattern, curve, causal, registers):
    n, shared = pattern.seq_len, getattr(pattern, "shared", 0)
    order = curve and curve_order(getattr(pattern, "grid", n - shared), curve)
    mask = torch.nn.functional.pad(pattern.mask(order) & (torch.ones(n, n, dtype=torch.bool).tril() | (not causal)), (0, registers), value=True).to(DEVICE)
    lists = block_lists(pattern, order=order, block_size=(32, 16), causal=causal, registers=registers).to(DEVICE)
    q, k, v = (randn(1, h, m, 16, seed=h) for h, m in ((2, n), (1, n + registers), (1, n + registers)))
    assert_matches_oracle(lambda *x: block_triton_attention(*x, lists), q, k, v, mask)


@pytest.mark.parametrize("own", [(1, 1), (1, 2), (2, 2)])
def test_given_block_masks(poisoned, own):
    blocks = torch.rand(*own, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    lists = lists_from_block_mask(blocks, 70, 70, (32, 16), order=curve_order(70), causal=True).to(DEVICE)
    q, k, v = (randn(2, h, 70, 16, seed=h) for h in (2, 1, 1))
    assert_matches_oracle(lambda *x: block_triton_attention(*x, lists), q, k, v, dense_mask(lists, 2, 2))


@pytest.mark.parametrize("block_size, tile, n", [((128, 128), Tile(64, 32), 333), ((64, 128), Tile(64, 64), 333), ((48, 80), None, 131)])
@pytest.mark.parametrize("ordered", [False, True])
def test_large_blocks_of_an_odd_length(poisoned, block_size, tile, n, ordered):
    lists = random_lists(n, 3, block_size, 2, ordered=(ordered, ordered), seed=5)
    q, k, v = (randn(1, h, m, 16, seed=h) for h, m in ((2, n), (1, n + 3), (1, n + 3)))
    assert_matches_oracle(lambda *x: Kernels.apply(*x, lists, {}, tile), q, k, v, lists.mask())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [17, 72, 96, 100, 128, 192, 256])
def test_head_dims(poisoned, d, dtype):
    lists = random_lists(40, 2, seed=d)
    q, k, v = (randn(1, h, n, d, dtype=dtype, seed=h) for h, n in ((2, 40), (1, 42), (1, 42)))
    assert_matches_oracle(lambda *x: block_triton_attention(*x, lists), q, k, v, lists.mask())


def no_infinity(out, lse): return out, lse.masked_fill(lse == -torch.inf, 0)  # numerical differences of infinities are NaN


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", [0, 2])
def test_gradcheck(axes, causal):
    lists = random_lists(19, 1, (16, 16), axes, (1, 2), causal=causal, seed=axes)
    q, k, v = (randn(1, h, n, 2, dtype=torch.float64, seed=h).requires_grad_() for h, n in ((2, 19), (1, 20), (1, 20)))
    key_mask = torch.rand(1, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.8
    assert torch.autograd.gradcheck(lambda *x: no_infinity(*block_triton_attention(*x, lists, key_mask=key_mask)), (q, k, v), fast_mode=True)


def test_scales_of_any_sign():
    q, k, v = (randn(1, 1, 20, 16, seed=i) for i in range(3))
    lists = random_lists(20)
    for scale in (-0.5, 0.0, 2.0): assert_matches_oracle(lambda *x: block_triton_attention(*x, lists, scale=scale), q, k, v, lists.mask(), scale=scale)


@pytest.mark.parametrize("ordered", [False, True])
def test_what_lies_in_masked_tokens_does_not_matter(ordered):
    lists = random_lists(60, 2, ordered=(ordered, ordered))
    q, k, v = (randn(1, 2, n, 16, seed=n) for n in (60, 62, 62))
    key_mask = torch.rand(1, 62, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    dirty = [x.masked_fill(~key_mask[:, None, :, None], bad) for x, bad in ((k, torch.nan), (v, torch.inf))]
    for tile in (None, Tile(16, 16, tma=True, overlap=True)):
        runs = []
        for kv in ((k, v), dirty):
            x = [q.clone().requires_grad_(), *(t.clone().requires_grad_() for t in kv)]
            out, lse = Kernels.apply(*x, lists, dict(key_mask=key_mask), tile)
            runs.append([out, lse, *torch.autograd.grad(out, x, q)])
        assert all(torch.equal(a, b) for a, b in zip(*runs)) and runs[1][0].isfinite().all()


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_rows_without_keys_are_zero_and_pass_no_gradient(poisoned, keep):
    lists = random_lists(100, 0, (16, 16), keep=keep)
    q, k, v = (randn(1, 1, 100, 16, seed=i).requires_grad_() for i in range(3))
    empty = ~lists.mask().any(-1)[None]
    out, lse = block_triton_attention(q, k, v, lists)
    assert empty.any() and (out[empty] == 0).all() and torch.equal(lse == -torch.inf, empty) and out.isfinite().all()
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.full_like(lse, torch.nan).where(empty, 1.0)))
    assert all(g.isfinite().all() for g in grads) and (grads[0][empty] == 0).all() and (keep or not any(g.any() for g in grads))


def test_bit_identical_repeats_whatever_the_memory_held():
    lists = random_lists(90, 4, (32, 64), 3, (1, 2), causal=True)
    x = [randn(1, h, n, 16, dtype=torch.bfloat16, seed=h).requires_grad_() for h, n in ((2, 90), (1, 94), (1, 94))]
    def run(): out, lse = no_infinity(*block_triton_attention(*x, lists)); return [out, lse, *torch.autograd.grad((out, lse), x, (out, lse))]
    assert all(torch.equal(a, b) for a, b in zip(poison(run), run()))


def test_lists_and_masks_of_any_strides():
    lists = random_lists(60, 2, axes=2)
    def spread(x): return torch.stack([x, x], -1)[..., 0]  # every other element of memory
    strided = replace(lists, **{name: spread(getattr(lists, name)) for name in ("q_tokens", "k_tokens", "lo", "hi", "at")},
                      rows=type(lists.rows)(*map(spread, (lists.rows.start, lists.rows.index, lists.rows.full))))
    q, k, v = (randn(2, 1, n, 16, seed=n) for n in (60, 62, 62))
    key_mask = torch.rand(62, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE).T < 0.7
    ours, theirs = block_triton_attention(q, k, v, strided, key_mask=key_mask), block_triton_attention(q, k, v, lists, key_mask=key_mask.contiguous())
    assert not key_mask.is_contiguous() and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_layouts_are_kept():
    q, k, v = (randn(2, 30, 3, 16, seed=i).transpose(1, 2).requires_grad_() for i in range(3))
    out, _ = block_triton_attention(q, k, v, random_lists(30))
    assert out.stride() == q.stride()
    assert all(g.stride() == q.stride() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_offsets_beyond_int32(monkeypatch):
    "Three tokens, each 2^30 elements after the one before, in memory that is never touched."
    if forward.interpreted:  # it would copy the storage onto itself
        from triton.runtime.interpreter import GridExecutor
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    step = 2 ** 30
    storage = torch.empty(2 * step + 256, dtype=torch.float16, device=DEVICE)
    far_x = [storage.as_strided((1, 1, 3, 32), (step, step, step, 1), 32 * i) for i in range(4)]
    near_x = [randn(1, 1, 3, 32, dtype=torch.float16, seed=i) for i in range(4)]
    for x, y in zip(far_x, near_x): x.copy_(y)
    for ordered in (False, True):
        lists = random_lists(3, 0, (16, 16), 1, ordered=(ordered, ordered), keep=1.0)
        runs = []
        for q, k, v, do in (far_x, near_x):
            saved = block_attention_forward(q, k, v, lists)
            runs.append([*saved, *block_attention_backward(q, k, v, *saved, do, None, lists)])
        assert all(torch.equal(a, b) for a, b in zip(*runs))


# operators

def operator_arguments(requires_grad=True, seed=None, key_mask=None, dropout_p=0.0, **changes):
    lists = random_lists(20, **dict(registers=2, block_size=(16, 16), groups=(1, 2)) | changes)
    x = [randn(1, h, n, 16, dtype=torch.float64, seed=h).requires_grad_(requires_grad) for h, n in ((2, 20), (1, lists.num_keys), (1, lists.num_keys))]
    return (*x, key_mask, seed, 0.25, dropout_p, *lists_to_operands(lists))


@pytest.mark.parametrize("changes", [{}, dict(ordered=(False, True), axes=0), dict(seed=torch.tensor([3], device=DEVICE), dropout_p=0.5), dict(key_mask=torch.ones(1, 22, dtype=torch.bool, device=DEVICE))], ids=["bounds", "plain", "dropout", "mask"])
def test_opcheck_forward(changes): torch.library.opcheck(torch.ops.hilbert_attn.block_triton_forward.default, operator_arguments(**changes))


def test_opcheck_backward():
    q, k, v, *rest = operator_arguments(False)
    out, lse = torch.ops.hilbert_attn.block_triton_forward(q, k, v, *rest)
    for dlse in (None, randn(1, 2, 20, dtype=torch.float64)):
        torch.library.opcheck(torch.ops.hilbert_attn.block_triton_backward.default, (randn(1, 2, 20, 16, dtype=torch.float64), dlse, q, k, v, out, lse, *rest))


def test_only_the_lse():
    lists = random_lists(40, 2, seed=1)
    q, k, v = (randn(1, 1, n, 16, dtype=torch.float64, seed=n).requires_grad_() for n in (40, 42, 42))
    ours, theirs = (torch.autograd.grad(no_infinity(*f)[1].sum(), (q, k)) for f in (block_triton_attention(q, k, v, lists), masked_attention(q, k, v, lists.mask())))
    torch.testing.assert_close(ours, theirs)


class Attend(torch.nn.Module):
    def __init__(self, lists): super().__init__(); self.lists = lists

    def forward(self, q, k, v):
        out, lse = no_infinity(*block_triton_attention(q, k, v, self.lists))
        return out * 2 + lse[..., None].to(out.dtype)


@pytest.mark.parametrize("backend, changes", [("aot_eager", dict(axes=0, ordered=(False, False), causal=True)), ("inductor", {})])
def test_compiles_to_one_graph(backend, changes):
    torch._dynamo.reset()
    module = Attend(random_lists(30, 2, **changes))
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = [randn(1, h, n, 16, seed=h).requires_grad_() for h, n in ((2, 30), (1, 32), (1, 32))]
    ours, theirs = ((out := f(*x), *torch.autograd.grad(out.square().sum(), x)) for f in (compiled, module))
    torch.testing.assert_close(ours, theirs)


def test_lists_may_be_an_argument_of_what_is_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, lists: block_triton_attention(q, q, q, lists)[0], fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (30, 50): assert torch.equal(compiled(q := randn(1, 1, n, 16), lists := random_lists(n)), block_triton_attention(q, q, q, lists)[0])


def test_exports():
    module, x = Attend(random_lists(30, 2)), [randn(1, h, n, 16, seed=h) for h, n in ((2, 30), (1, 32), (1, 32))]
    torch.testing.assert_close(torch.export.export(module, tuple(x)).module()(*x), module(*x))


def test_errors_name_what_is_wrong():
    q = randn(2, 3, 30, 16)
    lists = random_lists(30)
    with pytest.raises(ValueError, match="30 queries and 30 keys, and q and k have 30 and 20"): block_triton_attention(q, q[:, :, :20], q[:, :, :20], lists)
    with pytest.raises(ValueError, match=r"block_size=\(24, 32\).*multiples of 16"): block_triton_attention(q, q, q, replace(lists, block_size=(24, 32)))
    with pytest.raises(ValueError, match=r"groups=\(1, 2\).*H=3"): block_triton_attention(q, q, q, random_lists(30, groups=(1, 2)))
    with pytest.raises(ValueError, match="on meta.*lists.to"): block_triton_attention(q, q, q, lists.to("meta"))


# dropout

def kept_weights(q, k, lists, tile=None, **options):
    "The mask of weights that dropout kept, made visible by values that are the unit matrix."
    eye = torch.eye(k.shape[2], dtype=q.dtype, device=DEVICE).expand(*k.shape[:2], -1, -1)
    return Kernels.apply(q, k, eye, lists, options, tile)[0] != 0


def test_dropout_depends_on_seed_head_and_tokens_only():
    q, k = (randn(1, 2, 32, 32, dtype=torch.float64, seed=i) for i in range(2))
    options = dict(dropout_p=0.4, seed=torch.tensor([1], device=DEVICE))
    everything = [random_lists(32, 0, block_size, 0, ordered=(ordered, ordered), keep=1.0) for block_size, ordered in (((32, 32), False), ((16, 16), True))]
    kept = kept_weights(q, k, everything[0], **options)
    assert torch.equal(kept, kept_weights(q, k, everything[1], **options)) and torch.equal(kept, kept_weights(q, k, everything[0], Tile(16, 16, overlap=True), **options))
    assert not torch.equal(kept, kept_weights(q, k, everything[0], **options | dict(seed=torch.tensor([2], device=DEVICE)))) and not torch.equal(kept[:, 0], kept[:, 1])
    assert abs(kept.double().mean().item() - 0.6) < 4 * math.sqrt(0.4 * 0.6 / kept.numel())


@pytest.mark.parametrize("tile", [None, Tile(16, 16)])
def test_dropout_backward_has_the_same_mask(tile):
    n, p = 32, 0.3
    q, k, v = (randn(1, 2, n, n, dtype=torch.float64, seed=i).requires_grad_() for i in range(3))
    lists = random_lists(n, 0, (16, 32), 1, (1, 2), causal=True)
    options = dict(dropout_p=p, seed=torch.tensor([5], device=DEVICE))
    kept, mask = kept_weights(q.detach(), k.detach(), lists, tile, **options), dense_mask(lists, 1, 2)
    assert (kept <= mask).all()

    def plain(q, k, v):
        scores = (q @ k.mT * n ** -0.5).masked_fill(~mask, -torch.inf)
        lse = scores.masked_fill(~mask.any(-1, keepdim=True), 0).logsumexp(-1)
        return ((scores - lse[..., None]).exp() * kept / (1 - p)) @ v, lse.masked_fill(~mask.any(-1), 0)

    upstream = randn(1, 2, n, n, dtype=torch.float64, seed=9), randn(1, 2, n, dtype=torch.float64, seed=8) * mask.any(-1)
    ours, theirs = Kernels.apply(q, k, v, lists, options, tile), plain(q, k, v)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream))


def test_dropout_follows_torchs_generator():
    q, k, v = (randn(1, 1, 16, 16, seed=i) for i in range(3))
    lists = random_lists(16, keep=1.0)
    def run(p): torch.manual_seed(3); return block_triton_attention(q, k, v, lists, dropout_p=p)[0]
    assert torch.equal(run(0.2), run(0.2)) and not torch.equal(run(0.2), run(0.0)) and (run(1.0) == 0).all()


# turns and tiles

def test_long_rows_have_their_turn_first():
    lists = block_lists(TilesSharedPattern(300, 4, 5, 40), block_size=16).to(DEVICE)  # its first rows attend everything
    for rows, backwards in ((lists.rows, False), (lists.rows, True), (lists.columns, False)):
        lengths = (rows.start[0, 1:] - rows.start[0, :-1]).cpu()
        long, *turns = _turns(rows, backwards).tolist()
        assert sorted(turns) == list(range(len(lengths))) and long == (lengths > 1.5 * lengths.double().mean()).sum() > 0
        assert lengths[turns[:long]].diff().le(0).all() and turns[long:] == sorted(turns[long:], reverse=backwards)
    rows = replace(lists.rows, start=lists.rows.start.clone())
    before = _turns(rows, False)
    assert _turns(rows, False) is before
    rows.start.copy_(torch.arange(rows.start.shape[1]))
    assert _turns(rows, False).tolist() == [0, *range(rows.start.shape[1] - 1)]  # equally long, and no stale answer
    with torch.inference_mode(): assert torch.equal(_turns(replace(rows, start=rows.start.clone()), False), _turns(rows, False))


def test_a_captured_graph_reads_known_turns_and_keeps_none(monkeypatch):
    rows = random_lists(64).rows
    known = _turns(rows, False)
    monkeypatch.setattr(block_sparse, "_capturing", lambda device: True)
    assert _turns(rows, False) is known  # otherwise each replay would compute them again
    fresh = replace(rows, start=rows.start.clone())
    assert torch.equal(_turns(fresh, False), known) and _turns(fresh, False) is not _turns(fresh, False)


def test_tiles_divide_their_blocks():
    for block_size in ((128, 128), (128, 64), (64, 64), (48, 80), (16, 16)):
        for own, tile in ((0, Tile(128, 64, 8, 3)), (1, Tile(32, 128, 8, 3)), (0, Tile(64, 32, 4, 2))):
            fitted = fit_block_tile(tile, block_size, own)
            assert block_size[0] % fitted.block_m == 0 and block_size[1] % fitted.block_n == 0 and min(fitted.block_m, fitted.block_n) >= 16
            assert 4 <= fitted.num_warps <= tile.num_warps and (fitted.num_stages, fitted.tma) == (tile.num_stages, tile.tma)
    assert fit_block_tile(Tile(128, 64, 8, 3), (64, 64)) == Tile(64, 64, 4, 3) and fit_block_tile(Tile(128, 64, 8, 3), (128, 32)) == Tile(128, 32, 8, 3)
