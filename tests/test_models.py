"""Switched models use the package, in each layer, on the grid of each call; or it is an error."""

import copy
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from model_cases import DOWN, UP, unet

import hilbert_attn as h
from hilbert_attn.integrations import HilbertAttnProcessor, HilbertSettings
from hilbert_attn.integrations import caches as of_caches
from hilbert_attn.integrations import settings as of_settings
from hilbert_attn.integrations import transformers as of_transformers
from hilbert_attn.integrations.switch import Geometry

SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
IMAGE = dict(**SIZES, image_size=16, patch_size=4)
TEXT = dict(**SIZES, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = dict(**TEXT, num_key_value_heads=2)
WORKER = Path(__file__).with_name("model_worker.py")


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture
def calls(monkeypatch):
    "Settings of each call into the package, however it is entered."
    found = []

    def counted(module, name):
        own = getattr(module, name)

        def count(call, settings):
            found.append(settings)
            return own(call, settings)

        monkeypatch.setattr(module, name, count)

    for module in (of_caches, of_settings): counted(module, "attend_settled")
    counted(of_caches, "cached_attention")
    return found


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(hf, name, config, options, **how):
    "A small model with weights large enough to matter."
    torch.manual_seed(0)
    model = getattr(hf, name)(getattr(hf, config)(**options, **how)).eval()
    for i, p in enumerate(model.parameters()):
        p.data.add_(0.05 * rand(*p.shape, seed=i))
    return model


def llama(hf, **options):
    return built(hf, "LlamaForCausalLM", "LlamaConfig", GROUPED | options)


def vit(hf, **options):
    return built(hf, "ViTModel", "ViTConfig", IMAGE | options)


WORDS = torch.arange(3, 23).repeat(2, 1)


# what works: one call for each layer, on the real grid

VIDEO = dict(**IMAGE, num_frames=4)
JEPA = dict(
    patch_size=4,
    crop_size=16,
    frames_per_clip=4,
    hidden_size=48,
    num_attention_heads=2,
    num_hidden_layers=2,
    pred_hidden_size=48,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=1,
    pred_num_mask_tokens=2,
)
SOUND = dict(
    **SIZES,
    patch_size=4,
    frequency_stride=3,
    time_stride=3,
    max_length=20,
    num_mel_bins=16,
)
SEEING = {
    "ViTModel": ("ViTConfig", IMAGE, (1, 3, 16, 16), (4, 4), 1),
    "DeiTModel": ("DeiTConfig", IMAGE, (1, 3, 16, 16), (4, 4), 2),
    "CLIPVisionModel": ("CLIPVisionConfig", IMAGE, (1, 3, 16, 16), (4, 4), 1),
    "SiglipVisionModel": ("SiglipVisionConfig", IMAGE, (1, 3, 16, 16), (4, 4), 0),
    "DINOv3ViTModel": (
        "DINOv3ViTConfig",
        IMAGE | dict(num_register_tokens=3),
        (1, 3, 16, 32),
        (4, 8),
        4,
    ),
    "ASTModel": ("ASTConfig", SOUND, (1, 20, 16), (5, 6), 2),
    "VivitModel": (
        "VivitConfig",
        VIDEO | dict(tubelet_size=[2, 4, 4]),
        (1, 4, 3, 16, 16),
        (2, 4, 4),
        1,
    ),
    "VideoMAEModel": ("VideoMAEConfig", VIDEO, (1, 4, 3, 16, 16), (2, 4, 4), 0),
    "VJEPA2Model": ("VJEPA2Config", JEPA, (1, 4, 3, 16, 16), (2, 4, 4), 0),
}


def masked(hf, model, mask):
    "The same model with eager attention under a mask, however its layers are called."
    name = "masked_by_test"

    def attend(module, query, key, value, _, scaling=None, **options):
        scores = query @ key.mT * scaling
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    hf.AttentionInterface.register(name, attend)
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize("name", SEEING)
def test_models_that_see(hf, calls, name):
    "Grid and prefix are those of the input, and the result is eager attention under their mask."
    config, options, shape, grid, prefix = SEEING[name]
    model, x = built(hf, name, config, options), rand(*shape)
    more = dict(skip_predictor=True) if name == "VJEPA2Model" else {}
    switched = h.use_hilbert_attention(copy.deepcopy(model), segment_size=6)
    with torch.no_grad():
        ours = switched(x, **more).last_hidden_state
    assert [(s.grid, s.prefix_tokens) for s in calls] == [(grid, prefix)] * 2
    settings = HilbertSettings(segment_size=6, grid=grid, prefix_tokens=prefix)
    mask = settings.counts(ours.shape[1], 1) > 0
    with torch.no_grad():
        expected = masked(hf, model, mask)(x, **more).last_hidden_state
    assert not mask.all() and (ours - expected).abs().max() < 1e-4


READING = {
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "BertModel": ("BertConfig", TEXT),
    "GPTNeoXModel": ("GPTNeoXConfig", TEXT),
    "RobertaModel": ("RobertaConfig", TEXT),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED | dict(head_dim=8)),
    "GPT2Model": ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, vocab_size=50)),
}


