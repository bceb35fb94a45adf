"""Cells in curve order from a model's first layer to its last: the same output, without gathers."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
from dit_cases import CASES, built, given
from sampling import sampled
from test_diffusion import assert_equal, calls, results

from hilbert_attn import use_hilbert_attention
from hilbert_attn.integrations import use_dense_attention
from hilbert_attn.integrations.dit import WAYS

diffusers = pytest.importorskip("diffusers")
WAN, FLUX, SD3 = "WanTransformer3DModel", "FluxTransformer2DModel", "SD3Transformer2DModel"
CHROMA, LTX = "ChromaTransformer2DModel", "LTXVideoTransformer3DModel"
COG = "CogVideoXTransformer3DModel"
QUICK = (WAN, FLUX, SD3, "QwenImageTransformer2DModel")
TILES = dict(tiles=3, layer_shift=0.5)


def both(name, **options):
    "A model whose layers gather, and one whose cells are in order already."
    options = options or TILES
    plain = use_hilbert_attention(built(diffusers, name), **options)
    return plain, use_hilbert_attention(built(diffusers, name), **options, reorder=True)


def with_tables(name, inputs):
    "CogVideoX is given its rotary tables."
    if name != COG: return inputs
    cells, width = torch.tensor(inputs["hidden_states"].shape)[[1, 3, 4]], 8
    angles = torch.randn(int(cells.prod()) // 4, width, dtype=torch.float64)
    return inputs | dict(image_rotary_emb=(angles.cos(), angles.sin()))


@pytest.mark.parametrize("name", sampled(WAYS, QUICK))
def test_the_output_is_the_same(name):
    "On two grids in turn, with all gradients; then with layers that run again for theirs."
    plain, ordered = both(name)
    for which in (0, 1, 0):
        inputs = with_tables(name, given(name, which))
        assert_equal(results(ordered, inputs), results(plain, inputs))
    assert calls(ordered) == calls(plain) == [3] * CASES[name].layers
    if "HunyuanImage" in name: return  # diffusers cannot checkpoint it
    ordered.enable_gradient_checkpointing()
    assert_equal(results(ordered, inputs), results(plain, inputs))


def gathers(model, inputs) -> int:
    "How often tokens are fetched by their numbers, or put there."
    model(**inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        model(**inputs)
    names = ("aten::index_select", "aten::index_copy_", "aten::index", "aten::gather")
    return sum(event.count for event in seen.key_averages() if event.key in names)


@torch.no_grad()
def test_gathers_are_those_of_the_door():
    "Two tables, one way in and one out, however many layers; else, each layer has its own."
    counts = {}
    torch.manual_seed(0)
    inputs = CASES[WAN].inputs((4, 16, 16))  # few tokens are one call with a mask
    for layers in (1, 3):
        options = CASES[WAN].options | dict(num_layers=layers)
        model = diffusers.WanTransformer3DModel(**options).double().eval()
        for reorder in (False, True):
            use_hilbert_attention(model, tiles=3, reorder=reorder)
            counts[layers, reorder] = gathers(model, inputs)
    assert counts[1, True] == counts[3, True] == 4
    assert counts[3, False] == 3 * counts[1, False] >= 3 * 4


@torch.no_grad()
@pytest.mark.parametrize("options", [
    dict(segment_size=5), dict(window=2), dict(tiles=3, curve="morton"),
    dict(tiles=3, layers=[1]), dict(tiles=2, layers={"0": "dense", "1": {"segment_size": 7}}),
])
def test_patterns_of_positions(options):
    "Layers that stay dense work on cells in order, too."
    plain, ordered = both(FLUX, **options)
    ours, wanted = ordered(**given(FLUX)).sample, plain(**given(FLUX)).sample
    assert (ours - wanted).abs().max() < 1e-12


@torch.no_grad()
def test_steps_copies_and_the_way_back():
    own, inputs = built(diffusers, WAN), given(WAN)
    plain, ordered = both(WAN, tiles=3, dense_steps=1, step_shift=0.5)
    twin = copy.deepcopy(ordered)
    for time in (900.0, 600.0, 300.0):
        inputs["timestep"] = torch.tensor([time])
        wanted = plain(**inputs).sample
        for model in (ordered, twin):
            assert (model(**inputs).sample - wanted).abs().max() < 1e-12
    use_dense_attention(ordered)
    assert torch.equal(ordered(**inputs).sample, own(**inputs).sample)
    use_hilbert_attention(twin, tiles=3)  # without it
    gathering = use_hilbert_attention(built(diffusers, WAN), tiles=3)
    assert torch.equal(twin(**inputs).sample, gathering(**inputs).sample)


@pytest.mark.full
@pytest.mark.parametrize("name", (WAN, SD3))
def test_compiled_in_one_graph(name):
    _, model = both(name)
    inputs = given(name)
    wanted = model(**inputs).sample
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert (compiled(**inputs).sample - wanted).abs().max() < 1e-9


# what is refused


@pytest.mark.parametrize("options, message", [
    (dict(kernel_size=3), "reorder=True and kernel_size"),
    (dict(tiles=2, curve=None), "reorder=True and curve=None"),
    (dict(tiles=2, reorder="yes"), "reorder='yes'"),
    (dict(tiles=2, layers={"0": {"curve": "morton"}}), "layers with curves 'hilbert', 'morton'"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        use_hilbert_attention(built(diffusers, WAN), **dict(reorder=True) | options)


@pytest.mark.parametrize("name", sorted(CASES.keys() - WAYS.keys()))
def test_architectures_without_a_clean_door(name):
    with pytest.raises(ValueError, match=f"reorder=True: {name} has no clean door"):
        use_hilbert_attention(built(diffusers, name), tiles=2, reorder=True)


def test_a_first_frame_with_a_time_of_its_own():
    name = "HunyuanVideoTransformer3DModel"
    options = CASES[name].options | dict(image_condition_type="token_replace")
    model = diffusers.HunyuanVideoTransformer3DModel(**options)
    with pytest.raises(ValueError, match="token_replace"):
        use_hilbert_attention(model, tiles=2, reorder=True)


@torch.no_grad()
@pytest.mark.parametrize("name, argument, value", [
    (FLUX, "controlnet_block_samples", [torch.zeros(1, 24, 32)]),
    (SD3, "block_controlnet_hidden_states", [torch.zeros(1, 24, 16)]),
    (CHROMA, "attention_mask", torch.ones(1, 29, dtype=torch.bool)),
    (LTX, "timestep", torch.full((1, 24), 500.0)),
])
def test_arguments_with_a_value_for_each_cell(name, argument, value):
    _, model = both(name)
    with pytest.raises(ValueError, match=f"{argument} has a value for each cell"):
        model(**given(name) | {argument: value})


class Wrapper(nn.Module):
    "As an adapter: the layer that it wraps keeps its hooks."

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args, **options):
        return self.base_layer(*args, **options)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ("x_embedder", "norm_out", "pos_embed")
)
@pytest.mark.parametrize("other", (Wrapper, copy.deepcopy))
def test_hooked_modules_that_were_replaced(name, other):
    plain, model = both(FLUX, tiles=3)
    inputs = given(FLUX)
    setattr(model, name, other(getattr(model, name)))
    message = f"{name} was replaced or wrapped"
    with pytest.raises(RuntimeError, match=message):
        model(**inputs)
    use_hilbert_attention(model, tiles=3, reorder=True)
    wanted = plain(**inputs).sample
    difference = model(**inputs).sample - wanted
    assert difference.abs().max() < 1e-12


@torch.no_grad()
def test_another_thread_behind_the_last_layer():
    "The way out is not that of the other thread's grid."
    _, model = both(WAN)
    other = torch.no_grad()(model)

    def interrupt(layer, args, out):
        handle.remove()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(other, **given(WAN, 1)).result()

    last = model.blocks[-1]
    handle = last.register_forward_hook(interrupt)
    with pytest.raises(RuntimeError, match="two threads"):
        model(**given(WAN))


@torch.no_grad()
@pytest.mark.parametrize("name", (FLUX, COG))
def test_positional_arguments_stay_positional(name):
    "One too many is the model's own error."
    plain, model = both(name)
    inputs = with_tables(name, given(name))
    forward = inspect.signature(model.forward)
    names = list(forward.parameters)
    names = names[: names.index("return_dict")]
    args = [inputs.get(own) for own in names]
    seen = []

    def count(model, args):
        seen.append(len(args))

    handle = model.register_forward_pre_hook(count)
    wanted = plain(**inputs).sample
    difference = model(*args).sample - wanted
    assert difference.abs().max() < 1e-12
    assert seen == [len(args)]
    handle.remove()
    beyond = [None] * len(forward.parameters)
    with pytest.raises(TypeError, match="positional"):
        model(*args, *beyond)
