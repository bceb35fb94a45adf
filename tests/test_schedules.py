"""Layer schedules in every host, and blocks in which PyTorch's attention goes along a curve."""

import copy
import json
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from model_cases import unet
from torch.utils.checkpoint import checkpoint

import hilbert_attn as h
from hilbert_attn.integrations import (
    HilbertSettings,
    hilbert_attention_everywhere,
    prefix_attention,
)
from hilbert_attn.integrations.switch import remove_unasked
from hilbert_attn.schedule import LayerSchedule

RULES = {"1::2": {"shift": 3}, "0": "dense"}
PAIRS = [["1::2", {"shift": 3}], ["0", "dense"]]  # as in a file, where the order counts


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masked(q, k, v, mask):
    "The yardstick: scores, mask, softmax."
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


# rules

SELECTIONS = {
    "0": [0],
    "-1": [5],
    "-6": [0],
    "2:": [2, 3, 4, 5],
    ":2": [0, 1],
    "1::2": [1, 3, 5],
    "::-2": [5, 3, 1],
    "-2:": [4, 5],
    " 1 : 4 ": [1, 2, 3],
}


@pytest.mark.parametrize("layers", SELECTIONS)
def test_rules_name_layers_as_slices_do(layers):
    each = LayerSchedule({layers: {"shift": 1}}).each(6)
    assert [i for i, options in enumerate(each) if options] == sorted(SELECTIONS[layers])


def test_layers_take_turns_and_later_rules_win():
    rules = {":": [{"curve": "a"}, "dense", {"curve": "c"}], "-1": {"shift": 2}}
    each = LayerSchedule(rules).each(5, segment_size=8)
    base = {"segment_size": 8}
    assert each == [
        base | {"curve": "a"},
        None,
        base | {"curve": "c"},
        base | {"curve": "a"},
        base | {"shift": 2},
    ]


def test_turns_begin_where_a_rule_does():
    each = LayerSchedule({"1:": [{"shift": 1}, {"shift": 2}]}).each(4)
    assert each == [{}, {"shift": 1}, {"shift": 2}, {"shift": 1}]


def test_a_rule_wins_over_options_of_all_layers():
    each = LayerSchedule({"0": {"segment_size": 4}}).each(2, segment_size=8, shift=1)
    assert each == [{"segment_size": 4, "shift": 1}, {"segment_size": 8, "shift": 1}]


@pytest.mark.parametrize("rules", [{"6": "dense"}, {"-7": "dense"}, {"6:": "dense"}])
def test_a_rule_about_no_layer_is_an_error(rules):
    with pytest.raises(ValueError, match="no layer of a model that has 6"):
        LayerSchedule(rules).each(6)


WRONG = [{}, "dense", {"a": "dense"}, {"::0": "dense"}, {"0:1:2:3": "dense"}, {"": "dense"},
         {"0": "sparse"}, {"0": []}, {"0": [3]}, {"0": {1: 2}}, {0: "dense", "0": {"shift": 1}},
         {"0": {"segment_size": 8, "segment_lengths": 4}}]


@pytest.mark.parametrize("rules", WRONG)
def test_rules_that_cannot_be_read(rules):
    with pytest.raises(ValueError, match="layers="):
        LayerSchedule(rules)


@pytest.mark.parametrize("layer", [-1, 5])
def test_a_layer_that_no_model_has_is_an_error(layer):
    with pytest.raises(ValueError, match=f"layer={layer}"):
        HilbertSettings(segment_size=8, layers=RULES).of_layer(layer, 5)


def test_numbers_of_layers_are_whole():
    schedule = LayerSchedule({":": "dense"})
    for layer in (1.5, "1", True):
        with pytest.raises(ValueError, match="layer="):
            schedule.at(layer, 3)
    for layers in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="layers="):
            schedule.each(layers)


def test_rules_are_copied():
    given = {"0": [{"segment_lengths": [4, 8]}]}
    schedule = LayerSchedule(given)
    given["0"][0]["segment_lengths"].append(16)
    assert schedule.at(0, 1) == {"segment_lengths": [4, 8]}


def test_orders_of_layers_share_tensors():
    asked = []

    def make(name):
        asked.append(name)
        return torch.arange(4)

    orders = LayerSchedule({"::2": {"curve": "a"}, "-1": "dense"}).orders(make, 6, curve="b")
    assert asked == ["a", "b"] and orders[0] is orders[2] and orders[1] is orders[3]
    assert orders[5] is None


