"""What all integrations share: settings, and attention with tokens outside of the grid."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hilbert_attn.calls import check_call
from hilbert_attn.curves import curve_order
from hilbert_attn.integrations import (
    HilbertSettings,
    PrefixAttention,
    prefix_attention,
)
from hilbert_attn.patterns import DilatedPattern, attention_mask
from hilbert_attn.reference import assert_matches_oracle


def rand(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def qkv(n, heads, kv_heads, dim=16, batch=1, dtype=torch.float32):
    sizes = enumerate((heads, kv_heads, kv_heads))
    return [rand(batch, h, n, dim, seed=i, dtype=dtype) for i, h in sizes]


# settings

WRONG = [
    (dict(segment_size=0), "segment"),
    (dict(segment_size=4, dilation_rate=5), "dilation_rate=5"),
    (dict(segment_size=4, segment_lengths=5), "disagree"),
    (dict(segment_lengths=(4, 8), dilation_rates=(1,)), "as many"),
    (dict(dilation_rate=2, dilation_rates=3), "disagree"),
    (dict(curve="peano"), "known curves"),
    (dict(grid=(3, 0)), "grid"),
    (dict(prefix_tokens=-1), "prefix_tokens"),
    (dict(prefix_tokens=1.5), "prefix_tokens"),
    (dict(dilation_mode="other"), "known modes"),
    (dict(combine="sum"), "known ways"),
    (dict(backend="cudnn"), "known backends"),
    (dict(segments=4), "no setting"),
    (dict(segment_size=8, offsets=(0, -1)), "offsets"),
    (dict(segment_size=2.5), "segment_size=2.5"),
    (dict(segment_lengths=[20.9]), "segment_lengths"),
]


@pytest.mark.parametrize("wrong, said", WRONG)
def test_settings_that_do_not_fit(wrong, said):
    with pytest.raises(ValueError, match=said):
        HilbertSettings.from_dict(wrong)


SETTINGS = [
    dict(),
    dict(segment_size=9, grid=[3, 6], prefix_tokens=2),
    dict(
        segment_lengths=[8, 16],
        dilation_rates=(1, 2),
        combine="heads",
        dilation_mode="keys",
        offsets=[0, 1],
        curve=None,
        backend="sdpa",
    ),
]


@pytest.mark.parametrize("options", SETTINGS)
def test_settings_as_plain_values(options):
    settings = HilbertSettings(**options)
    again = HilbertSettings.from_dict(settings.to_dict())
    assert again == settings and hash(again) == hash(settings)


def test_what_settings_leave_open():
    assert HilbertSettings((8, 16)).branches == ([8, 16], [1, 1])
    assert HilbertSettings().order_name is None
    assert HilbertSettings(grid=(2, 3)).order_name == "hilbert"
    assert HilbertSettings(grid=(2, 3), curve="row_major").order_name is None
    assert HilbertSettings(curve="hilbert").order_name == "hilbert"


PATTERNS = [
    dict(segment_size=7),
    dict(segment_size=20, dilation_rate=3),
    dict(
        segment_lengths=(6, 12, 60),
        dilation_rates=(1, 2, 5),
        dilation_mode="longnet",
    ),
    dict(segment_lengths=(8, 8), dilation_rates=(2, 2)),
    dict(
        segment_size=16, dilation_rate=4, dilation_mode="keys", offsets=(3, 1, 0, 2)
    ),
    dict(segment_lengths=(5, 15), dilation_rates=(1, 3), combine="heads"),
    dict(dilation_rate=2),
    dict(),
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("curve", ["hilbert", "tile:2", None])
def test_counts_are_the_definition(pattern, curve):
    "Against the patterns' own masks; `first` takes rows of the whole."
    grid, heads = (5, 7), 4
    s = HilbertSettings(**pattern, grid=grid, curve=curve)
    order = curve_order(grid, curve) if curve else None
    how = s.combine, s.dilation_mode, s.offsets
    definition = DilatedPattern.for_heads(35, heads, *s.branches, *how)
    mask = attention_mask(definition, order=order)[0].expand(heads, 35, 35)
    assert torch.equal(s.counts(35, heads), mask)
    assert torch.equal(s.counts(35, heads, causal=True), mask.tril())
    for first in (0, 2, 20, 34):
        rows = s.counts(35, heads, first=first, causal=True)
        assert torch.equal(rows, mask.tril()[:, first:])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_prefix_adds_full_rows_and_columns(pattern):
    grid, heads = (5, 7), 4
    cells = HilbertSettings(**pattern, grid=grid).counts(35, heads)
    s = HilbertSettings(**pattern, grid=grid, prefix_tokens=3)
    whole = s.counts(38, heads)
    assert (whole[:, :3] == 1).all() and (whole[:, :, :3] == 1).all()
    assert torch.equal(whole[:, 3:, 3:], cells)
    for first in (0, 2, 3, 20, 37):
        rows = s.counts(38, heads, first=first, causal=True)
        assert torch.equal(rows, whole.tril()[:, first:])


# tokens outside of the grid

CASES = {  # prefix, heads of keys, causal, masked, dtype
    "ViT": (1, 4, False, False, torch.float32),
    "all at once": (5, 2, True, True, torch.float32),
    "bfloat16": (2, 1, False, True, torch.bfloat16),
    "float64": (3, 2, True, False, torch.float64),
    "no prefix": (0, 4, True, True, torch.float32),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("case", CASES)
def test_prefix_matches_the_oracle(pattern, case):
    prefix, kv_heads, causal, masked, dtype = CASES[case]
    s = HilbertSettings(**pattern, grid=(5, 7), prefix_tokens=prefix)
    n, keys = 35 + prefix, None
    q, k, v = qkv(n, 4, kv_heads, batch=2, dtype=dtype)
    counts = s.counts(n, 4, causal=causal)[None]
    if masked:
        keys = torch.rand(2, n, generator=torch.Generator().manual_seed(5)) < 0.7
        counts = counts * keys[:, None, None]

    def ours(q, k, v):
        return prefix_attention(
            q, k, v, s, causal=causal, key_mask=keys, return_lse=True
        )

    assert_matches_oracle(ours, q, k, v, counts)


@pytest.mark.parametrize("width", [6, 24])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("options", [{}, dict(shift=2), dict(backend="reference")])
def test_values_of_another_width(width, prefix, options):
    s = HilbertSettings(segment_size=6, grid=(5, 7), prefix_tokens=prefix, **options)
    n = 35 + prefix
    q, k, _ = qkv(n, 4, 2, batch=2)
    v = rand(2, 2, n, width, seed=4)
    counts = s.counts(n, 4, causal=True)[None]

    def ours(q, k, v):
        return prefix_attention(q, k, v, s, causal=True, return_lse=True)

    assert_matches_oracle(ours, q, k, v, counts)
    shapes = [x.shape for x in ours(*(x.to("meta") for x in (q, k, v)))]
    assert shapes == [(2, 4, n, width), (2, 4, n)]


@pytest.mark.parametrize("backend", ["reference", "sdpa_mask", "triton"])
def test_prefix_on_every_backend(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    s = HilbertSettings(
        segment_lengths=(8, 35),
        dilation_rates=(1, 3),
        grid=(5, 7),
        prefix_tokens=2,
        backend=backend,
    )
    counts = s.counts(37, 2)[None]

    def ours(q, k, v):
        return prefix_attention(q, k, v, s, return_lse=True)

    assert_matches_oracle(ours, *qkv(37, 2, 1), counts)


@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_may_hold_anything(filler, causal):
    "In the prefix and behind it, forward and backward."
    s = HilbertSettings(segment_size=8, grid=(4, 4), prefix_tokens=3)
    keys = torch.ones(1, 19, dtype=torch.bool)
    keys[0, [1, 5, 18]] = False
    results = []
    for value in (0.0, filler):
        q, k, v = qkv(19, 2, 2)
        for x in (k, v):
            x[:, :, ~keys[0]] = value
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = prefix_attention(*leaves, s, key_mask=keys, causal=causal)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for clean, spoiled in zip(*results):
        assert torch.equal(clean, spoiled)


def test_prefix_gradcheck():
    s = HilbertSettings(
        segment_lengths=(4, 9), dilation_rates=(1, 2), grid=(3, 3), prefix_tokens=2
    )
    leaves = [x.requires_grad_() for x in qkv(11, 2, 1, dim=2, dtype=torch.float64)]

    def ours(*x):
        return prefix_attention(*x, s, return_lse=True)

    assert torch.autograd.gradcheck(ours, leaves)


SMALL = HilbertSettings(segment_size=8, grid=(4, 4), prefix_tokens=1)


def test_prefix_scale_and_autocast():
    q, k, v = qkv(17, 2, 2)
    mask = SMALL.counts(17, 2)[None] > 0
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.7)
    assert torch.allclose(
        prefix_attention(q, k, v, SMALL, scale=0.7), expected, atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert prefix_attention(q, k, v, SMALL).dtype == torch.bfloat16


def test_prefix_dropout_is_unbiased():
    "In the rows of the prefix too."
    q, k, v = qkv(17, 2, 2)
    torch.manual_seed(0)
    draws = [prefix_attention(q, k, v, SMALL, dropout_p=0.3) for _ in range(800)]
    mean = torch.stack(draws).mean(0)
    assert (mean - prefix_attention(q, k, v, SMALL)).abs().max() < 0.15


def test_prefix_errors():
    q, k, v = qkv(17, 2, 2)
    short = [x[:, :, 1:] for x in (q, k, v)]
    with pytest.raises(ValueError, match="do not fit grid"):
        prefix_attention(*short, SMALL)
    with pytest.raises(ValueError, match="none are left"):
        prefix_attention(q, k, v, HilbertSettings(prefix_tokens=17))
    with pytest.raises(ValueError, match="key_mask"):
        prefix_attention(
            q, k, v, SMALL, key_mask=torch.ones(1, 16, dtype=torch.bool)
        )
    with pytest.raises(ValueError, match="one or the other"):
        PrefixAttention(SMALL, segment_size=3)
    with pytest.raises(ValueError, match="dropout"):
        PrefixAttention(SMALL, dropout=1.0)


# without any of the packages

WITHOUT = """if True:
    import sys
    import hilbert_attn, hilbert_attn.integrations as i
    packages = "transformers", "diffusers", "timm", "torchvision", "peft"
    assert not [name for name in packages if name in sys.modules]
    for name in packages: sys.modules[name] = None
    def refused(call):
        try: call()
        except ImportError as e: return str(e)
        raise AssertionError("no error")
    for call in (lambda: i.register_hilbert_attention(segment_size=4),
                 lambda: i.use_hilbert_attention(None, segment_size=4)):
        said = refused(call)
        assert "pip install transformers" in said, said
        assert "hilbert_attn[transformers]" in said, said
    import torch
    layer = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    assert i.convert_attention(layer, segment_size=4) == ["0"]
    i.HilbertAttnProcessor(segment_size=4)
