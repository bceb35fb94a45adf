"""The parts of `tools/gpu_run.py`, which measures the kernels on an NVIDIA GPU."""
