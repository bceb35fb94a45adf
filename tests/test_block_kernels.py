"""The block-sparse Triton kernels, in Triton's interpreter where there is no GPU: against the
oracle, forward and backward, on lists of any kind."""
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, SCALES, laid_out
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (  # noqa: F401  the fixtures apply here too
    DEVICE,
    RUNS,
    dirty,
    dropped_attention,
    far_and_near,
    generator,
    heads,
    learning,
    no_infinity,
    poison,
    poisoned,
    randn,
    same,
    some,
    upstream,
)
from sampling import examples

from hilbert_attn.block_ring import lists_order, plan_block_ring
from hilbert_attn.blocks.lists import (
    ALWAYS,
    BlockLists,
    lists_from_block_mask,
    lists_from_bounds,
    lists_from_kinds,
    lists_to_operands,
)
from hilbert_attn.blocks.planner import block_lists
from hilbert_attn.curves import curve_order
from hilbert_attn.kernels import launch, tuning
from hilbert_attn.kernels.block_sparse import (
    BlockCall,
    block_attention_backward,
    block_attention_forward,
    block_triton_attention,
    fit_block_tile,
    turns_of,
)
from hilbert_attn.kernels.tuning import Tile
from hilbert_attn.patterns import (
    NeighborhoodPattern,
    SegmentPattern,
    SlidePattern,
    TilesSharedPattern,
    WindowPattern,
)
from hilbert_attn.reference import Scores, assert_matches_oracle, masked_attention

pytestmark = RUNS
forward_op = torch.ops.hilbert_attn.block_triton_forward.default
backward_op = torch.ops.hilbert_attn.block_triton_backward.default


# ---- lists of any kind

