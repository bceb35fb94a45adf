"""What the tests of the Triton kernels share: tensors, fixtures, memory that bites."""
import pytest
import torch

pytest.importorskip("triton")
from hilbert_attn.kernels import steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.skipif(
    DEVICE == "cpu" and not steps.interpreted,
    reason="needs an NVIDIA GPU, or TRITON_INTERPRET=1 before Python starts")


def generator(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed)).to(DEVICE, dtype)


def heads(sizes, d=16, batch=1, **options):
    "q, k and v of (heads, tokens) each."
    return [randn(batch, h, n, d, seed=i, **options) for i, (h, n) in enumerate(sizes)]


def upstream(with_lse: bool):
    "Gradients of two heads of 20 queries: of the output, and of the LSE or None."
    dlse = randn(1, 2, 20, dtype=torch.float64) if with_lse else None
    return randn(1, 2, 20, 16, dtype=torch.float64), dlse


def permutation(n: int, seed: int = 0):
    return torch.randperm(n, generator=generator(seed)).to(DEVICE)


def learning(x): return [t.requires_grad_() for t in x]


def some(*shape, share: float, seed: int = 0):
    "A mask that keeps a share of its places."
    return (torch.rand(*shape, generator=generator(seed)) < share).to(DEVICE)


def same(ours, theirs) -> bool:
    "Bit by bit."
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def no_infinity(out, lse):
    "Numerical differences of infinities are NaN."
    return out, lse.masked_fill(lse == -torch.inf, 0)


def far_and_near(monkeypatch):
    "q, k, v and dout of three tokens, 2^30 elements apart in untouched memory; and close by."
    if steps.interpreted:  # it would copy the storage onto itself
        from triton.runtime.interpreter import GridExecutor
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    step = 2 ** 30
    storage = torch.empty(2 * step + 256, dtype=torch.float16, device=DEVICE)
    far = [storage.as_strided((1, 1, 3, 32), (step, step, step, 1), 32 * i) for i in range(4)]
    near = [randn(1, 1, 3, 32, dtype=torch.float16, seed=i) for i in range(4)]
    for x, y in zip(far, near): x.copy_(y)
    return far, near


def dirty(x, key_mask, value):
    "With that value in every masked token."
    return x.masked_fill(~key_mask[:, None, :, None], value)


def dropped_attention(q, k, v, mask, kept, p):
    "Plain attention whose weights are dropped where they are not kept; LSE 0 for empty rows."
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    live = mask.any(-1)
    lse = scores.masked_fill(~live[..., None], 0).logsumexp(-1)
    return ((scores - lse[..., None]).exp() * kept / (1 - p)) @ v, lse.masked_fill(~live, 0)


def poison(run):
    "Runs with memory in which nobody wrote filled with NaN."
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        return run()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned():
    "The same for a whole test."
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
