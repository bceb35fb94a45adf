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
from hilbert_attn.block_sparse import lists_from_bounds
from hilbert_attn.kernels import backward, block_sparse, forward

launched = []


def launch(kernel, programs, tile, *args, **constants):
    compiled = kernel.warmup(*args, grid=(programs,), **constants, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True)
    launched.append(dict(kernel=kernel.fn.__name__, programs=programs, shared=compiled.metadata.shared, wgmma=compiled.asm["ptx"].count("wgmma.mma_async"), tma=compiled.asm["ptx"].count("cp.async.bulk.tensor"),
                         describes=bool(constants.get("TMA"))))


for module in (forward, backward, block_sparse):
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

slots, m = torch.arange(1024, dtype=torch.int32), 1024
bounds = dict(lo=(slots - 200)[None], hi=(slots + 200)[None], at=slots[None])
order = slots.flip(0).where(slots.flip(0) < n, -1)
kv = torch.cat([kv, kv[:, :, :m - n]], 2)
for options, layout in zip(traits[2:] + [{}] * 3, [dict(causal=True), {}, bounds, bounds, dict(q_tokens=order, k_tokens=slots, **bounds), dict(q_tokens=order)]):
    options = {name: torch.ones(2, m, dtype=torch.bool) if name == "key_mask" else x for name, x in options.items() if name != "causal"}
    lists = lists_from_bounds(n, m, (128, 128), **layout)
    out, lse = block_sparse.block_attention_forward(q, kv, kv, lists, **options)
    block_sparse.block_attention_backward(q, kv, kv, out, lse, out, None if options else lse, lists, **options)
out, lse = block_sparse.block_attention_forward(q, kv, kv, lists := lists_from_bounds(n, m, (128, 128), **bounds), tile=forward.Tile(128, 64, 8, 3, tma=True, overlap=True))
block_sparse.block_attention_backward(q, kv, kv, out, lse, out, None, lists, tiles=tiles)
json.dump(launched, sys.stdout)