def random_layout(n: int, size: int, draw: torch.Generator) -> torch.Tensor:
    "A layout with holes: every token once, in random slots."
    blocks = -(-n // size) + int(torch.randint(2, (), generator=draw))
    tokens = torch.full((blocks * size,), -1, dtype=torch.int32)
    places = torch.randperm(len(tokens), generator=draw)[:n]
    tokens[places] = torch.arange(n, dtype=torch.int32)
    return tokens


def random_bounds(axes: int, slots: list[int], draw: torch.Generator) -> dict:
    "Bounds that hold for nothing or for everything, and keys that all attend."
    if not axes: return dict(lo=None, hi=None, at=None)

    def integers(low, high, size):
        return torch.randint(low, high, (axes, size), generator=draw, dtype=torch.int32)

    lo, at = integers(-2, 5, slots[0]), integers(0, 8, slots[1])
    at[0, torch.rand(slots[1], generator=draw) < 0.2] = ALWAYS
    hi = lo + integers(-2, 9, slots[0])
    half = slots[0] // 2  # that many queries attend everything: some blocks are full
    lo[:, :half], hi[:, :half] = 0, 8
    return dict(lo=lo, hi=hi, at=at)


def random_kinds(blank: BlockLists, groups, keep: float, draw: torch.Generator) -> torch.Tensor:
    "Blocks left out, and full ones that are called partial."
    pairs, no_query = blank.pair_test(), (blank.query_tokens() < 0)[:, :, None, None]
    full = (pairs | no_query).all(3).all(1) & (blank.key_tokens() >= 0).all(1)
    shape = math.prod(groups), *full.shape
    kept, called_full = (torch.rand(shape, generator=draw) < share for share in (keep, keep))
    there = kept & (full | pairs.any(3).any(1))
    return ((1 + (full & called_full).to(torch.int8)) * there).to(torch.int8)


def random_lists(n: int, registers: int = 0, block_size=(32, 32), axes: int = 1, groups=(1, 1),
                 ordered=(True, True), causal=False, keep: float = 0.7, seed: int = 0):
    "Block lists that no pattern would make."
    draw, counts = generator(seed), (n, n + registers)
    tokens = [random_layout(count, size, draw) if given else None
              for count, size, given in zip(counts, block_size, ordered)]
    slots = [-(-count // size) * size if own is None else len(own)
             for count, size, own in zip(counts, block_size, tokens)]
    layout = dict(block_size=block_size, num_queries=n, num_keys=counts[1], q_tokens=tokens[0],
                  k_tokens=tokens[1], causal=causal) | random_bounds(axes, slots, draw)
    blocks = [count // size for count, size in zip(slots, block_size)]
    blank = lists_from_kinds(torch.zeros(1, *blocks, dtype=torch.int8), **layout)
    kinds = random_kinds(blank, groups, keep, draw)
    return lists_from_kinds(kinds, groups=groups, **layout).to(DEVICE)


def dense_mask(lists: BlockLists, b: int, h: int, key_mask=None) -> torch.Tensor: # (B, H, N, M)
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
        tiles = None
        if tile:
            turned = replace(tile, block_m=tile.block_n, block_n=tile.block_m)
            tiles = {"dq": tile, "dkv": turned}
        saved = ctx.saved_tensors
        gradients = block_attention_backward(*saved, dout, dlse, lists, **options, tiles=tiles)
        return *gradients, None, None, None


def attending(lists, **options):
    "The differentiable function of q, k and v."
    def attend(*x): return block_triton_attention(*x, lists, **options)
    return attend


def tensors(lists, h=1, kv=1, batch=1, d=16, **options):
    "q, k and v that fit."
    keys = kv, lists.num_keys
    return heads([(h, lists.num_queries), keys, keys], d, batch, **options)


def check(lists, x, tile=None, mask=None, **options):
    "The kernels with this tile against the oracle."
    def run(*x): return Kernels.apply(*x, lists, options, tile)
    assert_matches_oracle(run, *x, lists.mask() if mask is None else mask)


# ---- against the oracle

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
    scale: float | Scores | None
    lse_grad: bool
    tile: Tile | None
    seed: int

    def tensors(self, draw):
        m, rest = self.n + self.registers, (self.d, self.dtype, draw)
        kv = 1, self.kv_heads, self.kv_heads
        q = laid_out(self.layout, self.b, (self.heads, 1, 1), self.n, *rest)[0]
        k, v = laid_out(self.layout, self.b, kv, m, *rest)[1:]
        return [x.to(DEVICE) for x in (q, k, v)]

    def check(self):
        groups = [n if own else 1 for n, own in zip((self.b, self.heads), self.own)]
        lists = random_lists(self.n, self.registers, self.block_size, self.axes, tuple(groups),
                             self.ordered, self.causal, self.keep, self.seed)
        draw, key_mask = generator(self.seed), None
        x = self.tensors(draw)
        if self.key_mask:
            key_mask = (torch.rand(self.b, lists.num_keys, generator=draw) < 0.7).to(DEVICE)
        options = dict(key_mask=key_mask, scale=self.scale)

        def tiled(*x): return Kernels.apply(*x, lists, options, self.tile)

        run = tiled if self.tile else attending(lists, **options)
        mask = dense_mask(lists, self.b, self.heads, key_mask)
        rule = dict(scale=self.scale, lse_grad=self.lse_grad, seed=self.seed)
        return assert_matches_oracle(run, *x, mask, **rule)


DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIDES, PAIRS = st.sampled_from([16, 32, 48]), st.tuples(st.booleans(), st.booleans())
TILES = st.builds(  # tma where descriptors are possible
    Tile, st.sampled_from([16, 32]), st.sampled_from([16, 32]), overlap=st.booleans(),
    tma=st.booleans())
HEADS = st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (3, 1)])


@st.composite
def block_cases(draw):
    h, kv = draw(HEADS)
    rest = dict(
        b=st.integers(1, 2), n=st.integers(1, 90), registers=st.integers(0, 5),
        d=st.sampled_from([16, 20, 24, 32, 48, 64, 80]), block_size=st.tuples(SIDES, SIDES),
        axes=st.integers(0, 4), own=PAIRS, ordered=PAIRS, causal=st.booleans(),
        key_mask=st.booleans(), keep=st.sampled_from([0.0, 0.4, 1.0]),
        dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS),
        scale=st.sampled_from(SCALES), lse_grad=st.booleans(), tile=st.none() | TILES,
        seed=st.integers(0, 2**31))
    return BlockCase(heads=h, kv_heads=kv, **{name: draw(x) for name, x in rest.items()})


