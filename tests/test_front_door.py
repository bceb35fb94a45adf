"""`hilbert_attention`: answers to bad input, choice of backend, equivalences, compilation."""
import copy
import pickle
import re
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from cases import Case, cases
from hypothesis import given, settings
from torch.fx.experimental.proxy_tensor import make_fx

import hilbert_attn
from hilbert_attn import (
    backends,
    dilated_attention,
    hilbert_cross_attention,
    hilbert_slide_attention,
    tiles_shared_attention,
)
from hilbert_attn.backends import (
    Backend,
    _architecture,
    attend,
    choose_backend,
    detect_gpu_architecture,
    explain_backend,
    hilbert_attention,
    set_backend,
)
from hilbert_attn.calls import check_call, on_segments
from hilbert_attn.config import AttentionConfig
from hilbert_attn.curves import curve_order
from hilbert_attn.kernels.tuning import default_tile
from hilbert_attn.patterns import attention_mask
from hilbert_attn.reference import masked_attention

X = torch.zeros(2, 4, 12, 8)
JAGGED = torch.nested.nested_tensor([X[0], X[0]], layout=torch.jagged)
REAL_POLICY = True


BAD_TENSORS = [
    (dict(q=X[0]), r"q has shape \(4, 12, 8\): expected 4 dimensions"),
    (dict(q=[1]), "q is a list: expected a tensor"),
    (dict(k=X.to_sparse()), "k is nested or of layout torch.sparse_coo: expected a dense tensor"),
    (dict(q=JAGGED), "q is nested or of layout torch.jagged: .* see cu_seqlens"),
    (dict(q=X.long()), "q has dtype torch.int64: expected one of"),
    (dict(v=X[:, :2]), "k has shape .* and v .*: they must agree"),
    (dict(q=X[:1]), "B, N and D must agree"), (dict(q=X[:, :, :6]), "B, N and D must agree"),
    (dict(q=X[..., :4]), "B, N and D must agree"),
    (
        dict(k=torch.zeros(2, 3, 12, 8), v=torch.zeros(2, 3, 12, 8)),
        "q has 4 heads and k 3: the query heads must be a multiple"),
    (dict(q=X[:, :, :0], k=X[:, :, :0], v=X[:, :, :0]), "N and D must be at least 1"),
    (dict(k=X.double()), "dtypes torch.float32, torch.float64, torch.float32: they must agree"),
    (dict(v=X.to("meta")), "on cpu, cpu, meta: they must be on one device"),
]
BAD_PATTERNS = [
    (dict(grid=(3, 5)), r"grid=\(3, 5\) has 15 cells for 12 tokens"),
    (dict(grid=(3, -4)), "each at least 1"),
    (
        dict(curve="peano"),
        "curve='peano': known curves are 'row_major', 'snake', 'tile', 'morton', 'hilbert'"),
    (dict(dilation_rate=0), "dilation_rate=0: must be at least 1"),
    (dict(segment_size=4, dilation_rate=5), "dilation_rate=5: must not exceed segment_size=4"),
    (dict(segment_size=0), "segment_size=0: must be at least 1"),
    (
        dict(dilation_mode=["keys"]),
        r"dilation_mode=\['keys'\] is no word: known"),
    (
        dict(dilation_mode="both"),
        "dilation_mode='both': known modes are 'residue', 'keys', 'longnet'"),
    (
        dict(dilation_mode="keys", dilation_rate=2, offsets=[0, 1]),
        r"offsets has 2 entries: expected one per head \(4\)"),
    (dict(dilation_mode="keys", dilation_rate=2, offsets=2), "less than dilation_rate=2"),
    (dict(offsets=1, dilation_rate=2), "dilation_mode='residue' has no offsets"),
]
BAD_ORDERS_AND_MASKS = [
    (
        dict(order=torch.zeros(12, dtype=torch.int64)),
        "order is no permutation: it must hold each of 0 … 11 once"),
    (dict(order=torch.arange(1, 13)), "order is no permutation"),
    (
        dict(order=torch.arange(11)),
        r"order is given with shape \(11,\), dtype torch.int64: expected an int64 tensor of "
        r"shape \(12,\)"),
    (dict(order=torch.arange(12.0)), "dtype torch.float32: expected an int64"),
    (dict(order=list(range(12))), "order is given with list"),
    (dict(order=torch.arange(12, device="meta")), "order is on meta and q on cpu"),
    (
        dict(key_mask=torch.ones(2, 12)),
        r"key_mask is torch.float32 \(2, 12\) on cpu: expected bool of shape "
        r"\(B, N\) = \(2, 12\)"),
    (dict(key_mask=torch.ones(2, 4, dtype=torch.bool)), "key_mask is torch.bool"),
    (dict(key_mask=True), "key_mask is bool: expected bool of shape"),
]
BAD_NUMBERS = [
    (dict(dropout_p=-0.1), "dropout_p=-0.1: must be at least 0 and less than 1"),
    (dict(dropout_p=1.0), "dropout_p=1.0: must be"),
    (dict(scale=float("nan")), "scale=nan: must be positive and finite"),
    (dict(scale=-1.0), "scale=-1.0: must be positive and finite"),
    (dict(causal="False"), "causal='False': expected True or False"),
    (dict(causal=1), "causal=1: expected True or False"),
    (dict(return_lse="no"), "return_lse='no': expected True or False"),
    (dict(segment_size=2.5), "segment_size=2.5: expected a whole number"),
    (dict(segment_size=4.0), "segment_size=4.0: expected a whole number"),
    (dict(segment_size=float("nan")), "segment_size=nan: expected a whole number"),
    (dict(segment_size=True), "segment_size=True: expected a whole number"),
    (dict(segment_size="4"), "segment_size='4': expected a whole number"),
    (dict(segment_size=4, dilation_rate=2.0), "dilation_rate=2.0: expected a whole number"),
    (
        dict(segment_size=4, dilation_rate=2, dilation_mode="keys", offsets=0.5),
        "offsets=0.5: expected a whole number"),
    (dict(grid=(3, 4.0)), r"grid=\(3, 4.0\): expected N, \(H, W\)"),
    (dict(grid="12"), "grid='12': expected N"),
    (dict(dropout_p="0.1"), "dropout_p='0.1': expected a number"),
    (dict(scale="1"), "scale='1': expected a number"),
    (dict(scale=torch.tensor(1.0)), r"scale=tensor\(1.\): expected a number"),
    (
        dict(backend="cudnn"),
        "backend='cudnn': known backends are 'auto', 'reference', 'sdpa_mask', 'sdpa', "
        "'triton'"),
]