@pytest.mark.parametrize("name", READING)
def test_models_that_read(hf, calls, name):
    model = h.use_hilbert_attention(built(hf, name, *READING[name]), segment_size=6)
    with torch.no_grad():
        model(WORDS)
    assert [(s.grid, s.prefix_tokens) for s in calls] == [(None, 0)] * 2


def test_generation_calls_each_layer_at_each_step(hf, calls):
    model = h.use_hilbert_attention(llama(hf), segment_size=6)
    model.generate(WORDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert len(calls) == 2 * 3


# a layer that does not call the package

SAM = dict(
    **SIZES,
    image_size=32,
    patch_size=8,
    global_attn_indexes=[0],
    window_size=2,
    output_channels=16,
    mlp_dim=32,
)


@pytest.mark.parametrize("name", ["Sam", "SamHQ"])
def test_layers_chosen_at_construction_are_named(hf, name):
    model = built(hf, f"{name}VisionModel", f"{name}VisionConfig", SAM)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"layers\.0\.attn, .*layers\.1\.attn"):
        h.use_hilbert_attention(model, grid=(4, 4), segment_size=4)
    assert model.config._attn_implementation == before
    assert getattr(model.config, "hilbert_attention", None) is None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_ignores_the_switch_is_named(hf, compiled):
    model = h.use_hilbert_attention(vit(hf), segment_size=6)
    layer = model.layers[1].attention
    layer.forward = lambda x, *args, **options: (x, None)
    torch._dynamo.reset()
    call = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(RuntimeError, match=r"layers\.1\.attention ran without"):
        call(rand(1, 3, 16, 16))


def test_a_layer_that_is_not_run_is_named(hf):
    model = h.use_hilbert_attention(vit(hf), segment_size=6)
    layer = model.layers[1]
    layer.forward = lambda x, *args, **options: x
    with pytest.raises(RuntimeError, match=r"layers\.1\.attention did not"):
        model(rand(1, 3, 16, 16))
    model.train()(rand(1, 3, 16, 16))  # a layer may be dropped in training


@pytest.mark.parametrize("forwards", [0, 1])
@pytest.mark.parametrize("make", [llama, vit])
def test_the_way_back_by_name(hf, calls, make, forwards):
    model = make(hf)
    x = WORDS if make is llama else rand(1, 3, 16, 16)
    expected = model(x)[0]
    h.use_hilbert_attention(model, segment_size=6)
    for _ in range(forwards): model(x)
    calls.clear()
    model.set_attn_implementation("eager")
    assert torch.allclose(model(x)[0], expected, atol=1e-5)
    assert not calls
    model.set_attn_implementation("hilbert")
    assert not torch.allclose(model(x)[0], expected, atol=1e-5)
    assert len(calls) == 2


def test_hooks_go_after_the_proof(hf):
    model = h.use_hilbert_attention(llama(hf), segment_size=6)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        assert one._forward_hooks
        one(WORDS)
        assert not any(module._forward_hooks for module in one.modules())


def test_a_fused_path_is_noticed():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return x @ self.attention.out_proj.weight

    model = Bypass()
    h.convert_attention(model, segment_size=4)
    with pytest.raises(RuntimeError, match="attention did not call"):
        model(rand(1, 5, 8))


@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_calls_once_a_layer(calls, grad):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    h.convert_attention(model, segment_size=4)
    with torch.set_grad_enabled(grad):
        model(rand(2, 9, 32))
    assert len(calls) == 2


