"""Written by tools/make_overloads.py from the functions' own signatures."""
from collections.abc import Sequence
from typing import Literal, overload

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask

from hilbert_attn.blocks.lists import BlockLists

@overload
def hilbert_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: int | Sequence[int] | None = ...,
    curve: str | None = ...,
    order: Tensor | None = ...,
    segment_size: int | None = ...,
    dilation_rate: int = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def hilbert_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: int | Sequence[int] | None = ...,
    curve: str | None = ...,
    order: Tensor | None = ...,
    segment_size: int | None = ...,
    dilation_rate: int = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def hilbert_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: int | Sequence[int] | None = ...,
    curve: str | None = ...,
    order: Tensor | None = ...,
    segment_size: int | None = ...,
    dilation_rate: int = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...

@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    combine: str = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    grid: int | Sequence[int] | None = ...,
    curve: str | None = ...,
    order: Tensor | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    combine: str = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    grid: int | Sequence[int] | None = ...,
    curve: str | None = ...,
    order: Tensor | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    combine: str = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    grid: int | Sequence[int] | None = ...,
    curve: str | None = ...,
    order: Tensor | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...

@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | BlockLists | BlockMask,
    *,
    block_size: int | tuple[int, int] | None = ...,
    order: Tensor | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | BlockLists | BlockMask,
    *,
    block_size: int | tuple[int, int] | None = ...,
    order: Tensor | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | BlockLists | BlockMask,
    *,
    block_size: int | tuple[int, int] | None = ...,
    order: Tensor | None = ...,
    causal: bool = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...

@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    window: int | Sequence[int],
    *,
    shift: int | Sequence[int] = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    window: int | Sequence[int],
    *,
    shift: int | Sequence[int] = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    window: int | Sequence[int],
    *,
    shift: int | Sequence[int] = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...

@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = ...,
    causal: bool | Sequence[bool] = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = ...,
    causal: bool | Sequence[bool] = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = ...,
    causal: bool | Sequence[bool] = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...

@overload
def hilbert_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    window: int,
    *,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def hilbert_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    window: int,
    *,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def hilbert_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    window: int,
    *,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...

@overload
def hilbert_slide_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    window: int | tuple[int, int],
    *,
    sinks: int = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def hilbert_slide_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    window: int | tuple[int, int],
    *,
    sinks: int = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def hilbert_slide_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: int | Sequence[int],
    window: int | tuple[int, int],
    *,
    sinks: int = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...

@overload
def tiles_shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tiles: int,
    offset: int = ...,
    shared: int = ...,
    grid: int | Sequence[int] | None = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def tiles_shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tiles: int,
    offset: int = ...,
    shared: int = ...,
    grid: int | Sequence[int] | None = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def tiles_shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tiles: int,
    offset: int = ...,
    shared: int = ...,
    grid: int | Sequence[int] | None = ...,
    curve: str | None = ...,
    registers: tuple[Tensor, Tensor] | None = ...,
    key_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...

@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = ...,
    segment_size: int | None = ...,
    dilation_rate: int = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    causal: bool = ...,
    order: Tensor | None = ...,
    layout: str = ...,
    scale: float | None = ...,
    backend: str = ...,
    overlap: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = ...,
    segment_size: int | None = ...,
    dilation_rate: int = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    causal: bool = ...,
    order: Tensor | None = ...,
    layout: str = ...,
    scale: float | None = ...,
    backend: str = ...,
    overlap: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = ...,
    segment_size: int | None = ...,
    dilation_rate: int = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    causal: bool = ...,
    order: Tensor | None = ...,
    layout: str = ...,
    scale: float | None = ...,
    backend: str = ...,
    overlap: bool = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...

@overload
def ring_dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int | None],
    dilation_rates: int | Sequence[int],
    *,
    group: dist.ProcessGroup | DeviceMesh | None = ...,
    combine: str = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    causal: bool = ...,
    order: Tensor | None = ...,
    layout: str = ...,
    scale: float | None = ...,
    backend: str = ...,
    overlap: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def ring_dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int | None],
    dilation_rates: int | Sequence[int],
    *,
    group: dist.ProcessGroup | DeviceMesh | None = ...,
    combine: str = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    causal: bool = ...,
    order: Tensor | None = ...,
    layout: str = ...,
    scale: float | None = ...,
    backend: str = ...,
    overlap: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def ring_dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int | None],
    dilation_rates: int | Sequence[int],
    *,
    group: dist.ProcessGroup | DeviceMesh | None = ...,
    combine: str = ...,
    dilation_mode: str | None = ...,
    offsets: int | Sequence[int] | None = ...,
    causal: bool = ...,
    order: Tensor | None = ...,
    layout: str = ...,
    scale: float | None = ...,
    backend: str = ...,
    overlap: bool = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...

@overload
def block_sparse_ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def block_sparse_ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def block_sparse_ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
