"""Random attention calls, shared by the tests of all backends."""
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from hilbert_attn import cross, local, reference
from hilbert_attn.curves import CURVES, curve_order
from hilbert_attn.kernels import launch
from hilbert_attn.patterns import DILATION_MODES, SegmentPattern, attention_mask
from hilbert_attn.reference import Scores, assert_matches_oracle, masked_attention, score_rule

HEAD_DIMS = (16, 24, 32, 48, 64, 80, 128, 256)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("BHND", "BNHD", "fused", "gaps")
GROUPS = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3), (2, 3)) # H_kv, query heads of each
SCALES = (None, 0.3, Scores(0.3, 0.5)) # as backends take them; the last one has a cap
EXAMPLES = int(os.environ.get("LAYOUT_CASES", 300 if os.environ.get("FULL") == "1" else 60))


@dataclass(frozen=True)
class Memory:
    "How a tensor of up to four dims lies in memory; what lies between its elements is NaN."
    order: tuple[int, ...] = (0, 1, 2, 3) # the dims, from the outermost to the innermost
    steps: tuple[int, ...] = (1, 1, 1, 1) # every how many places an element of a dim stands
    expanded: tuple[int, ...] = () # dims along which one element is repeated
    offset: int = 0 # elements of the storage before the first one

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        "The values of `x`, elsewhere in memory; along an expanded dim only its first ones."
        order = [dim for dim in self.order if dim < x.ndim]
        first = x
        for dim in self.expanded:
            if dim < x.ndim: first = first.narrow(dim, 0, min(1, x.shape[dim]))
        room = [first.shape[dim] * self.steps[dim] for dim in order]
        storage = torch.full((self.offset + prod(room),), torch.nan, dtype=x.dtype)
        every = tuple(slice(None, None, self.steps[dim]) for dim in order)
        view = storage[self.offset:].view(room)[every]
        view = view.permute([order.index(dim) for dim in range(x.ndim)])
        return view.copy_(first).expand(x.shape)


@st.composite
def memories(draw, expandable=(0, 1, 2, 3)) -> Memory:
    expanded = draw(st.sampled_from([(), *((dim,) for dim in expandable), tuple(expandable)]))
    steps = tuple(draw(st.sampled_from((1, 1, 2, 3))) for _ in range(4))
    return Memory(tuple(draw(st.permutations(range(4)))), steps, expanded, draw(st.integers(0, 5)))


@st.composite
def layouts(draw, masked: bool = False):
    """A name of `LAYOUTS`, or four memories: of q, k, v and of the upstream gradients.

    One of them at most has expanded dims: where two repeat a value, sums of equal terms round in
    one direction, and the error of the yardstick is a matter of luck."""
    if draw(st.integers(0, 3)) == 0: return draw(st.sampled_from(LAYOUTS))
    own = (1, 3) if masked else (0, 1, 2, 3)  # masked keys hold other values than their neighbours
    dims, expanded = ((0, 1, 2, 3), own, own, (0, 1, 2, 3)), draw(st.integers(-1, 3))
    return tuple(draw(memories(d if i == expanded else ())) for i, d in enumerate(dims))


def as_options(scale):
    "A scale, or scale and cap, as public functions take them."
    if not isinstance(scale, Scores): return dict(scale=scale)
    return dict(scale=scale.scale, softcap=scale.softcap)


def by_token(x): # (B, H, N, D), in memory (B, N, H, D)
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def with_gaps(x): # (B, H, N, D), NaN around it
    b, h, n, d = x.shape
    room = x.new_full((b, h + 1, 2 * n, d + 3), torch.nan)
    room[:, 1:, ::2, :d] = x
    return room[:, 1:, ::2, :d]


def placed(layout, tensors):
    "Tensors (B, H, N, D) laid out in memory as different callers leave them."
    if layout == "fused":
        heads = [x.shape[1] for x in tensors]
        return by_token(torch.cat(list(tensors), 1)).split(heads, 1)
    if layout == "BNHD": return list(map(by_token, tensors))
    if layout == "gaps": return list(map(with_gaps, tensors))
    if layout == "BHND": return list(tensors)
    return [memory(x) for memory, x in zip(layout, tensors)]


def upstream(layout):
    "How the upstream gradients lie in memory."
    return None if isinstance(layout, str) else layout[3]


def random_tensors(b, heads, n, d, dtype, generator):
    def rand(*shape): return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    return [rand(b, h, n, d) for h in heads]


def laid_out(layout, b, heads, n, d, dtype, generator):
    "Random q, k, v with these heads, in memory as different callers leave them."
    return placed(layout, random_tensors(b, heads, n, d, dtype, generator))


