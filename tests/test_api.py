"""The factory: whatever is registered is tested by being registered."""
import copy
import inspect
import io
import json
import pickle
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from ring_processes import tree_environment
from test_set_backend import replace_choice

import hilbert_attn
from hilbert_attn import (
    ATTENTION_TYPES,
    MultiheadDilatedAttention,
    StandardizedRingConfig,
    TransformerBlock,
    create_dilated_attention,
    create_multihead_dilated_attention,
    create_standardized_ring_attention,
    explain_attention_type,
    register_attention_type,
    which_when,
)
from hilbert_attn.api import AUTO_RULES
from hilbert_attn.backends import MEMORY_POLICY, POLICY
from hilbert_attn.block_layers import _local_window
from hilbert_attn.compat import INSTEAD

HERE = Path(__file__).parent
TYPES = list(ATTENTION_TYPES)
SETTINGS = dict(
    dim=32, heads=4, segment_lengths=[8, 24], dilation_rates=[1, 2], grid=(4, 6), block_size=8)
SPELLINGS = [
    dict(dim=32, heads=4), dict(embed_dim=32, num_heads=4), dict(hidden_dim=32, num_heads=4),
    dict(dim=32, hidden_dim=32, heads=4, num_heads=4)]


def make(name, seed=0, **changes):
    torch.manual_seed(seed)
    return create_standardized_ring_attention(name, **{**SETTINGS, **changes})


def tokens(n=24, dtype=torch.float32):
    return torch.randn(2, n, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def results(module, x):
    leaf = x.detach().clone().requires_grad_()
    out = module(leaf)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out, *torch.autograd.grad(out, (leaf, *module.parameters()), upstream)]


def test_the_registry_is_what_was_promised():
    assert {
        "standard", "improved", "hilbert", "ring", "block_sparse",
        "block_sparse_ring"} <= set(TYPES)


@pytest.mark.parametrize("name", [*TYPES, "auto"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: "-".join(s))
def test_every_spelling_constructs_and_runs(name, spelling):
    settings = {**{k: v for k, v in SETTINGS.items() if k not in ("dim", "heads")}, **spelling}
    x = tokens()
    assert create_standardized_ring_attention(name, **settings)(x).shape == x.shape
    out, weights = create_multihead_dilated_attention(
        name, StandardizedRingConfig(**settings))(x, x, x)
    assert out.shape == x.shape and weights is None
    q = x.unflatten(-1, (4, 8))
    assert create_dilated_attention(name, **settings)(q, q, q).shape == q.shape


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    "changes",
    [
        dict(), dict(use_hilbert=False), dict(checkpointing=True), dict(causal=True),
        dict(bias=False), dict(combine="heads"), dict(dilation_mode="keys"), dict(curve="morton"),
        dict(backend="sdpa_mask"), dict(sparsity=0.5), dict(grid=None)],
    ids=str)
def test_every_combination_trains_and_evaluates(name, changes):
    module, x = make(name, **changes), tokens()
    trained = results(module, x)
    assert all(g is not None and g.isfinite().all() for g in trained)
    assert all(g.any() for g in trained)
    # no dropout: the same, gradients included
    torch.testing.assert_close(results(module.eval(), x), trained)