def test_a_schedule_drawn_for_points_can_be_stored():
    drawn = h.OrderSchedule(shuffle=True).drawn(7, torch.Generator().manual_seed(1))
    names = h.OrderSchedule(shuffle=True).names(7, torch.Generator().manual_seed(1))
    again = LayerSchedule(json.loads(json.dumps(drawn.rules)))
    assert [options["curve"] for options in again.each(7)] == names
    assert again == drawn and hash(again) == hash(drawn) and again != LayerSchedule(RULES)


# settings


def test_settings_keep_a_schedule():
    settings = HilbertSettings(segment_size=8, layers=RULES)
    plain = json.loads(json.dumps(settings.to_dict()))
    assert plain == {"segment_lengths": 8, "layers": PAIRS}
    again = HilbertSettings.from_dict(plain)
    assert again == settings and hash(again) == hash(settings)
    assert again != HilbertSettings(segment_size=8)
    first, second = settings.of_layer(0, 4), settings.of_layer(1, 4)
    assert first.segment_lengths is None and first.layers is None
    assert second == HilbertSettings(segment_size=8, shift=3)
    own = HilbertSettings(segment_size=8, layers={"0": {"segment_size": 4}})
    assert own.of_layer(0, 2).segment_lengths == 4


REFUSED = [
    (dict(layers={"0": {"grid": (2, 2)}}), "'grid' is no setting of a layer"),
    (dict(layers={"0": {"segment_size": 0}}), "segment"),
    (dict(layers={"0": {"curve": "peano"}}), "known curves"),
    (dict(shift=-1), "shift=-1"),
    (dict(shift=0.5), "shift=0.5"),
]


@pytest.mark.parametrize("options, said", REFUSED)
def test_settings_of_layers_are_checked_at_once(options, said):
    with pytest.raises(ValueError, match=said):
        HilbertSettings(segment_size=8, **options)


def test_a_call_of_no_known_layer_is_refused():
    q = rand(1, 2, 8, 16)
    with pytest.raises(ValueError, match="of_layer"):
        prefix_attention(q, q, q, HilbertSettings(segment_size=4, layers=RULES))


# shifted segments


def shifted_mask(n, segment, shift, order=None):
    "Position by position: who is in whose segment, when the first begins at `shift`."
    position = torch.arange(n) if order is None else order.argsort()
    segments = (position - shift) % n // segment
    return segments[:, None] == segments


@pytest.mark.parametrize("grid", [None, (4, 6)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_shift_moves_segments_along_the_curve(grid, causal, prefix):
    n, order = 24, None if grid is None else h.curve_order(grid)
    settings = HilbertSettings(segment_size=7, shift=3, grid=grid, prefix_tokens=prefix)
    mask = torch.ones(n + prefix, n + prefix, dtype=torch.bool)
    mask[prefix:, prefix:] = shifted_mask(n, 7, 3, order)
    if causal: mask = mask.tril()
    assert torch.equal(settings.counts(n + prefix, 1, causal=causal)[0] > 0, mask)
    q, k, v = (rand(2, 4, n + prefix, 16, seed=i).requires_grad_() for i in range(3))
    ours, upstream = prefix_attention(q, k, v, settings, causal=causal), rand(2, 4, n + prefix, 16)
    expected = masked(q, k, v, mask)
    assert torch.allclose(ours, expected, atol=2e-6)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (ours, expected))):
        assert torch.allclose(a, b, atol=1e-5)


# hosts

SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
TEXT = dict(**SIZES, num_key_value_heads=2, vocab_size=50)
WORDS = torch.arange(3, 27).repeat(2, 1)


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()

    def by_layer(module, query, key, value, _, **options):
        mask = MASKS[module.layer_idx]
        return masked(query, key, value, mask).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("by_layer", by_layer)
    return transformers


LOWER = torch.ones(24, 24, dtype=torch.bool).tril()
MASKS = [LOWER, shifted_mask(24, 8, 3) & LOWER, shifted_mask(24, 8, 0) & LOWER,
         shifted_mask(24, 8, 3) & LOWER]


def llama(hf, attention="eager"):
    torch.manual_seed(0)
    config = hf.LlamaConfig(**TEXT, attn_implementation=attention)
    model = hf.LlamaForCausalLM(config).eval()
    for i, p in enumerate(model.parameters()): p.data.add_(0.05 * rand(*p.shape, seed=i))
    return model


