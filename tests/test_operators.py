"""The operator helper: layouts, transforms, compilation and refusals, on the plainest engine."""
from itertools import permutations

import pytest
import torch
import torch._dynamo.testing
from torch.func import grad, jacrev, vjp, vmap

from hilbert_attn.operators import AttentionOperator, in_forward_mode

SHAPE = (2, 3, 5, 4)  # (B, H, N, D)


def scores_of(q, k, key_mask, scale):
    scores = q @ k.mT * scale
    return scores if key_mask is None else scores.masked_fill(~key_mask[:, None, None], -torch.inf)


def forward(q, k, v, order, key_mask, scale):
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "rows do not lie in one piece"
    scores = scores_of(q, k, key_mask, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


def backward(dout, dlse, q, k, v, out, lse, order, key_mask, scale):
    assert all(x.stride(-1) == 1 for x in (dout, q, k, v, out)), "rows do not lie in one piece"
    p = (scores_of(q, k, key_mask, scale) - lse[..., None]).exp()
    delta = (out * dout).sum(-1) - (0 if dlse is None else dlse)
    ds = p * (dout @ v.mT - delta[..., None])
    return ds @ k * scale, ds.mT @ q * scale, p.mT @ dout


dense = AttentionOperator("test_dense", forward, backward, ["order", "key_mask"], "float scale")


def attention(q, k, v, mask=None): return dense(q, k, v, None, mask, 0.5)


def agree(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected): torch.testing.assert_close(a, b)


def random(*shape): return torch.randn(shape, dtype=torch.float64)


def plain(q, k, v, mask=None):
    scores = scores_of(q, k, mask, 0.5)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(random(*SHAPE) for _ in range(3))


@pytest.fixture
def mask():
    return torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def loss(attend, mask=None):
    def value(q, k, v):
        out, lse = attend(q, k, v, mask)
        return (out.sin() * 2).sum() + lse.square().sum()
    return value


@pytest.mark.parametrize("axes", list(permutations(range(4))))
def test_every_layout_of_inputs_and_upstream_gradients(axes, qkv):
    def laid_out(x):
        inverse = [axes.index(axis) for axis in range(4)]
        return x.permute(axes).contiguous().permute(inverse)
    leaves = [laid_out(x).requires_grad_() for x in qkv]
    out, lse = attention(*leaves)
    upstream = [laid_out(random(*SHAPE)), random(*SHAPE[:3])]
    expected = torch.autograd.grad(plain(*leaves), leaves, upstream)
    agree(torch.autograd.grad((out, lse), leaves, upstream), expected)


def test_expanded_upstream_gradient(qkv):
    leaves = [x.requires_grad_() for x in qkv]
    found = torch.autograd.grad(attention(*leaves)[0].sum(), leaves)
    expected = torch.autograd.grad(plain(*leaves)[0].sum(), leaves)
    agree(found, expected)


def test_transforms(qkv, mask):
    ours, exact = loss(attention, mask), loss(plain, mask)
    for transform in (lambda f: grad(f, (0, 1, 2)), lambda f: jacrev(f, (0, 1, 2))):
        agree(transform(ours)(*qkv), transform(exact)(*qkv))
    value, pull = vjp(ours, *qkv)
    agree(pull(torch.ones_like(value)), grad(exact, (0, 1, 2))(*qkv))


@pytest.mark.parametrize("dims", [(0, 0, 0), (2, 1, None), (None, None, 4)])
def test_vmap_over_any_dimension(dims):
    x = [random(*SHAPE) if dim is None else random(*SHAPE[:dim], 6, *SHAPE[dim:]) for dim in dims]
    agree(vmap(attention, dims)(*x), vmap(plain, dims)(*x))


def test_per_sample_gradients(qkv, mask):
    def one(attend):
        return lambda q, k, v, mask: loss(attend, mask[None])(q[None], k[None], v[None])
    found = vmap(grad(one(attention), (0, 1, 2)))(*qkv, mask)
    agree(found, vmap(grad(one(plain), (0, 1, 2)))(*qkv, mask))


def test_an_order_cannot_be_mapped(qkv):
    orders = torch.stack([torch.arange(5), torch.arange(5)])
    with pytest.raises(ValueError, match="only q, k, v and key_mask"):
        vmap(lambda order: dense(*qkv, order, None, 0.5))(orders)


def test_forward_mode_is_refused(qkv):
    q, k, v = qkv
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: attention(q, k, v)[0], (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(k, k)
        assert in_forward_mode(q, dual) and not in_forward_mode(q, None)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"): attention(q, dual, v)


def test_second_derivatives_are_refused(qkv):
    q, k, v = qkv
    q.requires_grad_()
    first, = torch.autograd.grad(attention(q, k, v)[0].sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first.sum(), q)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad(lambda q: grad(lambda q: attention(q, k, v)[0].sin().sum())(q).sum())(q.detach())


def test_unused_outputs(qkv):
    q, k, v = (x.requires_grad_() for x in qkv)
    for i in (0, 1):
        wanted = [q, k, v][: 3 - i]  # the LSE does not depend on v
        upstream = random(*SHAPE[: 4 - i])
        found = torch.autograd.grad(attention(q, k, v)[i], wanted, upstream)
        expected = torch.autograd.grad(plain(q, k, v)[i], wanted, upstream)
        agree(found, expected)


def test_compiled_with_any_length(qkv, mask):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    def attend(q, k, v): return attention(q, k, v)[0]
    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=True)
    for n in (5, 7, 12, 31):
        x = [random(2, 3, n, 4).requires_grad_() for _ in range(3)]
        upstream = random(2, 3, n, 4)
        found = torch.autograd.grad(compiled(*x), x, upstream)
        agree(found, torch.autograd.grad(plain(*x)[0], x, upstream))
    assert counter.frame_count == 1


@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck(qkv, mask, transpose):
    if transpose: qkv = [x.mT.contiguous().mT for x in qkv]
    leaves = [x.requires_grad_() for x in qkv]
    torch.library.opcheck(dense.forward_op, (*leaves, None, mask, 0.5))


def test_meta_tensors():
    x = torch.empty(SHAPE, dtype=torch.bfloat16, device="meta")
    out, lse = attention(x, x, x)
    assert (out.shape, out.dtype) == (SHAPE, torch.bfloat16)
    assert (lse.shape, lse.dtype) == (SHAPE[:3], torch.float32)