# pictures of another shape, with as many patches


def test_a_picture_of_another_shape(hf, calls):
    "As many patches as the model was built for, on another grid."
    model = h.use_hilbert_attention(vit(hf), segment_size=6)
    for height, width in ((16, 16), (8, 32), (32, 8)):
        with torch.no_grad():
            model(rand(1, 3, height, width), interpolate_pos_encoding=True)
        assert {s.grid for s in calls[-2:]} == {(height // 4, width // 4)}
    h.use_hilbert_attention(model, segment_size=6, grid=(4, 4))
    with pytest.raises(ValueError, match=r"grid=\(4, 4\).*lie on \(2, 8\)"):
        model(rand(1, 3, 8, 32), interpolate_pos_encoding=True)


def test_checkpointing_does_not_guess_the_grid(hf):
    model = h.use_hilbert_attention(vit(hf), segment_size=6).train()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs=dict(use_reentrant=False)
    )

    def loss(*size):
        out = model(rand(1, 3, *size), interpolate_pos_encoding=True)
        return out.last_hidden_state.sum()

    loss(16, 16).backward()
    both = loss(16, 16) + loss(8, 32)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        both.backward()


def test_each_size_runs_again_on_its_own_grid(hf):
    "Pictures of several sizes before one backward, as of crops."
    def gradients(checkpointed):
        model = h.use_hilbert_attention(vit(hf), segment_size=6).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        outs = [
            model(rand(1, 3, *size), interpolate_pos_encoding=True)[0]
            for size in ((8, 32), (16, 24))
        ]
        sum(out.square().sum() for out in outs).backward()
        grads = [p.grad for p in model.parameters()]
        return [x for x in grads if x is not None]

    for ours, own in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, own)


def test_a_plain_sequence_runs_again_on_any_grid(hf):
    model = built(hf, "Aimv2VisionModel", "Aimv2VisionConfig", IMAGE)
    h.use_hilbert_attention(model, segment_size=6, curve=None).train()
    model.gradient_checkpointing_enable()
    patch = model.embeddings.patch_embed
    model(rand(1, 3, 16, 16))
    patch(rand(1, 3, 8, 32))
    model(rand(1, 3, 16, 16))[0].sum().backward()


# several threads, and calls without pictures


def meanwhile(layer, model, x, **options):
    "Another thread calls the model in front of a layer; its result is in the list."
    found = []

    def interrupt(*call):
        handle.remove()
        with ThreadPoolExecutor(1) as pool:
            call = torch.no_grad()(model)
            run = pool.submit(call, x, **options)
            found.append(run.result()[0])

    handle = layer.register_forward_pre_hook(interrupt)
    return found


@torch.no_grad()
def test_each_thread_has_its_own_grid(hf):
    model, how = vit(hf), dict(interpolate_pos_encoding=True)
    h.use_hilbert_attention(model, segment_size=6)
    one, two = rand(1, 3, 8, 32), rand(1, 3, 32, 8)
    expected = [model(x, **how)[0] for x in (one, two)]
    other = meanwhile(model.layers[0], model, two, **how)
    assert torch.equal(model(one, **how)[0], expected[0])
    assert torch.equal(other[0], expected[1])


def test_threads_do_not_take_each_others_proof(hf):
    "The first call of two at once: one is through a layer that the other is still in."
    model = h.use_hilbert_attention(llama(hf), segment_size=6)
    first, second = model.model.layers

    def stop(*call):
        raise InterruptedError

    def interrupt(*call):
        handle.remove()
        stopped = second.register_forward_pre_hook(stop)
        with ThreadPoolExecutor(1) as pool, pytest.raises(InterruptedError):
            pool.submit(model, WORDS).result()
        stopped.remove()

    handle = first.self_attn.o_proj.register_forward_pre_hook(interrupt)
    model(WORDS)
    assert [layer.self_attn.hilbert_site.calls for layer in (first, second)] == [2, 1]


