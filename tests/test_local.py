"""Windows, neighbourhoods, slides and tiles against an oracle written from their definitions.

Query by query, on the CPU and in Triton's interpreter.
"""

import importlib.util
import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import torch
from cases import Inputs, in_triton, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import examples, sampled
from torch.library import opcheck

import hilbert_attn.local as local
from hilbert_attn import backends
from hilbert_attn.backends import set_backend
from hilbert_attn.blocks.planner import block_lists
from hilbert_attn.calls import check_call
from hilbert_attn.curves import CURVES, curve_order
from hilbert_attn.local import (
    hilbert_slide_attention,
    hilbert_window_attention,
    neighborhood_attention,
    tiles_shared_attention,
    window_attention,
)
from hilbert_attn.patterns import (
    AxisPattern,
    NeighborhoodPattern,
    OverlapPattern,
    SlidePattern,
    TilesSharedPattern,
    WindowPattern,
    encode_pattern,
)
from hilbert_attn.points import PatchPattern
from hilbert_attn.reference import assert_matches_oracle

try:
    from test_triton import DEVICE, poison
except pytest.skip.Exception:
    DEVICE, poison = "cpu", lambda run: run()
kernels = (
    importlib.util.find_spec("triton") is not None
    and importlib.util.find_spec("hilbert_attn.kernels.block_sparse") is not None
)
needs_triton = pytest.mark.skipif(not kernels, reason="triton is not installed")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch): monkeypatch.setattr(local, "_BLOCK_SIZE", (32, 32))


# --- who attends whom, from the definitions: a bool per query and key, query by query


def coordinates(grid): return list(itertools.product(*map(range, grid)))


def positions(grid, curve) -> list[int]: # position of each token
    order = list(range(math.prod(grid))) if curve is None else curve_order(grid, curve).tolist()
    position = [0] * len(order)
    for p, token in enumerate(order): position[token] = p
    return position


def window_keys(grid, window, shift) -> torch.Tensor:
    "A new box begins where the distance to the shift is a multiple of the window."
    boxes = []
    for n, w, s in zip(grid, window, shift):
        box = [0]
        for x in range(1, n): box.append(box[-1] + ((x - s) % w == 0))
        boxes.append(box)
    box = [tuple(b[x] for b, x in zip(boxes, at)) for at in coordinates(grid)]
    return torch.tensor([[a == b for b in box] for a in box])


def neighborhood_keys(grid, kernel, dilation, causal) -> torch.Tensor:
    """Per axis k members of the query's residue class, from clamp(g - k // 2, 0, Lc - k) on;
    causal: members max(0, g - k + 1) … g."""

    def axis(x, n, k, d, c):
        members = [y for y in range(n) if y % d == x % d]
        g, length = members.index(x), len(members)
        if c:
            return set(members[max(0, g - k + 1) : g + 1])
        start = max(0, min(g - k // 2, length - k))
        return set(members[start : start + k])

    rows = []
    for at in coordinates(grid):
        near = [axis(*options) for options in zip(at, grid, kernel, dilation, causal)]
        rows.append([all(y in keys for y, keys in zip(other, near)) for other in coordinates(grid)])
    return torch.tensor(rows)


def hilbert_window_keys(grid, window, curve, overlap=0, causal=False):
    def sees(a, b):
        if causal and b > a: return False
        begin = a // window * window
        return a // window == b // window or begin - overlap <= b < begin
    places = positions(grid, curve)
    return torch.tensor([[sees(a, b) for b in places] for a in places])


def hilbert_slide_keys(grid, window, curve, sinks=0):
    before, after = (window // 2, window // 2) if isinstance(window, int) else window
    places = positions(grid, curve)
    return torch.tensor([
        [b <= a + after and (b >= a - before or b < sinks) for b in places] for a in places])


def tiles_shared_keys(grid, tiles, offset, shared, curve) -> torch.Tensor:
    "Deals the positions out to the tiles, from the offset on and around the end."
    n = math.prod(grid)
    sizes = [n // tiles + (t < n % tiles) for t in range(tiles)]
    tile, at = {}, offset
    for t, size in enumerate(sizes):
        for _ in range(size): tile[at % n], at = t, at + 1
    own = [-1] * shared + [tile[p] for p in positions(grid, curve)]
    return torch.tensor([[a == -1 or b == -1 or a == b for b in own] for a in own])


def test_the_definitions_on_examples():
    assert window_keys((5,), (2,), (1,)).int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
    ]
    assert [
        row.nonzero()[:, 0].tolist() for row in neighborhood_keys((7,), (3,), (2,), (False,))
    ] == [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5], [2, 4, 6], [1, 3, 5], [2, 4, 6]]
    assert [
        row.nonzero()[:, 0].tolist() for row in neighborhood_keys((4,), (2,), (1,), (True,))
    ] == [[0], [0, 1], [1, 2], [2, 3]]
    assert [
        row.nonzero()[:, 0].tolist() for row in neighborhood_keys((5,), (4,), (1,), (False,))
    ] == [[0, 1, 2, 3]] * 3 + [[1, 2, 3, 4]] * 2
    assert [row.nonzero()[:, 0].tolist() for row in tiles_shared_keys((5,), 2, 3, 1, None)] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 4, 5],
        [0, 2, 3],
        [0, 2, 3],
        [0, 1, 4, 5],
        [0, 1, 4, 5],
    ]


