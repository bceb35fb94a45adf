"""Point clouds: orders against encoders of others, patches against an oracle written from words."""
import itertools
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Inputs, in_triton
from cases import inputs as drawn
from hilbertcurve.hilbertcurve import HilbertCurve
from hypothesis import given
from hypothesis import strategies as st
from sampling import examples

from hilbert_attn import local, points
from hilbert_attn.curves import CURVES, curve_order
from hilbert_attn.points import (
    POINT_CURVES,
    OrderSchedule,
    PatchPattern,
    point_attention,
    point_order,
)
from hilbert_attn.reference import assert_matches_oracle

try:
    from kernel_cases import DEVICE
    HAS_TRITON = True
except pytest.skip.Exception: DEVICE, HAS_TRITON = "cpu", False

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def cube(bits, ndim):
    "All cells of a cube, row by row."
    return torch.cartesian_prod(*[torch.arange(1 << bits)] * ndim).view(-1, ndim)


def symmetries(cells, side):
    "The cells in every frame of a cube of this side."
    ndim = cells.shape[1]
    for axes in itertools.permutations(range(ndim)):
        for flips in itertools.product((False, True), repeat=ndim):
            moved = cells[:, list(axes)]
            yield torch.where(torch.tensor(flips), side - 1 - moved, moved)


# Orders


