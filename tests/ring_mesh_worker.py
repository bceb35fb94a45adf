"""Sharding, repeated and nested calls, and rings beside data parallelism: for test_ring.py."""
import torch
import torch.distributed as dist
from ring_processes import attempt, main, outcome
from ring_worker import Messages
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hilbert_attn.backends import hilbert_attention
from hilbert_attn.ring import ring_attention, ring_dilated_attention
from hilbert_attn.ring_exchange import shard_sequence, unshard_sequence
from hilbert_attn.ring_plan import shard_positions, shard_sizes


def round_trip(rank, world, n, layout, ordered, grad):
    "Gradients of shard_sequence and unshard_sequence, in one of the two conventions."
    generator = torch.Generator().manual_seed(4)
    def rand(*shape): return torch.randn(shape, dtype=torch.float64, generator=generator)
    x, weights = rand(2, n, 3).requires_grad_(), rand(world, 2, n, 3)
    order = torch.randperm(n, generator=generator) if ordered else None
    shard = shard_sequence(x, None, 1, order, layout)
    whole = unshard_sequence(shard.square(), None, 1, order, layout, grad=grad)
    assert torch.equal(whole, x.square()), "not what was sharded"
    same = grad == "slice"  # the same loss on every rank, or one part of it on each
    (whole * weights[0 if same else rank]).sum().backward()
    total = x.grad.clone()
    dist.all_reduce(total)
    expected = 2 * x.detach() * (weights[0] if same else weights.sum(0))
    assert (total - expected).abs().max() < 1e-13
    outside = torch.ones(n, dtype=torch.bool)
    places = shard_positions(shard_sizes(n, world, layout), rank, layout)
    outside[places if order is None else order[places]] = False
    assert not x.grad[:, outside].any(), "a gradient outside the shard"


def lengths_vary():
    "From batch to batch, also in ways that some ranks cannot see."
    for n in (13, 14, 12, 16, 17, 13):
        x = torch.arange(n, dtype=torch.float32)[None]
        assert torch.equal(unshard_sequence(shard_sequence(x)), x), n


def agreements():
    "Operators of torch that are no messages: forward and backward, by kind of call."
    counts = []
    for options in (dict(segment_size=8), dict(segment_size=32, dilation_rate=2), {}):
        x = [torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)]
        with Messages() as messages: out = ring_attention(*x, **options)
        with Messages() as back: out.sum().backward()
        counts.append([messages.others, back.others])
    return dict(counts=counts)


def twice():
    "Bit-identical, and the same when recomputed from a checkpoint."
    x = [torch.randn(1, 4, 9, 16, requires_grad=True) for _ in range(3)]
    def call(*x):
        branches = (8, 16, None), (1, 2, 1)
        return ring_dilated_attention(*x, *branches, dilation_mode="residue", return_lse=True)
    repeated(call, x)


def one_shares_nothing(rank, rows):
    "The same where rank 0 shares no segment, or has no rows, and the others do."
    x = [torch.randn(1, 4, 10 if rank else rows, 16, requires_grad=True) for _ in range(3)]
    for size in (12, 5, None):
        repeated(lambda *x, w=size: ring_attention(*x, segment_size=w, return_lse=True), x)


def repeated(call, x):
    def recomputed(*x): return checkpoint(call, *x, use_reentrant=False)
    runs = []
    for function in (call, call, recomputed):
        out, lse = function(*x)
        loss = out.square().sum() + lse.sin().sum()
        runs.append((out, lse, *torch.autograd.grad(loss, x)))
    for run in runs[1:]: assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def sharding(results, rank, world):
    for n in (12, 13, 2):
        for layout in ("contiguous", "zigzag"):
            for ordered in (False, True):
                for grad in ("slice", "sum"):
                    case = n, layout, ordered, grad
                    name = f"n={n} {layout} ordered={ordered} {grad}"
                    attempt(results, name, round_trip, rank, world, *case)
    attempt(results, "lengths vary", lengths_vary)
    attempt(results, "agreements", agreements)
    attempt(results, "twice", twice)
    attempt(results, "one shares nothing", one_shares_nothing, rank, 12)
    attempt(results, "one is empty", one_shares_nothing, rank, 0)


