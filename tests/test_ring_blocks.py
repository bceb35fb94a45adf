"""One block of keys, on every device: against the definition, or what a kernel would be given."""
from itertools import combinations
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hilbert_attn import ring_blocks
from hilbert_attn.patterns import attention_mask
from hilbert_attn.reference import masked_attention
from hilbert_attn.ring_blocks import Blocks, Queries, ring_tasks, shared_work
from hilbert_attn.ring_plan import plan_ring, shard_positions


def tensors(n, m, d, dtype=torch.float64, **options):
    "q, k, v and the upstream gradient of the output."
    return [torch.randn(2, 3, rows, d, **options).to(dtype) for rows in (n, m, m, n)]


def exact_block(q, k, v, dout, dlse, mask, scale):
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    results = masked_attention(*leaves, mask, scale)
    upstream = dout.double(), dlse.double()
    return *results, *torch.autograd.grad(results, leaves, upstream)


@pytest.mark.parametrize("masked", [False, True])
def test_plain_kernels(masked):
    "The matrix products for devices without a kernel, with a scale."
    q, k, v, dout = tensors(19, 23, 16)
    mask, bias = torch.ones(19, 23, dtype=torch.bool), None
    if masked:
        mask = torch.rand(19, 23) < 0.4
        mask[7] = False  # a row without keys
        bias = torch.zeros(19, 23, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    dlse = torch.randn(2, 3, 19, dtype=torch.float64).masked_fill(~mask.any(-1), 0)
    expected = exact_block(q, k, v, dout, dlse, mask, 0.37)
    out, lse = ring_blocks._plain_forward(q, k, v, bias, 0.37)
    shift = lse.masked_fill(lse.isneginf(), 0)
    grads = ring_blocks._plain_backward(dout, dlse, q, k, v, out, shift, bias, 0.37)
    for a, e in zip((out, lse, *grads), expected):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


def test_cuda_flash_backward_takes_the_gradient_of_the_lse():
    "What PyTorch's CUDA kernel would be given, handed to the CPU's: three columns carry a float32."
    q, k, v, dout = tensors(9, 14, 24, torch.bfloat16)
    dlse = torch.randn(2, 3, 9)
    out, lse = ring_blocks.block_forward(q, k, v, False, None, 0.2)
    out = out.bfloat16()

    def given(dout, q, k, v, out, lse, cq, ck, m, j, p, triangle, seed, offset, scale=None):
        assert (cq, ck, m, j, p) == (None, None, 9, 14, 0.0) and q.shape[-1] % 8 == 0
        block = [x.float() for x in (dout, q, k, v, out)]
        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return *on_cpu(*block, lse, 0.0, triangle, scale=scale), None

    name = "_scaled_dot_product_flash_attention_backward"
    block = q, k, v, out, lse, False
    for gradient in (None, dlse):
        with mock.patch.object(torch.ops.aten, name, given):
            found = ring_blocks._cuda_flash_backward(dout, gradient, *block, 0.2)
        expected = ring_blocks.block_backward(dout, gradient, *block, None, 0.2)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_cuda_kernels_accept_the_calls():
    "Shapes and dtypes of PyTorch's CUDA flash operators, without a GPU."
    with FakeTensorMode():
        options = dict(device="cuda", dtype=torch.bfloat16)
        q, k, v = (torch.empty(2, 3, n, 64, **options) for n in (128, 256, 256))
        out, lse = ring_blocks.block_forward(q, k, v, False, None, 0.125)
        assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
        assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
        block = q, k, v, out.bfloat16(), lse, False, None, 0.125
        grads = ring_blocks.block_backward(torch.empty_like(q), None, *block)
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, m, triangle", [(100, 300, False), (257, 257, True), (1, 70, False)])
def test_kernels_on_cuda(dtype, n, m, triangle):
    q, k, v, dout = tensors(n, m, 64, dtype, device="cuda")
    mask, bias = torch.ones(n, m, dtype=torch.bool, device="cuda"), None
    if triangle: mask = mask.tril()
    if triangle and not ring_blocks.has_kernel(q):
        triangle, bias = False, torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    dlse = torch.randn(2, 3, n, device="cuda")
    expected = exact_block(q, k, v, dout, dlse, mask, 0.125)
    out, lse = ring_blocks.block_forward(q, k, v, triangle, bias, 0.125)
    block = q, k, v, out.to(dtype), lse, triangle, bias, 0.125
    found = out, lse, *ring_blocks.block_backward(dout, dlse, *block)
    limit = 1e-4 if dtype == torch.float32 else 0.05
    for a, e in zip(found, expected):
        assert (a - e).abs().max() < limit * max(1.0, e.abs().max().item())


def rounds_of(plan, rank):
    "Positions of each part of q; tasks and their sources (positions, heads), round by round."
    heads = list(range(plan.kv_heads))
    held = [shard_positions(plan.sizes, r, plan.layout) for r in range(plan.world_size)]
    if plan.kind(0) == "ring":
        (turn,) = plan.turns(0)
        rounds = [(ring_tasks(plan, 0, rank, src, turn), [(held[src], heads)])
                  for src in range(plan.world_size)]
        return [held[rank]], rounds
    work = shared_work(plan, rank)
    parts = [torch.arange(part.start, part.stop) for _, part in work.parts]
    arriving = [(p.rows.positions(), list(p.kv_heads)) for p in work.arriving]
    return parts, [(work.tasks, [*((part, heads) for part in parts), *arriving])]


@pytest.mark.parametrize("world", [3, 5])
def test_two_runs_that_see_the_same_keys_are_one_call(world):
    "In a zigzag ring both runs of a rank see the first half of what an earlier rank holds."
    plan = plan_ring(61, world, heads=4, kv_heads=2, head_dim=8, causal=True, layout="zigzag")
    (turn,) = plan.turns(0)
    for src, rank in combinations(range(world), 2):
        (task,) = ring_tasks(plan, 0, rank, src, turn)
        start, stop = plan.runs[src][0]
        assert task.visible == "all" and task.queries.count == plan.sizes[rank]
        assert task.keys.count == stop - start


def run_rounds(plan, rank, order, x, dout, dlse):
    "Forward and backward as a rank computes them; the rows of others come from the whole."
    q, k, v = x
    parts, rounds = rounds_of(plan, rank)

    def keys(sources): return [[y[:, heads][:, :, at] for y in (k, v)] for at, heads in sources]
    rows = [Queries.before(q[:, :, at]) for at in parts]
    for tasks, sources in rounds: Blocks(tasks, order, 0.37).forward(rows, keys(sources))
    rows = [Queries.after(part.q, part.out, part.lse, dout[:, :, at], dlse[:, :, at])
            for part, at in zip(rows, parts)]
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for tasks, sources in rounds:
        given = keys(sources)
        grads = [[torch.zeros_like(y) for y in pair] for pair in given]
        Blocks(tasks, order, 0.37).backward(rows, given, grads)
        for (at, heads), pair in zip(sources, grads):
            for whole, part in zip((dk, dv), pair):
                whole[:, torch.tensor(heads)[:, None], at] += part
    return parts, rows, dk, dv


BY_TOKEN = dict(causal=True, ordered=True)
THREES = dict(segment_lengths=(20,), dilation_rates=(3,))
PLANS = {
    "dense": dict(),
    "dense, grouped": dict(heads=4, kv_heads=2),
    "causal": dict(causal=True, layout="zigzag"),
    "causal by token": dict(heads=4, kv_heads=2) | BY_TOKEN,
    "segments by token": THREES | BY_TOKEN,
    "segments": dict(causal=True, layout="zigzag") | THREES,
    "heads apart": dict(segment_lengths=(24,), dilation_rates=(4,), dilation_mode="longnet",
                        heads=6, kv_heads=3, offsets=(2, 0, 0, 2, 2, 1)),
    "keys by token": dict(segment_lengths=(24,), dilation_rates=(12,), dilation_mode="keys",
                          offsets=11) | BY_TOKEN,
}


def mask_by_position(plan, order):
    mask = attention_mask(plan.branches[0].pattern, order=order, causal=plan.causal)
    return mask[:, :, order][..., order] if plan.ordered else mask


def of_all_ranks(ranks):
    "Results of `run_rounds` put together: positions of the queries; out, lse, dq, dk, dv."
    parts, rows, dk, dv = zip(*ranks)
    rows = [part for some in rows for part in some]
    found = [torch.cat([getattr(part, name) for part in rows], 2) for name in ("out", "lse", "dq")]
    return torch.cat([at for some in parts for at in some]), [*found, sum(dk), sum(dv)]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_blocks_of_all_rounds_are_attention(name, kernel):
    "Masks in pieces, some heads at a time, merged and added up: a ring without its messages."
    options = dict(heads=2, kv_heads=2, head_dim=8, dtype=torch.float64) | PLANS[name]
    plan = plan_ring(41, 3, **options)
    generator = torch.Generator().manual_seed(0)
    def normal(*shape): return torch.randn(shape, dtype=torch.float64, generator=generator)
    q, k, v = (normal(2, heads, 41, 8) for heads in (plan.heads, plan.kv_heads, plan.kv_heads))
    dout, dlse = normal(*q.shape), normal(*q.shape[:3])
    order = torch.randperm(41, generator=generator) if plan.ordered else None
    small = dict(MASK_ELEMENTS=dict(cpu=24), HEAD_ELEMENTS=dict(cpu=64))
    with mock.patch.multiple(ring_blocks, **small, has_kernel=lambda q: kernel):
        ranks = [run_rounds(plan, rank, order, (q, k, v), dout, dlse) for rank in range(3)]
    seen, found = of_all_ranks(ranks)
    q, dout, dlse, mask = (x[:, :, seen] for x in (q, dout, dlse, mask_by_position(plan, order)))
    lse = masked_attention(q, k, v, mask, 0.37)[1]
    dlse = dlse.masked_fill(lse.isneginf(), 0)
    out, lse, *grads = exact_block(q, k, v, dout, dlse, mask, 0.37)
    lse = lse.masked_fill(lse.isneginf(), 0)  # as `Queries.after` has it
    expected = out, lse, *grads
    for a, e in zip(found, expected): torch.testing.assert_close(a, e, rtol=0, atol=1e-12)
