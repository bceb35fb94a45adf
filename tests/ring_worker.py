"""What the processes of test_ring.py run, but for meshes (ring_mesh_worker.py) and faults."""
import os
import weakref
from datetime import timedelta
from itertools import permutations
from unittest import mock

import torch
import torch._dynamo  # dispatch modes need it: imported once, for all ranks
import torch.distributed as dist
from ring_cases import REST, SAMPLE, WORLDS, Case, attended
from ring_processes import attempt, main
from torch.distributed.tensor.experimental._context_parallel import _attention as theirs
from torch.utils._python_dispatch import TorchDispatchMode

from hilbert_attn import ring, ring_blocks, ring_exchange, ring_plan
from hilbert_attn.reference import assert_matches_oracle
from hilbert_attn.ring import ring_attention, ring_dilated_attention
from hilbert_attn.ring_exchange import shard_sequence, unshard_sequence


class _SumOfGradients(torch.autograd.Function):
    "Identity whose gradient is added up over the ranks, as a data-parallel wrapper does it."
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
    "Counts what passes torch's own communication operators."
    def __init__(self):
        super().__init__()
        self.received, self.elements, self.bytes = 0, 0, 0
        self.others = {} # operators of c10d that are no message, by name

    @property
    def counts(self) -> tuple[int, int, int]: return self.received, self.elements, self.bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "c10d": return function(*args, **(kwargs or {}))
        name = str(function)
        if name.startswith("c10d.recv_"):
            self.received += 1
            self.elements += sum(x.numel() for x in args[0])
            self.bytes += sum(x.nbytes for x in args[0])
        elif not name.startswith("c10d.send"):
            self.others[name] = self.others.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def call_of(case: Case, group, order, world: int, rank: int):
    "The call as a function of the whole sequence; and the messages of its own part."
    sent = []

    def shard(x):
        x = _SumOfGradients.apply(x, group)
        if case.sizes is None: return shard_sequence(x, group, 2, order, case.layout)
        places = case.places(world, rank)
        return x[:, :, places if order is None else order[places]]

    def attention(q, k, v):
        shards = [shard(x) for x in (q, k, v)]
        options = dict(group=group, order=order, **case.options())
        with Messages() as messages:
            if case.several:
                options["combine"] = case.combine
                results = ring_dilated_attention(*shards, case.w, case.r, **options)
            else:
                pattern = dict(segment_size=case.w[0], dilation_rate=case.r[0])
                results = ring_attention(*shards, **pattern, **options)
        sent.append(messages.counts)
        return tuple(unshard_sequence(x, group, 2, order, case.layout) for x in results)
    return attention, sent


def expected_backward(case: Case, traffic, world: int, rank: int) -> tuple[int, int, int]:
    "What the plan says, and what putting output and LSE together adds."
    sizes, heads = case.shard_sizes(world), case.heads[0]
    others = [size for r, size in enumerate(sizes) if r != rank]
    rows, width = 2 * heads * sum(others), case.torch_dtype.itemsize
    lse = torch.promote_types(case.torch_dtype, torch.float32).itemsize
    return (traffic.backward_messages + 2 * len(list(filter(None, others))),
            traffic.backward_elements + rows * (case.d + 1),
            traffic.backward_bytes + rows * (case.d * width + lse))


def check(case: Case, group, rank: int, world: int):
    generator = torch.Generator().manual_seed(case.n + 1000 * len(case.w))
    q, k, v = (case.tensor(h, generator) for h in (case.heads[0], case.heads[1], case.heads[1]))
    order = case.make_order(generator)
    attention, sent = call_of(case, group, order, world, rank)
    mask = attended(case, order)
    with Messages() as everything:
        report = assert_matches_oracle(attention, q, k, v, mask, scale=case.scale, seed=case.n)
    plan = case.plan(world)
    traffic = plan.traffic(rank)
    planned = traffic.messages, traffic.elements, traffic.bytes
    assert sent[0] == planned, f"forward: received {sent[0]}, planned {planned}"
    back = tuple(a - b for a, b in zip(everything.counts, sent[0]))
    planned = expected_backward(case, traffic, world, rank)
    assert back == planned, f"backward: received {back}, planned {planned}"
    if all(plan.kind(b) == "local" for b in range(len(plan.branches))):
        assert traffic == type(traffic)(), "local branches must not communicate"
    return dict(report=str(report), received=sent[0][1])


def _numbers(results, rank, cases):
    "Cases at all world sizes; the larger first, so that ranks which are done leave."
    timeout = timedelta(seconds=20)
    groups = {world: dist.new_group(list(range(world)), timeout=timeout) for world in WORLDS}
    for world in sorted(WORLDS, reverse=True):
        if rank >= world: continue
        for case in cases:
            with mock.patch.dict(ring_plan.TURN_BYTES, case.turns):
                attempt(results, f"{world} {case}", check, case, groups[world], rank, world)