@examples(14, 60)
@given(block_cases())
def test_equals_the_oracle(case): poison(case.check)


PATTERNS = [WindowPattern((9, 14), (4, 5), (1, 2)),
            NeighborhoodPattern((12, 11), (5, 4), (2, 1), (True, False)),
            NeighborhoodPattern((3, 6, 7), 3), SlidePattern(100, 21),
            TilesSharedPattern(110, 5, 7, 13), SegmentPattern(90, 40, 3)]


def name_of(pattern): return type(pattern).__name__.removesuffix("Pattern")


@pytest.mark.grid
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
@pytest.mark.parametrize(
    "curve, causal, registers", [("hilbert", False, 0), (None, False, 3), ("hilbert", True, 3)])
def test_patterns(pattern, curve, causal, registers):
    n, shared = pattern.seq_len, getattr(pattern, "shared", 0)
    order = curve and curve_order(getattr(pattern, "grid", n - shared), curve)
    mask = pattern.mask(order)
    if causal: mask = mask.tril()
    mask = F.pad(mask, (0, registers), value=True).to(DEVICE)
    options = dict(order=order, causal=causal, registers=registers)
    lists = block_lists(pattern, block_size=(32, 16), **options).to(DEVICE)
    assert_matches_oracle(attending(lists), *tensors(lists, 2), mask)


@pytest.mark.usefixtures("poisoned")
def test_a_share_of_a_causal_neighborhood_in_three_dimensions():
    "In a ring causality is one axis more: the fourth."
    pattern = NeighborhoodPattern((4, 5, 6), (3, 3, 5))
    whole = block_lists(pattern, order=curve_order((4, 5, 6), "hilbert"), causal=True,
                        block_size=16)
    plan, order = plan_block_ring(whole, 2), lists_order(whole)
    lists = plan.local_lists(1)
    assert len(lists.lo) == 4
    queries, keys = order[plan.edges[1]:], order[torch.from_numpy(plan.needed[1])]
    mask = pattern.mask().tril()[..., queries, :][..., keys].to(DEVICE)
    assert_matches_oracle(attending(lists.to(DEVICE)), *tensors(lists, 2), mask)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_bounds_at_the_ends_of_int32(axes):
    n, draw, least, most = 64, generator(axes), -2 ** 31, 2 ** 31 - 1

    def some_of(*values):
        chosen = torch.randint(len(values), (axes, n), generator=draw)
        return torch.tensor(values, dtype=torch.int32)[chosen]

    lo, hi = some_of(least, least, -1, 0, 3, most), some_of(least, -1, 3, 5, most)
    at = some_of(0, 3, 5, most)
    at[0, torch.rand(n, generator=draw) < 0.2] = ALWAYS
    lists = lists_from_bounds(n, n, (32, 16), lo=lo, hi=hi, at=at).to(DEVICE)
    assert_matches_oracle(attending(lists), *tensors(lists), dense_mask(lists, 1, 1))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("own", [(1, 1), (1, 2), (2, 2)])
def test_given_block_masks(own):
    kept, order = some(*own, 3, 5, share=0.5, seed=1).cpu(), curve_order(70)
    lists = lists_from_block_mask(kept, 70, 70, (32, 16), order=order, causal=True).to(DEVICE)
    x = tensors(lists, 2, batch=2)
    assert_matches_oracle(attending(lists), *x, dense_mask(lists, 2, 2))


