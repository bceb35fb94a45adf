"""Several branches: output, LSE and gradients are those of one softmax over the multiset of
keys, counted by loops."""
from itertools import product

import pytest
import torch
from cases import SCALES, as_options, layouts, placed, random_tensors, upstream
from hypothesis import example, given
from hypothesis import strategies as st
from sampling import FULL, examples, sampled

import hilbert_attn.tiles as tiles
from hilbert_attn import (
    COMBINES,
    CURVES,
    DILATION_MODES,
    DilatedPattern,
    curve_order,
    dilated_attention,
    hilbert_attention,
    set_backend,
)
from hilbert_attn.calls import check_call, on_branches
from hilbert_attn.dilated import attend_branches
from hilbert_attn.reference import assert_matches_oracle, compare_to_oracle


def counted(n, heads, lengths, rates, combine, mode, offsets, order, causal):
    "How often each key counts, (H, N, N) in token order: the definition, pair by pair."
    counts = torch.zeros(heads, n, n, dtype=torch.int64)
    sizes = [heads // len(lengths) + (b < heads % len(lengths)) for b in range(len(lengths))]
    position = [0] * n
    for p, token in enumerate(range(n) if order is None else order.tolist()): position[token] = p
    for h in range(heads):
        for b, (w, r) in enumerate(zip(lengths, rates)):
            if combine == "heads" and not sum(sizes[:b]) <= h < sum(sizes[:b + 1]): continue
            offset = 0 if mode == "residue" else (
                h if mode == "longnet" and offsets is None else 0 if offsets is None else offsets
                if isinstance(offsets, int) else offsets[h]) % r
            for i in range(n):
                for j in range(n):
                    p, s = position[i], position[j]
                    if p // w != s // w or causal and j > i: continue
                    ci, cj = p % w % r, s % w % r
                    if mode == "residue": counts[h, i, j] += ci == cj
                    else: counts[h, i, j] += cj == offset and (mode == "keys" or ci == offset)
    return counts


@st.composite
def calls(draw, max_n=40):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)]))
    heads, n = kv_heads * group, draw(st.integers(1, max_n))
    combine = draw(st.sampled_from(COMBINES))
    lengths = draw(
        st.lists(
            st.integers(1, max_n + 9), min_size=1,
            max_size=min(4, heads) if combine == "heads" else 4))
    rates = [draw(st.integers(1, min(w, 7))) for w in lengths]
    # a branch that stands twice
    if draw(st.booleans()): lengths, rates = lengths + lengths[:1], rates + rates[:1]
    if combine == "heads": lengths, rates = lengths[:heads], rates[:heads]
    mode = draw(st.sampled_from(DILATION_MODES))
    offsets = None if mode == "residue" else draw(
        st.none() | st.integers(0, 6) | st.lists(st.integers(0, 6), min_size=heads, max_size=heads))
    return dict(
        n=n, heads=heads, kv_heads=kv_heads, d=draw(st.sampled_from((16, 24, 64))),
        b=draw(st.integers(1, 2)), lengths=lengths, rates=rates, combine=combine, mode=mode,
        offsets=offsets, order=draw(st.sampled_from(("none", "random", *CURVES))),
        causal=draw(st.booleans()), key_mask=draw(st.booleans()), layout=draw(layouts()),
        dtype=draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))),
        scale=draw(st.sampled_from(SCALES)), lse_grad=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)))


def check(case, run=None, **options):
    generator = torch.Generator().manual_seed(case["seed"])
    n, b = case["n"], case["b"]
    q, k, v = placed(
        case["layout"],
        random_tensors(
            b, (case["heads"], case["kv_heads"], case["kv_heads"]), n, case["d"], case["dtype"],
            generator))
    order = None if case["order"] == "none" else torch.randperm(
        n, generator=generator
    ) if case["order"] == "random" else curve_order(n, case["order"])
    key_mask = torch.rand(b, n, generator=generator) < 0.6 if case["key_mask"] else None
    counts = counted(
        n, case["heads"], case["lengths"], case["rates"], case["combine"], case["mode"],
        case["offsets"], order, case["causal"])[None]
    if key_mask is not None: counts = counts * key_mask[:, None, None, :]
    arguments = dict(
        combine=case["combine"], dilation_mode=case["mode"], offsets=case["offsets"], order=order,
        curve=None, causal=case["causal"], key_mask=key_mask, **as_options(case["scale"]))
    def attention(q, k, v):
        if run:
            return run(
                q, k, v, segment_lengths=case["lengths"], dilation_rates=case["rates"], grid=None,
                dropout_p=0.0, **arguments)
        return dilated_attention(
            q, k, v, case["lengths"], case["rates"], **arguments, return_lse=True,
            **{"backend": "sdpa", **options})
    assert_matches_oracle(
        attention, q, k, v, counts, scale=case["scale"], lse_grad=case["lse_grad"],
        seed=case["seed"], layout=upstream(case["layout"]))


