"""What must stand before any test is imported: Triton's interpreter, threads, hypothesis."""
import os
import re
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, settings
from interpreter import interpreted, quick, rounding
from sampling import FULL

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start
    torch.set_num_threads(threads)

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("ci", max_examples=300 if FULL else 30, derandomize=True, **common)
settings.register_profile("slow", max_examples=5000, **common)
profile = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(profile)


# Files that take a minute or more. They come first, so that none of them is left for the end,
# where the other process would have nothing to do.
LONGEST = (
    "test_ring",
    "test_notebooks",
    "test_backends",
    "test_later_notebooks",
    "test_dilated",
    "test_layouts",
    "test_site_browser",
    "test_triton",
    "test_block_sparse",
    "test_block_kernels",
    "test_local",
    "test_compile_matrix",
    "test_types",
)


def place(item) -> int:
    return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)


def values_of(item) -> list[tuple]:
    "What each `parametrize` gives to this case."
    given = item.callspec.params
    names = [re.split(r",\s*", mark.args[0]) for mark in item.iter_markers("parametrize")]
    return [tuple((name, id(given[name])) for name in some) for some in names]


def each_value_once(items: list) -> list:
    """Some of the cases of each function marked `grid`, so that none of the values is left out.

    In an order that is random but always the same, a case is taken if it has a value that no case
    before it had. So pairs of values differ from one function to the next."""
    seen = set()

    def is_new(item) -> bool:
        values = {(item.nodeid.split("[")[0], *value) for value in values_of(item)}
        if values <= seen: return False
        seen.update(values)
        return True

    return list(filter(is_new, sorted(items, key=lambda item: crc32(item.nodeid.encode()))))


def pytest_collection_modifyitems(config, items):
    "Long grids and long fuzzing are left out, not skipped: a skip is for what cannot run here."
    gone = [name for name in LONGEST if not (config.rootpath / "tests" / f"{name}.py").exists()]
    if gone: raise pytest.UsageError(f"tests/conftest.py lists files that are gone: {gone}")
    items.sort(key=place)

    def has(item, mark: str) -> bool: return item.get_closest_marker(mark) is not None

    grids = [item for item in items if has(item, "grid") and not has(item, "full")]
    taken = {item.nodeid for item in each_value_once(grids)}

    def runs(item):
        if has(item, "slow") and profile != "slow": return False
        if FULL: return True
        return not has(item, "full") and (item.nodeid in taken or not has(item, "grid"))

    left_out = [item for item in items if not runs(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if runs(item)]


@pytest.fixture(autouse=True, scope="session")
def interpreter():
    "Of Triton, where there is no GPU."
    if not interpreted(): return (yield)
    with rounding(), quick(): yield


@pytest.fixture(autouse=True, scope="module")
def engines_at_any_length(request):
    """Short sequences take the engines too: as one masked call, small cases would not try them.

    A module that is about the policy says `REAL_POLICY = True`."""
    if getattr(request.module, "REAL_POLICY", False): return (yield)
    from hilbert_attn import backends
    with pytest.MonkeyPatch.context() as patch:
        rows = tuple(row for row in backends.POLICY if row.max_tokens is None)
        patch.setattr(backends, "POLICY", rows)
        yield
