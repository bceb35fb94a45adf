"""What is checked and what is timed, as plain data."""
from dataclasses import astuple
from itertools import product

HALF, DTYPES = "bfloat16", ("bfloat16", "float16", "float32", "float64")

# ---- correctness: small problems, sizes that are a multiple of nothing

SEGMENTS = dict(n=200, w=200, r=1, mode="residue", heads=2, kv_heads=2, d=64, dtype=HALF,
                order=False, causal=False, masked=False)
BLOCKS = dict(pattern=["neighborhood", [20, 22], 9], curve="hilbert", block=[128, 128], heads=2,
              kv_heads=2, d=64, dtype=HALF, causal=False, masked=False, registers=0)
PATTERNS = [["window", [20, 22], [5, 8], [1, 2]],
            ["neighborhood", [20, 22], [7, 5], [2, 1], [True, False]],
            ["neighborhood", [5, 9, 8], 4], ["slide", 430, 91],
            ["tiles_shared", 500, 3, 17, 70], ["segment", 430, 200, 3], ["random", 430]]
TWICE = (False, True)


def segment_cases() -> list[dict]:
    "Every dtype, mode and trait."
    def case(**changes): return SEGMENTS | changes

    traits = [dict(causal=True), dict(causal=True, order=True), dict(masked=True),
              dict(causal=True, masked=True, order=True)]
    ragged = [(300, 2), (64, 4), (33, 3), (7, 7)]
    small = [(4, 8), (2, 4), (4, 2), (4, 1)]  # segments, rate
    found = [case(dtype=t, d=d, order=o, n=190, w=150, r=3)
             for t, d, o in product(DTYPES, (16, 64, 80), TWICE)]
    found += [case(d=d, n=700, w=700, order=o, heads=1, kv_heads=1)
              for d, o in product((32, 64, 96, 128, 192, 256), TWICE)]
    found += [case(d=d, n=700, w=600, r=2, **t) for d, t in product((64, 128), traits)]
    found += [case(mode=m, n=430, w=w, r=r, heads=4, kv_heads=2, order=o, causal=c)
              for m, (w, r), (o, c) in product(("residue", "keys", "longnet"), ragged,
                                               ((False, False), (True, False), (False, True)))]
    found += [case(d=d, n=512, w=512 // s, r=r, order=o)
              for d, (s, r), o in product((64, 128), small, TWICE)]
    found += [case(d=d, n=700, w=700, dropout=0.25, order=o) for d, o in product((64, 128), TWICE)]
    return found


def block_cases() -> list[dict]:
    "The same for block lists; \"random\" are block masks that differ from head to head."
    def case(**changes): return BLOCKS | changes

    layouts = [([128, 128], "hilbert", 0), ([128, 64], None, 3), ([64, 64], "hilbert", 3),
               ([48, 80], None, 0)]
    found = [case(dtype=t, d=d, curve=c, registers=3)
             for t, d, c in product(DTYPES, (16, 64, 80), ("hilbert", None))]
    found += [case(d=d, curve=c) for d, c in product((32, 96, 128, 192, 256), ("hilbert", None))]
    found += [case(pattern=p, block=b, curve=c, registers=r, causal=r > 0, kv_heads=1)
              for p, (b, c, r) in product(PATTERNS, layouts)]
    found += [case(d=d, causal=c, masked=True, pattern=p)
              for d, c, p in product((64, 128), TWICE, PATTERNS[2:5])]
    found += [case(d=d, dropout=0.25, pattern=p) for d, p in product((64, 128), PATTERNS[2:4])]
    return found


def tile_cases(kinds=("segments", "blocks")) -> list[dict]:
    "Every tile that the tuner may choose, forced on one kernel."
    from hilbert_attn.kernels.tuning import CANDIDATES, GATHERED, PRODUCERS
    plain = [(*key, tile, False) for key, tiles in CANDIDATES.items() for tile in tiles]
    gathered = [(*key, tile, True) for key, tiles in GATHERED.items() for tile in tiles]
    spared = [("forward", d, tile, False) for d, tile in product((64, 128), PRODUCERS)]
    found, spares_warps = [], [list(astuple(tile)) for tile in PRODUCERS]
    for kernel, d, tile, order in plain + gathered + spared:
        forced = dict(kernel=kernel, d=d, tile=list(astuple(tile)), heads=1, kv_heads=1)
        found.append(SEGMENTS | forced | dict(n=1024, w=512, r=2, order=order))
        curve = None if tile.tma else "hilbert"
        case = BLOCKS | forced | dict(pattern=["slide", 1000, 400], curve=curve)
        if case not in found and not tile.producer: found.append(case)
    found += [case | dict(mode=mode) for case in found if case["tile"] in spares_warps
              for mode in ("keys", "longnet")]
    return [case for case in found if ("blocks" if "pattern" in case else "segments") in kinds]


def all_cases() -> list[dict]:
    return segment_cases() + block_cases() + tile_cases()


def chosen_cases(count: int = 60) -> list[dict]:
    "The segment kernels' forced tiles at D 64 and 128, and a spread over everything else."
    tiles = [c for c in tile_cases(("segments",)) if c["d"] in (64, 128)]
    rest = [c for c in segment_cases() + block_cases() if c["d"] in (64, 80, 128)]
    wanted = count - len(tiles)
    return tiles + [rest[i * len(rest) // wanted] for i in range(wanted)]


def name_of(case: dict) -> str:
    "What differs from the usual, in a few words."
    usual = BLOCKS if "pattern" in case else SEGMENTS
    words = [f"{k}={v}" for k, v in case.items() if usual.get(k) != v]
    return ("blocks " if "pattern" in case else "segments ") + " ".join(words).replace("'", "")


# ---- speed

def segments(n, w, r=1, h=16, kv=None, d=64, order=False, causal=False, peers=()) -> dict:
    return dict(n=n, w=w, r=r, h=h, kv=kv or h, d=d, order=order, causal=causal, peers=list(peers))


def blocks(name, pattern, n, h=24, d=128, curve="hilbert", block=(128, 128), **more) -> dict:
    return dict(name=name, pattern=pattern, n=n, h=h, kv=h, d=d, curve=curve, block=list(block),
                peers=["permuted", "laid out", "dense"]) | more


def sweep_cases() -> list[dict]:
    "Groups of 64 to 4096 keys, D 64 and 128, with and without an order: every tile is timed."
    return [segments(32768, 4 * keys, 4, d=d, order=o)
            for keys, d, o in product((1024, 4096, 256, 64), (64, 128), TWICE)]


def dense_cases() -> list[dict]:
    "Dense attention by the library's kernels: what 1,024 keys cost at best."
    return [segments(32 * 1024, 1024, d=d, peers=["groups"]) for d in (64, 128)]


def large_cases() -> list[dict]:
    peers = ["groups", "gather"]
    return [segments(32768, w, 4, d=d, order=o, peers=peers)
            for w, d, o in product((4096, 16384), (64, 128), TWICE)]


def claim_cases() -> list[dict]:
    peers = ["groups", "gather", "dense", "sdpa_mask", "naive"]
    return [segments(8192, 2048, 4, 12, order=o, peers=peers) for o in TWICE]


def small_group_cases() -> list[dict]:
    return [segments(131072, 4 * keys, 4, d=d, order=o, peers=["gather"])
            for keys, d, o in product((16, 64, 128), (64, 128), TWICE)]


def other_segment_cases() -> list[dict]:
    "Causal, grouped heads, D 80, and segments without dilation."
    found = [segments(16384, 16384, d=d, causal=True, peers=["groups"]) for d in (64, 128)]
    found += [segments(16384, 16384, order=True, causal=True)]
    found += [segments(32768, 4096, 4, kv=4, d=128)]
    found += [segments(32768, 4096, 4, d=80, order=o, peers=["gather"]) for o in TWICE]
    return found + [segments(16384, 4096, order=True, peers=["groups", "gather", "dense"])]


def hilbert_a_cases() -> list[dict]:
    """HilbertA's four settings (arXiv 2509.26538). Shared are the text and the image's centre,
    which gives the paper's ceilings."""
    found = []
    for side, tiles in product((64, 128), (4, 16)):
        n = side ** 2 + 512
        pattern = ["tiles_shared", n, tiles, 0, 512 + side ** 2 // 16]
        found.append(blocks(f"{16 * side}^2 image, {tiles} tiles, 512 text", pattern, n,
                            around=side))
    return found


FLUX = "256x256, window 80x80"


def window_cases() -> list[dict]:
    "Windows and neighbourhoods along a sequence and on a grid; NATTEN's two settings among them."
    big = ["neighborhood", [256, 256], 80]
    found = [blocks("32768, window 2048", ["neighborhood", 32768, 2048], 32768, curve=None)]
    found += [blocks("32768, window 2048", ["neighborhood", 32768, 2048], 32768, curve=None,
                     block=(128, 64), peers=[])]
    found += [blocks(FLUX, big, 65536, grid=[256, 256], block=b,
                     peers=["permuted", "laid out", "dense"] if b == (128, 128) else [])
              for b in ((128, 128), (128, 64), (64, 64))]
    found += [blocks("128x128, neighbourhood 13x13", ["neighborhood", [128, 128], 13], 16384,
                     grid=[128, 128], block=b, peers=["dense"] if b == (128, 128) else [])
              for b in ((128, 128), (64, 64))]
    return found + [blocks("128x128, boxes of 16x16", ["window", [128, 128], 16], 16384,
                           grid=[128, 128])]


def flux_case() -> dict:
    """NATTEN's setting for Flux at 4096 x 4096 pixels. Its published times on an H100, permutation
    counted: 97.4 ms by cuDNN, dense; 18.6 by the neighbourhood; 10.6 where it moves in strides."""
    return next(case for case in window_cases() if case["name"] == FLUX)


def flex_cases() -> list[dict]:
    return [claim_cases()[0], window_cases()[0], flux_case(), hilbert_a_cases()[3]]


def speed_name(case: dict) -> str:
    if "pattern" in case: return f"{case['name']}, blocks {'x'.join(map(str, case['block']))}"
    words = [f"N{case['n']} w{case['w']} r{case['r']} D{case['d']}"]
    words += ["order"] * case["order"] + ["causal"] * case["causal"]
    return " ".join(words + ["GQA"] * (case["kv"] != case["h"]))


def front_door_cases() -> list[dict]:
    "The public function with everything around the kernel; small ones show what a launch costs."
    return [segments(n, min(n, 2048), r, 12, order=o)
            for n, r, o in ((1024, 1, False), (8192, 4, False), (8192, 4, True), (32768, 4, True))]