# --- random calls


@dataclass
class LocalCase:
    "One call, described by small numbers so that a failing one reads well."
    name: str
    grid: tuple[int, ...]
    options: dict
    curve: str | None
    registers: int
    spared: bool # is the key mask of tokens alone?
    chunk: int
    key_cost: int
    inputs: Inputs

    def keys(self) -> torch.Tensor:  # bool (N, N)
        o = self.options
        if self.name == "window":
            return window_keys(self.grid, o["window"], o["shift"])
        if self.name == "neighborhood":
            return neighborhood_keys(self.grid, o["kernel_size"], o["dilation"], o["causal"])
        if self.name == "hilbert_window":
            return hilbert_window_keys(self.grid, curve=self.curve, **o)
        if self.name == "hilbert_slide":
            return hilbert_slide_keys(self.grid, o["window"], self.curve, o.get("sinks", 0))
        return tiles_shared_keys(self.grid, o["tiles"], o["offset"], o["shared"], self.curve)

    def call(self, q, k, v, **more):
        options = dict(self.options, curve=self.curve, **more)
        if self.name == "tiles_shared":
            return tiles_shared_attention(q, k, v, grid=self.grid, **options)
        if self.name == "neighborhood":
            return neighborhood_attention(q, k, v, self.grid, options.pop("kernel_size"), **options)
        function = {
            "window": window_attention,
            "hilbert_window": hilbert_window_attention,
            "hilbert_slide": hilbert_slide_attention,
        }[self.name]
        return function(q, k, v, self.grid, options.pop("window"), **options)

    def check(self, device="cpu", **more):
        mask, r = self.keys(), self.registers
        mask, n = torch.nn.functional.pad(mask, (0, r), value=True)[None, None], len(mask)

        def attention(q, k, v, key_mask=None, **options):
            if key_mask is not None and self.spared: key_mask = key_mask[:, :n]
            if r: options["registers"] = k[:, :, n:], v[:, :, n:]
            tokens = k[:, :, :n], v[:, :, :n]
            return self.call(q, *tokens, key_mask=key_mask, **options, **more)

        spared = r if self.spared else 0
        with costs(self.chunk, self.key_cost):
            return poison(lambda: self.inputs.check(attention, mask, device, spared=spared))


@contextmanager
def costs(chunk: int, key_cost: int):
    "Small ones make many tiles, a few at a time."
    small = dict(_TILE_CHUNK=chunk, _ORDER_CHUNK=chunk)
    small |= dict(_KEY_COST=key_cost, _UNIT_COST=200 * key_cost)

    def forget():
        for plans in (local._plan, local._chunks): plans.cache_clear()

    forget()
    try:
        with mock.patch.multiple(local, **small): yield
    finally: forget()