@given(calls())
# the second branch has no row
@example(
    dict(
        n=1, heads=1, kv_heads=1, d=16, b=1, lengths=[5, 5], rates=[1, 5], combine="lse",
        mode="longnet", offsets=3, order="none", causal=True, key_mask=False, layout="BHND",
        dtype=torch.float32, scale=None, lse_grad=True, seed=0))
def test_fuzz(case): check(case)


@given(calls(max_n=24))
def test_fuzz_sdpa_mask(case): check(case, backend="sdpa_mask")


@given(calls(max_n=24))
def test_fuzz_plain_expression(case):
    def plain(q, k, v, *, causal, key_mask, dropout_p, scale, softcap=None, **how):
        numbers = dict(dropout_p=dropout_p, scale=scale, softcap=softcap)
        call = check_call(
            q, k, v, causal=causal, key_mask=key_mask, **numbers, return_lse=True,
            custom_backward=False)
        return attend_branches(on_branches(call, **how), "sdpa")
    check(case, plain)


@examples(12, 40)
@given(calls(max_n=20))
def test_fuzz_triton(case): check({**case, "d": 16}, backend="triton")


CHECKED = list(product(COMBINES, DILATION_MODES, ("sdpa", "triton")))
USUAL = [x for x in CHECKED if x[2] == "sdpa"] + [("lse", "longnet", "triton")]


@pytest.mark.parametrize("combine, mode, backend", sampled(CHECKED, USUAL))
def test_gradcheck(combine, mode, backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, 11, 16, dtype=torch.float64, generator=generator, requires_grad=True)
        for h in (4, 2, 2))
    def run(q, k, v):
        return [
            x.masked_fill(x == -torch.inf, 0)
            for x in dilated_attention(
                q, k, v, [3, 7, 7, 20], [1, 2, 2, 5], combine=combine, dilation_mode=mode,
                causal=True, backend=backend, return_lse=True)]
    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("mode", DILATION_MODES)
def test_mixture_weights_sum_to_one(mode):
    "With all values equal to one, so is the output, wherever a branch has a key."
    q, k = torch.randn(2, 4, 50, 16), torch.randn(2, 4, 50, 16)
    out, lse = dilated_attention(
        q, k, torch.ones_like(k), [8, 20, 40], [2, 3, 7], dilation_mode=mode, return_lse=True)
    covered = lse > -torch.inf
    assert covered.any() and (mode != "longnet" or not covered.all())
    torch.testing.assert_close(out[covered], torch.ones_like(out[covered]))
    assert (out[~covered] == 0).all()


@pytest.mark.parametrize("backend", ("sdpa", "sdpa_mask", "reference", "triton"))
def test_uncovered_rows(backend):
    q, k, v = (torch.randn(1, 2, 12, 16, requires_grad=True) for _ in range(3))
    out, lse = dilated_attention(
        q, k, v, [6, 12], [2, 4], offsets=1, curve=None, return_lse=True, backend=backend)
    alone = torch.arange(12) % 2 == 0
    assert (lse[:, :, alone] == -torch.inf).all()
    assert (lse[:, :, ~alone] > -torch.inf).all()
    assert (out[:, :, alone] == 0).all()
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all(g.isfinite().all() and (g[:, :, alone] == 0).all() and g.any() for g in grads)


def test_the_tolerance_sees_a_detached_mixture():
    "Treating the weights as constants is caught by the very rule that the real path obeys."
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(3))
    def parts(q, k, v):
        return [
            hilbert_attention(q, k, v, curve=None, segment_size=w, dilation_rate=r, return_lse=True)
            for w, r in ((8, 1), (40, 4))]
    def detached(q, k, v):
        (a, la), (b, lb) = parts(q, k, v)
        weight = torch.sigmoid(la - lb).detach()[..., None]
        return weight * a + (1 - weight) * b, torch.logaddexp(la, lb)
    counts = counted(40, 2, [8, 40], [1, 4], "lse", "residue", None, None, False)[None]
    report = compare_to_oracle(detached, q, k, v, counts)
    assert report.errors["out"] <= report.allowed["out"]
    assert report.errors["dq"] > 100 * report.allowed["dq"]


def test_one_branch_is_hilbert_attention():
    q, k, v = (torch.randn(1, 3, 70, 16) for _ in range(3))
    for mode in DILATION_MODES:
        assert torch.equal(
            dilated_attention(q, k, v, 30, 3, dilation_mode=mode, grid=(7, 10)),
            hilbert_attention(
                q, k, v, segment_size=30, dilation_rate=3, dilation_mode=mode, grid=(7, 10)))
    # twice the same: every key counts twice
    dense = dilated_attention(q, k, v, [100, 70], [1, 1], return_lse=True)
    once = hilbert_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(dense, (once[0], once[1] + torch.tensor(2.0).log()))


