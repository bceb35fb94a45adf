"""Models that exist already: of transformers, PyTorch, timm, torchvision and diffusers."""
from hilbert_attn.integrations.anywhere import hilbert_attention_everywhere
from hilbert_attn.integrations.cells import (
    DiTSettings,
    joint_attention,
)
from hilbert_attn.integrations.diffusers import (
    HilbertAttnProcessor,
    use_hilbert_processor,
)
from hilbert_attn.integrations.dit import (
    use_dense_attention,
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
    "DiTSettings",
    "FusedQKVAttention",
    "HilbertAttnProcessor",
    "HilbertOptions",
    "HilbertSettings",
    "PrefixAttention",
    "RotaryQKVAttention",
    "convert_attention",
    "convert_vit",
    "hilbert_attention_everywhere",
    "joint_attention",
    "prefix_attention",
    "register_hilbert_attention",
    "use_dense_attention",
    "use_hilbert_attention",
    "use_hilbert_processor",
    "vit_geometry",
]
