"""What the processes of test_ring.py run: `python ring_worker.py SUITE,... RANK WORLD STORE RESULTS`; one JSON line per result."""
import weakref
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import permutations
from unittest import mock

import torch
import torch.distributed as dist
from ring_processes import attempt, main, outcome
from torch.utils._python_dispatch import TorchDispatchMode

import hilbert_attn.reference as reference
import hilbert_attn.ring as ring_module
from hilbert_attn.backends import hilbert_attention
from hilbert_attn.curves import curve_order
from hilbert_attn.patterns import SegmentPattern, attention_mask
from hilbert_attn.reference import assert_matches_oracle
from hilbert_attn.ring import (
    plan_ring,
    ring_attention,
    ring_dilated_attention,
    shard_positions,
    shard_sequence,
    shard_sizes,
    unshard_sequence,
)


@dataclass(frozen=True)
class Case:
    "One call on every rank, described by small numbers."
    n: int = 48
    w: tuple = (None,)
    r: tuple = (1,)
    mode: str = "residue"
    heads: tuple[int, int] = (2, 2)
    causal: bool = False
    order: str = "none"
    layout: str = "contiguous"
    combine: str = "lse"
    dtype: str = "float64"
    sizes: tuple[int, ...] | None = None # of the first shards; None: even
    offsets: tuple | None = None
    d: int = 16
    overlap: bool = True
    scale: float | None = None
    strided: bool = False
    turn_bytes: int | None = None # of K and V that go around a ring together; None: as much as there is

    def __str__(self): return " ".join(f"{k}={v}" for k, v in asdict(self).items() if v != getattr(type(self), k))

    def shard_sizes(self, world): # uneven ones: given for the first ranks, the last one takes the rest
        if self.sizes is None: return shard_sizes(self.n, world, self.layout)
        first = self.sizes[:world - 1]
        return *first, self.n - sum(first)


def _cases():
    modes = ("residue", "keys", "longnet")
    for n in (48, 37):  # dense
        for heads in ((2, 2), (4, 2)): yield Case(n, heads=heads)
        for layout in ("contiguous", "zigzag"):
            yield Case(n, causal=True, layout=layout)
            yield Case(n, causal=True, layout=layout, heads=(4, 1), overlap=False)
            yield Case(n, causal=True, layout=layout, order="random")
            yield Case(n, layout=layout, strided=True)
    for turn_bytes in (1, 6144, 20000):  # a ring in turns: one head at a time, some, one batch entry at a time
        yield Case(heads=(6, 3), turn_bytes=turn_bytes)
        yield Case(37, heads=(5, 5), causal=True, layout="zigzag", turn_bytes=turn_bytes, overlap=turn_bytes > 1, strided=True)
    yield Case(37, heads=(4, 2), causal=True, order="random", turn_bytes=1)
    yield Case(sizes=(0, 17, 11), causal=True, turn_bytes=1)
    yield Case(w=(8, None), r=(2, 1), mode="residue", combine="heads", heads=(6, 2), turn_bytes=1)
    yield Case(w=(8, None, None), r=(2, 1, 1), mode="residue", combine="heads", heads=(8, 2), turn_bytes=1)
    yield Case(61, dtype="bfloat16", heads=(4, 2), turn_bytes=1)
    for mode in modes:  # segments inside, equal to and across shards, and rates that do not divide them
        for n, w, r in ((48, 4, 2), (48, 12, 4), (48, 16, 3), (48, 24, 5), (37, 11, 3), (48, None, 4)):
            yield Case(n, (w,), (r,), mode, heads=(4, 2) if n == 37 else (2, 2))
            yield Case(n, (w,), (r,), mode, causal=True, layout="zigzag" if w == 24 else "contiguous", order="hilbert" if w in (16, 11) else "none")
    for w in (12, 20): yield Case(w=(w,), heads=(6, 2), causal=w == 20)  # dilation 1
    for heads in ((3, 3), (6, 3), (4, 1)):
        yield Case(w=(16,), r=(4,), mode="longnet", heads=heads)
        yield Case(w=(32,), r=(4,), mode="keys", heads=heads, offsets=tuple(h * 3 % 4 for h in range(heads[0])))
    branches = dict(w=(6, 24, None), r=(1, 2, 6))
    for combine in ("lse", "heads"):
        for causal in (False, True):
            for order in ("none", "random") if causal else ("none",):
                yield Case(**branches, mode="longnet", combine=combine, causal=causal, order=order, heads=(4, 4))
                yield Case(37, **branches, mode="longnet", combine=combine, causal=causal, order=order, heads=(6, 2), layout="zigzag")
        yield Case(w=(8, None), r=(2, 1), mode="residue", combine=combine, heads=(4, 2))  # with a dense branch
        yield Case(w=(5, 20), r=(2, 3), mode="keys", combine=combine, heads=(5, 5), offsets=(1, 0, 7, 3, 2))
        yield Case(w=(6, 24, 6, 60, 48), r=(1, 2, 1, 2, 2), mode="longnet", combine=combine, heads=(5, 5))  # some of them alike
    for sizes in ((20, 5, 9), (1, 30, 2), (0, 17, 11)):  # uneven shards, an empty one among them
        yield Case(sizes=sizes)
        yield Case(sizes=sizes, causal=True, order="random")
        yield Case(w=(16,), r=(3,), sizes=sizes, causal=True)
        yield Case(w=(10, None), r=(2, 5), mode="longnet", sizes=sizes, heads=(4, 2))
    for dtype in ("float32", "bfloat16", "float16"):
        yield Case(dtype=dtype, n=61, causal=True, layout="zigzag", heads=(4, 2), d=32)
        yield Case(dtype=dtype, n=61, d=24, scale=0.3)
        yield Case(dtype=dtype, n=61, w=(20,), r=(3,), mode="residue", heads=(4, 2))
        yield Case(dtype=dtype, n=61, w=(7, 30), r=(1, 3), mode="longnet", heads=(4, 2), causal=True)