@st.composite
def local_options(draw, name: str, grid: tuple[int, ...], overlaps=False) -> dict:
    n = math.prod(grid)
    if name == "window":
        window = tuple(draw(st.integers(1, side + 2)) for side in grid)
        options = dict(window=window, shift=tuple(draw(st.integers(0, w - 1)) for w in window))
    elif name == "neighborhood":
        dilation = tuple(draw(st.integers(1, max(1, min(3, side)))) for side in grid)
        options = dict(
            kernel_size=tuple(draw(st.integers(1, side // d)) for side, d in zip(grid, dilation)),
            dilation=dilation,
            causal=tuple(draw(st.booleans()) for _ in grid),
        )
    elif name == "tiles_shared":
        options = dict(
            tiles=draw(st.integers(1, min(n, 7))),
            offset=draw(st.integers(-n, 2 * n)),
            shared=draw(st.integers(0, 5)),
        )
    else:
        options = dict(window=draw(st.integers(1, n + 5)))
    if name == "hilbert_slide" and draw(st.booleans()):
        reach = st.integers(0, max(1, n // 3))
        after = draw(st.sampled_from((0, 1))) and draw(reach)
        options = dict(window=(draw(reach), after), sinks=draw(st.integers(0, 6)))
    if name == "hilbert_window" and (overlaps or draw(st.booleans())):
        options |= dict(overlap=draw(st.integers(0, n)), causal=draw(st.booleans()))
    return options


@st.composite
def local_cases(
    draw,
    max_n: int = 90,
    head_dims=(16, 20, 32, 64),
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    names=(
        "window",
        "neighborhood",
        "neighborhood",
        "hilbert_window",
        "hilbert_slide",
        "tiles_shared",
    ),
    overlaps: bool = False,
) -> LocalCase:
    ndim = draw(st.integers(1, 3))
    grid = (
        draw(st.sampled_from([(1, 13), (13, 1), (1, 1, 7), (1,), (1, 1)]))
        if draw(st.integers(0, 7)) == 0
        else ()
    )
    while not grid or math.prod(grid) > max_n:
        grid = tuple(draw(st.integers(1, (max_n, 12, 6)[ndim - 1])) for _ in range(ndim))
        if math.prod(grid) > max_n:
            grid = tuple(max(1, n // 2) for n in grid)
    name = draw(st.sampled_from(names))
    options = draw(local_options(name, grid, overlaps))
    return LocalCase(
        name,
        grid,
        options,
        draw(st.sampled_from((None, *CURVES))),
        registers=draw(st.sampled_from((0, 0, 1, 4))),
        spared=draw(st.booleans()),
        chunk=draw(st.sampled_from((1 << 20, 3000, 1))),
        key_cost=draw(st.sampled_from((14, 2, 0))),
        inputs=draw(inputs(dims=head_dims, dtypes=dtypes)))


@examples(60, 600)
@given(local_cases())
def test_equals_the_oracle(case): case.check(backend="sdpa")


@settings(max_examples=40)
@given(
    local_cases(max_n=40, dtypes=(torch.float32, torch.bfloat16)),
    st.sampled_from(("reference", "sdpa_mask", "dropout", "expression")),
)
def test_the_other_paths_equal_the_oracle(case, path):
    """With a probability of 1e-12 nothing is dropped, but weights are formed. The plain PyTorch
    expression runs on other devices, and where forward derivatives may be asked for."""
    if path == "dropout":
        case.check(backend="sdpa", dropout_p=1e-12)
    elif path == "expression":
        with torch.autograd.forward_ad.dual_level(): case.check(backend="sdpa")
    else:
        case.check(backend=path)


@examples(40, 300)
@given(local_cases(names=("hilbert_slide",)))
def test_slides_equal_the_oracle(case): case.check(backend="sdpa")


@examples(20, 300)
@given(local_cases(names=("hilbert_window",), overlaps=True))
def test_overlapping_segments_equal_the_oracle(case): case.check(backend="sdpa")


PLAIN = Inputs(
    b=1, heads=2, kv_heads=1, d=16, dv=16, masked=False, sinks=False, dtype=torch.float32,
    layout="BNHD", scale=None, lse_grad=True, seed=0)
SMALL = dict(max_n=48, head_dims=(16, 32))


@examples(3, 60)
@given(local_cases(**SMALL, names=("hilbert_window",), overlaps=True))
def test_overlapping_segments_in_triton(case):
    in_triton(lambda device: case.check(device, backend="triton"))


@examples(6, 60)
@given(local_cases(**SMALL, names=("hilbert_slide",)))
def test_slides_in_triton(case):
    in_triton(lambda device: case.check(device, backend="triton"))


@needs_triton
@examples(25, 80)
@given(
    local_cases(max_n=48, head_dims=(16, 32), dtypes=(torch.float32, torch.float64)),
    st.sampled_from(((16, 16), (32, 16), (16, 32))),
)
def test_triton_equals_the_oracle(case, block_size):
    before, local._BLOCK_SIZE = local._BLOCK_SIZE, block_size
    try:
        case.check(DEVICE, backend="triton")
    finally:
        local._BLOCK_SIZE = before


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name, options",
    [
        ("window", dict(window=(3, 4), shift=(1, 0))),
        ("neighborhood", dict(kernel_size=(3, 4), dilation=(1, 2), causal=(True, False))),
        ("hilbert_window", dict(window=20)),
        ("hilbert_slide", dict(window=9)),
        ("hilbert_slide", dict(window=(7, 0), sinks=3)),
        ("tiles_shared", dict(tiles=3, offset=7, shared=3)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_triton_in_half_precision(name, options, dtype):
    own = replace(PLAIN, heads=2, d=32, dv=32, dtype=dtype)
    case = LocalCase(name, (6, 8), options, "hilbert", 3, True, 1 << 16, 14, own)
    case.check(DEVICE, backend="triton")


@pytest.mark.parametrize(
    "kernel, dilation", [((13, 13), (1, 1)), ((4, 13), (2, 1)), ((27, 3), (1, 3))]
)
def test_neighborhoods_of_many_tiles(kernel, dilation):
    options = dict(kernel_size=kernel, dilation=dilation, causal=(False, False))
    LocalCase("neighborhood", (27, 31), options, None, 0, True, 1 << 16, 14, PLAIN).check()


def calls():
    "One call of each function: name, N, and f(q, k, v, **options)."
    return [
        (
            "window",
            63,
            lambda q, k, v, **o: window_attention(q, k, v, (7, 9), (3, 4), shift=(1, 2), **o),
        ),
        (
            "neighborhood",
            63,
            lambda q, k, v, **o: neighborhood_attention(
                q, k, v, (7, 9), (2, 5), dilation=(3, 1), causal=(False, True), **o
            ),
        ),
        (
            "neighborhood of a video",
            60,
            lambda q, k, v, **o: neighborhood_attention(q, k, v, (3, 4, 5), (2, 3, 3), **o),
        ),
        (
            "hilbert_window",
            63,
            lambda q, k, v, **o: hilbert_window_attention(q, k, v, (7, 9), 10, **o),
        ),
        (
            "hilbert_slide",
            63,
            lambda q, k, v, **o: hilbert_slide_attention(q, k, v, (7, 9), 11, **o),
        ),
        (
            "tiles_shared",
            40,
            lambda q, k, v, **o: tiles_shared_attention(
                q, k, v, tiles=3, offset=5, shared=4, grid=(4, 9), **o
            ),
        ),
    ]


each = pytest.mark.parametrize(
    "n, f", [call[1:] for call in calls()], ids=[call[0] for call in calls()]
)


def random_inputs(n, heads=(2, 1, 1), d=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, h, n, d, dtype=torch.float64, generator=generator).to(dtype) for h in heads
    ]


@each
def test_per_query_softmax(n, f):
    "Without our own code: weights are the softmax of a query's scores; other keys have none."
    q, k, v = random_inputs(n, dtype=torch.float64)
    out, lse = f(q, k, v, return_lse=True)
    eye = torch.eye(n, dtype=torch.float64)[None, None]
    weights = f(
        torch.nn.functional.pad(q, (0, n - 16)),
        torch.nn.functional.pad(k, (0, n - 16)),
        eye,
        scale=0.25,
    )[0]  # (2, N, N)
    for h, i in itertools.product(range(2), range(n)):
        keys = weights[h, i].nonzero()[:, 0]
        scores = k[0, 0, keys] @ q[0, h, i] / 4
        assert torch.allclose(
            weights[h, i, keys], scores.softmax(0), atol=1e-13
        ) and torch.allclose(scores.logsumexp(0), lse[0, h, i], atol=1e-13)
        assert torch.allclose(scores.softmax(0) @ v[0, 0, keys], out[0, h, i], atol=1e-13)


@each
def test_gradcheck(n, f):
    q, k, v, *registers = (
        x[..., :3].clone().requires_grad_()
        for x in (
            *random_inputs(n, dtype=torch.float64),
            *random_inputs(2, (1, 1), dtype=torch.float64, seed=1),
        )
    )
    key_mask = torch.arange(n)[None] % 5 != 0
    assert torch.autograd.gradcheck(
        lambda q, k, v, a, b: f(q, k, v, registers=(a, b), key_mask=key_mask, return_lse=True),
        (q, k, v, *registers),
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("name", ["window", "neighborhood"])
def test_the_curve_is_only_speed(name, backend):
    q, k, v = (x.to(DEVICE if backend == "triton" else "cpu") for x in random_inputs(77, (2, 2, 2)))

    def run(curve):
        if name == "window":
            return window_attention(
                q, k, v, (7, 11), 4, shift=1, curve=curve, backend=backend, return_lse=True
            )
        return neighborhood_attention(
            q, k, v, (7, 11), (3, 4), dilation=(2, 1), curve=curve, backend=backend, return_lse=True
        )

    first = run(None)
    for curve in (*CURVES, "tile:4"):
        for a, b in zip(first, run(curve)):
            assert torch.equal(a, b) if backend == "sdpa" else (a - b).abs().max() < 2e-6


def test_the_curve_is_the_function():
    q, k, v = random_inputs(64)
    for f in (
        lambda c: hilbert_window_attention(q, k, v, (8, 8), 16, curve=c),
        lambda c: hilbert_slide_attention(q, k, v, (8, 8), 16, curve=c),
        lambda c: tiles_shared_attention(q, k, v, tiles=4, grid=(8, 8), offset=3, curve=c),
    ):
        assert (f(None) - f("hilbert")).abs().max() > 0.1 and torch.equal(f(None), f("row_major"))


def test_shifted_windows_are_those_of_swin():
    "Rolled, cut into boxes, with pairs across the seam masked by regions, and rolled back."
    (H, W), w, s = (12, 8), 4, 1
    q, k, v = random_inputs(H * W, (1, 1, 1), dtype=torch.float64)

    def boxes(x):
        return (
            x.view(H, W, -1)
            .roll((-s, -s), (0, 1))
            .view(H // w, w, W // w, w, -1)
            .transpose(1, 2)
            .reshape(-1, w * w, x.shape[-1])
        )

    region = torch.zeros(H, W)
    for i, y in enumerate((slice(0, H - w), slice(H - w, H - s), slice(H - s, H))):
        for j, x in enumerate((slice(0, W - w), slice(W - w, W - s), slice(W - s, W))):
            region[y, x] = 3 * i + j
    region = region.view(H // w, w, W // w, w).transpose(1, 2).reshape(-1, w * w)
    out = torch.nn.functional.scaled_dot_product_attention(
        boxes(q), boxes(k), boxes(v), region[:, :, None] == region[:, None]
    )
    out = (
        out.view(H // w, W // w, w, w, -1)
        .transpose(1, 2)
        .reshape(H, W, -1)
        .roll((s, s), (0, 1))
        .reshape(1, 1, H * W, -1)
    )
    assert (window_attention(q, k, v, (H, W), w, shift=s) - out).abs().max() < 1e-14


@each
def test_deterministic(n, f):
    q, k, v = (torch.cat([x] * 20, 1).requires_grad_() for x in random_inputs(n))
    dout = torch.randn(q.shape)
    runs = [(out := f(q, k, v), *torch.autograd.grad(out, (q, k, v), dout)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.grid
@each
@pytest.mark.parametrize(
    "options",
    [
        dict(return_lse=True),
        dict(dropout_p=1e-12),
        dict(backend="sdpa_mask"),
        pytest.param(dict(backend="triton", return_lse=True), marks=needs_triton),
    ],
    ids=["operator", "dropout", "mask", "triton"],
)
def test_compiles(n, f, options):
    device = DEVICE if options.get("backend") == "triton" else "cpu"
    q, k, v, *registers = (
        x.to(device).requires_grad_()
        for x in (*random_inputs(n), *random_inputs(2, (1, 1), seed=1))
    )
    key_mask = torch.arange(n, device=device)[None] % 5 != 0

    def call(q, k, v, a, b):
        return f(q, k, v, registers=(a, b), key_mask=key_mask, **options)

    torch._dynamo.reset()
    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = run(q, k, v, *registers)
        out = out if isinstance(out, tuple) else (out,)
        results.append(
            (*out, *torch.autograd.grad([x.sin().sum() for x in out], (q, k, v, *registers)))
        )
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(*results))


OPERATOR_CASES = [
    WindowPattern((3, 5), (2, 3), (1, 2)),
    NeighborhoodPattern((3, 5), (2, 2), (1, 2), (True, False)),
    SlidePattern(13, 4),
    SlidePattern(13, (3, 0), 2),
    TilesSharedPattern(15, 3, 0, 2),
    OverlapPattern(13, 4),
    OverlapPattern(13, 4, 3),
    OverlapPattern(13, 4, 4, True),
    PatchPattern(4, (7, 1, 5)),
]
each_pattern = pytest.mark.parametrize("pattern", OPERATOR_CASES, ids=lambda p: type(p).__name__)
FORWARD_CHECKS = (
    "test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.grid
@each_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(pattern, dtype):
    n, ops = pattern.seq_len, torch.ops.hilbert_attn
    queries, others = random_inputs(n, (4,), 8, dtype), random_inputs(n + 1, (2, 2), 8, dtype)
    q, k, v = (x.requires_grad_() for x in (*queries, *others))
    order = curve_order(n - pattern.shared) if pattern.along_curve else None
    settings = (*encode_pattern(pattern), [0.3, 2.0], 0.0)
    args = (q, k, v, order, torch.ones(1, n + 1, dtype=torch.bool), None, *settings)
    opcheck(ops.local_forward.default, args, test_utils=FORWARD_CHECKS)
    out, lse = (x.detach() for x in ops.local_forward(*args))
    q, k, v = (x.detach() for x in (q, k, v))
    for dlse in (None, torch.randn_like(lse)):
        backward = (torch.randn_like(out), dlse, q, k, v, out, lse, *args[3:])
        opcheck(ops.local_backward.default, backward)
    tiles = (order, *encode_pattern(pattern), 2, 7, n + 1, torch.device("cpu"))
    opcheck(ops.local_tiles.default, tiles)


@needs_triton
@pytest.mark.parametrize(
    "pattern", sampled(OPERATOR_CASES, OPERATOR_CASES[::3]), ids=lambda p: type(p).__name__)
def test_opcheck_blocks(pattern):
    n, ops = pattern.seq_len, torch.ops.hilbert_attn
    inputs = *random_inputs(n, (2,)), *random_inputs(n + 1, (1, 1))
    q, k, v = (x.to(DEVICE).requires_grad_() for x in inputs)
    key_mask = torch.ones(1, n + 1, dtype=torch.bool, device=DEVICE)
    settings = (*encode_pattern(pattern), list(pattern.grid), "hilbert", [0.3, 2.0], 0.0)
    args = (q, k, v, key_mask, None, *settings)
    opcheck(ops.local_block_forward.default, args, test_utils=FORWARD_CHECKS)
    out, lse = (x.detach() for x in ops.local_block_forward(*args))
    q, k, v = (x.detach() for x in (q, k, v))
    backward = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *args[3:])
    opcheck(ops.local_block_backward.default, backward)


@each
def test_autocast(n, f):
    q, k, v = random_inputs(n)
    registers = random_inputs(2, (1, 1), seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = f(q, k, v, registers=registers)
    assert out.dtype == torch.bfloat16 and torch.equal(
        out, f(*(x.bfloat16() for x in (q, k, v)), registers=[x.bfloat16() for x in registers])
    )


@each
def test_gradients_of_one_output_only(n, f):
    q, k, v = (x.requires_grad_() for x in random_inputs(n, dtype=torch.float64))

    def grads(of):
        return torch.autograd.grad(
            sum(f(q, k, v, return_lse=True)[i].sin().sum() for i in of),
            (q, k, v),
            materialize_grads=True,
        )

    assert all(
        torch.allclose(a + b, c, atol=1e-12)
        for a, b, c in zip(grads([0]), grads([1]), grads([0, 1]))
    )


@each
def test_inference_mode_leaves_nothing_behind(n, f):
    "Plans are cached; one made in inference mode must serve training too."
    for plans in (local._plan, local._chunks): plans.cache_clear()
    q, k, v = random_inputs(n)
    for options in ({}, dict(dropout_p=1e-12)):
        with torch.inference_mode(): a = f(q, k, v, **options)
        b = f(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), **options)
        b.sum().backward()
        assert (a - b).abs().max() < 1e-6


@each
def test_no_batch(n, f):
    q, k, v = (x[:0].requires_grad_() for x in random_inputs(n))
    out, lse = f(q, k, v, return_lse=True)
    assert (
        out.shape == q.shape
        and lse.shape == q.shape[:3]
        and all(g.numel() == 0 for g in torch.autograd.grad(out.sum(), (q, k, v)))
    )


def test_rows_without_keys():
    q, k, v = (x.requires_grad_() for x in random_inputs(16))
    key_mask = (torch.arange(16) >= 8)[None]
    out, lse = window_attention(q, k, v, (4, 4), 2, key_mask=key_mask, return_lse=True)
    assert (
        (out[:, :, :8] == 0).all()
        and (lse[:, :, :8] == -torch.inf).all()
        and lse[:, :, 8:].isfinite().all()
    )
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, :, 8:].sum(), (q, k, v))
    assert (
        all(x.isfinite().all() for x in (dq, dk, dv))
        and (dq[:, :, :8] == 0).all()
        and (dk[:, :, :8] == 0).all()
    )


def test_set_backend():
    q, k, v = random_inputs(16)
    with set_backend("reference"):
        a = window_attention(q, k, v, (4, 4), 2)
    with set_backend("sdpa"):
        b = window_attention(q, k, v, (4, 4), 2)
    assert (a - b).abs().max() < 1e-6
    with pytest.raises(ValueError, match="backend='flex': known backends are"):
        window_attention(q, k, v, (4, 4), 2, backend="flex")


def test_dropout():
    torch.manual_seed(0)
    q, k = random_inputs(64, (1, 1), 64)
    weights = neighborhood_attention(q, k, torch.eye(64)[None, None], (8, 8), 5, dropout_p=0.25)
    kept = neighborhood_attention(q, k, torch.eye(64)[None, None], (8, 8), 5)
    dropped = (weights == 0) & (kept > 0)
    assert 0.2 < dropped.sum() / (kept > 0).sum() < 0.3 and torch.allclose(
        weights[weights > 0], kept[weights > 0] / 0.75, rtol=1e-5
    )


@pytest.mark.parametrize("pattern", [
    NeighborhoodPattern((70, 90), (13, 7), (3, 1), (False, True)),
    WindowPattern((65, 33), (8, 5), (3, 0)),
    SlidePattern(100_000, 256),
    SlidePattern(100_000, (511, 0), 4),
    TilesSharedPattern(10_007, 13),
    NeighborhoodPattern((9, 40, 40), (3, 5, 5), (1, 2, 1)),
], ids=lambda p: type(p).__name__)
def test_plans_are_small_and_count_right(pattern):
    "Every query once, every pair once, and no more units than the borders need."
    def pairs(unit): return unit.queries * unit.keys if unit.mask is None else int(unit.mask.sum())

    plan = local._plan(pattern)
    assert sum(u.tiles * u.queries for u in plan) == math.prod(pattern.grid)
    sinks = pattern.sinks * len(local._late(pattern))
    assert sum(u.tiles * pairs(u) for u in plan) + sinks == pattern.pairs()
    assert len(plan) <= 12 ** len(pattern.grid)
    for most in (1, 7):
        parts = [part for unit in plan[:3] for part in local._cut(unit, most)]
        assert all(part.tiles <= most for part in parts)
        assert sum(part.tiles for part in parts) == sum(unit.tiles for unit in plan[:3])


BAD = [
    (dict(grid=(4, 5)), "grid"),
    (dict(grid=(2, 2, 2, 2)), "grid"),
    (dict(window=0), "window"),
    (dict(window=(2, 2, 2)), "window"),
    (dict(shift=2), "shift"),
    (dict(shift=-1), "shift"),
    (dict(curve="peano"), "curve"),
    (dict(scale=0.0), "scale"),
    (dict(dropout_p=1.0), "dropout_p"),
    (dict(key_mask=torch.ones(1, 15, dtype=torch.bool)), "key_mask"),
    (dict(key_mask=torch.ones(1, 16)), "key_mask"),
    (dict(backend="cuda"), "backend"),
    (dict(registers=torch.ones(1, 1, 2, 16)), "registers"),
    (dict(registers=(torch.ones(1, 1, 2, 16), torch.ones(1, 1, 3, 16))), "registers"),
    (dict(registers=(torch.ones(1, 2, 2, 16),) * 2), "registers"),
    (dict(registers=(torch.ones(1, 1, 2, 16).double(),) * 2), "registers"),
]


BAD += [
    (dict(window=2.0), "window=2.0: expected a whole number"),
    (dict(window="2"), "window='2': expected a whole number"),
    (dict(window=(2, 2.5)), "window=2.5"),
    (dict(shift=0.5), "shift=0.5: expected a whole number"),
    (dict(return_lse=1), "return_lse=1"),
    (dict(grid=(4, 4.0)), "grid"),
]


@pytest.mark.parametrize(
    "bad, named", BAD, ids=[f"{i}-{named}" for i, (_, named) in enumerate(BAD)]
)
def test_bad_window_arguments(bad, named):
    q, k, v = random_inputs(16)
    options = dict(dict(grid=(4, 4), window=2), **bad)
    with pytest.raises(ValueError, match=named):
        window_attention(q, k, v, options.pop("grid"), options.pop("window"), **options)


@pytest.mark.parametrize(
    "f",
    [
        lambda *x: neighborhood_attention(*x, (4, 4), 5),
        lambda *x: neighborhood_attention(*x, (4, 4), (2, 3), dilation=(1, 2)),
        lambda *x: neighborhood_attention(*x, (4, 4), 0),
        lambda *x: neighborhood_attention(*x, (4, 4), 2.0),
        lambda *x: neighborhood_attention(*x, (4, 4), 2, causal="yes"),
        lambda *x: hilbert_window_attention(*x, (4, 4), (2, 2)),
        lambda *x: tiles_shared_attention(*x, tiles=2.5),
        lambda *x: neighborhood_attention(*x, (4, 4), 3, dilation=0),
        lambda *x: neighborhood_attention(*x, 16, 3, causal=(True, False)),
        lambda *x: neighborhood_attention(*x, (2, 8), 3),
        lambda *x: hilbert_window_attention(*x, (4, 4), 0),
        lambda *x: hilbert_slide_attention(*x, (4, 4), 0),
        lambda *x: hilbert_slide_attention(*x, (4, 4), (3, -1)),
        lambda *x: hilbert_slide_attention(*x, (4, 4), (3, 0, 1)),
        lambda *x: hilbert_slide_attention(*x, (4, 4), (3, 0.5)),
        lambda *x: hilbert_slide_attention(*x, (4, 4), 3, sinks=-1),
        lambda *x: hilbert_slide_attention(*x, (4, 4), 3, sinks=1.5),
        lambda *x: hilbert_slide_attention(*x, (4, 3), 4),
        lambda *x: tiles_shared_attention(*x, tiles=0),
        lambda *x: tiles_shared_attention(*x, tiles=17),
        lambda *x: tiles_shared_attention(*x, tiles=2, shared=16),
        lambda *x: tiles_shared_attention(*x, tiles=2, shared=-1),
        lambda *x: tiles_shared_attention(*x, tiles=2, shared=2, grid=(4, 4)),
        lambda q, k, v: window_attention(q[0], k, v, (4, 4), 2),
        lambda q, k, v: window_attention(q, k.double(), v, (4, 4), 2),
        lambda q, k, v: window_attention(q, k[:, :, 1:], v[:, :, 1:], (4, 4), 2),
        lambda q, k, v: window_attention(None, k, v, (4, 4), 2),
    ],
)
def test_bad_arguments(f):
    with pytest.raises(ValueError):
        f(*random_inputs(16))


@dataclass(frozen=True)
class Strided(AxisPattern):
    "Positions of the query's residue, at most `reach` members away: a pattern of nobody's."
    seq_len: int
    stride: int
    reach: int
    along_curve = True

    @property
    def grid(self): return (self.seq_len,)
    @property
    def dilation(self): return (self.stride,)

    def axis_bounds(self, axis):
        n, d = self.seq_len, self.stride
        residue, member = np.arange(n) % d, np.arange(n) // d
        begin = residue * (n // d) + np.minimum(residue, n % d)
        first, last = (member - self.reach).clip(0), member + self.reach
        return begin + member, begin + first, begin + last.clip(max=(n - residue - 1) // d)

    def sees(self, a, b):
        return (a - b) % self.stride == 0 and abs(a - b) <= self.reach * self.stride


@dataclass(frozen=True)
class Ring(AxisPattern):
    "Rows in boxes that wrap around, columns in halves: no axis is as it lies."
    height: int
    width: int

    @property
    def grid(self): return (self.height, self.width)
    @property
    def seq_len(self): return self.height * self.width

    def axis_bounds(self, axis):
        n = self.grid[axis]
        place = (np.arange(n) + 2 - axis) % n
        first = place // 4 * 4
        return place, first, (first + 3).clip(max=n - 1)

    def sees(self, a, b):
        shifts = zip(divmod(a, self.width), divmod(b, self.width), self.grid, (2, 1))
        return all((x + s) % n // 4 == (y + s) % n // 4 for x, y, n, s in shifts)


@pytest.mark.parametrize("pattern", [Strided(63, 4, 2), Ring(7, 9)], ids=["strided", "ring"])
@pytest.mark.parametrize(
    "backend", ["sdpa_mask", "sdpa", pytest.param("triton", marks=needs_triton)]
)
def test_a_pattern_is_one_class(pattern, backend):
    "Whatever gives `axis_bounds` runs on every backend."
    order = curve_order((7, 9))
    place = order.argsort().tolist() if pattern.along_curve else range(63)
    mask = torch.tensor([[bool(pattern.sees(a, b)) for b in place] for a in place])
    assert torch.equal(pattern.mask(order)[0], mask) and pattern.pairs() == mask.sum()
    lists = block_lists(pattern, order=order, causal=True, block_size=(16, 8))
    assert torch.equal(lists.mask()[0], mask.tril())

    def attention(q, k, v):
        call = check_call(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), return_lse=True)
        return [x.to(q.device) for x in local._attend(call, pattern, (7, 9), "hilbert", backend)]

    assert_matches_oracle(attention, *random_inputs(63, (4, 2, 2)), mask[None, None])


@each
def test_a_backend_that_does_not_know_local_patterns_is_refused(n, f, monkeypatch):
    other = backends.Backend("mine", "of somebody else", {"segments": "hilbert_attn.sdpa:nothing"})
    monkeypatch.setitem(backends.REGISTRY, "mine", other)
    q, k, v = random_inputs(n)
    registers = [x[:, :, :2] for x in (k, v)]
    refusal = "backend 'mine'.* does not compute local patterns.*'sdpa'"
    with pytest.raises(RuntimeError, match=refusal): f(q, k, v, backend="mine", registers=registers)
