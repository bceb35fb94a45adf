"""Layers that are replaced (nn.MultiheadAttention, timm's) or handed a processor (diffusers)."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from model_cases import unet

from hilbert_attn.integrations import (
    FusedQKVAttention,
    HilbertAttnProcessor,
    HilbertSettings,
    RotaryQKVAttention,
    convert_attention,
    convert_vit,
    use_hilbert_processor,
    vit_geometry,
)
from hilbert_attn.multihead import MultiheadDilatedAttention


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def gradients(model, out):
    "Of all parameters, under a random upstream gradient; zeros where there is none."
    leaves = list(model.parameters())
    loss = (out * rand(*out.shape, seed=1)).sum()
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


def assert_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * max(b.norm(), 1)


# nn.MultiheadAttention


def encoder(**options):
    torch.manual_seed(0)
    how = dict(dropout=0.0, batch_first=True) | options
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, **how), 2)


def converted(model, **settings):
    twin = copy.deepcopy(model)
    convert_attention(twin, **settings)
    return twin


NESTED = "ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors"
PADDED = torch.arange(24).expand(2, -1) >= torch.tensor([[24], [17]])
CAUSAL = dict(
    mask=nn.Transformer.generate_square_subsequent_mask(24), is_causal=True
)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, dict(src_key_padding_mask=PADDED), CAUSAL],
    ids=["plain", "padded", "causal"],
)
@pytest.mark.filterwarnings(*NESTED)
def test_one_segment_is_what_it_was(batch_first, train, options):
    "With and without gradients, past PyTorch's fused path."
    dense = encoder(batch_first=batch_first).train(train)
    model = converted(dense, segment_size=24)
    x = rand(2, 24, 32) if batch_first else rand(24, 2, 32)
    keep = (~PADDED if batch_first else ~PADDED.T)[..., None]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            outs = [m(x, **options) * keep for m in (model, dense)]
        assert (outs[0] - outs[1]).abs().max() < 1e-5
    outs = [m(x, **options) * keep for m in (model, dense)]
    assert_close(gradients(model, outs[0]), gradients(dense, outs[1]))


def test_segments_are_a_mask():
    dense, x = encoder().eval(), rand(2, 24, 32)
    sparse = converted(dense, segment_size=6, grid=(4, 6))
    mask = HilbertSettings(segment_size=6, grid=(4, 6)).counts(24, 1)[0] > 0
    assert torch.allclose(sparse(x), dense(x, mask=~mask), atol=1e-5)


@pytest.mark.filterwarnings(*NESTED)
def test_nested_tensors_are_refused():
    model = converted(encoder().eval(), segment_size=8)
    with torch.no_grad(), pytest.raises(ValueError, match="query is nested .* are padded"):
        model(torch.nested.nested_tensor([rand(9, 32), rand(5, 32)]))


def test_parameters_stay():
    model = encoder()
    before, names = dict(model.named_parameters()), list(model.state_dict())
    assert convert_attention(model, segment_size=24) == [
        "layers.0.self_attn",
        "layers.1.self_attn",
    ]
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == names and after.keys() == before.keys()
    assert all(before[name] is p for name, p in after.items())
    assert all(module.training for module in model.modules())


class Pair(nn.Module):
    "Two layers, one of them in two places."

    def __init__(self, **options):
        super().__init__()
        self.a = nn.MultiheadAttention(8, 2, **options)
        self.b = nn.MultiheadAttention(8, 2, dropout=0.25, bias=False)
        self.again = self.b


def test_layers_are_chosen_by_name():
    model = Pair()
    model.b.in_proj_weight.requires_grad_(False)
    assert convert_attention(model, segment_size=4, include=["b", "again"]) == [
        "b",
        "again",
    ]
    assert model.b is model.again and type(model.a) is nn.MultiheadAttention
    assert isinstance(model.b, MultiheadDilatedAttention)
    assert model.b.attention.dropout == 0.25 and model.b.in_proj_bias is None
    assert not model.b.in_proj_weight.requires_grad
    assert convert_attention(model, segment_size=4) == ["a"]
    for again, exclude in ((model, ()), (Pair(), "*")):
        with pytest.raises(ValueError, match="no nn.MultiheadAttention"):
            convert_attention(again, segment_size=4, exclude=exclude)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(add_bias_kv=True), "add_bias_kv"),
        (dict(add_zero_attn=True), "add_zero_attn"),
        (dict(kdim=4), "cross-attention"),
    ],
)
def test_nothing_is_changed_where_a_layer_cannot_be(options, said):
    model = Pair(**options)
    with pytest.raises(ValueError, match=said):
        convert_attention(model, segment_size=4)
    assert type(model.a) is type(model.b) is nn.MultiheadAttention
    assert convert_attention(model, segment_size=4, exclude="a") == ["b", "again"]


class Other(nn.MultiheadAttention):
    pass


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)


def parametrized(layer):
    nn.utils.parametrizations.spectral_norm(layer.out_proj)


@pytest.mark.parametrize("memory", [16, 12])
def test_cross_attention_of_a_converted_layer_is_refused(memory):
    "Also where lengths agree; queries and keys with places, and values without, are one sequence."
    model = nn.Sequential(nn.MultiheadAttention(32, 4, batch_first=True))
    own, x = copy.deepcopy(model[0]), rand(1, 16, 32)
    placed, other = x + 1, rand(1, memory, 32, seed=1)
    convert_attention(model, segment_size=16)
    with pytest.raises(ValueError, match="cross-attention"):
        model[0](x, other, other)
    torch._dynamo.reset()
    graph = torch.compile(model[0], backend="eager", fullgraph=True)
    for call in (model[0], graph):
        for given in ((x, x, x), (placed, placed, x)):
            assert torch.allclose(call(*given)[0], own(*given)[0], atol=1e-5)


@pytest.mark.parametrize(
    "spoil, said", [(hooked, "hooks"), (parametrized, "parametrized")]
)
def test_layers_with_more_to_them_are_refused(spoil, said):
    model = Pair()
    spoil(model.a)
    with pytest.raises(ValueError, match=said):
        convert_attention(model, segment_size=4)


def test_other_layers_are_refused():
    model = Pair()
    model.a = Other(8, 2)
    with pytest.raises(ValueError, match="is a Other"):
        convert_attention(model, segment_size=4)
    with pytest.raises(ValueError, match="itself"):
        convert_attention(nn.MultiheadAttention(8, 2), segment_size=4)
    both = nn.Transformer(8, 2, 1, 1, 8, batch_first=True)
    with pytest.raises(ValueError, match="multihead_attn: it is cross-attention"):
        convert_attention(both, segment_size=4)
    assert (
        len(convert_attention(both, segment_size=4, exclude="*multihead_attn")) == 2
    )
    both(rand(1, 5, 8), rand(1, 7, 8))


# vision transformers of others


class FusedAttention(nn.Module):
    "With the attributes of timm's layer."

    def __init__(self, extras=True):
        super().__init__()
        self.num_heads, self.scale = 4, 8**-0.5
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.q_norm, self.k_norm, self.norm = (
            nn.Identity(),
            nn.Identity(),
            nn.Identity(),
        )
        self.gate = None
        if extras:
            self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)
            self.norm, self.gate = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        how = dict(is_causal=is_causal, scale=self.scale)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, **how)
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj(out if self.gate is None else out * self.gate(x).sigmoid())


class SmallViT(nn.Module):
    def __init__(self, attention, registers=0):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        self.patch_embed.grid_size, self.num_prefix_tokens = (4, 6), 1 + registers
        self.cls_token = nn.Parameter(torch.randn(1, 1 + registers, 32))
        self.blocks = nn.ModuleList([attention() for _ in range(2)])

    def forward(self, x, mask=None):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + block(x, attn_mask=mask)
        return x


@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("segment", [6, 24])
def test_layers_with_one_projection(extras, segment):
    model, x = (
        SmallViT(lambda: FusedAttention(extras), registers=2),
        rand(2, 3, 16, 24),
    )
    ours = copy.deepcopy(model)
    assert convert_vit(ours, segment_size=segment) == ["blocks.0", "blocks.1"]
    assert isinstance(ours.blocks[0], FusedQKVAttention)
    assert list(ours.state_dict()) == list(model.state_dict())
    s = HilbertSettings(segment_size=segment, grid=(4, 6), prefix_tokens=3)
    mask = s.counts(27, 1)[0] > 0
    outs = ours(x), model(x, mask)
    assert torch.allclose(*outs, atol=1e-5) and bool(mask.all()) == (segment == 24)
    assert_close(gradients(ours, outs[0]), gradients(model, outs[1]), 1e-4)
    with pytest.raises(ValueError, match="attn_mask"):
        ours(x, mask)


class Biased(FusedAttention):
    def __init__(self):
        super().__init__()
        self.bias_table = nn.Parameter(torch.zeros(3))


class Rotary(FusedAttention):
    def forward(self, x, rope):
        return super().forward(x)


@pytest.mark.parametrize(
    "layer, said", [(Biased, "bias_table"), (Rotary, "takes rope")]
)
def test_layers_of_unknown_kind_are_refused(layer, said):
    with pytest.raises(ValueError, match=said):
        convert_vit(SmallViT(layer), segment_size=4)


class ChannelAttention(FusedAttention):
    "As DaViT's: the parts of attention among tokens, another sum."

    def __init__(self):
        super().__init__(extras=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 4, 1)
        out = F.scaled_dot_product_attention(q, k, v, scale=x.shape[1] ** -0.5)
        return self.proj(out.permute(0, 3, 1, 2).flatten(2))


class GridAttention(FusedAttention):
    def forward(self, x):
        (b, h, w, e), x = x.shape, x.flatten(1, 2)
        return super().forward(x).view(b, h, w, e)


@pytest.mark.parametrize(
    "layer, said",
    [(ChannelAttention, "computes something else"), (GridAttention, "not be tried")],
)
def test_layers_that_look_alike_are_refused(layer, said):
    model = SmallViT(layer).eval()
    model.blocks[1].train()
    before = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=said):
        convert_vit(model, curve=None)
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model.blocks[0]) is layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_of_any_dtype_are_tried(dtype, device):
    for model in (SmallViT(FusedAttention), RotaryViT(True, True)):
        model.to(device, dtype)
        assert len(convert_vit(model, segment_size=4)) == 2
        with pytest.raises(ValueError, match="converted already"):
            convert_vit(model, segment_size=4)


# layers with rotary embeddings, as timm's


def apply_rot_embed_cat(x, emb, half=False):
    "As timm's: sines and cosines side by side, pairs of channels interleaved or in halves."
    sin, cos = emb.chunk(2, -1)
    if half:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else: turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


class RotaryAttention(nn.Module):
    "With the attributes and the arithmetic of timm's `EvaAttention` and `AttentionRope`."

    def __init__(self, fused, biased, kv_heads=4, half=False):
        super().__init__()
        self.num_heads, self.scale, self.head_dim = 4, 8**-0.5, 8
        self.num_prefix_tokens, self.rotate_half = 2, half
        self.qkv = nn.Linear(32, 96, bias=False) if fused else None
        sizes = dict(q_proj=32, k_proj=8 * kv_heads, v_proj=8 * kv_heads)
        for name, size in sizes.items():
            setattr(self, name, None if fused else nn.Linear(32, size))
        self.q_bias = nn.Parameter(torch.randn(32)) if biased else None
        self.v_bias = nn.Parameter(torch.randn(32)) if biased else None
        self.register_buffer("k_bias", torch.zeros(32) if biased else None, persistent=False)
        self.q_norm, self.k_norm, self.norm = nn.LayerNorm(8), nn.Identity(), nn.LayerNorm(32)
        self.gate, self.proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.attn_drop = self.proj_drop = nn.Dropout(0.0)

    def projected(self, x):
        if self.qkv is None: qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            bias = None
            if self.q_bias is not None:
                bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            qkv = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in qkv)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        q, k, v = self.projected(x)
        if rope is not None:
            how = dict(half=self.rotate_half)
            q = torch.cat([q[:, :, :2], apply_rot_embed_cat(q[:, :, 2:], rope, **how)], 2)
            k = torch.cat([k[:, :, :2], apply_rot_embed_cat(k[:, :, 2:], rope, **how)], 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask, is_causal=is_causal, enable_gqa=True)
        out = self.norm(out.transpose(1, 2).flatten(2)) * self.gate(x).sigmoid()
        return self.proj(out)


class RotaryViT(nn.Module):
    def __init__(self, *options, per_head=False):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed, self.num_prefix_tokens = nn.Conv2d(3, 32, 4, 4), 2
        self.prefix = nn.Parameter(torch.randn(1, 2, 32))
        angles = torch.randn(*((4,) if per_head else ()), 24, 4).repeat_interleave(2, -1)
        self.angles = torch.cat([angles.sin(), angles.cos()], -1)
        self.blocks = nn.ModuleList([RotaryAttention(*options) for _ in range(2)])

    def forward(self, x, mask=None):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        for block in self.blocks: x = x + block(x, rope=self.angles, attn_mask=mask)
        return x


ROTARY = {
    "EVA-02": (True, True),
    "DINOv3": (True, False),
    "separate": (False, False),
    "grouped": (False, False, 2),
    "half": (True, False, 4, True),
    "mixed": (True, False),
}


@pytest.mark.grid
@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("segment", [6, 24])
def test_layers_with_rotary_embeddings(name, segment):
    model = RotaryViT(*ROTARY[name], per_head=name == "mixed")
    ours, x = copy.deepcopy(model), rand(2, 3, 16, 24)
    assert convert_vit(ours, segment_size=segment) == ["blocks.0", "blocks.1"]
    assert isinstance(ours.blocks[0], RotaryQKVAttention)
    assert list(ours.state_dict()) == list(model.state_dict())
    settings = HilbertSettings(segment_size=segment, grid=(4, 6), prefix_tokens=2)
    mask = settings.counts(26, 1)[0] > 0
    outs = ours(x), model(x, mask)
    assert torch.allclose(*outs, atol=1e-5) and bool(mask.all()) == (segment == 24)
    assert_close(gradients(ours, outs[0]), gradients(model, outs[1]), 1e-4)
    with pytest.raises(ValueError, match="attn_mask"): ours(x, mask)
    torch._dynamo.reset()
    graph = torch.compile(ours, backend="eager", fullgraph=True)
    assert torch.allclose(graph(x), outs[0], atol=1e-6)


def test_what_a_rotary_layer_has_beside_is_refused():
    model = RotaryViT(True, True)
    model.blocks[0].relative_position_bias_table = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="relative_position_bias_table, of unknown use"):
        convert_vit(model, segment_size=4)


def test_a_vit_without_patches_needs_a_grid():
    with pytest.raises(ValueError, match="give grid"):
        convert_vit(encoder(), segment_size=4)
    given = dict(segment_size=4, grid=(4, 6), prefix_tokens=0)
    assert convert_vit(encoder(), **given) == [
        "layers.0.self_attn",
        "layers.1.self_attn",
    ]


def real_vit(package):
    sizes = dict(patch_size=4, num_heads=4, num_classes=5)
    try:
        if package == "torchvision":
            from torchvision.models import VisionTransformer

            return VisionTransformer(
                image_size=32, num_layers=2, hidden_dim=32, mlp_dim=64, **sizes
            )
        import timm

        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            depth=2,
            embed_dim=32,
            reg_tokens=2,
            **sizes,
        )
    except (ImportError, RuntimeError) as e:  # RuntimeError: built for another torch
        pytest.skip(f"{package} cannot be used here: {e}")


@pytest.mark.parametrize("package, prefix", [("torchvision", 1), ("timm", 3)])
def test_vision_transformers_of_others(package, prefix):
    model, x = real_vit(package).eval(), rand(2, 3, 32, 32)
    with torch.no_grad():  # away from the tiny initial weights
        for i, p in enumerate(model.parameters()):
            p.add_(0.2 * rand(*p.shape, seed=i))
    assert vit_geometry(model) == ((8, 8), prefix)
    dense, sparse = copy.deepcopy(model), copy.deepcopy(model)
    for one, segment in ((dense, 64), (sparse, 16)):
        assert len(convert_vit(one, segment_size=segment)) == 2
    assert torch.allclose(dense(x), model(x), atol=1e-4)
    assert not torch.allclose(sparse(x), model(x), atol=1e-3)


# diffusers


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


PICTURE = dict(
    norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0
)


@pytest.mark.parametrize("picture", [False, True])
def test_processor_is_the_masked_layer(diffusers, picture):
    "A picture may lie on a halving of the grid that was given; tokens lie on the grid itself."
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    extras = PICTURE if picture else {}
    layer = Attention(
        32, heads=4, dim_head=8, bias=True, qk_norm="layer_norm", **extras
    ).eval()
    how = dict(segment_size=9, dilation_rate=2, curve="tile:2")
    ours, x = copy.deepcopy(layer), rand(2, 54, 32)
    if picture:
        x = x.mT.reshape(2, 32, 6, 9)
    ours.set_processor(
        HilbertAttnProcessor(grid=(12, 17) if picture else (6, 9), **how)
    )
    mask = HilbertSettings(grid=(6, 9), **how).counts(54, 1)[0] > 0
    bias = torch.where(mask, 0.0, -torch.inf).expand(2, 54, 54)
    outs = ours(x), layer(x, attention_mask=bias)
    assert torch.allclose(*outs, atol=1e-5)
    assert_close(gradients(ours, outs[0]), gradients(layer, outs[1]), 1e-4)
    with pytest.raises(ValueError, match="attention_mask"):
        ours(x, attention_mask=bias)
    if picture:
        return
    with pytest.raises(ValueError, match="55 tokens"):
        ours(rand(2, 55, 32))
    with pytest.raises(ValueError, match="cross-attention"):
        ours(x, encoder_hidden_states=x)


def test_a_unet_in_segments(diffusers):
    own, dense, sparse = (unet(diffusers, sample_size=(12, 18)) for _ in range(3))
    names = use_hilbert_processor(dense, grid=(12, 18))
    assert names and all(name.endswith("attn1") for name in names)
    for _ in range(2):  # again is as good as once
        assert use_hilbert_processor(sparse, grid=(12, 18), segment_size=27) == names
    x = rand(1, 4, 12, 18), 10, rand(1, 5, 24)
    with torch.no_grad():
        expected, one, several = (m(*x).sample for m in (own, dense, sparse))
    assert torch.allclose(one, expected, atol=1e-5)
    assert not torch.allclose(several, expected, atol=1e-3)


def test_processors_of_others_are_refused(diffusers):
    model = unet(diffusers, sample_size=(12, 18))
    with pytest.raises(ValueError, match="no self-attention"):
        use_hilbert_processor(nn.Linear(2, 2), segment_size=4)
    names = use_hilbert_processor(model, segment_size=4)
    model.get_submodule(names[0]).processor = type("OddProcessor", (), {})()
    with pytest.raises(ValueError, match="OddProcessor"):
        use_hilbert_processor(model, segment_size=4)
    assert (
        use_hilbert_processor(model, segment_size=4, exclude=names[0]) == names[1:]
    )
