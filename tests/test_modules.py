"""`HilbertAttentionCore`: every argument, every way a layer is used."""
import copy
import io

import pytest
import torch

from hilbert_attn import (
    DilatedAttention,
    HilbertAttentionCore,
    HilbertOrder,
    MultiheadDilatedAttention,
    NeighborhoodPattern,
    SparsePatternConfig,
    curve_order,
)
from hilbert_attn.block_layers import BlockSparseAttention, RingBlockSparseAttention
from hilbert_attn.multihead import DilatedSelfAttention
from hilbert_attn.patterns import SegmentPattern, attention_mask
from hilbert_attn.reference import masked_attention
from hilbert_attn.ring_layers import RingDilatedAttention

SETTINGS = [
    dict(segment_size=30), dict(segment_size=30, dilation_rate=3, grid=(7, 11)),
    dict(segment_size=None), dict(segment_size=200, causal=True),
    dict(segment_size=20, dilation_rate=4, dilation_mode="keys", offsets=1, curve="morton"),
    dict(segment_size=32, dilation_rate=2, dilation_mode="longnet", bias=True),
    dict(segment_size=16, num_kv_heads=2, grid=(11, 7), curve="tile:3", causal=True),
    dict(segment_size=25, head_dim=20, curve=None),]


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return HilbertAttentionCore(48, 4, **options)


def tokens(dtype=torch.float32):
    return torch.randn(2, 77, 48, generator=torch.Generator().manual_seed(1)).to(dtype)


def results(module, x, **options):
    leaf = x.detach().clone().requires_grad_()
    out = module(leaf, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out, *torch.autograd.grad(out, (leaf, *module.parameters()), upstream)]


