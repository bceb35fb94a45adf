"""Answers to the exercises that are wrong, and that their checks have to notice."""
WRONG = {
    "00_curves": {
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
}