CASES = tuple(_cases())
WORLDS = (1, 2, 3, 4)


class _SumOfGradients(torch.autograd.Function):
    "Identity whose gradient is added up over the ranks: what a data-parallel wrapper does for parameters."
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        if ctx.group is not None: dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Messages(TorchDispatchMode):
    "Counts what passes torch's own communication operators: c10d::recv_ and c10d::send, and everything else of c10d by name."
    def __init__(self):
        super().__init__()
        self.counts, self.others = dict(received=0, elements=0, bytes=0, sent=0, sent_bytes=0), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("c10d."):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else ()
            size = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
            if name.startswith("c10d.recv_"):
                self.counts["received"] += 1
                self.counts["elements"] += sum(x.numel() for x in tensors)
                self.counts["bytes"] += size
            elif name.startswith("c10d.send"):
                self.counts["sent"] += 1
                self.counts["sent_bytes"] += size
            else: self.others[name] = self.others.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    "Peak of the bytes that live tensors hold, as their storages come and go."
    def __init__(self, *known):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}
        for x in known: self._add(x)

    def _add(self, x):
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.seen: return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        def gone():
            self.live -= size
            del self.seen[key]
        self.seen[key] = weakref.finalize(storage, gone)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._add, result)
        return result


def multiset_oracle(masks):
    "The oracle of one softmax over several branches: each branch brings its own copy of the keys."
    original, yardstick, every = reference.masked_attention, reference._sdpa_yardstick, torch.cat(masks, -1)
    def copies(q, k, v): return (k, v) if k.shape[2] == every.shape[-1] else (k.repeat(1, 1, len(masks), 1), v.repeat(1, 1, len(masks), 1))
    return mock.patch.multiple(reference, masked_attention=lambda q, k, v, mask, scale=None, dropout_p=0.0: original(q, *copies(q, k, v), every, scale, dropout_p),
                               _sdpa_yardstick=lambda q, k, v, mask, scale: yardstick(q, *copies(q, k, v), every, scale))