@pytest.mark.parametrize("name", TYPES)
def test_gradients_in_float64(name):
    module = make(name, dtype="float64")
    assert torch.autograd.gradcheck(
        module, tokens(dtype=torch.float64)[:1].requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("name", TYPES)
def test_autocast(name):
    module, x = make(name), tokens()
    expected = results(module, x)
    with torch.autocast("cpu", torch.bfloat16): actual = results(module, x)
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
    for a, e in zip(actual, expected): assert (a - e).norm() < 0.03 * e.norm()


@pytest.mark.parametrize("name", TYPES)
def test_saves_loads_and_copies(name):
    module, x = make(name), tokens()
    expected = module(x)
    other = make(name, seed=5)
    assert not torch.allclose(other(x), expected)
    other.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for copied in (
        other, copy.deepcopy(module), pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(module).to(torch.float64).to("cpu", torch.float32)):
        assert torch.equal(copied(x), expected)
    assert module.to(torch.float64)(x.double()).dtype == torch.float64
    assert {p.device.type for p in copy.deepcopy(module).to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("name", TYPES)
def test_compiles(name):
    module, x = make(name), tokens()
    # messages between processes break a graph
    compiled = torch.compile(
        module, fullgraph=not ATTENTION_TYPES[name].shares_sequence, backend="aot_eager")
    torch.testing.assert_close(results(compiled, x), results(module, x))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", [name for name in TYPES if not ATTENTION_TYPES[name].shares_sequence])
def test_dropout_acts_in_training_only(name):
    x = tokens()
    module, plain = make(name, dropout=0.5), make(name)
    torch.testing.assert_close(module.eval()(x), plain(x))
    first, second = module.train()(x), module(x)
    assert not torch.equal(first, second) and all(g.isfinite().all() for g in results(module, x))


@pytest.mark.parametrize("name", [name for name in TYPES if ATTENTION_TYPES[name].shares_sequence])
def test_a_ring_says_what_it_has_not(name):
    with pytest.raises(ValueError, match="dropout=0.1"): make(name, dropout=0.1)
    with pytest.raises(RuntimeError, match="ring_size=4, and the process group has 1 process"):
        make(name, ring_size=4)(tokens())


@pytest.mark.parametrize(
    "name",
    [name for name in TYPES if not ATTENTION_TYPES[name].shares_sequence and name != "hilbert"])
def test_one_process_says_so(name):
    with pytest.raises(ValueError, match="ring_size=2: type .* runs in one process"):
        make(name, ring_size=2)


@pytest.mark.timeout(200)
def test_distributed(tmp_path):
    """Gradients of two processes with half of the batch each are those of one process; so are
    those of two that share each sequence."""
    workers = [
        subprocess.Popen(
            [sys.executable, str(HERE / "api_worker.py"), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=tree_environment())
        for rank in range(2)]
    try: outputs = [worker.communicate(timeout=180) for worker in workers]
    finally:
        for worker in workers: worker.kill()
    assert all(worker.returncode == 0 for worker in workers), outputs
    shared = [name for name in TYPES if ATTENTION_TYPES[name].shares_sequence] + ["hilbert"]
    assert outputs[0][0].splitlines() == TYPES + [
        "HilbertAttentionCore", "HilbertAttentionCoreWithSDPA",
        "RingDilatedAttentionHilbertCore"] + [f"{name} shared" for name in shared]


class Copier(nn.Module):
    "Two layers that have to read the neighbouring token."
    def __init__(self, name):
        super().__init__()
        self.embed, self.place = nn.Embedding(4, 32), nn.Parameter(0.5 * torch.randn(24, 32))
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(
                    create_multihead_dilated_attention(
                        name, **{**SETTINGS, "dilation_rates": [1, 1]}),
                    32, mlp_ratio=2)
                for _ in range(2)))
        self.head = nn.Linear(32, 4)

    def forward(self, x): return self.head(self.blocks(self.embed(x) + self.place))


@pytest.mark.parametrize("name", TYPES)
def test_a_tiny_copy_task_is_learned(name):
    """16 sequences over 4 letters: what to say follows from the neighbour, not from a token and
    its place alone."""
    torch.manual_seed(0)
    model, x = Copier(name), torch.randint(4, (16, 24))
    target = x.view(16, 12, 2).flip(-1).reshape(16, 24)
    optimiser, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(400):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), target.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if losses[-1] < 0.01 * losses[0]: return
    pytest.fail(f"loss {losses[0]:.3f} -> {losses[-1]:.4f} after 400 steps")


