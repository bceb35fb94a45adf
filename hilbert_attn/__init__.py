"""Exact sparse attention along space-filling curves. The notebooks in nbs/ explain all of it."""
__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

# Their operators may be named by a saved graph, which this import has to make known.
from hilbert_attn import autograd as autograd, cross as cross, points as points

from hilbert_attn.backends import detect_gpu_architecture, explain_backend, set_backend
from hilbert_attn.blocks.planner import block_lists
from hilbert_attn.blocks.schedule import SparsePatternConfig

# Layers.
from hilbert_attn.branched import DilatedAttention, HilbertAttentionMixin, HilbertDilatedAttention
from hilbert_attn.common import after_import

# Curves.
from hilbert_attn.curves import curve_order, hilbert_decode, hilbert_encode, inverse_order
from hilbert_attn.modules import HilbertAttentionCore
from hilbert_attn.multihead import MultiheadDilatedAttention

# Patterns.
from hilbert_attn.patterns import DilatedPattern, NeighborhoodPattern, SegmentPattern, SlidePattern
from hilbert_attn.patterns import TilesSharedPattern, WindowPattern
from hilbert_attn.patterns import attention_mask, create_dilated_mask
from hilbert_attn.reference import merge_attention

# Functions of q, k, v; what they give follows `return_lse`, which type checkers read there.
if TYPE_CHECKING:
    from hilbert_attn.overloads import block_sparse_attention, block_sparse_ring_attention
    from hilbert_attn.overloads import dilated_attention, hilbert_attention
    from hilbert_attn.overloads import hilbert_slide_attention, hilbert_window_attention
    from hilbert_attn.overloads import neighborhood_attention, ring_attention
    from hilbert_attn.overloads import ring_dilated_attention, tiles_shared_attention
    from hilbert_attn.overloads import window_attention
else:
    from hilbert_attn.backends import hilbert_attention
    from hilbert_attn.block_sparse import block_sparse_attention
    from hilbert_attn.dilated import dilated_attention
    from hilbert_attn.local import hilbert_slide_attention, hilbert_window_attention
    from hilbert_attn.local import neighborhood_attention, tiles_shared_attention
    from hilbert_attn.local import window_attention

__all__ = [
    # functions of q, k, v
    "hilbert_attention", "dilated_attention", "block_sparse_attention", "window_attention",
    "neighborhood_attention", "hilbert_window_attention", "hilbert_slide_attention",
    "tiles_shared_attention", "ring_attention", "ring_dilated_attention",
    "block_sparse_ring_attention", "shard_sequence", "unshard_sequence", "merge_attention",
    # layers
    "HilbertAttentionCore", "HilbertAttentionMixin", "DilatedAttention",
    "MultiheadDilatedAttention", "HilbertDilatedAttention",
    # the configuration and the factory
    "AttentionConfig", "create_dilated_attention", "create_multihead_dilated_attention",
    "create_self_attention",
    # patterns
    "SegmentPattern", "DilatedPattern", "WindowPattern", "NeighborhoodPattern", "SlidePattern",
    "TilesSharedPattern", "SparsePatternConfig", "block_lists", "attention_mask",
    "create_dilated_mask",
    # curves
    "curve_order", "inverse_order", "hilbert_encode", "hilbert_decode",
    # what runs, and why
    "explain_backend", "explain_attention_type", "set_backend", "detect_gpu_architecture",
    # models that exist
    "HilbertSettings", "use_hilbert_attention", "convert_attention", "use_hilbert_processor",
]