def by_definition(m: HilbertAttentionCore, x, use_hilbert=True, key_mask=None):
    "The layer from its parameters and the oracle's mask, in float64."
    m = copy.deepcopy(m).double()
    qkv = m.qkv_proj(x.double()).unflatten(-1, (-1, m.head_dim)).transpose(1, 2)
    q, k, v = qkv.split([m.num_heads, m.num_kv_heads, m.num_kv_heads], 1)
    n = x.shape[1]
    pattern = SegmentPattern.for_heads(
        n, m.num_heads, m.segment_size, m.dilation_rate, m.dilation_mode, m.offsets)
    order = curve_order(m.grid or n, m.curve) if use_hilbert and m.curve else None
    out, _ = masked_attention(
        q, k, v, attention_mask(pattern, order=order, causal=m.causal, key_mask=key_mask))
    return m.out_proj(out.transpose(1, 2).flatten(2)).detach()


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("use_hilbert", (True, False))
def test_computes_its_definition(options, use_hilbert):
    m, x = layer(**options), tokens()
    key_mask = torch.rand(2, 77, generator=torch.Generator().manual_seed(3)) < 0.8
    torch.testing.assert_close(
        m(x, use_hilbert).double(), by_definition(m, x, use_hilbert), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        m(x, use_hilbert, key_mask=key_mask).double(), by_definition(m, x, use_hilbert, key_mask),
        rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_gradients_agree_in_every_mode(options):
    x, expected = tokens(), results(layer(**options), tokens())
    for other in (
        layer(**options, use_custom_backward=False), layer(**options).eval(),
        layer(**options, checkpoint=True), layer(**options, backend="sdpa_mask"),
        layer(**options, use_custom_backward=False).eval(),
        torch.compile(layer(**options), fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(results(other, x), expected, rtol=1e-3, atol=2e-5)
        assert all(g.any() for g in results(other, x))
    torch._dynamo.reset()


def test_gradcheck_float64():
    m = layer(segment_size=6, dilation_rate=2, causal=True, dtype=torch.float64)
    x = torch.randn(1, 11, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m, x, fast_mode=True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    m, x = layer(segment_size=30), tokens()
    expected = results(m, x)
    with torch.autocast("cpu", dtype): actual = results(m, x)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    for a, e in zip(actual, expected): assert (a - e).norm() < 0.02 * e.norm()


def test_state_dict_round_trip_is_free_of_the_grid():
    small, large = layer(segment_size=30, grid=(7, 11)), layer(
        seed=5, segment_size=30, grid=(40, 50))
    assert sorted(small.state_dict()) == ["out_proj.weight", "qkv_proj.weight"]
    large.load_state_dict(small.state_dict())
    x = tokens()
    assert torch.equal(large(x, grid=(7, 11)), small(x))


def test_copies():
    m, x = layer(segment_size=30, grid=(7, 11)), tokens()
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(m), torch.load(buffer, weights_only=False),
        copy.deepcopy(m).double().float()):
        assert torch.equal(other(x), m(x))


def test_dropout_acts_in_training_only():
    x = tokens()
    m, plain = layer(segment_size=30, dropout=0.5), layer(segment_size=30)
    assert torch.equal(m.eval()(x), plain(x))
    m.train()
    assert not torch.equal(m(x), m(x))
    torch.manual_seed(1)
    a = m(x)
    torch.manual_seed(1)
    assert torch.equal(a, m(x))
    assert all(g.isfinite().all() and g.any() for g in results(m, x))


def test_checkpointing_repeats_the_same_dropout():
    x = tokens()
    torch.manual_seed(3)
    expected = results(layer(segment_size=30, dropout=0.3), x)
    torch.manual_seed(3)
    actual = results(layer(segment_size=30, dropout=0.3, checkpoint=True), x)
    torch.testing.assert_close(actual, expected)


def test_checkpointing_stores_less():
    def stored(checkpoint):
        m, sizes = layer(segment_size=30, checkpoint=checkpoint), []
        def note(x):
            sizes.append(x.numel())
            return x
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            m(tokens().requires_grad_())
        return sum(sizes)
    assert stored(True) < stored(False) / 3


def test_training_learns():
    torch.manual_seed(0)
    m = HilbertAttentionCore(32, 4, segment_size=16, grid=(6, 6))
    x, target = torch.randn(4, 36, 32), torch.randn(4, 36, 32)
    optimiser = torch.optim.Adam(m.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (m(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_names_of_sizes():
    for spelled in (
        dict(dim=48, heads=4), dict(embed_dim=48, num_heads=4), dict(hidden_dim=48, num_heads=4),
        dict(dim=48, embed_dim=48, heads=4, num_heads=4)):
        m = HilbertAttentionCore(**spelled)
        assert (m.hidden_dim, m.num_heads, m.head_dim) == (48, 4, 12)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_heads=4), r"hidden_dim is missing \(also accepted as dim, embed_dim\)"),
        (dict(dim=48), "num_heads is missing"),
        (dict(dim=48, hidden_dim=64, heads=4), "hidden_dim=64 and dim=48 disagree"),
        (dict(dim=48, heads=4, num_heads=2), "num_heads=2 and heads=4 disagree"),
        (dict(dim=50, heads=4), "hidden_dim=50 is no multiple of num_heads=4"),
        (dict(dim=48, heads=4, num_kv_heads=3), "num_kv_heads=3"),
        (dict(dim=48, heads=4, dropout=1.0), "dropout=1.0"),
        (dict(dim=48, heads=4, segment_size=4, dilation_rate=8), "dilation_rate=8"),
        (dict(dim=48, heads=4, curve="peano"), "known curves"),
        (dict(dim=48, heads=4, backend="fast"), "known backends"),
        (dict(dim=48, heads=4, grid=0), "grid=0"),
        (dict(dim=48, heads=4, dilation_mode="both"), "known modes")])
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message): HilbertAttentionCore(**options)


@pytest.mark.parametrize("make", [
    HilbertAttentionCore, MultiheadDilatedAttention,
    DilatedSelfAttention,
])
@pytest.mark.parametrize("bad", ["tokens", [[1.0]], None])
def test_tokens_are_a_tensor(make, bad):
    text = f"is a {type(bad).__name__}: expected a tensor"
    with pytest.raises(ValueError, match=text):
        make(48, 4)(bad)


@pytest.mark.parametrize("make", [
    DilatedAttention, BlockSparseAttention,
])
def test_queries_keys_and_values_are_tensors(make):
    q = torch.randn(1, 4, 2, 8)
    text = "k is a NoneType: expected a tensor"
    with pytest.raises(ValueError, match=text):
        make()(q, None, q)


def test_bad_tokens():
    m = layer(segment_size=30, grid=(7, 11))
    with pytest.raises(ValueError, match=r"x has shape \(2, 77, 40\): expected \(B, N, 48\)"):
        m(tokens()[..., :40])
    with pytest.raises(ValueError, match=r"grid=\(7, 11\) has 77 cells for 70 tokens"):
        m(tokens()[:, :70])


GRID = (6, 8)
FREE = {  # projection-free layers over 48 tokens
    "dilated": lambda **options: DilatedAttention(
        [12, 48], [1, 2], dilation_mode="residue", curve="hilbert", grid=GRID, **options),
    "heads": lambda **options: DilatedAttention(
        [12, 48], [1, 2], combine="heads", dilation_mode="residue", **options),
    "ring": lambda **options: RingDilatedAttention(
        [12, 48], [1, 2], dilation_mode="residue", grid=GRID, **options),
    "blocks": lambda **options: BlockSparseAttention(
        sparsity=0.3, block_size=8, grid=GRID, **options),
    "post-pattern": lambda **options: BlockSparseAttention(
        NeighborhoodPattern(GRID, 5), placement="post_pattern", block_size=8, grid=GRID, **options),
    "post-pattern blocks": lambda **options: BlockSparseAttention(
        SparsePatternConfig("local_window", 8, window=16), placement="post_pattern", grid=GRID,
        **options),
    "post-pattern ring": lambda **options: RingBlockSparseAttention(
        NeighborhoodPattern(GRID, 5), placement="post_pattern", block_size=8, grid=GRID, **options),
}


def seen_tokens(module, q, k, v, **options):
    """bool (N, N): whether a value reaches an output; values are one-hot, so that outputs are
    attention weights."""
    out = module(q, k, v, **options)  # (1, N, H, N)
    return (out != 0).any(2)[0]


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("where", ("setting", "call", "both"))
def test_no_layer_lets_the_future_leak(name, where):
    q, k = (torch.randn(1, 48, 2, 48, generator=torch.Generator().manual_seed(s)) for s in range(2))
    v = torch.eye(48)[None, :, None].expand(1, 48, 2, 48)
    module = FREE[name](causal=where != "call")
    shard = getattr(module, "shard", lambda x: x)
    unshard = getattr(module, "unshard", lambda x: x)
    def seen(module, **options):
        out = unshard(module(shard(q), shard(k), shard(v), **options))
        return (out != 0).any(2)[0]
    options = {} if where == "setting" else dict(is_causal=True)
    causal, free = seen(module, **options), seen(FREE[name]())
    assert torch.equal(causal, free.tril())
    assert not torch.equal(causal, free)
    assert causal.diagonal().all()


def multihead():
    torch.manual_seed(0)
    return MultiheadDilatedAttention(
        16, 2, batch_first=True, segment_lengths=[24], dilation_rates=[1])


def test_padding_is_what_is_ignored():
    """True = ignore, as in torch; float padding and the package's own key_mask (True = attend)
    say the same."""
    module, x = multihead(), torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    padding = torch.arange(24) >= torch.tensor([[20], [10]])
    # the tokens that stay, alone
    expected = [module(x[b:b + 1, :n])[0] for b, n in ((0, 20), (1, 10))]
    float_padding = torch.zeros(2, 24).masked_fill(padding, -torch.inf)
    for options in (
        dict(key_padding_mask=padding), dict(key_padding_mask=float_padding),
        dict(key_mask=~padding)):
        out = module(x, **options)[0]
        torch.testing.assert_close(out[:1, :20], expected[0])
        torch.testing.assert_close(out[1:, :10], expected[1])
    single = module(x[0], key_padding_mask=padding[0])[0]
    torch.testing.assert_close(single[:20], expected[0][0])


def test_both_masks_must_let_a_key_through():
    module, x = multihead(), torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(1))
    padding, key_mask = torch.arange(24)[None] >= 18, torch.arange(24)[None] >= 6
    out = module(x, key_padding_mask=padding, key_mask=key_mask)[0]
    torch.testing.assert_close(out[:, 6:18], module(x[:, 6:18])[0])
    assert not torch.allclose(out, module(x, key_padding_mask=padding)[0])
    assert not torch.allclose(out, module(x, key_mask=key_mask)[0])


