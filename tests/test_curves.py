"""Orders of every grid: permutations, steps, equality with an independent curve, cache."""
import threading
import time
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from hilbertcurve.hilbertcurve import HilbertCurve
from sampling import FULL
from torch._subclasses import FakeTensorMode

from hilbert_attn.curves import (
    CURVES,
    _compute_order,
    as_grid,
    create_hilbert_mapping,
    curve_order,
    hilbert_decode,
    hilbert_encode,
    inverse_order,
    locality,
    segment_map,
)
from hilbert_attn.patterns import SlidePattern, attention_mask
from hilbert_attn.plots import plot_curve


def is_permutation(order):
    return (
        len(order) == len(np.unique(order)) and order.min() == 0 and order.max() == len(order) - 1
    )


def steps(order, grid): return np.abs(np.diff(np.stack(np.unravel_index(order, grid)), axis=1))


def transposed_cells(grid, curve):
    "(N, 2): the cells of the walk of the reversed grid, each with its coordinates exchanged."
    walked = np.stack(np.unravel_index(curve_order(grid[::-1], curve).numpy(), grid[::-1]), 1)
    return walked[:, ::-1]


@pytest.mark.parametrize("curve", ["row_major", "snake", "tile:3", "morton"])
@pytest.mark.parametrize("grid", [(6, 9), (9, 6), (7, 7), (1, 5)])
def test_a_transposed_walk_exchanges_rows_and_columns(curve, grid):
    order = curve_order(grid, f"{curve}-trans")
    cells = np.stack(np.unravel_index(order.numpy(), grid), 1)
    assert (cells == transposed_cells(grid, curve)).all()


TURNED = (8, 8), (9, 9), (37, 50), (50, 37), (16, 64), (6, 9, 9), (8, 8, 8)


@pytest.mark.parametrize("grid", TURNED)
def test_a_transposed_hilbert_walk_is_another_walk(grid):
    order, plain = curve_order(grid, "hilbert-trans").numpy(), curve_order(grid).numpy()
    assert is_permutation(order) and len(order) == prod(grid)
    apart = np.abs(steps(order, grid)).sum(0)
    assert apart.max() <= 2 and (apart > 1).mean() < 0.03
    assert (order != plain).mean() > 0.5
    if grid[0] == grid[1] and len(grid) == 2:
        assert (order == np.ravel_multi_index(np.unravel_index(plain, grid)[::-1], grid)).all()


@pytest.mark.parametrize("n", [1, 2, 7, 12, 100])
@pytest.mark.parametrize("curve", CURVES)
def test_a_transposed_walk_over_a_folded_sequence(n, curve):
    assert is_permutation(curve_order(n, f"{curve}-trans").numpy())


@pytest.mark.parametrize("curve", CURVES + ("tile:5",))
def test_every_rectangle_is_a_permutation(curve):
    for grid in product(range(1, 65), repeat=2):
        assert is_permutation(_compute_order(grid, curve)), grid


def test_hilbert_steps_on_every_rectangle():
    "Neighbour steps; one diagonal step exactly where the longer side is odd, the shorter even."
    for grid in product(range(1, 65), repeat=2):
        s = steps(_compute_order(grid, "hilbert"), grid)
        assert s.max(initial=0) <= 1, grid
        forced = max(grid) % 2 == 1 and min(grid) % 2 == 0
        assert (s.sum(0) == 2).sum() == forced, grid


def test_the_forced_diagonal_is_forced():
    "No neighbour path from corner to corner along the odd side of odd x even: exhaustive search."

    def paths(w, h, cell, seen):
        if len(seen) == w * h:
            return cell == (w - 1, 0)
        return any(
            paths(w, h, n, seen | {n})
            for n in ((cell[0] + a, cell[1] + b) for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0)))
            if 0 <= n[0] < w and 0 <= n[1] < h and n not in seen
        )

    for w, h in ((3, 2), (5, 2), (5, 4)):
        assert not paths(w, h, (0, 0), frozenset({(0, 0)}))
    for w, h in ((4, 2), (3, 3), (4, 3), (5, 3), (4, 4)):
        assert paths(w, h, (0, 0), frozenset({(0, 0)}))


