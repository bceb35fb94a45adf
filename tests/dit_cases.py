"""Small diffusion transformers with random weights, inputs on any grid, and masks made by hand."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from hilbert_attn import curve_order

WORDS = 5


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def words(batch, width, count=WORDS):
    return rand(batch, count, width)


def flux(grid, batch=1):
    ids = torch.cartesian_prod(
        *(torch.arange(side) for side in (1, *grid))
    )
    return dict(
        hidden_states=rand(batch, len(ids), 4),
        encoder_hidden_states=words(batch, 32),
        pooled_projections=rand(batch, 32),
        timestep=torch.full((batch,), 0.5).double(),
        img_ids=ids.double(),
        txt_ids=torch.zeros(WORDS, 3).double(),
    )


def qwen(grid, batch=1):
    mask = torch.ones(batch, WORDS, dtype=torch.bool)
    mask[:, -2:] = False  # padding
    return dict(
        hidden_states=rand(batch, grid[0] * grid[1], 16),
        encoder_hidden_states=words(batch, 16),
        encoder_hidden_states_mask=mask,
        timestep=torch.full((batch,), 0.5).double(),
        img_shapes=[[(1, *grid)]] * batch,
    )


def wan(grid, batch=1):
    frames, height, width = grid
    return dict(
        hidden_states=rand(batch, 4, frames, 2 * height, 2 * width),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=words(batch, 16),
    )


def hunyuan(grid, batch=1):
    mask = torch.ones(batch, WORDS)
    mask[:, -1] = 0
    frames, height, width = grid
    return dict(
        hidden_states=rand(batch, 4, frames, 2 * height, 2 * width),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=words(batch, 16),
        pooled_projections=rand(batch, 8),
        encoder_attention_mask=mask,
        guidance=torch.full((batch,), 6.0).double(),
    )


def ltx(grid, batch=1):
    frames, height, width = grid
    return dict(
        hidden_states=rand(batch, frames * height * width, 4),
        encoder_hidden_states=words(batch, 16),
        timestep=torch.full((batch,), 500.0),
        encoder_attention_mask=torch.ones(batch, WORDS).bool(),
        num_frames=frames,
        height=height,
        width=width,
    )


def sd3(grid, batch=1):
    return dict(
        hidden_states=rand(batch, 4, 2 * grid[0], 2 * grid[1]),
        encoder_hidden_states=words(batch, 32),
        pooled_projections=rand(batch, 64),
        timestep=torch.full((batch,), 500.0),
    )


def cogvideox(grid, batch=1):
    frames, height, width = grid
    return dict(
        hidden_states=rand(batch, frames, 4, 2 * height, 2 * width),
        encoder_hidden_states=words(batch, 8),
        timestep=torch.full((batch,), 500.0),
    )


def mochi(grid, batch=1):
    frames, height, width = grid
    mask = torch.ones(batch, WORDS).bool()
    mask[:, -1] = False
    return dict(
        hidden_states=rand(batch, 4, frames, 2 * height, 2 * width),
        encoder_hidden_states=words(batch, 16),
        timestep=torch.full((batch,), 500.0),
        encoder_attention_mask=mask,
    )


def lumina(grid, batch=1):
    return dict(
        hidden_states=rand(batch, 4, 2 * grid[0], 2 * grid[1]),
        encoder_hidden_states=words(batch, 16),
        timestep=torch.full((batch,), 0.5).double(),
        encoder_attention_mask=torch.ones(batch, WORDS).bool(),
    )


def aura(grid, batch=1):
    return dict(
        hidden_states=rand(batch, 4, 2 * grid[0], 2 * grid[1]),
        encoder_hidden_states=words(batch, 16),
        timestep=torch.full((batch,), 0.5).double(),
    )


def motion(grid, batch=1):
    return dict(
        sample=rand(batch, 4, grid[0], 8, 8),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=words(batch * grid[0], 16),
    )


def less(inputs, *names):
    "Inputs without some of them."
    return lambda grid, batch=1: {
        name: value
        for name, value in inputs(grid, batch).items()
        if name not in names
    }


def flux2(grid, batch=1):
    given = less(flux, "pooled_projections")(grid, batch)
    for name in ("img_ids", "txt_ids"):
        given[name] = F.pad(given[name], (0, 1))
    return given | dict(guidance=torch.full((batch,), 4.0).double())


def hunyuan_image(grid, batch=1):
    mask = torch.ones(batch, WORDS)
    mask[:, -1] = 0
    return dict(
        hidden_states=rand(batch, 4, *grid),
        timestep=torch.full((batch,), 500.0).double(),
        encoder_hidden_states=words(batch, 16),
        encoder_attention_mask=mask,
    )


@dataclass(frozen=True)
class Case:
    "A model class, and what the test knows of it."

    inputs: Callable
    options: dict  # of the model
    layers: int  # of self-attention
    grids: tuple  # two, to be seen in turn
    text: str = "none"  # "before" or "after" the cells
    more: int = 0  # tokens beside the words
    shift: float = 0.4  # of tiles, from layer to layer; 0 where layers run in another order


HEADS = dict(num_attention_heads=2, in_channels=4)
FLAT, DEEP = ((4, 6), (6, 5)), ((2, 4, 3), (3, 2, 5))
OF_FLUX = dict(
    HEADS,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    joint_attention_dim=32,
)
CASES = {
    "FluxTransformer2DModel": Case(
        flux,
        dict(
            HEADS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
        2,
        FLAT,
        "before",
    ),
    "QwenImageTransformer2DModel": Case(
        qwen,
        dict(
            HEADS,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        2,
        FLAT,
        "before",
    ),
    "WanTransformer3DModel": Case(
        wan,
        dict(
            HEADS,
            attention_head_dim=12,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        ),
        2,
        DEEP,
    ),
    "HunyuanVideoTransformer3DModel": Case(
        hunyuan,
        dict(
            HEADS,
            out_channels=4,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        ),
        2,
        DEEP,
        "after",
    ),
    "LTXVideoTransformer3DModel": Case(
        ltx,
        dict(
            HEADS,
            out_channels=4,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=16,
            qk_norm="rms_norm_across_heads",
        ),
        2,
        DEEP,
    ),
    "SD3Transformer2DModel": Case(
        sd3,
        dict(
            HEADS,
            sample_size=32,
            patch_size=2,
            num_layers=2,
            attention_head_dim=8,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=64,
            out_channels=4,
        ),
        2,
        FLAT,
        "after",
    ),
    "CogVideoXTransformer3DModel": Case(
        cogvideox,
        dict(
            HEADS,
            attention_head_dim=8,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=8,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=WORDS,
            use_rotary_positional_embeddings=True,
        ),
        2,
        DEEP,
        "before",
    ),
    "MochiTransformer3DModel": Case(
        mochi,
        dict(
            HEADS,
            patch_size=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            qk_norm="rms_norm",
            text_embed_dim=16,
            time_embed_dim=4,
            max_sequence_length=WORDS,
        ),
        2,
        DEEP,
        "after",
        -1,
    ),
    "Lumina2Transformer2DModel": Case(
        lumina,
        dict(
            in_channels=4,
            sample_size=16,
            patch_size=2,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(64, 64, 64),
            cap_feat_dim=16,
        ),
        2,
        FLAT,
        "before",
    ),
    "AuraFlowTransformer2DModel": Case(
        aura,
        dict(
            HEADS,
            sample_size=32,
            patch_size=2,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            joint_attention_dim=16,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=256,
        ),
        2,
        FLAT,
        "before",
        8,
    ),
    "Flux2Transformer2DModel": Case(
        flux2,
        OF_FLUX
        | dict(
            timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4)
        ),
        2,
        FLAT,
        "before",
    ),
    "ChromaTransformer2DModel": Case(
        less(flux, "pooled_projections"),
        OF_FLUX
        | dict(
            axes_dims_rope=[4, 4, 8],
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        2,
        FLAT,
        "before",
    ),
    "OvisImageTransformer2DModel": Case(
        less(flux, "pooled_projections"),
        OF_FLUX | dict(axes_dims_rope=(4, 4, 8), out_channels=4),
        2,
        FLAT,
        "before",
    ),
    "LongCatImageTransformer2DModel": Case(
        less(flux, "pooled_projections"),
        OF_FLUX
        | dict(axes_dims_rope=[4, 4, 8], pooled_projection_dim=32),
        2,
        FLAT,
        "before",
    ),
    "HunyuanImageTransformer2DModel": Case(
        hunyuan_image,
        dict(
            HEADS,
            out_channels=4,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(4, 4),
        ),
        2,
        FLAT,
        "after",
    ),
    "SkyReelsV2Transformer3DModel": Case(
        wan,
        dict(
            HEADS,
            attention_head_dim=12,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        2,
        DEEP,
    ),
    "UNetMotionModel": Case(
        motion,
        dict(
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=(
                "CrossAttnDownBlockMotion",
                "DownBlockMotion",
            ),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            layers_per_block=1,
            cross_attention_dim=16,
            num_attention_heads=4,
            motion_num_attention_heads=4,
        ),
        14,
        ((7,), (10,)),
        shift=0.0,
    ),
}


def built(diffusers, name):
    torch.manual_seed(0)
    model = (
        getattr(diffusers, name)(**CASES[name].options).double().eval()
    )
    with torch.no_grad():
        for p in (
            model.parameters()
        ):  # no layer starts at zero, or as the identity
            p.add_(0.05 * torch.randn_like(p))
    return model


def given(name, which=0, batch=1):
    torch.manual_seed(which)
    return CASES[name].inputs(CASES[name].grids[which], batch)


def loaded(kind, folder):
    "From what was saved. diffusers wants accelerate where modules are to stay in float32."
    own, kind._keep_in_fp32_modules = kind._keep_in_fp32_modules, None
    try:
        return kind.from_pretrained(folder)
    finally:
        kind._keep_in_fp32_modules = own


def tiles_mask(grid, tiles, offset, text, text_tokens):
    "Who sees whom, by the definition: tiles of positions that start at `offset`, and the text."
    order = curve_order(grid, "hilbert").tolist()
    cells = len(order)
    sizes = [cells // tiles + (i < cells % tiles) for i in range(tiles)]
    tile_of_place = [
        i for i, size in enumerate(sizes) for _ in range(size)
    ]
    tile = torch.empty(cells, dtype=torch.int64)
    for position, token in enumerate(order):
        tile[token] = tile_of_place[(position - offset) % cells]
    mask = torch.ones(
        cells + text_tokens, cells + text_tokens, dtype=torch.bool
    )
    first = text_tokens if text == "before" else 0
    mask[first : first + cells, first : first + cells] = (
        tile[:, None] == tile
    )
    return mask


class Masked(TorchFunctionMode):
    "Gives a model's own attention our masks, one after another, where the lengths fit."

    def __init__(self, masks):
        super().__init__()
        self.masks, self.calls = list(masks), 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q = kwargs["query"] if "query" in kwargs else args[0]
        k = kwargs["key"] if "key" in kwargs else args[1]
        mask = self.masks[self.calls % len(self.masks)]
        if (q.shape[2], k.shape[2]) != tuple(mask.shape):
            return func(*args, **kwargs)
        own = kwargs.get("attn_mask")
        kwargs["attn_mask"] = mask if own is None else mask & own
        self.calls += 1
        return func(*args, **kwargs)