def spoilt(layout, q, k, v, key_mask, generator):
    "k and v, laid out, with NaN and infinities where a key is masked."
    values = torch.tensor([torch.nan, torch.inf, -torch.inf])
    bad = values[torch.randint(3, (k.shape[2], 1), generator=generator)]
    def spoil(x): return torch.where(key_mask[:, None, :, None], x, bad.to(x.dtype))
    return placed(layout, [q, spoil(k), spoil(v)])[1:]


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
    layout: str | tuple[Memory, ...]
    scale: float | Scores | None
    lse_grad: bool
    seed: int
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self): self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def pattern(self) -> SegmentPattern:
        how = self.w, self.r, self.mode, self.offsets
        return SegmentPattern.for_heads(self.n, self.heads, *how)

    def options(self) -> dict:
        order = None
        if self.order == "random": order = torch.randperm(self.n, generator=self.generator)
        elif self.order != "none": order = curve_order(self.n, self.order)
        mask = torch.rand(self.b, self.n, generator=self.generator) < 0.6 if self.key_mask else None
        return dict(order=order, causal=self.causal, key_mask=mask)

    def check(self, attention, pattern=None, spoil: bool = False, **options):
        """`attention` has the signature of a backend; it must match the oracle. `spoil`: masked
        keys hold NaN."""
        pattern = pattern or self.pattern
        heads = self.heads, self.kv_heads, self.kv_heads
        dense = random_tensors(self.b, heads, self.n, self.d, self.dtype, self.generator)
        common = self.options()
        hidden = None
        if spoil and self.key_mask:
            hidden = spoilt(self.layout, *dense, common["key_mask"], self.generator)
        def call(q, k, v):
            return attention(q, k, v, pattern, **common, scale=self.scale, **options)
        return assert_matches_oracle(
            call, *placed(self.layout, dense), attention_mask(pattern, **common), scale=self.scale,
            lse_grad=self.lse_grad, seed=self.seed, layout=upstream(self.layout), hidden=hidden)


@st.composite
def cases(draw, max_n: int = 90, head_dims=HEAD_DIMS, dtypes=DTYPES) -> Case:
    kv_heads, group = draw(st.sampled_from(GROUPS))
    heads, n = kv_heads * group, draw(st.integers(1, max_n))
    w = draw(st.integers(1, max_n + 5))
    r = draw(st.integers(1, min(w, 9)))
    mode, offsets = draw(st.sampled_from(DILATION_MODES)), None
    if mode != "residue":
        one = st.integers(0, r - 1)
        offsets = draw(st.none() | one | st.lists(one, min_size=heads, max_size=heads).map(tuple))
    masked = draw(st.booleans())
    return Case(
        b=draw(st.integers(1, 2)), heads=heads, kv_heads=kv_heads, n=n,
        d=draw(st.sampled_from(head_dims)), w=w, r=r, mode=mode, offsets=offsets,
        order=draw(st.sampled_from(("none", "random", *CURVES))), causal=draw(st.booleans()),
        key_mask=masked, dtype=draw(st.sampled_from(dtypes)), layout=draw(layouts(masked)),
        scale=draw(st.sampled_from(SCALES)), lse_grad=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)))


@contextmanager
def listening():
    "Names of kernels, and what was known when they were compiled, in their order."
    found, start = [], launch.start

    def listen(kernel, *arguments, S):
        found.append((kernel.fn.__name__, S))
        return start(kernel, *arguments, S=S)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "start", listen)
        yield found


def in_triton(check):
    """`check(device)` on the kernels: they run, forward and backward, and read nothing that nobody
    wrote. Blocks are small: a short sequence has several."""
    pytest.importorskip("triton")
    from kernel_cases import DEVICE, poison
    with pytest.MonkeyPatch.context() as patch, listening() as launched:
        patch.setattr(local, "_BLOCK_SIZE", (16, 16))
        patch.setattr(cross, "_LONGEST", 16)
        poison(lambda: check(DEVICE))
    names = {name.removeprefix("_block") for name, _ in launched}
    assert "_forward_kernel" in names and names & {"_dq_kernel", "_small_kernel"}


def assert_same_gradient(leaf, found, exact, generator):
    "Of what is no query, key or value, through results of two ways: within 64 roundings."
    upstream = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in exact]
    ours, wanted = (
        torch.autograd.grad([x.double() for x in results], leaf, upstream)[0].double()
        for results in (found, exact))
    allowed = torch.finfo(leaf.dtype).eps * 64 * wanted.abs().max().clamp(min=1)
    assert (ours - wanted).abs().max() <= allowed


