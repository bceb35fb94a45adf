"""Calls of a ring, described by small numbers, and the dense masks that they mean."""
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from sampling import FULL

from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import SegmentPattern, attention_mask
from hilbert_attn.ring_plan import plan_ring, shard_positions, shard_sizes

WORLDS = (1, 2, 3, 4) if FULL else (1, 3)
MODES = ("residue", "keys", "longnet")


@dataclass(frozen=True)
class Case:
    "One call on every rank."
    n: int = 48
    w: tuple = (None,)
    r: tuple = (1,)
    mode: str = "residue"
    heads: tuple[int, int] = (2, 2)
    causal: bool = False
    order: str = "none"
    layout: str = "contiguous"
    combine: str = "lse"
    dtype: str = "float64"
    sizes: tuple[int, ...] | None = None # of the first shards; None: even
    offsets: tuple | None = None
    d: int = 16
    overlap: bool = True
    scale: float | None = None
    strided: bool = False
    turn_bytes: int | None = None # that go around a ring together; None: as many as there are

    def __str__(self):
        given = asdict(self).items()
        return " ".join(f"{k}={v}" for k, v in given if v != getattr(type(self), k))

    @property
    def several(self) -> bool: return len(self.w) > 1

    @property
    def torch_dtype(self) -> torch.dtype: return getattr(torch, self.dtype)

    @property
    def turns(self) -> dict: return {} if self.turn_bytes is None else dict(cpu=self.turn_bytes)

    def shard_sizes(self, world: int) -> tuple[int, ...]:
        "Uneven ones are given for the first ranks; the last one takes the rest."
        if self.sizes is None: return shard_sizes(self.n, world, self.layout)
        first = self.sizes[:world - 1]
        return *first, self.n - sum(first)

    def places(self, world: int, rank: int) -> torch.Tensor:
        return shard_positions(self.shard_sizes(world), rank, self.layout)

    def make_order(self, generator) -> torch.Tensor | None:
        if self.order == "none": return None
        if self.order == "hilbert": return curve_order(self.n)
        return torch.randperm(self.n, generator=generator)

    def tensor(self, heads: int, generator) -> torch.Tensor:
        "(2, heads, n, d); strided where the case says so."
        shape = (2, self.n, heads, self.d) if self.strided else (2, heads, self.n, self.d)
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        return (x.transpose(1, 2) if self.strided else x).to(self.torch_dtype)

    def options(self) -> dict:
        "What both functions take."
        return dict(dilation_mode=self.mode, causal=self.causal, offsets=self.offsets,
                    layout=self.layout, scale=self.scale, overlap=self.overlap, return_lse=True)

    def plan(self, world: int):
        heads, kv_heads = self.heads
        shape = dict(batch=2, heads=heads, kv_heads=kv_heads, head_dim=self.d)
        pattern = dict(segment_lengths=self.w, dilation_rates=self.r, dilation_mode=self.mode)
        ordered = self.order != "none"
        return plan_ring(self.shard_sizes(world), **shape, **pattern, dtype=self.torch_dtype,
                         offsets=self.offsets, combine=self.combine, causal=self.causal,
                         ordered=ordered, layout=self.layout)


def _dense() -> Iterator[Case]:
    for n in (48, 37):
        for heads in ((2, 2), (4, 2)): yield Case(n, heads=heads)
        for layout in ("contiguous", "zigzag"):
            yield Case(n, causal=True, layout=layout)
            yield Case(n, causal=True, layout=layout, heads=(4, 1), overlap=False)
            yield Case(n, causal=True, layout=layout, order="random")
            yield Case(n, layout=layout, strided=True)


def _in_turns() -> Iterator[Case]:
    "One head at a time, some, one batch entry at a time; beside other branches."
    for turn_bytes in (1, 6144, 20000):
        yield Case(heads=(6, 3), turn_bytes=turn_bytes)
        yield Case(37, heads=(5, 5), causal=True, layout="zigzag", turn_bytes=turn_bytes,
                   overlap=turn_bytes > 1, strided=True)
    yield Case(37, heads=(4, 2), causal=True, order="random", turn_bytes=1)
    yield Case(sizes=(0, 17, 11), causal=True, turn_bytes=1)
    yield Case(w=(8, None), r=(2, 1), combine="heads", heads=(6, 2), turn_bytes=1)
    yield Case(w=(8, None, None), r=(2, 1, 1), combine="heads", heads=(8, 2), turn_bytes=1)
    yield Case(61, dtype="bfloat16", heads=(4, 2), turn_bytes=1)