def gradient(model, out):
    loss = (out * rand(*out.shape, seed=5)).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_of_a_language_model(hf, compiled):
    "Against eager attention under a mask of each layer, forward and backward."
    model = h.use_hilbert_attention(llama(hf), segment_size=8, layers=RULES)
    assert model.config.hilbert_attention == dict(segment_lengths=8, layers=PAIRS)
    torch._dynamo.reset()
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    extra = dict(attention_mask=torch.ones_like(WORDS)) if compiled else {}
    own = llama(hf, "by_layer")
    ours, expected = (m(WORDS, use_cache=False, **more).logits
                      for m, more in ((call, extra), (own, {})))
    assert torch.allclose(ours, expected, atol=1e-4)
    errors = gradient(model, ours) - gradient(own, expected)
    assert errors.norm() < 1e-4 * gradient(own, own(WORDS, use_cache=False).logits).norm()


def test_a_schedule_is_restored(hf, tmp_path):
    model = h.use_hilbert_attention(llama(hf), segment_size=8, layers=RULES)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(WORDS).logits, model(WORDS).logits)
    assert again.config.hilbert_attention["layers"] == PAIRS


def test_a_shift_and_a_sequence_that_grows(hf):
    model = h.use_hilbert_attention(llama(hf), segment_size=8, layers=RULES)
    with pytest.raises(ValueError, match="shift=3 over a sequence that grows"):
        model.generate(WORDS, max_new_tokens=2, eos_token_id=None, pad_token_id=0)
    turns = {"::2": "dense", "1::2": {"segment_size": 6}}
    model = h.use_hilbert_attention(llama(hf), segment_size=8, layers=turns)
    with torch.no_grad():
        whole, first = model(WORDS, use_cache=False).logits, model(WORDS[:, :20], use_cache=True)
        rest = model(WORDS[:, 20:], past_key_values=first.past_key_values).logits
    assert torch.allclose(torch.cat([first.logits, rest], 1), whole, atol=1e-4)


def test_schedules_that_fit_no_model_are_refused(hf):
    model = llama(hf)
    for rules, said in (({"4": {"shift": 1}}, "a model that has 4"), ({":": "dense"}, "dense")):
        with pytest.raises(ValueError, match=said):
            h.use_hilbert_attention(model, segment_size=8, layers=rules)
        assert getattr(model.config, "hilbert_attention", None) is None


def test_layers_that_stay_dense_are_not_replaced():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4).eval()
    dense, x = copy.deepcopy(model), rand(2, 24, 32)
    names = h.convert_attention(model, segment_size=8, layers=RULES)
    assert names == [f"layers.{i}.self_attn" for i in (1, 2, 3)]
    expected = x
    for i, one in enumerate(dense.layers):
        mask = None if i == 0 else ~shifted_mask(24, 8, 3 * (i % 2))
        expected = one(expected, src_mask=mask)
    assert torch.allclose(model(x), expected, atol=1e-5)
    with pytest.raises(ValueError, match="all 4 layers are dense"):
        h.convert_attention(dense, segment_size=8, layers={":": "dense"})


class Cut(nn.Module):
    "A vision transformer at its smallest."
    num_prefix_tokens = 0

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, 2)
        self.layers = nn.ModuleList(nn.MultiheadAttention(32, 4, batch_first=True)
                                    for _ in range(2))

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        for layer in self.layers: x = x + layer(x, x, x, need_weights=False)[0]
        return x


def test_layers_may_be_switched_in_several_calls():
    "Each call's geometry goes on listening, and none does that no layer asks."
    one = Cut().eval()
    two = copy.deepcopy(one)
    h.convert_vit(one, segment_size=4)
    for name in ("layers.0", "layers.1"): h.convert_vit(two, segment_size=4, include=name)
    for shape in ((8, 12), (12, 8)):
        x = rand(1, 1, *shape)
        assert torch.allclose(two(x), one(x), atol=1e-6)
    sites = [layer.attention.hilbert_site for layer in two.layers]
    assert sites[0].geometry is not sites[1].geometry and len(two.patches._forward_hooks) == 2
    sites[0].geometry = sites[1].geometry
    remove_unasked(two)
    assert len(two.patches._forward_hooks) == 1


def test_processors_of_layers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=4, sample_size=8,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10)
    names = h.use_hilbert_processor(model, segment_size=4)
    assert len(names) == 4
    assert h.use_hilbert_processor(model, segment_size=4, layers=RULES) == names[1:]
    kinds = [type(model.get_submodule(name).processor).__name__ for name in names]
    assert kinds[0] == "AttnProcessor2_0" and set(kinds[1:]) == {"HilbertAttnProcessor"}
    shifts = [model.get_submodule(name).processor.settings.shift for name in names[1:]]
    assert shifts == [3, 0, 3]
    model(rand(1, 4, 8, 8), torch.tensor([1]), torch.tensor([1]))