_LATER = {  # module -> names of `__all__` that many programs do without: imported when asked for
    "api": "create_dilated_attention create_multihead_dilated_attention create_self_attention "
           "explain_attention_type",
    "block_ring": "block_sparse_ring_attention",
    "config": "AttentionConfig",
    "integrations": "HilbertSettings convert_attention use_hilbert_attention use_hilbert_processor",
    "ring": "ring_attention ring_dilated_attention",
    "ring_exchange": "shard_sequence unshard_sequence",
}
_ELSEWHERE = {  # module -> names that can be had from here too, imported when asked for
    "compat": "HilbertAttentionFunction HilbertAttentionCoreWithSDPA HilbertAttentionTritonWrapper "
              "HilbertAttentionTritonFixed RingDilatedAttentionHilbertCore "
              "RingDilatedAttentionHilbertOptimizedFixed PostPatternHilbertOptimizer "
              "BlockSparseRingDilatedAttentionHilbertPostPattern StandardizedRingConfig "
              "create_standardized_ring_attention create_hilbert_mapping "
              "hilbert_attention_kernel standard_attention_kernel",
    "api": "ATTENTION_TYPES AttentionChoice AttentionType register_attention_type which_when",
    "backends": "BACKENDS BackendChoice GPUArchitecture",
    "block_layers": "BlockSparseAttention RingBlockSparseAttention",
    "blocks.engine": "block_stats",
    "blocks.lists": "BlockLists",
    "cross": "hilbert_cross_attention",
    "curves": "CURVES Locality locality segment_map",
    "decoding": "decode_attention",
    "integrations": "convert_vit hilbert_attention_everywhere register_hilbert_attention",
    "modules": "HilbertOrder TransformerBlock apply_rotary rotary_embedding",
    "multihead": "DilatedSelfAttention",
    "patterns": "COMBINES CrossPattern DILATION_MODES",
    "points": "OrderSchedule PatchPattern point_attention point_order",
    "reference": "reference_attention",
    "ring_layers": "RingDilatedAttention",
    "ring_plan": "plan_ring",
    "schedule": "LayerSchedule",
}
_HOMES = {
    name: module
    for table in (_LATER, _ELSEWHERE)
    for module, names in table.items()
    for name in names.split()
}


_MODULES = {path.partition(".")[0] for table in (_LATER, _ELSEWHERE) for path in table}


def __dir__() -> list[str]: return sorted({*globals(), *_HOMES, *_MODULES})


