"""Of 07_backends."""
from exercises import exercise

ROWS = [("cpu", "sdpa_mask", 128), ("cpu", "sdpa", None), ("cuda", "triton", None),
        ("any", "sdpa", None)]


@exercise
def flops(answer):
    for batch, heads, pairs, head_dim in [(1, 1, 1, 1), (2, 8, 10 ** 6, 64)]:
        expected = 4 * batch * heads * pairs * head_dim
        found = answer(batch, heads, pairs, head_dim)
        if found != expected: return f"{batch, heads, pairs, head_dim}: {found}, not {expected}"


@exercise
def least_bytes(answer):
    for sizes in [(1, 4, 4, 100, 64, 4), (2, 8, 2, 1000, 64, 2)]:
        B, H, kv_heads, N, D, element = sizes
        expected = B * N * (2 * H + 2 * kv_heads) * D * element
        found = answer(*sizes)
        if found != expected: return f"B, H, H_kv, N, D, bytes = {sizes}: {found}, not {expected}"


@exercise
def choose(answer):
    every = {"sdpa_mask", "sdpa", "triton"}
    cases = [("cpu", 64, every, "sdpa_mask"), ("cpu", 4096, every, "sdpa"),
             ("cuda", 64, every, "triton"), ("cuda", 4096, {"sdpa", "sdpa_mask"}, "sdpa"),
             ("cpu", 128, every, "sdpa_mask"), ("cpu", 64, {"sdpa"}, "sdpa")]
    for device, n, runs, expected in cases:
        found = answer(ROWS, device, n, runs)
        if found != expected:
            return f"{device}, N={n}, what runs is {sorted(runs)}: {found!r}, not {expected!r}"


@exercise
def crossover(answer):
    cases = [([(16, 1, 3), (32, 2, 3), (64, 4, 3), (128, 8, 4)], 64),
             ([(16, 3, 2), (32, 2, 3), (64, 4, 3)], 64),
             ([(16, 1, 2), (32, 1, 2)], None), ([(16, 2, 1), (32, 2, 1)], 16)]
    for rows, expected in cases:
        found = answer(rows)
        if found != expected: return f"{rows}: {found} instead of {expected}"
