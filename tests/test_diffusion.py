"""Diffusion transformers: their own attention, or a hand-made mask, of every architecture."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dit_cases import CASES, WORDS, Masked, built, given, loaded, tiles_mask
from torch.utils.checkpoint import checkpoint

from hilbert_attn import curve_order, use_hilbert_attention
from hilbert_attn.integrations import (
    DiTSettings,
    joint_attention,
    use_dense_attention,
)

QUICK = (
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "SD3Transformer2DModel",
)
ALL = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.full)
    for name in CASES
]


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def sites(model):
    return [
        m.hilbert_site
        for m in model.modules()
        if hasattr(m, "hilbert_site")
    ]


def calls(model):
    return [site.calls for site in sites(model)]


def results(model, inputs):
    "Output, and gradients of all parameters under a random upstream gradient."
    model.zero_grad()
    out = model(**inputs).sample
    torch.manual_seed(7)
    (out * torch.randn_like(out)).sum().backward()
    grads = {
        name: p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return {"out": out.detach()} | grads


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 2e-6 * max(
            value.norm(), 1e-3
        ), name


def masks(name, which, tiles, layer_shift):
    "The mask of each layer."
    case, grid = CASES[name], CASES[name].grids[which]
    cells = math.prod(grid)
    text = 0 if case.text == "none" else WORDS + case.more
    offsets = [
        round(i * layer_shift * cells / tiles) % cells
        for i in range(case.layers)
    ]
    return [
        tiles_mask(grid, tiles, offset, case.text, text)
        for offset in offsets
    ]


@pytest.mark.parametrize("name", ALL)
def test_one_tile_is_the_models_own_attention(diffusers, name):
    own, model = (
        built(diffusers, name),
        use_hilbert_attention(built(diffusers, name), tiles=1),
    )
    for which in (0, 1):
        inputs = given(name, which)
        assert_equal(results(model, inputs), results(own, inputs))
    assert calls(model) == [2] * CASES[name].layers


@pytest.mark.parametrize("name", ALL)
def test_tiles_are_a_mask_by_hand(diffusers, name):
    "Two resolutions in turn; tiles move from layer to layer."
    own, model = built(diffusers, name), built(diffusers, name)
    shift = CASES[name].shift
    use_hilbert_attention(model, tiles=3, layer_shift=shift)
    for which in (0, 1, 0):
        inputs = given(name, which)
        with Masked(masks(name, which, 3, shift)) as dense:
            wanted = results(own, inputs)
        assert dense.calls == CASES[name].layers
        ours = results(model, inputs)
        assert_equal(ours, wanted)
        assert (ours["out"] - own(**inputs).sample).abs().max() > 1e-4


# diffusers 0.42 calls its checkpointing of HunyuanImage with a name that it
# does not take: that model cannot be recomputed at all.
RECOMPUTED = [p for p in ALL if "HunyuanImage" not in p.values[0]]


@pytest.mark.parametrize("name", RECOMPUTED)
def test_gradient_checkpointing(diffusers, name):
    "Two resolutions before the backward: each layer runs again on its own grid."
    model = use_hilbert_attention(
        built(diffusers, name), tiles=3, layer_shift=0.5
    )
    inputs = given(name, 0), given(name, 1)

    def both():
        model.zero_grad()
        outs = [model(**x).sample for x in inputs]
        sum(out.square().sum() for out in outs).backward()
        return {
            name: p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }

    plain, before = both(), calls(model)
    model.enable_gradient_checkpointing()
    again = both()
    assert_equal(again, plain)
    if (
        name != "UNetMotionModel"
    ):  # it recomputes blocks as a whole, not all of them
        assert calls(model) == [3 * n for n in before]


# steps, layers, ways back

WAN, FLUX, QWEN = (
    QUICK[0],
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
)
VIDEO = QUICK[1]
SD3, CHROMA = QUICK[2], "ChromaTransformer2DModel"
MOCHI, LUMINA = "MochiTransformer3DModel", "Lumina2Transformer2DModel"


@torch.no_grad()
def test_first_steps_stay_dense(diffusers):
    "Two calls a step, two runs; the site check waits for the first sparse step."
    own, model = built(diffusers, WAN), built(diffusers, WAN)
    use_hilbert_attention(model, tiles=3, dense_steps=2)
    inputs = given(WAN)
    for run in range(2):
        dense = []
        for time in (900.0, 900.0, 600.0, 600.0, 300.0, 300.0):
            inputs["timestep"] = torch.tensor([time])
            change = (
                (model(**inputs).sample - own(**inputs).sample)
                .abs()
                .max()
            )
            dense.append(change < 1e-9)
        assert dense == [True, True, True, True, False, False]
        assert calls(model) == [2 * (run + 1)] * 2


@torch.no_grad()
@pytest.mark.parametrize(
    "name, times",
    [(MOCHI, (0.0, 400.0, 800.0)), (LUMINA, (0.1, 0.5, 0.9))],
)
def test_steps_are_counted_where_timesteps_rise(diffusers, name, times):
    "Two runs, each with one dense step."
    model = use_hilbert_attention(built(diffusers, name), tiles=3, dense_steps=1)
    inputs = given(name)
    for time in times * 2:
        inputs["timestep"] = torch.tensor([time]).double()
        model(**inputs)
    assert calls(model) == [4, 4]


@torch.no_grad()
def test_tiles_move_from_step_to_step(diffusers):
    own, model = built(diffusers, WAN), built(diffusers, WAN)
    use_hilbert_attention(model, tiles=3, step_shift=0.5, tile_shift=0.25)
    inputs, grid = given(WAN), CASES[WAN].grids[0]
    cells = math.prod(grid)
    for step, time in enumerate((900.0, 600.0, 300.0)):
        inputs["timestep"] = torch.tensor([time])
        offset = round((0.25 + 0.5 * step) * cells / 3) % cells
        with Masked([tiles_mask(grid, 3, offset, "none", 0)]):
            wanted = own(**inputs).sample
        assert (model(**inputs).sample - wanted).abs().max() < 1e-9


def test_training_has_no_steps(diffusers):
    "Layers that run again are of the training, whatever was sampled in between."
    model = use_hilbert_attention(
        built(diffusers, WAN), tiles=3, dense_steps=1, step_shift=0.5
    )
    inputs = given(WAN)
    with pytest.raises(ValueError, match="counted under torch.no_grad"):
        model(**inputs)
    plain = results(
        use_hilbert_attention(built(diffusers, WAN), tiles=3), inputs
    )
    model.train().enable_gradient_checkpointing()
    out = model(**inputs).sample
    for time in (900.0, 600.0):
        with torch.no_grad():
            model(**inputs | dict(timestep=torch.tensor([time])))
    torch.manual_seed(7)
    (out * torch.randn_like(out)).sum().backward()
    grads = {
        name: p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    assert_equal({"out": out.detach()} | grads, plain)


@pytest.mark.parametrize(
    "layers, names",
    [
        (0, ["blocks.0.attn1"]),
        (slice(1, None), ["blocks.1.attn1"]),
        ([-1], ["blocks.1.attn1"]),
        ("blocks.0.*", ["blocks.0.attn1"]),
        (["blocks.1.attn1", 0], None),
        (None, None),
        (np.int64(1), ["blocks.1.attn1"]),
        ([np.int64(-1)], ["blocks.1.attn1"]),
        (torch.tensor(0), ["blocks.0.attn1"]),
        ([torch.tensor(0)], ["blocks.0.attn1"]),
        (np.arange(2), None),
        (torch.arange(2), None),
        (range(1), ["blocks.0.attn1"]),
    ],
)
def test_layers_that_are_asked_for(diffusers, layers, names):
    model = use_hilbert_attention(
        built(diffusers, WAN), tiles=3, layers=layers
    )
    found = [
        name
        for name, m in model.named_modules()
        if hasattr(m, "hilbert_site")
    ]
    assert found == (names or ["blocks.0.attn1", "blocks.1.attn1"])
    model(**given(WAN))
    assert calls(model) == [1] * len(found)


@torch.no_grad()
def test_the_way_back(diffusers):
    own, model, inputs = (
        built(diffusers, VIDEO),
        built(diffusers, VIDEO),
        given(VIDEO),
    )
    use_hilbert_attention(
        use_hilbert_attention(model, tiles=2), tiles=5
    )  # twice is once
    assert not torch.equal(model(**inputs).sample, own(**inputs).sample)
    use_dense_attention(model)
    assert torch.equal(model(**inputs).sample, own(**inputs).sample)
    assert (
        not sites(model)
        and not model._forward_pre_hooks
        and not model._forward_hooks
    )
    kinds = {
        type(m.processor)
        for m in model.modules()
        if hasattr(m, "processor")
    }
    assert kinds == {
        type(m.processor)
        for m in own.modules()
        if hasattr(m, "processor")
    }


@torch.no_grad()
def test_copies_have_seams_of_their_own(diffusers):
    model = use_hilbert_attention(
        built(diffusers, WAN), tiles=3, layer_shift=0.5
    )
    inputs = [given(WAN, which) for which in (0, 1)]
    wanted = [model(**x).sample for x in inputs]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = calls(model)
        for x, out in zip(inputs, wanted, strict=True):
            assert torch.equal(twin(**x).sample, out)
        assert calls(model) == before and calls(twin) == [
            n + 2 for n in before
        ]


@torch.no_grad()
def test_a_pipeline(diffusers):
    "Its transformer is switched, and one that takes over later counts no first steps."
    first, second = built(diffusers, WAN), built(diffusers, WAN)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.WanPipeline(
        None, None, None, scheduler, first, second, boundary_ratio=0.5
    )
    assert use_hilbert_attention(pipe, tiles=3, dense_steps=1) is pipe
    pipe.set_progress_bar_config(disable=True)
    prompt = given(WAN)["encoder_hidden_states"]
    pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=prompt,
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=4,
        output_type="latent",
    )
    assert calls(first) == [2, 2] and calls(second) == [4, 4]
    use_dense_attention(pipe)
    assert not sites(first) and not sites(second)


# what is refused


def test_a_layer_that_goes_on_without_us_is_named(diffusers):
    model = use_hilbert_attention(built(diffusers, WAN), tiles=3)
    model.blocks[1].attn1.set_processor(model.blocks[1].attn2.processor)
    with pytest.raises(
        RuntimeError, match="blocks.1.attn1 got another processor"
    ):
        model(**given(WAN))


@torch.no_grad()
def test_processors_that_were_replaced_later_are_named(diffusers):
    model = use_hilbert_attention(built(diffusers, SD3), tiles=3)
    model(**given(SD3))
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="blocks.0.attn, .* got another processor"):
        model(**given(SD3))


@torch.no_grad()
def test_two_threads_at_once(diffusers):
    "One thread after another is right; two at once are an error, not the grid of the other."
    model = use_hilbert_attention(built(diffusers, WAN), tiles=3)
    first, second = given(WAN, 0), given(WAN, 1)

    def other(x):
        with torch.no_grad(), ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.no_grad()(model), **x).result().sample

    assert torch.equal(other(first), model(**first).sample)
    meanwhile = []

    def interrupt(layer, args):
        handle.remove()
        meanwhile.append(other(second))

    handle = model.blocks[0].register_forward_pre_hook(interrupt)
    with pytest.raises(RuntimeError, match="two threads"):
        model(**first)
    assert torch.equal(meanwhile[0], model(**second).sample)


@torch.no_grad()
def test_a_thread_that_comes_in_while_another_does(diffusers):
    "What the first one reads is noted after the other: that one must not take it."
    model = use_hilbert_attention(built(diffusers, WAN), tiles=3)
    door = model.blocks[0].attn1.processor.hilbert_seam.door
    own = door.layout
    first, second = given(WAN, 0), given(WAN, 1)
    with ThreadPoolExecutor(1) as pool:

        def slow(config, inputs):
            door.layout = own
            pool.submit(door.enter, model, (), second).result()
            return own.grid(config, inputs)

        door.layout = replace(own, grid=slow)
        door.enter(model, (), first)
        cells = math.prod(CASES[WAN].grids[0])
        assert door.place(cells) == CASES[WAN].grids[0]
        with pytest.raises(RuntimeError, match="two threads"):
            pool.submit(door.place, cells).result()


@torch.no_grad()
def test_steps_are_counted_for_each_thread(diffusers):
    "Two runs take turns; each has one dense step."
    model = use_hilbert_attention(built(diffusers, WAN), tiles=3, dense_steps=1)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        for time in (900.0, 600.0, 300.0):
            inputs = given(WAN) | dict(timestep=torch.tensor([time]))
            for pool in (one, two):
                pool.submit(torch.no_grad()(model), **inputs).result()
    assert calls(model) == [4, 4]


def test_a_denoising_step_that_runs_again_is_refused(diffusers):
    "A whole model under a checkpoint that records no gradients in the forward."
    model = use_hilbert_attention(built(diffusers, WAN), tiles=3, dense_steps=1).train()
    inputs = given(WAN)
    x = inputs.pop("hidden_states").requires_grad_()
    out = checkpoint(lambda x: model(x, **inputs).sample, x, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        out.sum().backward()
    out = checkpoint(lambda x: model(x, **inputs).sample, x, use_reentrant=False)
    out.sum().backward()
    assert x.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("skip_first", [True, False])
def test_a_guidance_that_skips_scores(diffusers, skip_first):
    "The layer gives values in place of attention, whichever was called first."
    hooks, name = pytest.importorskip("diffusers.hooks"), "QwenImageTransformer2DModel"
    scores = hooks.LayerSkipConfig(
        indices=[0],
        fqn="transformer_blocks",
        skip_attention=False,
        skip_ff=False,
        skip_attention_scores=True,
    )
    own, model = built(diffusers, name), built(diffusers, name)
    if not skip_first:
        use_hilbert_attention(model, tiles=3)
    for one in (own, model):
        hooks.apply_layer_skip(one, scores)
    if skip_first:
        use_hilbert_attention(model, tiles=3)
    inputs, last = given(name), masks(name, 0, 3, 0.0)[-1:]
    with Masked(last) as dense: wanted = own(**inputs).sample
    assert dense.calls
    assert (model(**inputs).sample - wanted).norm() <= 1e-9 * wanted.norm()


def test_two_transformers_or_none(diffusers):
    "Layers that only the first one has: neither is switched."
    first = built(diffusers, WAN)
    options = CASES[WAN].options | dict(num_layers=1)
    second = diffusers.WanTransformer3DModel(**options)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.WanPipeline(None, None, None, scheduler, first, second)
    with pytest.raises(ValueError, match="layers=1: none of the 1"):
        use_hilbert_attention(pipe, tiles=2, layers=1)
    assert not sites(first) and not first._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("grid", ((4, 4), (2, 12), (1, 6, 4)))
def test_a_stated_grid_must_be_the_calls(diffusers, grid):
    flux = use_hilbert_attention(built(diffusers, FLUX), tiles=3, grid=grid)
    with pytest.raises(ValueError, match=r"grid=\(.*lie on \(1, 4, 6\)"):
        flux(**given(FLUX))


@torch.no_grad()
def test_one_kernel_size_is_for_axes_with_cells(diffusers):
    "A picture of Flux lies on (1, H, W)."
    flux = built(diffusers, FLUX)
    wanted = use_hilbert_attention(flux, kernel_size=(1, 3, 3))(**given(FLUX)).sample
    assert torch.equal(use_hilbert_attention(flux, kernel_size=3)(**given(FLUX)).sample, wanted)


@torch.no_grad()
def test_masks_of_chroma(diffusers):
    "A boolean one hides keys; one of numbers is added to the scores, and refused."
    own, model = built(diffusers, CHROMA), built(diffusers, CHROMA)
    use_hilbert_attention(model, tiles=1)
    inputs = given(CHROMA)
    mask = torch.ones(1, WORDS + 24, dtype=torch.bool)
    mask[:, WORDS - 2 : WORDS] = False
    wanted = own(**inputs, attention_mask=mask).sample
    assert (model(**inputs, attention_mask=mask).sample - wanted).abs().max() < 1e-9
    assert (model(**inputs).sample - wanted).abs().max() > 1e-4
    with pytest.raises(ValueError, match="expected a bool mask"):
        model(**inputs, attention_mask=mask.double())


def test_rules_for_layers(diffusers):
    "One layer dense, another with a pattern of its own: the same as by hand."
    inputs = given(WAN)
    two = {"0": "dense", "1": {"segment_size": 5}}
    ruled = use_hilbert_attention(built(diffusers, WAN), tiles=3, layer_shift=0.5, layers=two)
    plain = use_hilbert_attention(built(diffusers, WAN), segment_size=5, layers=[1])
    assert torch.equal(ruled(**inputs).sample, plain(**inputs).sample)
    assert calls(ruled) == calls(plain)
    shifted = {"1": {"tile_shift": 0.5}}
    ruled = use_hilbert_attention(built(diffusers, WAN), tiles=3, layers=shifted)
    plain = use_hilbert_attention(built(diffusers, WAN), tiles=3, layer_shift=0.5)
    assert torch.equal(ruled(**inputs).sample, plain(**inputs).sample)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tiles=2, window=3), "tiles and window are given"),
        (
            dict(segment_size=4, layer_shift=0.5),
            "layer_shift=0.5: segment_size has no tiles",
        ),
        (dict(tiles=0), "tiles=0"),
        (dict(dilation_rate=2), "'dilation_rate' is no setting"),
        (dict(curve="peano"), "peano"),
        (dict(tiles=2, layers="attn"), "layers='attn': none of the 2"),
        (dict(tiles=2, layers=7), "layers=7: none of the 2"),
        (dict(tiles=2, layers=[]), "none of the 2"),
        (dict(tiles=2, layers=[0, 99]), "99 in it is none of the 2"),
        (dict(tiles=2, layers=["blocks.0.*", "blokcs.1.attn1"]), "'blokcs.1.attn1' in it"),
        (dict(layers=[0, 1.0]), "1.0 in it is none"),
        (dict(layers=1.5), "layers=1.5: none of the 2"),
        (dict(layers=True), "layers=True: none of the 2"),
        (dict(layers=np.zeros(1)), "0.0 in it is none"),
        (dict(layers=iter([9])), "9 in it is none"),
        (dict(tiles=2, tile_shift="a"), "tile_shift='a': must be a finite"),
        (dict(tiles=2, layer_shift=math.nan), "layer_shift=nan: must be a finite"),
        (dict(tiles=2, dense_steps=-1), "-1"),
        (dict(tiles=2, layers={":": "dense"}), "all 2 layers are dense"),
        (dict(tiles=2, layers={"5": "dense"}), "no layer of a model that has 2"),
        (dict(tiles=2, layers={"0": {"dense_steps": 3}}), "'dense_steps' is no setting of a lay"),
        (dict(tiles=2, layers={"0": {"tiles": 0}}), "tiles=0"),
        (
            dict(settings=DiTSettings(), tiles=2),
            "settings are given, and so are tiles",
        ),
    ],
)
def test_bad_options(diffusers, options, message):
    model = built(diffusers, WAN)
    with pytest.raises(ValueError, match=message):
        use_hilbert_attention(model, **options)
    assert not sites(model) and not model._forward_pre_hooks


def test_unknown_models_are_refused(diffusers):
    sana = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    with pytest.raises(
        ValueError, match="SanaTransformer2DModel: .*linear"
    ):
        use_hilbert_attention(sana, tiles=2)
    with pytest.raises(
        ValueError, match="AutoencoderTiny: how its tokens lie is unknown"
    ):
        use_hilbert_attention(diffusers.AutoencoderTiny(), tiles=2)


@pytest.mark.parametrize("first", [(0, 0, 0), (3, 5, 7)])
def test_a_box_of_ids_may_lie_anywhere(first):
    from hilbert_attn.integrations.cells import _box
    ids = torch.cartesian_prod(*map(torch.arange, (2, 3, 4))) + torch.tensor(first)
    assert _box(ids) == ((2, 3, 4), True)
    assert _box(ids.flip(0)) == _box(ids.roll(1, 0)) == ((2, 3, 4), False)
    assert _box(ids[:-1]) == ((2, 3, 4), False)


@torch.no_grad()
@pytest.mark.full
def test_grids_that_are_none(diffusers):
    flux = use_hilbert_attention(built(diffusers, FLUX), tiles=3)
    inputs = given(FLUX)
    inputs["img_ids"] = inputs["img_ids"].flip(0)
    with pytest.raises(ValueError, match="row by row"):
        flux(**inputs)
    qwen = use_hilbert_attention(built(diffusers, QWEN), tiles=3)
    inputs = given(QWEN)
    inputs["img_shapes"] = [[(1, 4, 3), (1, 4, 3)]]
    with pytest.raises(ValueError, match="several pictures"):
        qwen(**inputs)
    wan = use_hilbert_attention(
        built(diffusers, WAN), tiles=3, grid=(4, 4, 3)
    )
    with pytest.raises(
        ValueError, match=r"grid=\(4, 4, 3\): .* lie on \(2, 4, 3\)"
    ):
        wan(**given(WAN))
    lumina = use_hilbert_attention(
        built(diffusers, "Lumina2Transformer2DModel"), tiles=3
    )
    inputs = CASES["Lumina2Transformer2DModel"].inputs((4, 6), batch=2)
    inputs["encoder_attention_mask"][1, -1] = False
    with pytest.raises(ValueError, match="captions of different lengths"):
        lumina(**inputs)


@torch.no_grad()
@pytest.mark.full
def test_a_stated_grid_is_used(diffusers):
    flux, other = built(diffusers, FLUX), built(diffusers, FLUX)
    inputs = given(FLUX)
    wanted = use_hilbert_attention(flux, tiles=3)(**inputs).sample
    use_hilbert_attention(other, tiles=3, grid=(4, 6))
    inputs["img_ids"] = (
        inputs["img_ids"] + 0.25
    )  # which says nothing that is whole
    close = use_hilbert_attention(flux, tiles=3, grid=(1, 4, 6))(
        **inputs
    ).sample
    assert (other(**inputs).sample - close).abs().max() < 1e-12
    assert wanted.shape == close.shape


# the attention itself


def among_cells(pattern):
    "Who sees whom on a grid of 4 x 6, by the definition."
    cells = 24
    rank = torch.empty(cells, dtype=torch.int64)
    rank[curve_order((4, 6), "hilbert")] = torch.arange(cells)
    y, x = torch.arange(cells) // 6, torch.arange(cells) % 6

    def near(at, side):
        low = (at - 1).clamp(0, side - 3)
        return (low[:, None] <= at) & (at < low[:, None] + 3)

    return {
        "tiles": rank[:, None] // 8 == rank // 8,
        "segment_size": rank[:, None] // 7 == rank // 7,
        "window": (rank[:, None] - rank).abs() <= 2,
        "kernel_size": near(y, 4) & near(x, 6),
    }[pattern]


def joint_case(pattern, text_first):
    "q, k, v with grouped heads; keys that are masked on both sides; the whole mask."
    torch.manual_seed(0)
    n, first = 29, 5 if text_first else 0
    q, k, v = (
        torch.randn(2, h, n, 8, dtype=torch.float64).requires_grad_()
        for h in (4, 2, 2)
    )
    mask = torch.ones(n, n, dtype=torch.bool)
    cells = slice(first, first + 24)
    mask[cells, cells] = among_cells(pattern)
    keys = torch.rand(2, n) < 0.8
    keys[:, 2 if text_first else -2] = True  # a word that all see
    return (q, k, v), keys, mask & keys[:, None, None]


@pytest.mark.parametrize("text_first", (False, True))
@pytest.mark.parametrize(
    "pattern, size",
    [("tiles", 3), ("segment_size", 7), ("window", 4), ("kernel_size", 3)],
)
def test_every_pattern_with_a_text(pattern, size, text_first):
    qkv, keys, mask = joint_case(pattern, text_first)
    ours = joint_attention(
        *qkv, DiTSettings(**{pattern: size}), (4, 6),
        text_first=text_first, key_mask=keys, scale=0.3)
    theirs = F.scaled_dot_product_attention(
        *qkv, mask, scale=0.3, enable_gqa=True)
    assert (ours - theirs).abs().max() < 1e-9
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), qkv),
        torch.autograd.grad((theirs * weights).sum(), qkv),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-9


def test_masked_keys_may_hold_anything():
    (q, k, v), keys, _ = joint_case("tiles", True)
    hidden = ~keys[:, None, :, None]
    call = dict(settings=DiTSettings(tiles=3), grid=(4, 6), text_first=True, key_mask=keys)
    wanted = joint_attention(q, k, v, **call)
    nan = (x.masked_fill(hidden, math.nan) for x in (k, v))
    assert torch.equal(joint_attention(q, *nan, **call), wanted)


def test_more_cells_than_tokens():
    (q, k, v), _, _ = joint_case("tiles", True)
    with pytest.raises(ValueError, match=r"grid=\(6, 6\): 36 cells, but q has only 29"):
        joint_attention(q, k, v, DiTSettings(tiles=3), (6, 6))


@pytest.mark.full
@pytest.mark.parametrize(
    "name", (WAN, VIDEO, "CogVideoXTransformer3DModel")
)
def test_compiled_in_one_graph(diffusers, name):
    model = use_hilbert_attention(
        built(diffusers, name), tiles=3, layer_shift=0.5
    )
    inputs = given(name)
    wanted = model(**inputs).sample
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert (compiled(**inputs).sample - wanted).abs().max() < 1e-9


# saving


@torch.no_grad()
@pytest.mark.parametrize("options", [
    dict(tiles=3, layer_shift=0.5, layers=[1], reorder=True),
    dict(kernel_size=(1, 3, 3), grid=(2, 4, 3)),
    dict(tiles=2, layers={"1": {"segment_size": 5}, "0": "dense"}),
    dict(tiles=2, dense_steps=1, layers=slice(0, 1)),
    dict(tiles=2, tile_shift=np.float32(0.5)),
    dict(tiles=2, layer_shift=Fraction(1, 4)),
    dict(layers={0: {"tiles": np.int64(3)}}),
    dict(layers={"1": [{"window": np.array([2, 3])}]}),
    dict(layers={"1": {"tile_shift": Fraction(1, 2)}}),
])
def test_a_saved_switch_is_restored(diffusers, tmp_path, options):
    model = use_hilbert_attention(built(diffusers, WAN).float().double(), **options)
    load = partial(loaded, diffusers.WanTransformer3DModel)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        again = load(tmp_path).double()
        for time in (900.0, 600.0):
            inputs = given(WAN) | dict(timestep=torch.tensor([time]))
            assert torch.equal(again(**inputs).sample, model(**inputs).sample)
        assert sum(calls(again)) > 0
        model = again
    use_dense_attention(again).save_pretrained(tmp_path)
    assert not sites(load(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("reorder", [False, True])
def test_a_model_from_the_configuration_of_a_switched_one(
    diffusers, tmp_path, reorder
):
    "As averages of weights are: built, filled, saved, loaded."
    how = dict(tiles=3, reorder=reorder)
    model = use_hilbert_attention(built(diffusers, WAN), **how)
    inputs, kind = given(WAN), type(model)
    expected = model(**inputs).sample
    twin = kind.from_config(model.config).double()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(**inputs).sample, expected)
    twin.save_pretrained(tmp_path)
    again = loaded(kind, tmp_path).double()
    change = again(**inputs).sample - expected  # saved numbers are rounded
    assert change.norm() <= 1e-5 * expected.norm()
    assert len(sites(again)) == len(sites(model))
    use_dense_attention(model)
    dense = kind.from_config(model.config)
    assert not sites(dense)


@torch.no_grad()
def test_a_saved_pipeline(diffusers, tmp_path, monkeypatch):
    "A note is forgotten where all processors were replaced since."
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)
    model = use_hilbert_attention(built(diffusers, WAN).float().double(), tiles=3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.WanPipeline(None, None, None, scheduler, model).save_pretrained(tmp_path / "pipe")
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "transformer_2"))
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "pipe", **absent)
    again = pipe.transformer.double()
    assert torch.equal(again(**given(WAN)).sample, model(**given(WAN)).sample)
    assert calls(again) == [1, 1]
    for block in model.blocks: block.attn1.set_processor(block.attn2.processor)
    model.save_pretrained(tmp_path / "plain")
    assert not sites(loaded(type(model), tmp_path / "plain"))


@torch.no_grad()
@pytest.mark.parametrize("layers", (None, {":": {"tiles": 4}}))
def test_a_replaced_layer_is_saved_as_such(
    diffusers, tmp_path, layers
):
    "Those behind it keep their numbers: their tiles stay."
    kind = diffusers.WanTransformer3DModel
    options = CASES[WAN].options | dict(num_layers=3)
    torch.manual_seed(0)
    model = use_hilbert_attention(
        kind(**options).eval(),
        tiles=3,
        layer_shift=0.3,
        layers=layers,
    )
    twin = copy.deepcopy(model).double()
    seam = twin.blocks[1].attn1.processor.hilbert_seam
    seam.settings = DiTSettings(tiles=1)
    wanted = twin(**given(WAN)).sample
    block = model.blocks[1]
    block.attn1.set_processor(block.attn2.processor)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        model = loaded(kind, tmp_path)
        twin = copy.deepcopy(model).double()
        difference = twin(**given(WAN)).sample - wanted
        assert difference.abs().max() < 1e-9
        names = [site.name for site in sites(model)]
        assert names == ["blocks.0.attn1", "blocks.2.attn1"]
