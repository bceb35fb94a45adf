"""Attention in models that exist: settings, tokens outside of the grid, transformers, converted layers, diffusers."""
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from hilbert_attn.curves import curve_order
from hilbert_attn.integrations import (FusedQKVAttention, HilbertAttnProcessor, HilbertSettings, PrefixAttention, convert_attention, convert_vit, prefix_attention, register_hilbert_attention,
                                       use_hilbert_attention, use_hilbert_processor, vit_geometry)
from hilbert_attn.modules import MultiheadDilatedAttention
from hilbert_attn.patterns import DilatedPattern, attention_mask
from hilbert_attn.reference import assert_matches_oracle


def rand(*shape, seed=0, dtype=torch.float32): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# settings

@pytest.mark.parametrize("wrong, said", [
    (dict(segment_size=0), "segment"), (dict(segment_size=4, dilation_rate=5), "dilation_rate=5"), (dict(segment_size=4, segment_lengths=5), "disagree"), (dict(segment_lengths=(4, 8), dilation_rates=(1,)), "as many"),
    (dict(dilation_rate=2, dilation_rates=3), "disagree"), (dict(curve="peano"), "known curves"), (dict(grid=(3, 0)), "grid"), (dict(prefix_tokens=-1), "prefix_tokens"), (dict(prefix_tokens=1.5), "prefix_tokens"),
    (dict(dilation_mode="other"), "known modes"), (dict(combine="sum"), "known ways"), (dict(backend="cudnn"), "known backends"), (dict(segments=4), "no setting"), (dict(segment_size=8, offsets=(0, -1)), "offsets"),
])
def test_settings_that_do_not_fit(wrong, said):
    with pytest.raises(ValueError, match=said): HilbertSettings.from_dict(wrong)


def test_settings_as_plain_values():
    for s in (HilbertSettings(), HilbertSettings(segment_size=9, grid=[3, 6], prefix_tokens=2), HilbertSettings([8, 16], (1, 2), combine="heads", dilation_mode="keys", offsets=[0, 1], curve=None, backend="sdpa")):
        assert HilbertSettings.from_dict(s.to_dict()) == s and hash(s) == hash(HilbertSettings.from_dict(s.to_dict()))
    assert HilbertSettings((8, 16)).branches == ([8, 16], [1, 1])
    assert HilbertSettings().order_name is None and HilbertSettings(grid=(2, 3)).order_name == "hilbert" and HilbertSettings(grid=(2, 3), curve="row_major").order_name is None and HilbertSettings(curve="hilbert").order_name == "hilbert"


PATTERNS = [dict(segment_size=7), dict(segment_size=20, dilation_rate=3), dict(segment_lengths=(6, 12, 60), dilation_rates=(1, 2, 5), dilation_mode="longnet"), dict(segment_lengths=(8, 8), dilation_rates=(2, 2)),
            dict(segment_size=16, dilation_rate=4, dilation_mode="keys", offsets=(3, 1, 0, 2)), dict(segment_lengths=(5, 15), dilation_rates=(1, 3), combine="heads"), dict(dilation_rate=2), dict()]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("curve", ["hilbert", "tile:2", None])
def test_counts_are_the_definition(pattern, curve):
    "Against the patterns' own masks; a prefix adds full rows and columns; rows from `first` on are rows of the whole."
    grid, heads = (5, 7), 4
    s = HilbertSettings(**pattern, grid=grid, curve=curve)
    order = curve_order(grid, curve) if curve else None
    lengths, rates = s.branches
    expected = attention_mask(DilatedPattern.for_heads(35, heads, lengths, rates, s.combine, s.dilation_mode, s.offsets), order=order)[0]
    assert torch.equal(s.counts(35, heads), expected.expand(heads, 35, 35))
    assert torch.equal(s.counts(35, heads, causal=True), expected.expand(heads, 35, 35).tril())
    s = HilbertSettings(**pattern, grid=grid, curve=curve, prefix_tokens=3)
    whole = s.counts(38, heads)
    assert (whole[:, :3] == 1).all() and (whole[:, :, :3] == 1).all() and torch.equal(whole[:, 3:, 3:], expected.expand(heads, 35, 35))
    for first in (0, 2, 3, 20, 37): assert torch.equal(s.counts(38, heads, first=first, causal=True), whole.tril()[:, first:])


