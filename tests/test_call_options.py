"""What a call takes whatever its pattern: values of another width, and scores without a key."""
from dataclasses import dataclass, replace

import pytest
import torch
from cases import Inputs, in_triton
from cases import inputs as drawn
from hypothesis import given
from hypothesis import strategies as st
from sampling import examples
from torch._dynamo.testing import CompileCounterWithBackend
from transform_cases import DROPPING, HEADS, WIDTH

from hilbert_attn import explain_backend, hilbert_attention, merge_attention, ring_attention
from hilbert_attn.branched import DilatedAttention
from hilbert_attn.reference import Scores, masked_attention, with_sinks

each_function = pytest.mark.parametrize("name", DROPPING)
N = 48


def inputs(columns=WIDTH, dtype=torch.float64, n=N, **options):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, HEADS, n, WIDTH, dtype=dtype)
    v = torch.randn(2, HEADS, n, columns, dtype=dtype)
    return [x.clone().requires_grad_() for x in (q, k, v)]


@each_function
@pytest.mark.parametrize("columns", (5, 3 * WIDTH))
def test_values_of_another_width(name, columns):
    q, k, v = inputs(columns)
    out, lse = DROPPING[name](q, k, v, return_lse=True)
    parts = [DROPPING[name](q, k, x, return_lse=True)
             for x in v.split(WIDTH, -1) if x.shape[-1] == WIDTH]
    if not parts:  # narrower: zeros in the other columns
        wider = torch.nn.functional.pad(v, (0, WIDTH - columns))
        parts = [DROPPING[name](q, k, wider, return_lse=True)]
    expected = torch.cat([x for x, _ in parts], -1)[..., :columns]
    torch.testing.assert_close((out, lse), (expected, parts[0][1]))
    upstream = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, (q, k, v), upstream) for x in (out, expected))
    torch.testing.assert_close(found, wanted)


@dataclass
class OnFunction:
    "One of the functions, and what it is given."
    name: str
    n: int
    inputs: Inputs

    def mask(self):
        """How often each key counts, int (1, H, N, N): with scores of 0, weights are shares of the
        number that the log-sum-exp is the logarithm of."""
        q, k = torch.zeros(2, 1, self.inputs.heads, self.n, 1, dtype=torch.float64)
        v = torch.eye(self.n, dtype=torch.float64).expand(1, self.inputs.heads, -1, -1)
        shares, lse = DROPPING[self.name](q, k, v, backend="reference", return_lse=True)
        return (shares * lse.exp()[..., None]).round().long()

    def check(self, device="cpu", **more):
        def attention(q, k, v, **options): return DROPPING[self.name](q, k, v, **options, **more)
        self.inputs.check(attention, self.mask(), device)


@st.composite
def on_functions(draw, most=12, **limits) -> OnFunction:
    name, own = draw(st.sampled_from(list(DROPPING))), draw(drawn(**limits))
    if name == "by_heads" and own.heads == 1: own = replace(own, heads=2)
    return OnFunction(name, 4 * draw(st.integers(3, most)), own)


OPTIONS = dict(sinks=dict(sinks=(True,)), softcap=dict(scales=(Scores(0.3, 0.5), Scores(1.0, 4.0))))
each_option = pytest.mark.parametrize("option", OPTIONS)


@each_option
@examples(40, 300)
@given(data=st.data())
def test_options_equal_the_oracle(option, data): data.draw(on_functions(**OPTIONS[option])).check()


@each_option
@examples(4, 60)
@given(data=st.data())
def test_options_in_triton(option, data):
    case = data.draw(on_functions(most=6, **OPTIONS[option]))
    in_triton(lambda device: case.check(device, backend="triton"))


def test_values_of_another_width_in_a_layer():
    q, k, v = (x.transpose(1, 2) for x in inputs(5, torch.float32))
    out = DilatedAttention([16], [1])(q, k, v)
    assert out.shape == (2, N, HEADS, 5)


def test_where_values_must_be_as_wide():
    q, k, v = inputs(5, torch.float32)
    with pytest.raises(ValueError, match="k has shape .* and v .*: they must agree"):
        ring_attention(q, k, v)


