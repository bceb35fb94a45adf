"""How much is tried: a sample in `make test`, all of it in `make full`."""
import os

import pytest
from hypothesis import settings

FULL = os.environ.get("FULL") == "1"


def examples(sample: int, whole: int):
    "Examples of a test that takes long for each, as kernels do in Triton's interpreter."
    return settings(max_examples=whole if FULL else sample)


def sampled(values, sample) -> list:
    "Parameters of a test, all but some of them for `make full` alone."
    def rest(x): return pytest.param(*x if isinstance(x, tuple) else (x,), marks=pytest.mark.full)
    return [x if x in sample else rest(x) for x in values]