def test_branches_that_are_alike_are_computed_once(monkeypatch):
    computed = []
    flash = tiles.flash
    monkeypatch.setattr(
        tiles, "flash",
        lambda q, k, *rest, **options: computed.append(
            q[..., 0].numel() * k.shape[-2]) or flash(q, k, *rest, **options))
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    dilated_attention(q, k, v, [16, 64, 200, 64], [1, 1, 1, 1], curve=None, backend="sdpa")
    assert sum(computed) == DilatedPattern.for_heads(
        64, 2, [16, 64], [1, 1]).pairs() == 2 * 64 * (16 + 64)


def test_deterministic_compiled_and_known_to_opcheck():
    q, k, v = (torch.randn(2, h, 37, 16, requires_grad=True) for h in (4, 2, 2))
    upstream = torch.randn(2, 4, 37, 16)
    def run(q, k, v):
        return dilated_attention(q, k, v, [8, 37], [1, 3], causal=True, backend="sdpa")
    def results(f): return [out := f(q, k, v), *torch.autograd.grad(out, (q, k, v), upstream)]
    first = results(run)
    assert all(torch.equal(a, b) for a, b in zip(first, results(run)))
    torch.testing.assert_close(
        results(torch.compile(run, fullgraph=True, backend="aot_eager")), first)
    options = (
        None, None, None, [8, 37], [1, 3], [1, 2], "longnet", [0, 0, 0, 0, 0, 1, 2, 0], True,
        [0.25], 0.0)
    for triton in (False, True):
        torch.library.opcheck(
            torch.ops.hilbert_attn.dilated_forward.default, (q, k, v, *options, triton))


@pytest.mark.parametrize("backend, rounds", (("sdpa", 300), ("triton", 50 if FULL else 20)))
def test_dropout_keeps_its_expectation_and_its_mask(backend, rounds):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))
    def run(**options):
        return dilated_attention(
            q, k, v, [8, 16], [1, 2], dilation_mode="residue", backend=backend, **options)
    mean = torch.stack([run(dropout_p=0.3) for _ in range(rounds)]).mean(0)
    spread = (run(dropout_p=0.3) - run()).std()
    assert 0 < (mean - run()).std() < 3 * spread / rounds ** 0.5
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    def seeded(q, k, v):
        torch.manual_seed(1)
        return dilated_attention(q, k, v, [8, 16], [1, 2], dropout_p=0.3, backend=backend)
    assert torch.autograd.gradcheck(seeded, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(segment_lengths=[8], dilation_rates=[1, 2]), "as many of each"),
        (dict(segment_lengths=[], dilation_rates=[]), "at least one"),
        (dict(segment_lengths=[8, 0], dilation_rates=[1, 1]), "segment_lengths=0"),
        (dict(segment_lengths=[8, 4], dilation_rates=[1, 5]), "dilation_rate=5"),
        (dict(segment_lengths=[8], dilation_rates=[0]), "dilation_rates=0"),
        (dict(combine="sum"), "'lse', 'heads'"),
        (
            dict(segment_lengths=[8] * 3, dilation_rates=[1] * 3, combine="heads"),
            "each branch needs a head"),
        (dict(dilation_mode="both"), "known modes"),
        (dict(offsets=[0, 1, 2]), "offsets has 3 entries"), (dict(offsets=-1), "at least 0"),
        (dict(dilation_mode="residue", offsets=1), "residue"),
        (dict(curve="peano"), "known curves"), (dict(grid=(5, 5)), "grid"),
        (dict(dropout_p=1.0), "dropout_p"),
        (dict(segment_lengths=[8, 20.9]), r"segment_lengths=\[8, 20.9\]: expected whole numbers"),
        (
            dict(segment_lengths="24", dilation_rates=[1]),
            "segment_lengths='24': expected a whole number"),
        (dict(segment_lengths=[8, True]), "expected whole numbers"),
        (dict(dilation_rates=[1, 2.0]), "dilation_rates=.*: expected whole numbers"),
        (dict(causal="False"), "causal='False': expected True or False"),
        (dict(offsets=1.0), "offsets=1.0: expected a whole number"),
        (dict(backend="fast"), "known backends"), (dict(scale=-1.0), "scale")])
def test_bad_arguments(options, message):
    q = torch.randn(1, 2, 20, 16)
    with pytest.raises(ValueError, match=message):
        dilated_attention(
            q, q, q, **{**dict(segment_lengths=[8, 20], dilation_rates=[1, 2]), **options})


def test_autocast_and_forced_backends():
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    plain = dilated_attention(q, k, v, [8, 20], [1, 2])
    with torch.autocast("cpu", torch.bfloat16): half = dilated_attention(q, k, v, [8, 20], [1, 2])
    assert half.dtype == torch.bfloat16 and (half - plain).norm() < 0.02 * plain.norm()
    with set_backend("reference"):
        torch.testing.assert_close(dilated_attention(q, k, v, [8, 20], [1, 2]), plain)
