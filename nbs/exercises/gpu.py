"""Of 02cc_inside_a_gpu."""
import json
from fractions import Fraction
from itertools import product

from exercises import exercise
from hilbert_attn.bench.results import results_folder
from hilbert_attn.kernels.tuning import tiles

KIB = 1024


def stored(kernel: str, D: int) -> dict:
    "Of each tile that a kernel was compiled with for Hopper: its row of the stored table."
    start = f"{kernel}-sm90-bf16-D{D}-"
    lines = (results_folder() / "kernels.jsonl").read_text().splitlines()
    rows = {row["case"]: row for row in map(json.loads, lines) if row["triton"] == "3.6.0"}
    names = {case.removeprefix(start): row for case, row in rows.items() if case.startswith(start)}
    return {tiles(name)[0]: row for name, row in names.items() if name[0].isdigit()}


@exercise
def matrix_instructions(answer):
    for D in (64, 128):
        for tile, row in stored("dq", D).items():
            BM, BN, warps = tile.block_m, tile.block_n, tile.num_warps
            if 16 * warps > BM: continue  # two groups share 64 rows
            found, expected = answer(BM, BN, D, warps), row["loops"][0][1]
            if found != expected:
                return f"BM={BM}, BN={BN}, D={D}, {warps} warps: {found}, compiled are {expected}"
    if answer(128, 64, 64, 4) != 24:
        return "BM=128, BN=64, D=64, 4 warps: the group takes 64 rows twice"


def fits(number: int, warps: int, registers: int, shared: int) -> bool:
    "Whether so many programs fit, limit by limit."
    given = next(n for n in range(8, 257, 8) if n >= registers)
    return (number * warps <= 64 and number <= 32 and number * warps * 32 * given <= 65536
            and number * (shared + KIB) <= 228 * KIB and shared <= 227 * KIB)


@exercise
def programs_that_fit(answer):
    sizes = (0, 16 * KIB, 65536, 113 * KIB, 114 * KIB, 227 * KIB, 228 * KIB)
    for warps, registers, shared in product((1, 4, 8), (16, 100, 128, 129, 255), sizes):
        expected = max(n for n in range(33) if n == 0 or fits(n, warps, registers, shared))
        found = answer(warps, registers, shared)
        if found != expected:
            return f"{warps} warps, {registers} registers, {shared} bytes: {found}, not {expected}"


def too_slow(keys: int, tflops, tbs, heads: int, kv_heads: int) -> bool:
    "Whether the bytes of a group take longer than its products; D and the tokens cancel."
    return 4 * keys * heads / Fraction(tflops) < 4 * (heads + kv_heads) / Fraction(tbs)


@exercise
def keys_until_busy(answer):
    for tflops, tbs in ((989, 3.35), (989, 4.8), (312, 2.04)):
        for heads, kv_heads in ((16, 16), (32, 8), (8, 1)):
            given = tflops, tbs, heads, kv_heads
            found = answer(*given)
            case = f"{tflops} TFLOP/s, {tbs} TB/s, {heads} heads, {kv_heads} key heads"
            if found != int(found): return f"{case}: {found} is no number of keys"
            if too_slow(int(found), *given): return f"{case}: with {found} the bytes take longer"
            if not too_slow(int(found) - 1, *given): return f"{case}: fewer than {found} will do"


@exercise
def most_stages(answer):
    for BM, BN, D, programs in product((64, 128), (64, 128), (64, 128), (1, 2, 3, 8)):
        stages = 0
        while programs * (2 * D * (BM + 2 * BN * (stages + 1)) + KIB) <= 228 * KIB: stages += 1
        found = answer(BM, BN, D, programs)
        if found != stages:
            return f"BM={BM}, BN={BN}, D={D}, {programs} programs: {found} instead of {stages}"
