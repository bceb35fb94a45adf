"""Every system that has a name of its own: constructs by each spelling, trains, evaluates, saves, copies, compiles."""
import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn

import hilbert_attn as h

B, N, H, D = 2, 24, 4, 8
BRANCHES = dict(segment_lengths=[8, 24], dilation_rates=[1, 2])
SIZES = [dict(dim=32, heads=4), dict(embed_dim=32, num_heads=4), dict(hidden_dim=32, num_heads=4)]


class Mixed(h.HilbertAttentionMixin, nn.Module):
    "Attention of one's own, with the mixin."
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.setup_hilbert(**BRANCHES, grid=(4, 6), dilation_mode="residue")

    def forward(self, x): return self.compute_hilbert_attention(*self.qkv(x).unflatten(-1, (3, H, D)).unbind(2)).flatten(2)


TOKENS = {  # name -> makers, one for each spelling; tokens (B, N, E)
    "HilbertAttentionCore": [lambda s=s: h.HilbertAttentionCore(**s, segment_size=8, grid=(4, 6)) for s in SIZES],
    "HilbertAttentionCoreWithSDPA": [lambda s=s, use=use: h.HilbertAttentionCoreWithSDPA(**s, segment_size=8, grid=(4, 6), use_sdpa=use) for s in SIZES for use in (True, False)],
    "MultiheadDilatedAttention": [lambda s=s: h.MultiheadDilatedAttention(**s, **BRANCHES, batch_first=True) for s in SIZES],
    "DilatedSelfAttention": [lambda s=s: h.DilatedSelfAttention(**s, **BRANCHES) for s in SIZES],
    "RingDilatedAttentionHilbertCore": [lambda s=s: h.RingDilatedAttentionHilbertCore(**s, **BRANCHES, grid=(4, 6)) for s in SIZES],
    "HilbertAttentionMixin": [Mixed],
}
FREE = {  # projection-free; q, k, v (B, N, H, D)
    "DilatedAttention": [lambda: h.DilatedAttention(**BRANCHES), lambda: h.DilatedAttention(8, 1)],
    "HilbertDilatedAttention": [lambda: h.HilbertDilatedAttention(**BRANCHES, grid=(4, 6))],
    "HilbertAttentionTritonWrapper": [lambda s=s: h.HilbertAttentionTritonWrapper(**BRANCHES, head_dim=8, **s) for s in (dict(num_heads=4), dict(heads=4))],
    "HilbertAttentionTritonFixed": [lambda: h.HilbertAttentionTritonFixed([8, 24], [1, 2], 0.0, 4, 8)],
    "RingDilatedAttention": [lambda: h.RingDilatedAttention(**BRANCHES)],
    "RingDilatedAttentionHilbertOptimizedFixed": [lambda s=s: h.RingDilatedAttentionHilbertOptimizedFixed(**s, **BRANCHES, grid=(4, 6)) for s in SIZES],
    "BlockSparseAttention": [lambda: h.BlockSparseAttention(sparsity=0.5, block_size=8, grid=(4, 6))],
    "RingBlockSparseAttention": [lambda: h.RingBlockSparseAttention(sparsity=0.5, block_size=8, grid=(4, 6))],
    "BlockSparseRingDilatedAttentionHilbertPostPattern": [lambda on=on: h.BlockSparseRingDilatedAttentionHilbertPostPattern([8, 16], [1, 2], block_size=8, grid=(4, 6), use_post_pattern=on) for on in (True, False)],
}
MAKERS = [pytest.param(make, name in FREE, "Ring" in name, id=f"{name}-{i}") for name, makers in (TOKENS | FREE).items() for i, make in enumerate(makers)]


def made(make):
    torch.manual_seed(0)
    return make()


def inputs(free: bool):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, N, H, D, generator=generator) for _ in range(3)] if free else [torch.randn(B, N, H * D, generator=generator)]


def results(module, x):
    leaves = [t.clone().requires_grad_() for t in x]
    out = module(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out, *torch.autograd.grad(out, (*leaves, *module.parameters()), upstream)]


@pytest.mark.parametrize("make, free, ring", MAKERS)
def test_trains_evaluates_and_runs_in_half_precision(make, free, ring):
    module, x = made(make), inputs(free)
    expected = results(module, x)
    assert expected[0].shape == x[0].shape and all(t.isfinite().all() and t.any() for t in expected)
    torch.testing.assert_close(results(module.eval(), x), expected)
    with torch.autocast("cpu", torch.bfloat16): half = results(module.train(), x)
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32
    for a, e in zip(half, expected): assert (a - e).norm() < 0.03 * e.norm()


@pytest.mark.parametrize("make, free, ring", MAKERS)
def test_saves_and_copies(make, free, ring):
    module, x = made(make), inputs(free)
    expected = results(module, x)
    other = make()
    other.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for copied in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False), copy.deepcopy(module).to(torch.float64).to("cpu", torch.float32)):
        assert all(torch.equal(a, e) for a, e in zip(results(copied, x), expected))


@pytest.mark.parametrize("make, free, ring", MAKERS)
def test_compiles(make, free, ring):
    module, x = made(make), inputs(free)
    compiled = torch.compile(module, fullgraph=not ring, backend="aot_eager")  # messages between processes break a graph
    torch.testing.assert_close(results(compiled, x), results(module, x))
    torch._dynamo.reset()


def test_names_that_are_no_modules():
    for name in ("HilbertAttentionFunction", "hilbert_attention_kernel", "standard_attention_kernel", "PostPatternHilbertOptimizer", "SparsePatternConfig", "StandardizedRingConfig",
                 "create_standardized_ring_attention", "create_dilated_attention", "create_multihead_dilated_attention", "create_dilated_mask", "detect_gpu_architecture"): assert callable(getattr(h, name)), name
    assert all(hasattr(h, name) for name in (*TOKENS, *FREE))
