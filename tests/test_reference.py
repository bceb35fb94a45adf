"""The oracle and the tolerance rule are themselves on trial."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hilbert_attn import reference
from hilbert_attn.patterns import SegmentPattern
from hilbert_attn.reference import (
    Scores,
    assert_matches_oracle,
    compare_to_oracle,
    masked_attention,
    merge_attention,
    reference_attention,
)


def by_hand(q, k, v, mask, scale):
    "One row at a time, with Python's own sums."
    from math import exp, log

    out, lse = [], []
    for i, row in enumerate(mask):
        keys = [j for j, seen in enumerate(row) if seen]
        scores = [scale * sum(a * b for a, b in zip(q[i], k[j])) for j in keys]
        total = sum(map(exp, scores))
        lse.append(log(total) if keys else float("-inf"))
        out.append(
            [
                sum(exp(s) * v[j][c] for s, j in zip(scores, keys)) / total if keys else 0.0
                for c in range(len(q[0]))
            ]
        )
    return torch.tensor(out, dtype=torch.float64), torch.tensor(lse, dtype=torch.float64)


def test_oracle_by_hand():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 9, 5, dtype=torch.float64) for h in (4, 2, 2))
    mask = torch.rand(9, 9) < 0.4
    mask[3] = False
    out, lse = masked_attention(q, k, v, mask, 0.3)
    for h in range(4):
        expected = by_hand(
            q[0, h].tolist(), k[0, h // 2].tolist(), v[0, h // 2].tolist(), mask.tolist(), 0.3
        )
        torch.testing.assert_close((out[0, h], lse[0, h]), expected, rtol=1e-12, atol=1e-12)


def test_oracle_is_float64_for_every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(1, 1, 5, 4).to(dtype)
        assert all(
            t.dtype == torch.float64 for t in reference_attention(x, x, x, SegmentPattern(5, 5))
        )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_a_cap_is_measured_with_further_draws(dtype, monkeypatch):
    "As often as there are draws where nothing is near, and what is reported are the errors."
    q, k, v = (torch.randn(1, 1, 9, 8).to(dtype) for _ in range(3))
    mask, rule = torch.ones(9, 9, dtype=torch.bool), Scores(0.3, 0.5)
    drawn, draw = [], reference._upstream
    monkeypatch.setattr(reference, "_upstream", lambda *x: drawn.append(x) or draw(*x))
    def wrong(*x):
        out, lse = masked_attention(*x, mask, rule)
        return 1.5 * out, lse.to(reference.lse_dtype(dtype))
    report = compare_to_oracle(wrong, q, k, v, mask, scale=rule)
    assert not report.keeps("out") and len(drawn) == reference._DRAWS


def test_masked_attention_gradient():
    torch.manual_seed(0)
    x = [torch.randn(1, 2, 6, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.rand(6, 6) < 0.5
    mask[2] = False
    def call(*x):
        out, lse = masked_attention(*x, mask)
        return out, lse.masked_fill(lse == -torch.inf, 0)
    assert torch.autograd.gradcheck(call, x)


@given(
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
)
def test_merge_equals_all_keys_at_once(parts, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, 2, 7, 4, dtype=torch.float64, generator=g).to(dtype) for _ in range(3)
    )
    member = torch.randint(0, parts + 1, (7, 7), generator=g)  # the last number: in no part
    wide = torch.promote_types(dtype, torch.float32)
    pieces = [
        masked_attention(q.to(wide), k.to(wide), v.to(wide), member == p) for p in range(parts)
    ]
    out, lse = merge_attention([o.to(dtype) for o, _ in pieces], [l for _, l in pieces])
    expected, expected_lse = masked_attention(q.double(), k.double(), v.double(), member < parts)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_merge_gradient_in_outs_and_lses():
    torch.manual_seed(0)
    outs, lses = (
        torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
    )
    dead = torch.tensor(
        [[True, False, False, True], [False, True, False, True], [False, False, False, True]]
    )

    def call(outs, lses):
        out, lse = merge_attention(outs, lses.masked_fill(dead, -torch.inf))
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(call, (outs, lses))


@pytest.mark.parametrize("dead", [(0,), (1,), (0, 1)])
def test_merge_with_nothing_makes_no_nan(dead):
    outs = [
        torch.full((2, 3), torch.nan if b in dead else float(b + 1), requires_grad=True)
        for b in range(2)
    ]
    lses = [
        torch.full((2,), -torch.inf if b in dead else 0.5, requires_grad=True) for b in range(2)
    ]
    out, lse = merge_attention(outs, lses)
    alive = [b for b in range(2) if b not in dead]
    assert torch.equal(out, torch.full((2, 3), float(alive[0] + 1) if alive else 0.0))
    assert torch.equal(lse, torch.full((2,), 0.5 if alive else -torch.inf))
    grads = torch.autograd.grad(out.sum() + (lse.sum() if alive else 0), [*outs, *lses])
    assert all(g.isfinite().all() for g in grads)


def test_merge_is_associative():
    torch.manual_seed(0)
    outs, lses = (
        torch.randn(3, 6, 2, dtype=torch.float64),
        torch.randn(3, 6, dtype=torch.float64) * 30,
    )
    first, lse = merge_attention(outs[:2], lses[:2])
    torch.testing.assert_close(
        merge_attention([first, outs[2]], [lse, lses[2]]),
        merge_attention(outs, lses),
        rtol=1e-12,
        atol=1e-12,
    )


def test_merge_arguments():
    with pytest.raises(ValueError, match="2 outs and 1 lses"):
        merge_attention([torch.zeros(1, 1)] * 2, [torch.zeros(1)])
    with pytest.raises(ValueError, match="at least one"):
        merge_attention([], [])
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    said = r"out of shape \(2, 3, 4\) with an lse of shape"
    for other in (lse[:1], out):
        with pytest.raises(ValueError, match=said):
            merge_attention([out, out], [lse, other])
    said = r"out of shape \(2, 1, 4\)"
    with pytest.raises(ValueError, match=said):
        merge_attention([out, out[:, :1]], [lse, lse[:, :1]])


def mistakes():
    "They look like attention over `mask`, and are not; each is wrong in one of five results."
    mask = torch.ones(20, 20, dtype=torch.bool).tril()

    def right(q, k, v):
        return masked_attention(q, k, v, mask)

    def graft(value, gradient):
        return gradient + (value - gradient).detach()

    yield "out", lambda q, k, v: (masked_attention(q, k, v, mask)[0] * 1.0001, right(q, k, v)[1])
    yield "lse", lambda q, k, v: (right(q, k, v)[0], right(q, k, v)[1] + 1e-4)
    yield (
        "dq",
        lambda q, k, v: (
            graft(right(q, k, v)[0], right(q * 1.001 - q.detach() * 0.001, k, v)[0]),
            right(q, k, v)[1],
        ),
    )
    yield "dk", lambda q, k, v: (right(q, k * 1.001 - k.detach() * 0.001, v)[0], right(q, k, v)[1])
    yield "dv", lambda q, k, v: (right(q, k, v * 1.001 - v.detach() * 0.001)[0], right(q, k, v)[1])
    yield (
        "dq",
        lambda q, k, v: (right(q, k, v)[0], right(q, k, v)[1].detach() + 0 * q.sum()),
    )  # the LSE's gradient is lost


@pytest.mark.parametrize("name, wrong", list(mistakes()))
def test_the_rule_has_teeth(name, wrong):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    report = compare_to_oracle(wrong, q, k, v, mask)
    assert not report.ok and report.errors[name] > report.allowed[name]
    with pytest.raises(AssertionError, match="too large"):
        assert_matches_oracle(wrong, q, k, v, mask)


def test_the_bounds_are_those_of_the_rule(monkeypatch):
    "Twice the yardstick's error for output and LSE, three times for gradients; the floor is small."
    def coarse(*arguments): return [1.5 * x for x in masked_attention(*arguments)]
    def attention(q, k, v): return masked_attention(q, k, v, mask)
    monkeypatch.setattr(reference, "_sdpa_yardstick", coarse)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    report = compare_to_oracle(attention, q, k, v, mask)
    for name, bound in report.allowed.items():
        times = 2 if name in ("out", "lse") else 3
        assert bound == pytest.approx(times * report.baseline[name], rel=1e-3)


def test_the_rule_refuses_nan_shapes_and_dtypes():
    q = torch.randn(1, 1, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool)

    def call(change):
        return lambda q, k, v: change(*masked_attention(q, k, v, mask))

    for change in (
        lambda o, l: (o * torch.nan, l),
        lambda o, l: (o[..., :4], l),
        lambda o, l: (o.double(), l),
        lambda o, l: (o, l.double()),
        lambda o, l: (o, l.masked_fill(torch.tensor([True, False, False, False]), -torch.inf)),
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            assert_matches_oracle(call(change), q, q, q, mask)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_sdpa_itself_obeys_the_rule(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 65, 32).to(dtype) for _ in range(3))

    def sdpa(q, k, v):
        wide = torch.promote_types(dtype, torch.float32)
        return F.scaled_dot_product_attention(q, k, v), masked_attention(
            q.to(wide), k.to(wide), v.to(wide), torch.ones(1, dtype=torch.bool)
        )[1]

    assert_matches_oracle(sdpa, q, k, v, torch.ones(65, 65, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(130, 70), (2, 1, 130, 70), (2, 1, 1, 70)], ids=str)
def test_the_oracle_some_rows_at_a_time_is_the_oracle(shape, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, d) for h, n, d in [(4, 130, 16), (2, 70, 16), (2, 70, 8)])
    mask, upstream = torch.rand(shape) > 0.9, reference._upstream(q, v, 0, True)

    def both():
        rule = reference.score_rule(None, q)
        exact = reference._exact(q, k, v, mask, rule, upstream)
        return exact, reference._largest_terms(q, k, v, upstream[0], mask, 0.25)

    whole, terms = both()
    calls, attention = [], reference.masked_attention
    monkeypatch.setattr(
        reference, "masked_attention", lambda *a: calls.append(len(a[0][0, 0])) or attention(*a))
    monkeypatch.setattr(reference, "_SCORES", 40 * 8 * 70)
    parts, same = both()
    assert calls == [40, 40, 40, 10] and same == terms
    for name, exact in whole.items(): torch.testing.assert_close(parts[name], exact)