@pytest.mark.parametrize("padding", [
    torch.zeros(24, 2, dtype=torch.bool), torch.zeros(48, dtype=torch.bool),
    torch.zeros(2, 1, 24, dtype=torch.bool), torch.zeros(2, 23), torch.zeros(24), [[False] * 24]])
@pytest.mark.parametrize("batch_first", (False, True))
def test_padding_has_the_shape_of_the_tokens(padding, batch_first):
    module, x = multihead(), torch.randn(2, 24, 16)
    module.batch_first = batch_first
    with pytest.raises(ValueError, match=r"key_padding_mask .*: expected .*\(2, 24\)"):
        module(x if batch_first else x.transpose(0, 1), key_padding_mask=padding)


@pytest.mark.parametrize("shape", [(1, 24), (2, 1), (24,)])
def test_the_key_mask_is_as_strict_beside_padding(shape):
    module, x = multihead(), torch.randn(2, 24, 16)
    key_mask = torch.ones(shape, dtype=torch.bool)
    padding = torch.zeros(2, 24)
    for options in ({}, dict(key_padding_mask=padding)):
        with pytest.raises(ValueError, match=r"key_mask is .*: expected .*\(2, 24\)"):
            module(x, key_mask=key_mask, **options)


# noqa: E731
CORE, BRANCHED = lambda **o: HilbertAttentionCore(
    **{**dict(hidden_dim=48, num_heads=4), **o}), DilatedAttention