class Layer(torch.nn.Module):
    "A small transformer layer; attention is a function of q, k, v (B, H, n, D)."
    def __init__(self, attention, dim=16, heads=2):
        super().__init__()
        self.attention, self.heads = attention, heads
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
        inner = torch.nn.Linear(dim, 32), torch.nn.GELU(), torch.nn.Linear(32, dim)
        self.mlp = torch.nn.Sequential(*inner)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def model(attention):
    torch.manual_seed(3)
    return torch.nn.Sequential(*(Layer(attention) for _ in range(2))).double()


DENSE, SEGMENTS = {}, dict(segment_size=8, dilation_rate=2, causal=True)


def ring_of(group, name):
    "The attention of a model whose sequence is shared."
    if name == "branches":
        options = dict(group=group, dilation_mode="residue", combine="heads")
        return lambda q, k, v: ring_dilated_attention(q, k, v, (4, 24), (1, 2), **options)
    options = dict(dense=DENSE, exchange=SEGMENTS)[name]
    return lambda q, k, v: ring_attention(q, k, v, group=group, **options)


def alone(name):
    "The same on one process."
    def branches(q, k, v):
        heads = zip(q.split(1, 1), k.split(1, 1), v.split(1, 1))
        shapes = dict(segment_size=4), dict(segment_size=24, dilation_rate=2)
        outs = [hilbert_attention(*x, curve=None, **shape) for x, shape in zip(heads, shapes)]
        return torch.cat(outs, 1)
    if name == "branches": return branches
    options = dict(dense=DENSE, exchange=SEGMENTS)[name]
    return lambda q, k, v: hilbert_attention(q, k, v, curve=None, **options)


def with_ddp(m, mesh, loss_of):
    "Averages over all four ranks, over those of a ring too: there it should add."
    m = DistributedDataParallel(m)
    loss = loss_of(m)
    (2 * loss).backward()
    return loss, [p.grad for p in m.parameters()]


def with_fsdp(m, mesh, loss_of):
    "Averages over the data dimension; the ring's gradients are added by hand."
    for layer in m: fully_shard(layer, mesh=mesh["data"])
    fully_shard(m, mesh=mesh["data"])
    loss = loss_of(m)
    loss.backward()
    group = mesh.get_group("ring")
    for p in m.parameters(): dist.all_reduce(p.grad.to_local(), group=group)
    return loss, [p.grad.full_tensor() for p in m.parameters()]


def one_process(name, x, target):
    "Loss and gradients of the whole."
    m = model(alone(name))
    loss = (m(x) - target).square().sum() / target.numel()
    loss.backward()
    return [loss.detach(), *(p.grad for p in m.parameters())]


def meshes(results, rank, world):
    "Batches on one dimension of a mesh, the sequence on the other; gradients of one process."
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ring"))
    data = mesh.get_local_rank("data")
    generator = torch.Generator().manual_seed(2)
    def rand(): return torch.randn(2, 24, 16, dtype=torch.float64, generator=generator)
    x, target = rand(), rand()

    def loss_of(m):
        mine, wanted = (shard_sequence(t[data:data + 1], mesh["ring"], 1) for t in (x, target))
        return (m(mine) - wanted).square().sum() / target[:1].numel()

    def run(name, wrapped):
        loss, grads = wrapped(model(ring_of(mesh["ring"], name)), mesh, loss_of)
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        pairs = zip([loss / 2, *grads], one_process(name, x, target))
        errors = [(a - b).abs().max().item() for a, b in pairs]
        assert max(errors) < 1e-12, errors

    for kind, wrapped in dict(DDP=with_ddp, FSDP2=with_fsdp).items():
        for name in ("dense", "exchange", "branches"):
            attempt(results, f"{kind} {name}", run, name, wrapped)
    def wrong(): ring_attention(*[torch.randn(1, 1, 4, 8)] * 3, group=mesh)
    attempt(results, "whole mesh", outcome, wrong)


if __name__ == "__main__": main(globals())