def test_the_reason_speaks_of_columns():
    wide = explain_backend((1, 2, 64, 192), v=(1, 2, 64, 128))
    assert "128 columns of values, and 192 of queries and keys: zeros fill up" in str(wide)
    assert wide.flops == 4.0 * 192 * wide.pairs
    assert "columns" not in str(explain_backend((1, 2, 64, 192)))
    with pytest.raises(ValueError, match="they must agree in all but the last size"):
        explain_backend((1, 2, 64, 192), v=(1, 2, 63, 128))


def sinks(**options): return torch.linspace(-1, 2, HEADS, dtype=torch.float64, **options)


@each_function
def test_sinks(name):
    x, z = inputs(), sinks(requires_grad=True)
    out, lse = DROPPING[name](*x, return_lse=True)
    found, total = DROPPING[name](*x, sink_logits=z, return_lse=True)
    share = (z[:, None] - total).exp()  # of the weights that goes nowhere
    torch.testing.assert_close(found, out * (1 - share)[..., None])
    torch.testing.assert_close(total, torch.stack([lse, z[:, None].expand_as(lse)]).logsumexp(0))
    assert torch.equal(DROPPING[name](*x, sink_logits=z), found)


@each_function
def test_gradients_of_sinks(name):
    def attention(q, k, v, z): return DROPPING[name](q, k, v, sink_logits=z, return_lse=True)
    x = [*inputs(n=12), sinks(requires_grad=True)]
    assert torch.autograd.gradcheck(attention, x, fast_mode=True)


@each_function
def test_sinks_in_graphs_and_transforms(name):
    def attention(q, k, v, z): return DROPPING[name](q, k, v, sink_logits=z)
    def loss(*x): return attention(*x).sin().sum()
    x = [*inputs(), sinks(requires_grad=True)]
    expected, plain = torch.autograd.grad(loss(*x), x), [y.detach() for y in x]
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2, 3))(*plain), expected)
    several = torch.stack([plain[3], -2 * plain[3]])
    mapped = torch.vmap(lambda z: attention(*plain[:3], z))(several)
    torch.testing.assert_close(mapped[1], attention(*plain[:3], several[1]))
    if name not in ("decoder", "packed"): return
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for n in (N, 24, 72):
        x = [*inputs(n=n), x[3]]
        torch.testing.assert_close(
            *(torch.autograd.grad(run(*x).sin().sum(), x) for run in (compiled, attention)))
    assert counter.frame_count <= 2


BAD_SINKS = [
    (torch.zeros(3), r"sink_logits is torch.float32 \(3,\) .* \(H,\) = \(2,\)"),
    (torch.zeros(1, 2), r"sink_logits is torch.float32 \(1, 2\)"),
    (torch.zeros(2, dtype=torch.int64), "sink_logits is torch.int64"),
    (0.5, "sink_logits is float"),
]


@pytest.mark.parametrize("bad, message", BAD_SINKS)
@each_function
def test_bad_sinks(name, bad, message):
    with pytest.raises(ValueError, match=message): DROPPING[name](*inputs(), sink_logits=bad)


