"""Triton's interpreter as tests need it: it rounds as a GPU does, and takes a third of the time.

Nothing here applies where kernels are compiled.
"""
import os
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch


def interpreted() -> bool:
    return find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def rounding():
    "It truncates float32 to bfloat16; a GPU rounds to nearest, and so does this."
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl
    cast = InterpreterBuilder.cast_impl

    def rounded(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.tensor(src.data).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view("uint16"), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounded)
        yield


def roomy():
    """A function that runs another below a frame with 40,000 variables.

    CPython otherwise maps and unmaps memory at each call whose frame happens to cross a 16 KB
    boundary of its stack.
    """
    names, variables = {}, " = ".join(f"x{i}" for i in range(40_000))
    exec(f"def roomy(run):\n    if run is None: {variables} = 0\n    return run()", names)
    return names["roomy"]


@contextmanager
def quick():
    """Takes two thirds off its time.

    It patches triton.language anew whenever a kernel calls a helper; once per kernel is enough, and
    once for Triton's own library.
    """
    from triton.runtime import interpreter
    patched, run_below = set(), roomy()
    launch = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if not module.startswith(("hilbert_attn", "__main__")) and module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    def launched(self, *args, **kwargs): return run_below(lambda: launch(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield
