"""Programs beside this one: profilers, memory checkers, and a process group."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TOOL = Path(__file__).resolve().parent.parent / "gpu_run.py"
TEXT = 48_000  # characters that are kept of what a program prints
FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute")


def find_program(name: str) -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), *FOLDERS])
    return shutil.which(name, path=path)


def command_for(case: dict) -> list[str] | None:
    "The program and its options; None where it is missing."
    if case["program"] == "ncu":
        program = find_program("ncu")
        options = ["--clock-control", "none", "--set", "detailed", "--profile-from-start", "off",
                   "--kernel-name", "regex:^_.*_kernel$", "--launch-count", "3"]
    else:
        program = find_program("compute-sanitizer")
        options = ["--tool", case["program"], "--error-exitcode", "9"]
    return [program, *options] if program else None


def run_program(case: dict, state: Path) -> dict:
    command = command_for(case)
    if command is None: return dict(missing=case["program"])
    environment = os.environ | dict(HILBERT_ATTN_AUTOTUNE="0", HILBERT_ATTN_CACHE=str(state))
    size = "large" if case["program"] == "ncu" else "small"
    ran = subprocess.run(
        [*command, sys.executable, str(TOOL), "--launch", size, json.dumps(case["cases"])],
        capture_output=True, text=True, env=environment, timeout=150)
    text = ran.stdout + ran.stderr
    row = dict(program=case["program"], code=ran.returncode)
    failed = {} if ran.returncode == 0 else dict(failed=f"exit code {ran.returncode}")
    return row | failed | dict(text=text[-TEXT:])


def launch(size: str, spec: str) -> None:
    "In the program's own process: once to compile, then once to be looked at."
    from .problems import large_problem, small_problem
    build = large_problem if size == "large" else small_problem
    for problem in map(build, json.loads(spec)):
        if size == "large": problem.launch()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        problem.launch()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


RING = """
import sys, torch, torch.distributed as dist
from hilbert_attn import hilbert_attention, ring_attention
cuda = torch.cuda.is_available()
where = "cuda" if cuda else "cpu"
dist.init_process_group("nccl" if cuda else "gloo", init_method="file://" + sys.argv[1],
                        rank=0, world_size=1)
n, dtype = (8192, torch.bfloat16) if cuda else (64, torch.float32)
x = [torch.randn(1, 4, n, 64, device=where, dtype=dtype, requires_grad=True) for _ in range(3)]
for options in (dict(), dict(segment_size=n // 2, dilation_rate=4), dict(causal=True)):
    ours, theirs = ring_attention(*x, **options), hilbert_attention(*x, curve=None, **options)
    grads = [torch.autograd.grad(out, x, torch.ones_like(out)) for out in (ours, theirs)]
    for a, b in zip((ours, *grads[0]), (theirs, *grads[1])):
        error = ((a - b).float().norm() / b.float().norm()).item()
        print(options, f"{error:.2e}")
        assert error < 0.02, f"off by {error}"
dist.destroy_process_group()
"""


def ring_on_one_rank(case: dict) -> dict:
    "NCCL with a single rank: whether groups, buffers and streams work at all."
    environment = os.environ | dict(PYTHONPATH=str(TOOL.parent.parent))
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run([sys.executable, "-c", RING, str(Path(folder) / "meet")],
                             capture_output=True, text=True, env=environment, timeout=120)
    text = (ran.stdout + ran.stderr)[-TEXT:]
    return dict(text=text) | ({} if ran.returncode == 0 else dict(failed=text[-400:]))