@pytest.mark.parametrize(
    "arguments, message", BAD_TENSORS + BAD_PATTERNS + BAD_ORDERS_AND_MASKS + BAD_NUMBERS)
def test_bad_input_is_answered_with_a_sentence(arguments, message, monkeypatch):
    monkeypatch.setattr(Backend, "run", lambda *a, **k: pytest.fail("a kernel was started"))
    with pytest.raises(ValueError, match=message):
        hilbert_attention(**{"q": X, "k": X, "v": X, **arguments})


def test_numpy_numbers_are_numbers():
    x = rand(1, 2, 96, 8)
    options = dict(
        segment_size=np.int32(24), dilation_rate=np.int64(2), causal=np.True_,
        scale=np.float64(0.5), grid=np.array([8, 12]))
    plain = dict(segment_size=24, dilation_rate=2, causal=True, scale=0.5, grid=(8, 12))
    assert torch.equal(hilbert_attention(x, x, x, **options), hilbert_attention(x, x, x, **plain))


ON_META = {
    "segments": (
        hilbert_attention,
        dict(segment_size=4)),
    "branches": (
        dilated_attention,
        dict(
            segment_lengths=[4, 8],
            dilation_rates=[1, 2])),
    "heads": (
        dilated_attention,
        dict(
            segment_lengths=[4, 8],
            dilation_rates=[1, 2],
            combine="heads")),
    "slide": (
        hilbert_slide_attention,
        dict(grid=(3, 4), window=4)),
    "tiles": (
        tiles_shared_attention,
        dict(tiles=3, shared=2)),
    "cross": (
        hilbert_cross_attention,
        dict(segment_size=4)),
}
EVERYWHERE = ("auto", "sdpa", "sdpa_mask", "reference")


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("name", ON_META)
def test_meta_tensors_give_shapes(name, backend):
    q = torch.empty(2, 2, 12, 4, device="meta")
    q.requires_grad_()
    attention, how = ON_META[name]
    how = how | dict(return_lse=True)
    out, lse = attention(q, q, q, backend=backend, **how)
    assert out.is_meta and out.shape == q.shape
    assert lse.is_meta and lse.shape == q.shape[:3]
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.shape == q.shape


