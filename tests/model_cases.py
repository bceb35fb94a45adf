"""Model classes that are tried, each small and with random weights: `cases()`.

To add one of transformers, name its class, its configuration's class and what is special about it;
to add one of another package, write a `Case`."""

import importlib
from functools import partial
from inspect import signature

import torch
from dit_cases import CASES as DIT_CASES
from dit_cases import given, loaded
from model_trial import Case, rand

from hilbert_attn.integrations import (
    convert_vit,
    use_hilbert_attention,
    use_hilbert_processor,
)

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=50,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=64,
)
GROUPED = dict(num_key_value_heads=2, head_dim=8)
IMAGE = dict(image_size=16, patch_size=4)
EXPERTS = dict(
    num_experts=2,
    num_local_experts=2,
    n_routed_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
COMPILED = {
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "GPT2LMHeadModel",
    "MistralForCausalLM",
    "BertModel",
    "ViTModel",
    "Dinov2Model",
    "SiglipVisionModel",
    "vit_tiny_patch16_224",
    "vit_small_patch16_dinov3",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "WanTransformer3DModel",
    "SD3Transformer2DModel",
}

# transformers: what reads one token after another. Options stand beside SIZES and GROUPED.
READING = """
Llama Mistral Qwen2 Qwen3 Gemma GPT2 Phi Phi3 StableLm Starcoder2 Olmo Olmo2 Olmo3 Cohere Cohere2
Granite Glm Glm4 SmolLM3 Ernie4_5 Helium Nemotron Persimmon Arcee Apertus SeedOss Exaone4 OPT
GPTNeoX GPTNeo GPTJ GPTBigCode CodeGen Bloom Falcon Mpt BioGpt XGLM HunYuanDenseV1 Mamba
Gemma2 Qwen2Moe Qwen3Moe Mixtral Olmoe GraniteMoe GptOss DeepseekV3 Dots1 Jamba MiniMax Ministral
Doge Jais2 Bitnet DiffLlama RecurrentGemma Rwkv Lfm2 VaultGemma Glm4Moe
""".split()
ENCODERS = """
Bert Roberta XLMRoberta Camembert Electra DistilBert Albert ModernBert NomicBert EuroBert RoFormer
Ernie Deberta DebertaV2 MPNet ConvBert RemBert BigBird Longformer Nystromformer Esm
MegatronBert Splinter JinaEmbeddingsV3
""".split()
OTHER_TEXT = ["T5", "Bart", "M2M100"]
SPECIAL = {
    "DistilBert": dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "Albert": dict(embedding_size=16),
    "ModernBert": dict(cls_token_id=1, sep_token_id=2),
    "GPTNeo": dict(attention_types=[[["global"], 2]], num_layers=2),
    "CodeGen": dict(n_ctx=64, rotary_dim=4),
    "GPTJ": dict(rotary_dim=4),
    "DeepseekV3": dict(
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=6,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        head_dim=4,
    ),
    "Dots1": dict(n_shared_experts=1, n_group=1, topk_group=1),
    "Qwen2Moe": dict(use_sliding_window=True, sliding_window=64),
    "Bart": dict(
        is_decoder=True,
        decoder_layers=2,
        d_model=32,
        decoder_attention_heads=4,
    ),
    "XGLM": dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
    "OPT": dict(ffn_dim=64, word_embed_proj_dim=32),
    "T5": dict(d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=64),
    "RoFormer": dict(embedding_size=32),
    "Esm": dict(position_embedding_type="rotary", mask_token_id=3),
    "Longformer": dict(attention_window=8),
}

# transformers: what sees. Class, configuration, options, shapes of two inputs.
SWIN = dict(window_size=2, depths=(1, 1), num_heads=(2, 2), embed_dim=16)
SQUARE, WIDE = (1, 3, 16, 16), (1, 3, 16, 32)
SEEING = {
    "ViTModel": ({}, SQUARE, WIDE),
    "DeiTModel": ({}, SQUARE, WIDE),
    "ViTMSNModel": ({}, SQUARE, WIDE),
    "IJepaModel": ({}, SQUARE, WIDE),
    "Dinov2Model": ({}, SQUARE, WIDE),
    "Dinov2WithRegistersModel": (dict(num_register_tokens=3), SQUARE, WIDE),
    "DINOv3ViTModel": (dict(num_register_tokens=3), SQUARE, WIDE),
    "CLIPVisionModel": ({}, SQUARE, WIDE),
    "SiglipVisionModel": ({}, SQUARE, WIDE),
    "Siglip2VisionModel": ({}, SQUARE, WIDE),
    "ASTModel": (
        dict(
            frequency_stride=3,
            time_stride=3,
            max_length=20,
            num_mel_bins=16,
        ),
        (1, 20, 16),
        None,
    ),
    "VivitModel": (
        dict(num_frames=4, tubelet_size=[2, 4, 4]),
        (1, 4, 3, 16, 16),
        None,
    ),
    "VideoMAEModel": (dict(num_frames=4), (1, 4, 3, 16, 16), None),
    "BeitModel": ({}, SQUARE, None),
    "Data2VecVisionModel": ({}, SQUARE, None),
    "ViTMAEModel": ({}, SQUARE, None),
    "SwinModel": (SWIN, SQUARE, None),
    "Swinv2Model": (SWIN, SQUARE, None),
    "SamVisionModel": (
        dict(
            global_attn_indexes=[0],
            window_size=2,
            output_channels=16,
            mlp_dim=32,
        ),
        SQUARE,
        None,
    ),
    "YolosModel": (
        dict(image_size=(16, 16), num_detection_tokens=4),
        SQUARE,
        None,
    ),
    "TimesformerModel": (dict(num_frames=2), (1, 2, 3, 16, 16), None),
    "Aimv2VisionModel": ({}, SQUARE, None),
    "OwlViTVisionModel": ({}, SQUARE, None),
    "DPTModel": ({}, SQUARE, None),
    "Wav2Vec2Model": (
        dict(
            conv_dim=(8, 8),
            conv_stride=(2, 2),
            conv_kernel=(3, 3),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        (1, 100),
        None,
    ),
}
WITHOUT = {  # what a configuration does not take
    "SwinModel": ("num_attention_heads",),
    "Swinv2Model": ("num_attention_heads",),
    "FalconForCausalLM": ("head_dim",),
}
STATED = {  # what a user has to say where a model does not
    "BeitModel": dict(grid=(4, 4), prefix_tokens=1),
    "Data2VecVisionModel": dict(grid=(4, 4), prefix_tokens=1),
    "Wav2Vec2Model": dict(curve=None),
    "YolosModel": dict(curve=None),
    "DPTModel": dict(grid=(4, 4), prefix_tokens=1),
    "Aimv2VisionModel": dict(grid=(4, 4)),
    "OwlViTVisionModel": dict(grid=(4, 4), prefix_tokens=1),
}


def first_tensor(out) -> torch.Tensor:
    "The main output of a model of any library."
    for name in ("logits", "last_hidden_state", "sample"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return out if isinstance(out, torch.Tensor) else out[0]


def hf_build(model: str, config: str, options: dict):
    hf = importlib.import_module("transformers")
    settings = getattr(hf, config)(**options)
    settings._attn_implementation = "eager"
    return getattr(hf, model)(settings)


def hf_text(model, second):
    words, options = torch.arange(3, 16 if second else 23).repeat(2, 1), {}
    if has_cache(model):
        options["use_cache"] = False
    if hasattr(model, "_orig_mod"):
        options["attention_mask"] = torch.ones_like(words)
    return first_tensor(model(words, **options))


def has_cache(model) -> bool:
    return hasattr(getattr(model, "config", None), "use_cache")


def hf_pixels(shapes, model, second):
    shape, options = shapes[second], {}
    if (
        second
        and "interpolate_pos_encoding"
        in signature(type(model).forward).parameters
    ):
        options["interpolate_pos_encoding"] = True
    return first_tensor(model(rand(*shape), **options))


def hf_reload(model, folder, settings):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def hf_checkpoint(model) -> bool:
    if not model.supports_gradient_checkpointing:
        return False
    model.activation_checkpointing_enable(dict(use_reentrant=False))
    return True


def hf_case(
    model, config, options, call, kind, reshapes=True, **stated
) -> Case:
    options = {
        name: x
        for name, x in options.items()
        if name not in WITHOUT.get(model, ())
    }

    def switch(m, **settings):
        use_hilbert_attention(m, **(settings | stated))

    build = partial(hf_build, model, config, options)
    return Case(
        "transformers",
        model,
        build,
        switch,
        call,
        hf_reload,
        hf_checkpoint,
        kind,
        model in COMPILED,
        reshapes,
    )


def hf_names(name: str, known: set[str]) -> tuple[str, str]:
    "The class of a family, and of its configuration."
    models = [f"{name}ForCausalLM", f"{name}LMHeadModel", f"{name}Model"]
    if name in ENCODERS:
        models = [f"{name}Model"]
    model = next((model for model in models if model in known), models[0])
    text = f"{name}TextConfig"
    return model, text if text in known else f"{name}Config"


def hf_cases() -> list[Case]:
    known = set(
        dir(importlib.import_module("transformers"))
    )  # names; looking them up imports much
    found = []
    for name in (*READING, *ENCODERS, *OTHER_TEXT):
        options = (
            SIZES
            | (GROUPED if name in READING else {})
            | EXPERTS
            | SPECIAL.get(name, {})
        )
        model, config = hf_names(name, known)
        if model in known:
            found.append(hf_case(model, config, options, hf_text, "text"))
    for model, (options, *shapes) in SEEING.items():
        config = model.removesuffix("Model") + "Config"
        call = partial(hf_pixels, shapes)
        found.append(
            hf_case(
                model,
                config,
                SIZES | IMAGE | options,
                call,
                "vision",
                shapes[1] is not None,
                **STATED.get(model, {}),
            )
        )
    return found


# timm

TIMM_NAMES = """
vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 vit_small_patch16_dinov3
vit_small_patch14_reg4_dinov2 eva02_tiny_patch14_224 eva_giant_patch14_224
vit_pe_core_tiny_patch16_384 vit_small_patch16_rope_224 vit_small_patch16_rope_mixed_224
vit_base_patch16_clip_224 vit_base_patch16_siglip_224 vit_mediumd_patch16_reg4_gap_256
vit_betwixt_patch16_rope_reg4_gap_256 beit_base_patch16_224 beitv2_base_patch16_224
swin_tiny_patch4_window7_224 cait_xxs24_224 xcit_nano_12_p16_224 volo_d1_224 mvitv2_tiny
flexivit_small aimv2_large_patch14_224 naflexvit_base_patch16_gap samvit_base_patch16
""".split()
TIMM_SIZES = dict(
    embed_dim=48,
    depth=2,
    num_heads=2,
    img_size=(28, 42),
    patch_size=7,
    num_classes=5,
)


def timm_build(name: str):
    timm = importlib.import_module("timm")
    own = ("swin", "cait", "xcit", "volo", "mvitv2", "naflex", "samvit")
    if name.startswith(own):
        return timm.create_model(name, num_classes=5)
    dynamic = {} if name.startswith("beit") else dict(dynamic_img_size=True)
    return timm.create_model(name, **TIMM_SIZES, **dynamic)


def timm_pixels(model, second):
    return model(rand(1, 3, *((42, 28) if second else (28, 42))))


def timm_case(name: str) -> Case:
    def reload(model, folder, settings):
        again = timm_build(name)
        convert_vit(again, **settings)
        again.load_state_dict(model.state_dict())
        return again

    def checkpoint(model) -> bool:
        if not hasattr(model, "set_grad_checkpointing"):
            return False
        model.set_grad_checkpointing()
        return True

    build = partial(timm_build, name)
    return Case(
        "timm",
        name,
        build,
        convert_vit,
        timm_pixels,
        reload,
        checkpoint,
        "vision",
        name in COMPILED,
    )


# diffusers

LEVELS = dict(
    block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1
)
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SMALL_DIT = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    norm_num_groups=4,
)
ONE_LAYER = dict(num_layers=1, num_attention_heads=2, in_channels=4)
CROSS = dict(**LEVELS, attention_head_dim=2, cross_attention_dim=24)


def unet(diffusers, down=(DOWN, "DownBlock2D"), up=("UpBlock2D", UP), **options):
    "A small one, with the same numbers each time."
    torch.manual_seed(0)
    blocks = dict(down_block_types=down, up_block_types=up)
    return diffusers.UNet2DConditionModel(**CROSS, **blocks, **options).eval()


def latent(second, frames=()) -> torch.Tensor:
    return rand(1, 4, *frames, *((16, 8) if second else (8, 12)))


def prompt(batch=1):
    return rand(batch, 5, 24, seed=2)


def of_time(model, second):
    return model(latent(second), 3)


def with_prompt(model, second):
    return model(latent(second), 3, prompt())


def with_label(
    model, second
):  # squares are all that it puts together again
    square, one = (
        rand(1, 4, *((12, 12) if second else (8, 8))),
        torch.tensor([1]),
    )
    return model(square, one, class_labels=one)


def of_picture(model, second):
    return model(rand(1, 3, *((32, 16) if second else (16, 24))))


def with_condition(model, second):
    hint = rand(1, 3, *(8 * side for side in latent(second).shape[2:]))
    return model(
        latent(second), 3, prompt(), controlnet_cond=hint
    ).mid_block_res_sample


def of_video(model, second):
    return model(latent(second, (3,)), 3, prompt(3))


AUTOENCODER = dict(
    down_block_types=("DownEncoderBlock2D",) * 2,
    norm_num_groups=8,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(16, 32),
)
DIFFUSERS = {  # options and call; what a switch refuses needs no call
    "UNet2DModel": (
        LEVELS
        | dict(
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        of_time,
    ),
    "UNet2DConditionModel": (
        CROSS
        | dict(down_block_types=(DOWN, DOWN), up_block_types=(UP, UP)),
        with_prompt,
    ),
    "ControlNetModel": (
        CROSS
        | dict(
            down_block_types=(DOWN, DOWN),
            conditioning_embedding_out_channels=(8, 16, 16, 16),
        ),
        with_condition,
    ),
    "DiTTransformer2DModel": (
        SMALL_DIT | dict(num_embeds_ada_norm=10),
        with_label,
    ),
    "PixArtTransformer2DModel": (
        SMALL_DIT
        | dict(
            cross_attention_dim=16,
            caption_channels=24,
            use_additional_conditions=False,
            out_channels=8,
        ),
        lambda m, second: m(
            latent(second),
            prompt(),
            torch.tensor([1]),
            dict(resolution=None, aspect_ratio=None),
        ),
    ),
    "Transformer2DModel": (
        dict(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            norm_num_groups=4,
            cross_attention_dim=24,
        ),
        lambda m, second: m(latent(second), prompt()),
    ),
    "AutoencoderKL": (AUTOENCODER, of_picture),
    "AsymmetricAutoencoderKL": (
        dict(
            down_block_types=("DownEncoderBlock2D",) * 2,
            down_block_out_channels=(16, 32),
            norm_num_groups=8,
            up_block_types=("UpDecoderBlock2D",) * 2,
            up_block_out_channels=(16, 32),
            latent_channels=4,
        ),
        of_picture,
    ),
    "VQModel": (AUTOENCODER | dict(num_vq_embeddings=8), of_picture),
    "UNetMotionModel": (
        LEVELS
        | dict(
            cross_attention_dim=24,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            down_block_types=("CrossAttnDownBlockMotion",) * 2,
            up_block_types=("CrossAttnUpBlockMotion",) * 2,
        ),
        of_video,
    ),
    "UNet3DConditionModel": (
        LEVELS
        | dict(
            cross_attention_dim=24,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock3D",) * 2,
            up_block_types=("CrossAttnUpBlock3D",) * 2,
        ),
        of_video,
    ),
    "UNetSpatioTemporalConditionModel": (
        dict(
            block_out_channels=(32, 64),
            cross_attention_dim=24,
            num_attention_heads=2,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2,
            up_block_types=("CrossAttnUpBlockSpatioTemporal",) * 2,
        ),
        None,
    ),
    "UVit2DModel": (
        dict(
            hidden_size=32,
            cond_embed_dim=24,
            micro_cond_encode_dim=4,
            micro_cond_embed_dim=20,
            encoder_hidden_size=24,
            vocab_size=16,
            codebook_size=12,
            in_channels=32,
            block_out_channels=32,
            num_res_blocks=1,
            block_num_heads=2,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        None,
    ),
    "AutoencoderKLTemporalDecoder": (
        dict(
            down_block_types=("DownEncoderBlock2D",) * 2,
            block_out_channels=(32, 32),
        ),
        of_picture,
    ),
    "PriorTransformer": (
        dict(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            embedding_dim=8,
            num_embeddings=5,
            additional_embeddings=4,
        ),
        None,
    ),
    "HunyuanDiT2DModel": (
        dict(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            cross_attention_dim=24,
            cross_attention_dim_t5=24,
            pooled_projection_dim=16,
            hidden_size=16,
        ),
        None,
    ),
}


def diffusers_case(name: str) -> Case:
    options, call = DIFFUSERS[name]

    def reload(model, folder, settings):
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder)

    def build():
        return getattr(importlib.import_module("diffusers"), name)(
            **options
        )

    def switch(model, **settings):
        exclude = "*motion_modules*" if name == "UNetMotionModel" else ()
        use_hilbert_processor(model, exclude=exclude, **settings)

    def checkpoint(model) -> bool:
        if not model._supports_gradient_checkpointing:
            return False
        model.enable_gradient_checkpointing()
        return True

    def called(model, second):
        return first_tensor(call(model, second))

    return Case(
        "diffusers",
        name,
        build,
        switch,
        called,
        reload,
        checkpoint,
        "diffusion",
        name in COMPILED,
    )


FRAMES = "UNetMotionModel (frames)"  # its temporal layers, beside those of pictures


def dit_case(name: str) -> Case:
    "A diffusion transformer, in float64."
    known = name.removesuffix(" (frames)")

    def build():
        kind = getattr(importlib.import_module("diffusers"), known)
        return kind(**DIT_CASES[known].options).double()

    def called(model, second):
        return model(**given(known, int(second))).sample

    def checkpoint(model) -> bool:
        model.enable_gradient_checkpointing()
        return True

    def reload(model, folder, settings):
        model.save_pretrained(folder)
        return loaded(type(model), folder).double()

    return Case(
        "diffusers",
        name,
        build,
        use_hilbert_attention,
        called,
        reload,
        checkpoint,
        "diffusion",
        name in COMPILED,
    )


def dit_names() -> list[str]:
    return [FRAMES if name in DIFFUSERS else name for name in DIT_CASES]


def cases(*packages: str) -> list[Case]:
    "Of these packages, or of all."
    made = dict(
        transformers=hf_cases,
        timm=lambda: [timm_case(name) for name in TIMM_NAMES],
        diffusers=lambda: [
            *(diffusers_case(name) for name in DIFFUSERS),
            *(dit_case(name) for name in dit_names()),
        ],
    )
    return [case for name in packages or made for case in made[name]()]
