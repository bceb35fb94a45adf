"""Of 09_ring_plan."""
from exercises import exercise
from hilbert_attn.ring_plan import shard_positions, shard_sizes


@exercise
def received(answer):
    cases = {(1024, 256, 4, 8, 64, "longnet"): 2 * 8 * 64 * 192,
             (1024, 256, 4, 8, 64, "keys"): 2 * 8 * 64 * 192,
             (1024, 256, 4, 8, 64, "residue"): 2 * 8 * 64 * 768,
             (512, 512, 2, 1, 16, "residue"): 0}
    for settings, expected in cases.items():
        found = answer(*settings)
        if found != expected:
            return f"w, l, r, H_kv, D, mode = {settings}: {found} instead of {expected}"


@exercise
def zigzag(answer):
    for n, world in [(8, 2), (12, 3), (16, 1), (48, 4)]:
        for rank in range(world):
            sizes = shard_sizes(n, world, "zigzag")
            expected = shard_positions(sizes, rank, "zigzag").tolist()
            found = list(answer(n, world, rank))
            if found != expected: return f"N={n}, rank {rank} of {world}: {found}, not {expected}"


@exercise
def causal_pairs(answer):
    for positions in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 6, 7], [9]):
        expected = sum(p + 1 for p in positions)
        found = answer(positions)
        if found != expected: return f"queries {positions}: {found} instead of {expected}"


@exercise
def shared(answer):
    for sizes, w in [((8, 8), 8), ((8, 8), 4), ((8, 8), 12), ((5, 6, 5), 16), ((3, 3, 3), 4)]:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        ranks = [{i for i, (a, size) in enumerate(zip(starts, sizes)) for p in range(a, a + size)
                  if p // w == s} for s in range(-(-sum(sizes) // w))]
        expected = {s: sorted(who) for s, who in enumerate(ranks) if len(who) > 1}
        found = {s: sorted(who) for s, who in dict(answer(sizes, w)).items()}
        if found != expected: return f"sizes {sizes}, w={w}: {found} instead of {expected}"
