"""Models of transformers against eager attention: exact, with padding, caches, masks."""

import json

import pytest
import torch
import torch.nn as nn

import hilbert_attn.integrations.caches as of_caches
import hilbert_attn.integrations.masks as of_masks
from hilbert_attn.calls import check_call
from hilbert_attn.integrations import (
    HilbertSettings,
    register_hilbert_attention,
    use_hilbert_attention,
    vit_geometry,
)
from hilbert_attn.reference import masked_attention


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    masks = transformers.AttentionMaskInterface
    transformers.AttentionInterface.register("masked", masked_eager)
    masks.register("masked", masks()["sdpa"])
    return transformers


SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
SQUARE, WIDE = (dict(image_size=size, patch_size=4) for size in (32, (24, 32)))
DINO = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
VISION = {  # configuration, its options, grid, prefix
    "ViT": ("ViTConfig", SIZES | WIDE, (6, 8), 1),
    "DeiT": ("DeiTConfig", SIZES | WIDE, (6, 8), 2),
    "CLIP": ("CLIPVisionConfig", SIZES | SQUARE, (8, 8), 1),
    "DINOv2, registers": (
        "Dinov2WithRegistersConfig",
        DINO | SQUARE | dict(num_register_tokens=3),
        (8, 8),
        4,
    ),
}
GROUPED = dict(**SIZES, num_key_value_heads=2, vocab_size=50)
GPT = dict(
    n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=2
)
TEXT = {
    "Llama": ("LlamaConfig", GROUPED),
    "GPT-2": ("GPT2Config", GPT),
    "BERT": ("BertConfig", dict(**SIZES, vocab_size=50)),
    "Mistral, wide window": ("MistralConfig", GROUPED | dict(sliding_window=64)),
}
_COUNTS = [None]  # the mask of `masked_eager`: (H, N, N) or (B, H, N, N)