@pytest.mark.parametrize(
    "make, name, values",
    [
        (CORE, "hidden_dim", [48.0, "48", True, float("nan"), 0]),
        (CORE, "num_heads", [4.0, "4", 0]), (CORE, "num_kv_heads", [2.0, True]),
        (CORE, "head_dim", [12.0, 0]),
        (CORE, "segment_size", [2.5, "24", float("nan"), True, 0, [16]]),
        (CORE, "dilation_rate", [1.5, "2", 0]), (CORE, "offsets", [0.5, "1", [0.0, 1, 0, 1]]),
        (CORE, "dropout", [float("nan"), "0.1", True, -0.1, 1.0, None]),
        (CORE, "grid", [(4, 2.5), "24", (4, True)]),
        *(
            (CORE, name, ["False", 0, 1, None, 2.5])
            for name in ("causal", "bias", "checkpoint", "use_custom_backward")),
        (
            BRANCHED, "segment_lengths",
            [[20.9, 30, 40], "24", [True, 4, 4], 0, float("nan"), [], None]),
        (BRANCHED, "dilation_rates", [[1, 2.5, 4], "124", -4]),
        (BRANCHED, "dropout", [float("nan"), "0.1"]), (BRANCHED, "offsets", [0.5, "1", -1]),
        (BRANCHED, "grid", [(4, 2.5), "24"]),
        *(
            (BRANCHED, name, ["False", 0, None])
            for name in ("causal", "checkpoint", "use_custom_backward")),
        (RingDilatedAttention, "ring_size", [2.0, "2", 0]),
        (RingDilatedAttention, "overlap", ["False", 1]),
        (BlockSparseAttention, "sparsity", [float("nan"), "0.5", 1.0, True]),
        (BlockSparseAttention, "block_size", [16.0, "16", 0]),
        *((BlockSparseAttention, name, ["False", 0]) for name in ("causal", "checkpoint")),
        *(
            (lambda name=name, **o: MultiheadDilatedAttention(48, 4, **o), name, ["False", 0, None])
            for name in ("bias", "batch_first", "add_zero_attn", "add_bias_kv")),
        (lambda **o: MultiheadDilatedAttention(num_heads=4, **o), "embed_dim", [48.0, "48"])])
def test_settings_are_what_they_seem(make, name, values):
    "The error names argument, value and rule."
    import re
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: ") + "(expected|must)"):
            make(**{name: value})


LISTS = dict(segment_lengths=[8, 16, 32], dilation_rates=[1, 2, 4])


