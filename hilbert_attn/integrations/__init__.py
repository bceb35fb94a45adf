"""Models that exist already: of transformers, PyTorch, timm, torchvision and diffusers."""
from hilbert_attn.integrations.anywhere import hilbert_attention_everywhere
from hilbert_attn.integrations.diffusers import (
    HilbertAttnProcessor,
    use_hilbert_processor,
)
from hilbert_attn.integrations.settings import (
    HilbertOptions,
    HilbertSettings,
    PrefixAttention,
    prefix_attention,
)
from hilbert_attn.integrations.transformers import (
    register_hilbert_attention,
    use_hilbert_attention,
)
from hilbert_attn.integrations.vision import (
    FusedQKVAttention,
    RotaryQKVAttention,
    convert_attention,
    convert_vit,
    vit_geometry,
)

__all__ = [
    "FusedQKVAttention",
    "HilbertAttnProcessor",
    "HilbertOptions",
    "HilbertSettings",
    "PrefixAttention",
    "RotaryQKVAttention",
    "convert_attention",
    "convert_vit",
    "hilbert_attention_everywhere",
    "prefix_attention",
    "register_hilbert_attention",
    "use_hilbert_attention",
    "use_hilbert_processor",
    "vit_geometry",
]