"""


def test_nothing_is_imported_that_is_not_needed():
    "And what needs a package that is missing says what to install."
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=120)


@pytest.mark.parametrize("how", [
    dict(grid=(7, 6), shift=5, segment_size=8),
    dict(grid=(7, 6), shift=5, segment_size=8, curve=None),
    dict(grid=(4, 4), shift=3, segment_lengths=(4, 8), dilation_rates=(1, 2)),
    dict(grid=(4, 4), shift=3, segment_size=4, prefix_tokens=2)])
def test_steps_over_a_cache_know_the_shift(how):
    from hilbert_attn.integrations.caches import cached_attention
    torch.manual_seed(0)
    settings = HilbertSettings(**how)
    n = settings.prefix_tokens + settings.sides[0] * settings.sides[1]
    q, k, v = torch.randn(3, 1, 2, n, 8, dtype=torch.float64)
    whole = prefix_attention(q, k, v, settings, causal=True)
    for i in (3, n - 1):
        so_far = k[:, :, :i + 1], v[:, :, :i + 1]
        call = check_call(q[:, :, i:i + 1], *so_far, crossed=True)
        step, _ = cached_attention(call, settings)
        torch.testing.assert_close(step, whole[:, :, i:i + 1])


def test_a_shift_without_a_grid_is_refused_where_a_sequence_grows():
    from hilbert_attn.integrations.caches import cached_attention
    q, k, v = torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, 9, 8)
    with pytest.raises(ValueError, match="would move the others"):
        call = check_call(q, k, v, crossed=True)
        cached_attention(call, HilbertSettings(segment_size=4, shift=2))


def test_masked_tokens_of_a_grid_stay_where_they_are():
    "A text begins behind its padding; a grid does not."
    from hilbert_attn.integrations.caches import _text_attention
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 42, 8, dtype=torch.float64)
    mask = torch.arange(42)[None] >= 3
    settings = HilbertSettings(grid=(6, 7), segment_size=8, curve=None)
    expected = prefix_attention(q, k, v, settings, causal=True, key_mask=mask)
    found, _ = _text_attention(check_call(q, k, v, causal=True, key_mask=mask), settings)
    torch.testing.assert_close(found, expected)


def test_rules_keep_their_order_in_a_file_that_sorts_its_keys():
    rules = {":": {"segment_size": 2}, "0": "dense"}
    settings = HilbertSettings(segment_size=4, layers=rules)
    stored = json.dumps(settings.to_dict(), sort_keys=True)
    found = HilbertSettings.from_dict(json.loads(stored))
    assert found == settings and list(found.layers.rules) == list(rules)
    assert found.of_layer(0, 3).segment_lengths is None
