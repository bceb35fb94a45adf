"""A step of generation: its keys, from the definition of each pattern, in caches of any fill."""
from dataclasses import dataclass

import pytest
import torch
from cases import Inputs, as_options, inputs
from hypothesis import given
from hypothesis import strategies as st
from sampling import examples
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import jvp, vmap

from hilbert_attn import (
    curve_order,
    decode_attention,
    hilbert_attention,
    hilbert_slide_attention,
    hilbert_window_attention,
)
from hilbert_attn.patterns import DILATION_MODES


def sees(i, j, h, how):
    "Does token i of a text see token j, on head h? Straight from the words."
    if j > i: return False
    if how.get("overlap"):
        return j >= i - i % how["segment_size"] - how["overlap"]
    if "window" in how: return j >= i - how["window"] or j < how["sinks"]
    p, s = (how["order"].tolist().index(x) if "order" in how else x for x in (i, j))
    w, r = how["segment_size"] or 10**6, how["dilation_rate"]
    if p // w != s // w: return False
    own, other = p % w % r, s % w % r
    if how["dilation_mode"] == "residue": return own == other
    offset = h % r if how["dilation_mode"] == "longnet" else 0
    return other == offset and (how["dilation_mode"] == "keys" or own == offset)


@dataclass
class Step:
    "One call, described by small numbers."
    sizes: list[tuple[int, int]] # start and length of each row
    room: int
    few: int
    how: dict
    as_numbers: bool
    inputs: Inputs

    def mask(self):
        "bool (B, H, M, C)"
        H = self.inputs.heads
        mask = torch.zeros(len(self.sizes), H, self.few, self.room, dtype=torch.bool)
        for b, (start, end) in enumerate(self.sizes):
            for h in range(H):
                for m in range(self.few):
                    i = end - start - self.few + m
                    for j in range(end - start): mask[b, h, m, start + j] = sees(i, j, h, self.how)
        return mask

    def check(self):
        starts, lengths = torch.tensor(self.sizes).T
        if self.as_numbers: starts, lengths = self.sizes[0]
        mask = self.mask()

        def attention(q, k, v, **options):
            return decode_attention(q, k, v, lengths, starts=starts, **self.how, **options)
        self.inputs.check(attention, mask, unread=True)
        generator = torch.Generator().manual_seed(self.inputs.seed)
        q, k, v = self.inputs.tensors(self.few, self.room, generator)[0]
        scores = as_options(self.inputs.scale)
        expected = attention(q, k, v, **scores)
        by_sums = attention(q, k, v, **scores, return_lse=True)[0]
        torch.testing.assert_close(expected, by_sums, rtol=2e-2, atol=2e-2)
        unread = ~mask.any(1).any(1)  # of the heads' rows: nobody sees these
        hidden = (x.masked_fill(unread[:, None, :, None], torch.nan) for x in (k, v))
        assert torch.equal(attention(q, *hidden, **scores), expected)


@st.composite
def steps(draw) -> Step:
    few, alike = draw(st.sampled_from((1, 1, 3))), draw(st.booleans())
    def size():
        start = draw(st.integers(0, 12))
        return start, start + few + draw(st.integers(0, 20))
    sizes = [size() for _ in range(draw(st.integers(1, 3)))]
    if alike: sizes = [sizes[0]] * len(sizes)
    room = max(end for _, end in sizes) + draw(st.integers(0, 4))
    if draw(st.booleans()):
        how = dict(
            window=draw(st.integers(0, 12)),
            sinks=draw(st.integers(0, 4)))
    else:
        w = draw(st.none() | st.integers(1, 20))
        r = draw(st.sampled_from((1, 1, 2, 3)))
        mode = draw(st.sampled_from(DILATION_MODES))
        how = dict(
            segment_size=w and max(w, r),
            dilation_rate=r,
            dilation_mode=mode)
        kind = draw(st.sampled_from(("plain", "order", "overlap")))
        if kind == "order": how["order"] = curve_order((6, 6))
        overlap = draw(st.integers(1, 20))
        if kind == "overlap": how = dict(segment_size=max(w or 5, r), overlap=overlap)
    own = draw(inputs(b=len(sizes), masks=False, dims=(8, 16)))
    return Step(sizes=sizes, room=room, few=few, how=how, as_numbers=alike, inputs=own)


@examples(40, 300)
@given(case=steps())
def test_steps_equal_the_oracle(case): case.check()


def cache(n=32, heads=(4, 2), few=1, b=2, dv=16, **options):
    g = torch.Generator().manual_seed(0)
    def rand(*shape): return torch.randn(shape, generator=g, **options)
    return rand(b, heads[0], few, 16), rand(b, heads[1], n, 16), rand(b, heads[1], n, dv)


