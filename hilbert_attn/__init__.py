"""Exact sparse attention along space-filling curves. The notebooks in nbs/ explain all of it."""
__version__ = "0.1.0"

from typing import TYPE_CHECKING

from hilbert_attn.api import (ATTENTION_TYPES, AttentionChoice, AttentionType, BlockSparseRingDilatedAttentionHilbertPostPattern,
                              HilbertAttentionTritonFixed, RingDilatedAttentionHilbertCore, RingDilatedAttentionHilbertOptimizedFixed,
                              StandardizedRingConfig, create_dilated_attention, create_multihead_dilated_attention,
                              create_standardized_ring_attention, explain_attention_type, register_attention_type, which_when)
from hilbert_attn.autograd import HilbertAttentionFunction
from hilbert_attn.backends import BACKENDS, BackendChoice, GPUArchitecture, detect_gpu_architecture, explain_backend, hilbert_attention, set_backend
from hilbert_attn.block_ring import block_sparse_ring_attention
from hilbert_attn.block_sparse import BlockLists, PostPatternHilbertOptimizer, SparsePatternConfig, block_lists, block_sparse_attention, block_stats
from hilbert_attn.curves import (CURVES, Locality, create_hilbert_mapping, curve_order, hilbert_decode, hilbert_encode, inverse_order, locality,
                                 segment_map)
from hilbert_attn.dilated import dilated_attention
from hilbert_attn.integrations import (HilbertSettings, convert_attention, convert_vit, register_hilbert_attention, use_hilbert_attention,
                                       use_hilbert_processor)
from hilbert_attn.local import hilbert_slide_attention, hilbert_window_attention, neighborhood_attention, tiles_shared_attention, window_attention
from hilbert_attn.modules import (BlockSparseAttention, DilatedAttention, DilatedSelfAttention, HilbertAttentionCore, HilbertAttentionCoreWithSDPA,
                                  HilbertAttentionMixin, HilbertAttentionTritonWrapper, HilbertDilatedAttention, HilbertOrder,
                                  MultiheadDilatedAttention, RingBlockSparseAttention, RingDilatedAttention, TransformerBlock, apply_rotary,
                                  rotary_embedding)
from hilbert_attn.patterns import (COMBINES, DILATION_MODES, DilatedPattern, NeighborhoodPattern, SegmentPattern, SlidePattern, TilesSharedPattern,
                                   WindowPattern, attention_mask, create_dilated_mask)
from hilbert_attn.reference import merge_attention, reference_attention
from hilbert_attn.ring import plan_ring, ring_attention, ring_dilated_attention, shard_sequence, unshard_sequence

__all__ = [
    "ATTENTION_TYPES", "AttentionChoice", "AttentionType", "BACKENDS", "BackendChoice", "BlockLists", "BlockSparseAttention",
    "BlockSparseRingDilatedAttentionHilbertPostPattern", "COMBINES", "CURVES", "DILATION_MODES", "DilatedAttention", "DilatedPattern",
    "DilatedSelfAttention", "GPUArchitecture", "HilbertAttentionCore", "HilbertAttentionCoreWithSDPA", "HilbertAttentionFunction",
    "HilbertAttentionMixin", "HilbertAttentionTritonFixed", "HilbertAttentionTritonWrapper", "HilbertDilatedAttention", "HilbertOrder",
    "HilbertSettings", "Locality", "MultiheadDilatedAttention", "NeighborhoodPattern", "PostPatternHilbertOptimizer",
    "RingBlockSparseAttention", "RingDilatedAttention", "RingDilatedAttentionHilbertCore", "RingDilatedAttentionHilbertOptimizedFixed",
    "SegmentPattern", "SlidePattern", "SparsePatternConfig", "StandardizedRingConfig", "TilesSharedPattern", "TransformerBlock",
    "WindowPattern", "apply_rotary", "attention_mask", "block_lists", "block_sparse_attention", "block_sparse_ring_attention", "block_stats",
    "convert_attention", "convert_vit", "create_dilated_attention", "create_dilated_mask", "create_hilbert_mapping",
    "create_multihead_dilated_attention", "create_standardized_ring_attention", "curve_order", "detect_gpu_architecture", "dilated_attention",
    "explain_attention_type", "explain_backend", "hilbert_attention", "hilbert_attention_kernel", "hilbert_decode", "hilbert_encode",
    "hilbert_slide_attention", "hilbert_window_attention", "inverse_order", "locality", "merge_attention", "neighborhood_attention",
    "plan_ring", "reference_attention", "register_attention_type", "register_hilbert_attention", "ring_attention", "ring_dilated_attention",
    "rotary_embedding", "segment_map", "set_backend", "shard_sequence", "standard_attention_kernel", "tiles_shared_attention",
    "unshard_sequence", "use_hilbert_attention", "use_hilbert_processor", "which_when", "window_attention",
]

_LAZY = {"hilbert_attention_kernel": "hilbert_attn.kernels.forward", "standard_attention_kernel": "hilbert_attn.kernels.forward"}  # these import Triton

if TYPE_CHECKING: from hilbert_attn.kernels.forward import hilbert_attention_kernel, standard_attention_kernel
else:
    def __getattr__(name):
        if name not in _LAZY: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module
        return getattr(import_module(_LAZY[name]), name)
