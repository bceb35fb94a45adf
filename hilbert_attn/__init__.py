"""Exact sparse attention along space-filling curves. The notebooks in nbs/ explain all of it."""
__version__ = "0.1.0"

from hilbert_attn.api import (ATTENTION_TYPES, AttentionChoice, AttentionType, HilbertAttentionTritonFixed, RingDilatedAttentionHilbertCore,
                              RingDilatedAttentionHilbertOptimizedFixed, StandardizedRingConfig, create_dilated_attention,
                              create_multihead_dilated_attention, create_standardized_ring_attention, explain_attention_type, register_attention_type,
                              which_when)
from hilbert_attn.autograd import HilbertAttentionFunction
from hilbert_attn.backends import BACKENDS, BackendChoice, GPUArchitecture, detect_gpu_architecture, explain_backend, hilbert_attention, set_backend
from hilbert_attn.curves import (CURVES, Locality, create_hilbert_mapping, curve_order, hilbert_decode, hilbert_encode, inverse_order, locality,
                                 segment_map)
from hilbert_attn.dilated import dilated_attention
from hilbert_attn.modules import (DilatedAttention, DilatedSelfAttention, HilbertAttentionCore, HilbertAttentionCoreWithSDPA, HilbertAttentionMixin,
                                  HilbertAttentionTritonWrapper, HilbertDilatedAttention, HilbertOrder, MultiheadDilatedAttention,
                                  RingDilatedAttention, TransformerBlock, apply_rotary, rotary_embedding)
from hilbert_attn.patterns import (COMBINES, DILATION_MODES, DilatedPattern, NeighborhoodPattern, SegmentPattern, SlidePattern, TilesSharedPattern,
                                   WindowPattern, attention_mask, create_dilated_mask)
from hilbert_attn.reference import merge_attention, reference_attention
from hilbert_attn.ring import ring_attention, ring_dilated_attention, shard_sequence, unshard_sequence

__all__ = [
    "ATTENTION_TYPES", "AttentionChoice", "AttentionType", "BACKENDS", "BackendChoice", "COMBINES", "CURVES", "DILATION_MODES",
    "DilatedAttention", "DilatedPattern", "DilatedSelfAttention", "GPUArchitecture", "HilbertAttentionCore", "HilbertAttentionCoreWithSDPA",
    "HilbertAttentionFunction", "HilbertAttentionMixin", "HilbertAttentionTritonFixed", "HilbertAttentionTritonWrapper",
    "HilbertDilatedAttention", "HilbertOrder", "Locality", "MultiheadDilatedAttention", "NeighborhoodPattern", "RingDilatedAttention",
    "RingDilatedAttentionHilbertCore", "RingDilatedAttentionHilbertOptimizedFixed", "SegmentPattern", "SlidePattern", "StandardizedRingConfig",
    "TilesSharedPattern", "TransformerBlock", "WindowPattern", "apply_rotary", "attention_mask", "create_dilated_attention",
    "create_dilated_mask", "create_hilbert_mapping", "create_multihead_dilated_attention", "create_standardized_ring_attention", "curve_order",
    "detect_gpu_architecture", "dilated_attention", "explain_attention_type", "explain_backend", "hilbert_attention", "hilbert_decode",
    "hilbert_encode", "inverse_order", "locality", "merge_attention", "reference_attention", "register_attention_type", "ring_attention",
    "ring_dilated_attention", "rotary_embedding", "segment_map", "set_backend", "shard_sequence", "unshard_sequence", "which_when",
]