def masked_eager(module, query, key, value, attention_mask, scaling=None, **options):
    "The yardstick: scores, mask, softmax."
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    allowed = _COUNTS[0] > 0
    allowed = allowed if allowed.ndim == 4 else allowed[None]
    if attention_mask is not None:
        allowed = allowed & attention_mask
    scores = query @ key.mT * scaling
    scores = scores.masked_fill(~allowed, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def build(hf, config, options, attention="eager", head="AutoModel"):
    "A small model, away from the tiny initial weights."
    torch.manual_seed(0)
    config = getattr(hf, config)(**options)
    model = (
        getattr(hf, head).from_config(config, attn_implementation=attention).eval()
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(
                0.05
                * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            )
    return model


def llama(hf, **options):
    return build(hf, "LlamaConfig", GROUPED | options, head="AutoModelForCausalLM")


def switched(hf, *settings, **options):
    return use_hilbert_attention(llama(hf), *settings, **options)


def results(model, keep=..., **inputs):
    "Output, and gradients of all parameters."
    out = model(**inputs)
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    names, leaves = zip(*model.named_parameters())
    loss = (out * rand(*out.shape, seed=3))[keep].sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = {n: g for n, g in zip(names, grads) if g is not None}
    return out.detach()[keep], found


def assert_same(a, b, tolerance=2e-5):
    (out, grads), (expected, others) = a, b
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
    assert grads.keys() == others.keys()
    largest = max(g.norm() for g in others.values())
    assert largest > 1e-3
    for name, g in others.items():
        error = (grads[name] - g).norm()
        assert error <= tolerance * g.norm() + 2e-5 * largest, name


def pixels(model):
    size = model.config.image_size
    return rand(2, 3, *((size, size) if isinstance(size, int) else size), seed=4)


def texts(n=30, padding=None):
    "Inputs of two texts, and which tokens of the result count."
    ids = torch.randint(3, 50, (2, n), generator=torch.Generator().manual_seed(2))
    if padding is None:
        return dict(input_ids=ids), ...
    keys = torch.ones(2, n, dtype=torch.int64)
    keys[1, slice(11) if padding == "left" else slice(n - 11, n)] = 0
    return dict(input_ids=ids, attention_mask=keys), keys.bool()


IDS = texts(30)[0]["input_ids"]


# against eager attention


@pytest.mark.parametrize("name", VISION)
def test_vision_models(hf, name):
    "One segment is dense eager attention; several are eager attention with the mask."
    config, options, grid, prefix = VISION[name]
    eager = build(hf, config, options)
    x = dict(pixel_values=pixels(eager))
    assert vit_geometry(eager) == (grid, prefix)
    dense = use_hilbert_attention(build(hf, config, options), segment_size=64)
    expected = results(eager, **x)
    assert_same(results(dense, **x), expected)
    how = dict(segment_size=12, dilation_rate=2)
    sparse = use_hilbert_attention(build(hf, config, options), **how)
    assert sparse.config.hilbert_attention == dict(
        segment_lengths=12, dilation_rates=2
    )
    s = HilbertSettings(**how, grid=grid, prefix_tokens=prefix)
    _COUNTS[0] = s.counts(prefix + grid[0] * grid[1], 4)
    ours = results(sparse, **x)
    assert_same(ours, results(build(hf, config, options, "masked"), **x))
    assert (ours[0] - expected[0]).abs().max() > 1e-2


OVERLAPPING = [
    dict(segment_size=8),
    dict(
        segment_size=8,
        overlap=3,
        prefix_tokens=2,
    ),
]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("settings", OVERLAPPING)
def test_segments_of_a_decoder_overlap(hf, settings, padding):
    "Against its own attention under a mask that is written out, with gradients."
    n, w, prefix = 30, settings["segment_size"], settings.get("prefix_tokens", 0)
    before = settings.get("overlap", w)
    place = torch.arange(n) - prefix
    begin = place // w * w
    near = (place >= begin[:, None] - before) & (place <= place[:, None])
    _COUNTS[0] = (near | (place < 0)).tril()[None].long()
    if padding:
        late = torch.zeros_like(_COUNTS[0])
        late[:, 11:, 11:] = _COUNTS[0][:, :19, :19]
        _COUNTS[0] = torch.stack([_COUNTS[0], late])
    inputs, keep = texts(padding=padding)
    sparse = use_hilbert_attention(build(hf, *TEXT["Llama"]), **settings)
    expected = results(build(hf, *TEXT["Llama"], "masked"), keep, **inputs)
    assert_same(results(sparse, keep, **inputs), expected)


NO_OVERLAP = [
    dict(),
    dict(segment_size=8, dilation_rate=2),
    dict(segment_size=8, shift=3),
    dict(segment_size=8, curve="hilbert"),
    dict(
        segment_lengths=[4, 8],
        dilation_rates=[1, 1],
    ),
]


def stored(model, **how):
    switched = use_hilbert_attention(model, **how)
    return switched.config.hilbert_attention


def test_which_segments_overlap_by_themselves(hf):
    eight = dict(segment_lengths=8)
    found = stored(llama(hf), segment_size=8)
    assert found == eight | dict(overlap="segment")
    found = stored(llama(hf), segment_size=8, overlap=0)
    assert found == eight | dict(overlap=0)
    layers = {
        "0": "dense",
        "1": dict(segment_size=4),
    }
    found = stored(llama(hf), layers=layers)
    assert found["overlap"] == "segment"
    for how in NO_OVERLAP:
        assert "overlap" not in stored(llama(hf), **how)
    encoder = build(hf, *TEXT["BERT"])
    assert stored(encoder, segment_size=8) == eight


@pytest.mark.parametrize("how", NO_OVERLAP[1:])
def test_what_has_no_overlap_says_so(hf, how):
    with pytest.raises(ValueError, match="overlap=3 with "):
        use_hilbert_attention(llama(hf), **how, overlap=3)


def test_a_configuration_from_before_there_was_an_overlap(hf, tmp_path):
    "What is stored without one means what it meant."
    model = use_hilbert_attention(llama(hf), segment_size=8, overlap=0)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    text = json.loads(file.read_text())
    assert text["hilbert_attention"].pop("overlap") == 0
    file.write_text(json.dumps(text))
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.hilbert_attention == dict(segment_lengths=8)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    new = use_hilbert_attention(llama(hf), segment_size=8)
    new.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, new(IDS).logits)
    assert (new(IDS).logits - model(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_text_models(hf, name, padding):
    def model(attention="eager"):
        return build(hf, *TEXT[name], attention)

    inputs, keep = texts(padding=padding)
    dense = use_hilbert_attention(model(), segment_size=30)
    assert_same(results(dense, keep, **inputs), results(model(), keep, **inputs))
    prefix = 2 if padding == "right" else 0
    s = HilbertSettings(segment_size=10, dilation_rate=3, prefix_tokens=prefix)
    _COUNTS[0] = s.counts(30, 4, causal=name != "BERT")
    if padding == "left" and name != "BERT":  # segments begin with the text
        late = torch.zeros_like(_COUNTS[0])
        late[:, 11:, 11:] = _COUNTS[0][:, :19, :19]
        _COUNTS[0] = torch.stack([_COUNTS[0], late])
    sparse = use_hilbert_attention(model(), s)
    expected = results(model("masked"), keep, **inputs)
    assert_same(results(sparse, keep, **inputs), expected)


def test_the_mask_is_not_dropped(hf):
    "A name without a mask function gets no padding mask from transformers: ours has one."
    inputs, keep = texts(padding="left")
    model = switched(hf, segment_size=30)
    change = model(**inputs).logits - model(inputs["input_ids"]).logits
    assert change[keep].abs().max() > 1e-2


# caches

GROWING = [
    dict(segment_size=8, prefix_tokens=2), # each segment sees the one before it
    dict(segment_size=8, overlap=0),
    dict(segment_size=6, overlap=9),
    dict(segment_lengths=(4, 16), dilation_rates=(1, 4), dilation_mode="longnet"),
    dict(segment_size=12, dilation_rate=3),
    dict(),
]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("settings", GROWING)
def test_generation_from_a_cache_is_the_whole_sequence(hf, settings, padding):
    model, inputs = switched(hf, **settings), texts(13, padding)[0]
    done = model.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    prompt = inputs.get("attention_mask", torch.ones(2, 13, dtype=torch.int64))
    keys = torch.cat([prompt, torch.ones(2, 20, dtype=torch.int64)], 1)
    position = (keys.cumsum(1) - 1).clamp(min=0)
    whole = dict(attention_mask=keys, position_ids=position, use_cache=False)
    with torch.no_grad():
        logits = model(done.sequences, **whole).logits[:, 12:-1]
    assert (torch.stack(done.logits, 1) - logits).abs().max() < 1e-4


def in_chunks(model, ids, keys, sizes):
    "Logits of a prompt in chunks of these sizes, and of what follows token by token."
    position, cache, end, found = (keys.cumsum(1) - 1).clamp(min=0), None, 0, []
    for size in (*sizes, *[1] * (ids.shape[1] - sum(sizes))):
        part, end = slice(end, end + size), end + size
        how = dict(attention_mask=keys[:, :end], position_ids=position[:, part])
        out = model(ids[:, part], past_key_values=cache, use_cache=True, **how)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


BY_HEADS = dict(segment_lengths=(4, 16), dilation_rates=(1, 4), combine="heads")


@pytest.mark.parametrize("sizes", [(19,), (10, 9), (4, 15)])
@pytest.mark.parametrize("settings", [*GROWING, BY_HEADS])
def test_a_padded_prompt_generates_what_it_generates_alone(hf, settings, sizes):
    "Also where the first of its chunks is padding and nothing else."
    model, keys = switched(hf, **settings), torch.ones(2, 30, dtype=torch.int64)
    keys[1, :6] = 0
    with torch.no_grad():
        both = in_chunks(model, IDS, keys, sizes)[1:, 6:]
        alone = in_chunks(model, IDS[1:, 6:], keys[:1, 6:], (13,))
    assert (both - alone).abs().max() < 1e-4


def test_a_step_leaves_out_what_is_masked_between(hf):
    "Padding that stands behind a prompt lies in the middle once the text goes on."
    settings, keys = HilbertSettings(segment_size=8), torch.ones(2, 22, dtype=torch.bool)
    keys[1, 17:19] = False
    q, k, v = rand(2, 4, 1, 16), rand(2, 2, 22, 16, seed=1), rand(2, 2, 22, 16, seed=2)
    call = check_call(q, k, v, crossed=True, key_mask=keys)
    found, _ = of_caches.cached_attention(call, settings)
    mask = (torch.arange(22) >= 16) & keys[:, None, None]
    assert torch.allclose(found, masked_attention(q, k, v, mask)[0], atol=1e-5)


def assert_chunks_are_the_whole(model, ids, sizes):
    with torch.no_grad():
        whole, cache, parts = model(ids, use_cache=False).logits, None, []
        for part in ids.split(sizes, 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


def test_a_cache_filled_in_chunks(hf):
    model = switched(hf, segment_size=8, dilation_rate=2)
    assert_chunks_are_the_whole(model, IDS, (11, 7, 1, 11))


def test_pixels_one_after_another(hf):
    "With the grid given, positions along the curve do not move while the picture grows."
    model = switched(
        hf, segment_size=8, dilation_rate=2, grid=(5, 6), prefix_tokens=1
    )
    ids = texts(31)[0]["input_ids"]
    assert_chunks_are_the_whole(model, ids, (1, 9, 1, 20))
    with pytest.raises(ValueError, match="do not fit grid"):
        model(ids[:, :1].expand(2, 33), use_cache=False)


def test_padding_may_hold_anything(hf):
    "NaN in the embedding of the padding token, which stands on the left, reaches nobody."
    ids, keys = IDS.clone(), torch.ones(2, 30, dtype=torch.int64)
    ids[1, :11], keys[1, :11] = 0, 0
    model, found = switched(hf, segment_size=30), []
    for value in (0.0, torch.nan):
        with torch.no_grad():
            model.get_input_embeddings().weight[0] = value
            first = model(ids[:, :20], attention_mask=keys[:, :20], use_cache=True)
            cache = dict(past_key_values=first.past_key_values, use_cache=True)
            then = model(ids[:, 20:], attention_mask=keys, **cache)
        logits = torch.cat([first.logits, then.logits], 1)[keys.bool()]
        found.append(logits[:, 1:])  # the head may be tied to the embedding
    assert torch.equal(*found)


# masks of four dimensions

LOWER = torch.ones(30, 30, dtype=torch.bool).tril()
MINIMUM = torch.finfo(torch.float32).min


def test_masks_of_four_dimensions(hf):
    "Causal and both ways are understood, with padding or not."
    model, (inputs, keep) = switched(hf, segment_size=30), texts(padding="left")
    ids, keys = inputs["input_ids"], inputs["attention_mask"].bool()
    allowed, expected = LOWER & keys[:, None, None], model(**inputs).logits[keep]
    for low in (None, MINIMUM, -torch.inf):
        mask = allowed if low is None else torch.where(allowed, 0.0, low)
        out = model(ids, attention_mask=mask).logits[keep]
        assert torch.allclose(out, expected, atol=1e-5)
    both, position = keys[:, None, None].expand(2, 1, 30, 30), torch.arange(30)[None]
    bias = torch.where(both, 0.0, MINIMUM)
    eager = llama(hf)(ids, attention_mask=bias, position_ids=position).logits
    for mask in (both, keys[:, None, None]):
        out = model(ids, attention_mask=mask, position_ids=position).logits
        assert torch.allclose(out, eager, atol=1e-4)


BAND = LOWER.triu(-3)
REFUSED_MASKS = {
    "neither causal": BAND[None, None],
    "a bias on the scores": torch.where(LOWER[None, None], 0.1, MINIMUM),
    "learned bias": torch.zeros(1, 1, 30, 30).requires_grad_(),
    "between heads": torch.stack([LOWER, BAND] * 2)[None],
    "shape": LOWER[None, None, :, :20],
}


@pytest.mark.parametrize("said", REFUSED_MASKS)
def test_other_masks_are_refused(hf, said):
    model = switched(hf, segment_size=30)
    with pytest.raises(ValueError, match=said):
        model(IDS, attention_mask=REFUSED_MASKS[said])


# what cannot be honoured

SHORT = dict(max_new_tokens=2, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("shape", [(30,), (3, 30), (2, 1, 30), (2, 30, 30)])
def test_masks_of_another_shape_are_refused(hf, shape):
    keys = torch.ones(shape, dtype=torch.int64)
    for fill in (1, 0):
        keys[..., 20:] = fill
        with pytest.raises(ValueError, match=r"expected a mask of keys \(2, tokens\)"):
            switched(hf, segment_size=8)(IDS, attention_mask=keys)


def test_packed_documents_are_refused(hf):
    positions = torch.arange(15).repeat(2)[None].expand(2, -1)
    with pytest.raises(ValueError, match="packed"):
        switched(hf, segment_size=8)(IDS, position_ids=positions, use_cache=False)


def test_caches_that_do_not_fit_are_refused(hf):
    with pytest.raises(ValueError, match="curve="):
        switched(hf, segment_size=8, curve="hilbert").generate(IDS, **SHORT)
    mask = hf.AttentionMaskInterface()["hilbert"]
    for q_offset, kv_offset in ((3, 2), (9, 0)):  # of 9 keys
        with pytest.raises(ValueError, match="must be the last of the keys"):
            mask(1, 1, 9, q_offset, kv_offset)


@pytest.mark.parametrize("tokens,causal", [((3, 9), False), ((9, 3), False), ((9, 3), True)])
def test_keys_of_another_sequence_are_refused(hf, tokens, causal):
    model = switched(hf, segment_size=8)
    layer = next(m for m in model.modules() if "hilbert_site" in vars(m))
    attend = hf.AttentionInterface()["hilbert"]
    q, k = (torch.randn(1, 4, n, 8) for n in tokens)
    said = "{} queries and {} keys, not causal".format(*tokens)
    with pytest.raises(ValueError, match=said):
        attend(layer, q, k, k, None, is_causal=causal)


def test_attention_weights_are_refused(hf):
    with pytest.raises(ValueError, match="attn"):
        switched(hf, segment_size=8)(IDS, output_attentions=True)


# windows, caps and sinks that a model brings

KINDS = dict(head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
NATIVE = {
    "Mistral": ("MistralConfig", GROUPED | dict(sliding_window=8)),
    "Gemma2": ("Gemma2Config", GROUPED | KINDS | dict(attn_logit_softcapping=0.5)),
    "Gemma3": ("Gemma3TextConfig", GROUPED | KINDS),
    "GPT-OSS": ("GptOssConfig", GROUPED | KINDS | dict(
        num_local_experts=2, num_experts_per_tok=1)),
    "ModernBERT": ("ModernBertConfig", SIZES | dict(
        vocab_size=50, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)),
}


@pytest.mark.parametrize("padding", (None, "left", "right"))
@pytest.mark.parametrize("name", NATIVE)
def test_native_windows_caps_and_sinks(hf, name, padding, monkeypatch):
    windows, own = [], of_caches.hilbert_slide_attention
    monkeypatch.setattr(of_caches, "hilbert_slide_attention",
                        lambda *x, **o: (windows.append(x[4]), own(*x, **o))[1])
    inputs, keep = texts(30, padding)
    eager = results(build(hf, *NATIVE[name]), keep, **inputs)
    model = use_hilbert_attention(build(hf, *NATIVE[name]))
    assert_same(results(model, keep, **inputs), eager)
    sites = [m.hilbert_site for m in model.modules() if hasattr(m, "hilbert_site")]
    assert [site.calls for site in sites] == [1, 1]
    reach = (4, 4) if name == "ModernBERT" else (7, 0)
    assert windows == [reach] * (2 if name == "Mistral" else 1)


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("name", [name for name in NATIVE if name != "ModernBERT"])
def test_native_windows_in_generation(hf, name, padded):
    "With caches that let go of what no window sees, padded on the left or not."
    how = dict(max_new_tokens=12, pad_token_id=0, eos_token_id=None, do_sample=False,
               output_logits=True, return_dict_in_generate=True)
    if padded: how["attention_mask"] = (torch.arange(30) >= torch.tensor([[0], [11]])).long()
    found = []
    for switch in (use_hilbert_attention, lambda model: model):
        model = switch(build(hf, *NATIVE[name], head="AutoModelForCausalLM"))
        found.append(model.generate(IDS, **how))
    assert torch.equal(found[0].sequences, found[1].sequences)
    ours, eager = (torch.stack(x.logits) for x in found)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_segments_within_a_window(hf):
    "Segments that are no longer than the window are the pattern; longer ones are refused."
    without = "MistralConfig", GROUPED | dict(sliding_window=None)
    for how in (dict(segment_size=8), dict(segment_size=5, overlap=3), dict(segment_size=4)):
        window = use_hilbert_attention(build(hf, *NATIVE["Mistral"]), **how)
        own = HilbertSettings.from_dict(window.config.hilbert_attention)
        assert own.before == (0 if own.segment_lengths == 8 else 8 - own.segment_lengths)
        plain = use_hilbert_attention(build(hf, *without), **how | dict(overlap=own.before))
        assert_same(results(window, input_ids=IDS), results(plain, input_ids=IDS))
    for how in (dict(segment_size=9), dict(segment_size=8, shift=1), dict(
            segment_size=5, overlap=4)):
        with pytest.raises(ValueError, match="sliding_window=8 with 30 tokens"):
            use_hilbert_attention(build(hf, *NATIVE["Mistral"]), **how)(IDS)


def test_chunks_are_no_windows():
    def chunked(b, h, q, k): return (k <= q) & (q // 8 == k // 8)
    def window(b, h, q, k): return (k <= q) & (k > q - 8)
    keys = torch.ones(1, 30, dtype=torch.bool)
    def both_ways(b, h, q, k): return abs(q - k) <= 8
    assert of_masks._window_of(window, 8, keys) == (True, 8)
    assert of_masks._window_of(window, 8, keys[:, :8]) == (True, None)
    assert of_masks._window_of(both_ways, 8, keys) == (False, 9)
    with pytest.raises(ValueError, match="a chunk of 8"):
        of_masks._window_of(chunked, 8, keys)


# windows that only the mask has, or only the layer

EXPERTS = dict(num_experts=2, num_experts_per_tok=1, sliding_window=7)
SLIDING = ["sliding_attention"] * 2
ALL_SLIDE = {
    "Gemma3": ("Gemma3TextConfig", GROUPED | KINDS | dict(sliding_window=7, layer_types=SLIDING)),
    "Qwen2Moe": ("Qwen2MoeConfig", GROUPED | EXPERTS | dict(
        moe_intermediate_size=16, shared_expert_intermediate_size=16, use_sliding_window=True,
        layer_types=SLIDING)),
    "Phimoe": ("PhimoeConfig", GROUPED | dict(
        num_local_experts=2, num_experts_per_tok=1, sliding_window=7)),
}
MASKED = ALL_SLIDE | {"Olmoe": ("OlmoeConfig", GROUPED | EXPERTS | dict(pad_token_id=0))}


def moved(hf, name, switch):
    "A model whose weights are far from its first ones."
    model = build(hf, *MASKED[name], attention="sdpa", head="AutoModelForCausalLM")
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters(): p.data += 0.15 * torch.randn(p.shape, generator=generator)
    return use_hilbert_attention(model) if switch else model


@pytest.mark.parametrize("padding", (None, "left"))
@pytest.mark.parametrize("name", MASKED)
def test_the_window_of_the_mask_holds(hf, name, padding):
    "Whether a layer passes a window on, or passes one that its mask has not."
    inputs, keep = texts(23, padding)
    ours, sdpa = (moved(hf, name, switch)(**inputs).logits[keep] for switch in (True, False))
    torch.testing.assert_close(ours, sdpa, rtol=1e-5, atol=1e-5)


def test_a_layer_without_window_needs_all_keys(hf):
    "Its cache slides, for its configuration names a window, but its mask does not."
    with pytest.raises(ValueError, match="of 21 tokens are no longer in the cache"):
        moved(hf, "Olmoe", True).generate(IDS[:, :20], **SHORT)


@pytest.mark.parametrize("cache", ("static", None))
@pytest.mark.parametrize("length", (4, 20))
@pytest.mark.parametrize("name", ALL_SLIDE)
def test_generation_where_all_layers_slide(hf, name, length, cache):
    "From prompts shorter and longer than the window."
    how = SHORT | dict(max_new_tokens=8, do_sample=False, output_logits=True,
                       return_dict_in_generate=True, cache_implementation=cache)
    ours, sdpa = (torch.stack(moved(hf, name, switch).generate(IDS[:, :length], **how).logits)
                  for switch in (True, False))
    torch.testing.assert_close(ours, sdpa, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("name", ("Llama", "Mistral", "Gemma2"))
def test_a_static_cache(hf, name, padded):
    "Room for tokens that are not there yet changes nothing."
    how = dict(max_new_tokens=12, pad_token_id=0, eos_token_id=None, do_sample=False,
               output_logits=True, return_dict_in_generate=True)
    if padded: how["attention_mask"] = (torch.arange(30) >= torch.tensor([[0], [11]])).long()
    if name == "Llama": model = switched(hf, segment_size=8)
    else: model = use_hilbert_attention(build(hf, *NATIVE[name], head="AutoModelForCausalLM"))
    found = [model.generate(IDS, cache_implementation=kind, **how) for kind in ("static", None)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    static, grown = (torch.stack(x.logits) for x in found)
    torch.testing.assert_close(static, grown)


def test_other_kinds_of_models_are_refused(hf):
    t5 = build(
        hf, "T5Config", dict(d_model=32, num_layers=1, num_heads=4, vocab_size=50)
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        use_hilbert_attention(t5, segment_size=8)
    with pytest.raises(ValueError, match="expected a transformers.PreTrainedModel"):
        use_hilbert_attention(nn.Linear(2, 2), segment_size=8)


def test_learned_masks_are_refused(hf):
    model = build(hf, "DogeConfig", GROUPED, head="AutoModelForCausalLM")
    with pytest.raises(ValueError, match="Doge.* cannot be switched: its layers learn masks"):
        use_hilbert_attention(model)


def test_settings_and_names_are_checked(hf):
    with pytest.raises(ValueError, match="no setting"):
        switched(hf, segments=8)
    unset = register_hilbert_attention(name="hilbert_unset")
    with pytest.raises(ValueError, match="no settings"):
        build(hf, *TEXT["Llama"], unset)(IDS)
    with pytest.raises(ValueError, match="means something else"):
        register_hilbert_attention(name="sdpa")


# names, training, graphs


def test_registered_names_carry_settings(hf):
    eight, nine = HilbertSettings(segment_size=8), HilbertSettings(segment_size=9)
    for settings in (eight, None):  # again, and the settings stay
        assert (
            register_hilbert_attention(settings, name="hilbert_eight")
            == "hilbert_eight"
        )
    by_name = build(hf, *TEXT["Llama"], "hilbert_eight", head="AutoModelForCausalLM")
    by_model = switched(hf, segment_size=8, overlap=0)
    assert torch.equal(by_name(IDS).logits, by_model(IDS).logits)
    assert not torch.equal(by_name(IDS).logits, switched(hf, nine)(IDS).logits)
    by_model.set_attn_implementation("sdpa")
    assert torch.allclose(by_model(IDS).logits, llama(hf)(IDS).logits, atol=1e-4)


def test_saving_keeps_the_settings_of_a_name(hf, tmp_path):
    register_hilbert_attention(segment_size=8, name="hilbert_saved")
    model = build(hf, *TEXT["Llama"], "hilbert_saved", head="AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.hilbert_attention == {"segment_lengths": 8}
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_training_with_checkpointing(hf):
    model, reference = (switched(hf, segment_size=10).train() for _ in range(2))
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    inputs = dict(input_ids=IDS, use_cache=False)
    assert_same(results(model, **inputs), results(reference, **inputs))


def test_dropout_is_for_training(hf):
    options = SIZES | WIDE | dict(attention_probs_dropout_prob=0.5)
    model = use_hilbert_attention(build(hf, "ViTConfig", options), segment_size=10)
    x = pixels(model)

    def out():
        return model(x).last_hidden_state

    assert torch.equal(out(), out())
    model.train()
    assert not torch.equal(out(), out())


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_compiles_into_one_graph(hf, kind):
    torch._dynamo.reset()
    model = build(hf, *(VISION["ViT"][:2] if kind == "vision" else TEXT["Llama"]))
    use_hilbert_attention(model, segment_size=10)
    inputs = (
        dict(pixel_values=pixels(model))
        if kind == "vision"
        else texts(padding="right")[0] | dict(use_cache=False)
    )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        outs = [m(**inputs).last_hidden_state for m in (compiled, model)]
    assert torch.allclose(*outs, atol=1e-5)


# values narrower than keys, as trained: 192 and 128

LATENT = dict(GROUPED, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, n_group=1)
LATENT |= dict(qk_nope_head_dim=4, qk_rope_head_dim=4, n_routed_experts=2, topk_group=1)
LATENT |= dict(num_experts_per_tok=1, first_k_dense_replace=1, moe_intermediate_size=16)


@pytest.mark.parametrize("config", ["DeepseekV2Config", "DeepseekV3Config"])
@pytest.mark.parametrize("width", [6, 12])
def test_values_of_another_width(hf, config, width):
    made = hf, config, LATENT | dict(v_head_dim=width)
    dense, ours = (build(*made, head="AutoModelForCausalLM") for _ in range(2))
    use_hilbert_attention(ours, segment_size=64)
    for padding in (None, "left"):
        x, keep = texts(padding=padding)
        found = ours(**x).logits[keep]
        expected = dense(**x).logits[keep]
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
        words = [model.generate(**x, **SHORT) for model in (ours, dense)]
        assert torch.equal(*words)


# cross-attention

CROSSED = {
    "GPT2Config": GPT | dict(add_cross_attention=True),
    "BertConfig": dict(
        **SIZES, vocab_size=50, is_decoder=True, add_cross_attention=True
    ),
    "BartConfig": dict(
        vocab_size=50, d_model=32, decoder_layers=2, decoder_attention_heads=4
    ),
}


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("keys", [None, 8, 11])
def test_cross_attention_stays_dense(hf, name, keys):
    "Segments are those of self-attention, also where both lengths are equal."
    dense = build(hf, name, CROSSED[name], head="AutoModelForCausalLM")
    ours = build(hf, name, CROSSED[name], head="AutoModelForCausalLM")
    use_hilbert_attention(ours, segment_size=4, overlap=0)
    settings = HilbertSettings(segment_size=4, overlap=0)
    x = dict(use_cache=False)
    if keys:
        x["encoder_hidden_states"] = rand(2, keys, 32)
        x["encoder_attention_mask"] = torch.ones(2, keys, dtype=torch.int64)
        x["encoder_attention_mask"][1, 5:] = 0
    mask = settings.counts(8, 1, causal=True)[None].expand(2, -1, -1, -1)
    mask = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo().min)
    found, expected = (
        results(model, input_ids=IDS[:, :8], **x, **own)
        for model, own in ((ours, {}), (dense, dict(attention_mask=mask)))
    )
    assert_same(found, expected)


def test_generation_with_cross_attention(hf):
    model = build(hf, "GPT2Config", CROSSED["GPT2Config"], head="AutoModelForCausalLM")
    x = dict(encoder_hidden_states=rand(2, 11, 32), pad_token_id=0)
    x |= dict(max_new_tokens=6, do_sample=False, output_logits=True)
    x |= dict(return_dict_in_generate=True, eos_token_id=None)
    expected = model.generate(IDS[:, :9], **x)
    use_hilbert_attention(model, segment_size=64)
    found = model.generate(IDS[:, :9], **x)
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert (a - b).abs().max() < 1e-4