@pytest.mark.parametrize("how", [
    dict(),
    dict(segment_size=8),
    dict(segment_size=12, dilation_rate=3),
    dict(segment_size=8, dilation_rate=2, dilation_mode="longnet"),
])
def test_a_text_token_by_token(how):
    (_, k, v), q = cache(), cache(few=32)[0]
    whole = hilbert_attention(q, k, v, curve=None, causal=True, **how, return_lse=True)
    found = [decode_attention(q[:, :, i:i + 1], k, v, i + 1, **how, return_lse=True)
             for i in range(32)]
    torch.testing.assert_close(tuple(torch.cat(x, 2) for x in zip(*found)), whole)


def test_segments_that_overlap_token_by_token():
    (_, k, v), q = cache(), cache(few=32)[0]
    whole = hilbert_window_attention(q, k, v, 32, 8, overlap=8, causal=True, curve=None)
    found = [decode_attention(q[:, :, i:i + 1], k, v, i + 1, segment_size=8, overlap=8)
             for i in range(32)]
    torch.testing.assert_close(torch.cat(found, 2), whole)


@pytest.mark.parametrize("mode", DILATION_MODES)
def test_along_a_grid_that_fills_up(mode):
    "Segments of 10 with rate 4: residues 2 and 3 have a member less."
    (_, k, v), q = cache(30), cache(few=30)[0]
    how = dict(segment_size=10, dilation_rate=4, dilation_mode=mode, order=curve_order((5, 6)))
    whole = hilbert_attention(q, k, v, causal=True, **how)
    found = [decode_attention(q[:, :, i:i + 1], k, v, i + 1, **how) for i in range(30)]
    torch.testing.assert_close(torch.cat(found, 2), whole)


def test_sinks_of_both_kinds_in_a_window():
    (_, k, v), q = cache(), cache(few=32)[0]
    z = torch.linspace(-1, 1, 4)
    whole = hilbert_slide_attention(
        q, k, v, 32, window=(5, 0), sinks=2, curve=None, sink_logits=z)
    how: dict = dict(window=5, sinks=2, sink_logits=z)
    for i in (0, 1, 6, 31):
        for lengths in (i + 1, torch.tensor([i + 1] * 2)):
            one = decode_attention(q[:, :, i:i + 1], k, v, lengths, **how)
            torch.testing.assert_close(one, whole[:, :, i:i + 1])


