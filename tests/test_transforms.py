"""Every public function and layer under `torch.func`, in graphs of any length, and without data."""
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from sampling import FULL, sampled
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode
from transform_cases import (
    BRANCHES,
    DROPPING,
    FUNCTIONS,
    HEADS,
    LAYERS,
    WIDTH,
    function_case,
    layer_case,
)

import hilbert_attn as ha
from hilbert_attn.curves import _orders
from hilbert_attn.integrations.caches import _keys_of_last
from hilbert_attn.patterns import Progression
from hilbert_attn.ring_plan import shard_positions

LENGTHS = (96, 24, 32, 72, 136, 160, 40, 264, 208, 320)
each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_length = pytest.mark.parametrize("n", (264, 12))  # the policy has a row for short ones


def inputs(n, dtype=torch.float32, **options):
    torch.manual_seed(n)
    return [torch.randn(2, HEADS, n, WIDTH, dtype=dtype, **options) for _ in range(3)]


def loss_of(function):
    return lambda *x: function(*x).square().sum()


def gradients(function, x, **options):
    leaves = [y.detach().clone().requires_grad_() for y in x]
    return torch.autograd.grad(loss_of(function)(*leaves), leaves, **options)


def close(found, expected): torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@each_function
@each_length
def test_gradients(name, n):
    f, x = FUNCTIONS[name], inputs(n)
    loss, expected = loss_of(f), gradients(f, x)
    close(grad(loss, (0, 1, 2))(*x), expected)
    close(vjp(loss, *x)[1](torch.tensor(1.0)), expected)
    two = jacrev(lambda *x: torch.stack([loss(*x), 2 * loss(*x)]), (0, 1, 2))(*x)
    close([row[0] for row in two], list(expected))
    close([row[1] for row in two], [2 * row for row in expected])


@pytest.mark.parametrize("name", [x for x in LAYERS if "checkpoint" not in x])
def test_gradients_of_layers(name):
    module, make = layer_case(name)
    def run(*x):
        out = module(*x)
        return out[0] if isinstance(out, tuple) else out
    x = make(40)
    close(grad(loss_of(run), tuple(range(len(x))))(*x), gradients(run, x))


@pytest.mark.parametrize("name", DROPPING)
def test_outputs_may_be_written_into(name):
    q, k, v = inputs(96, requires_grad=True)
    out, lse = DROPPING[name](q, k, v, backend="sdpa", return_lse=True)
    expected = out + 1, lse - 1
    close((out.add_(1), lse.sub_(1)), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case, name", [
    *((function_case, name) for name in FUNCTIONS), *((layer_case, name) for name in LAYERS)])
def test_jit_trace_is_refused(case, name):
    module, make = case(name)
    with pytest.raises(RuntimeError, match="use torch.export.export"):
        torch.jit.trace(module, tuple(make(96)), check_trace=False)


@each_function
@each_length
def test_vmap(name, n):
    f, x = FUNCTIONS[name], inputs(n)
    several = [torch.stack([y, y.flip(0), 2 * y]) for y in x]
    close(vmap(f)(*several), torch.stack([f(*one) for one in zip(*several)]))
    def one(*x): return loss_of(f)(*(y[None] for y in x))
    close(vmap(grad(one, (0, 1, 2)))(*x), gradients(f, x))


@each_function
@each_length
def test_forward_derivatives(name, n):
    f, (q, k, v), step = FUNCTIONS[name], inputs(n, torch.float64), 1e-6
    tangent = torch.randn_like(q)
    found = jvp(lambda q: f(q, k, v), (q,), (tangent,))[1]
    there, back = (f(q + s * tangent, k, v) for s in (step, -step))
    torch.testing.assert_close(found, (there - back) / (2 * step), rtol=1e-6, atol=1e-6)