class DTensor(torch.Tensor):
    "As of torch.distributed.tensor, without a group."
    def to_local(self):
        return self.as_subclass(torch.Tensor)


def test_a_tensor_of_several_processes_is_refused():
    q = torch.randn(1, 2, 6, 4)
    k = q.as_subclass(DTensor)
    said = r"k is a DTensor: expected a plain tensor"
    with pytest.raises(ValueError, match=said):
        hilbert_attention(q, k, q)


@pytest.mark.parametrize("kv_heads", (0, 1))
@pytest.mark.parametrize("size", (None, 4))
def test_no_heads_are_refused(kv_heads, size):
    q = torch.randn(1, 0, 6, 4)
    k = torch.randn(1, kv_heads, 6, 4)
    how = dict(segment_size=size, backend="sdpa")
    said = "q has 0 heads and k .*at least one of each"
    with pytest.raises(ValueError, match=said):
        hilbert_attention(q, k, k, **how)


def learning_segments(leaves, backend):
    "Output and gradients."
    how = dict(segment_size=12, backend=backend)
    out = hilbert_attention(*leaves, **how)
    grads = torch.autograd.grad(out.sum(), leaves)
    return out, *grads


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize(
    "dtype", (torch.bfloat16, torch.float32))
def test_rows_that_overlap(dtype, backend):
    "oneDNN refuses such keys in bfloat16."
    dice = torch.Generator().manual_seed(0)
    lines = torch.randn(3, 1, 2, 48, generator=dice)
    windows = lines.to(dtype).unfold(3, 16, 1)
    leaves = [x.detach() for x in windows]
    copies = [x.double().contiguous() for x in leaves]
    for x in (*leaves, *copies): x.requires_grad_()
    assert leaves[0].stride()[2:] == (1, 1)
    found = learning_segments(leaves, backend)
    wanted = learning_segments(copies, "reference")
    limit = dict(rtol=0, atol=16 * torch.finfo(dtype).eps)
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x.double(), y, **limit)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_without_sizes_are_refused():
    q = torch.nested.nested_tensor([X[0], X[1, :, :5]])
    with pytest.raises(ValueError, match="q is nested or of layout torch.strided"):
        hilbert_attention(q, q, q)


@pytest.mark.parametrize(
    "order",
    (torch.zeros(288, dtype=torch.int64), torch.arange(1, 289), torch.arange(288).flip(0) - 1))
@pytest.mark.parametrize("mode", ("eager", "inference", "inference order", "compiled", "traced"))
def test_an_order_that_is_no_permutation_is_refused_everywhere(order, mode):
    x = rand(1, 2, 288, 8)
    def f(x, order): return hilbert_attention(x, x, x, order=order, segment_size=24)
    def run(order):
        if mode == "compiled":
            return torch.compile(f, fullgraph=True, backend="aot_eager")(x, order)
        if mode == "traced": return make_fx(f)(x, order)(x, order)
        with torch.inference_mode(mode != "eager"):
            return f(x, order.clone() if mode == "inference order" else order)
    right = torch.randperm(288, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(right), f(x, right))
    with pytest.raises(ValueError, match="order is no permutation"): run(order)