@contextmanager
def gradients_of(tokens: int):
    "Further keys and values are the oracle's own: their gradients are nobody's."
    run = reference._with_grads

    def of_tokens(*given):
        found = run(*given)
        return found | {name: found[name][:, :, :tokens] for name in ("dk", "dv")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_with_grads", of_tokens)
        yield


def with_a_key_for(sinks, q, kv, mask, scale):
    "A key more, of zeros as its value is, whose score is what a sink is: k and v, mask, scores."
    more = [F.pad(x, (0, 0, 0, 1)) for x in kv]
    bias = F.pad(sinks.double()[:, None, None], (mask.shape[-1], 0))
    return more, F.pad(mask, (0, 1), value=1), score_rule(scale, q)._replace(bias=bias)


@dataclass
class Inputs:
    "What a call is given whatever its pattern, described by small numbers."
    b: int
    heads: int
    kv_heads: int
    d: int
    dv: int # columns of values
    masked: bool # is there a key mask?
    sinks: bool # has each head a score without a key?
    dtype: torch.dtype
    layout: str | tuple[Memory, ...]
    scale: float | Scores | None
    lse_grad: bool
    seed: int

    def tensors(self, n: int, m: int, generator):
        "q, k, v as they come, the name or the memories of their layout, and as it leaves them."
        rest = self.dtype, generator
        (q,) = random_tensors(self.b, [self.heads], n, self.d, *rest)
        (k,) = random_tensors(self.b, [self.kv_heads], m, self.d, *rest)
        (v,) = random_tensors(self.b, [self.kv_heads], m, self.dv, *rest)
        whole = self.layout != "fused" or (n, self.d) == (m, self.dv)
        layout = self.layout if whole else "BNHD"
        return [q, k, v], layout, placed(layout, [q, k, v])

    def check(self, attention, mask, device="cpu", spared: int = 0, unread: bool = False):
        """`attention(q, k, v, **options)` gives output and LSE of the keys that `mask` (B, H, N, M)
        names, or counts. What no query may read is NaN: keys that the key mask removes, the last
        ones `spared`; if `unread`, all that no query sees."""
        g = torch.Generator().manual_seed(self.seed)
        (n, m), options = mask.shape[-2:], dict(as_options(self.scale), return_lse=True)
        dense, layout, (q, *kv) = self.tensors(n, m, g)
        seen = torch.ones(self.b, m, dtype=torch.bool)
        if self.masked:
            seen[:, :m - spared] = torch.rand(self.b, m - spared, generator=g) < 0.6
            options["key_mask"], mask = seen.to(device), mask * seen[:, None, None]
        if unread: seen = (mask != 0).flatten(1, 2).any(1).expand(self.b, -1)
        given = spoilt(layout, *dense, seen, g)

        def call(q, k, v):
            moved = {name: x.to(device) for name, x in options.items() if torch.is_tensor(x)}
            results = attention(*(x.to(device) for x in (q, k, v)), **(options | moved))
            return [x.to(q.device) for x in results]

        rule = dict(lse_grad=self.lse_grad, seed=self.seed, hidden=given)
        rule |= dict(scale=self.scale, layout=upstream(self.layout))
        if not self.sinks: return assert_matches_oracle(call, q, *kv, mask, **rule)
        sinks = torch.randn(self.heads, dtype=torch.float64, generator=g).to(self.dtype)
        options["sink_logits"] = sinks.requires_grad_()
        more, mask, scores = with_a_key_for(sinks, q, kv, mask, self.scale)
        with gradients_of(m):
            rule["scale"] = scores._replace(bias=scores.bias.detach())
            assert_matches_oracle(call, q, *more, mask, **rule)
        exact = masked_attention(*(x.double() for x in (q, *more)), mask, scores)
        assert_same_gradient(sinks, call(q, *given), exact, g)


@st.composite
def inputs(draw, b=None, dims=(8, 16, 20), dtypes=DTYPES, masks=True, sinks=(False, True),
           widths=True, scales=SCALES) -> Inputs:
    """`widths`: may values have other columns? Then keys of a head are never all the same: SDPA
    takes another kernel, whose gradients are 0 there and no measure of rounding."""
    kv_heads, group = draw(st.sampled_from(GROUPS))
    d, masked = draw(st.sampled_from(dims)), masks and draw(st.booleans())
    dv = draw(st.sampled_from(dims)) if widths else d
    return Inputs(
        b=b or draw(st.integers(1, 2)), heads=kv_heads * group, kv_heads=kv_heads, d=d, dv=dv,
        masked=masked, sinks=draw(st.sampled_from(sinks)), dtype=draw(st.sampled_from(dtypes)),
        layout=draw(layouts(masked or not masks or d != dv)), scale=draw(st.sampled_from(scales)),
        lse_grad=draw(st.booleans()), seed=draw(st.integers(0, 2**31)))