@pytest.mark.parametrize("backend", ("sdpa", "sdpa_mask", "reference", "triton"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_sinks_are_a_score_of_a_softmax(backend, dtype):
    if backend == "triton": pytest.importorskip("triton")
    q, k, v = inputs(dtype=dtype, n=24)
    z, seen = sinks().to(dtype), torch.arange(24)[None] >= 8  # the first segment has no key
    out, lse = hilbert_attention(
        q, k, v,
        curve=None,
        segment_size=8,
        key_mask=seen.expand(2, -1),
        sink_logits=z,
        backend=backend,
        return_lse=True)
    mask = (torch.arange(24)[:, None] // 8 == torch.arange(24) // 8) & seen
    scores = (q.double() @ k.double().mT * WIDTH ** -0.5).masked_fill(~mask, -torch.inf)
    scores = torch.cat([scores, z.double()[:, None, None].expand(2, HEADS, 24, 1)], -1)
    exact = scores.softmax(-1)[..., :-1] @ v.double()
    assert out.dtype == dtype and lse.dtype == torch.float32
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert not out[:, :, :8].any()
    gradients = torch.autograd.grad((out.float().sum() + lse.sum()), (q, k, v))
    assert all(x.isfinite().all() for x in gradients)


def test_sinks_of_rows_without_keys_have_gradients():
    out, lse = torch.zeros(1, 1, 2, 3), torch.tensor([[[-torch.inf, 0.5]]], requires_grad=True)
    for number in (0.3, -torch.inf):
        z = torch.tensor([number], requires_grad=True)
        found, total = with_sinks(out, lse, z)
        assert not found.isnan().any() and total[0, 0, 0] == number
        grads = torch.autograd.grad(total.sum(), (lse, z))
        assert all(x.isfinite().all() for x in grads) and grads[0][0, 0, 0] == 0
        if number == -torch.inf: assert grads[1] == 0  # of no sink, whatever comes from above


def test_sinks_are_what_a_merge_with_a_value_of_zero_is():
    q, k, v = inputs(n=9)
    z = sinks()
    out, lse = masked_attention(q, k, v, torch.ones(9, 9, dtype=torch.bool))
    nothing = torch.zeros_like(out), z[:, None].expand_as(lse)
    merged = merge_attention(*zip((out, lse), nothing))
    torch.testing.assert_close(with_sinks(out, lse, z), merged)


@each_function
def test_a_cap_on_every_backend(name):
    "Written from its formula where everybody attends everybody; elsewhere backends agree."
    q, k, v = inputs(n=24)
    how = dict(softcap=0.4, return_lse=True)
    found, exact = (DROPPING[name](q, k, v, **how, backend=x) for x in ("sdpa", "reference"))
    torch.testing.assert_close(found, exact)
    upstream = [torch.randn_like(x) for x in found]
    found, exact = (torch.autograd.grad(x, (q, k, v), upstream) for x in (found, exact))
    torch.testing.assert_close(found, exact)
    if name != "dense": return
    scores = 0.4 * torch.tanh(q @ k.mT * WIDTH ** -0.5 / 0.4)
    torch.testing.assert_close(DROPPING[name](q, k, v, softcap=0.4), scores.softmax(-1) @ v)


@each_function
def test_gradients_within_a_cap(name):
    def attention(q, k, v): return DROPPING[name](q, k, v, softcap=0.4, return_lse=True)
    assert torch.autograd.gradcheck(attention, inputs(n=12), fast_mode=True)


@each_function
def test_a_cap_in_graphs_and_transforms(name):
    def attention(q, k, v): return DROPPING[name](q, k, v, softcap=0.4)
    x = inputs(n=N)
    expected = torch.autograd.grad(attention(*x).sin().sum(), x)
    transformed = torch.func.grad(lambda *x: attention(*x).sin().sum(), (0, 1, 2))
    torch.testing.assert_close(transformed(*(y.detach() for y in x)), expected)
    if name not in ("hilbert", "longnet", "neighborhood", "blocks", "cross"): return
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), attention(*x))


def test_a_cap_with_sinks_and_values_of_another_width():
    q, k, v = inputs(5)
    out = hilbert_attention(q, k, v, softcap=0.4, sink_logits=sinks())
    own = masked_attention(q, k, v, torch.ones(N, N, dtype=torch.bool), Scores(WIDTH ** -0.5, 0.4))
    torch.testing.assert_close(out, with_sinks(*own, sinks())[0])


def test_dropout_within_a_cap():
    "v = I makes the output the matrix of weights."
    q, k, _ = inputs(n=WIDTH)
    eye = torch.eye(WIDTH, dtype=torch.float64).expand(2, HEADS, -1, -1).requires_grad_()
    torch.manual_seed(3)
    weights = hilbert_attention(q, k, eye, softcap=0.4, dropout_p=0.5)
    whole = hilbert_attention(q, k, eye, softcap=0.4)
    kept = weights != 0
    torch.testing.assert_close(weights, whole * kept / 0.5)
    upstream = torch.randn_like(weights)
    found = torch.autograd.grad(weights, (q, k, eye), upstream)
    # v is I here, so its gradient goes through the kept weights alone
    scores = 0.4 * torch.tanh(q @ k.mT * WIDTH ** -0.5 / 0.4)
    plain = (scores.softmax(-1) * kept / 0.5) @ eye
    torch.testing.assert_close(found, torch.autograd.grad(plain, (q, k, eye), upstream))


@pytest.mark.parametrize("bad", (0, -1.0, float("nan"), float("inf"), "2", True))
@each_function
def test_bad_caps(name, bad):
    with pytest.raises(ValueError, match="softcap="): DROPPING[name](*inputs(), softcap=bad)