@each_function
@each_length
def test_second_derivatives_are_refused(name, n):
    f, x = FUNCTIONS[name], [y.requires_grad_() for y in inputs(n)]
    first, *_ = torch.autograd.grad(loss_of(f)(*x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again|is not implemented"):
        first.sum().backward()


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_the_same_in_the_backward(name):
    def seeded(*x):
        torch.manual_seed(1)
        return DROPPING[name](*x, dropout_p=0.3, backend="sdpa")
    x = inputs(36, torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, x, fast_mode=True)
    assert (seeded(*x) - DROPPING[name](*x)).abs().max() > 0.01


@pytest.mark.parametrize("backend", ("sdpa", "sdpa_mask", "reference"))
def test_nearly_all_is_dropped(backend):
    "A probability that rounds to 1 in 32 bits is not taken for 0."
    out = FUNCTIONS["hilbert"](*inputs(96), dropout_p=1 - 1e-12, backend=backend)
    assert not out.any()


def test_dropout_and_the_gradient_of_the_lse():
    def seeded(*x):
        torch.manual_seed(1)
        return DROPPING["hilbert"](*x, dropout_p=0.3, return_lse=True, backend="sdpa")
    x = inputs(36, torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, x, fast_mode=True)


def dropped(q, k, v): return ha.hilbert_attention(q, k, v, segment_size=16, dropout_p=0.5)


def test_dropout_under_vmap():
    x = [y[:, None].expand(-1, 3, -1, -1, -1) for y in inputs(96)]
    many = vmap(dropped, in_dims=1, randomness="different")(*x)
    assert not any(torch.equal(many[0], other) for other in many[1:])
    with pytest.raises(ValueError, match="use randomness='different'"):
        vmap(dropped, in_dims=1, randomness="same")(*x)
    with pytest.raises(RuntimeError, match="randomness"): vmap(dropped, in_dims=1)(*x)
    def one(q, k, v): return dropped(q[None], k[None], v[None]).square().sum()
    found = vmap(grad(one), randomness="different")(*inputs(96))
    assert found.isfinite().all() and found.abs().max() > 0


@each_function
@each_length
def test_without_data(name, n):
    f = FUNCTIONS[name]
    with torch.device("meta"):
        for dtype in (torch.float32, torch.bfloat16):
            x = inputs(n, dtype, requires_grad=True)
            out = f(*x)
            assert out.is_meta and (out.shape, out.dtype) == (x[0].shape, dtype)
            assert [g.shape for g in gradients(f, x)] == [y.shape for y in x]
    x = inputs(n)
    expected = f(*x)
    torch.set_default_device("meta")
    try: found = f(*x)
    finally: torch.set_default_device(None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("plan", (
    lambda: ha.curve_order((4, 4, 4)), lambda: ha.curve_order((2, 2, 2), "hilbert-trans"),
    lambda: shard_positions([3, 5], 1), lambda: Progression(1, 2, 3).positions(),
    lambda: ha.shard_sequence(ha.curve_order(8), dim=0, order=ha.curve_order(8)),
    lambda: ha.HilbertSettings(4).counts(16, 2),
    lambda: _keys_of_last(ha.HilbertSettings(4), 3, 16, 2)[1]))
def test_plans_lie_on_the_cpu_whatever_is_the_default(plan):
    expected = plan()
    _orders.clear()
    with torch.device("meta"): assert torch.equal(plan(), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_data(name):
    with torch.device("meta"):
        module, make = layer_case(name)
        x = make(96)
        out = module(*x)
    out = out[0] if isinstance(out, tuple) else out
    assert out.is_meta and out.shape == x[0].shape


COUNTED = [name for name in DROPPING if name not in ("causal", "causal_blocks", "longnet")]


@pytest.mark.parametrize("n", (80, 40))
@pytest.mark.parametrize("name", COUNTED)
def test_flops_of_attended_pairs(name, n):
    "Those with a weight, where a row of values says which key it is."
    torch.manual_seed(0)
    q, k = (torch.randn(2, HEADS, n, n, requires_grad=True) for _ in range(2))
    v = torch.eye(n).expand(q.shape).clone().requires_grad_()
    with FlopCounterMode(display=False) as forward: weights = FUNCTIONS[name](q, k, v)
    with FlopCounterMode(display=False) as backward: weights.sum().backward()
    pairs = int((weights > 0).sum())
    counts = forward.get_total_flops(), backward.get_total_flops()
    assert counts == (4 * n * pairs, 10 * n * pairs)


def test_flops_of_several_branches():
    with FlopCounterMode(display=False) as counter: FUNCTIONS["longnet"](*inputs(96))
    pattern = ha.DilatedPattern.for_heads(96, HEADS, *BRANCHES.values())
    assert counter.get_total_flops() == 4 * WIDTH * 2 * pattern.pairs()


def compiled_alike(module, make, lengths=LENGTHS, dynamic=None):
    "Forward and backward of a graph; how often it was compiled."
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic)

    def results(run, x):
        torch.manual_seed(0)  # the same draws
        out = run(*x)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.square().sum(), x)]

    with ha.set_backend("sdpa"):  # a graph has no row for short sequences
        for n in lengths:
            x = make(n, requires_grad=True)
            close(results(compiled, x), results(module, x))
    return counter.frame_count


def cases_of(names, several): return sampled([(x, p) for x in names for p in (0.0, 0.3)], several)


@pytest.mark.parametrize("name, dropout", [
    *cases_of(DROPPING, [("longnet", 0.3), ("blocks", 0.0), ("tiles", 0.0), ("window", 0.0)]),
    *sampled([(x, 0.0) for x in FUNCTIONS if x not in DROPPING], [("ring_branches", 0.0)])])
def test_functions_compile_twice_at_most(name, dropout):
    assert compiled_alike(*function_case(name, dropout)) <= 2


@pytest.mark.parametrize("setting", ("scale", "softcap"))
def test_settings_that_are_symbols(setting):
    "Numbers of a call are constants of a graph, also where all numbers are left open."
    torch.compiler.reset()
    def attend(x, value): return FUNCTIONS["hilbert"](*x, **{setting: value})
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    x = inputs(72)
    for value in (0.25, 0.5, 3.0): close(compiled(x, value), attend(x, value))


def test_heads_that_are_symbols_are_dealt_out():
    layer = ha.DilatedAttention([16, 2048], [1, 2], combine="heads")
    for module, make in (function_case("by_heads"), (layer, layer_case("DilatedAttention")[1])):
        compiled_alike(module, make, (72,), dynamic=True)


def test_a_temperature_is_a_tensor():
    "Then one graph serves all of its values, and it has a gradient."
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    def attend(q, k, v, t): return FUNCTIONS["hilbert"](q * t, k, v, scale=1.0)
    compiled, x = torch.compile(attend, fullgraph=True, backend=counter), inputs(72)
    for step in range(10):
        t = torch.tensor(0.1 + 0.05 * step, requires_grad=True)
        out = compiled(*x, t)
        close(out, FUNCTIONS["hilbert"](*x, scale=t.item()))
        assert torch.autograd.grad(out.sum(), t)[0] != 0
    assert counter.frame_count == 1


WITH_DROPOUT = [name for name, (*_, drops) in LAYERS.items() if drops]


@pytest.mark.parametrize("name, dropout", [
    *sampled([(x, 0.0) for x in LAYERS], [("BlockSparseAttention", 0.0)]),
    *sampled([(x, 0.3) for x in WITH_DROPOUT], [("core", 0.3), ("core, plain", 0.3)])])
def test_layers_compile_twice_at_most(name, dropout):
    assert compiled_alike(*layer_case(name, dropout)) <= 2


IN_A_NEW_PROCESS = """
import sys, torch, hilbert_attn
for path in sys.argv[1:]:
    x, expected = torch.load(path + ".pt")
    found = torch.export.load(path + ".pt2").module()(*x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
"""
SOME_EXPORTED = [(function_case, "longnet", 2), (function_case, "points", 2),
                 (function_case, "window", 2), (function_case, "ring_branches", 2),
                 (layer_case, "BlockSparseAttention", 1)]
ALL_EXPORTED = [*((function_case, name, 2) for name in FUNCTIONS),
                *((layer_case, name, 1) for name in LAYERS)]
EXPORTED = ALL_EXPORTED if FULL else SOME_EXPORTED


def test_exported_with_any_length(tmp_path):
    rows = torch.export.Dim("rows", min=5, max=1000)  # the grid has four columns
    paths = [str(tmp_path / str(i)) for i in range(len(EXPORTED))]
    for (case, name, dim), path in zip(EXPORTED, paths):
        module, make = case(name)
        shapes = tuple({dim: 4 * rows} for _ in make(96))
        program = torch.export.export(module.eval(), tuple(make(96)), dynamic_shapes=shapes)
        torch.export.save(program, path + ".pt2")
        x = make(200)
        torch.save((x, module(*x)), path + ".pt")
    subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, *paths], check=True)