def test_config_round_trip_and_replace():
    config = StandardizedRingConfig(
        embed_dim=64, heads=8, segment_lengths=[4, 8], dilation_rates=(1, 2), dtype=torch.bfloat16,
        grid=[4, 4], dropout=0.1, sparsity=0.5)
    assert StandardizedRingConfig.from_json(
        config.to_json()
    ) == config == StandardizedRingConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert config.to_dict()["dtype"] == "bfloat16"
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(copy.copy(config))
    assert config.replace(num_heads=4).heads == 4
    assert config.replace(hidden_dim=128).dim == 128
    assert config.replace() == config
    assert (config.embed_dim, config.hidden_dim, config.num_heads) == (64, 64, 8)
    with pytest.raises(ValueError, match="disagree"): config.replace(dim=64, embed_dim=32)
    with pytest.raises(ValueError, match="did you mean 'dropout'"): config.replace(dropuot=0.1)
    with pytest.raises(ValueError, match=r"'xyzzy' is no setting\. Known ones: dim, heads"):
        config.replace(xyzzy=1)
    with pytest.raises(ValueError, match="process group cannot be written"):
        config.replace(group=object()).to_dict()


@pytest.mark.parametrize(
    "capability, dtype, mixed, tiles",
    [
        (None, torch.float32, False, (64, 64)), ((6, 1), torch.float32, False, (64, 64)),
        ((7, 5), torch.float16, True, (64, 64)), ((8, 0), torch.bfloat16, True, None),
        ((8, 9), torch.bfloat16, True, None), ((9, 0), torch.bfloat16, True, None),
        ((10, 0), torch.bfloat16, True, None)])
def test_precision_and_blocks_follow_the_device(capability, dtype, mixed, tiles, monkeypatch):
    from hilbert_attn.kernels.tuning import default_tile
    device = "cpu" if capability is None else "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    config = StandardizedRingConfig(device=device)
    assert config.parameter_dtype == torch.float32
    assert config.replace(dtype="auto").parameter_dtype == dtype
    if tiles is None:
        tile = default_tile("forward", 64, dtype, capability)
        tiles = tile.block_m, tile.block_n
    assert config.tiles == tiles and config.replace(block_size=32).tiles == (32, 32)
    assert hilbert_attn.detect_gpu_architecture(device).mixed_precision == mixed
    if device == "cpu":
        with config.autocast(): assert not torch.is_autocast_enabled("cpu")


def test_auto_explains_itself():
    def ask(**settings): return explain_attention_type(StandardizedRingConfig(**settings))
    assert ask().type == "standard"
    assert ask(grid=100).type == "standard"
    assert ask(grid=(4, 6)).type == "hilbert"
    assert ask(grid=(4, 6), use_hilbert=False).type == "standard"
    assert ask(ring_size=2).type == "ring"
    assert ask(ring_size=2, grid=(4, 6)).type == "hilbert"
    assert ask(sparsity=0.5).type == "block_sparse"
    assert ask(sparsity=0.5, ring_size=2).type == "block_sparse_ring"
    small = explain_attention_type(StandardizedRingConfig(dim=64, heads=4), 1000, memory=10**9)
    large = explain_attention_type(
        StandardizedRingConfig(dim=64, heads=4), 10**6, layers=12, memory=10**9)
    assert not small.checkpoint
    assert large.checkpoint
    assert "checkpoint" in str(large)
    assert "sdpa" in str(small)


def attended_pairs(layer, n, heads):
    """Counts what a layer does: with equal scores, a row of weights is its keys' counts over
    their sum, and some key counts once."""
    q, v = torch.zeros(1, n, heads, n), torch.eye(n)[None, :, None].expand(1, n, heads, n)
    inside = [getattr(layer, name, lambda x: x) for name in ("shard", "unshard")]
    weights = inside[1](layer(*(inside[0](x) for x in (q, q, v))))
    smallest = weights.masked_fill(weights == 0, 2).amin(-1)
    return sum(round(1 / w) for w in smallest.flatten().tolist() if w < 2)