@pytest.mark.parametrize("how", [dict(window=5), dict(segment_size=16)])
def test_a_step_whose_keys_are_all_seen_has_no_mask(how, monkeypatch):
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 32, 8), torch.randn(1, 2, 32, 8)
    masks, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def listen(q, k, v, mask=None, *rest, **options):
        masks.append(mask)
        return sdpa(q, k, v, mask, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", listen)
    found = decode_attention(q, k, v, 24, **how)
    assert masks == [None]
    seen = slice(18, 24) if "window" in how else slice(16, 24)
    torch.testing.assert_close(found, sdpa(q, k[:, :, seen], v[:, :, seen], enable_gqa=True))


def test_padding_on_the_left_changes_nothing():
    q, k, v = cache()
    for how in (dict(segment_size=8), dict(window=6, sinks=2)):
        alone = decode_attention(q, k[:, :, 9:], v[:, :, 9:], 20, **how)
        starts, lengths = torch.tensor([9, 9]), torch.tensor([29, 29])
        torch.testing.assert_close(decode_attention(q, k, v, lengths, starts=starts, **how), alone)
        torch.testing.assert_close(decode_attention(q, k, v, 29, starts=9, **how), alone)


@pytest.mark.parametrize("how", [dict(segment_size=8, dilation_rate=2), dict(window=3, sinks=1)])
def test_gradients(how):
    x = [y.requires_grad_() for y in cache(12, (2, 1), 2, dtype=torch.float64, b=1)]
    z = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    lengths, starts = torch.tensor([11]), torch.tensor([2])
    def step(q, k, v, z):
        return decode_attention(
            q, k, v, lengths,
            starts=starts,
            sink_logits=z,
            return_lse=True,
            **how)
    assert torch.autograd.gradcheck(step, (*x, z), fast_mode=True)
    def one(q, k, v): return decode_attention(q[:, :, :1], k, v, 11, **how)
    assert torch.autograd.gradcheck(one, x, fast_mode=True)


def test_one_graph_for_all_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    def step(q, k, v, lengths, starts):
        return decode_attention(q, k, v, lengths, starts=starts, window=6, sinks=2)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    q, k, v = cache()
    for end in (10, 20, 32):
        numbers = torch.tensor([end, end - 1]), torch.tensor([0, 3])
        torch.testing.assert_close(compiled(q, k, v, *numbers), step(q, k, v, *numbers))
    assert counter.frame_count == 1


def test_transforms():
    q, k, v = cache(dtype=torch.float64)
    lengths = torch.tensor([20, 31])
    def step(q): return decode_attention(q, k, v, lengths, segment_size=8)
    tangent = torch.randn_like(q)
    found, change = jvp(step, (q,), (tangent,))
    torch.testing.assert_close(change, (step(q + 1e-6 * tangent) - found) / 1e-6, rtol=1e-4,
                               atol=1e-5)
    many = torch.stack([q, 2 * q])
    torch.testing.assert_close(vmap(step)(many), torch.stack([step(x) for x in many]))


def test_a_cache_of_any_layout():
    q, k, v = cache()
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    for lengths in (20, torch.tensor([20, 9])):
        same = (decode_attention(q, *x, lengths, segment_size=8) for x in ((k, v), turned))
        torch.testing.assert_close(*same)


Q, K, V = cache()
ORDER = torch.arange(16)
BAD = [
    (dict(lengths=0), "starts=0 and lengths=0: each row needs"),
    (dict(lengths=33), "<= 32, the room of the cache"),
    (dict(lengths=torch.tensor([8, 40])), r"lengths=\[8, 40\]"),
    (dict(starts=-1), "starts=-1: must be at least 0"),
    (dict(starts=torch.tensor([0, -1])), r"starts=\[0, -1\]"),
    (dict(starts=8), "start \\+ 1 queries <= length"),
    (dict(lengths=8.0), "lengths=8.0: expected a whole number"),
    (dict(lengths=torch.tensor([8.0, 8.0])), r"lengths is torch.float32 .* \(B,\) = \(2,\)"),
    (dict(lengths=[8, 8]), r"lengths is list: expected one .*, or a tensor .* \(B,\) = \(2,\)"),
    (dict(lengths=torch.tensor([8])), r"lengths is torch.int64 \(1,\)"),
    (dict(sinks=2), "sinks=2 without a window"),
    (dict(window=4, segment_size=8), "give a window or segments"),
    (dict(window=4, dilation_rate=2), "give a window or segments"),
    (dict(window=-1), "window=-1: must be at least 0"),
    (dict(window=4, order=ORDER), "window=4 with an order"),
    (dict(overlap=4, segment_size=8, order=ORDER), "overlap=4 with an order"),
    (dict(overlap=4, window=8), "overlap=4 with window=8"),
    (dict(overlap=4), "overlap=4 with segment_size=None"),
    (dict(overlap=4, segment_size=8, dilation_rate=2), "dilation_rate"),
    (dict(overlap=4, segment_size=8, offsets=1), "'offsets': 1"),
    (dict(overlap=4, segment_size=8, dilation_mode=1), "'mode': 1"),
    (dict(order=ORDER, lengths=20), "at most 16 tokens"),
    (dict(order=torch.zeros(16, dtype=torch.int64)), "order is no permutation"),
    (dict(order=[0, 1]), r"order is given with list: expected .* of shape \(32,\)"),
    (dict(segment_size=1 << 63), "segment_size=9223372036854775808: must be"),
    (dict(order=torch.tensor(3)), r"shape \(\), dtype torch.int64: expected .* of shape"),
    (dict(order=ORDER[None]), r"shape \(1, 16\), dtype .* of shape \(16,\)"),
    (dict(segment_size=0), "segment_size=0"),
    (dict(dilation_rate=3, segment_size=2), "dilation_rate=3"),
    (dict(sink_logits=torch.zeros(2)), r"\(H,\) = \(4,\)"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**dict(q=Q, k=K, v=V, lengths=8) | bad)


@pytest.mark.parametrize("how", [
    dict(segment_size=8), dict(window=5), dict(order=torch.arange(20).flip(0))])
def test_lengths_that_no_check_can_read_touch_no_other_text(how):
    "In a graph, a row without a token gives 0, and its neighbour what it gives alone."
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 1, 8), *torch.randn(2, 2, 2, 32, 8)
    step = torch.compile(lambda lengths: decode_attention(q, k, v, lengths, **how), backend="eager")
    alone = decode_attention(q, k, v, torch.tensor([20, 5]), **how)
    for lengths in ([20, 0], [0, 5]):
        out = step(torch.tensor(lengths))
        for row, length in enumerate(lengths):
            expected = alone[row] if length else torch.zeros_like(alone[row])
            torch.testing.assert_close(out[row], expected)


def test_any_number_of_new_tokens_is_one_graph_more():
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(
        lambda q, k, v, lengths: decode_attention(q, k, v, lengths, segment_size=8),
        backend=counter, fullgraph=True)
    k, v, lengths = *torch.randn(2, 2, 2, 32, 8), torch.tensor([20, 15])
    for few in (2, 3, 4, 5): step(torch.randn(2, 2, few, 8), k, v, lengths)
    assert counter.frame_count <= 2


def test_a_window_takes_no_argument_of_segments():
    q, k, v = torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, 9, 8)
    for more in (dict(segment_size=1), dict(offsets=1), dict(dilation_rate=2)):
        with pytest.raises(ValueError, match="give a window or segments"):
            decode_attention(q, k, v, 9, window=4, **more)
