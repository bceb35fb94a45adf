"""What must stand before any test module is imported: Triton's interpreter, torch's threads, hypothesis' profiles."""
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start
    torch.set_num_threads(threads)

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("ci", max_examples=300, derandomize=True, **common)
settings.register_profile("slow", max_examples=5000, **common)
profile = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(profile)


def pytest_collection_modifyitems(items):
    if profile == "slow": return
    for item in items:
        if item.get_closest_marker("slow"): item.add_marker(pytest.mark.skip(reason="runs with HYPOTHESIS_PROFILE=slow"))