@pytest.mark.parametrize(
    "changes",
    [
        dict(), dict(use_hilbert=False), dict(causal=True), dict(combine="heads"),
        dict(combine="lse"), dict(dilation_mode="keys"), dict(dilation_mode="longnet"),
        dict(dilation_mode="residue"), dict(dilation_mode="longnet", combine="heads"),
        dict(sparsity=0.5), dict(sparsity=0.2, block_size=5),
        dict(segment_lengths=[5, 7, 24], dilation_rates=[1, 3, 4]), dict(grid=None),
        dict(grid=(30, 1))],
    ids=str)
@pytest.mark.parametrize("name", [*TYPES, "auto"])
def test_the_explanation_counts_what_the_layer_does(name, changes):
    config = StandardizedRingConfig(**{**SETTINGS, **changes})
    n = 24 if config.grid is None else torch.Size(config.grid).numel()
    choice = explain_attention_type(config, n, attention_type=name, batch=3)
    # causality is not counted
    layer = create_dilated_attention(choice.type, config.replace(causal=False))
    assert choice.backend.pairs == 3 * attended_pairs(layer, n, 4)
    assert choice.backend.flops == 4 * 8 * choice.backend.pairs
    assert choice.backend.density == choice.backend.pairs / (3 * 4 * n * n)
    assert f"{choice.backend.pairs:,} pairs" in str(choice)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("backend", ("auto", "sdpa_mask"))
def test_the_explanation_names_the_backend_that_runs(name, backend, monkeypatch):
    used, choose = [], hilbert_attn.backends.choose_backend
    def noted(*a, **options):
        used.append(choose(*a, **options)[0])
        return used[-1], ""
    config = StandardizedRingConfig(**{**SETTINGS, "backend": backend})
    expected = explain_attention_type(config, attention_type=name).backend.backend
    layer, q = create_dilated_attention(name, config), torch.zeros(1, 24, 4, 8)
    replace_choice(monkeypatch, noted)
    layer(q, q, q)
    assert used[0] == expected


def test_an_explanation_for_a_type_of_ones_own_and_for_no_type():
    with pytest.raises(
        ValueError, match="attention_type='ringg' is not known; did you mean 'ring'"):
        explain_attention_type(StandardizedRingConfig(), attention_type="ringg")
    with pytest.raises(ValueError, match="config is a dict: expected an AttentionConfig"):
        explain_attention_type(dict(dim=32))
    with pytest.raises(
        ValueError, match=r"seq_len=25 and grid=\(4, 6\) with 24 cells: they must agree"):
        explain_attention_type(StandardizedRingConfig(**SETTINGS), 25)
    for name, value in (("seq_len", 24.0), ("batch", "2"), ("layers", 0)):
        with pytest.raises(ValueError, match=f"{name}={value!r}: "):
            explain_attention_type(
                StandardizedRingConfig(dim=32, heads=4), **{"seq_len": 24, name: value})
    with pytest.raises(TypeError, match="sequence_length"):
        explain_attention_type(StandardizedRingConfig(), sequence_length=24)


@pytest.mark.parametrize(
    "name, values",
    [
        ("segment_lengths", [[20.9, 4, 4], "24", [True, 4, 4], float("nan"), None]),
        ("dilation_rates", [[1, 2.5, 4], "124"]), ("dim", [32.0, "32", True, float("nan")]),
        ("heads", [4.0, "4"]), ("ring_size", [1.0, True, None]), ("block_size", [8.0, "8"]),
        ("dropout", [float("nan"), "0.1", None, True]), ("sparsity", [float("nan"), "0.5", True]),
        *(
            (name, ["False", 0, 1, None, float("nan")])
            for name in ("causal", "use_hilbert", "checkpoint", "bias")),
        ("grid", [(4, 2.5), "24", float("nan")])],
    ids=str)
def test_settings_are_what_they_seem(name, values):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: ") + "(expected|must)"):
            StandardizedRingConfig(**{name: value})
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: ")):
            create_dilated_attention("standard", **{name: value})