@pytest.mark.parametrize("curve", CURVES)
def test_every_box_is_a_permutation(curve):
    for grid in product(range(1, 11), repeat=3):
        assert is_permutation(_compute_order(grid, curve)), grid


def test_hilbert_steps_on_boxes():
    "All steps to neighbours where all sides are powers of two; elsewhere none beyond two cells."
    for grid in product((1, 2, 4, 8, 16), repeat=3):
        assert (steps(_compute_order(grid, "hilbert"), grid).sum(0) == 1).all(), grid
    for grid in product(range(1, 11), repeat=3):
        assert steps(_compute_order(grid, "hilbert"), grid).sum(0).max(initial=0) <= 2, grid


@pytest.mark.parametrize("curve", CURVES)
def test_every_sequence_is_a_permutation(curve):
    rest = range(257, 3001, 1 if FULL else 7)
    for n in (*range(1, 257), *rest): assert is_permutation(_compute_order((n,), curve)), n


def symmetries(path):
    "The path under all exchanges and reflections of the axes, forwards and backwards."
    from itertools import permutations
    top = path.max(0)
    for axes in permutations(range(path.shape[1])):
        for flips in product((False, True), repeat=path.shape[1]):
            p = np.where(flips, top - path, path)[:, list(axes)]
            yield p
            yield p[::-1]


