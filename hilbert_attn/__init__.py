"""Exact sparse attention along space-filling curves. The notebooks in nbs/ explain all of it."""
__version__ = "0.1.0"

from hilbert_attn.backends import (BACKENDS, BackendChoice, GPUArchitecture, detect_gpu_architecture, explain_backend, hilbert_attention,
                                   set_backend)
from hilbert_attn.curves import (CURVES, Locality, create_hilbert_mapping, curve_order, hilbert_decode, hilbert_encode, inverse_order, locality,
                                 segment_map)
from hilbert_attn.dilated import dilated_attention
from hilbert_attn.modules import HilbertAttentionCore
from hilbert_attn.patterns import (COMBINES, DILATION_MODES, DilatedPattern, NeighborhoodPattern, SegmentPattern, SlidePattern, TilesSharedPattern, WindowPattern,
                                   attention_mask, create_dilated_mask)
from hilbert_attn.reference import merge_attention, reference_attention

__all__ = [
    "BACKENDS", "BackendChoice", "COMBINES", "CURVES", "DILATION_MODES", "DilatedPattern", "GPUArchitecture", "HilbertAttentionCore", "Locality", "NeighborhoodPattern",
    "SegmentPattern", "SlidePattern", "TilesSharedPattern", "WindowPattern", "attention_mask", "create_dilated_mask", "create_hilbert_mapping",
    "curve_order", "detect_gpu_architecture", "dilated_attention", "explain_backend", "hilbert_attention", "hilbert_decode", "hilbert_encode", "inverse_order",
    "locality", "merge_attention", "reference_attention", "segment_map", "set_backend",
]