def test_a_compiled_graph_checks_each_order():
    x, good = rand(1, 2, 96, 8), torch.arange(96).flip(0)
    f = torch.compile(
        lambda x, order: hilbert_attention(x, x, x, order=order, segment_size=24), fullgraph=True,
        backend="aot_eager")
    f(x, good)
    with pytest.raises(ValueError, match="order is no permutation"): f(x, good.clamp(min=1))


def test_an_order_is_checked_again_after_a_write():
    order = torch.randperm(12)
    hilbert_attention(X, X, X, order=order, segment_size=4)
    order[0] = order[1]
    with pytest.raises(ValueError, match="no permutation"):
        hilbert_attention(X, X, X, order=order, segment_size=4)


@given(cases(max_n=40, head_dims=(16, 24), dtypes=(torch.float32,)))
@settings(max_examples=60)
def test_all_backends_through_the_front_door(case: Case):
    def attention(q, k, v, pattern, *, backend, **common):
        return hilbert_attention(
            q, k, v, curve=None, segment_size=case.w, dilation_rate=case.r,
            dilation_mode=case.mode, offsets=case.offsets, **common, backend=backend,
            return_lse=True)
    for name in ("sdpa", "sdpa_mask", "reference"): case.check(attention, backend=name)


def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_grid_curve_and_order_say_the_same():
    q, k, v = (rand(1, 2, 77, 8, seed=s) for s in range(3))
    options = dict(segment_size=20, dilation_rate=2)
    by_curve = hilbert_attention(q, k, v, grid=(7, 11), **options)
    order = curve_order((7, 11))
    by_order = hilbert_attention(q, k, v, order=order, **options)
    inside = hilbert_attention(
        q[:, :, order], k[:, :, order], v[:, :, order], curve=None, **options)
    assert torch.equal(by_curve, by_order)
    torch.testing.assert_close(by_curve[:, :, order], inside)
    assert torch.equal(
        hilbert_attention(q, k, v, grid=77, **options), hilbert_attention(q, k, v, **options))
    assert torch.equal(
        hilbert_attention(q, k, v, curve="row_major", **options),
        hilbert_attention(q, k, v, curve=None, **options))
    assert torch.equal(hilbert_attention(q, k, v, order=order.int(), **options), by_order)
    assert not torch.allclose(by_curve, hilbert_attention(q, k, v, **options))


def test_causal_lets_no_future_leak_under_any_curve():
    q, k, v = (rand(1, 2, 60, 8, seed=s) for s in range(3))
    for curve in ("hilbert", "morton", "snake", "tile:3", None):
        options = dict(grid=(6, 10), curve=curve, segment_size=25, dilation_rate=2, causal=True)
        before = hilbert_attention(q, k, v, **options)
        k2, v2 = k.clone(), v.clone()
        k2[:, :, 31:], v2[:, :, 31:] = rand(1, 2, 29, 8, seed=7), 1e3
        after = hilbert_attention(q, k2, v2, **options)
        assert torch.equal(before[:, :, :31], after[:, :, :31]) and not torch.equal(before, after)