if TYPE_CHECKING:
    from hilbert_attn.api import ATTENTION_TYPES as ATTENTION_TYPES
    from hilbert_attn.api import AttentionChoice as AttentionChoice
    from hilbert_attn.api import AttentionType as AttentionType
    from hilbert_attn.api import create_dilated_attention as create_dilated_attention
    from hilbert_attn.api import (
        create_multihead_dilated_attention as create_multihead_dilated_attention,
    )
    from hilbert_attn.api import create_self_attention as create_self_attention
    from hilbert_attn.api import explain_attention_type as explain_attention_type
    from hilbert_attn.api import register_attention_type as register_attention_type
    from hilbert_attn.api import which_when as which_when
    from hilbert_attn.backends import BACKENDS as BACKENDS
    from hilbert_attn.backends import BackendChoice as BackendChoice
    from hilbert_attn.backends import GPUArchitecture as GPUArchitecture
    from hilbert_attn.block_layers import BlockSparseAttention as BlockSparseAttention
    from hilbert_attn.block_layers import RingBlockSparseAttention as RingBlockSparseAttention
    from hilbert_attn.blocks.lists import BlockLists as BlockLists
    from hilbert_attn.blocks.engine import block_stats as block_stats
    from hilbert_attn.compat import (
        BlockSparseRingDilatedAttentionHilbertPostPattern
        as BlockSparseRingDilatedAttentionHilbertPostPattern,
    )
    from hilbert_attn.compat import HilbertAttentionCoreWithSDPA as HilbertAttentionCoreWithSDPA
    from hilbert_attn.compat import HilbertAttentionFunction as HilbertAttentionFunction
    from hilbert_attn.compat import HilbertAttentionTritonFixed as HilbertAttentionTritonFixed
    from hilbert_attn.compat import HilbertAttentionTritonWrapper as HilbertAttentionTritonWrapper
    from hilbert_attn.compat import PostPatternHilbertOptimizer as PostPatternHilbertOptimizer
    from hilbert_attn.compat import (
        RingDilatedAttentionHilbertCore as RingDilatedAttentionHilbertCore,
    )
    from hilbert_attn.compat import (
        RingDilatedAttentionHilbertOptimizedFixed as RingDilatedAttentionHilbertOptimizedFixed,
    )
    from hilbert_attn.compat import StandardizedRingConfig as StandardizedRingConfig
    from hilbert_attn.compat import create_hilbert_mapping as create_hilbert_mapping
    from hilbert_attn.compat import (
        create_standardized_ring_attention as create_standardized_ring_attention,
    )
    from hilbert_attn.compat import hilbert_attention_kernel as hilbert_attention_kernel
    from hilbert_attn.compat import standard_attention_kernel as standard_attention_kernel
    from hilbert_attn.config import AttentionConfig as AttentionConfig
    from hilbert_attn.curves import CURVES as CURVES
    from hilbert_attn.curves import Locality as Locality
    from hilbert_attn.curves import locality as locality
    from hilbert_attn.curves import segment_map as segment_map
    from hilbert_attn.integrations import HilbertSettings as HilbertSettings
    from hilbert_attn.integrations import convert_attention as convert_attention
    from hilbert_attn.integrations import convert_vit as convert_vit
    from hilbert_attn.integrations import (
        hilbert_attention_everywhere as hilbert_attention_everywhere,
    )
    from hilbert_attn.integrations import register_hilbert_attention as register_hilbert_attention
    from hilbert_attn.integrations import use_hilbert_attention as use_hilbert_attention
    from hilbert_attn.integrations import use_hilbert_processor as use_hilbert_processor
    from hilbert_attn.modules import HilbertOrder as HilbertOrder
    from hilbert_attn.modules import TransformerBlock as TransformerBlock
    from hilbert_attn.modules import apply_rotary as apply_rotary
    from hilbert_attn.modules import rotary_embedding as rotary_embedding
    from hilbert_attn.multihead import DilatedSelfAttention as DilatedSelfAttention
    from hilbert_attn.patterns import COMBINES as COMBINES
    from hilbert_attn.patterns import CrossPattern as CrossPattern
    from hilbert_attn.patterns import DILATION_MODES as DILATION_MODES
    from hilbert_attn.overloads import decode_attention as decode_attention
    from hilbert_attn.overloads import hilbert_cross_attention as hilbert_cross_attention
    from hilbert_attn.overloads import point_attention as point_attention
    from hilbert_attn.points import OrderSchedule as OrderSchedule
    from hilbert_attn.points import PatchPattern as PatchPattern
    from hilbert_attn.points import point_order as point_order
    from hilbert_attn.reference import reference_attention as reference_attention
    from hilbert_attn.ring_exchange import shard_sequence as shard_sequence
    from hilbert_attn.ring_exchange import unshard_sequence as unshard_sequence
    from hilbert_attn.ring_plan import plan_ring as plan_ring
    from hilbert_attn.ring_layers import RingDilatedAttention as RingDilatedAttention
    from hilbert_attn.schedule import LayerSchedule as LayerSchedule
else:
    def __getattr__(name: str) -> Any:
        from importlib import import_module
        if name in _MODULES: return import_module(f"hilbert_attn.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"hilbert_attn.{_HOMES[name]}"), name)
        globals()[name] = found  # the next time, nobody asks here
        return found


def _once_imported(module: str, ours: str, function: str) -> None:
    "Calls a function of our integrations as soon as another package's module is there."
    def call() -> None:
        from importlib import import_module
        getattr(import_module(f"hilbert_attn.integrations.{ours}"), function)()
    after_import(module, call)


_once_imported("transformers.modeling_utils", "transformers", "register_quietly")
_once_imported("peft.peft_model", "transformers", "extend_peft")
_once_imported("diffusers.models.modeling_utils", "diffusers", "extend_diffusers")