def gray_walk_code(point, bits):
    "Hamilton's walk over octants (2006), one point at a time: entry corner and direction."
    n, h, entry, direction = len(point), 0, 0, 0

    def turned(x, by):
        by %= n
        return (x << by | x >> n - by) & (1 << n) - 1

    def changes(x): return (~x & x + 1).bit_length() - 1

    for level in reversed(range(bits)):
        corner = sum((p >> level & 1) << axis for axis, p in enumerate(point))
        gray = turned(corner ^ entry, -direction - 1)
        step = gray
        for shift in range(1, n): step ^= gray >> shift
        h = h << n | step
        before = max(0, 2 * ((step - 1) // 2))
        entry ^= turned(before ^ before >> 1, direction + 1)
        inside = 0 if step == 0 else changes(step - 1 if step % 2 == 0 else step) % n
        direction = (direction + inside + 1) % n
    return h


@pytest.mark.parametrize("bits", range(1, 6))
def test_plane_is_another_encoders_up_to_symmetry(bits):
    cells = cube(bits, 2)
    codes = torch.tensor([gray_walk_code(x, bits) for x in cells.tolist()])
    ours, theirs = cells[point_order(cells)], cells[codes.argsort()]
    found = symmetries(theirs, 1 << bits)
    assert any(x.equal(ours) or x.flip(0).equal(ours) for x in found)


@pytest.mark.parametrize("ndim, most", [(2, 31), (3, 21)])
@pytest.mark.parametrize("bits", [1, 2, 5, 9, 16, 21, 31])
def test_is_the_classic_curve(ndim, most, bits):
    "Random cells, one by one, with the curve of as many levels as there are turns of its cube."
    if bits > most: bits = most
    generator = torch.Generator().manual_seed(bits)
    cells = torch.randint(1 << bits, (300, ndim), generator=generator)
    cells[:2] = torch.tensor([[0], [(1 << bits) - 1]])
    levels = -(-bits // ndim) * ndim
    curve = HilbertCurve(levels, ndim)
    codes = np.array([curve.distance_from_point(x) for x in cells.tolist()])
    expected = torch.from_numpy(np.argsort(codes, kind="stable"))
    assert point_order(cells).equal(expected)
    assert point_order(cells, "hilbert-trans").equal(point_order(cells.flip(1)))


@pytest.mark.parametrize("ndim, bits", [(2, 1), (2, 4), (2, 7), (3, 1), (3, 3), (3, 5)])
@pytest.mark.parametrize("curve", ["hilbert", "hilbert-trans"])
def test_hilbert_steps_to_neighbours(ndim, bits, curve):
    cells = cube(bits, ndim)
    order = point_order(cells, curve)
    assert order.sort().values.equal(torch.arange(len(cells)))
    assert (cells[order].diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("ndim, bits", [(2, 3), (2, 6), (3, 2), (3, 4)])
def test_each_octant_is_a_copy_of_the_whole(ndim, bits):
    "The recursive definition: octants one after the other, in each the curve of one level less."
    walk = cube(bits, ndim)[point_order(cube(bits, ndim))]
    small = cube(bits - 1, ndim)
    small, side = small[point_order(small)], 1 << bits - 1
    for octant in walk.split(len(small)):
        corner = octant.amin(0)
        assert (corner % side == 0).all()
        assert any((octant - corner).equal(x) for x in symmetries(small, side))


@pytest.mark.parametrize("ndim, bits", [(2, 31), (3, 21), (3, 7), (2, 1)])
@pytest.mark.parametrize("curve", ["morton", "morton-trans"])
def test_morton_interleaves_bits(ndim, bits, curve):
    cells = torch.randint(1 << bits, (400, ndim), generator=torch.Generator().manual_seed(0))

    def code(point):
        digits = [f"{x:0{bits}b}" for x in (point if curve == "morton" else point[::-1])]
        return int("".join(itertools.chain(*zip(*digits))), 2)

    codes = [code(x) for x in cells.tolist()]
    assert point_order(cells, curve).tolist() == sorted(range(400), key=codes.__getitem__)


def test_on_a_square_it_is_the_order_of_an_image():
    assert point_order(cube(4, 2)).equal(curve_order((16, 16)))
    assert point_order(cube(4, 2), "morton").equal(curve_order((16, 16), "morton"))


def test_points_of_a_cell_stay_as_they_came():
    cells = torch.tensor([[3, 1], [0, 0], [3, 1], [0, 0], [3, 1]])
    for curve in POINT_CURVES: assert point_order(cells, curve).tolist() == [1, 3, 0, 2, 4]
    same = torch.ones(7, 3)
    assert point_order(same).equal(torch.arange(7))


def test_grid_size():
    x = torch.tensor([[-1.0, 0.0], [-0.6, 0.1], [0.0, 0.9], [0.4, -0.3]])
    cells = torch.tensor([[0, 0], [0, 0], [2, 2], [2, 0]])  # from (-1, -0.3), in halves
    assert point_order(x, grid_size=0.5).equal(point_order(cells))
    assert point_order((10 * x).long(), grid_size=5).equal(point_order(cells))
    assert point_order(x.half(), grid_size=0.5).equal(point_order(cells))
    assert point_order(x.requires_grad_(), grid_size=0.5).equal(point_order(cells))


@pytest.mark.parametrize("curve", POINT_CURVES)
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("grid_size", [None, 0.01])
def test_a_cloud_is_ordered_as_if_alone(curve, ndim, grid_size):
    generator = torch.Generator().manual_seed(ndim)
    sizes = (1, 700, 3, 40_000, 2)
    clouds = [10.0 ** i * torch.rand(n, ndim, generator=generator) for i, n in enumerate(sizes)]
    how = dict(curve=curve, grid_size=grid_size)
    alone = [point_order(x, **how) for x in clouds]
    starts = np.cumsum((0, *sizes)).tolist()
    expected = torch.cat([order + start for order, start in zip(alone, starts)])
    points = torch.cat(clouds)
    assert point_order(points, cu_seqlens=starts, **how).equal(expected)
    assert point_order(points, cu_seqlens=torch.tensor([0, *starts]), **how).equal(expected)
    batch = torch.tensor([-3, 0, 4, 5, 9]).repeat_interleave(torch.tensor(sizes))
    assert point_order(points, batch=batch, **how).equal(expected)


def test_clouds_in_any_order():
    "Points of two clouds in turns; and codes that leave no room for the number of a cloud."
    cells = torch.randint(1 << 21, (50, 3), generator=torch.Generator().manual_seed(0))
    batch = torch.arange(50) % 2
    expected = torch.cat([i + 2 * point_order(cells[i::2]) for i in range(2)])
    assert point_order(cells, batch=batch).equal(expected)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_whole_numbers_without_a_sign(dtype):
    coords = torch.randint(0, 99, (50, 3), generator=torch.Generator().manual_seed(0))
    for size in (None, 2):
        ordered = point_order(coords.to(dtype), grid_size=size)
        assert ordered.equal(point_order(coords, grid_size=size))


@pytest.mark.full
def test_a_million_points_in_half_a_second():
    points, times = torch.rand(1_000_000, 3, generator=torch.Generator().manual_seed(0)), []
    for _ in range(4):
        start = time.process_time()
        point_order(points)
        times.append(time.process_time() - start)
    assert min(times) < 0.5


BAD_ORDERS = [
    (dict(coords=[[0, 1]]), "coords is a list"),
    (dict(coords=torch.zeros(3, 4)), r"coords has shape \(3, 4\): expected \(N, 2\) or \(N, 3\)"),
    (dict(coords=torch.zeros(0, 3)), "N at least 1"),
    (dict(coords=torch.zeros(2, 2, dtype=torch.bool)), "coords has dtype torch.bool"),
    (dict(coords=torch.tensor([[0.0, torch.nan]])), "coords holds NaN or infinity"),
    (dict(coords=torch.tensor([[0, -2]])), "coords holds -2: cells must be at least 0"),
    (dict(coords=torch.tensor([[0, 1 << 31]])), "32 bits: at most 31 fit in 2-D"),
    (dict(coords=torch.tensor([[0.0, 1.0, 0.0]] * 2 + [[0.0, 9.0, 0.0]]), grid_size=1e-7),
     "27 bits: at most 21 fit in 3-D; take a larger grid_size"),
    (dict(grid_size=0), "grid_size=0: expected a positive number"),
    (dict(grid_size="1"), "grid_size='1': expected a positive number"),
    (dict(curve="hilbert_trans"), "curve='hilbert_trans': known curves are 'hilbert', 'hilb"),
    (dict(batch=torch.zeros(4)), r"batch is torch.float32 \(4,\) on cpu: expected whole numbers"),
    (dict(batch=torch.zeros(3, dtype=torch.int64)), r"expected whole numbers of shape \(4,\)"),
    (dict(batch=[0, 0, 1, 1]), "batch is list"),
    (dict(cu_seqlens=(0, 2)), r"cu_seqlens=\(0, 2\): expected 0, the end of each cloud, and at l"),
    (dict(cu_seqlens=(0, 3, 2, 4)), "expected 0, the end of each cloud, and at last N=4"),
    (dict(cu_seqlens=(1, 4)), "expected 0, the end of each cloud"),
    (dict(cu_seqlens=(0, 4), batch=torch.zeros(4, dtype=torch.int64)), "both given: expected one"),
]


@pytest.mark.parametrize("options, words", BAD_ORDERS)
def test_bad_orders(options, words):
    given = dict(coords=torch.zeros(4, 2)) | options
    with pytest.raises(ValueError, match=words): point_order(**given)


# Attention


def mask_in_words(order, sizes, w):
    "Who attends whom, cloud by cloud, point by point: bool (N, N)."
    mask = torch.zeros(len(order), len(order), dtype=torch.bool)
    for cloud in order.split(sizes):
        n = len(cloud)
        for place, point in enumerate(cloud):
            full = n - n % w  # points in whole patches
            if place < full: keys = cloud[place - place % w:][:w]
            else: keys = cloud[max(0, n - w):]  # the last one borrows what it lacks
            mask[point, keys] = True
    return mask


@dataclass
class Pack:
    "A call on several clouds, described by small numbers."
    sizes: tuple[int, ...]
    w: int
    said: str # "batch", "borders", "tensor"
    lies: bool # do points lie in order already?
    inputs: Inputs

    def clouds(self) -> tuple[torch.Tensor | None, torch.Tensor, dict]:
        "The order to give and the one that holds, and where the clouds are."
        n, borders = sum(self.sizes), np.cumsum((0, *self.sizes)).tolist()
        generator = torch.Generator().manual_seed(self.inputs.seed)
        points = torch.randn(n, 3, generator=generator)
        if self.said == "batch" and not self.lies:
            mixed = torch.randperm(n, generator=generator)
            batch = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))[mixed]
            order = point_order(points, "morton", batch=batch)
            return order, order, dict(batch=batch)
        where = dict(cu_seqlens=torch.tensor(borders) if self.said == "tensor" else borders)
        order = torch.arange(n) if self.lies else point_order(points, **where)
        return None if self.lies else order, order, where

    def check(self, backend: str, device: str = "cpu"):
        given, order, where = self.clouds()
        def move(x): return x.to(device) if isinstance(x, torch.Tensor) else x

        def attention(q, k, v, **options):
            clouds = {name: move(x) for name, x in where.items()}
            return point_attention(
                q, k, v, move(given), patch_size=self.w, backend=backend, **clouds, **options)
        mask = mask_in_words(order, self.sizes, self.w)
        self.inputs.check(attention, mask[None, None], device)


@st.composite
def packs(draw, most=4, widest=24, dims=(16, 20, 33, 64)) -> Pack:
    w = draw(st.integers(1, widest))
    telling = (1, 5, max(1, w - 1), w, w + 1, 3 * w + 2)
    size = st.one_of(st.sampled_from(telling), st.integers(1, 3 * w))
    sizes = tuple(draw(st.lists(size, min_size=1, max_size=most)))
    said = draw(st.sampled_from(("batch", "borders", "tensor")))
    return Pack(sizes, w, said, draw(st.booleans()), draw(drawn(dims=dims)))


@examples(40, 300)
@given(packs(), st.sampled_from(("sdpa", "sdpa", "sdpa", "sdpa_mask", "reference")), st.booleans())
def test_matches_the_oracle(pack, backend, small):
    with pytest.MonkeyPatch.context() as patch:
        if small: patch.setattr(local, "_ORDER_CHUNK", 1000)
        pack.check(backend)


@examples(5, 60)
@given(packs(most=2, widest=9, dims=(16, 20)))
def test_triton_matches_the_oracle(pack): in_triton(lambda device: pack.check("triton", device))


RAGGED = (1, 5, 15, 16, 17, 50)  # with patches of 16: 1, 5, w - 1, w, w + 1, 3 w + 2
BORDERS = tuple(np.cumsum((0, *RAGGED)).tolist())
N = sum(RAGGED)


def ragged_order(seed=0):
    points = torch.randn(N, 3, generator=torch.Generator().manual_seed(seed))
    return point_order(points, cu_seqlens=BORDERS)


def ragged(q, k, v, order, **options):
    return point_attention(q, k, v, order, patch_size=16, cu_seqlens=BORDERS, **options)


def inputs(d=16, heads=(2, 1, 1), b=1, **options):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(b, h, N, d, generator=generator, **options) for h in heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa_mask", "reference"])
def test_the_telling_sizes(dtype, backend):
    order = ragged_order()
    mask = mask_in_words(order, RAGGED, 16)
    assert PatchPattern(16, RAGGED).mask(order)[0].equal(mask)
    attention = partial(ragged, order=order, backend=backend, return_lse=True)
    assert_matches_oracle(attention, *inputs(20, (4, 2, 2), 2, dtype=dtype), mask)


@needs_triton
def test_the_telling_sizes_in_triton():
    order = ragged_order()

    def attention(q, k, v):
        moved = (x.to(DEVICE) for x in (q, k, v, order))
        return [x.cpu() for x in ragged(*moved, backend="triton", return_lse=True)]

    assert_matches_oracle(attention, *inputs(), mask_in_words(order, RAGGED, 16))


@pytest.mark.parametrize("sizes, w", [(RAGGED, 16), ((1000,), 64), ((7, 7, 7, 3), 4), ((3,), 9)])
def test_no_pair_is_computed_in_vain(sizes, w):
    pattern = PatchPattern(w, sizes)
    units = local._plan(pattern)
    assert all(unit.mask is None for unit in units)
    assert sum(x.tiles * x.queries * x.keys for x in units) == pattern.pairs()
    assert pattern.pairs() == mask_in_words(torch.arange(sum(sizes)), sizes, w).sum()


@pytest.mark.parametrize("backend", ["reference", "sdpa_mask", "sdpa"])
def test_patches_that_no_cloud_fills(backend):
    q, k, v = torch.randn(3, 1, 2, 20, 8).unbind()
    call = partial(point_attention, q, k, v, None, cu_seqlens=(0, 7, 20), return_lse=True)
    for ours, exact in zip(call(patch_size=sys.maxsize, backend=backend), call(patch_size=13)):
        torch.testing.assert_close(ours, exact)


def test_clouds_of_one_size_are_one_tile():
    sizes = (3, 4) * 30
    order, by_size = points._by_size(torch.arange(sum(sizes)), sizes)
    assert by_size == (3,) * 30 + (4,) * 30
    assert order[:6].tolist() == [0, 1, 2, 7, 8, 9] and order[-4:].tolist() == [206, 207, 208, 209]
    assert len(local._plan(PatchPattern(8, by_size))) == 2


def test_orders_that_mix_clouds_are_refused():
    x, order = inputs(), torch.arange(N)
    with pytest.raises(ValueError, match="order mixes clouds"): ragged(*x, order.flip(0))
    with pytest.raises(ValueError, match="order mixes clouds"):
        point_attention(*x, order, patch_size=8, batch=order % 2)


def test_without_an_order_clouds_lie_in_runs():
    "Whatever their numbers; `point_order` takes clouds by number, and the result is the same."
    x, sizes = inputs(), (17, N - 47, 30)
    batch = torch.tensor([5, -1, 3]).repeat_interleave(torch.tensor(sizes))
    found = point_attention(*x, None, patch_size=8, batch=batch)
    borders = np.cumsum((0, *sizes)).tolist()
    assert found.equal(point_attention(*x, None, patch_size=8, cu_seqlens=borders))
    order = point_order(torch.arange(N)[:, None].expand(N, 2), batch=batch)
    torch.testing.assert_close(
        found, point_attention(*x, order, patch_size=8, batch=batch))
    with pytest.raises(ValueError, match="batch mixes clouds, and there is no order"):
        point_attention(*x, None, patch_size=8, batch=batch.roll(1))


@pytest.mark.parametrize("options, words", [
    (dict(patch_size=0), "patch_size=0: must be at least 1"),
    (dict(patch_size=2.0), "patch_size=2.0: expected a whole number"),
    (dict(order=torch.zeros(N, dtype=torch.int64)), "order is no permutation"),
    (dict(order=torch.arange(3)), "expected an int64 tensor of shape"),
    (dict(cu_seqlens=(0, 5)), "expected 0, the end of each cloud"),
    (dict(batch=torch.zeros(3, dtype=torch.int64)), "expected whole numbers of shape"),
    (dict(key_mask=torch.ones(1, 3, dtype=torch.bool)), "key_mask is torch.bool"),
])
def test_bad_calls(options, words):
    given = dict(order=torch.arange(N), patch_size=4) | options
    with pytest.raises(ValueError, match=words): point_attention(*inputs(), **given)


def test_what_changed_in_place_is_read_again():
    "Sizes and checks are kept by tensor, and know when it was written into."
    q, k, v = inputs()
    batch, order = torch.zeros(N, dtype=torch.int64), torch.arange(N)
    one = point_attention(q, k, v, order, patch_size=16, batch=batch)
    batch[50:] = 1
    two = point_attention(q, k, v, order, patch_size=16, batch=batch)
    assert two.equal(point_attention(q, k, v, order, patch_size=16, cu_seqlens=(0, 50, N)))
    assert not one.equal(two)
    batch[0] = 1
    with pytest.raises(ValueError, match="order mixes clouds"):
        point_attention(q, k, v, order, patch_size=16, batch=batch)


def test_gradcheck():
    order, key_mask = ragged_order(), torch.arange(N)[None] % 7 != 3
    leaves = [x.requires_grad_() for x in inputs(3, dtype=torch.float64)]
    attention = partial(ragged, order=order, key_mask=key_mask, return_lse=True)
    assert torch.autograd.gradcheck(attention, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("triton", marks=needs_triton)])
def test_compiles(backend):
    device = DEVICE if backend == "triton" else "cpu"
    order = ragged_order().to(device)
    leaves = [x.to(device).requires_grad_() for x in inputs()]
    attention = partial(ragged, order=order, backend=backend, return_lse=True)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results = []
    for run in (attention, compiled):
        out, lse = run(*leaves)
        results.append((out, lse, *torch.autograd.grad([out.sum(), lse.sin().sum()], leaves)))
    for found, expected in zip(*results): torch.testing.assert_close(found, expected)


def test_graphs_refuse_mixed_clouds_too():
    torch._dynamo.reset()
    compiled = torch.compile(ragged, fullgraph=True, backend="aot_eager")
    x, order = inputs(), ragged_order()
    torch.testing.assert_close(compiled(*x, order), ragged(*x, order))
    with pytest.raises(ValueError, match="order mixes clouds"): compiled(*x, order.flip(0))


def test_dropout_and_repeats():
    leaves, order = [x.requires_grad_() for x in inputs()], ragged_order()
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        out = ragged(*leaves, order, dropout_p=0.3)
        runs.append((out, *torch.autograd.grad(out.sum(), leaves)))
    assert all(a.equal(b) for a, b in zip(*runs))
    assert not runs[0][0].equal(ragged(*leaves, order))


# Schedules


def test_schedules():
    plain, shuffled = OrderSchedule(("a", "b", "c")), OrderSchedule(("a", "b", "c"), shuffle=True)
    assert plain.names(7) == list("abcabca") and plain.names(0) == []
    names = shuffled.names(300, torch.Generator().manual_seed(0))
    rounds = ["".join(names[i:i + 3]) for i in range(0, 300, 3)]
    assert {*rounds} == {"".join(x) for x in itertools.permutations("abc")}
    again = shuffled.names(300, torch.Generator().manual_seed(0))
    assert names == again != shuffled.names(300, torch.Generator().manual_seed(1))
    made = []
    orders = plain.orders(lambda name: made.append(name) or torch.tensor(len(made)), 5)
    assert made == ["a", "b", "c"] and [int(x) for x in orders] == [1, 2, 3, 1, 2]


def test_schedules_of_points_and_images():
    points = torch.rand(50, 3)
    orders = OrderSchedule().orders(partial(point_order, points), 4)
    assert all(x.equal(point_order(points, name)) for x, name in zip(orders, POINT_CURVES))
    orders = OrderSchedule(CURVES).orders(partial(curve_order, (5, 6)), len(CURVES))
    assert all(x.equal(curve_order((5, 6), name)) for x, name in zip(orders, CURVES))


def test_no_schedule_is_drawn_for_no_layer():
    words = "layers=0: must be at least 1"
    with pytest.raises(ValueError, match=words):
        OrderSchedule().drawn(0)


@pytest.mark.parametrize("options, words", [
    (dict(curves=()), r"curves=\(\): expected a tuple of names"),
    (dict(curves="hilbert"), "curves='hilbert': expected a tuple of names"),
    (dict(curves=("hilbert", 3)), "expected a tuple of names"),
    (dict(shuffle="False"), "shuffle='False': expected True or False"),
])
def test_bad_schedules(options, words):
    with pytest.raises(ValueError, match=words): OrderSchedule(**options)


# The example


def test_the_example_runs():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "point_clouds.py", "--quick"],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = r"Points told right: \d+\.\d%; with patches of one point \d+\.\d%, by chance 20%"
    assert re.search(said, done.stdout)
    smoothed = re.search(r"are (\d+) mm off: (\d+) mm .*, (\d+) mm along four", done.stdout)
    before, one, four = map(int, smoothed.groups())
    assert before > one > four