def numbers(results, rank, world): _numbers(results, rank, SAMPLE)


def rest(results, rank, world): _numbers(results, rank, REST)


def relaid(x: torch.Tensor, name: str) -> torch.Tensor:
    "The same values, lying in memory in another way."
    if name == "as it is": return x
    twice = [x, x.detach() + 1]
    if name == "last stride 2": return torch.stack(twice, -1).flatten(-2)[..., ::2]
    if name == "rows in steps": return torch.stack(twice, 3).flatten(2, 3)[:, :, ::2]
    if name == "an offset": return torch.cat(twice[::-1], 2)[:, :, x.shape[2]:]
    order = [int(axis) for axis in name]
    return x.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])


STEP = 1 if os.environ.get("FULL") == "1" else 4
RELAID = ["last stride 2", "rows in steps", "an offset"]
RELAID += ["".join(map(str, order)) for order in permutations(range(4))]


def relaid_alike(rank, attention, group, options, dtype):
    "Layouts of q, k, v and of the upstream gradients change nothing."
    generator = torch.Generator().manual_seed(rank)
    shapes = [(2, h, 6, 8) for h in (4, 2, 2, 4)]
    *qkv, dout = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    dlse = torch.randn(2, 4, 6, generator=generator)
    limit = 1e-5 if dtype == torch.float32 else 0.06  # bfloat16: rounded in another order

    def run(change, upstream):
        leaves = [x.clone().requires_grad_() for x in qkv]
        inputs = [change(x, i) for i, x in enumerate(leaves)]
        results = attention(*inputs, group=group, return_lse=True, **options)
        return *results, *torch.autograd.grad(results, leaves, upstream)

    def alike(found, expected):
        for a, e in zip(found, expected):
            torch.testing.assert_close(a, e, rtol=limit, atol=limit)

    plain = run(lambda x, i: x, (dout, dlse))
    wide = dlse[..., None].expand(-1, -1, -1, 2).contiguous()
    for i in range(0, len(RELAID), STEP):
        names = [RELAID[(i + shift) % len(RELAID)] for shift in range(5)]
        upstream = relaid(dout, names[3]), relaid(wide, names[4])[..., 0]
        alike(run(lambda x, i, names=names: relaid(x, names[i]), upstream), plain)
    spread_alike(run, alike, (dout, dlse))


def spread_alike(run, alike, upstream):
    "One head for all, and one row of the upstream gradients."
    def spread(x, i): return x[:, :1].expand_as(x)
    def copied(x, i): return spread(x, i).contiguous()
    one_row = [x[:, :, :1].expand_as(x) for x in upstream]
    alike(run(spread, one_row), run(copied, [x.contiguous() for x in one_row]))


CALLS = dict(
    dense=(ring_attention, {}),
    causal=(ring_attention, dict(causal=True, layout="zigzag")),
    inside=(ring_attention, dict(segment_size=3)),
    across=(ring_attention, dict(segment_size=10, dilation_rate=3)),
    both=(ring_dilated_attention, dict(segment_lengths=(3, 20), dilation_rates=(1, 2))))


def strides(results, rank, world):
    "Any strides of q, k, v and of the upstream gradients of out and LSE."
    groups = {p: dist.new_group(list(range(p))) for p in (1, 2, 4)}
    for p in (4, 2, 1):
        if rank >= p: continue
        for name, (attention, options) in CALLS.items():
            for dtype in (torch.float32, torch.bfloat16):
                how = rank, attention, groups[p], options, dtype
                attempt(results, f"{p} {name} {dtype}", relaid_alike, *how)


def in_parts(rank, attention, options):
    "Gradients of some of q, k and v are those of all; and a graph that is kept gives them twice."
    generator = torch.Generator().manual_seed(rank)
    q, k, v, dout = (torch.randn(1, h, 6, 8, generator=generator) for h in (4, 2, 2, 4))

    def grads(learned, times=1):
        x = dict(zip("qkv", (y.clone() for y in (q, k, v))))
        leaves = [x[name].requires_grad_() for name in learned]
        out = attention(*x.values(), **options)
        for _ in range(times):
            found = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            yield dict(zip(learned, found))

    first, again = grads("qkv", 2)
    for found in (again, *(part for some in PARTS for part in grads(some))):
        for name, grad in found.items(): assert torch.equal(grad, first[name]), (*found, name)


PARTS = "q", "k", "v", "qk", "qv", "kv"


def parts(results, rank, world):
    for name, call in CALLS.items(): attempt(results, name, in_parts, rank, *call)


