"""Systems that have a name: each constructs, trains, evaluates, saves, copies and compiles."""
import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn

import hilbert_attn as h

B, N, H, D = 2, 24, 4, 8
GRID = dict(grid=(4, 6))
BRANCHES = dict(segment_lengths=[8, 24], dilation_rates=[1, 2])
ALONG = BRANCHES | GRID
ONE = dict(segment_size=8) | GRID
BLOCKS = dict(sparsity=0.5, block_size=8) | GRID
SIZES = [dict(dim=32, heads=4), dict(embed_dim=32, num_heads=4), dict(hidden_dim=32, num_heads=4)]
WITH_SDPA = [size | dict(use_sdpa=use) for size in SIZES for use in (True, False)]


class Mixed(h.HilbertAttentionMixin, nn.Module):
    "Attention of one's own, with the mixin."
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.setup_hilbert(**ALONG, dilation_mode="residue")

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).unbind(2)
        return self.compute_hilbert_attention(q, k, v).flatten(2)


def of(name, *settings, **common):
    "Makers of a class of the package, one for each of the settings."
    def maker(options): return lambda: getattr(h, name)(**options, **common)
    return name, [maker(options) for options in settings]


TOKENS = dict([ # tokens (B, N, E)
    of("HilbertAttentionCore", *SIZES, **ONE),
    of("HilbertAttentionCoreWithSDPA", *WITH_SDPA, **ONE),
    of("MultiheadDilatedAttention", *SIZES, **BRANCHES, batch_first=True),
    of("DilatedSelfAttention", *SIZES, **BRANCHES),
    of("RingDilatedAttentionHilbertCore", *SIZES, **ALONG),
    ("HilbertAttentionMixin", [Mixed]),
])
FREE = dict([ # projection-free; q, k, v (B, N, H, D)
    of("DilatedAttention", BRANCHES, dict(segment_lengths=8, dilation_rates=1)),
    of("HilbertDilatedAttention", ALONG),
    of("HilbertAttentionTritonWrapper", dict(num_heads=4), dict(heads=4), **BRANCHES, head_dim=8),
    ("HilbertAttentionTritonFixed",
     [lambda: h.HilbertAttentionTritonFixed([8, 24], [1, 2], 0.0, 4, 8)]),
    of("RingDilatedAttention", BRANCHES),
    of("RingDilatedAttentionHilbertOptimizedFixed", *SIZES, **ALONG),
    of("BlockSparseAttention", BLOCKS),
    of("RingBlockSparseAttention", BLOCKS),
    of("BlockSparseRingDilatedAttentionHilbertPostPattern",
       dict(use_post_pattern=True), dict(use_post_pattern=False),
       segment_lengths=[8, 16], dilation_rates=[1, 2], block_size=8, **GRID),
])
MAKERS = [
    pytest.param(make, name in FREE, "Ring" in name, id=f"{name}-{i}")
    for name, makers in (TOKENS | FREE).items()
    for i, make in enumerate(makers)
]
OTHER_ENGINE = "HilbertAttentionCoreWithSDPA-1" # use_sdpa=False
each = pytest.mark.parametrize("make, free, ring", MAKERS)


def made(make):
    torch.manual_seed(0)
    return make()


def inputs(free: bool):
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, N, H, D)] * 3 if free else [(B, N, H * D)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def results(module, x):
    leaves = [t.clone().requires_grad_() for t in x]
    out = module(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out, *torch.autograd.grad(out, (*leaves, *module.parameters()), upstream)]


@each
def test_trains_evaluates_and_runs_in_half_precision(make, free, ring):
    module, x = made(make), inputs(free)
    expected = results(module, x)
    assert expected[0].shape == x[0].shape
    assert all(t.isfinite().all() and t.any() for t in expected)
    torch.testing.assert_close(results(module.eval(), x), expected)
    with torch.autocast("cpu", torch.bfloat16): half = results(module.train(), x)
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32
    for a, e in zip(half, expected): assert (a - e).norm() < 0.03 * e.norm()


@each
def test_saves_and_copies(make, free, ring):
    module, x = made(make), inputs(free)
    expected = results(module, x)
    loaded = make()
    loaded.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [
        loaded,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(module).to(torch.float64).to("cpu", torch.float32),
    ]
    for copied in copies:
        assert all(torch.equal(a, e) for a, e in zip(results(copied, x), expected))


FIRST = [maker for maker in MAKERS if maker.id.endswith("-0") or maker.id == OTHER_ENGINE]


@pytest.mark.parametrize("make, free, ring", FIRST)
def test_compiles(make, free, ring):
    "By one spelling: what is compiled is the same."
    module, x = made(make), inputs(free)
    # Messages between processes break a graph.
    compiled = torch.compile(module, fullgraph=not ring, backend="aot_eager")
    torch.testing.assert_close(results(compiled, x), results(module, x))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [
    "HilbertAttentionFunction",
    "hilbert_attention_kernel",
    "standard_attention_kernel",
    "PostPatternHilbertOptimizer",
    "SparsePatternConfig",
    "StandardizedRingConfig",
    "create_standardized_ring_attention",
    "create_dilated_attention",
    "create_multihead_dilated_attention",
    "create_dilated_mask",
    "detect_gpu_architecture",
])
def test_names_that_are_no_modules(name):
    assert callable(getattr(h, name))