def test_a_configuration_refuses_a_rate_beyond_its_segment():
    for build in (StandardizedRingConfig, partial(create_dilated_attention, "standard")):
        with pytest.raises(ValueError, match="dilation_rate=16: must not exceed segment_size=8"):
            build(segment_lengths=(8,), dilation_rates=(16,))


@pytest.mark.parametrize("device", ["gpu", 1.5])
def test_a_device_has_a_known_name(device):
    with pytest.raises(ValueError, match=f"device={device!r}: "):
        StandardizedRingConfig(device=device)


def test_which_when_is_the_policy():
    text = which_when()
    for row in POLICY: assert row.reason in text and f"`{row.backend}`" in text
    for row in MEMORY_POLICY: assert row.reason in text and f"{row.share:.0%}" in text
    for t in ATTENTION_TYPES.values(): assert t.about in text and t.when in text
    for rule in AUTO_RULES: assert rule.reason in text


def test_unknown_types_and_settings():
    with pytest.raises(ValueError, match=r"did you mean 'hilbert'\? Known types:\n  'standard'"):
        create_dilated_attention("hilbrt")
    with pytest.raises(ValueError, match=r"='x' is not known\. Known types:\n"):
        create_dilated_attention("x")
    with pytest.raises(ValueError, match=r"'x' is no setting\. Known ones: dim, "):
        create_dilated_attention("standard", x=1)
    with pytest.raises(ValueError, match="did you mean 'segment_lengths'"):
        create_dilated_attention("standard", segment_length=[8])
    with pytest.raises(ValueError, match="dim is missing"):
        create_multihead_dilated_attention("standard", heads=4)
    with pytest.raises(ValueError, match="registered already"):
        register_attention_type("standard", "", "")(lambda config: None)


def test_a_new_type_works_by_being_registered():
    @register_attention_type("mean", "the mean of all values", "tests")
    def build(config):
        class Mean(nn.Module):
            def forward(self, q, k, v, is_causal=False, key_mask=None):
                return v.mean(1, keepdim=True).expand_as(v)
        return Mean()
    try:
        x = tokens()
        assert torch.allclose(make("mean")(x)[:, 0], make("mean")(x)[:, 5])
        assert "the mean of all values" in which_when()
    finally: del ATTENTION_TYPES["mean"]


def test_historical_names_say_what_to_use_instead():
    """Each works from the top level and from `compat`, is in no `__all__` of the top level, and
    names what exists."""
    from hilbert_attn import compat
    for name, instead in INSTEAD.items():
        thing = getattr(hilbert_attn, name)
        assert thing is getattr(compat, name) and name not in hilbert_attn.__all__
        assert name in compat.__all__ and hasattr(hilbert_attn, re.match(r"\w+", instead)[0]), name
        if inspect.isclass(thing) and thing.__module__ == "hilbert_attn.compat":
            assert thing.__doc__.startswith("Historical name: `"), name
    assert compat.StandardizedRingConfig is hilbert_attn.AttentionConfig
    assert compat.create_standardized_ring_attention is hilbert_attn.create_self_attention


def test_multihead_is_nn_multiheadattention():
    "One branch over the sequence: same weights, same outputs and gradients, to 1e-5."
    torch.manual_seed(0)
    for batch_first in (False, True):
        for bias in (False, True):
            theirs = nn.MultiheadAttention(32, 4, bias=bias, batch_first=batch_first)
            ours = MultiheadDilatedAttention(
                32, 4, bias=bias, batch_first=batch_first, segment_lengths=[100],
                dilation_rates=[1])
            ours.load_state_dict(theirs.state_dict())
            # square, so that only the axes' meaning tells them apart
            x = [torch.randn(7, 7, 32) for _ in range(3)]
            causal = nn.Transformer.generate_square_subsequent_mask(7)
            padding = torch.rand(7, 7) < 0.3
            padding[:, 0] = False
            for options in (
                dict(), dict(key_padding_mask=padding), dict(attn_mask=causal),
                dict(attn_mask=causal.isinf(), is_causal=True)):
                pair = []
                for module in (ours, theirs):
                    leaves = [t.clone().requires_grad_() for t in x]
                    out, _ = module(*leaves, need_weights=False, **options)
                    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
                    wanted = *leaves, *module.parameters()
                    pair.append([out, *torch.autograd.grad(out, wanted, up)])
                for a, e in zip(*pair): assert (a - e).abs().max() < 1e-5 * max(1, e.abs().max())
            unbatched = torch.randn(7, 32)
            torch.testing.assert_close(
                ours(unbatched)[0], theirs(unbatched, unbatched, unbatched, need_weights=False)[0],
                rtol=1e-4, atol=1e-5)