def test_what_is_restored_is_what_stands_there(tmp_path):
    "All calls of the helper, and none of them where other processors were set since."
    diffusers = pytest.importorskip("diffusers")
    model, x = unet(diffusers), (rand(1, 4, 16, 24), 3, rand(1, 5, 24))
    load = diffusers.UNet2DConditionModel.from_pretrained
    for include, size in (("down*", 8), ("up*", 6)):
        h.use_hilbert_processor(model, segment_size=size, include=include)
    for _ in range(2):  # once more from what was loaded
        model.save_pretrained(tmp_path)
        again = load(tmp_path).eval()
        with torch.no_grad(): assert torch.allclose(again(*x).sample, model(*x).sample, atol=1e-5)
        model = again
    own, names = diffusers.models.attention_processor.AttnProcessor2_0(), []
    for name, layer in model.named_modules():  # one of them by hand, in a model that has run
        if "hilbert_site" in vars(layer): names.append(name)
    model.get_submodule(names[0]).set_processor(own)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        again = load(tmp_path).eval()
        with torch.no_grad(): assert torch.allclose(again(*x).sample, model(*x).sample, atol=1e-5)
        kinds = {name: type(again.get_submodule(name).processor).__name__ for name in names}
        assert kinds.pop(names[0]) == "AttnProcessor2_0"
        assert set(kinds.values()) == {"HilbertAttnProcessor"}
        model = again
    model.set_attn_processor(own)
    model.save_pretrained(tmp_path)
    kinds = {type(p).__name__ for p in load(tmp_path).attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}


def test_processors_are_restored(tmp_path):
    "By the host's `from_pretrained`; the way back is kept too."
    diffusers = pytest.importorskip("diffusers")
    model = unet(diffusers)
    rules = {"0": "dense", "-1": {"segment_size": 5, "shift": 2}}
    h.use_hilbert_processor(model, segment_size=8, layers=rules, exclude="mid_block*")
    model.save_pretrained(tmp_path)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    x = rand(1, 4, 16, 24), 3, rand(1, 5, 24)
    with torch.no_grad():
        assert torch.allclose(again(*x).sample, model(*x).sample, atol=1e-5)
    noted = again.config["_hilbert_attention"]["settings"]
    assert noted["layers"] == [[layers, does] for layers, does in rules.items()]
    again.set_default_attn_processor()
    again.save_pretrained(tmp_path)
    plain = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert not torch.allclose(plain(*x).sample, model(*x).sample, atol=1e-4)
    kinds = {type(p).__name__ for p in plain.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}


# a block in which PyTorch's attention goes along a curve

BLOCK = dict(segment_size=6, grid=(4, 6), prefix_tokens=1)
MASK = HilbertSettings(**BLOCK).counts(25, 1)[0] > 0


def qkv(n=25, kv_heads=4):
    return [rand(2, heads, n, 16, seed=i) for i, heads in enumerate((4, kv_heads, kv_heads))]


def attend(q, k, v, *args, **options):
    return F.scaled_dot_product_attention(q, k, v, *args, **options)


def test_a_block_is_the_mask_forward_and_backward():
    q, k, v = (x.requires_grad_() for x in qkv())
    with hilbert_attention_everywhere(**BLOCK) as calls:
        ours = attend(q, k, v)
    expected, upstream = masked(q, k, v, MASK), rand(2, 4, 25, 16, seed=9)
    assert torch.allclose(ours, expected, atol=2e-6)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (ours, expected))):
        assert torch.allclose(a, b, atol=1e-5)
    assert list(calls.replaced.values()) == [1] and not calls.left
    assert torch.allclose(attend(q, k, v), masked(q, k, v, torch.ones_like(MASK)), atol=2e-6)