@torch.no_grad()
def test_the_grid_of_an_earlier_call_is_not_used(hf):
    model = h.use_hilbert_attention(vit(hf), segment_size=6)
    model(rand(1, 3, 8, 32), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="no patches were seen in this call"):
        model.layers[0](rand(1, 17, 32))
    def fail(*call): raise InterruptedError
    handle = model.layernorm.register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError): model(rand(1, 3, 16, 16))
    handle.remove()
    with pytest.raises(ValueError, match="no patches were seen in this call"):
        model.layers[0](rand(1, 17, 32))
    patches = model.embeddings.patch_embeddings
    patches.projection = nn.Conv2d(3, 32, 4, 4)
    with pytest.raises(ValueError, match="switch it again if its patch layer was replaced"):
        model(rand(1, 3, 16, 16))
    h.use_hilbert_attention(model, segment_size=6)(rand(1, 3, 16, 16))


class DynamicViT(nn.Module):
    "As timm's with `dynamic_img_size`: any picture, attributes of the one it was built for."

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.grid_size, self.num_prefix_tokens = (4, 6), 1
        self.patch_embed.proj = nn.Conv2d(3, 32, 4, 4)
        self.cls_token = nn.Parameter(rand(1, 1, 32))
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).mT
        x = torch.cat([self.cls_token, x], 1)
        return self.attn(x, x, x, need_weights=False)[0]


def test_a_converted_vit_follows_the_picture(calls):
    model = DynamicViT()
    assert h.convert_vit(model, segment_size=6) == ["attn"]
    for size in ((16, 24), (24, 16), (8, 48)):
        model(rand(1, 3, *size))
        assert (
            calls[-1].grid == tuple(side // 4 for side in size)
            and calls[-1].prefix_tokens == 1
        )
    strict = DynamicViT()
    h.convert_vit(strict, segment_size=6, grid=(4, 6))
    with pytest.raises(ValueError, match=r"lie on \(6, 4\)"):
        strict(rand(1, 3, 24, 16))
    with pytest.raises(ValueError, match="convert_vit"):
        h.convert_attention(DynamicViT(), segment_size=6)
    stated = DynamicViT()
    h.convert_attention(stated, segment_size=6, grid=(4, 6), prefix_tokens=1)
    stated(rand(1, 3, 16, 24))
    with pytest.raises(ValueError, match=r"lie on \(6, 4\)"):
        stated(rand(1, 3, 24, 16))


# geometry that nobody knows


def refused(hf, said, name, config, options, **settings):
    model = built(hf, name, config, options)
    with pytest.raises(ValueError, match=said):
        h.use_hilbert_attention(model, **dict(segment_size=4) | settings)


MERGED = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4)
MASKED = dict(
    decoder_num_attention_heads=2,
    decoder_hidden_size=32,
    decoder_num_hidden_layers=1,
)
WAVES = dict(
    **SIZES,
    conv_dim=(8, 8),
    conv_stride=(2, 2),
    conv_kernel=(3, 3),
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)


@pytest.mark.parametrize("stated", [{}, dict(grid=(4, 4))])
def test_tokens_out_of_order_are_refused(hf, stated):
    mae, video = IMAGE | dict(mask_ratio=0.0), VIDEO | MASKED
    refused(hf, "shuffles", "ViTMAEModel", "ViTMAEConfig", mae, **stated)
    refused(
        hf, "behind", "VideoMAEForPreTraining", "VideoMAEConfig", video, **stated
    )
    module = hf.models.qwen2_vl.modeling_qwen2_vl
    config = hf.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(**MERGED)
    with pytest.raises(ValueError, match="2 x 2"):
        vision = module.Qwen2VisionTransformerPretrainedModel(config)
        h.use_hilbert_attention(vision, segment_size=4, **stated)


LATENT = GROUPED | dict(
    num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, n_group=1, topk_group=1,
    n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, qk_nope_head_dim=4,
    qk_rope_head_dim=4, v_head_dim=6, index_topk=4, index_head_dim=8, index_n_heads=2)
PEGASUS = dict(
    vocab_size=50, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64)


def test_keys_that_a_layer_picks_by_itself_are_refused(hf):
    for name in ("DeepseekV32", "GlmMoeDsa"):
        refused(hf, "indexer picks", f"{name}ForCausalLM", f"{name}Config", LATENT)
    refused(hf, "later tokens", "BigBirdPegasusForCausalLM", "BigBirdPegasusConfig", PEGASUS)


def test_the_predictor_of_vjepa_is_refused(hf):
    model = h.use_hilbert_attention(
        built(hf, "VJEPA2Model", "VJEPA2Config", JEPA), segment_size=4
    )
    with pytest.raises(ValueError, match="skip_predictor=True"):
        model(rand(1, 4, 3, 16, 16))