LARGE = [((128, 128), Tile(64, 32), 333), ((64, 128), Tile(64, 64), 333), ((48, 80), None, 131)]


@pytest.mark.grid
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block_size, tile, n", LARGE)
@pytest.mark.parametrize("ordered", [False, True])
def test_large_blocks_of_an_odd_length(block_size, tile, n, ordered):
    lists = random_lists(n, 3, block_size, 2, ordered=(ordered, ordered), seed=5)
    check(lists, tensors(lists, 2), tile)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [17, 72, 96, 100, 128, 192, 256])
def test_head_dims(d, dtype):
    lists = random_lists(40, 2, seed=d)
    check(lists, tensors(lists, 2, d=d, dtype=dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", [0, 2])
def test_gradcheck(axes, causal):
    lists = random_lists(19, 1, (16, 16), axes, (1, 2), causal=causal, seed=axes)
    x = learning(tensors(lists, 2, d=2, dtype=torch.float64))
    run = attending(lists, key_mask=some(1, 20, share=0.8))
    assert torch.autograd.gradcheck(lambda *x: no_infinity(*run(*x)), x, fast_mode=True)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_scales_of_any_sign(scale):
    lists = random_lists(20)
    run = attending(lists, scale=scale)
    assert_matches_oracle(run, *tensors(lists), lists.mask(), scale=scale)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("tile", [None, Tile(16, 16, tma=True, overlap=True)])
def test_what_lies_in_masked_tokens_does_not_matter(ordered, tile):
    lists = random_lists(60, 2, ordered=(ordered, ordered))
    (q, k, v), key_mask = tensors(lists, 2, 2), some(1, 62, share=0.6)
    runs = []
    for kv in ((k, v), (dirty(k, key_mask, torch.nan), dirty(v, key_mask, torch.inf))):
        x = learning(t.clone() for t in (q, *kv))
        out, lse = Kernels.apply(*x, lists, dict(key_mask=key_mask), tile)
        runs.append([out, lse, *torch.autograd.grad(out, x, q)])
    assert same(*runs) and runs[1][0].isfinite().all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_rows_without_keys_are_zero_and_pass_no_gradient(keep):
    lists = random_lists(100, 0, (16, 16), keep=keep)
    x, empty = learning(tensors(lists)), ~lists.mask().any(-1)[None]
    out, lse = block_triton_attention(*x, lists)
    assert empty.any() and (out[empty] == 0).all() and out.isfinite().all()
    assert torch.equal(lse == -torch.inf, empty)
    dlse = torch.full_like(lse, torch.nan).where(empty, 1.0)
    grads = torch.autograd.grad((out, lse), x, (torch.ones_like(out), dlse))
    assert all(g.isfinite().all() for g in grads) and (grads[0][empty] == 0).all()
    assert keep or not any(g.any() for g in grads)


def test_bit_identical_repeats_whatever_the_memory_held():
    lists = random_lists(90, 4, (32, 64), 3, (1, 2), causal=True)
    x = learning(tensors(lists, 2, dtype=torch.bfloat16))

    def run():
        out, lse = no_infinity(*block_triton_attention(*x, lists))
        return [out, lse, *torch.autograd.grad((out, lse), x, (out, lse))]

    assert same(poison(run), run())


def spread(x):
    "The same values, in every other element of memory."
    return torch.stack([x, x], -1)[..., 0]


def test_lists_and_masks_of_any_strides():
    lists = random_lists(60, 2, axes=2)
    names = "q_tokens", "k_tokens", "lo", "hi", "at"
    rows = lists.rows.start, lists.rows.index, lists.rows.full
    changes = {name: spread(getattr(lists, name)) for name in names}
    strided = replace(lists, rows=type(lists.rows)(*map(spread, rows)), **changes)
    x, key_mask = tensors(lists, batch=2), some(62, 2, share=0.7).T
    assert not key_mask.is_contiguous()
    ours = block_triton_attention(*x, strided, key_mask=key_mask)
    assert same(ours, block_triton_attention(*x, lists, key_mask=key_mask.contiguous()))


def test_layouts_are_kept():
    x = learning(randn(2, 30, 3, 16, seed=i).transpose(1, 2) for i in range(3))
    out, _ = block_triton_attention(*x, random_lists(30))
    for t in (out, *torch.autograd.grad(out.sum(), x)): assert t.stride() == x[0].stride()


@pytest.mark.parametrize("ordered", [False, True])
def test_offsets_beyond_int32(monkeypatch, ordered):
    lists = random_lists(3, 0, (16, 16), 1, ordered=(ordered, ordered), keep=1.0)
    runs = []
    for q, k, v, do in far_and_near(monkeypatch):
        saved = block_attention_forward(q, k, v, lists)
        runs.append([*saved, *block_attention_backward(q, k, v, *saved, do, None, lists)])
    assert same(*runs)


# ---- operators

def operator_arguments(requires_grad=True, seed=None, key_mask=None, dropout_p=0.0, **changes):
    usual = dict(registers=2, block_size=(16, 16), groups=(1, 2))
    lists = random_lists(20, **usual | changes)
    x = tensors(lists, 2, dtype=torch.float64)
    *rest, sizes, causal = lists_to_operands(lists)
    settings = [0.25], dropout_p, sizes, causal
    return *(t.requires_grad_(requires_grad) for t in x), key_mask, seed, *rest, *settings


CHANGES = dict(bounds={}, plain=dict(ordered=(False, True), axes=0),
               dropout=dict(seed=torch.tensor([3], device=DEVICE), dropout_p=0.5),
               mask=dict(key_mask=torch.ones(1, 22, dtype=torch.bool, device=DEVICE)))


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_opcheck_forward(changes):
    torch.library.opcheck(forward_op, operator_arguments(**changes))


@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck_backward(with_lse):
    q, k, v, *rest = operator_arguments(False)
    out, lse = forward_op(q, k, v, *rest)
    dout, dlse = upstream(with_lse)
    torch.library.opcheck(backward_op, (dout, dlse, q, k, v, out, lse, *rest))


def test_forward_mode_is_refused():
    lists = random_lists(20)
    x = tensors(lists)
    with pytest.raises(RuntimeError, match="forward-mode derivative.*sdpa_mask"):
        torch.func.jvp(lambda q: attending(lists)(q, *x[1:])[0], (x[0],), (x[0],))


def test_only_the_lse():
    lists = random_lists(40, 2, seed=1)
    x = learning(tensors(lists, dtype=torch.float64))
    grads = []
    for results in (block_triton_attention(*x, lists), masked_attention(*x, lists.mask())):
        grads.append(torch.autograd.grad(no_infinity(*results)[1].sum(), x[:2]))
    torch.testing.assert_close(*grads)


class Attend(torch.nn.Module):
    def __init__(self, lists):
        super().__init__()
        self.lists = lists

    def forward(self, q, k, v):
        out, lse = no_infinity(*block_triton_attention(q, k, v, self.lists))
        return out * 2 + lse[..., None].to(out.dtype)


PLAIN = dict(axes=0, ordered=(False, False), causal=True)


@pytest.mark.parametrize("backend, changes", [("aot_eager", PLAIN), ("inductor", {})])
def test_compiles_to_one_graph(backend, changes):
    torch._dynamo.reset()
    module = Attend(random_lists(30, 2, **changes))
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x, results = learning(tensors(module.lists, 2)), []
    for f in (compiled, module):
        out = f(*x)
        results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    torch.testing.assert_close(*results)


def test_lists_may_be_an_argument_of_what_is_compiled():
    def attend(q, lists): return block_triton_attention(q, q, q, lists)[0]
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (30, 50):
        q, lists = randn(1, 1, n, 16), random_lists(n)
        assert torch.equal(compiled(q, lists), attend(q, lists))


def test_exports():
    module = Attend(random_lists(30, 2))
    x = tuple(tensors(module.lists, 2))
    torch.testing.assert_close(torch.export.export(module, x).module()(*x), module(*x))


def test_errors_name_what_is_wrong():
    q, lists = randn(2, 3, 30, 16), random_lists(30)
    short = q[:, :, :20]
    with pytest.raises(ValueError, match="30 queries and 30 keys; q has N=30 and k 20"):
        block_triton_attention(q, short, short, lists)
    for others, words in (
        (replace(lists, block_size=(24, 32)), r"block_size=\(24, 32\).*multiples of 16"),
        (replace(lists, lo=torch.zeros(5, lists.num_blocks[0] * lists.block_size[0])),
         r"bounds of 5 axes.*backend='sdpa'"),
        (random_lists(30, groups=(1, 2)), r"groups=\(1, 2\).*H=3"),
        (lists.to("meta"), r"on meta.*BlockLists\.to"),
    ):
        with pytest.raises(ValueError, match=words): block_triton_attention(q, q, q, others)


# ---- dropout

def kept_weights(q, k, lists, tile=None, **options):
    "The mask of weights that dropout kept, made visible by values that are the unit matrix."
    eye = torch.eye(k.shape[2], dtype=q.dtype, device=DEVICE).expand(*k.shape[:2], -1, -1)
    return Kernels.apply(q, k, eye, lists, options, tile)[0] != 0


def test_dropout_depends_on_seed_head_and_tokens_only():
    q, k = heads([(2, 32)] * 2, 32, dtype=torch.float64)
    plain, ordered = (
        random_lists(32, 0, size, 0, ordered=(given, given), keep=1.0)
        for size, given in (((32, 32), False), ((16, 16), True)))

    def kept(lists, seed=1, tile=None):
        options = dict(dropout_p=0.4, seed=torch.tensor([seed], device=DEVICE))
        return kept_weights(q, k, lists, tile, **options)

    usual = kept(plain)
    assert torch.equal(usual, kept(ordered))
    assert torch.equal(usual, kept(plain, tile=Tile(16, 16, overlap=True)))
    assert not torch.equal(usual, kept(plain, 2)) and not torch.equal(usual[:, 0], usual[:, 1])
    error = abs(usual.double().mean().item() - 0.6)
    assert error < 4 * math.sqrt(0.4 * 0.6 / usual.numel())


@pytest.mark.parametrize("tile", [None, Tile(16, 16)])
def test_dropout_backward_has_the_same_mask(tile):
    n, p = 32, 0.3
    lists = random_lists(n, 0, (16, 32), 1, (1, 2), causal=True)
    options = dict(dropout_p=p, seed=torch.tensor([5], device=DEVICE))
    x, mask = tensors(lists, 2, 2, d=n, dtype=torch.float64), dense_mask(lists, 1, 2)
    kept = kept_weights(*x[:2], lists, tile, **options)
    assert (kept <= mask).all()
    x = learning(x)
    ours, theirs = Kernels.apply(*x, lists, options, tile), dropped_attention(*x, mask, kept, p)
    torch.testing.assert_close(ours[0], theirs[0])
    dout = randn(1, 2, n, n, dtype=torch.float64, seed=9)
    dlse = randn(1, 2, n, dtype=torch.float64, seed=8) * mask.any(-1)
    torch.testing.assert_close(*(torch.autograd.grad(f, x, (dout, dlse)) for f in (ours, theirs)))


def test_dropout_follows_torchs_generator():
    lists = random_lists(16, keep=1.0)
    x = tensors(lists)

    def run(p):
        torch.manual_seed(3)
        return block_triton_attention(*x, lists, dropout_p=p)[0]

    assert torch.equal(run(0.2), run(0.2)) and not torch.equal(run(0.2), run(0.0))
    assert (run(1.0) == 0).all()


# ---- turns and tiles

def test_long_rows_have_their_turn_first():
    pattern = TilesSharedPattern(300, 4, 5, 40)  # its first rows attend everything
    lists = block_lists(pattern, block_size=16).to(DEVICE)
    for rows, backwards in ((lists.rows, False), (lists.rows, True), (lists.columns, False)):
        lengths = rows.start[0].diff().cpu()
        long, *turns = turns_of(rows, backwards).tolist()
        assert sorted(turns) == list(range(len(lengths)))
        assert long == (lengths > 1.5 * lengths.double().mean()).sum() > 0
        assert lengths[turns[:long]].diff().le(0).all()
        assert turns[long:] == sorted(turns[long:], reverse=backwards)


def test_turns_are_remembered_until_rows_change():
    lists = block_lists(TilesSharedPattern(300, 4, 5, 40), block_size=16).to(DEVICE)
    rows = replace(lists.rows, start=lists.rows.start.clone())
    before, count = turns_of(rows, False), rows.start.shape[1]
    assert turns_of(rows, False) is before
    rows.start.copy_(torch.arange(count))
    assert turns_of(rows, False).tolist() == [0, *range(count - 1)]  # equally long
    with torch.inference_mode():
        assert torch.equal(turns_of(replace(rows, start=rows.start.clone()), False),
                           turns_of(rows, False))


def test_a_captured_graph_reads_known_turns_and_keeps_none(monkeypatch):
    rows = random_lists(64).rows
    known = turns_of(rows, False)
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert turns_of(rows, False) is known  # otherwise each replay would compute them again
    fresh = replace(rows, start=rows.start.clone())
    assert torch.equal(turns_of(fresh, False), known)
    assert turns_of(fresh, False) is not turns_of(fresh, False)


WANTED = (0, Tile(128, 64, 8, 3)), (1, Tile(32, 128, 8, 3)), (0, Tile(64, 32, 4, 2))


@pytest.mark.parametrize("block_size", [(128, 128), (128, 64), (64, 64), (48, 80), (16, 16)])
def test_tiles_divide_their_blocks(block_size):
    for own, tile in WANTED:
        fitted = fit_block_tile(tile, block_size, own)
        sides = fitted.block_m, fitted.block_n
        assert all(size % side == 0 and side >= 16 for size, side in zip(block_size, sides))
        assert 4 <= fitted.num_warps <= tile.num_warps
        assert (fitted.num_stages, fitted.tma) == (tile.num_stages, tile.tma)


def test_warps_follow_the_side_that_they_share():
    tile = Tile(128, 64, 8, 3)
    assert fit_block_tile(tile, (64, 64)) == Tile(64, 64, 4, 3)
    assert fit_block_tile(tile, (128, 32)) == Tile(128, 32, 8, 3)


def test_a_cap_takes_smaller_tiles_on_ampere(monkeypatch):
    monkeypatch.setattr(launch, "capability", lambda device: (8, 0))
    q = torch.empty(1, 1, 64, 64, dtype=torch.bfloat16, device="meta")
    lists = lists_from_block_mask(torch.ones(1, 1, dtype=torch.bool), 64, 64, (64, 64))
    settings = dict(key_mask=None, dropout_p=0.0, seed=None)
    rules = None, Scores(0.125, softcap=50.0)
    usual, capped = (BlockCall(q, q, lists, scale=rule, **settings) for rule in rules)
    for kernel in ("forward", "dq", "dkv"):
        before, after = usual.default(kernel), capped.default(kernel)
        sizes = [t.block_m * t.block_n / t.num_warps for t in (after, before)]
        assert sizes[0] < sizes[1], kernel


def test_fewer_rows_where_half_the_warps_would_spill():
    tile = Tile(32, 128, 8, 3)
    assert fit_block_tile(tile, (128, 64), 1) == Tile(32, 64, 4, 3)
    assert fit_block_tile(tile, (128, 64), 1, crowded=True) == Tile(16, 64, 4, 3)
    assert fit_block_tile(tile, (128, 128), 1, crowded=True) == tile
