"""Every public function on every backend, against the oracle.

Tensors and upstream gradients of any layout, NaN where keys are masked.
"""
from dataclasses import dataclass, replace

import pytest
import torch
from cases import (
    EXAMPLES,
    Case,
    Memory,
    as_options,
    cases,
    layouts,
    placed,
    random_tensors,
    spoilt,
    upstream,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import FULL
from test_local import LocalCase, kernels, local_cases

import hilbert_attn.local as local
from hilbert_attn import block_sparse_attention, dilated_attention, hilbert_attention
from hilbert_attn.backends import attend
from hilbert_attn.calls import check_call, on_branches, on_segments
from hilbert_attn.dilated import attend_branches
from hilbert_attn.patterns import COMBINES, DILATION_MODES, DilatedPattern
from hilbert_attn.reference import assert_matches_oracle

pytestmark = pytest.mark.timeout(20 * EXAMPLES)

REAL_POLICY = True  # "auto" is what users get
BACKENDS = ("auto", "sdpa", "sdpa_mask", "reference")
LOCAL = ("window", "neighborhood", "hilbert_window", "hilbert_slide", "tiles_shared")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
with_expression = pytest.mark.parametrize("backend", (*BACKENDS, "expression"))
needs_triton = pytest.mark.skipif(not kernels, reason="triton is not installed")
many = settings(max_examples=EXAMPLES)
in_triton = settings(max_examples=EXAMPLES if FULL else 12)  # its interpreter is slow


def few_programs(case):
    "With a batch of two where there is one head, else of one: the interpreter is slow."
    if isinstance(case, LocalCase): return replace(case, inputs=few_programs(case.inputs))
    return replace(case, b=2 if case.heads == 1 else 1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch): monkeypatch.setattr(local, "_BLOCK_SIZE", (16, 16))


def check_segments(backend, case: Case):
    def attention(q, k, v, pattern, *, order, causal, key_mask, scale):
        how = dict(segment_size=case.w, dilation_rate=case.r, dilation_mode=case.mode,
                   offsets=case.offsets, order=order, curve=None)
        common = dict(causal=causal, key_mask=key_mask, **as_options(scale), return_lse=True)
        if backend != "expression":
            return hilbert_attention(q, k, v, **how, **common, backend=backend)
        call = check_call(q, k, v, **common, custom_backward=False)
        return attend(on_segments(call, **how), "sdpa")
    case.check(attention, spoil=True)


@with_expression
@many
@given(case=cases(max_n=90, head_dims=(16, 20, 32, 64)))
def test_segments(backend, case: Case): check_segments(backend, case)


@needs_triton
@in_triton
@given(case=cases(max_n=20, head_dims=(16,)).map(few_programs))
def test_segments_on_triton(case: Case): check_segments("triton", case)


@dataclass
class Branches:
    "Several branches over the tensors of a case."
    lengths: list[int]
    rates: list[int]
    combine: str
    mode: str
    case: Case


@st.composite
def mixtures(draw, **limits) -> Branches:
    case = draw(cases(**limits))
    lengths = draw(st.lists(st.integers(1, case.n + 9), min_size=1, max_size=3))
    combine = draw(st.sampled_from(COMBINES)) if case.heads >= len(lengths) else "lse"
    rates = [draw(st.integers(1, min(w, 5))) for w in lengths]
    return Branches(lengths, rates, combine, draw(st.sampled_from(DILATION_MODES)), case)


def check_mixture(backend, branches: Branches):
    case = branches.case
    options = dict(
        segment_lengths=branches.lengths, dilation_rates=branches.rates,
        combine=branches.combine, dilation_mode=branches.mode)
    pattern = DilatedPattern.for_heads(case.n, case.heads, *options.values())

    def attention(q, k, v, pattern, *, order, **common):
        how = dict(options, offsets=None, order=order, curve=None)
        common |= dict(return_lse=True, **as_options(common.pop("scale")))
        if backend != "expression":
            return dilated_attention(q, k, v, **how, **common, backend=backend)
        call = check_call(q, k, v, **common, custom_backward=False)
        return attend_branches(on_branches(call, **how), "sdpa")
    case.check(attention, pattern, spoil=True)


@with_expression
@many
@given(branches=mixtures(max_n=90, head_dims=(16, 20, 32)))
def test_mixtures(backend, branches: Branches): check_mixture(backend, branches)


@needs_triton
@in_triton
@given(branches=mixtures(max_n=16, head_dims=(16,)))
def test_mixtures_on_triton(branches: Branches):
    check_mixture("triton", replace(branches, case=few_programs(branches.case)))


@pytest.mark.grid
@each_backend
@pytest.mark.parametrize("name", LOCAL)
@many
@given(data=st.data())
def test_local(name, backend, data):
    case: LocalCase = data.draw(local_cases(max_n=90, names=(name,)))
    case.check(backend=backend)


@needs_triton
@pytest.mark.parametrize("name", LOCAL)
@in_triton
@given(data=st.data())
def test_local_on_triton(name, data):
    limits = dict(max_n=24, head_dims=(16,), dtypes=(torch.float32, torch.float64))
    case: LocalCase = data.draw(local_cases(**limits, names=(name,)))
    few_programs(case).check(backend="triton")


@dataclass
class Blocks:
    "Blocks of positions that attend each other, over the tensors of a case."
    size: tuple[int, int]
    share: float # of the blocks that are attended
    case: Case

    def mask(self, chosen, order) -> torch.Tensor: # bool (N, N) in token order
        position = torch.arange(self.case.n)
        if order is not None: position = order.argsort()
        seen = chosen[position[:, None] // self.size[0], position // self.size[1]]
        return seen.tril() if self.case.causal else seen


def block_cases(**limits):
    return st.builds(
        Blocks, st.sampled_from(((16, 16), (32, 16), (16, 32))), st.sampled_from((0.3, 0.7, 1.0)),
        cases(**limits, dtypes=(torch.float32, torch.float64)))


def check_blocks(backend, blocks: Blocks):
    case = blocks.case
    heads = case.heads, case.kv_heads, case.kv_heads
    dense = random_tensors(case.b, heads, case.n, case.d, case.dtype, case.generator)
    options = case.options()
    shape = [-(-case.n // size) for size in blocks.size]
    chosen = torch.rand(shape, generator=case.generator) < blocks.share
    mask, key_mask = blocks.mask(chosen, options["order"])[None, None], options["key_mask"]
    if key_mask is not None: mask = mask & key_mask[:, None, None]
    hidden = spoilt(case.layout, *dense, key_mask, case.generator) if case.key_mask else None

    def attention(q, k, v):
        return block_sparse_attention(
            q, k, v, chosen, block_size=blocks.size, **options, **as_options(case.scale),
            backend=backend, return_lse=True)
    assert_matches_oracle(
        attention, *placed(case.layout, dense), mask, scale=case.scale, lse_grad=case.lse_grad,
        seed=case.seed, layout=upstream(case.layout), hidden=hidden)


@each_backend
@many
@given(blocks=block_cases(max_n=90, head_dims=(16, 32)))
def test_blocks(backend, blocks: Blocks): check_blocks(backend, blocks)


@needs_triton
@in_triton
@given(blocks=block_cases(max_n=40, head_dims=(16,)))
def test_blocks_on_triton(blocks: Blocks):
    check_blocks("triton", replace(blocks, case=few_programs(blocks.case)))


@given(layouts(), st.integers(0, 99))
def test_the_layouts_are_what_they_say(layout, seed):
    """Values are kept but for expanded dims, and so are strides and offset by the copy that a test
    differentiates."""
    from hilbert_attn.reference import _same_layout
    dense = random_tensors(2, (2, 1, 1), 5, 16, torch.float32, torch.Generator().manual_seed(seed))
    for i, (x, y) in enumerate(zip(dense, placed(layout, dense))):
        copy = _same_layout(y)
        assert y.shape == x.shape and copy.equal(y) and copy.data_ptr() != y.data_ptr()
        assert copy.stride() == y.stride() and copy.storage_offset() == y.storage_offset()
        if isinstance(layout, str) or not layout[i].expanded: assert y.equal(x)


def test_the_memories_cover_what_callers_do():
    x = torch.randn(2, 3, 5, 16)
    assert Memory((0, 1, 3, 2))(x).stride() == (240, 80, 1, 5)
    stepped = Memory(steps=(1, 1, 2, 3))(x)
    assert stepped.stride() == (3 * 2 * 3 * 5 * 16, 2 * 3 * 5 * 16, 2 * 3 * 16, 3)
    assert Memory(expanded=(3,))(x).stride(-1) == 0
    assert Memory(offset=4)(x).storage_offset() == 4