def test_unknown_geometry_has_to_be_stated(hf, calls):
    refused(hf, "give grid", "BeitModel", "BeitConfig", IMAGE)
    refused(hf, "curve=None", "Wav2Vec2Model", "Wav2Vec2Config", WAVES)
    beit = built(hf, "BeitModel", "BeitConfig", IMAGE)
    h.use_hilbert_attention(beit, segment_size=4, grid=(4, 4), prefix_tokens=1)(
        rand(1, 3, 16, 16)
    )
    waves = built(hf, "Wav2Vec2Model", "Wav2Vec2Config", WAVES)
    h.use_hilbert_attention(waves, segment_size=4, curve=None)(rand(1, 100))
    assert len(calls) == 4


def test_several_models_in_one_are_refused(hf):
    parts = dict(text_config=TEXT, vision_config=IMAGE)
    refused(hf, "several models", "CLIPModel", "CLIPConfig", parts)
    parts = dict(text_config=GROUPED, vision_config=MERGED)
    refused(
        hf,
        "several models",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        parts,
    )


# saved, and loaded in a new process


def worker(*arguments) -> str:
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    worker("save", folder)
    return folder


def test_what_is_saved(saved):
    def entries(name):
        return json.loads((saved / name / "config.json").read_text())

    assert entries("llama")["attn_implementation"] == "hilbert"
    saved_settings = {"segment_lengths": 4, "overlap": "segment"}  # a decoder's default
    assert entries("llama")["hilbert_attention"] == saved_settings
    assert not {"attn_implementation", "hilbert_attention"} & entries("dense").keys()
    assert entries("clip")["attn_implementation"] == {"vision_config": "hilbert"}


WHEN = ["first", pytest.param("last", marks=pytest.mark.full)]


@pytest.mark.parametrize("when", WHEN)
def test_a_new_process_restores(saved, when):
    "Whichever package is imported first."
    expected = [
        "llama [1, 1] same",
        "dense [] same",
        "vit [1, 1] same",
        "clip [1, 1] same",
    ]
    assert worker("load", saved, when).splitlines() == expected


def test_a_new_process_without_the_package_refuses(saved):
    lines = worker("load", saved, "never").splitlines()
    for line, name in zip(lines, ("llama", "dense", "vit", "clip")):
        assert line.startswith(
            f"{name} [] same" if name == "dense" else f"{name} refused: "
        )
    assert 'attn_implementation="hilbert"' in lines[0]


def test_a_name_and_settings_in_a_configuration_are_enough(hf, calls):
    "No call of ours: the name is known since the import."
    config = hf.LlamaConfig(**GROUPED, hilbert_attention=dict(segment_size=4))
    hf.AutoModelForCausalLM.from_config(config, attn_implementation="hilbert")(WORDS)
    assert [s.segment_lengths for s in calls] == [4, 4]


def test_settings_in_a_configuration_are_a_dict(hf):
    model = h.use_hilbert_attention(llama(hf), segment_size=4)
    settings = HilbertSettings(segment_size=6)
    model.config.hilbert_attention = settings
    with pytest.raises(ValueError, match="is a HilbertSettings: expected a dict"):
        model(WORDS)
    model.config.hilbert_attention = settings.to_dict()
    model(WORDS)


def test_settings_that_rest_are_worth_a_warning(hf):
    config = hf.LlamaConfig(**GROUPED, hilbert_attention=dict(segment_size=4))
    with pytest.warns(UserWarning, match="they do nothing"):
        hf.LlamaForCausalLM(config)


