"""Of 02c_triton_in_ten_minutes."""
import torch

from exercises import differs, exercise, first

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def fenced(*shape):
    "A tensor full of NaN, and the memory behind it, which nobody may write."
    size = torch.Size(shape).numel()
    memory = torch.full((size + 64,), torch.nan, device=DEVICE)
    return memory[:size].view(shape), memory[size:]


def ran(kernel, programs, inputs, shape, expected, case, *arguments, **constants):
    "What is wrong with a kernel's result, and with what it wrote outside."
    out, fence = fenced(*shape)
    kernel[(programs,)](*inputs, out, *arguments, **constants)
    if not fence.isnan().all(): return f"{case}: it writes behind the end of the result"
    return differs(out.cpu(), expected.cpu(), case, 1e-4)


@exercise
def programs(answer):
    for sizes in [(64, 64, 16, 16), (65, 64, 16, 32), (1, 1, 64, 64), (100, 7, 8, 4)]:
        rows, cols, BM, BN = sizes
        expected = len(range(0, rows, BM)) * len(range(0, cols, BN))
        if answer(*sizes) != expected:
            return f"rows, cols, BM, BN = {sizes}: {answer(*sizes)} instead of {expected}"


@exercise
def reverse(answer):
    def told(n):
        x = draw(n)
        return ran(answer, -(-n // 16), [x], (n,), x.flip(0), f"{n} numbers, BLOCK=16", n, BLOCK=16)

    return first(map(told, (16, 64, 37)))


@exercise
def column_sum(answer):
    def told(rows, cols):
        x = draw(rows, cols)
        case = f"{rows} rows, {cols} columns, BLOCK=8"
        return ran(answer, -(-cols // 8), [x], (cols,), x.sum(0), case, rows, cols, BLOCK=8)

    return first([told(1, 8), told(12, 8), told(5, 21)])


@exercise
def row_lse(answer):
    def told(cols, scale):
        x = scale * draw(3, cols)
        case = f"{cols} columns, BLOCK=16, numbers up to {x.abs().max():.0f}"
        return ran(answer, 3, [x], (3,), x.logsumexp(1), case, cols, BLOCK=16)

    return first([told(16, 1), told(41, 1), told(64, 100)])
