"""What GPUs should do, on paper: figures that compilers gave, floors that no prediction beats."""
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from gpu.report import beside, with_prediction, write

from hilbert_attn.bench.gpu_model import (
    GPUS,
    GROUPS,
    LOOPS,
    Work,
    _loops_of,
    _runs_on,
    gpu_of,
    kernel_seconds,
    kernels_of,
    predicted_ms,
    programs_at_once,
    tile_cycles,
)
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


CASE = dict(name="N32768", n=32768, h=16, kv=16, d=64, w=4096, r=4, order=True)
ROW = dict(case=CASE, kind="forward", name="triton", pairs=32768 * 1024 * 16, ms=0.5)


def test_predictions_stand_beside_measurements():
    told = with_prediction(ROW, "NVIDIA H200")
    work = Work.of_groups(32768, 1024, 16, 64, order=True)
    assert told["predicted_ms"] == predicted_ms(GPUS["H200"], work, "forward")
    assert f"predicted {told['predicted_ms']:.3f} ms, measured 0.500" in beside(told)


@pytest.mark.parametrize("change", [dict(name="cudnn"), dict(case=CASE | dict(pattern=[]))])
def test_only_our_segments_are_predicted(change):
    assert with_prediction(ROW | change, "NVIDIA H200") == ROW | change
    assert with_prediction(ROW, "NVIDIA X") == ROW


def test_the_report_holds_predictions(tmp_path):
    rates = dict(matmul_tflops=600.0, copy_gbs=4000.0)
    rows = [dict(environment=dict(gpu="NVIDIA H200")), dict(rates=rates), dict(ROW)]
    told = json.loads(write(rows, [], tmp_path).read_text())
    assert [row["predicted_ms"] for row in told["rows"]] == [
        with_prediction(ROW, "NVIDIA H200")["predicted_ms"]]