def test_adapters_bring_their_settings(hf, tmp_path, monkeypatch):
    "With what peft's class does: it saves an adapter's file, and no more of the base model."

    class PeftModel:
        def __init__(self, base):
            self.base, self.peft_config = base, {"default": None}

        def get_base_model(self):
            return self.base

        def save_pretrained(self, folder):
            (tmp_path / "adapter_config.json").write_text("{}")

        def load_adapter(self, folder):
            return "loaded"

    monkeypatch.setitem(
        sys.modules, "peft.peft_model", SimpleNamespace(PeftModel=PeftModel)
    )
    of_transformers.extend_peft()
    PeftModel(h.use_hilbert_attention(llama(hf), segment_size=4)).save_pretrained(
        tmp_path
    )
    loaded = PeftModel(llama(hf))
    assert loaded.load_adapter(str(tmp_path)) == "loaded"
    stored = dict(segment_lengths=4, overlap="segment")
    assert loaded.base.config.hilbert_attention == stored
    file = tmp_path / "adapter_config.json"  # written before there was an overlap: it had none
    file.write_text(json.dumps(dict(hilbert_attention=dict(segment_lengths=4))))
    old = PeftModel(llama(hf))
    assert old.load_adapter(str(tmp_path)) == "loaded"
    assert old.base.config.hilbert_attention == dict(segment_lengths=4, overlap=0)
    with pytest.raises(ValueError, match="trained with"): loaded.load_adapter(str(tmp_path))
    file.write_text(json.dumps(dict(hilbert_attention=stored)))
    assert loaded.base.config._attn_implementation == "hilbert"
    other = PeftModel(h.use_hilbert_attention(llama(hf), segment_size=5))
    with pytest.raises(ValueError, match="trained with"):
        other.load_adapter(str(tmp_path))


def test_adapters_of_peft(hf, tmp_path, calls):
    peft = pytest.importorskip("peft")
    base = h.use_hilbert_attention(llama(hf), segment_size=4)
    model = peft.get_peft_model(
        base, peft.LoraConfig(init_lora_weights=False)
    ).eval()
    expected = model(WORDS).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(hf), tmp_path).eval()
    assert (
        torch.allclose(again(WORDS).logits, expected, atol=1e-5) and len(calls) == 4
    )
    late = peft.get_peft_model(llama(hf), peft.LoraConfig())
    h.use_hilbert_attention(late, segment_size=4)(WORDS)
    assert len(calls) == 6


# advice in errors, followed

SMALL_WINDOW = {
    "MistralForCausalLM": ("MistralConfig", GROUPED | dict(sliding_window=8)),
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        GROUPED | dict(head_dim=8, sliding_window=8),
    ),
    "ModernBertModel": (
        "ModernBertConfig",
        TEXT | dict(local_attention=16, cls_token_id=1, sep_token_id=2),
    ),
}


@pytest.mark.parametrize("name", SMALL_WINDOW)
def test_advice_about_windows(hf, calls, name):
    "Use 'eager' or 'sdpa', or at most 8 tokens."
    own = built(hf, name, *SMALL_WINDOW[name])
    model = h.use_hilbert_attention(copy.deepcopy(own), segment_size=20)
    advice = "use 'eager' or 'sdpa', or at most [89] tokens"
    with pytest.raises(ValueError, match=advice):
        model(WORDS)
    calls.clear()  # of layers before the first with a window
    with torch.no_grad():
        assert torch.allclose(
            model(WORDS[:, :8])[0], own(WORDS[:, :8])[0], atol=1e-4
        )
        assert len(calls) == 2
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            assert torch.allclose(model(WORDS)[0], own(WORDS)[0], atol=1e-4)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_advice_about_packed_documents(hf, name):
    "Each document in a row of its own, padded; a window does not hide that they are packed."
    config = name.removesuffix("ForCausalLM") + "Config"
    own = built(hf, name, config, GROUPED)
    model = h.use_hilbert_attention(copy.deepcopy(own), segment_size=20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    packed = dict(position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="row of its own, padded") as error:
        model(WORDS[:1], **packed)
    assert "pass an attention_mask" not in str(error.value)
    rows, keys = (
        torch.zeros(2, 12, dtype=torch.int64),
        torch.ones(2, 12, dtype=torch.int64),
    )
    rows[0], rows[1, :8], keys[1, 8:] = WORDS[0, :12], WORDS[0, 12:], 0
    with torch.no_grad():
        logits, expected = (
            model(rows, attention_mask=keys).logits,
            own(WORDS[:1], **packed).logits,
        )
    assert torch.allclose(
        torch.cat([logits[0], logits[1, :8]]), expected[0], atol=1e-4
    )


def test_advice_under_compile(hf):
    "attention_mask=torch.ones_like(input_ids), where each row holds one document."
    torch._dynamo.reset()
    model = h.use_hilbert_attention(llama(hf), segment_size=6)
    compiled = torch.compile(model, backend="eager")
    ones = torch.ones_like(WORDS)
    with torch.no_grad():
        out = compiled(WORDS, attention_mask=ones, use_cache=False).logits
        assert torch.allclose(out, model(WORDS).logits, atol=1e-5)


# what else users bring


def test_numbers_of_numpy(hf, tmp_path):
    settings = HilbertSettings(
        segment_size=np.int64(6),
        grid=np.array([4, 5]),
        prefix_tokens=np.int32(1),
        offsets=np.array([0, 0]),
    )
    plain = HilbertSettings(
        segment_size=6, grid=(4, 5), prefix_tokens=1, offsets=(0, 0)
    )
    assert (
        settings == plain
        and json.loads(json.dumps(settings.to_dict())) == plain.to_dict()
    )
    model = vit(hf)
    h.use_hilbert_attention(model, segment_size=np.int64(6), grid=np.array([4, 4]))
    model.save_pretrained(tmp_path)
    assert HilbertAttnProcessor(grid=np.array([4, 5])).settings.grid == (4, 5)
    with pytest.raises(ValueError, match="segment_size=2.5"):
        HilbertSettings(segment_size=2.5)


def test_models_without_memory(hf):
    "Shapes can be found on the meta device."
    with torch.device("meta"):
        model = hf.ViTModel(hf.ViTConfig(**IMAGE))
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1
        )
        pixels, words = torch.empty(2, 3, 16, 16), torch.empty(2, 9, 32)
    h.use_hilbert_attention(model, segment_size=6)
    h.convert_attention(encoder, segment_size=4)
    assert model(pixels).last_hidden_state.shape == (2, 17, 32)
    assert encoder(words).shape == (2, 9, 32)


