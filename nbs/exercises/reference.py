"""Of 02_reference."""
import torch

from exercises import differs, exercise, first
from hilbert_attn.reference import masked_attention, merge_attention


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@exercise
def merge_two(answer):
    outs, lses = draw(2, 5, 4), draw(2, 5, seed=1)
    def told(lses, case):
        found = answer(outs[0], lses[0], outs[1], lses[1])
        expected = merge_attention(outs, lses)
        pairs = zip(found, expected, ("out", "lse"))
        return first(differs(*pair, f"{case}, {name}") for *pair, name in pairs)

    large, empty, both = lses * 900, lses.clone(), lses.clone()
    empty[0, 2], both[:, 2] = -torch.inf, -torch.inf
    return first([
        told(lses, "two parts"), told(large, "LSEs up to a thousand"),
        told(empty, "a row without keys in the first part"),
        told(both, "a row without keys in both parts")])


@exercise
def counted(answer):
    q, k, v = draw(3, 1, 1, 7, 4)
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 4, (7, 7), generator=generator)
    counts[:, 0] = 1
    expected, _ = masked_attention(q, k, v, counts)
    return differs(answer(q[0, 0], k[0, 0], v[0, 0], counts), expected[0, 0], "counts 0 to 3")


@exercise
def online(answer):
    def told(scale, n, block):
        q, k, v = draw(3, n, 4)
        q = q * scale
        s = q @ k.T / 2
        expected = s.softmax(-1) @ v, s.logsumexp(-1)
        pairs = zip(answer(q, k, v, block), expected, ("out", "lse"))
        case = f"{n} keys in blocks of {block}" + ", large scores" * (scale > 1)
        return first(differs(*pair, f"{case}, {name}") for *pair, name in pairs)

    return first([told(1, 12, 12), told(1, 12, 4), told(1, 13, 4), told(900, 24, 3)])


@exercise
def gradient_of_lse(answer):
    q, k = draw(6, 4).requires_grad_(), draw(9, 4, seed=1)
    lse = (q @ k.T * 0.3).logsumexp(-1)
    dlse = draw(6, seed=2)
    expected, = torch.autograd.grad(lse, q, dlse)
    return differs(answer(q.detach(), k, dlse, 0.3), expected, "scale 0.3")
