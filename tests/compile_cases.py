"""Kernels, specialisations and architectures that are compiled without a GPU."""
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from gpu.compiling import Launch, recording

from hilbert_attn.blocks.lists import lists_from_bounds
from hilbert_attn.kernels import backward, block_sparse, forward
from hilbert_attn.kernels.tuning import PRODUCERS, Tile, Workload, default_tile
from hilbert_attn.reference import Scores

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
          "fp64": torch.float64}
KERNELS = {"forward": "_forward_kernel", "dq": "_dq_kernel", "dkv": "_dkv_kernel",
           "small": "_small_kernel", "block_forward": "_block_forward_kernel",
           "block_dq": "_block_dq_kernel", "block_dkv": "_block_dkv_kernel"}


@dataclass(frozen=True)
class Case:
    "One kernel, one specialisation, one architecture."
    kernel: str
    arch: int
    dtype: str = "bf16"
    head_dim: int = 64
    order: bool = False
    rows: int = 4096 # keys of a group
    mode: str = "residue" # "keys": of as many queries as two groups
    traits: tuple = () # of CAUSAL, HAS_KEY_MASK, HAS_DROPOUT, CAPPED
    tile: Tile | None = None # None is the default of the architecture
    axes: int = 0 # coordinates per slot, for block kernels
    block: tuple = (128, 128) # for block kernels
    filled: bool = False # with an order: no slot is empty

    @property
    def half(self): return self.dtype in ("bf16", "fp16")

    def __str__(self):
        words = [self.kernel, f"sm{self.arch}", self.dtype, f"D{self.head_dim}"]
        words += ["order"] * self.order + [f"rows{self.rows}"] * (self.rows != 4096)
        words += [self.mode] * (self.mode != "residue")
        words += self.traits
        if self.kernel.startswith("block"):
            words += [f"axes{self.axes}", "x".join(map(str, self.block))]
        words += ["filled"] * self.filled
        if t := self.tile:
            size = f"{t.block_m}x{t.block_n}w{t.num_warps}s{t.num_stages}"
            words.append(size + "o" * t.overlap + "t" * t.tma + "p" * t.producer)
        return "-".join(words)

    def options(self, keys: int) -> dict:
        "As the launchers take them."
        found = {}
        if "HAS_KEY_MASK" in self.traits:
            found["key_mask"] = torch.empty(1, keys, dtype=torch.bool, device="meta")
        if "HAS_DROPOUT" in self.traits:
            seed = torch.empty(1, dtype=torch.int64, device="meta")
            found |= dict(dropout_p=0.1, seed=seed)
        if "CAPPED" in self.traits: found["scale"] = Scores(0.125, 50.0)
        return found

    def launch(self) -> Launch:
        "What the host makes of it."
        with recording((self.arch // 10, self.arch % 10), all_tiles=False) as found:
            if self.kernel.startswith("block"): self.launch_blocks()
            else: self.launch_segments()
        named = [x for x in found.values() if x.kernel == KERNELS[self.kernel]]
        assert len(named) == 1, f"{self}: launches {[x.kernel for x in found.values()]}"
        return named[0]

    def forced(self) -> tuple: # the forward's tile, the backward's tiles
        kernel = self.kernel.removeprefix("block_")
        if kernel == "forward": return self.tile, None
        return None, {kernel: self.tile} if self.tile else None

    def tensors(self, n: int):
        return [torch.empty(1, 1, n, self.head_dim, dtype=DTYPES[self.dtype], device="meta")] * 3

    def launch_segments(self):
        n, (tile, tiles) = 4000 if self.order else 4096, self.forced()
        rate = 2 if self.mode == "keys" else 1
        fields = min(self.rows * rate, n), rate, self.mode, (0,)
        options = self.options(n) | dict(causal="CAUSAL" in self.traits)
        if self.order: options["order"] = torch.empty(n, dtype=torch.int64, device="meta")
        x = self.tensors(n)
        out, lse = forward.attention_forward(*x, *fields, **options, tile=tile)
        backward.attention_backward(*x, out, lse, out, None, *fields, **options, tiles=tiles)

    def launch_blocks(self):
        n, (tile, tiles) = 512 if self.filled or not self.order else 500, self.forced()
        slots = torch.arange(512, dtype=torch.int32)
        layout = dict(causal="CAUSAL" in self.traits)
        if self.axes:
            at = slots.expand(self.axes, -1).contiguous()
            layout |= dict(lo=at - 200, hi=at + 200, at=at)
        if self.order: layout |= dict.fromkeys(("q_tokens", "k_tokens"), slots.where(slots < n, -1))
        lists = lists_from_bounds(n, n, self.block, **layout)
        x, options = self.tensors(n), self.options(n)
        run, back = block_sparse.block_attention_forward, block_sparse.block_attention_backward
        out, lse = run(*x, lists, **options, tile=tile)
        back(*x, out, lse, out, None, lists, **options, tiles=tiles)


LOOPS = ("forward", "dq", "dkv")
BLOCKS = tuple(f"block_{kernel}" for kernel in LOOPS)
TRAITS = dict(CAUSAL="causal", HAS_KEY_MASK="mask", HAS_DROPOUT="dropout")  # of kernels, of tuning
WORDS = TRAITS | dict(CAPPED="softcap")


def kernels_of_segments() -> list[Case]:
    "Every architecture, head dim and dtype where they could differ."
    dims = (32, 64, 80, 128, 256)
    cases = [Case(kernel, 90, head_dim=d, order=order)
             for kernel in LOOPS for d in dims for order in (False, True)]
    cases += [Case(kernel, arch, head_dim=d, order=(i + arch // 20) % 2 == 0)
              for kernel in LOOPS for arch in (80, 100) for i, d in enumerate(dims)]
    others = ((90, "fp16", 64), (90, "fp16", 128), (90, "fp32", 64), (90, "fp32", 128),
              (80, "fp32", 64), (100, "fp32", 128), (90, "fp32", 80), (90, "fp32", 256))
    cases += [Case(kernel, arch, dtype, d, order=d == 64)
              for kernel in LOOPS for arch, dtype, d in others]
    cases += [Case(kernel, 90, head_dim=40) for kernel in LOOPS]  # strides are multiples of 8 only
    cases += [Case("dkv", 90, head_dim=d, traits=traits, order=d == 80)  # columns in two parts
              for d in (48, 80, 96) for traits in ((), *((trait,) for trait in TRAITS))]
    return cases + [Case(kernel, 90, "fp64") for kernel in LOOPS]


def small_groups() -> list[Case]:
    cases = [Case(kernel, 90, head_dim=d, rows=rows, order=rows == 32)
             for kernel in ("forward", "small") for d in (64, 128) for rows in (16, 32, 64)]
    cases += [Case("small", 90, rows=64, traits=(trait,)) for trait in TRAITS]
    cases += [Case("forward", 80, rows=64), Case("small", 80, rows=64),
              Case("forward", 90, rows=128), Case("forward", 90, head_dim=128, rows=128)]
    cases += [Case("small", 90, head_dim=128, rows=128, traits=traits, order=order)
              for traits in ((), *((trait,) for trait in TRAITS)) for order in (False, True)]
    cases += [Case("small", 90, head_dim=d, rows=rows, mode="keys", traits=traits)
              for d, rows, traits in product((64, 128), (64, 128), ((), ("HAS_DROPOUT",)))
              if (d, rows) != (64, 128) or not traits]
    cases += [Case("small", 80, rows=128, order=True), Case("small", 80, head_dim=128, rows=64),
              Case("small", 80, rows=64, mode="keys"), Case("small", 90, head_dim=80, rows=64),
              Case("small", 80, head_dim=128, rows=64, mode="keys", traits=("HAS_DROPOUT",)),
              Case("small", 90, head_dim=48, rows=128), Case("small", 100, head_dim=128, rows=128)]
    cases += [Case("small", 80, rows=128), Case("small", 80, head_dim=96, rows=32)]
    cases += [Case("small", 90, rows=128), Case("small", 90, "fp32", rows=16)]
    return cases + list(gradients_of_small_groups())


def gradients_of_small_groups() -> Iterator[Case]:
    "The largest groups that `fit_small` takes, with everything that they may meet at once."
    archs, dims, modes = (80, 90, 100, 120), (32, 48, 64, 80, 96, 112, 128), ("residue", "keys")
    settings = product(archs, ("bf16", "fp32"), dims, modes, (False, True))
    for i, (arch, dtype, d, mode, dropout) in enumerate(settings):
        key = mode == "residue", d, DTYPES[dtype], (arch // 10, arch % 10), dropout
        taken = [keys for keys in (32, 64, 128) if backward.fit_small(keys, *key)]
        if dtype == "fp32" or d not in (64, 128): taken = taken[-1:]
        traits = tuple(TRAITS) if dropout else ("CAUSAL", "HAS_KEY_MASK")
        for keys in taken:
            order = (i // 2 + keys // 64) % 2 == 1
            yield Case("small", arch, dtype, d, order, keys, mode, traits)


def blocks_of_the_gpu_tool() -> list[Case]:
    "Defaults for the block lists that `make gpu` times: segments, windows, neighbourhoods."
    lists = ((True, 0, (128, 128), False), (True, 1, (128, 128), False),
             (False, 1, (128, 128), False), (False, 1, (128, 64), False),
             (True, 2, (128, 128), True), (True, 2, (128, 64), True), (True, 2, (64, 64), True))
    return [Case(kernel, 90, head_dim=128, order=order, axes=axes, block=block, filled=filled)
            for kernel in BLOCKS for order, axes, block, filled in lists]


def kernels_of_blocks() -> list[Case]:
    "Every number of axes, blocks wider than tiles, other architectures and dtypes."
    cases = [Case(kernel, 90, head_dim=d, order=(axes + d // 64) % 2 == 0, axes=axes,
                  traits=("CAUSAL",) * (axes == 3 or d == 64 and axes == 0))
             for kernel in BLOCKS for d in (64, 128) for axes in range(5)]
    cases += [Case(kernel, arch, head_dim=d, order=d == 128, traits=("CAUSAL",) * (arch == 80),
                   axes=4 if arch == 80 else 2)
              for kernel in BLOCKS for arch in (80, 100) for d in (64, 128)]
    splits = ((128, (128, 64)), (80, (64, 64)), (256, (128, 128)))
    cases += [Case(kernel, 90, head_dim=d, axes=2, block=block, order=d == 80)
              for kernel in BLOCKS for d, block in splits]
    others = product(BLOCKS, ("fp16", "fp32"))
    return cases + [Case(kernel, 90, dtype, axes=1) for kernel, dtype in others]


def choices(kernel: str, d: int, traits: tuple, order: bool, blocks: bool) -> list[Tile]:
    "What the tuner may take, the default first."
    words = ("blocks",) * blocks + ("order",) * order + tuple(WORDS[t] for t in traits)
    if kernel == "forward" and not words: words = "whole",
    work = Workload(kernel, d, 4096, (16, 16), torch.bfloat16, words, tma=not order)
    default = default_tile(kernel, d, torch.bfloat16, (9, 0), "HAS_DROPOUT" in traits)
    return work.candidates(default)[1:]


def tiles_of_the_tuner() -> list[Case]:
    "Defaults and candidates with everything that they may meet, on sm_90."
    cases = []
    for kernel in LOOPS:
        for d in (64, 128):
            for traits in ((), ("CAUSAL",), ("HAS_KEY_MASK",), ("HAS_DROPOUT",)):
                for order in (False, True):
                    common = dict(head_dim=d, order=order, traits=traits)
                    found = [None, *choices(kernel, d, traits, order, blocks=False)]
                    cases += [Case(kernel, 90, tile=tile, **common) for tile in found]
                    found = [None, *choices(kernel, d, traits, order, blocks=True)]
                    cases += [Case(f"block_{kernel}", 90, tile=tile, axes=2 + order, **common)
                              for tile in found if may_describe(kernel, tile, traits)]
    return cases


def may_describe(kernel: str, tile: Tile | None, traits: tuple) -> bool:
    "Block kernels that walk keys take no descriptors where keys are masked."
    return tile is None or not tile.tma or kernel == "dkv" or "HAS_KEY_MASK" not in traits


def capped() -> list[Case]:
    "Scores within a cap: every kernel with what most often comes with one, and the tuner's tiles."
    causal, rest = ("CAUSAL", "CAPPED"), ("HAS_KEY_MASK", "HAS_DROPOUT", "CAPPED")
    cases = [Case(kernel, arch, head_dim=d, order=(d == 64) == (arch == 80), traits=causal)
             for kernel in LOOPS for arch in (80, 90, 100) for d in (64, 128)]
    cases += [Case(kernel, arch, head_dim=d, order=d == 128, axes=2, traits=causal)
              for kernel in BLOCKS for arch in (80, 90, 100) for d in (64, 128)]
    cases += [Case(kernel, 90, head_dim=d, order=d == 64, traits=rest)
              for kernel in LOOPS for d in (64, 128)]
    return cases + capped_groups() + capped_tiles()


def capped_groups() -> list[Case]:
    "The largest groups whose gradients one kernel takes, with all traits at once."
    sizes = ((80, 64, 128), (80, 128, 64), (90, 64, 128), (90, 128, 128), (100, 128, 128))
    cases = [Case("small", arch, head_dim=d, rows=rows, traits=("CAUSAL", "HAS_KEY_MASK", "CAPPED"))
             for arch, d, rows in sizes]
    return cases + [Case("small", 90, head_dim=d, rows=d, traits=tuple(WORDS)) for d in (64, 128)]


def capped_tiles() -> list[Case]:
    "What the tuner may take beside the defaults."
    found = []
    for kernel, d, order in product(LOOPS, (64, 128), (False, True)):
        traits = ("CAPPED",) if kernel == "dkv" else ("CAUSAL", "CAPPED")
        found += [Case(kernel, 90, head_dim=d, order=order, traits=traits, tile=tile)
                  for tile in choices(kernel, d, traits, order, blocks=False)]
    return found


def producers_of_other_modes() -> list[Case]:
    return [Case("forward", 90, dtype, d, mode=mode, tile=tile)
            for tile, (dtype, d, mode) in product(
                PRODUCERS, (("bf16", 128, "keys"), ("fp16", 64, "longnet")))]


def matrix() -> list[Case]:
    "All of it; most only where everything is tested."
    cases = kernels_of_segments() + small_groups() + kernels_of_blocks() + tiles_of_the_tuner()
    cases += producers_of_other_modes() + blocks_of_the_gpu_tool() + capped()
    return list(dict.fromkeys(cases))


def sampled(cases: list[Case]) -> list[Case]:
    "One of every kernel, of an architecture in turn, and one with a producer."
    found = []
    for kernel, arch in zip(KERNELS, cycle((90, 80, 100))):
        some = [case for case in cases if (case.kernel, case.arch) == (kernel, arch)]
        found.append(some[len(some) // 2])
    return [*found, next(case for case in cases if case.tile and case.tile.producer)]