# tokens outside of the grid

@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prefix, kv_heads, causal, masked, dtype", [(1, 4, False, False, torch.float32), (5, 2, True, True, torch.float32), (2, 1, False, True, torch.bfloat16), (3, 2, True, False, torch.float64), (0, 4, True, True, torch.float32)])
def test_prefix_matches_the_oracle(pattern, prefix, kv_heads, causal, masked, dtype):
    s = HilbertSettings(**pattern, grid=(5, 7), prefix_tokens=prefix)
    n = 35 + prefix
    q, k, v = (rand(2, h, n, 16, seed=i, dtype=dtype) for i, h in enumerate((4, kv_heads, kv_heads)))
    keys = torch.rand(2, n, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    counts = s.counts(n, 4, causal=causal)[None]
    if masked: counts = counts * keys[:, None, None]
    assert_matches_oracle(lambda q, k, v: prefix_attention(q, k, v, s, causal=causal, key_mask=keys, return_lse=True), q, k, v, counts)


@pytest.mark.parametrize("backend", ["reference", "sdpa_mask", "triton"])
def test_prefix_on_every_backend(backend):
    if backend == "triton": pytest.importorskip("triton")
    s = HilbertSettings(segment_lengths=(8, 35), dilation_rates=(1, 3), grid=(5, 7), prefix_tokens=2, backend=backend)
    q, k, v = (rand(1, h, 37, 16, seed=i) for i, h in enumerate((2, 1, 1)))
    assert_matches_oracle(lambda q, k, v: prefix_attention(q, k, v, s, return_lse=True), q, k, v, s.counts(37, 2)[None])


def test_prefix_gradcheck():
    s = HilbertSettings(segment_lengths=(4, 9), dilation_rates=(1, 2), grid=(3, 3), prefix_tokens=2)
    q, k, v = (rand(1, h, 11, 4, seed=i, dtype=torch.float64).requires_grad_() for i, h in enumerate((2, 1, 1)))
    assert torch.autograd.gradcheck(lambda *x: prefix_attention(*x, s, return_lse=True), (q, k, v))


def test_prefix_scale_dropout_autocast_and_errors():
    s = HilbertSettings(segment_size=8, grid=(4, 4), prefix_tokens=1)
    q, k, v = (rand(1, 2, 17, 16, seed=i) for i in range(3))
    mask = s.counts(17, 2)[None] > 0
    assert torch.allclose(prefix_attention(q, k, v, s, scale=0.7), F.scaled_dot_product_attention(q, k, v, mask, scale=0.7), atol=1e-5)
    torch.manual_seed(0)
    mean = torch.stack([prefix_attention(q, k, v, s, dropout_p=0.3) for _ in range(800)]).mean(0)
    assert (mean - prefix_attention(q, k, v, s)).abs().max() < 0.15  # unbiased, prefix rows too
    with torch.autocast("cpu", torch.bfloat16): assert prefix_attention(q, k, v, s).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="do not fit grid"): prefix_attention(*(x[:, :, 1:] for x in (q, k, v)), s)
    with pytest.raises(ValueError, match="none are left"): prefix_attention(q, k, v, HilbertSettings(prefix_tokens=17))
    with pytest.raises(ValueError, match="key_mask"): prefix_attention(q, k, v, s, key_mask=torch.ones(1, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="one or the other"): PrefixAttention(s, segment_size=3)
    with pytest.raises(ValueError, match="dropout"): PrefixAttention(s, dropout=1.0)


# without any of the packages

def test_nothing_is_imported_that_is_not_needed():
    code = """if True:
        import sys
        for name in ("transformers", "diffusers", "timm", "torchvision"): sys.modules[name] = None
        import hilbert_attn, hilbert_attn.integrations as i
        for call in (lambda: i.register_hilbert_attention(segment_size=4), lambda: i.use_hilbert_attention(None, segment_size=4)):
            try: call()
            except ImportError as e: assert "pip install transformers" in str(e) and "hilbert_attn[transformers]" in str(e), e
            else: raise AssertionError("no error")
        import torch
        layer = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
        assert i.convert_attention(layer, segment_size=4) == ["0"]
        i.HilbertAttnProcessor(segment_size=4)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# transformers

@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    transformers.AttentionInterface.register("masked", masked_eager)
    transformers.AttentionMaskInterface.register("masked", transformers.AttentionMaskInterface()["sdpa"])
    return transformers


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
IMAGE = dict(image_size=(24, 32), patch_size=4)
VISION = {"ViT": ("ViTConfig", dict(**SIZES, **IMAGE), 1), "DeiT": ("DeiTConfig", dict(**SIZES, **IMAGE), 2), "CLIP": ("CLIPVisionConfig", dict(**SIZES, image_size=32, patch_size=4), 1),
          "DINOv2, registers": ("Dinov2WithRegistersConfig", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_register_tokens=3, image_size=32, patch_size=4), 4)}
TEXT = {"Llama": ("LlamaConfig", dict(**SIZES, num_key_value_heads=2, vocab_size=50)), "GPT-2": ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=2)),
        "BERT": ("BertConfig", dict(**SIZES, vocab_size=50)), "Mistral, wide window": ("MistralConfig", dict(**SIZES, num_key_value_heads=2, vocab_size=50, sliding_window=64))}
_COUNTS = [None]  # the mask of `masked_eager`: (H, N, N)


def masked_eager(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    "The yardstick: scores, mask, softmax."
    group = query.shape[1] // key.shape[1]
    allowed = (_COUNTS[0] > 0)[None]
    if attention_mask is not None: allowed = allowed & attention_mask
    scores = (query @ key.repeat_interleave(group, 1).mT * scaling).masked_fill(~allowed, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


def build(hf, config, options, attention="eager", head="AutoModel"):
    torch.manual_seed(0)
    model = getattr(hf, head).from_config(getattr(hf, config)(**options), attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))  # away from the tiny initial weights
    return model


def llama(hf, **options): return build(hf, "LlamaConfig", TEXT["Llama"][1] | options, head="AutoModelForCausalLM")


def results(model, keep=..., **inputs):
    out = model(**inputs)
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    names, leaves = zip(*model.named_parameters())
    grads = torch.autograd.grad((out * rand(*out.shape, seed=3))[keep].sum(), leaves, allow_unused=True)
    return out.detach()[keep], {n: g for n, g in zip(names, grads) if g is not None}


def assert_same(a, b, tolerance=2e-5):
    assert (a[0] - b[0]).abs().max() <= tolerance * b[0].abs().max()
    assert a[1].keys() == b[1].keys() and any(g.norm() > 1e-3 for g in b[1].values())
    for name, g in b[1].items(): assert (a[1][name] - g).norm() <= tolerance * g.norm() + 2e-5 * max(x.norm() for x in b[1].values()), name


def pixels(model): return rand(2, 3, *((s, s) if isinstance(s := model.config.image_size, int) else s), seed=4)


def texts(n=30, padding=None):
    inputs = dict(input_ids=torch.randint(3, 50, (2, n), generator=torch.Generator().manual_seed(2)))
    if padding is None: return inputs, ...
    keys = torch.ones(2, n, dtype=torch.int64)
    if padding == "left": keys[1, :11] = 0
    else: keys[1, -11:] = 0
    return inputs | dict(attention_mask=keys), keys.bool()


@pytest.mark.parametrize("name", VISION)
def test_vision_models(hf, name):
    "One segment is dense eager attention; several are eager attention with the mask; outputs and gradients."
    config, options, prefix = VISION[name]
    x = dict(pixel_values=pixels(eager := build(hf, config, options)))
    grid = (6, 8) if options["image_size"] == (24, 32) else (8, 8)
    assert vit_geometry(eager) == (grid, prefix)
    dense = use_hilbert_attention(build(hf, config, options), segment_size=64)
    assert_same(results(dense, **x), results(eager, **x))
    sparse = use_hilbert_attention(build(hf, config, options), segment_size=12, dilation_rate=2)
    assert sparse.config.hilbert_attention == dict(segment_lengths=12, dilation_rates=2)
    _COUNTS[0] = HilbertSettings(segment_size=12, dilation_rate=2, grid=grid, prefix_tokens=prefix).counts(prefix + grid[0] * grid[1], 4)
    assert_same(a := results(sparse, **x), results(build(hf, config, options, "masked"), **x))
    assert (a[0] - results(eager, **x)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_text_models(hf, name, padding):
    (config, options), (inputs, keep) = TEXT[name], texts(padding=padding)
    eager = results(build(hf, config, options), keep, **inputs)
    assert_same(results(use_hilbert_attention(build(hf, config, options), segment_size=30), keep, **inputs), eager)
    s = HilbertSettings(segment_size=10, dilation_rate=3, prefix_tokens=2 if padding == "right" else 0)
    n, causal = 30, name != "BERT"
    _COUNTS[0] = s.counts(n, 4, causal=causal)
    assert_same(results(use_hilbert_attention(build(hf, config, options), s), keep, **inputs), results(build(hf, config, options, "masked"), keep, **inputs))


def test_the_mask_is_not_dropped(hf):
    "A name without a mask function gets no padding mask from transformers: ours has one."
    inputs, keep = texts(padding="left")
    model = use_hilbert_attention(llama(hf), segment_size=30)
    assert (model(**inputs).logits - model(inputs["input_ids"]).logits)[keep].abs().max() > 1e-2


@pytest.mark.parametrize("settings", [dict(segment_size=8, prefix_tokens=2), dict(segment_lengths=(4, 16), dilation_rates=(1, 4), dilation_mode="longnet"), dict(segment_size=12, dilation_rate=3), dict()])
def test_generation_from_a_cache_is_the_whole_sequence(hf, settings):
    model = use_hilbert_attention(llama(hf), **settings)
    for inputs in [texts(13)[0]] + ([] if "prefix_tokens" in settings else [texts(13, "left")[0]]):
        done = model.generate(**inputs, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0)
        keys = torch.cat([inputs.get("attention_mask", torch.ones(2, 13, dtype=torch.int64)), torch.ones(2, 20, dtype=torch.int64)], 1)
        position = (keys.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad(): whole = model(done.sequences, attention_mask=keys, position_ids=position, use_cache=False).logits[:, 12:-1]
        assert (torch.stack(done.logits, 1) - whole).abs().max() < 1e-4


def test_a_cache_filled_in_chunks(hf):
    model, ids = use_hilbert_attention(llama(hf), segment_size=8, dilation_rate=2), texts(30)[0]["input_ids"]
    with torch.no_grad():
        whole, cache, parts = model(ids, use_cache=False).logits, None, []
        for part in ids.split((11, 7, 1, 11), 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, parts + [out.logits]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


def test_pixels_one_after_another(hf):
    "A decoder over a grid: with the grid given, positions along the curve do not move while the picture grows."
    model, ids = use_hilbert_attention(llama(hf), segment_size=8, dilation_rate=2, grid=(5, 6), prefix_tokens=1), texts(31)[0]["input_ids"]
    with torch.no_grad():
        whole, cache, parts = model(ids, use_cache=False).logits, None, []
        for part in ids.split((1, 9, 1, 20), 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, parts + [out.logits]
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4
        with pytest.raises(ValueError, match="do not fit grid"): model(ids[:, :1].expand(2, 33), use_cache=False)


def test_masks_of_four_dimensions(hf):
    "Causal and both ways are understood, with padding or not; everything else is refused."
    model, (inputs, keep) = use_hilbert_attention(llama(hf), segment_size=30), texts(padding="left")
    ids, keys = inputs["input_ids"], inputs["attention_mask"].bool()
    lower = torch.ones(30, 30, dtype=torch.bool).tril()
    allowed = lower & keys[:, None, None]
    expected, minimum = model(**inputs).logits, torch.finfo(torch.float32).min
    position = torch.arange(30)[None]
    for mask in (allowed, torch.where(allowed, 0.0, minimum), torch.where(allowed, 0.0, -torch.inf)): assert torch.allclose(model(ids, attention_mask=mask).logits[keep], expected[keep], atol=1e-5)
    both = keys[:, None, None].expand(2, 1, 30, 30)
    eager = llama(hf)(ids, attention_mask=torch.where(both, 0.0, minimum), position_ids=position).logits
    for mask in (both, keys[:, None, None]): assert torch.allclose(model(ids, attention_mask=mask, position_ids=position).logits, eager, atol=1e-4)
    for mask, said in ((lower[None, None].triu(-3), "neither causal"), (torch.where(allowed, 0.1, minimum), "bias"), (torch.zeros(1, 1, 30, 30).requires_grad_(), "bias"),
                       (torch.stack([lower, lower.triu(-3)] * 2)[None], "between heads"), (lower[None, None, :, :20], "shape")):
        with pytest.raises(ValueError, match=said): model(ids, attention_mask=mask)


def test_what_cannot_be_honoured_is_refused(hf):
    ids = texts(30)[0]["input_ids"]
    def refused(said, call):
        with pytest.raises(ValueError, match=said): call()
    refused("window", lambda: use_hilbert_attention(build(hf, "MistralConfig", TEXT["Mistral, wide window"][1] | dict(sliding_window=16)), segment_size=8)(ids))
    refused("packed", lambda: use_hilbert_attention(llama(hf), segment_size=8)(ids, position_ids=torch.arange(15).repeat(2)[None].expand(2, -1), use_cache=False))
    refused("curve=", lambda: use_hilbert_attention(llama(hf), segment_size=8, curve="hilbert").generate(ids, max_new_tokens=2, pad_token_id=0, eos_token_id=None))
    refused("cache", lambda: use_hilbert_attention(llama(hf), segment_size=8).generate(ids, max_new_tokens=2, pad_token_id=0, eos_token_id=None, cache_implementation="static"))
    refused("padding on the left", lambda: use_hilbert_attention(llama(hf), segment_size=8, prefix_tokens=1)(**texts(30, "left")[0]))
    refused("softcap", lambda: use_hilbert_attention(build(hf, "Gemma2Config", dict(**SIZES, num_key_value_heads=2, vocab_size=50, head_dim=8)), segment_size=8)(ids))
    refused("encoder-decoder", lambda: use_hilbert_attention(build(hf, "T5Config", dict(d_model=32, num_layers=1, num_heads=4, vocab_size=50)), segment_size=8))
    refused("several models inside", lambda: use_hilbert_attention(build(hf, "CLIPConfig", dict(text_config=dict(**SIZES, vocab_size=50), vision_config=VISION["CLIP"][1])), segment_size=8))
    refused("expected a transformers.PreTrainedModel", lambda: use_hilbert_attention(nn.Linear(2, 2), segment_size=8))
    refused("no setting", lambda: use_hilbert_attention(llama(hf), segments=8))
    refused("no settings", lambda: build(hf, *TEXT["Llama"], register_hilbert_attention(name="hilbert_unset"))(ids))
    refused("means something else", lambda: register_hilbert_attention(name="sdpa"))
    refused("attn", lambda: use_hilbert_attention(llama(hf), segment_size=8)(ids, output_attentions=True))


def test_registration_and_saving(hf, tmp_path):
    ids = texts(30)[0]["input_ids"]
    eight, nine = HilbertSettings(segment_size=8), HilbertSettings(segment_size=9)
    assert register_hilbert_attention(eight, name="hilbert_eight") == register_hilbert_attention(name="hilbert_eight") == "hilbert_eight"  # again, settings stay
    by_name = build(hf, *TEXT["Llama"], "hilbert_eight", head="AutoModelForCausalLM")
    by_model = use_hilbert_attention(llama(hf), eight)
    assert torch.equal(by_name(ids).logits, by_model(ids).logits)
    assert not torch.equal(by_name(ids).logits, use_hilbert_attention(llama(hf), nine)(ids).logits)
    by_model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=register_hilbert_attention())
    assert again.config.hilbert_attention == {"segment_lengths": 8} and torch.equal(again(ids).logits, by_model(ids).logits)
    by_model.set_attn_implementation("sdpa")
    assert torch.allclose(by_model(ids).logits, llama(hf)(ids).logits, atol=1e-4)


def test_training_with_checkpointing_and_dropout(hf):
    model, reference = (use_hilbert_attention(llama(hf), segment_size=10).train() for _ in range(2))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_same(results(model, input_ids=texts()[0]["input_ids"], use_cache=False), results(reference, input_ids=texts()[0]["input_ids"], use_cache=False))
    dropped = use_hilbert_attention(build(hf, "ViTConfig", VISION["ViT"][1] | dict(attention_probs_dropout_prob=0.5)), segment_size=10)
    x = pixels(dropped)
    assert torch.equal(dropped(x).last_hidden_state, dropped(x).last_hidden_state) and not torch.equal(dropped.train()(x).last_hidden_state, dropped(x).last_hidden_state)


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_compiles_into_one_graph(hf, kind):
    torch._dynamo.reset()
    if kind == "vision": inputs = dict(pixel_values=pixels(model := use_hilbert_attention(build(hf, *VISION["ViT"][:2]), segment_size=10)))
    else: model, inputs = use_hilbert_attention(build(hf, *TEXT["Llama"]), segment_size=10), texts(padding="right")[0] | dict(use_cache=False)
    with torch.no_grad(): assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(**inputs).last_hidden_state, model(**inputs).last_hidden_state, atol=1e-5)


# nn.MultiheadAttention

def encoder(**options):
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, **dict(dropout=0.0, batch_first=True) | options), 2)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
def test_converted_encoder(batch_first, train):
    "One segment: what it was, with and without padding and causal mask, gradients too, in training and in eval mode, past PyTorch's fused path."
    dense = encoder(batch_first=batch_first).train(train)
    model = copy.deepcopy(dense)
    before = dict(model.named_parameters())
    assert convert_attention(model, segment_size=24) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(before[name] is p for name, p in model.named_parameters()) and len(before) == len(list(model.parameters())) and list(model.state_dict()) == list(dense.state_dict())
    assert all(m.training == train for m in model.modules())
    x = rand(2, 24, 32) if batch_first else rand(24, 2, 32)
    padded = torch.arange(24).expand(2, -1) >= torch.tensor([[24], [17]])
    keep = ~padded if batch_first else ~padded.T
    for options in (dict(), dict(src_key_padding_mask=padded), dict(mask=nn.Transformer.generate_square_subsequent_mask(24), is_causal=True)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad): a, b = model(x, **options), dense(x, **options)
            assert (a - b)[keep].abs().max() < 1e-5
        a, b = (torch.autograd.grad((m(x, **options) * rand(*x.shape, seed=1))[keep].sum(), list(m.parameters())) for m in (model, dense))
        assert all((s - t).norm() <= 1e-5 * max(t.norm(), 1) for s, t in zip(a, b))
    sparse = copy.deepcopy(dense)
    convert_attention(sparse, segment_size=6, grid=(4, 6))
    mask = ~(HilbertSettings(segment_size=6, grid=(4, 6)).counts(24, 1)[0] > 0)
    assert torch.allclose(sparse(x), dense(x, mask=mask), atol=1e-5)


def test_conversion_takes_what_fits_and_says_what_does_not():
    class Model(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.a, self.b, self.c = nn.MultiheadAttention(8, 2, **options), nn.MultiheadAttention(8, 2, dropout=0.25, bias=False), nn.Linear(8, 8)
            self.again = self.b
    model = Model()
    model.b.in_proj_weight.requires_grad_(False)
    assert convert_attention(model, segment_size=4, include=["b", "again"]) == ["b", "again"] and model.b is model.again and type(model.a) is nn.MultiheadAttention
    assert isinstance(model.b, MultiheadDilatedAttention) and model.b.attention.dropout == 0.25 and model.b.in_proj_bias is None and not model.b.in_proj_weight.requires_grad
    assert convert_attention(model, segment_size=4) == ["a"]
    with pytest.raises(ValueError, match="no nn.MultiheadAttention"): convert_attention(model, segment_size=4)
    with pytest.raises(ValueError, match="no nn.MultiheadAttention"): convert_attention(Model(), segment_size=4, exclude="*")
    with pytest.raises(ValueError, match="itself"): convert_attention(nn.MultiheadAttention(8, 2), segment_size=4)
    for options, said in ((dict(add_bias_kv=True), "add_bias_kv"), (dict(add_zero_attn=True), "add_zero_attn"), (dict(kdim=4), "cross-attention")):
        model = Model(**options)
        with pytest.raises(ValueError, match=said): convert_attention(model, segment_size=4)
        assert type(model.a) is type(model.b) is nn.MultiheadAttention  # nothing was changed
        assert convert_attention(model, segment_size=4, exclude="a") == ["b", "again"]
    model = Model()
    model.a.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"): convert_attention(model, segment_size=4)
    model = Model()
    nn.utils.parametrizations.spectral_norm(model.a.out_proj)
    with pytest.raises(ValueError, match="parametrized"): convert_attention(model, segment_size=4)
    class Other(nn.MultiheadAttention): pass
    model.a = Other(8, 2)
    with pytest.raises(ValueError, match="is a Other"): convert_attention(model, segment_size=4)
    seq2seq = nn.Transformer(8, 2, 1, 1, 8, batch_first=True)
    with pytest.raises(ValueError, match="multihead_attn: it is cross-attention"): convert_attention(seq2seq, segment_size=4)
    assert len(convert_attention(seq2seq, segment_size=4, exclude="*multihead_attn")) == 2
    seq2seq(rand(1, 5, 8), rand(1, 7, 8))


# vision transformers of others

class FusedAttention(nn.Module):
    "With the attributes of timm's layer."
    def __init__(self, dim=32, num_heads=4, extras=True):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj, self.attn_drop, self.proj_drop = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(0.0), nn.Dropout(0.0)
        self.q_norm, self.k_norm, self.norm = (nn.LayerNorm(dim // num_heads), nn.LayerNorm(dim // num_heads), nn.LayerNorm(dim)) if extras else (nn.Identity(),) * 3
        self.gate = nn.Linear(dim, dim) if extras else None

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal=is_causal, scale=self.scale)
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj(out if self.gate is None else out * self.gate(x).sigmoid())


class SmallViT(nn.Module):
    def __init__(self, attention, registers=0):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        self.patch_embed.grid_size, self.num_prefix_tokens = (4, 6), 1 + registers
        self.cls_token, self.blocks = nn.Parameter(torch.randn(1, 1 + registers, 32)), nn.ModuleList([attention() for _ in range(2)])

    def forward(self, x, mask=None):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks: x = x + block(x, attn_mask=mask)
        return x


@pytest.mark.parametrize("extras", [True, False])
def test_layers_with_one_projection(extras):
    model = SmallViT(lambda: FusedAttention(extras=extras), registers=2)
    sparse, dense, x = copy.deepcopy(model), copy.deepcopy(model), rand(2, 3, 16, 24)
    assert convert_vit(sparse, segment_size=6) == convert_vit(dense, segment_size=24) == ["blocks.0", "blocks.1"]
    assert isinstance(sparse.blocks[0], FusedQKVAttention) and list(sparse.state_dict()) == list(model.state_dict())
    mask = HilbertSettings(segment_size=6, grid=(4, 6), prefix_tokens=3).counts(27, 1)[0] > 0
    for new, m in ((dense, None), (sparse, mask)):
        assert torch.allclose(new(x), model(x, m), atol=1e-5)
        a, b = (torch.autograd.grad(f.sum(), list(w.parameters()), allow_unused=True) for f, w in ((new(x).square(), new), (model(x, m).square(), model)))
        for (name, _), s, t in zip(model.named_parameters(), a, b): assert (s - t).norm() <= 1e-4 * max(t.norm(), 1), name
    with pytest.raises(ValueError, match="attn_mask"): sparse(x, mask)


def test_layers_of_unknown_kind_are_refused():
    class Biased(FusedAttention):
        def __init__(self):
            super().__init__()
            self.bias_table = nn.Parameter(torch.zeros(3))
    class Rotary(FusedAttention):
        def forward(self, x, rope): return super().forward(x)
    with pytest.raises(ValueError, match="bias_table"): convert_vit(SmallViT(Biased), segment_size=4)
    with pytest.raises(ValueError, match="takes rope"): convert_vit(SmallViT(Rotary), segment_size=4)
    with pytest.raises(ValueError, match="give grid"): convert_vit(encoder(), segment_size=4)
    assert convert_vit(encoder(), segment_size=4, grid=(4, 6), prefix_tokens=0) == ["layers.0.self_attn", "layers.1.self_attn"]


def real_vit(package):
    try:
        if package == "torchvision":
            from torchvision.models import VisionTransformer
            return VisionTransformer(image_size=32, patch_size=4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=5)
        import timm
        return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, embed_dim=32, num_heads=4, num_classes=5, reg_tokens=2)
    except (ImportError, RuntimeError) as e: pytest.skip(f"{package} cannot be used here: {e}")  # RuntimeError: built for another torch


@pytest.mark.parametrize("package, prefix", [("torchvision", 1), ("timm", 3)])
def test_vision_transformers_of_others(package, prefix):
    model = real_vit(package).eval()
    dense, sparse, x = copy.deepcopy(model), copy.deepcopy(model), rand(2, 3, 32, 32)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()): p.add_(0.2 * rand(*p.shape, seed=i))  # away from the tiny initial weights
    dense.load_state_dict(model.state_dict()), sparse.load_state_dict(model.state_dict())
    assert vit_geometry(model) == ((8, 8), prefix) and len(convert_vit(dense, segment_size=64)) == len(convert_vit(sparse, segment_size=16)) == 2
    assert torch.allclose(dense(x), model(x), atol=1e-4) and not torch.allclose(sparse(x), model(x), atol=1e-3)


# diffusers

@pytest.fixture(scope="module")
def diffusers(): return pytest.importorskip("diffusers")


@pytest.mark.parametrize("picture", [False, True])
def test_processor_is_the_masked_layer(diffusers, picture):
    from diffusers.models.attention_processor import Attention
    torch.manual_seed(0)
    layer = Attention(32, heads=4, dim_head=8, bias=True, qk_norm="layer_norm", **(dict(norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0) if picture else {})).eval()
    ours, x, s = copy.deepcopy(layer), rand(2, 54, 32), HilbertSettings(segment_size=9, dilation_rate=2, grid=(12, 17) if picture else (6, 9), curve="tile:2")
    if picture: x = x.mT.reshape(2, 32, 6, 9)
    ours.set_processor(HilbertAttnProcessor(s))
    mask = HilbertSettings(segment_size=9, dilation_rate=2, grid=(6, 9), curve="tile:2").counts(54, 1)[0] > 0
    bias = torch.where(mask, 0.0, -torch.inf).expand(2, 54, 54)
    a, b = ((out := m(x, attention_mask=o), torch.autograd.grad((out * rand(*out.shape, seed=1)).sum(), list(m.parameters()))) for m, o in ((ours, None), (layer, bias)))
    assert torch.allclose(a[0], b[0], atol=1e-5) and all(torch.allclose(s, t, atol=1e-4) for s, t in zip(a[1], b[1]))
    with pytest.raises(ValueError, match="attention_mask"): ours(x, attention_mask=bias)
    if not picture:
        with pytest.raises(ValueError, match="55 tokens"): ours(rand(2, 55, 32))
        with pytest.raises(ValueError, match="cross-attention"): ours(x, encoder_hidden_states=x)


def test_unet(diffusers):
    def unet():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(sample_size=(12, 18), block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, attention_head_dim=2, cross_attention_dim=24,
                                              down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()
    own, dense, sparse = unet(), unet(), unet()
    names = use_hilbert_processor(dense, grid=(12, 18))
    assert names == use_hilbert_processor(sparse, grid=(12, 18), segment_size=27) == use_hilbert_processor(sparse, grid=(12, 18), segment_size=27) and names and all(n.endswith("attn1") for n in names)
    latent, prompt = rand(1, 4, 12, 18), rand(1, 5, 24)
    with torch.no_grad(): outs = [m(latent, 10, prompt).sample for m in (own, dense, sparse)]
    assert torch.allclose(outs[1], outs[0], atol=1e-5) and not torch.allclose(outs[2], outs[0], atol=1e-3)
    with pytest.raises(ValueError, match="no self-attention"): use_hilbert_processor(nn.Linear(2, 2), segment_size=4)
    next(m for n, m in own.named_modules() if n == names[0]).processor = type("OddProcessor", (), {})()
    with pytest.raises(ValueError, match="OddProcessor"): use_hilbert_processor(own, segment_size=4)
    assert use_hilbert_processor(own, segment_size=4, exclude=names[0]) == names[1:]
