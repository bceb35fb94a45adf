"""Random attention calls, shared by the tests of all backends."""
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from hilbert_attn.curves import CURVES, curve_order
from hilbert_attn.patterns import DILATION_MODES, SegmentPattern, attention_mask
from hilbert_attn.reference import assert_matches_oracle

HEAD_DIMS = (16, 24, 32, 48, 64, 80, 128, 256)
LAYOUTS = ("BHND", "BNHD", "fused", "gaps")


def laid_out(layout: str, b: int, heads: tuple[int, int, int], n: int, d: int, dtype: torch.dtype, generator: torch.Generator):
    "Random q, k, v with these heads, in memory as different callers leave them."
    def rand(*shape): return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    if layout == "fused": return rand(b, n, sum(heads), d).transpose(1, 2).split(heads, 1)
    if layout == "BNHD": return tuple(rand(b, n, h, d).transpose(1, 2) for h in heads)
    if layout == "gaps": return tuple(rand(b, h + 1, 2 * n, d + 3)[:, 1:, ::2, :d] for h in heads)
    return tuple(rand(b, h, n, d) for h in heads)


@dataclass
class Case:
    "One call of a backend, described by small numbers so that a failing one reads well."
    b: int
    heads: int
    kv_heads: int
    n: int
    d: int
    w: int
    r: int
    mode: str
    offsets: tuple[int, ...] | int | None
    order: str # "none", "random" or a curve
    causal: bool
    key_mask: bool
    dtype: torch.dtype
    layout: str
    scale: float | None
    lse_grad: bool
    seed: int
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self): self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def pattern(self) -> SegmentPattern: return SegmentPattern.for_heads(self.n, self.heads, self.w, self.r, self.mode, self.offsets)

    def tensors(self): return laid_out(self.layout, self.b, (self.heads, self.kv_heads, self.kv_heads), self.n, self.d, self.dtype, self.generator)

    def options(self) -> dict:
        order = None
        if self.order == "random": order = torch.randperm(self.n, generator=self.generator)
        elif self.order != "none": order = curve_order(self.n, self.order)
        mask = torch.rand(self.b, self.n, generator=self.generator) < 0.6 if self.key_mask else None
        return dict(order=order, causal=self.causal, key_mask=mask)

    def check(self, attention, **options):
        "`attention` has the signature of a backend; it must match the oracle."
        q, k, v = self.tensors()
        common = self.options()
        return assert_matches_oracle(lambda q, k, v: attention(q, k, v, self.pattern, **common, scale=self.scale, **options), q, k, v,
                                     attention_mask(self.pattern, **common), scale=self.scale, lse_grad=self.lse_grad, seed=self.seed)


@st.composite
def cases(draw, max_n: int = 90, head_dims=HEAD_DIMS, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)) -> Case:
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3), (2, 3)]))
    heads, n = kv_heads * group, draw(st.integers(1, max_n))
    w = draw(st.integers(1, max_n + 5))
    r = draw(st.integers(1, min(w, 9)))
    mode, offsets = draw(st.sampled_from(DILATION_MODES)), None
    if mode != "residue":
        one = st.integers(0, r - 1)
        offsets = draw(st.none() | one | st.lists(one, min_size=heads, max_size=heads).map(tuple))
    return Case(draw(st.integers(1, 2)), heads, kv_heads, n, draw(st.sampled_from(head_dims)), w, r, mode, offsets,
                draw(st.sampled_from(("none", "random", *CURVES))), draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from(dtypes)),
                draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from((None, 0.3))), draw(st.booleans()), draw(st.integers(0, 2**31)))
