"""What `make test` leaves out of a grid, and what it may not."""
from itertools import product
from types import SimpleNamespace

import pytest
from conftest import each_value_once

BACKENDS, MASKED, SIZES = ("sdpa", "triton", "mask"), (False, True), (1, 9, 65, 200)


def item(function: str, backend: str, masked: bool, size: int):
    "As pytest collects a case of three parameters, two of them given together."
    marks = [pytest.mark.parametrize("backend, masked", []), pytest.mark.parametrize("size", [])]
    return SimpleNamespace(
        nodeid=f"test_x.py::{function}[{backend}-{masked}-{size}]",
        callspec=SimpleNamespace(params=dict(backend=backend, masked=masked, size=size)),
        iter_markers=lambda name: [mark.mark for mark in marks])


def test_each_value_of_each_parameter_has_its_turn():
    cases = [
        item(function, *values) for function in ("test_a", "test_b")
        for values in product(BACKENDS, MASKED, SIZES)]
    taken = each_value_once(cases)
    assert taken == each_value_once(cases[::-1])  # whatever the order: workers collect alike
    for function in ("test_a", "test_b"):
        params = [x.callspec.params for x in taken if f"::{function}[" in x.nodeid]
        pairs = {(p["backend"], p["masked"]) for p in params}
        assert pairs == {*product(BACKENDS, MASKED)} and {p["size"] for p in params} == {*SIZES}
        assert len(params) < len(BACKENDS) * len(MASKED) * len(SIZES) / 2