@pytest.mark.parametrize("make, message", [
    (lambda: BRANCHED(**LISTS, combine="x"), "combine='x': known ways are 'lse', 'heads'"),
    (lambda: BRANCHED(**LISTS, offsets=1, dilation_mode="residue"), "'residue' has no offsets"),
    (lambda: BRANCHED(**LISTS, offsets=(1, 2), combine="heads"), "each branch needs a head"),
    (lambda: MultiheadDilatedAttention(32, 2, **LISTS, combine="heads"), "3 branches and 2 heads"),
    (lambda: RingDilatedAttention(layout="zig"), "layout='zig': known layouts are 'contiguous'"),
    (lambda: BlockSparseAttention("local"), "pattern='local': expected a SparsePatternConfig"),
    (lambda: BlockSparseAttention(torch.ones(4, 4, dtype=torch.bool), placement="post_pattern"),
     "pattern=<Tensor bool .*: expected a SparsePatternConfig, which takes a block_mask"),
    (lambda: MultiheadDilatedAttention(32, 4, **LISTS, offsets=[0, 1, 2]), "offsets has 3 entries"),
])
def test_misfits_are_named_when_a_layer_is_made(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_heads_are_not_known_before_a_call():
    BRANCHED(**LISTS, combine="heads")
    BRANCHED(**LISTS, offsets=[0, 1])
    MultiheadDilatedAttention(32, 4, **LISTS, offsets=[0, 1, 2, 3])


def test_switches_of_a_call_are_what_they_seem():
    x, q = tokens(), torch.randn(1, 24, 2, 8)
    with pytest.raises(ValueError, match="use_hilbert='False': expected True or False"):
        layer(segment_size=30)(x, "False")
    for module in (
        DilatedAttention(8, 1), RingDilatedAttention(8, 1), BlockSparseAttention(block_size=8)):
        with pytest.raises(ValueError, match="is_causal='False': expected True or False"):
            module(q, q, q, "False")
    with pytest.raises(ValueError, match="is_causal='False': expected True or False"):
        multihead()(x[..., :16], is_causal="False")


SETTINGS_OF_BLOCKS = [
    ("pattern", SparsePatternConfig("local_window", 16, window=64)), ("curve", None),
    ("grid", (4, 16)), ("block_size", 8), ("sparsity", 0.1), ("placement", "post_pattern")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name, value", SETTINGS_OF_BLOCKS)
def test_settings_of_blocks_count_after_a_call(name, value, compiled):
    torch.manual_seed(0)
    x = torch.randn(1, 64, 2, 8)
    options = dict(block_size=16, sparsity=0.7)
    module, other = (BlockSparseAttention(**options | new) for new in ({}, {name: value}))
    torch._dynamo.reset()
    run = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    before = run(x, x, x)
    setattr(module, name, value)
    after = run(x, x, x)
    assert torch.equal(after, other(x, x, x))
    assert not torch.equal(after, before)


def test_a_mask_of_blocks_is_read_again_after_a_write():
    mask = torch.eye(4, dtype=torch.bool)
    x = torch.randn(1, 64, 2, 8)
    module = BlockSparseAttention(SparsePatternConfig("mask", 16, block_mask=mask))
    before = module(x, x, x)
    mask[:] = True
    after = module(x, x, x)
    assert torch.equal(after, copy.deepcopy(module)(x, x, x))
    assert not torch.equal(after, before)


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    module = CORE(
        segment_size=np.int64(16), dropout=np.float32(0.5), causal=np.bool_(True),
        grid=np.array([7, 11]))
    assert (
        module.segment_size, module.dropout, module.causal, module.grid) == (16, 0.5, True, (7, 11))
    assert DilatedAttention(np.array([8, 16]), [np.int32(1), 2]).segment_lengths == (8, 16)


@pytest.mark.parametrize("seen", [10, 14])
def test_a_mask_of_other_tokens_is_refused_at_the_door(seen):
    model = HilbertOrder(layer(segment_size=4, curve=None), (3, 4))
    mask = torch.ones(2, seen, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"key_mask is .*: expected bool of shape \(B, N\)"):
        model(torch.randn(2, 12, 48), key_mask=mask)


@pytest.mark.parametrize("mask", [torch.ones(6, 6).triu(1).int(), "causal"])
def test_a_causal_mask_is_bool_or_float(mask):
    m, x = MultiheadDilatedAttention(48, 4), torch.randn(6, 1, 48)
    with pytest.raises(ValueError, match="not the causal mask in bool or float"):
        m(x, x, x, attn_mask=mask)