class LiveBytes(TorchDispatchMode):
    "Peak of the bytes that live tensors hold, as their storages come and go."
    def __init__(self, *known):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}
        for x in known: self._add(x)

    def _add(self, x):
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen: return
        self.live += size
        self.peak = max(self.peak, self.live)
        self.seen[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self.live -= size
        del self.seen[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._add, result)
        return result


def memory(results, rank, world):
    "Peak bytes of live tensors, forward and backward, inputs and gradients included."
    head_by_head = [mock.patch.dict(sizes, cpu=1 << 15) # as it is for longer shards
                    for sizes in (ring_blocks.HEAD_ELEMENTS, ring_plan.TURN_BYTES)]

    def peak(group, size, heads, kv_heads, options, backward):
        n = 2048 // size
        inputs = [torch.randn(1, h, n, 64, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
        dout = torch.randn(1, heads, n, 64)
        def call(): return ring_attention(*inputs, group=group, **options)
        call()
        with head_by_head[0], head_by_head[1], LiveBytes(*inputs, dout) as live:
            if backward: torch.autograd.grad(call(), inputs, dout)
            else:
                with torch.no_grad(): call()
        return dict(bytes=live.peak)

    inside = dict(segment_size=256, dilation_rate=2)
    calls = {"dense": (8, 8, {}), "dense, grouped queries": (8, 2, {}),
             "segments inside": (8, 8, inside)}
    groups = {p: dist.new_group(list(range(p))) for p in (1, 2, 4)}
    for p in (4, 2, 1):
        if rank >= p: continue
        for name, call in calls.items():
            for direction in ("forward", "forward and backward"):
                both = direction != "forward"
                attempt(results, f"{p} {name}, {direction}", peak, groups[p], p, *call, both)


def way_back(learned: str) -> dict:
    "What a rank does on the way back, in order; ranks 0 and 3 have segments of their own."
    inputs = {name: torch.randn(1, 2, 12, 8, requires_grad=name in learned) for name in "qkv"}
    happened, inside, agree = [], ring._inside, ring_exchange.agree

    def watched(call, branches, part, q, k, v):
        kv = k if "k" in learned else v
        kv.register_hook(lambda grad: happened.append("own segments"))
        return inside(call, branches, part, q, k, v)

    def noted(group, what, common, *rest):
        if what.endswith(", backward"): happened.append(common["stage"])
        return agree(group, what, common, *rest)

    with mock.patch.object(ring, "_inside", watched):
        out = ring_attention(*inputs.values(), segment_size=10)
    with mock.patch.object(ring_exchange, "agree", lambda *a, error=None: noted(*a, 0, error)):
        out.sum().backward()
    learns = [name for name, x in inputs.items() if x.grad is not None]
    return dict(happened=happened, learns="".join(learns))


def leaving(results, rank, world):
    for learned in ("qkv", "k", "qv"): attempt(results, learned, way_back, learned)


def run_theirs(group, q, k, v, dout, causal, balanced):
    "PyTorch's own ring, made for GPUs, on the CPU's flash operators: out, lse, dq, dk, dv."
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    def set_option(name, value): return mock.patch.object(theirs._cp_options, name, value)

    with set_option("convert_to_f32", False), set_option("enable_load_balance", balanced):
        forward = theirs._templated_ring_attention
        out, lse, *_ = forward(group, 2, flash, q, k, v, is_causal=causal)
        backward = theirs._templated_ring_attention_backward
        results = backward(group, 2, flash_backward, dout, "grad_out", q, k, v, out, lse,
                           is_causal=causal, dropout_p=0.0)
    return out, lse, *results[:3]


def as_torch_ring(group, size, causal, balanced):
    generator = torch.Generator().manual_seed(1)
    layout = "zigzag" if balanced else "contiguous"
    shape = (2, 3, 32 * size, 16)
    whole = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(4)]
    *mine, dout = (shard_sequence(x, group, 2, layout=layout).contiguous() for x in whole)
    expected = run_theirs(group, *mine, dout, causal, balanced)
    leaves = [x.clone().requires_grad_() for x in mine]
    options = dict(group=group, causal=causal, layout=layout, return_lse=True)
    out, lse = ring_attention(*leaves, **options)
    found = out, lse, *torch.autograd.grad(out, leaves, dout)
    errors = [(a - b).abs().max().item() for a, b in zip(found, expected)]
    assert max(errors) < 1e-12, errors


def torch_ring(results, rank, world):
    "The same as PyTorch's own ring; balanced as our zigzag."
    groups = {p: dist.new_group(list(range(p))) for p in (2, 3, 4)}
    for p in (4, 3, 2):
        if rank >= p: continue
        for way in ((False, False), (True, False), (True, True)):
            name = f"{p} causal={way[0]} balanced={way[1]}"
            attempt(results, name, as_torch_ring, groups[p], p, *way)


if __name__ == "__main__": main(globals())