@pytest.mark.parametrize(
    "bits, ndim",
    [(1, 2), (2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (7, 2), (1, 3), (2, 3), (3, 3), (4, 3)],
)
def test_equal_to_the_package_hilbertcurve(bits, ndim):
    n = 2 ** (bits * ndim)
    theirs = np.array(HilbertCurve(bits, ndim).points_from_distances(list(range(n))))
    ours = np.stack(np.unravel_index(curve_order((2**bits,) * ndim).numpy(), (2**bits,) * ndim), 1)
    assert any((ours == p).all() for p in symmetries(theirs))


@pytest.mark.parametrize("bits, ndim", [(1, 1), (9, 1), (7, 2), (10, 2), (5, 3), (4, 4), (2, 7)])
def test_encode_inverts_decode(bits, ndim):
    index = torch.arange(2 ** (bits * ndim))
    coords = hilbert_decode(index, bits, ndim)
    assert coords.min() == 0 and coords.max() == 2 ** bits - 1
    assert torch.equal(hilbert_encode(coords, bits), index)
    assert (coords.diff(dim=0).abs().sum(-1) == 1).all()


def test_encode_at_the_limit_of_int64():
    coords = torch.randint(0, 2 ** 31, (1000, 2))
    assert torch.equal(hilbert_decode(hilbert_encode(coords, 31), 31, 2), coords)
    with pytest.raises(ValueError, match="at most 62"): hilbert_encode(coords, 32)


def test_a_hundred_times_faster_than_point_by_point():
    def seconds(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    part = 64  # of the square: a point costs the same wherever it lies
    distances = list(range(0, 2**20, part))
    theirs = part * seconds(lambda: HilbertCurve(10, 2).points_from_distances(distances))
    for grid in ((1024, 1024), (1000, 1000)):
        assert (
            min(seconds(lambda grid=grid: _compute_order(grid, "hilbert")) for _ in range(3))
            <= theirs / 100
        )


def test_known_small_orders():
    assert curve_order((2, 3), "row_major").tolist() == [0, 1, 2, 3, 4, 5]
    assert curve_order((2, 3), "snake").tolist() == [0, 1, 2, 5, 4, 3]
    assert curve_order((2, 2, 2), "snake").tolist() == [0, 1, 3, 2, 6, 7, 5, 4]
    assert curve_order((4, 4), "tile:2").tolist() == [
        0,
        1,
        4,
        5,
        2,
        3,
        6,
        7,
        8,
        9,
        12,
        13,
        10,
        11,
        14,
        15,
    ]
    assert curve_order((4, 4), "morton").tolist() == curve_order((4, 4), "tile:2").tolist()
    assert curve_order((2, 2)).tolist() == [0, 1, 3, 2]
    assert curve_order(5, "row_major").tolist() == [0, 1, 2, 3, 4]


def test_a_sequence_is_folded_to_a_near_square():
    "N tokens, ceil(sqrt(N)) wide, cells past N skipped."
    for n, grid in ((12, (3, 4)), (13, (4, 4)), (16, (4, 4)), (17, (4, 5))):
        order = curve_order(grid)
        assert torch.equal(curve_order(n), order[order < n])
    mapping = create_hilbert_mapping(100)
    assert mapping.dtype == torch.int32 and torch.equal(mapping.long(), curve_order(100))


def test_inverse_order():
    order = torch.randperm(101)
    rank = inverse_order(order)
    assert torch.equal(rank[order], torch.arange(101)) and torch.equal(
        order[rank], torch.arange(101)
    )


@pytest.mark.parametrize("numbers", ([0, 0, 1], [0, 1, 3], [-1, 0, 1], [[0, 1]], [0.0, 1.0]))
def test_what_is_no_permutation_has_no_inverse(numbers):
    order = torch.tensor(numbers)
    with pytest.raises(ValueError, match="order is no permutation"): inverse_order(order)
    pattern = SlidePattern(order.numel(), 1)
    with pytest.raises(ValueError, match="order is no permutation"):
        attention_mask(pattern, order=order)


def test_inverse_without_data_and_in_graphs():
    order = torch.randperm(9)
    compiled = torch.compile(inverse_order, fullgraph=True, backend="eager")
    assert torch.equal(compiled(order), inverse_order(order))
    many = torch.stack([order, order.flip(0)])
    found = torch.func.vmap(lambda x: inverse_order(order)[x])(many)
    assert torch.equal(found, inverse_order(order)[many])
    with FakeTensorMode() as mode: assert inverse_order(mode.from_tensor(order)).shape == (9,)
    assert inverse_order(order.int()).dtype == torch.int32


@pytest.mark.parametrize("measure", [locality, segment_map])
@pytest.mark.parametrize("size, words", [
    (0, "segment_size=0: must be at least 1"),
    ("3", "segment_size='3'"),
    (2.0, "segment_size=2.0"),
    (1 << 63, "segment_size=9"),
])
def test_sizes_of_segments_are_checked(measure, size, words):
    with pytest.raises(ValueError, match=words):
        measure((4, 4), size)


@pytest.mark.parametrize("grid", [16, (2, 3, 4)])
def test_a_picture_of_a_curve_has_two_axes(grid):
    words = r"grid=.*: expected \(H, W\)"
    with pytest.raises(ValueError, match=words):
        plot_curve(None, grid)


def test_cache_gives_back_the_same_tensor_and_notices_writes():
    a = curve_order((9, 11))
    assert curve_order([9, 11]) is a
    a.add_(1)
    assert is_permutation(curve_order((9, 11)).numpy())


def test_cache_under_threads():
    failures, grids = [], [(n, n + 1) for n in range(2, 40)]
    def work(seed):
        try:
            for i in np.random.default_rng(seed).integers(0, len(grids), 200):
                if not is_permutation(curve_order(grids[i]).numpy()): failures.append(grids[i])
        except Exception as e: failures.append(e)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert not failures and not any(t.is_alive() for t in threads)


def test_device():
    assert (
        curve_order((3, 4), device="cpu").device.type == "cpu"
        and curve_order((3, 4), device="meta").device.type == "meta"
    )


def test_a_device_may_be_a_number():
    if torch.accelerator.is_available():
        order = curve_order(4, device=0)
        assert order.device == torch.device(0)
    else:
        with pytest.raises(RuntimeError):
            curve_order(4, device=0)


def test_orders_made_under_inference_mode_can_be_used_in_training():
    with torch.inference_mode(): order = curve_order((6, 31))
    x = torch.randn(186, requires_grad=True)
    x[order].sum().backward()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_narrow_coordinates_do_not_overflow(dtype):
    coords = torch.tensor([[5, 100, 37], [127, 0, 64]])
    expected = hilbert_encode(coords, 20)
    assert (
        hilbert_encode(coords.to(dtype), 20).equal(expected)
        and hilbert_encode(coords.to(dtype), 20).dtype == torch.int64
    )
    assert hilbert_decode(torch.tensor([100, 3], dtype=dtype), 20, 3).equal(
        hilbert_decode(torch.tensor([100, 3]), 20, 3)
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: hilbert_encode(torch.tensor([[0, 4]]), 2),
            "coords holds 0 to 4: each must be at least 0 and less than 4",
        ),
        (lambda: hilbert_encode(torch.tensor([[-1, 2]]), 2), "coords holds -1 to 2"),
        (
            lambda: hilbert_encode(torch.tensor([[0.0, 1.0]]), 2),
            "coords is torch.float32: expected a tensor of whole numbers",
        ),
        (lambda: hilbert_encode([[0, 1]], 2), "bits=2 and ndim=0|coords is list"),
        (lambda: hilbert_encode(torch.tensor([[0, 1]]), 2.0), "bits=2.0: expected a whole number"),
        (
            lambda: hilbert_decode(torch.tensor([16]), 2, 2),
            "index holds 16 to 16: each must be at least 0 and less than 16",
        ),
        (lambda: hilbert_decode(torch.tensor([1.5]), 2, 2), "index is torch.float32"),
        (lambda: hilbert_decode(torch.tensor([1]), 40, 2), "bits=40 and ndim=2"),
    ],
)
def test_coordinates_and_positions_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "grid",
    [
        0,
        -1,
        (),
        (2, 0),
        (1, 2, 3, 4),
        2.5,
        "ab",
        (True, 2),
        float("nan"),
        np.array([2.0, 3.0]),
        (2, "3"),
        1 << 63,
    ],
)
def test_bad_grids(grid):
    with pytest.raises(ValueError, match="grid="):
        as_grid(grid)


