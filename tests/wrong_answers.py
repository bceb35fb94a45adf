"""Answers to the exercises that are wrong, and that their checks have to notice."""
WRONG = {
    "00b_curves": {
        "rank_of": [
            r"""
def rank_of(order): return order
""",
            r"""
def rank_of(order): return order.flip(0).argsort()
""",
        ],
        "is_walk": [
            r"""
def is_walk(order, grid):
    steps = order.diff().abs()
    return bool(((steps == 1) | (steps == grid[1])).all())
""",
            r"""
def is_walk(order, grid):
    row, column = order // grid[1], order % grid[1]
    return bool((row.diff().abs() + column.diff().abs() == 1).all())
""",
        ],
        "hilbert": [
            r"""
def hilbert(m):
    if m == 0: return torch.zeros(1, 2, dtype=torch.int64)
    quarter, half = hilbert(m - 1), 2 ** (m - 1)
    corners = torch.tensor([[0, 0], [0, half], [half, half], [half, 0]])
    return torch.cat([quarter + corner for corner in corners])
""",
            r"""
def hilbert(m):
    order = curve_order((2 ** m, 2 ** m))
    return torch.stack([order % 2 ** m, order // 2 ** m], 1)
""",
        ],
        "where_hilbert_loses": [
            r"""
grid_and_size = (75, 64), 100
""",
            r"""
grid_and_size = (8, 8), 64
""",
        ],
    },
    "01_patterns": {
        "keys_of": [
            r"""
def keys_of(p, n, w, r):
    start = p // w * w
    return range(start + p % r, min(start + w, n), r)
""",
            r"""
def keys_of(p, n, w, r):
    start = p // w * w
    return range(start + (p - start) % r, start + w, r)
""",
        ],
        "pairs": [
            r"""
def pairs(n, w, r): return n * w // r
""",
            r"""
def pairs(n, w, r):
    members, longer = divmod(w, r)
    return n // w * (longer * (members + 1) ** 2 + (r - longer) * members ** 2)
""",
        ],
        "mask_along": [
            r"""
def mask_along(order, w, r):
    segment, residue = order // w, order % w % r
    return ((segment[:, None] == segment) & (residue[:, None] == residue)).tril()
""",
            r"""
def mask_along(order, w, r):
    rank = order.argsort()
    segment, residue = rank // w, rank % w % r
    same = (segment[:, None] == segment) & (residue[:, None] == residue)
    return same & (rank[:, None] >= rank)
""",
        ],
        "neighbours": [
            r"""
def neighbours(x, n, k): return range(max(x - k // 2, 0), min(x - k // 2 + k, n))
""",
            r"""
def neighbours(x, n, k):
    first = min(max(x - (k - 1) // 2, 0), n - k)
    return range(first, first + k)
""",
        ],
    },
    "02_reference": {
        "merge_two": [
            r"""
def merge_two(out1, lse1, out2, lse2):
    lse = torch.logaddexp(lse1, lse2)
    return (out1 + out2) / 2, lse
""",
            r"""
def merge_two(out1, lse1, out2, lse2):
    w1, w2 = lse1.exp()[:, None], lse2.exp()[:, None]
    return (w1 * out1 + w2 * out2) / (w1 + w2), (lse1.exp() + lse2.exp()).log()
""",
            r"""
def merge_two(out1, lse1, out2, lse2):
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = (lse1 - lse).exp()[:, None], (lse2 - lse).exp()[:, None]
    return w1 * out1 + w2 * out2, lse
""",
        ],
        "counted": [
            r"""
def counted(q, k, v, counts):
    s = q @ k.T / q.shape[1] ** 0.5 * counts
    return s.softmax(-1) @ v
""",
            r"""
def counted(q, k, v, counts):
    return ((q @ k.T / q.shape[1] ** 0.5).softmax(-1) * counts) @ v
""",
        ],
        "online": [
            r"""
def online(q, k, v, block):
    m = q.new_full(q.shape[:1], -torch.inf)
    l, acc = torch.zeros_like(m), torch.zeros_like(q)
    for k_j, v_j in zip(k.split(block), v.split(block)):
        s = q @ k_j.T / q.shape[1] ** 0.5
        m = torch.maximum(m, s.amax(1))
        p = (s - m[:, None]).exp()
        l, acc = l + p.sum(1), acc + p @ v_j
    return acc / l[:, None], m + l.log()
""",
            r"""
def online(q, k, v, block):
    parts = [(q @ x.T / q.shape[1] ** 0.5).exp() for x in k.split(block)]
    l = sum(p.sum(1) for p in parts)
    return sum(p @ x for p, x in zip(parts, v.split(block))) / l[:, None], l.log()
""",
        ],
        "gradient_of_lse": [
            r"""
def gradient_of_lse(q, k, dlse, scale):
    return dlse[:, None] * ((q @ k.T * scale).softmax(-1) @ k)
""",
            r"""
def gradient_of_lse(q, k, dlse, scale): return dlse[:, None] * k.mean(0) * scale
""",
        ],
    },
    "04_triton_backward": {
        "delta": [
            r"""
def delta(do, out, dlse): return (do * out).sum(-1) + dlse
""",
            r"""
def delta(do, out, dlse): return (do * out).sum(-1)
""",
        ],
        "dq_tiles": [
            r"""
def dq_tiles(q, k, v, do, lse, delta, scale, block):
    dq = torch.zeros_like(q)
    for k_j, v_j in zip(k.split(block), v.split(block)):
        p = (q @ k_j.T * scale).softmax(-1)
        dq += p * (do @ v_j.T - delta[:, None]) @ k_j
    return dq * scale
""",
            r"""
def dq_tiles(q, k, v, do, lse, delta, scale, block):
    dq = torch.zeros_like(q)
    for k_j, v_j in zip(k.split(block), v.split(block)):
        p = (q @ k_j.T * scale - lse[:, None]).exp()
        dq += (p * (do @ v_j.T - delta[:, None])) @ k_j
    return dq
""",
        ],
        "dkv": [
            r"""
def dkv(q, k, v, do, lse, delta, scale):
    p = (q @ k.T * scale - lse[..., None]).exp()
    ds = p * (do @ v.T - delta[..., None])
    return scale * (ds.mT @ q).mean(0), (p.mT @ do).mean(0)
""",
            r"""
def dkv(q, k, v, do, lse, delta, scale):
    p = (q @ k.T * scale - lse[..., None]).exp()
    ds = p * (do @ v.T)
    return scale * (ds.mT @ q).sum(0), (p.mT @ do).sum(0)
""",
        ],
        "with_dropout": [
            r"""
def with_dropout(weights, kept, p_drop, out, do, v):
    delta = (do * out).sum(-1, keepdim=True)
    return weights * kept / (1 - p_drop) * (do @ v.T - delta)
""",
            r"""
def with_dropout(weights, kept, p_drop, out, do, v):
    dp = (do @ v.T) * kept
    return weights * (dp - (do * out).sum(-1, keepdim=True))
""",
        ],
    },
    "06_sdpa": {
        "groups": [
            r"""
def groups(x, w, r): return x.view(-1, r, w // r, x.shape[-1])
""",
            r"""
def groups(x, w, r):
    return x.view(-1, w // r, r, x.shape[-1]).transpose(1, 2).contiguous()
""",
        ],
        "scatter": [
            r"""
def scatter(rows, tokens): return rows.flatten(1, 3)[:, tokens.flatten()]
""",
            r"""
def scatter(rows, tokens): return rows.flatten(1, 3)
""",
        ],
        "blocks": [
            r"""
def blocks(n, w, r): return {w // r: n // w * r}
""",
            r"""
def blocks(n, w, r):
    found = {}
    for residue in range(r):
        members = len(range(residue, w, r))
        found[members] = found.get(members, 0) + n // w
    return found
""",
        ],
        "lse_from_sdpa": [
            r"""
def lse_from_sdpa(q, k, v):
    zero = torch.zeros_like(k[:, :, :1])
    marked = torch.cat([torch.zeros_like(v), torch.ones_like(zero)], 2)
    weight = F.scaled_dot_product_attention(q, torch.cat([k, zero], 2), marked)[..., 0]
    return -weight.log()
""",
            r"""
def lse_from_sdpa(q, k, v): return (q @ k.mT).logsumexp(-1)
""",
        ],
    },
    "02c_triton_in_ten_minutes": {
        "programs": [
            r"""
def programs(rows, cols, BM, BN): return rows * cols // (BM * BN)
""",
            r"""
def programs(rows, cols, BM, BN): return -(-rows * cols // (BM * BN))
""",
        ],
        "reverse": [
            r"""
import triton
import triton.language as tl

@triton.jit
def reverse(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n - 1 - place, mask=place < n, other=0.0)
    tl.store(out_ptr + place, x)
""",
            r"""
import triton
import triton.language as tl

@triton.jit
def reverse(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n - place, mask=(place < n) & (place > 0), other=0.0)
    tl.store(out_ptr + place, x, mask=place < n)
""",
        ],
        "column_sum": [
            r"""
import triton
import triton.language as tl

@triton.jit
def column_sum(x_ptr, out_ptr, rows, cols, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(0, rows):
        total += tl.load(x_ptr + row * BLOCK + col, mask=col < cols, other=0.0)
    tl.store(out_ptr + col, total, mask=col < cols)
""",
            r"""
import triton
import triton.language as tl

@triton.jit
def column_sum(x_ptr, out_ptr, rows, cols, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(0, rows):
        total += tl.load(x_ptr + row * cols + col, mask=col < cols, other=0.0)
    tl.store(out_ptr + col, total)
""",
        ],
        "row_lse": [
            r"""
import triton
import triton.language as tl

@triton.jit
def row_lse(x_ptr, out_ptr, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros([], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * cols + col, mask=col < cols, other=-float("inf"))
        total += tl.sum(tl.exp(x))
    tl.store(out_ptr + row, tl.log(total))
""",
            r"""
import triton
import triton.language as tl

@triton.jit
def row_lse(x_ptr, out_ptr, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * cols + col, mask=col < cols, other=-float("inf"))
        m = tl.maximum(m, tl.max(x))
        total += tl.sum(tl.exp(x - m))
    tl.store(out_ptr + row, m + tl.log(total))
""",
        ],
    },
    "02cb_kernel_ladder": {
        "tiles_visited": [
            r"""
def tiles_visited(count, BM, BN): return -(-count // BM) * -(-count // BN) // 2
""",
            r"""
def tiles_visited(count, BM, BN): return sum(-(-(i + BM) // BN) for i in range(0, count, BM))
""",
        ],
        "with_lse": [
            r"""
import triton
import triton.language as tl

@triton.jit
def with_lse(q_ptr, k_ptr, lse_ptr, n, scale,
             D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    d = tl.arange(0, D)[None, :]
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    q = tl.load(q_ptr + row[:, None] * D + d, mask=row[:, None] < n, other=0.0)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    for j in tl.range(0, n, BN):
        key = j + tl.arange(0, BN)
        k = tl.load(k_ptr + key[:, None] * D + d, mask=key[:, None] < n, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(key[None, :] < n, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), 1)
        m = m_new
    tl.store(lse_ptr + row, m + tl.log(l), mask=row < n)
""",
            r"""
import triton
import triton.language as tl

@triton.jit
def with_lse(q_ptr, k_ptr, lse_ptr, n, scale,
             D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    d = tl.arange(0, D)[None, :]
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    q = tl.load(q_ptr + row[:, None] * D + d, mask=row[:, None] < n, other=0.0)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    for j in tl.range(0, n, BN):
        key = j + tl.arange(0, BN)
        k = tl.load(k_ptr + key[:, None] * D + d, mask=key[:, None] < n, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        m_new = tl.maximum(m, tl.max(s, 1))
        l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), 1)
        m = m_new
    tl.store(lse_ptr + row, (m + tl.log2(l)) * 0.6931471805599453, mask=row < n)
""",
        ],
        "slide_range": [
            r"""
def slide_range(tile, n, BM, BN, reach):
    first, last = tile * BM, min(tile * BM + BM, n) - 1
    lo, hi = max(first - reach, 0) // BN * BN, min(last + reach + 1, n)
    return lo, hi, lo, hi // BN * BN
""",
            r"""
def slide_range(tile, n, BM, BN, reach): return 0, n, 0, 0
""",
        ],
        "slide": [
            r"""
import triton
import triton.language as tl

@triton.jit
def slide(q_ptr, k_ptr, v_ptr, out_ptr, n, reach, scale,
          D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    d = tl.arange(0, D)[None, :]
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    q = tl.load(q_ptr + row[:, None] * D + d, mask=row[:, None] < n, other=0.0)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for j in tl.range(0, n, BN):
        key = j + tl.arange(0, BN)
        k = tl.load(k_ptr + key[:, None] * D + d, mask=key[:, None] < n, other=0.0)
        v = tl.load(v_ptr + key[:, None] * D + d, mask=key[:, None] < n, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(tl.abs(row[:, None] - key[None, :]) <= reach, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha, p = tl.exp2(m - m_new), tl.exp2(s - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    tl.store(out_ptr + row[:, None] * D + d, acc / l[:, None], mask=row[:, None] < n)
""",
        ],
    },
    "02cc_inside_a_gpu": {
        "matrix_instructions": [
            r"""
def matrix_instructions(BM, BN, D, warps): return 3 * D // 16
""",
            r"""
def matrix_instructions(BM, BN, D, warps): return 2 * (D // 16) + BN // 16
""",
        ],
        "programs_that_fit": [
            r"""
def programs_that_fit(warps, registers, shared):
    if shared > 227 * 1024: return 0
    limits = 65536 // (32 * warps * registers), 228 * 1024 // (shared + 1024), 64 // warps, 32
    return min(limits)
""",
            r"""
def programs_that_fit(warps, registers, shared):
    if shared > 227 * 1024: return 0
    given = (registers + 7) // 8 * 8
    return min(65536 // (32 * warps * given), 228 * 1024 // max(shared, 1), 64 // warps, 32)
""",
            r"""
def programs_that_fit(warps, registers, shared):
    if shared > 227 * 1024: return 0
    return min(65536 // (32 * warps * ((registers + 7) // 8 * 8)), 228 * 1024 // (shared + 1024))
""",
        ],
        "keys_until_busy": [
            r"""
def keys_until_busy(tflops, tbs, heads, kv_heads): return tflops / tbs
""",
            r"""
import math

def keys_until_busy(tflops, tbs, heads, kv_heads): return math.ceil(2 * tflops / tbs)
""",
            r"""
import math

def keys_until_busy(tflops, tbs, heads, kv_heads):
    return math.floor(tflops / tbs * (heads + kv_heads) / heads)
""",
        ],
        "most_stages": [
            r"""
def most_stages(BM, BN, D, programs):
    return (228 * 1024 // programs - 1024) // (4 * BN * D)
""",
            r"""
def most_stages(BM, BN, D, programs):
    room = 228 * 1024 // programs - 1024
    return (room - 2 * BM * D) // (4 * BN * D)
""",
        ],
    },
    "03_triton_forward": {
        "join": [
            r"""
def join(one, two):
    (m1, l1, acc1), (m2, l2, acc2) = one, two
    return torch.maximum(m1, m2), l1 + l2, acc1 + acc2
""",
            r"""
def join(one, two):
    (m1, l1, acc1), (m2, l2, acc2) = one, two
    m = torch.maximum(m1, m2)
    a = (m1 - m).exp()
    return m, a * l1 + l2, a[:, None] * acc1 + acc2
""",
        ],
        "rows_of_group": [
            r"""
def rows_of_group(segment, residue, n, w, r): return segment * w + residue, w // r
""",
            r"""
def rows_of_group(segment, residue, n, w, r):
    return segment * w + residue, min(w, n - segment * w) // r
""",
        ],
        "seen_range": [
            r"""
def seen_range(tile, count, BM, BN): return tile * BM // BN * BN, tile * BM + BM
""",
            r"""
def seen_range(tile, count, BM, BN):
    return min(tile * BM + BM, count) // BN * BN, min(tile * BM + BM, count)
""",
        ],
        "sorted_inside": [
            r"""
def sorted_inside(order, w, r):
    return torch.cat([part.sort().values for part in order.split(w)])
""",
            r"""
def sorted_inside(order, w, r):
    found = order.clone()
    for residue in range(r): found[residue::r] = found[residue::r].sort().values
    return found
""",
        ],
    },
    "08_dilated": {
        "counts": [
            r"""
def counts(p, n, lengths, rates):
    found = torch.zeros(n, dtype=torch.int64)
    for w, r in zip(lengths, rates):
        start = p // w * w
        found[start + (p - start) % r:start + w:r] = 1
    return found
""",
            r"""
def counts(p, n, lengths, rates):
    found = torch.zeros(n, dtype=torch.int64)
    for w, r in zip(lengths, rates): found[p // w * w:p // w * w + w:r] += 1
    return found
""",
        ],
        "weights": [
            r"""
def weights(lses): return lses.exp() / lses.exp().sum(0)
""",
            r"""
def weights(lses): return torch.full_like(lses, 1 / len(lses))
""",
        ],
        "gradient_of_lses": [
            r"""
def gradient_of_lses(outs, lses, do): return torch.zeros_like(lses)
""",
            r"""
def gradient_of_lses(outs, lses, do): return lses.softmax(0) * (outs * do).sum(-1)
""",
        ],
        "uncovered": [
            r"""
def uncovered(n, w, r, heads): return []
""",
            r"""
def uncovered(n, w, r, heads): return [p for p in range(n) if p % r >= heads]
""",
        ],
    },
    "09_ring_plan": {
        "received": [
            r"""
def received(w, l, r, kv_heads, head_dim, mode): return 2 * kv_heads * head_dim * (w - l) // r
""",
            r"""
def received(w, l, r, kv_heads, head_dim, mode):
    return 2 * kv_heads * head_dim * (w if mode == "residue" else w // r)
""",
        ],
        "zigzag": [
            r"""
def zigzag(n, world, rank): return range(rank * n // world, (rank + 1) * n // world)
""",
            r"""
def zigzag(n, world, rank):
    size = n // (2 * world)
    early, late = rank * size, (world + rank) * size
    return [*range(early, early + size), *range(late, late + size)]
""",
        ],
        "causal_pairs": [
            r"""
def causal_pairs(positions): return len(positions) * (len(positions) + 1) // 2
""",
            r"""
def causal_pairs(positions): return sum(positions)
""",
        ],
        "shared": [
            r"""
def shared(sizes, w):
    ranks, start = {}, 0
    for rank, size in enumerate(sizes):
        for segment in range(start // w, (start + size) // w + 1):
            ranks.setdefault(segment, []).append(rank)
        start += size
    return {segment: who for segment, who in ranks.items() if len(who) > 1}
""",
            r"""
def shared(sizes, w): return {}
""",
        ],
    },
    "10_block_lists": {
        "kinds": [
            r"""
def kinds(mask, BM, BN):
    blocks = mask.reshape(len(mask) // BM, mask.shape[1] // BN, -1)
    return blocks.any(-1).int() + blocks.all(-1).int()
""",
            r"""
def kinds(mask, BM, BN):
    blocks = mask.view(len(mask) // BM, BM, -1, BN).transpose(1, 2).flatten(2)
    return blocks.any(-1).int() * 2
""",
        ],
        "lists": [
            r"""
def lists(kinds):
    start, index = [0], []
    for row in kinds.tolist():
        index += [j for j, found in enumerate(row) if found]
        start.append(len(index))
    return start, index
""",
            r"""
def lists(kinds):
    start, index = [], []
    for row in kinds.tolist():
        start.append(len(index))
        for kind in (2, 1): index += [j for j, found in enumerate(row) if found == kind]
    return start, index
""",
        ],
        "attended": [
            r"""
def attended(lo, hi, at):
    at = at[:, None]
    return ((lo[..., None] <= at) & (at <= hi[..., None])).any(0)
""",
            r"""
def attended(lo, hi, at):
    at = at[:, None]
    return ((lo[..., None] <= at) & (at < hi[..., None])).all(0)
""",
        ],
        "touched": [
            r"""
def touched(mask, order, block):
    tiles = mask.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    return tiles.any(3).any(1).sum()
""",
            r"""
def touched(mask, order, block):
    tiles = mask[order].unflatten(1, (-1, block)).unflatten(0, (-1, block))
    return tiles.any(3).any(1).sum()
""",
        ],
    },
    "11_local": {
        "windows": [
            r"""
def windows(n, window, shift): return [(a, a + window) for a in range(shift, n, window)]
""",
            r"""
def windows(n, window, shift): return [(a, min(a + window, n)) for a in range(0, n, window)]
""",
        ],
        "slide_pairs": [
            r"""
def slide_pairs(n, window): return n * min(window, n)
""",
            r"""
def slide_pairs(n, window):
    reach = min(window // 2, n - 1)
    return n * (2 * reach + 1)
""",
        ],
        "keys_of_tile": [
            r"""
def keys_of_tile(start, stop, n, k): return max(start - k // 2, 0), min(stop + k // 2, n)
""",
            r"""
def keys_of_tile(start, stop, n, k):
    def first(x): return min(max(x - k // 2, 0), n - k)
    return first(start), first(stop) + k
""",
        ],
        "useful_share": [
            r"""
def useful_share(side, k): return k / (side + k - 1)
""",
            r"""
def useful_share(side, k): return (k / (side + k)) ** 2
""",
        ],
    },
    "05_autograd": {
        "saved": [
            r"""
saved = {"q", "k", "v", "out", "lse", "weights"}
""",
            r"""
saved = {"q", "k", "v", "out"}
""",
        ],
        "positive": [
            r"""
def positive(q, scale): return q, abs(scale)
""",
            r"""
def positive(q, scale): return (q, scale) if scale >= 0 else (-q, -scale)
""",
        ],
        "kept": [
            r"""
def kept(seed, i, j, p):
    torch.manual_seed(seed)
    return torch.rand(len(i), j.shape[1]) >= p
""",
            r"""
def kept(seed, i, j, p): return (i * 64 + j + seed) % 10 >= p * 10
""",
            r"""
def kept(seed, i, j, p):
    x = (i * 0x9E3779B1 + seed * 0xC2B2AE3D) & (2 ** 32 - 1)
    return (x >= p * 2 ** 32) & (j >= 0)
""",
        ],
        "log_sum_exp": [
            r"""
class LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.logsumexp(-1)

    @staticmethod
    def backward(ctx, dlse):
        x, = ctx.saved_tensors
        return x.softmax(-1)
""",
            r"""
class LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.logsumexp(-1)

    @staticmethod
    def backward(ctx, dlse):
        x, = ctx.saved_tensors
        return dlse[..., None] * x.exp() / x.exp().sum(-1, keepdim=True)
""",
        ],
    },
    "07_backends": {
        "flops": [
            r"""
def flops(batch, heads, pairs, head_dim): return 2 * head_dim * pairs * heads * batch
""",
            r"""
def flops(batch, heads, pairs, head_dim): return 4 * head_dim * pairs * heads
""",
        ],
        "least_bytes": [
            r"""
def least_bytes(B, H, kv_heads, N, D, element): return 4 * B * H * N * D * element
""",
            r"""
def least_bytes(B, H, kv_heads, N, D, element): return B * N * D * element * (H + 2 * kv_heads)
""",
        ],
        "choose": [
            r"""
def choose(rows, device, n, runs):
    for wanted, backend, most in rows:
        if wanted in (device, "any") and (most is None or n <= most): return backend
""",
            r"""
def choose(rows, device, n, runs):
    for wanted, backend, most in rows:
        fits = wanted == device and (most is None or n <= most)
        if fits and backend in runs: return backend
""",
        ],
        "crossover": [
            r"""
def crossover(rows):
    return next((tokens for tokens, one, other in rows if other < one), None)
""",
            r"""
def crossover(rows): return min(tokens for tokens, one, other in rows if other < one)
""",
        ],
    },
}
