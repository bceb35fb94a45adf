"""What GPUs should do, on paper: figures that compilers gave, floors that no prediction beats."""
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from gpu.cases import hilbert_a_cases, speed_name, window_cases
from gpu.problems import lists_of, walked
from gpu.report import beside, with_prediction, work_of, write

from hilbert_attn.bench.gpu_model import (
    BLOCKS,
    GPUS,
    GROUPS,
    LOOPS,
    Blocks,
    Work,
    _loops_of,
    _runs_on,
    gpu_of,
    is_predicted,
    kernel_seconds,
    kernels_of,
    predicted_ms,
    programs_at_once,
    tile_cycles,
)
from hilbert_attn.blocks.lists import lists_from_kinds
from hilbert_attn.kernels.backward import fit_small

STORED = Path(__file__).parent.parent / "nbs" / "results" / "kernels.jsonl"
KINDS = "forward", "forward+backward"
DEFAULTS = {("forward", 64): "128x64w8s3", ("forward", 128): "128x64w8s3", ("dq", 64): "128x64w8s3",
            ("dq", 128): "128x64w8s2", ("dkv", 64): "64x128w8s3", ("dkv", 128): "32x128w8s3"}


@pytest.fixture(scope="module")
def compiled() -> dict:
    "The newest row of each case."
    rows = map(json.loads, STORED.read_text().splitlines())
    return {row["case"]: row for row in rows if row["triton"] == "3.6.0"}


def short_name(t) -> str:
    marks = "o" * t.overlap + "t" * t.tma + "p" * t.producer
    return f"{t.block_m}x{t.block_n}w{t.num_warps}s{t.num_stages}{marks}"


def test_loops_are_those_of_the_stored_table(compiled):
    for (kernel, d, order), loops in LOOPS.items():
        for loop in loops:
            tile = short_name(loop.tile)
            case = f"{kernel}-sm90-bf16-D{d}" + "-order" * order
            row = compiled[case if tile == DEFAULTS[kernel, d] else f"{case}-{tile}"]
            figures = row["registers"], row["shared"], row["loops"][0][0]
            assert figures == (loop.registers, loop.shared, loop.instructions), case


def test_groups_are_those_of_the_stored_table(compiled):
    rows = dict.fromkeys(GROUPS, ("sm90-bf16-D{}-rows64", "sm90-bf16-D{}-rows128"))
    rows["small", 64] += ("sm80-bf16-D{}-rows128",)
    rows["small", 128] += ("sm80-bf16-D96-rows32",)
    for (kernel, d), loops in GROUPS.items():
        for case, loop in zip(rows[kernel, d], loops, strict=True):
            row = compiled[f"{kernel}-{case.format(d)}"]
            count, pieces = row["instructions"], loop.tile.block_n // loop.tile.block_m
            if row["loops"]:
                inner = row["loops"][0][0]
                count = inner + round((count - inner) / pieces)
            assert (row["registers"], row["shared"], count) == (
                loop.registers, loop.shared, loop.instructions), case


def test_blocks_are_those_of_the_stored_table(compiled):
    for (kernel, d, order, axes, size), loops in BLOCKS.items():
        words = ["block_" + kernel, "sm90-bf16", f"D{d}", *["order"] * order, f"axes{axes}"]
        words += ["x".join(map(str, size)), *["filled"] * (axes == 2)]
        row = compiled["-".join(words)]
        for loop in loops:
            figures = row["registers"], row["shared"], [count for count, _ in row["loops"]]
            counts = [loop.instructions, loop.tested]
            assert figures == (loop.registers, loop.shared, counts), words


def test_gpus_take_what_they_can_run():
    for d, order in product((64, 128), (False, True)):
        work = Work.of_groups(32768, 4096, 8, d, order=order)
        for kernel in ("forward", "dq", "dkv"):
            loops = _loops_of(GPUS["A100"], kernel, work)
            assert loops and not any(loop.tile.tma for loop in loops)
            assert max(loop.shared for loop in loops) <= 163 << 10
            assert _loops_of(GPUS["H100"], kernel, work) == LOOPS[kernel, d, order]
    plain = LOOPS["forward", 128, False][0]
    assert not _runs_on(GPUS["A100"], replace(plain, shared=196624))
    assert not _runs_on(GPUS["A100"], replace(plain, tile=replace(plain.tile, tma=True)))


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_the_small_kernel_and_its_tile_are_those_of_the_backward(gpu):
    for keys, d in product((16, 32, 33, 64, 65, 128, 129), (32, 48, 64, 80, 96, 112, 128, 256)):
        work = Work.of_groups(32768, keys, 8, d)
        fit = fit_small(keys, True, d, torch.bfloat16, gpu.capability)
        backward = kernels_of(gpu, work, "forward+backward")[1:]
        assert backward == (["small"] if fit else ["dq", "dkv"])
        if fit: assert [loop.tile for loop in _loops_of(gpu, "small", work)] == [fit.tile]


