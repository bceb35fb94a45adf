"""Importing: cheap, without matplotlib, and without triton."""
import subprocess
import sys

import pytest

import hilbert_attn


def python(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names(): assert all(hasattr(hilbert_attn, name) for name in hilbert_attn.__all__) and sorted(hilbert_attn.__all__) == hilbert_attn.__all__


def test_import_is_cheap():
    "A third of torch's own import at most, best of three processes: everything heavy is imported when it is first used."
    code = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import hilbert_attn; print((time.perf_counter() - b) / (b - a))"
    assert min(float(python(code)) for _ in range(3)) < 1 / 3


def test_import_brings_nothing_heavy():
    code = "import sys, torch; before = set(sys.modules); import hilbert_attn; print(*sorted(set(sys.modules) - before))"
    new = set(python(code).split())
    assert not {"matplotlib", "PIL", "pandas", "IPython", "tqdm", "nbdev", "fastcore", "transformers", "diffusers", "triton"} & {name.split(".")[0] for name in new}
    assert not {"torch._dynamo", "torch.nn.attention.flex_attention"} & new


@pytest.mark.parametrize("missing", ("triton", "matplotlib", "tqdm", "PIL"))
def test_works_without(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None  # importing it fails
import torch, hilbert_attn
q = torch.randn(1, 2, 30, 8, requires_grad=True)
hilbert_attn.hilbert_attention(q, q, q, segment_size=8).sum().backward()
try: hilbert_attn.hilbert_attention(q, q, q, backend="triton")
except RuntimeError as e: print(e)
"""
    said = python(code)
    if missing == "triton": assert "cannot run on cpu" in said