def branch_masks(case, heads, order):
    "Dense masks of the branches, and the heads that run them, straight from the definition."
    count = len(case.w)
    edges = [0, *(sum(heads // count + (i < heads % count) for i in range(b + 1)) for b in range(count))]
    for b, (w, r) in enumerate(zip(case.w, case.r)):
        first, last = (edges[b], edges[b + 1]) if case.combine == "heads" else (0, heads)
        offsets = None
        if case.offsets or case.mode == "longnet": offsets = tuple((case.offsets or range(heads))[h] % r for h in range(first, last))
        mask = attention_mask(SegmentPattern.for_heads(case.n, last - first, w, r, case.mode, offsets), order=order, causal=case.causal)
        yield mask.expand(1, last - first, -1, -1)


def check(case, group, rank, world):
    generator = torch.Generator().manual_seed(case.n + 1000 * len(case.w))
    dtype = getattr(torch, case.dtype)
    heads, kv_heads = case.heads
    def rand(h): return torch.randn(2, case.n, h, case.d, dtype=torch.float64, generator=generator).transpose(1, 2).to(dtype) if case.strided else torch.randn(2, h, case.n, case.d, dtype=torch.float64, generator=generator).to(dtype)
    q, k, v = rand(heads), rand(kv_heads), rand(kv_heads)
    order = dict(none=lambda: None, random=lambda: torch.randperm(case.n, generator=generator), hilbert=lambda: curve_order(case.n))[case.order]()
    sizes = case.shard_sizes(world)
    places = shard_positions(sizes, rank, case.layout)
    if order is not None: places = order[places]
    plan = plan_ring(sizes, segment_lengths=case.w, dilation_rates=case.r, batch=2, heads=heads, kv_heads=kv_heads, head_dim=case.d, dtype=dtype, dilation_mode=case.mode, offsets=case.offsets,
                     combine=case.combine, causal=case.causal, ordered=order is not None, layout=case.layout)
    options = dict(group=group, dilation_mode=case.mode, causal=case.causal, order=order, layout=case.layout, scale=case.scale, overlap=case.overlap, return_lse=True)
    counted = []

    def attention(q, k, v):
        x = [_SumOfGradients.apply(t, group) for t in (q, k, v)]
        x = [shard_sequence(t, group, 2, order, case.layout) if case.sizes is None else t[:, :, places] for t in x]
        with Messages() as messages:
            if len(case.w) == 1: out, lse = ring_attention(*x, segment_size=case.w[0], dilation_rate=case.r[0], offsets=case.offsets, **options)
            else: out, lse = ring_dilated_attention(*x, case.w, case.r, combine=case.combine, offsets=case.offsets, **options)
        counted.append(messages.counts)
        return tuple(unshard_sequence(t, group, 2, order, case.layout) for t in (out, lse))

    masks = list(branch_masks(case, heads, order))
    arguments = dict(scale=case.scale, seed=case.n)
    with Messages() as everything:
        if case.combine == "heads" or len(masks) == 1: report = assert_matches_oracle(attention, q, k, v, torch.cat(masks, 1), **arguments)
        else:
            with multiset_oracle(masks): report = assert_matches_oracle(attention, q, k, v, torch.stack(masks).any(0), **arguments)
    traffic = plan.traffic(rank)
    found, unshard = counted[0], sum(1 for r, size in enumerate(sizes) if r != rank and size)
    forward = (traffic.messages, traffic.elements, traffic.bytes)
    if (found["received"], found["elements"], found["bytes"]) != forward: raise AssertionError(f"forward: received {found}, planned {forward}")
    backward = tuple(everything.counts[name] - found[name] for name in ("received", "elements", "bytes"))
    gathered = sum(size for r, size in enumerate(sizes) if r != rank) * 2 * heads
    expected = (traffic.backward_messages + 2 * unshard, traffic.backward_elements + gathered * (case.d + 1),
                traffic.backward_bytes + gathered * (case.d * dtype.itemsize + torch.promote_types(dtype, torch.float32).itemsize))
    if backward != expected: raise AssertionError(f"backward: received {backward}, planned {expected}")
    if all(plan.kind(b) == "local" for b in range(len(plan.branches))) and traffic != type(traffic)(0, 0, 0, 0, 0, 0): raise AssertionError("local branches must not communicate")
    return dict(report=str(report), received=found["elements"])


def numbers(results, rank, world):
    "All cases at all world sizes; the larger first, so that ranks which are done leave."
    groups = {p: dist.new_group(list(range(p)), timeout=timedelta(seconds=20)) for p in WORLDS}
    for p in sorted(WORLDS, reverse=True):
        if rank >= p: continue
        for case in CASES:
            with mock.patch.dict(ring_module._TURN_BYTES, {} if case.turn_bytes is None else dict(cpu=case.turn_bytes)): attempt(results, f"{p} {case}", check, case, groups[p], rank, p)


def memory(results, rank, world):
    "Peak bytes of live tensors, forward and backward, inputs and gradients included."
    def peak(group, size, heads, kv_heads, options, backward):
        n = 2048 // size
        inputs = [torch.randn(1, h, n, 64, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
        dout = torch.randn(1, heads, n, 64)
        ring_attention(*inputs, group=group, **options)  # once to agree
        with mock.patch.dict(ring_module._HEAD_ELEMENTS, cpu=1 << 15), mock.patch.dict(ring_module._TURN_BYTES, cpu=1 << 15), LiveBytes(*inputs, dout) as live: # head by head, as it is for longer shards
            if backward: torch.autograd.grad(ring_attention(*inputs, group=group, **options), inputs, dout)
            else:
                with torch.no_grad(): ring_attention(*inputs, group=group, **options)
        return dict(bytes=live.peak)

    groups = {p: dist.new_group(list(range(p))) for p in (1, 2, 4)}
    for p in (4, 2, 1):
        if rank >= p: continue
        for name, heads, options in (("dense", (8, 8), {}), ("dense, grouped queries", (8, 2), {}), ("segments inside", (8, 8), dict(segment_size=256, dilation_rate=2))):
            for backward in (False, True): attempt(results, f"{p} {name}, {'forward and backward' if backward else 'forward'}", peak, groups[p], p, *heads, options, backward)


def relaid(x, name):
    "The same values, lying in memory in another way."
    if name == "contiguous": return x
    if name == "last stride 2": return torch.stack([x, x.detach() + 1], -1).flatten(-2)[..., ::2]
    if name == "rows in steps": return torch.stack([x, x.detach() + 1], 3).flatten(2, 3)[:, :, ::2]
    if name == "an offset": return torch.cat([x.detach(), x], 2)[:, :, x.shape[2]:]
    order = [int(axis) for axis in name]
    return x.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])


LAYOUTS_IN_MEMORY = ("last stride 2", "rows in steps", "an offset", *("".join(map(str, order)) for order in permutations(range(4))))


def strides(results, rank, world):
    "Any strides of q, k, v and of the upstream gradients of out and LSE."
    calls = dict(dense={}, causal=dict(causal=True, layout="zigzag"), inside=dict(segment_size=3), across=dict(segment_size=10, dilation_rate=3),
                 both=dict(segment_lengths=(3, 20), dilation_rates=(1, 2)))

    def compare(group, options, dtype):
        function = ring_dilated_attention if "segment_lengths" in options else ring_attention
        generator = torch.Generator().manual_seed(rank)
        q, k, v, dout = (torch.randn(2, h, 6, 8, dtype=dtype, generator=generator) for h in (4, 2, 2, 4))
        dlse = torch.randn(2, 4, 6, generator=generator).to(torch.promote_types(dtype, torch.float32))

        def run(*names):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out, lse = function(*(relaid(x, name) for x, name in zip(leaves, names)), group=group, return_lse=True, **options)
            upstream = relaid(dout, names[3]), relaid(dlse[..., None].expand(-1, -1, -1, 2).contiguous(), names[4])[..., 0]
            return out, lse, *torch.autograd.grad((out, lse), leaves, upstream)

        limit = 1e-5 if dtype == torch.float32 else 0.06 # bfloat16: rounded in another order
        expected = run(*["contiguous"] * 5)
        names = LAYOUTS_IN_MEMORY
        for i in range(len(names)):
            for a, e in zip(run(*(names[(i + shift) % len(names)] for shift in range(5))), expected): torch.testing.assert_close(a, e, rtol=limit, atol=limit)

        found = [] # one head for all, and one number as the gradient of all
        for copy in (lambda x: x, lambda x: x.contiguous()):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            inputs = [copy(x[:, :1].expand_as(x)) for x in leaves]
            out, lse = function(*inputs, group=group, return_lse=True, **options)
            found.append((out, lse, *torch.autograd.grad((out, lse), leaves, (copy(dout[:, :, :1, :1].expand_as(dout)), copy(dlse[:, :1, :1].expand_as(dlse))))))
        for a, e in zip(*found): torch.testing.assert_close(a, e, rtol=limit, atol=limit)

    groups = {p: dist.new_group(list(range(p))) for p in (1, 2, 4)}
    for p in (4, 2, 1):
        if rank >= p: continue
        for name, options in calls.items():
            for dtype in (torch.float32, torch.bfloat16): attempt(results, f"{p} {name} {dtype}", compare, groups[p], options, dtype)


def torch_ring(results, rank, world):
    "PyTorch's own ring, made for GPUs, on the CPU's flash operators; contiguous, and balanced as our zigzag."
    from torch.distributed.tensor.experimental._context_parallel import (
        _attention as theirs,
    )

    def compare(group, size, causal, balanced):
        generator, layout, n = torch.Generator().manual_seed(1), "zigzag" if balanced else "contiguous", 32 * size
        whole = [torch.randn(2, 3, n, 16, dtype=torch.float64, generator=generator) for _ in range(4)]
        q, k, v, dout = (shard_sequence(x, group, 2, layout=layout).contiguous() for x in whole)
        with mock.patch.object(theirs._cp_options, "convert_to_f32", False), mock.patch.object(theirs._cp_options, "enable_load_balance", balanced):
            out, lse, *_ = theirs._templated_ring_attention(group, 2, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, q, k, v, is_causal=causal)
            grads = theirs._templated_ring_attention_backward(group, 2, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default, dout, "grad_out", q, k, v, out, lse,
                                                              is_causal=causal, dropout_p=0.0)[:3]
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        ours = ring_attention(*leaves, group=group, causal=causal, layout=layout, return_lse=True)
        ours = (*ours, *torch.autograd.grad(ours[0], leaves, dout))
        errors = [(a - b).abs().max().item() for a, b in zip(ours, (out, lse, *grads))]
        if max(errors) > 1e-12: raise AssertionError(errors)
        return dict(errors=errors)

    groups = {p: dist.new_group(list(range(p))) for p in (2, 3, 4)}
    for p in (4, 3, 2):
        if rank >= p: continue
        for causal, balanced in ((False, False), (True, False), (True, True)): attempt(results, f"{p} causal={causal} balanced={balanced}", compare, groups[p], p, causal, balanced)


class Layer(torch.nn.Module):
    "A small transformer layer; attention is a function of q, k, v (B, H, n, D)."
    def __init__(self, attention, dim=16, heads=2):
        super().__init__()
        self.attention, self.heads = attention, heads
        self.qkv, self.out, self.mlp = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim), torch.nn.Sequential(torch.nn.Linear(dim, 32), torch.nn.GELU(), torch.nn.Linear(32, dim))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def meshes(results, rank, world):
    "Batches on one dimension of a mesh, the sequence on the other, with DDP and FSDP2; gradients of the single process."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ring"))
    data, ring = mesh.get_local_rank("data"), mesh.get_local_rank("ring")
    generator = torch.Generator().manual_seed(2)
    x, target = (torch.randn(2, 24, 16, dtype=torch.float64, generator=generator) for _ in range(2))

    def model(attention):
        torch.manual_seed(3)
        return torch.nn.Sequential(*(Layer(attention) for _ in range(2))).double()

    def single(attention): # the whole batch and the whole sequence
        m = model(attention)
        loss = (m(x) - target).square().sum() / target.numel()
        loss.backward()
        return loss.detach(), [p.grad for p in m.parameters()]

    cases = {"dense": (lambda group: lambda q, k, v: ring_attention(q, k, v, group=group), lambda q, k, v: hilbert_attention(q, k, v, curve=None)),
             "exchange": (lambda group: lambda q, k, v: ring_attention(q, k, v, group=group, segment_size=8, dilation_rate=2, causal=True), lambda q, k, v: hilbert_attention(q, k, v, curve=None, segment_size=8, dilation_rate=2, causal=True)),
             "branches": (lambda group: lambda q, k, v: ring_dilated_attention(q, k, v, (4, 24), (1, 2), group=group, dilation_mode="residue", combine="heads"),
                          lambda q, k, v: torch.cat([hilbert_attention(*(t[:, b:b + 1] for t in (q, k, v)), curve=None, segment_size=w, dilation_rate=r) for b, (w, r) in enumerate(((4, 1), (24, 2)))], 1))}

    def run(name, kind):
        sharded, plain = cases[name]
        expected_loss, expected = single(plain)
        m = model(sharded(mesh["ring"]))
        mine, wanted = (shard_sequence(t[data:data + 1], mesh["ring"], 1) for t in (x, target))
        if kind == "DDP": # averages over all four ranks: over the batches as it should, and over the ring, where it should add
            m = torch.nn.parallel.DistributedDataParallel(m)
            loss = (m(mine) - wanted).square().sum() / target[:1].numel()
            (2 * loss).backward()
            found = [p.grad for p in m.parameters()]
        else:
            for layer in m: fully_shard(layer, mesh=mesh["data"])
            fully_shard(m, mesh=mesh["data"])
            loss = (m(mine) - wanted).square().sum() / target[:1].numel()
            loss.backward()
            for p in m.parameters(): dist.all_reduce(p.grad.to_local(), group=mesh.get_group("ring"))
            found = [p.grad.full_tensor() for p in m.parameters()]
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        errors = [(a - b).abs().max().item() for a, b in zip([loss / 2, *found], [expected_loss, *expected])]
        if max(errors) > 1e-12: raise AssertionError(errors)
        return dict(error=max(errors))

    for kind in ("DDP", "FSDP2"):
        for name in cases: attempt(results, f"{kind} {name}", run, name, kind)
    def wrong(): return outcome(lambda: ring_attention(*[torch.randn(1, 1, 4, 8)] * 3, group=mesh))
    attempt(results, "whole mesh", wrong)


def sharding(results, rank, world):
    "Gradients of shard_sequence and unshard_sequence, in both conventions."
    def round_trip(n, layout, ordered, grad):
        generator = torch.Generator().manual_seed(4)
        x, weights = torch.randn(2, n, 3, dtype=torch.float64, generator=generator, requires_grad=True), torch.randn(world, 2, n, 3, dtype=torch.float64, generator=generator)
        order = torch.randperm(n, generator=generator) if ordered else None
        shard = shard_sequence(x, None, 1, order, layout)
        whole = unshard_sequence(shard.square(), None, 1, order, layout, grad=grad)
        if not torch.equal(whole, x.square()): raise AssertionError("not what was sharded")
        mine = weights[0] if grad == "slice" else weights[rank]  # the same loss on every rank, or one part of it on each
        (whole * mine).sum().backward()
        total = x.grad.clone()
        dist.all_reduce(total)
        expected = 2 * x.detach() * (weights[0] if grad == "slice" else weights.sum(0))
        if (total - expected).abs().max() > 1e-13: raise AssertionError((total - expected).abs().max())
        outside = torch.ones(n, dtype=torch.bool)
        places = shard_positions(shard_sizes(n, world, layout), rank, layout)
        outside[places if order is None else order[places]] = False
        if x.grad[:, outside].any(): raise AssertionError("a gradient outside the shard")
    for n in (12, 13, 2):
        for layout in ("contiguous", "zigzag"):
            for ordered in (False, True):
                for grad in ("slice", "sum"): attempt(results, f"n={n} {layout} ordered={ordered} {grad}", round_trip, n, layout, ordered, grad)

    def varying(): # lengths change from batch to batch, also in ways that some ranks cannot see
        for n in (13, 14, 12, 16, 17, 13):
            x = torch.arange(n, dtype=torch.float32)[None]
            if not torch.equal(unshard_sequence(shard_sequence(x)), x): raise AssertionError(n)
    attempt(results, "lengths vary", varying)

    def agreements(): # two small all-gathers per call, and two more on the way back where ranks send
        counts = []
        for options in (dict(segment_size=8), dict(segment_size=32, dilation_rate=2), {}):
            x = [torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)]
            with Messages() as messages: out = ring_attention(*x, **options)
            with Messages() as back: out.sum().backward()
            counts.append([messages.others, back.others])
        return dict(counts=counts)
    attempt(results, "agreements", agreements)

    def twice(): # bit-identical, and the same when recomputed from a checkpoint
        x = [torch.randn(1, 4, 9, 16, requires_grad=True) for _ in range(3)]
        def call(*x): return ring_dilated_attention(*x, (8, 16, None), (1, 2, 1), dilation_mode="residue", return_lse=True)
        runs = []
        for function in (call, call, lambda *x: torch.utils.checkpoint.checkpoint(call, *x, use_reentrant=False)):
            out, lse = function(*x)
            runs.append((out, lse, *torch.autograd.grad((out.square().sum() + lse.sin().sum()), x)))
        for run in runs[1:]:
            if not all(torch.equal(a, b) for a, b in zip(run, runs[0])): raise AssertionError("two runs differ")
    attempt(results, "twice", twice)


if __name__ == "__main__": main(globals())