@pytest.mark.parametrize("keys, same, d, arch, dropout", [
    (128, True, 64, (9, 0), True), (128, True, 32, (9, 0), True), (64, False, 96, (9, 0), False),
    (33, True, 96, (8, 0), False), (16, False, 80, (8, 0), False), (128, True, 128, (12, 0), False),
    (16, True, 64, (12, 0), True)])
def test_groups_that_would_spill_take_two_kernels(keys, same, d, arch, dropout):
    assert fit_small(keys, same, d, torch.bfloat16, arch, dropout) is None


@pytest.mark.parametrize("arch", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_float32_with_dropout_takes_two_kernels(arch):
    assert fit_small(16, True, 64, torch.float32, arch)
    assert fit_small(16, True, 64, torch.float32, arch, dropout=True) is None


def test_warps_that_only_load_are_counted():
    "Twelve hold registers, eight of them compute; on Hopper, where groups fill their tiles."
    h200, loops = GPUS["H200"], LOOPS["forward", 128, False]
    loop = next(loop for loop in loops if loop.tile.producer and loop.tile.block_n == 128)
    assert (loop.warps, loop.computing) == (12, 8) and programs_at_once(h200, loop) == 1
    matrix, issue = 2 * 2 * 128 ** 3 / (0.85 * 4096), 452 * 8 / 4 / 0.7
    assert tile_cycles(h200, loop, 128) == pytest.approx(matrix + issue / 2)
    assert loop in _loops_of(h200, "forward", Work.of_groups(32768, 1024, 8, 128))
    assert loop not in _loops_of(h200, "forward", Work.of_groups(32768, 1000, 8, 128))
    assert not any(_runs_on(GPUS[name], loop) for name in ("A100", "B200"))


def test_programs_are_limited_by_registers_and_by_shared_memory():
    plain, wide = LOOPS["forward", 64, False][0], LOOPS["forward", 128, False][0]
    assert programs_at_once(GPUS["H200"], plain) == 2 == programs_at_once(GPUS["A100"], plain)
    assert programs_at_once(GPUS["H200"], wide) == 1
    few = GROUPS["forward", 64][0]  # 24 KiB and 80 registers of 4 warps
    assert programs_at_once(GPUS["H200"], few) == 6


def test_a_tile_by_hand():
    loop = LOOPS["dkv", 128, False][0]  # alone on its multiprocessor: one after the other
    matrix, issue = 4 * 2 * 32 * 128 * 128 / (0.85 * 4096), 289 * 8 / 4 / 0.7
    assert tile_cycles(GPUS["H100"], loop, 128) == pytest.approx(matrix + issue)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_no_prediction_is_below_a_floor(gpu):
    for keys, d, order in product((16, 64, 100, 128, 256, 4096), (64, 80, 128), (False, True)):
        work = Work.of_groups(32768, keys, 8, d, order=order)
        for kind, operations, tensors in zip(KINDS, (4, 14), (4, 12)):
            ms = predicted_ms(gpu, work, kind)
            assert ms > 1e3 * work.pairs * operations * d / (
                gpu.multiprocessors * gpu.clock * gpu.matrix)
            assert ms > 1e3 * 2 * tensors * 32768 * 8 * d / gpu.memory


def test_small_groups_wait_for_memory_and_take_one_kernel():
    few, many = (Work.of_groups(131072, keys, 16, 64) for keys in (64, 4096))
    assert kernel_seconds(GPUS["H200"], "small", few)[1] == "memory"
    assert kernel_seconds(GPUS["H200"], "forward", many)[1] == "arithmetic"
    both = predicted_ms(GPUS["H200"], few, "forward+backward")
    parts = (kernel_seconds(GPUS["H200"], kernel, few)[0] for kernel in ("forward", "small"))
    assert both == pytest.approx(1e3 * sum(parts))


def test_devices_are_known_by_their_names():
    assert gpu_of("NVIDIA H200").name == "H200"
    assert gpu_of("NVIDIA A100-SXM4-80GB").name == "A100"
    assert gpu_of("NVIDIA H100 80GB HBM3").name == "H100"
    for other in ("none, interpreted on CPU", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe",
                  "NVIDIA A100-SXM4-40GB", "NVIDIA H100 NVL"): assert gpu_of(other) is None


def test_blocks_are_counted():
    kinds = torch.randint(3, (2, 5, 4), dtype=torch.int8, generator=torch.manual_seed(0))
    lists = lists_from_kinds(kinds, num_queries=5 * 16, num_keys=4 * 32, block_size=(16, 32),
                             q_tokens=None, k_tokens=None, groups=(1, 2))
    counts = [3 * int((kinds == kind).sum()) for kind in (2, 1)]  # three heads of each
    assert Blocks.of(lists, 6) == Blocks((16, 32), 0, *counts)


def walking(size: tuple, full: int, partial: int) -> Work:
    return Work(65536, 24, 24, 128, 0, 0, True, Blocks(size, 2, full, partial))


def test_blocks_by_hand():
    "A block of 128 x 128 is two tiles of the forward; a tested tile has more instructions."
    h200, size = GPUS["H200"], (128, 128)
    loop, = BLOCKS["forward", 128, True, 2, size]
    tested = replace(loop, instructions=loop.tested)
    assert (loop.tile.block_m, loop.tile.block_n) == (128, 64) and loop.tested > loop.instructions
    cycles = 2 * 70000 * tile_cycles(h200, loop, 128) + 2 * 30000 * tile_cycles(h200, tested, 128)
    seconds = cycles / (h200.multiprocessors * h200.clock) + 3e-6
    found = kernel_seconds(h200, "forward", walking(size, 70000, 30000))
    assert found == (pytest.approx(seconds), "arithmetic")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_blocks_stay_above_their_floors(gpu):
    for size, kind in product(((128, 128), (128, 64), (64, 64)), KINDS):
        work = walking(size, 1000, 1000)
        operations = 4 if kind == "forward" else 14
        floor = 2000 * size[0] * size[1] * operations * 128
        ms = predicted_ms(gpu, work, kind)
        assert ms > 1e3 * floor / (gpu.multiprocessors * gpu.clock * gpu.matrix)
        assert ms > 1e3 * 2 * 4 * 65536 * 24 * 128 / gpu.memory
        assert "small" not in kernels_of(gpu, work, kind)


QUICK = [case for case in hilbert_a_cases() + window_cases() if case["n"] < 32768]


@pytest.mark.parametrize("case", QUICK, ids=speed_name)
def test_the_block_lists_that_are_timed_are_predicted(case):
    row = dict(case=case, kind="forward", name="triton", pairs=1, ms=1.0, walked=walked(case))
    work, told = work_of(json.loads(json.dumps(row))), with_prediction(row, "NVIDIA H200")
    assert work == Work.of_blocks(lists_of(case, "cpu"), case["h"], case["d"], pairs=1)
    assert told["predicted_ms"] == predicted_ms(GPUS["H200"], work, "forward")


def test_the_layouts_of_the_longer_ones_are_compiled():
    for case in window_cases():
        layout = bool(case["curve"]), len(case.get("grid", [0])), tuple(case["block"])
        for kernel in ("forward", "dq", "dkv"):
            assert (kernel, 128, *layout) in BLOCKS or "boxes" in case["name"]
    other = walking((32, 32), 1, 1)
    assert not is_predicted(GPUS["H200"], other)


CASE = dict(name="N32768", n=32768, h=16, kv=16, d=64, w=4096, r=4, order=True)
ROW = dict(case=CASE, kind="forward", name="triton", pairs=32768 * 1024 * 16, ms=0.5)


def test_predictions_stand_beside_measurements():
    told = with_prediction(ROW, "NVIDIA H200")
    work = Work.of_groups(32768, 1024, 16, 64, order=True)
    assert told["predicted_ms"] == predicted_ms(GPUS["H200"], work, "forward")
    assert f"predicted {told['predicted_ms']:.3f} ms, measured 0.500" in beside(told)


@pytest.mark.parametrize("change", [dict(name="cudnn"), dict(case=CASE | dict(pattern=[]))])
def test_what_is_not_ours_or_does_not_say_what_it_walked_is_not_predicted(change):
    assert with_prediction(ROW | change, "NVIDIA H200") == ROW | change
    assert with_prediction(ROW, "NVIDIA X") == ROW


def test_the_report_holds_predictions(tmp_path):
    rates = dict(matmul_tflops=600.0, copy_gbs=4000.0)
    rows = [dict(environment=dict(gpu="NVIDIA H200")), dict(rates=rates), dict(ROW)]
    told = json.loads(write(rows, [], tmp_path).read_text())
    assert [row["predicted_ms"] for row in told["rows"]] == [
        with_prediction(ROW, "NVIDIA H200")["predicted_ms"]]