class Lora(nn.Module):
    "A linear layer with an adapter, as peft wraps it."

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = (
            base_layer.in_features,
            base_layer.out_features,
        )
        self.a, self.b = (
            nn.Linear(self.in_features, 2),
            nn.Linear(2, self.out_features),
        )

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


class Fused(nn.Module):
    "With the attributes of timm's attention."

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = 4, 8**-0.5
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


def test_adapters_before_conversion(calls):
    "A wrapped projection is called, adapter included; a wrapped attention layer is refused."
    model = nn.Sequential(Fused())
    model[0].qkv = Lora(model[0].qkv)
    x = rand(2, 9, 32)
    expected = model(x)
    assert h.convert_attention(model, segment_size=9) == ["0"]
    calls.clear()  # of the trial
    assert torch.allclose(model(x), expected, atol=1e-5) and len(calls) == 1
    wrapped = nn.Sequential(nn.Module())
    wrapped[0].base_layer = nn.MultiheadAttention(32, 4)
    with pytest.raises(ValueError, match="convert the model before adding it"):
        h.convert_attention(wrapped, segment_size=4)


# diffusers


def test_a_unet_on_latents_of_any_shape(diffusers, calls):
    "12 x 18 and 18 x 12 have as many tokens on each level."
    model, own = (unet(diffusers, (DOWN, DOWN), (UP, UP)) for _ in range(2))
    prompt = rand(1, 5, 24)
    names = h.use_hilbert_processor(model, segment_size=1000)
    for size in ((12, 18), (18, 12)):
        half = tuple(side // 2 for side in size)
        del calls[:]
        with torch.no_grad():
            outs = [m(rand(1, 4, *size), 10, prompt).sample for m in (model, own)]
        assert len(calls) == len(names) == 7 and {s.grid for s in calls} == {
            size,
            half,
        }
        assert torch.allclose(*outs, atol=1e-5)
    h.use_hilbert_processor(model, grid=(12, 18), segment_size=27)
    with pytest.raises(ValueError, match=r"\(18, 12\)"):
        model(rand(1, 4, 18, 12), 10, prompt)


def test_a_unet_from_the_configuration_of_a_switched_one(diffusers, calls):
    model = unet(diffusers)
    count = len(h.use_hilbert_processor(model, segment_size=12))
    twin = type(model).from_config(model.config)
    twin(rand(1, 4, 8, 12), 3, rand(1, 5, 24))
    assert len(calls) == count
    other = diffusers.ControlNetModel.from_config(model.config)
    assert not any(hasattr(m, "hilbert_site") for m in other.modules())


def test_frames_are_no_grid(diffusers, calls):
    "The motion modules of AnimateDiff attend over frames."
    torch.manual_seed(0)
    model = diffusers.UNetMotionModel(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    ).eval()
    for grid in (None, (2, 2)):
        with pytest.raises(
            ValueError, match="motion_modules.*how its tokens lie is unknown"
        ):
            h.use_hilbert_processor(model, grid=grid, segment_size=4)
    names = h.use_hilbert_processor(
        model, segment_size=16, exclude="*motion_modules*"
    )
    with torch.no_grad():
        model(rand(1, 4, 4, 8, 8), 10, rand(4, 5, 24))
    assert len(calls) == len(names) and {s.grid for s in calls} == {(8, 8), (4, 4)}


def test_the_way_back(diffusers, calls):
    model, own = (unet(diffusers, (DOWN, DOWN), (UP, UP)) for _ in range(2))
    prompt = rand(1, 5, 24)
    h.use_hilbert_processor(model, segment_size=27)
    model = copy.deepcopy(model)
    model.set_default_attn_processor()
    with torch.no_grad():
        outs = [m(rand(1, 4, 12, 18), 10, prompt).sample for m in (model, own)]
    assert not calls and torch.allclose(*outs, atol=1e-5)


def passing(model, how):
    if how == "sliced": return model.set_attention_slice("max")
    model.fuse_qkv_projections()


@torch.no_grad()
@pytest.mark.parametrize("how", ["sliced", "fused"])
def test_processors_that_were_replaced_in_passing_are_named(diffusers, how):
    model = unet(diffusers)
    x = (rand(1, 4, 8, 12), 10, rand(1, 5, 24))
    h.use_hilbert_processor(model, segment_size=8, include="down*")
    h.use_hilbert_processor(model, segment_size=8, include="up*")
    model(*x)
    copied = copy.deepcopy(model)
    passing(copied, how)
    with pytest.raises(RuntimeError, match=r"down_blocks.*up_blocks.*got another processor"):
        copied(*x)
    if how == "fused": copied.unfuse_qkv_projections()
    copied.set_default_attn_processor()
    assert torch.allclose(copied(*x).sample, unet(diffusers)(*x).sample, atol=1e-5)
    torch._dynamo.reset()
    graph = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(graph(*x).sample, model(*x).sample, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("forwards", [0, 1])
def test_a_unet_before_its_first_forward_knows_the_way_back(diffusers, calls, forwards):
    model = unet(diffusers)
    x = (rand(1, 4, 8, 12), 10, rand(1, 5, 24))
    h.use_hilbert_processor(model, segment_size=8)
    for _ in range(forwards): model(*x)
    calls.clear()
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    assert torch.allclose(model(*x).sample, unet(diffusers)(*x).sample, atol=1e-5)
    assert not calls


def test_objects_of_gligen_are_no_cells(diffusers):
    model = unet(diffusers, attention_type="gated")
    with pytest.raises(ValueError, match="fuser.attn: how its tokens lie is unknown"):
        h.use_hilbert_processor(model, segment_size=8)


def test_a_dit_and_a_plain_unet(diffusers, calls):
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    ).eval()
    h.use_hilbert_processor(dit, segment_size=4)
    dit(rand(1, 4, 8, 8), torch.tensor([1]), torch.tensor([1]))
    assert [s.grid for s in calls] == [(4, 4)] * 2
    plain = diffusers.UNet2DModel(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    names = h.use_hilbert_processor(plain, segment_size=8)
    plain(rand(1, 3, 16, 24), 3)
    assert [s.grid for s in calls[2:]] == [(8, 12)] * len(names)


def test_a_processor_without_a_model_needs_a_grid(diffusers):
    from diffusers.models.attention_processor import Attention

    layer = Attention(32, heads=4, dim_head=8)
    layer.set_processor(HilbertAttnProcessor(segment_size=4))
    with pytest.raises(ValueError, match="unknown places"):
        layer(rand(1, 12, 32))
    layer.set_processor(HilbertAttnProcessor(segment_size=4, grid=(3, 4)))
    assert layer(rand(1, 12, 32)).shape == (1, 12, 32)
    with pytest.raises(ValueError, match="do not fit grid"):
        layer(rand(1, 16, 32))


def test_geometry_needs_patches_of_this_call():
    with pytest.raises(ValueError, match="no patches were seen"):
        Geometry("cells").settle(HilbertSettings(), 5)