@pytest.mark.parametrize("curve", [
    "peano", "hilbert:3", "tile:0", "tile:x", "tile:²", "tile:9" + 30 * "0", "", None])
def test_unknown_curves_list_the_known_ones(curve):
    with pytest.raises(ValueError, match="'row_major', 'snake', 'tile', 'morton', 'hilbert'"):
        curve_order(4, curve)


def test_locality_by_hand():
    m = locality((2, 4), 4, "row_major")  # two rows of four
    assert (
        m.neighbors_kept == 6 / 10
        and m.boundary == 4.0
        and m.spread == pytest.approx(np.sqrt(1.25))
    )
    assert m.step_mean == pytest.approx((6 + np.sqrt(10)) / 7) and m.step_max == pytest.approx(
        np.sqrt(10)
    )
    m = locality((2, 4), 4, "hilbert")  # two squares
    assert (
        m.neighbors_kept == 8 / 10 and m.step_mean == 1 and m.spread == pytest.approx(np.sqrt(0.5))
    )


@pytest.mark.parametrize("grid, w", [((7, 9), 10), ((3, 4, 5), 7), (23, 5)])
def test_locality_by_brute_force(grid, w):
    dims, segments = as_grid(grid), segment_map(grid, w).flatten()
    coords = np.stack(np.unravel_index(np.arange(prod(dims)), dims), 1)
    pairs = [
        (i, j)
        for i in range(len(coords))
        for j in range(i)
        if np.abs(coords[i] - coords[j]).sum() == 1
    ]
    assert locality(grid, w).neighbors_kept == pytest.approx(
        np.mean([bool(segments[i] == segments[j]) for i, j in pairs])
    )
    spreads = [np.sqrt(coords[segments == s].var(0).sum()) for s in segments.unique()]
    assert locality(grid, w).spread == pytest.approx(np.mean(spreads))


def test_the_snake_has_the_segments_of_rows():
    for w in (64, 128, 256):
        assert torch.equal(segment_map((64, 64), w, "snake"), segment_map((64, 64), w, "row_major"))
    assert not torch.equal(
        segment_map((64, 64), 256, "hilbert"), segment_map((64, 64), 256, "row_major")
    )


def test_transposed_walks_of_three_dimensions():
    "All axes are reversed; the Hilbert walk exchanges its two longest, the first of equal ones."
    reversed_axes = torch.arange(24).view(2, 3, 4).permute(2, 1, 0).flatten()
    assert curve_order((2, 3, 4), "row_major-trans").equal(reversed_axes)
    exchanged = torch.arange(64).view(4, 4, 4).transpose(0, 1).flatten()
    plain = curve_order((4, 4, 4), "hilbert")
    assert curve_order((4, 4, 4), "hilbert-trans").equal(exchanged[plain])