KEYS = torch.rand(2, 1, 1, 25, generator=torch.Generator().manual_seed(3)) > 0.3
TRIANGLE = torch.ones(25, 25, dtype=torch.bool).tril()
FOLLOWED = {
    "causal": (dict(is_causal=True), TRIANGLE),
    "triangle": (dict(attn_mask=TRIANGLE), TRIANGLE),
    "keys": (dict(attn_mask=KEYS), KEYS),
    "keys of all": (dict(attn_mask=KEYS[0, 0]), KEYS[0]),
    "causal and keys": (dict(attn_mask=KEYS, is_causal=True), TRIANGLE & KEYS),
    "floats": (dict(attn_mask=torch.where(TRIANGLE & KEYS, 0.0, -torch.inf)), TRIANGLE & KEYS),
    "scale": (dict(scale=16 ** -0.5), torch.ones_like(TRIANGLE)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_masks_that_a_block_follows(name):
    (options, mask), (q, k, v) = FOLLOWED[name], qkv()
    mask = MASK & mask
    keep = mask.expand(2, 4, 25, 25).any(-1, keepdim=True)
    with hilbert_attention_everywhere(**BLOCK) as calls: ours = attend(q, k, v, **options)
    expected = masked(q, k, v, mask).masked_fill(~keep, 0)
    assert torch.allclose(ours * keep, expected, atol=2e-6) and not calls.left


LEFT = {
    "cross-attention": (qkv()[:1] + qkv(5)[1:], {}),
    "5 tokens: grid=": (qkv(5), {}),
    "neither causal": (qkv(), dict(attn_mask=TRIANGLE.triu(-3))),
    "a bias on the scores": (qkv(), dict(attn_mask=rand(25, 25))),
    "batches of 2, 1 and 1": (qkv()[:1] + [x[:1] for x in qkv()[1:]], {}),
    "3 dimensions": ([x[:, 0] for x in qkv()], {}),
}


@pytest.mark.parametrize("said", LEFT)
def test_calls_that_a_block_leaves(said):
    tensors, options = LEFT[said]
    with hilbert_attention_everywhere(**BLOCK) as calls:
        attend(*qkv())
        ours = attend(*tensors, **options)
    assert torch.equal(ours, attend(*tensors, **options))
    assert list(calls.left.values()) == [1] and said in str(calls)
    assert "attend" in str(calls)


def test_a_block_without_a_call_says_so():
    with pytest.raises(RuntimeError, match="replaced no call.*cross-attention"):
        with hilbert_attention_everywhere(**BLOCK): attend(*LEFT["cross-attention"][0])
    with pytest.raises(KeyError):  # not hidden by ours
        with hilbert_attention_everywhere(**BLOCK): {}["missing"]
    with pytest.raises(ValueError, match="calls have no numbers"):
        hilbert_attention_everywhere(segment_size=4, layers=RULES)
    assert torch.equal(attend(*qkv()), attend(*qkv()))


def test_a_block_that_is_opened_again_counts_anew():
    block = hilbert_attention_everywhere(**BLOCK)
    with block: attend(*qkv())
    with pytest.raises(RuntimeError, match="replaced no call"):
        with block: attend(*qkv(5))
    assert sum(block.left.values()) == 1


def test_a_block_that_is_opened_again_inside_goes_on_counting():
    x = [rand(1, 2, 16, 8, seed=i) for i in range(3)]
    with (block := hilbert_attention_everywhere(segment_size=4)):
        F.scaled_dot_product_attention(*x)
        with block: F.scaled_dot_product_attention(*x)
    assert sum(block.replaced.values()) == 2


def test_a_mask_of_one_key_is_left():
    one, hidden = qkv(1), torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    with hilbert_attention_everywhere(segment_size=4) as calls:
        attend(*qkv())
        assert torch.equal(attend(*one, hidden), torch.zeros(2, 4, 1, 16))
    assert "one key" in str(calls)


def test_fewer_heads_of_keys():
    q, k, v = qkv(kv_heads=2)
    with pytest.raises(RuntimeError, match="size of tensor a"):
        with hilbert_attention_everywhere(**BLOCK): attend(q, k, v)
    with hilbert_attention_everywhere(**BLOCK): ours = attend(q, k, v, enable_gqa=True)
    assert torch.allclose(ours, masked(q, k, v, MASK), atol=2e-6)


def test_what_an_inner_block_leaves_is_the_outer_ones():
    "And what the package's own engines call is nobody's, backward included."
    small, large = [x.requires_grad_() for x in qkv(12)], [x.requires_grad_() for x in qkv(25)]
    with hilbert_attention_everywhere(segment_size=6, curve=None) as outer:
        with hilbert_attention_everywhere(**BLOCK) as inner:
            one, two = attend(*large), attend(*small)
            with h.set_backend("sdpa_mask"): three = attend(*large)
            (one.sum() + two.sum() + three.sum()).backward()
    assert sum(outer.replaced.values()) == 1 and sum(inner.replaced.values()) == 2
    assert len(inner.left) == 1 and not outer.left
    assert torch.allclose(two, masked(*small, shifted_mask(12, 6, 0)), atol=2e-6)
    assert torch.allclose(one, masked(*large, MASK), atol=2e-6)
    assert torch.allclose(three, one, atol=2e-6)


def test_other_threads_are_left_alone():
    found = []
    with hilbert_attention_everywhere(**BLOCK) as calls:
        thread = threading.Thread(target=lambda: found.append(attend(*qkv())))
        thread.start()
        thread.join()
        attend(*qkv())
    assert torch.equal(found[0], attend(*qkv())) and sum(calls.replaced.values()) == 1


def test_a_block_around_a_graph_and_inside_of_one():
    torch._dynamo.reset()
    q, k, v = qkv()
    expected = masked(q, k, v, MASK)
    graph = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.allclose(graph(q, k, v), attend(q, k, v), atol=2e-6)
    with hilbert_attention_everywhere(**BLOCK) as calls:
        assert torch.allclose(graph(q, k, v), expected, atol=2e-6)
        with pytest.raises(RuntimeError, match="cannot be read"): graph(q, k, v, MASK)
    assert sum(calls.replaced.values()) == 1
    assert torch.allclose(graph(q, k, v), attend(q, k, v), atol=2e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_goes_around_a_block(reentrant):
    def inside(q, k, v):
        with hilbert_attention_everywhere(**BLOCK): return attend(q, k, v)

    q, k, v = (x.requires_grad_() for x in qkv())
    upstream, how = rand(2, 4, 25, 16, seed=9), dict(use_reentrant=reentrant)
    checkpoint(inside, q, k, v, **how).backward(upstream)
    expected = torch.autograd.grad(masked(q, k, v, MASK), (q, k, v), upstream)
    for x, grad in zip((q, k, v), expected): assert torch.allclose(x.grad, grad, atol=1e-5)
    with pytest.raises(RuntimeError, match="gradient checkpointing inside of this block"):
        with hilbert_attention_everywhere(**BLOCK): checkpoint(attend, q, k, v, **how)


def test_a_graph_that_checkpoints_is_refused():
    def inside(q, k, v): return checkpoint(attend, attend(q, k, v), k, v, use_reentrant=False)

    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in qkv())
    graph = torch.compile(inside, backend="aot_eager")
    with pytest.raises(RuntimeError, match="gradient checkpointing inside of this block"):
        with hilbert_attention_everywhere(**BLOCK): graph(q, k, v)


def test_layers_of_pytorch_are_named():
    layer, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), rand(2, 25, 32)
    with hilbert_attention_everywhere(**BLOCK) as calls:
        attend(*qkv())
        ours = layer(x, x, x, need_weights=False)[0]
    assert "convert_attention" in str(calls)
    assert torch.allclose(ours, layer(x, x, x, need_weights=False)[0], atol=1e-6)


# through the hosts' own doors


def test_a_registered_name_keeps_the_padding_mask(hf, tmp_path):
    "Loaded with `attn_implementation`, as a user of transformers does."
    llama(hf).save_pretrained(tmp_path)
    h.register_hilbert_attention(segment_size=24, name="hilbert_one")
    load = hf.AutoModelForCausalLM.from_pretrained
    ours = load(tmp_path, attn_implementation="hilbert_one")
    own = load(tmp_path, attn_implementation="eager")
    keys = torch.ones_like(WORDS)
    keys[1, 15:] = 0
    with torch.no_grad():
        logits, expected = (m(WORDS, attention_mask=keys).logits for m in (ours, own))
        assert torch.allclose(logits[keys.bool()], expected[keys.bool()], atol=1e-4)
        left = keys.flip(1)
        logits, expected = (m(WORDS, attention_mask=left).logits for m in (ours, own))
    assert torch.allclose(logits[left.bool()], expected[left.bool()], atol=1e-4)


def test_without_its_mask_function_a_name_loses_the_padding(hf):
    "Why both interfaces have to know a name."
    seen = []

    def spy(module, query, key, value, attention_mask, **options):
        seen.append(attention_mask)
        return torch.zeros_like(query.transpose(1, 2)), None

    hf.AttentionInterface.register("alone", spy)
    model = llama(hf)
    model.set_attn_implementation("alone")
    model(WORDS, attention_mask=torch.ones_like(WORDS).tril())
    assert seen and all(mask is None for mask in seen)
