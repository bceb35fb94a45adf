"""Launches kernels for a Hopper GPU that is not here, up to the point where a GPU would be needed: what the launcher passes is what gets compiled. Run in a process without TRITON_INTERPRET."""
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class Hopper:
    "The little that a launch asks of a driver before it has a kernel."
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)


driver.set_active(Hopper())
from hilbert_attn.kernels import backward, forward

launched = []


def launch(kernel, programs, tile, *args, **constants):
    compiled = kernel.warmup(*args, grid=(programs,), **constants, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True)
    launched.append(dict(kernel=kernel.fn.__name__, programs=programs, shared=compiled.metadata.shared, wgmma=compiled.asm["ptx"].count("wgmma.mma_async"), tma=compiled.asm["ptx"].count("cp.async.bulk.tensor")))


for module in (forward, backward):
    module._launch, module.check_triton, module._capability = launch, lambda device: None, lambda device: (9, 0)

n, offsets = 1000, {"residue": (0,), "keys": (0, 1, 0, 1), "longnet": (0, 1, 0, 1)}
q, kv = torch.randn(2, n, 4, 64, dtype=torch.bfloat16).transpose(1, 2), torch.randn(2, 2, n, 64, dtype=torch.bfloat16)
traits = [{}, dict(order=torch.arange(n)), dict(causal=True), dict(key_mask=torch.ones(2, n, dtype=torch.bool)), dict(dropout_p=0.1, seed=torch.tensor([1]))]
for options, (w, r, mode) in zip(traits * 2, [(1000, 2, "residue"), (64, 4, "residue"), (1000, 3, "keys"), (1000, 2, "longnet"), (128, 1, "residue"), (64, 2, "keys")]):
    out, lse = forward.attention_forward(q, kv, kv, w, r, mode, offsets[mode], **options)
    backward.attention_backward(q, kv, kv, out, lse, out, lse if r == 3 else None, w, r, mode, offsets[mode], **options)
tiles = dict(dq=forward.Tile(128, 64, 8, 3, tma=True), dkv=forward.Tile(64, 128, 8, 3, tma=True))
out, lse = forward.attention_forward(q, kv, kv, 500, 2, tile=forward.Tile(128, 64, 8, 3, tma=True, overlap=True))
backward.attention_backward(q, kv, kv, out, lse, out, None, 500, 2, tiles=tiles)
json.dump(launched, sys.stdout)