def test_pytorchs_fast_path_does_not_bypass_it():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = tokens()
    for block in encoder.layers:
        replacement = MultiheadDilatedAttention(
            32, 4, batch_first=True, segment_lengths=[4], dilation_rates=[1])
        replacement.load_state_dict(block.self_attn.state_dict())
        block.self_attn = replacement
    with torch.no_grad(): fast = encoder(x)
    torch.testing.assert_close(fast, encoder(x))  # with gradients there is no fast path
    with torch.no_grad():
        assert not torch.allclose(fast, nn.TransformerEncoder(layer, 2).eval()(x), atol=1e-2)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kdim=16), "kdim=16"), (dict(add_bias_kv=True), "add_bias_kv=True"),
        (dict(embed_dim=30), "no multiple"),
        (dict(attention=nn.Identity(), causal=True), "belong to it"),
        (dict(attention=nn.Identity(), dropout=0.5), "given, and so are dropout: "),
        (dict(attention=nn.Identity(), segment_lengths=[8], dilation_rates=[1], causal=True),
         "so are segment_lengths, dilation_rates, causal: ")])
def test_multihead_says_what_it_cannot(options, message):
    with pytest.raises(ValueError, match=message):
        MultiheadDilatedAttention(**{**dict(embed_dim=32, num_heads=4), **options})


GROUP = dict(group="of processes")


@pytest.mark.parametrize("settings, kind", [
    ({}, "standard"),
    (dict(ring_size=2), "ring"),
    (GROUP, "ring"),
    (dict(sparsity=0.5), "block_sparse"),
    (dict(sparsity=0.5) | GROUP, "block_sparse_ring"),
    (dict(grid=(4, 6)), "hilbert"),
    (dict(grid=(4, 6), use_hilbert=False), "standard"),
    (dict(grid=(4, 6)) | GROUP, "hilbert"),
])
def test_auto_goes_by_its_rules(settings, kind):
    "A group of processes shares the sequence, as a ring size says it."
    config = hilbert_attn.AttentionConfig(**settings)
    assert next(rule.type for rule in AUTO_RULES if rule.holds(config)) == kind


def test_a_group_is_never_left_out(monkeypatch):
    "A type that shares a sequence takes it, the others say that they cannot."
    monkeypatch.setattr("hilbert_attn.api.group_size", lambda group: 2)
    create = hilbert_attn.create_dilated_attention
    layer = create("hilbert", **GROUP)
    assert layer.group == GROUP["group"]
    assert layer.curve == "hilbert"
    for name in ("standard", "improved", "block_sparse"):
        message = f"a group of 2 processes: type '{name}' runs in one"
        with pytest.raises(ValueError, match=message):
            create(name, **GROUP)


WINDOWS = [(0.0, 640), (0.5, 256), (0.6, 256), (0.7, 128), (0.8, 128), (0.9, 0)]


@pytest.mark.parametrize("sparsity, window", WINDOWS)
def test_a_window_of_blocks_is_the_nearest_to_the_sparsity(sparsity, window):
    "Of ten blocks of 64: the query's own, and as many on either side; the wider of two as near."
    assert _local_window(640, 64, sparsity) == window