def test_one_segment_is_dense_attention():
    q, k, v = (rand(2, 4, 50, 16, seed=s) for s in range(3))
    torch.testing.assert_close(
        hilbert_attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(
        hilbert_attention(q, k, v, causal=True),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_autocast_casts_like_sdpa():
    q = rand(1, 2, 30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert hilbert_attention(q, q, q.bfloat16(), segment_size=8).dtype == torch.bfloat16
        assert hilbert_attention(
            q.double(), q.double(), q.double(), segment_size=8).dtype == torch.float64


def test_huge_scores_stay_finite():
    q = 1e4 * rand(1, 1, 33, 16)
    for backend in ("sdpa", "sdpa_mask", "reference"):
        out, lse = hilbert_attention(q, q, q, segment_size=10, backend=backend, return_lse=True)
        assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("name", ("triton",))
def test_a_forced_backend_that_cannot_run_is_an_error(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = (rf"backend '{name}', asked for by the argument backend, cannot run on cpu: "
               ".*Backends that can: 'reference', 'sdpa_mask', 'sdpa'")
    with pytest.raises(RuntimeError, match=refused):
        hilbert_attention(X, X, X, backend=name)
    monkeypatch.setenv("HILBERT_ATTN_BACKEND", name)
    with pytest.raises(RuntimeError, match="asked for by HILBERT_ATTN_BACKEND"):
        hilbert_attention(X, X, X)


def test_forcing_a_backend(monkeypatch):
    used, function = [], Backend.run
    def noted(backend, call, family):
        used.append(backend.name)
        return function(backend, call, family)
    monkeypatch.setattr(Backend, "run", noted)
    x = torch.randn(1, 1, 240, 8)
    def call(**options):
        hilbert_attention(x, x, x, segment_size=80, **options)
        return used.pop()
    assert call() == "sdpa"
    with set_backend("sdpa_mask"):
        assert call() == "sdpa_mask" and call(backend="reference") == "reference"
        with set_backend("reference"): assert call() == "reference"
        assert call() == "sdpa_mask"
    assert call() == "sdpa"
    monkeypatch.setenv("HILBERT_ATTN_BACKEND", "sdpa_mask")
    assert call() == "sdpa_mask"
    with set_backend("reference"): assert call() == "reference"
    monkeypatch.setenv("HILBERT_ATTN_BACKEND", "fast")
    with pytest.raises(ValueError, match="HILBERT_ATTN_BACKEND='fast': known backends"): call()
    monkeypatch.delenv("HILBERT_ATTN_BACKEND")
    set_backend("sdpa_mask")
    try: assert call() == "sdpa_mask"
    finally: set_backend("auto")
    with pytest.raises(ValueError, match="known backends"): set_backend("fast")


def test_a_fallback_warns_once_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(UserWarning, match="'triton' is preferred on cuda but"):
        assert choose_backend("auto", torch.device("cuda"))[0] == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("auto", torch.device("cuda"))[0] == "sdpa"


@pytest.mark.parametrize(
    "capability, name, dtype, mixed, triton",
    [
        (None, "CPU", torch.float32, False, False), ((6, 1), "Pascal", torch.float32, False, False),
        ((7, 0), "Volta", torch.float16, True, False),
        ((7, 5), "Turing", torch.float16, True, False),
        ((8, 0), "Ampere", torch.bfloat16, True, True),
        ((8, 6), "Ampere", torch.bfloat16, True, True), ((8, 9), "Ada", torch.bfloat16, True, True),
        ((9, 0), "Hopper", torch.bfloat16, True, True),
        ((10, 0), "Blackwell", torch.bfloat16, True, True),
        ((12, 0), "Blackwell", torch.bfloat16, True, True),
        ((3, 5), "before Pascal", torch.float32, False, False)])
def test_architectures(capability, name, dtype, mixed, triton, monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    a = _architecture(capability)
    assert (a.name, a.capability, a.dtype, a.mixed_precision) == (name, capability, dtype, mixed)
    assert ("triton" in a.backends) == triton
    assert {"sdpa", "sdpa_mask", "reference"} <= set(a.backends)
    tile = default_tile("forward", 64, dtype, capability) if triton else None
    assert a.block_sizes == ((tile.block_m, tile.block_n) if triton else (64, 64))
    with a.autocast("cpu"):  # the device type does not matter to what is switched on
        assert torch.is_autocast_enabled("cpu") == mixed
        assert (not mixed or torch.get_autocast_dtype("cpu") == dtype)


@pytest.mark.parametrize(
    "capability, chosen",
    [
        ((6, 1), "sdpa"), ((7, 5), "sdpa"), ((8, 0), "triton"), ((8, 9), "triton"),
        ((9, 0), "triton"), ((10, 0), "triton")])
def test_choice_on_each_architecture(capability, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choice = explain_backend((1, 2, 1000, 64), device="cuda", gradients=False)
    assert choice.backend == chosen and detect_gpu_architecture("cuda").backends[0] == chosen
    assert "cutting" not in choice.rejected.get("sdpa", "")  # only a mask wins by that
    if chosen != "triton":
        assert f"this GPU has {capability[0]}.{capability[1]}" in choice.rejected["triton"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_a_gpu_that_is_not_there():
    for ask in (
        detect_gpu_architecture, lambda device: explain_backend((1, 1, 8, 8), device=device)):
        with pytest.raises(RuntimeError, match="torch finds no CUDA GPU here"): ask("cuda")


def test_detect_here(): assert detect_gpu_architecture("cpu").name == "CPU"


def test_explain_backend():
    choice = explain_backend(
        (2, 4, 240, 16), segment_size=30, dilation_rate=2, dtype=torch.bfloat16)
    mask = attention_mask(hilbert_attn.SegmentPattern(240, 30, 2))
    assert choice.backend == "sdpa"
    assert choice.pairs == 8 * mask.sum()
    assert choice.density == pytest.approx(mask.double().mean().item())
    assert choice.flops == 4 * 16 * choice.pairs
    assert choice.bytes == 4 * 2 * 4 * 240 * 16 * 2 + 4 * 2 * 4 * 240
    assert set(choice.rejected) == set(backends.REGISTRY) - {"sdpa"}
    assert all(choice.rejected.values())
    assert re.search(r"sdpa: .*\n.*pairs.*GFLOP.*MB", str(choice))
    assert "not sdpa_mask: " in str(choice)
    assert explain_backend(rand(1, 4, 30, 8), rand(1, 2, 30, 8)).flops == 4 * 8 * 4 * 900
    with pytest.raises(ValueError, match="dilation_rate=0"):
        explain_backend((1, 1, 8, 8), dilation_rate=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(segmentsize=4),
            "segmentsize=4: no such argument of hilbert_attention is known here, .*segment_size"),
        (
            dict(segment_size=4, dilation_rates=[2]),
            r"dilation_rates=\[2\]: no such argument of hilbert_attention"),
        (
            dict(segment_lengths=[4], dilation_rates=[1], segment_size=4),
            "segment_size=4: no such argument of dilated_attention"),
        (
            dict(segment_lengths=[4], dilation_rates=[1], bias=torch.zeros(2, 191)),
            r"bias=<Tensor float32 \(2, 191\)>: no such argument of dilated_attention"),
        (
            dict(return_lse=True),
            "return_lse=True: no such argument of hi")])
def test_explain_backend_knows_its_options(options, message):
    with pytest.raises(ValueError, match=message): explain_backend((1, 2, 96, 8), **options)


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("layers", 0, "=0: must be at least 1"),
        ("layers", 1.5, "=1.5: expected a whole"),
        ("ranks", 0, "=0: must be at least 1"),
        ("ranks", -2, "=-2: must be at least 1"),
        ("memory", -1, "=-1: expected a number"),
        ("memory", "16 GB", "='16 GB': expected"),
        ("k", (1, -2, 96, 8), "at least 0"),
        ("k", (1, 2.0, 96, 8), "whole numbers"),
        ("k", 2, "4 dimensions"),
    ],
)
def test_explain_backend_counts(name, value, rule):
    own = "" if name == "k" else name
    with pytest.raises(ValueError, match=own + rule):
        explain_backend(
            (1, 2, 96, 8),
            **{name: value},
        )


REFUSED = (
    dict(grid=(9, 9)),
    dict(curve="hilbrt"),
    dict(scale=-1),
    dict(dropout_p=2),
    dict(softcap=-1),
    dict(causal="yes"),
    dict(sink_logits=torch.zeros(3)),
    dict(bias=torch.zeros(2, 126)),
    dict(bias=torch.zeros(2, 13, 15), grid=(8, 8)),
    dict(order=torch.zeros(64)),
    dict(order=torch.zeros(64, dtype=torch.int64)),
    dict(order=list(range(64))),
    dict(key_mask=torch.ones(3, 3)),
    dict(key_mask=torch.ones(1, 64)),
)
OF_BRANCHES = [options for options in REFUSED if "bias" not in options]


@pytest.mark.parametrize("options,several", [
    *((options, False) for options in REFUSED),
    *((options, True) for options in OF_BRANCHES), # branches take no bias
])
def test_explain_backend_raises_what_the_call_would(options, several):
    call = hilbert_attention
    how = dict(segment_size=16)
    q = rand(1, 2, 64, 8)
    if several:
        how = dict(segment_lengths=[8, 16], dilation_rates=[1, 2])
        call = hilbert_attn.dilated_attention
    with pytest.raises(ValueError) as expected: call(q, q, q, **how, **options)
    argument = re.match(r"\w+", str(expected.value))[0]
    for about in (q, q.shape):
        with pytest.raises(ValueError, match=argument): explain_backend(about, **how, **options)


def test_explain_backend_takes_all_arguments_of_the_functions():
    common = dict(
        grid=(8, 12), curve="hilbert", order=None, dilation_mode="residue", offsets=None,
        causal=True, key_mask=None, dropout_p=0.0, scale=None)
    assert explain_backend(
        (1, 2, 96, 8), segment_size=24, dilation_rate=2, **common).backend == "sdpa_mask"
    assert explain_backend(
        (1, 2, 96, 8), segment_lengths=[24], dilation_rates=[2], combine="lse",
        **common).backend == "sdpa_mask"


@pytest.mark.parametrize("choice", (
    explain_backend((1, 2, 96, 8), memory=1), explain_backend((1, 2, 96, 8), gradients=False),
    hilbert_attn.explain_attention_type(
        AttentionConfig(dim=16, heads=2, segment_lengths=8, dilation_rates=1), 64)))
def test_a_choice_is_copied_stored_and_hashed(choice):
    again = [copy.copy(choice), copy.deepcopy(choice), pickle.loads(pickle.dumps(choice))]
    assert {choice, *again} == {choice}
    assert str(again[2]) == str(choice)
    assert asdict(again[1]) == asdict(choice)


def test_policy_by_length():
    threads = torch.get_num_threads()
    longest = max(row.max_tokens["segments"] for row in backends.POLICY
                  if row.max_tokens and row.min_threads <= threads)
    assert explain_backend((1, 2, longest, 16)).backend == "sdpa_mask"
    assert explain_backend((1, 2, longest + 1, 16)).backend == "sdpa"
    assert "cutting" in explain_backend((1, 2, longest, 16)).rejected["sdpa"]


def test_explain_several_branches():
    options = dict(segment_lengths=[16, 64, 200], dilation_rates=[1, 4, 1])
    choice = explain_backend((3, 4, 128, 16), **options, combine="heads")
    assert choice.pairs == 3 * hilbert_attn.DilatedPattern.for_heads(
        128, 4, **options, combine="heads").pairs()
    with pytest.raises(ValueError, match="as many of each"):
        explain_backend((1, 1, 8, 8), segment_lengths=[2, 4])


def test_strategy_follows_memory():
    shape, layers = (2, 4, 1000, 16), 10
    needs = backends.training_memory(shape, 2, 4, layers, ranks=4)
    q, kv, lse = (4 * 2 * 1000 * width for width in (4 * 16, 2 * 16, 4))
    assert needs["store"] == layers * (2 * q + 2 * kv + lse) + 2 * (q + kv)
    assert needs["checkpoint"] == layers * q + (2 * q + 2 * kv + lse) + 2 * (q + kv)
    assert needs["ring"] == needs["checkpoint"] / 4
    def ask(memory, **options):
        return explain_backend(shape, (2, 2, 1000, 16), layers=layers, memory=memory, **options)
    assert ask(2 * needs["store"]).strategy == "store"
    assert ask(2 * needs["store"] - 2).strategy == "checkpoint"
    assert ask(needs["checkpoint"], ranks=4).strategy == "ring"
    assert "not fit" not in ask(needs["checkpoint"], ranks=4).strategy_reason
    alone = ask(needs["checkpoint"])
    assert alone.strategy == "checkpoint"
    assert "no process group" in alone.strategy_reason
    assert "ring" not in alone.memory
    assert "not fit" in ask(needs["ring"], ranks=4).strategy_reason
    assert "to train: ring" in str(ask(needs["checkpoint"], ranks=4))
    assert "to train" not in str(ask(1, gradients=False))
    here = explain_backend(shape)
    assert here.strategy == "store" and 1e8 < here.memory_at_hand < 1e14


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_into_one_graph(dynamic):
    def f(q, k, v):
        return hilbert_attention(q * 1.5, k, v, segment_size=16, dilation_rate=2, causal=True).sin()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (40, 57):
        q, k, v = (rand(1, 2, n, 8, seed=s).requires_grad_() for s in range(3))
        a, b = f(q, k, v), compiled(q, k, v)
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(
            torch.autograd.grad(b.sum(), (q, k, v)), torch.autograd.grad(a.sum(), (q, k, v)))


def test_compiles_with_inductor():
    def f(q, k, v, order):
        return hilbert_attention(q.cos(), k, v, order=order, segment_size=16, return_lse=True)
    q, k, v = (rand(1, 2, 40, 8, seed=s) for s in range(3))
    order = torch.randperm(40)
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(q, k, v, order), f(q, k, v, order))


def test_exports():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v): return hilbert_attention(q, k, v, segment_size=16)
    q, k, v = (rand(1, 2, 40, 8, seed=s) for s in range(3))
    exported = torch.export.export(Attend(), (q, k, v))
    torch.testing.assert_close(exported.module()(q, k, v), Attend()(q, k, v))
    assert "hilbert_attn.sdpa_forward" in str(exported.graph)


def test_lse_merges_segments_of_keys():
    """The LSE that comes out is the one that merging needs: causal = (causal inside halves) +
    (second half to first)."""
    from hilbert_attn.reference import merge_attention
    q, k, v = (rand(1, 2, 32, 8, seed=s) for s in range(3))
    a, lse_a = hilbert_attention(q, k, v, segment_size=16, causal=True, curve=None, return_lse=True)
    b, lse_b = masked_attention(
        q, k, v, (torch.arange(32)[:, None] >= 16) & (torch.arange(32) < 16))
    out, lse = merge_attention([a, b], [lse_a, lse_b])
    torch.testing.assert_close((out, lse), hilbert_attention(q, k, v, causal=True, return_lse=True))


def test_the_plain_expression_of_a_forced_backend(monkeypatch):
    """`custom_backward=False` keeps to the backend that was forced, or is refused; the policy's
    choice may give way."""
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    x = rand(1, 2, 80, 8)
    def chosen(**options): return choose_backend("auto", x.device, 80, **options)[0]
    for name in ("reference", "sdpa_mask", "sdpa"):
        with set_backend(name): assert chosen(custom_backward=False) == name
    refused = "'triton', asked for by set_backend.*no plain PyTorch expression.*'sdpa'"
    with set_backend("triton"), pytest.raises(RuntimeError, match=refused):
        chosen(custom_backward=False)
    monkeypatch.setattr(backends, "POLICY", (backends.PolicyRow("any", "triton", "fused"),))
    assert chosen(custom_backward=False) == "sdpa" and chosen() == "triton"
    calls = []
    monkeypatch.setattr(
        backends, "sdpa_mask_attention", lambda q, *a, **o: calls.append(1) or (q, q))
    call = on_segments(check_call(x, x, x, custom_backward=False), 16, 1, None, None)
    attend(call, "sdpa_mask")
    assert calls
