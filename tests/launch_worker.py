"""Launches kernels for a Hopper GPU that is not here, up to the point where a GPU would be needed.

What the launcher passes is what gets compiled; and what the tool that compiles ahead makes of it
must be the very same. Run in a process without TRITON_INTERPRET.
"""
import json
import os
import sys
from pathlib import Path

import torch
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from gpu.compiling import AbsentGPU, describe_launch, warm

from hilbert_attn.blocks.lists import lists_from_bounds
from hilbert_attn.kernels import backward, block_sparse, forward, launch
from hilbert_attn.kernels.tuning import Tile

ARCH = 90
launched = []


def start(kernel, programs, tile, *args, **constants):
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True)
    driver.set_active(AbsentGPU(ARCH))
    compiled = kernel.warmup(*args, grid=(programs,), **constants, **options)
    ahead = warm(describe_launch(kernel, tile, args, constants), ARCH)
    ptx = compiled.asm["ptx"]
    launched.append(dict(
        kernel=kernel.fn.__name__, programs=programs, shared=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"), tma=ptx.count("cp.async.bulk.tensor"),
        describes="tensordesc" in str(compiled.src.signature), ahead=ahead.hash == compiled.hash))


def stand_in():
    launch.start = start
    launch.check_triton = lambda device: None
    launch.capability = lambda device: (9, 0)


N, SLOTS = 1000, 1024
MASK = torch.ones(2, N, dtype=torch.bool)
FULL = os.environ.get("FULL") == "1"
ORDER, DROPPED = dict(order=torch.arange(N)), dict(dropout_p=0.1, seed=torch.tensor([1]))
ONE_BY_ONE = [((1000, 2, "residue"), {}), ((64, 4, "residue"), ORDER),
              ((1000, 3, "keys"), dict(causal=True)), ((1000, 2, "longnet"), dict(key_mask=MASK)),
              ((128, 1, "residue"), DROPPED), ((64, 2, "keys"), {})]
TOGETHER = [((64, 4, "residue"), ORDER), ((128, 1, "residue"), dict(key_mask=MASK, **DROPPED)),
            ((1000, 3, "keys"), dict(causal=True, **ORDER))]
TILES = dict(dq=Tile(128, 64, 8, 3, tma=True), dkv=Tile(64, 128, 8, 3, tma=True))
OVERLAPPED = Tile(128, 64, 8, 3, tma=True, overlap=True)


def tensors():
    q = torch.randn(2, N, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
    return q, torch.randn(2, 2, N, 64, dtype=torch.bfloat16)


def launch_segments(q, kv):
    for (w, r, mode), options in ONE_BY_ONE if FULL else TOGETHER:
        fields = w, r, mode, (0,) if mode == "residue" else (0, 1, 0, 1)
        out, lse = forward.attention_forward(q, kv, kv, *fields, **options)
        dlse = lse if r == 3 else None
        backward.attention_backward(q, kv, kv, out, lse, out, dlse, *fields, **options)
    out, lse = forward.attention_forward(q, kv, kv, 500, 2, tile=OVERLAPPED)
    backward.attention_backward(q, kv, kv, out, lse, out, None, 500, 2, tiles=TILES)


def launch_blocks(q, kv):
    kv = torch.cat([kv, kv[:, :, :SLOTS - N]], 2)
    slots = torch.arange(SLOTS, dtype=torch.int32)
    bounds = dict(lo=(slots - 200)[None], hi=(slots + 200)[None], at=slots[None])
    order = slots.flip(0).where(slots.flip(0) < N, -1)
    mask = torch.ones(2, SLOTS, dtype=torch.bool)
    layouts = [(dict(causal=True), {}), ({}, dict(key_mask=mask)), (bounds, DROPPED),
               (bounds, {}), (dict(q_tokens=order, k_tokens=slots, **bounds), {}),
               (dict(q_tokens=order), {})]
    if not FULL: layouts = [layouts[1], layouts[2], layouts[4]]
    for layout, options in layouts:
        lists = lists_from_bounds(N, SLOTS, (128, 128), **layout)
        out, lse = block_sparse.block_attention_forward(q, kv, kv, lists, **options)
        dlse = None if options else lse
        block_sparse.block_attention_backward(q, kv, kv, out, lse, out, dlse, lists, **options)
    lists = lists_from_bounds(N, SLOTS, (128, 128), **bounds)
    out, lse = block_sparse.block_attention_forward(q, kv, kv, lists, tile=OVERLAPPED)
    block_sparse.block_attention_backward(q, kv, kv, out, lse, out, None, lists, tiles=TILES)


if __name__ == "__main__":
    stand_in()
    launch_segments(*tensors())
    launch_blocks(*tensors())
    json.dump(launched, sys.stdout)