def _segments() -> Iterator[Case]:
    "Inside, equal to and across shards, and rates that do not divide them."
    shapes = (48, 4, 2), (48, 12, 4), (48, 16, 3), (48, 24, 5), (37, 11, 3), (48, None, 4)
    for mode in MODES:
        for n, w, r in shapes:
            yield Case(n, (w,), (r,), mode, heads=(4, 2) if n == 37 else (2, 2))
            yield Case(n, (w,), (r,), mode, causal=True,
                       layout="zigzag" if w == 24 else "contiguous",
                       order="hilbert" if w in (16, 11) else "none")
    for w in (12, 20): yield Case(w=(w,), heads=(6, 2), causal=w == 20)  # dilation 1
    for heads in ((3, 3), (6, 3), (4, 1)):
        offsets = tuple(h * 3 % 4 for h in range(heads[0]))
        yield Case(w=(16,), r=(4,), mode="longnet", heads=heads)
        yield Case(w=(32,), r=(4,), mode="keys", heads=heads, offsets=offsets)
    for n in (48, 59, 35): yield Case(n, (24,), (12,), "keys", offsets=(11, 0))  # no key at the end


def _branches() -> Iterator[Case]:
    branches = dict(w=(6, 24, None), r=(1, 2, 6), mode="longnet")
    for combine in ("lse", "heads"):
        for causal in (False, True):
            for order in ("none", "random") if causal else ("none",):
                options = dict(combine=combine, causal=causal, order=order)
                yield Case(**branches, **options, heads=(4, 4))
                yield Case(37, **branches, **options, heads=(6, 2), layout="zigzag")
        yield Case(w=(8, None), r=(2, 1), combine=combine, heads=(4, 2))  # with a dense branch
        yield Case(w=(5, 20), r=(2, 3), mode="keys", combine=combine, heads=(5, 5),
                   offsets=(1, 0, 7, 3, 2))
        yield Case(w=(6, 24, 6, 60, 48), r=(1, 2, 1, 2, 2), mode="longnet", combine=combine,
                   heads=(5, 5))  # some of them alike


def _uneven() -> Iterator[Case]:
    for sizes in ((20, 5, 9), (1, 30, 2), (0, 17, 11)):  # an empty shard among them
        yield Case(sizes=sizes)
        yield Case(sizes=sizes, causal=True, order="random")
        yield Case(w=(16,), r=(3,), sizes=sizes, causal=True)
        yield Case(w=(10, None), r=(2, 5), mode="longnet", sizes=sizes, heads=(4, 2))


def _dtypes() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16", "float16"):
        yield Case(61, dtype=dtype, causal=True, layout="zigzag", heads=(4, 2), d=32)
        yield Case(61, dtype=dtype, d=24, scale=0.3)
        yield Case(61, (20,), (3,), dtype=dtype, heads=(4, 2))
        yield Case(61, (7, 30), (1, 3), "longnet", dtype=dtype, heads=(4, 2), causal=True)


def _traits(case: Case) -> set:
    "What a case is an example of: values, and pairs of those that meet in the code."
    kind, combine = case.plan(3).kind(0), case.combine if case.several else ""
    pairs = {("kind", case.mode, kind), ("order", case.causal, case.order, case.layout),
             ("combine", case.mode, combine, case.causal)}
    single = dict(dtype=case.dtype, sizes=case.sizes, overlap=case.overlap, scale=case.scale,
                  strided=case.strided, turns=case.turn_bytes, branches=len(case.w),
                  offsets=case.offsets, grouped=case.heads[0] > case.heads[1])
    return pairs | set(single.items())


def sample_of(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    "Cases such that each brings something that no case before it has."
    seen: set = set()
    chosen = []
    for case in cases:
        if _traits(case) <= seen: continue
        seen |= _traits(case)
        chosen.append(case)
    return tuple(chosen)


PARTS = _dense, _in_turns, _segments, _branches, _uneven, _dtypes
CASES = tuple(case for part in PARTS for case in part())
SAMPLE = sample_of(CASES)
REST = tuple(case for case in CASES if case not in SAMPLE)


def branch_masks(case: Case, order: torch.Tensor | None) -> Iterator[torch.Tensor]:
    "Dense masks of the branches, for the heads that run them, straight from the definition."
    count, heads = len(case.w), case.heads[0]
    shares = [heads // count + (b < heads % count) for b in range(count)]
    edges = list(accumulate(shares, initial=0))
    for b, (w, r) in enumerate(zip(case.w, case.r)):
        first, last = (edges[b], edges[b + 1]) if case.combine == "heads" else (0, heads)
        offsets = None
        if case.offsets or case.mode == "longnet":
            given = case.offsets or range(heads)
            offsets = tuple(given[h] % r for h in range(first, last))
        pattern = SegmentPattern.for_heads(case.n, last - first, w, r, case.mode, offsets)
        mask = attention_mask(pattern, order=order, causal=case.causal)
        yield mask.expand(1, last - first, -1, -1)


def attended(case: Case, order: torch.Tensor | None) -> torch.Tensor:
    "How often each key counts, for every query of every head: (1, heads, n, n)."
    masks = list(branch_masks(case, order))
    if case.several and case.combine == "lse": return torch.stack(masks).sum(0)
    return torch.cat(masks, 1)
