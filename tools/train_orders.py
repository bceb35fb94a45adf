"""Does the order of tokens matter for learning? Trains the same small masked transformer along each curve: `python tools/train_orders.py`.

Photos: patches of real photos on a grid, most of them hidden, and the hidden pixels are to be predicted; validation on photos that training never sees. Text: bytes of the standard library's own
sources, some of them hidden. One seed fixes the initial weights, the order of the data and the masks, so that two runs of a seed differ in one thing only: which tokens may look at each other.
Two more tasks on photos ask what depends on the setting: segments a quarter as long, and four times the steps.
Results go to `nbs/results/<machine>/orders.json` after each training, and a run that was interrupted goes on where it stopped;
with more seeds in `CONFIG` it gets those. `--time` measures the time per step, on a machine that does
nothing else, and adds it to that run. `--quick` trains toy models in seconds and writes nothing unless `--out` names a folder.
"""
import argparse
import base64
import io
import json
import math
import sys
import sysconfig
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hilbert_attn.bench import environment, load_runs, machine_slug, measure, progress_bar, results_folder
from hilbert_attn.curves import curve_order, inverse_order
from hilbert_attn.modules import HilbertAttentionCore, TransformerBlock, rotary_embedding
from hilbert_attn.patterns import SegmentPattern

PHOTOS = dict(grid=[28, 28], patch=4, segment_size=64, hidden_share=0.75, width=64, heads=2, layers=3, mlp_ratio=2, rope_base=100.0, batch=2, steps=300, warmup=20, rate=4e-3, weight_decay=0.01, evaluate_every=25, crops_per_photo=5)
SHORT = PHOTOS | dict(segment_size=16)
LONG = PHOTOS | dict(steps=1200, evaluate_every=100)
TEXT = PHOTOS | dict(grid=[784], patch=None, hidden_share=0.2, steps=200, crops_per_photo=None, validation_sequences=16)
CONFIG = dict(photos=PHOTOS, short=SHORT, long=LONG, text=TEXT, seeds=[0, 1, 2, 3, 4], timing_repeats=9)
_small = dict(width=32, heads=2, layers=2, batch=2, steps=6, warmup=2, evaluate_every=3)
_photos = PHOTOS | _small | dict(grid=[14, 14], segment_size=16, crops_per_photo=1)
QUICK = dict(photos=_photos, short=_photos | dict(segment_size=4), long=_photos | dict(steps=9), text=TEXT | _small | dict(grid=[196], segment_size=16, validation_sequences=2), seeds=[0], timing_repeats=1)
TRAINING_PHOTOS = ("astronaut", "rocket", "camera", "motorcycle", "retina", "hubble", "coins", "moon", "brick", "grass", "gravel", "flower", "grace hopper")
HELD_OUT_PHOTOS = ("chelsea", "coffee", "china")
PICTURED = ("row_major", "row_major, shifted", "hilbert", "hilbert, shifted", "dense")


@dataclass(frozen=True)
class Variant:
    "Who may look at whom."
    curve: str | None # a name in `CURVES`; None is dense attention
    shifted: bool = False # every other layer has its segment borders half a segment further along the curve

    @property
    def name(self) -> str: return "dense" if self.curve is None else self.curve + ", shifted" * self.shifted


PHOTO_VARIANTS = [Variant(curve, shifted) for shifted in (False, True) for curve in ("row_major", "snake", "tile", "morton", "hilbert")] + [Variant(None)]
SHORT_VARIANTS = [Variant(curve, shifted) for shifted in (False, True) for curve in ("row_major", "morton", "hilbert")]
LONG_VARIANTS = [*(Variant(curve, shifted) for shifted in (False, True) for curve in ("row_major", "hilbert")), Variant(None)]
TEXT_VARIANTS = [Variant("row_major"), Variant("hilbert")]
VARIANTS = dict(photos=PHOTO_VARIANTS, short=SHORT_VARIANTS, long=LONG_VARIANTS, text=TEXT_VARIANTS)


def layer_orders(
    grid: tuple[int, ...], # of the tokens
    segment_size: int, # positions per segment
    layers: int, # number of layers
    variant: Variant,
) -> list[Tensor]: # int64 (N,) each: the token at each position, layer by layer
    "The order of each layer. Shifted: odd layers have it rolled by half a segment, so that the last segment joins the curve's end to its beginning."
    order = curve_order(grid, variant.curve or "row_major")
    return [order.roll(-(segment_size // 2)) if variant.shifted and layer % 2 else order for layer in range(layers)]


class MaskedTransformer(nn.Module):
    "Tokens (B, N, inputs) and what is hidden (B, N) to predictions (B, N, outputs), all in token order."

    def __init__(self, config: dict, variant: Variant, inputs: int, outputs: int):
        super().__init__()
        width, segment_size = config["width"], None if variant.curve is None else config["segment_size"]
        self.embed, self.hidden = nn.Linear(inputs, width), nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(TransformerBlock(HilbertAttentionCore(width, config["heads"], segment_size, curve=None, backend="sdpa"), width, mlp_ratio=config["mlp_ratio"])
                                    for _ in range(config["layers"]))
        self.norm, self.predict = nn.LayerNorm(width), nn.Linear(width, outputs)
        grid = tuple(config["grid"])
        orders = layer_orders(grid, config["segment_size"], config["layers"], variant)
        rope = rotary_embedding(grid, width // config["heads"], base=config["rope_base"])  # of the true coordinates, whatever the order
        now, self.moves, self.ropes = torch.arange(prod(grid)), [], []
        for order in [*orders, torch.arange(prod(grid))]:  # from the order of one layer straight to that of the next, and home at the end
            self.moves.append(None if torch.equal(now, order) else inverse_order(now)[order])
            self.ropes.append(tuple(r[order] for r in rope))
            now = order

    def forward(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        x = torch.where(hidden[..., None], self.hidden, self.embed(tokens))
        for i, move in enumerate(self.moves):
            if move is not None: x = x[:, move]
            if i < len(self.blocks): x = self.blocks[i](x, rope=self.ropes[i])
        return self.predict(self.norm(x))


def load_photos() -> dict[str, np.ndarray]: # name -> float32 (height, width) in 0 .. 1
    "The bundled photos in grey, at half their size."
    try:
        from matplotlib import cbook
        from PIL import Image
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError as e: raise RuntimeError(f"the photos need scikit-image, scikit-learn and matplotlib ({e}): pip install 'hilbert_attn[experiments]'") from None
    with cbook.get_sample_data("grace_hopper.jpg") as file: hopper = np.asarray(Image.open(file))
    china, flower = load_sample_images().images
    photos = {"china": china, "flower": flower, "grace hopper": hopper, "motorcycle": data.stereo_motorcycle()[0], "hubble": data.hubble_deep_field()}
    photos |= {name: getattr(data, name)() for name in (*TRAINING_PHOTOS, *HELD_OUT_PHOTOS) if name not in photos}
    found = {}
    for name in (*TRAINING_PHOTOS, *HELD_OUT_PHOTOS):
        picture = Image.fromarray(photos[name]).convert("L")
        found[name] = np.asarray(picture.reduce(2), np.float32) / 255
    return found


class Photos:
    "Crops of photos as tokens: (B, N, patch * patch) pixels, standardised with the mean and spread of the training photos."
    loss_name = "mean squared error of hidden pixels, in units of the pixels' variance"

    def __init__(self, config: dict):
        self.config, photos = config, load_photos()
        known = np.concatenate([photos[name].ravel() for name in TRAINING_PHOTOS])
        self.mean, self.std = float(known.mean()), float(known.std())
        self.photos = {name: (p - self.mean) / self.std for name, p in photos.items()}
        self.inputs = self.outputs = config["patch"] ** 2
        draw = torch.Generator().manual_seed(12345)
        crops = [self._crop(name, draw) for name in HELD_OUT_PHOTOS for _ in range(config["crops_per_photo"])]
        self.names = [name for name in HELD_OUT_PHOTOS for _ in range(config["crops_per_photo"])]
        self.validation = self._tokens(crops), self._hide(len(crops), draw)

    def _crop(self, name: str, draw: torch.Generator) -> np.ndarray:
        photo, (height, width) = self.photos[name], (n * self.config["patch"] for n in self.config["grid"])
        y, x, flip = (int(torch.randint(n, (), generator=draw)) for n in (photo.shape[0] - height + 1, photo.shape[1] - width + 1, 2))
        return photo[y:y + height, x:x + width][:, ::-1 if flip else 1]

    def _tokens(self, crops: list[np.ndarray]) -> Tensor:
        p, (H, W) = self.config["patch"], self.config["grid"]
        return torch.from_numpy(np.stack(crops).reshape(len(crops), H, p, W, p).swapaxes(2, 3).reshape(len(crops), H * W, p * p).copy())

    def _hide(self, batch: int, draw: torch.Generator) -> Tensor:
        n = prod(self.config["grid"])
        return torch.rand(batch, n, generator=draw).argsort(1) < round(self.config["hidden_share"] * n)

    def batch(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        names = [TRAINING_PHOTOS[i] for i in torch.randint(len(TRAINING_PHOTOS), (self.config["batch"],), generator=draw).tolist()]
        return self._tokens([self._crop(name, draw) for name in names]), self._hide(len(names), draw)

    def predict(self, model: nn.Module, tokens: Tensor, hidden: Tensor) -> Tensor: return model(tokens, hidden)

    def losses(self, predicted: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor: # (B,)
        error = (predicted - tokens).square().mean(-1)
        return (error * hidden).sum(1) / hidden.sum(1)

    def picture(self, tokens: Tensor) -> np.ndarray: # uint8 (height, B * width)
        p, (H, W) = self.config["patch"], self.config["grid"]
        pixels = tokens.view(-1, H, W, p, p).permute(1, 3, 0, 2, 4).reshape(H * p, -1)
        return ((pixels * self.std + self.mean).clamp(0, 1) * 255).round().byte().numpy()


def load_sources() -> tuple[bytes, bytes]: # for training, held out
    "The standard library's own modules, every tenth file held out."
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    contents = [file.read_bytes() for file in files]
    return b"".join(c for i, c in enumerate(contents) if i % 10), b"".join(contents[::10])


class Text:
    "Stretches of text as tokens: bytes, int64 (B, N)."
    loss_name = "cross-entropy of hidden bytes, in nats"

    def __init__(self, config: dict):
        self.config = config
        self.training, self.held_out = (torch.frombuffer(bytearray(b), dtype=torch.uint8).long() for b in load_sources())
        self.inputs = self.outputs = 256
        draw = torch.Generator().manual_seed(12345)
        tokens = self._draw(self.held_out, config["validation_sequences"], draw)
        self.validation, self.names = (tokens, self._hide(len(tokens), draw)), ["held-out modules"] * len(tokens)

    def _draw(self, text: Tensor, batch: int, draw: torch.Generator) -> Tensor:
        n = prod(self.config["grid"])
        return text[torch.randint(len(text) - n, (batch, 1), generator=draw) + torch.arange(n)]

    _hide = Photos._hide

    def batch(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = self._draw(self.training, self.config["batch"], draw)
        return tokens, self._hide(len(tokens), draw)

    def predict(self, model: nn.Module, tokens: Tensor, hidden: Tensor) -> Tensor: return model(F.one_hot(tokens, 256).float(), hidden)

    def losses(self, predicted: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor: # (B,)
        error = F.cross_entropy(predicted.transpose(1, 2), tokens, reduction="none")
        return (error * hidden).sum(1) / hidden.sum(1)


DATA = dict(photos=Photos, short=Photos, long=Photos, text=Text)


def rate_at(step: int, config: dict) -> float:
    "Learning rate: a linear rise, then half a cosine down to zero."
    done = (step - config["warmup"]) / max(1, config["steps"] - config["warmup"])
    return config["rate"] * ((step + 1) / (config["warmup"] + 1) if step < config["warmup"] else 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def validate(model: nn.Module, data) -> Tensor: # loss of each validation crop
    tokens, hidden = data.validation
    size = data.config["batch"]
    return torch.cat([data.losses(data.predict(model, t, h), t, h) for t, h in zip(tokens.split(size), hidden.split(size))])


def new_model(data, variant: Variant, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = MaskedTransformer(data.config, variant, data.inputs, data.outputs)
    return model, torch.optim.AdamW(model.parameters(), lr=data.config["rate"], betas=(0.9, 0.95), weight_decay=data.config["weight_decay"])


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, data, tokens: Tensor, hidden: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = data.losses(data.predict(model, tokens, hidden), tokens, hidden).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(data, variant: Variant, seed: int, tell=None) -> tuple[dict, nn.Module]: # JSON-ready: losses, and the model
    "One training. The seed fixes weights, data and masks, whatever the variant."
    config, draw = data.config, torch.Generator().manual_seed(1000 + seed)
    model, optimizer = new_model(data, variant, seed)
    training, validation, every = [], [], config["evaluate_every"]
    for step in range(config["steps"]):
        if step % every == 0: validation.append([step, round(validate(model, data).mean().item(), 5)])
        for group in optimizer.param_groups: group["lr"] = rate_at(step, config)
        training.append(train_step(model, optimizer, data, *data.batch(draw)))
        if tell: tell()
    losses = validate(model, data)
    validation.append([config["steps"], round(losses.mean().item(), 5)])
    by_name = {name: round(float(np.mean([x for x, n in zip(losses.tolist(), data.names) if n == name])), 5) for name in dict.fromkeys(data.names)}
    train_means = [[i + every, round(float(np.mean(training[i:i + every])), 5)] for i in range(0, len(training), every)]
    return dict(variant=variant.name, seed=seed, training=train_means, validation=validation, final=validation[-1][1], final_by_name=by_name, parameters=sum(p.numel() for p in model.parameters())), model


def _as_text(picture: np.ndarray) -> str: # base64 of a WebP
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "webp", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


@torch.no_grad()
def reconstruct(model: nn.Module | None, data: Photos) -> str: # picture of one validation crop per held-out photo, as base64 of a WebP
    "What the model makes of the first validation crop of each photo; the photos themselves, without a model."
    first = [data.names.index(name) for name in HELD_OUT_PHOTOS]
    tokens, hidden = (x[first] for x in data.validation)
    return _as_text(data.picture(tokens if model is None else torch.where(hidden[..., None], model(tokens, hidden), tokens)))


def simple_guesses(data: Photos) -> dict[str, float]: # name -> validation loss
    "What one gets without learning: the mean of what is visible in the crop, and the mean of the visible patches nearby."
    tokens, hidden = data.validation
    (H, W), shown = data.config["grid"], (~hidden).float()[..., None]
    mean = ((tokens * shown).sum(1, keepdim=True) / shown.sum(1, keepdim=True)).mean(-1, keepdim=True).expand_as(tokens)
    value, weight = (x.view(-1, 1, H, W) for x in ((tokens * shown).mean(-1), shown[..., 0]))
    near = mean.clone()
    left = hidden.clone()
    for reach in range(1, max(H, W)):
        kernel = torch.ones(1, 1, 2 * reach + 1, 2 * reach + 1)
        total, count = (F.conv2d(x, kernel, padding=reach).flatten(1) for x in (value, weight))
        now = left & (count > 0)
        near[now] = (total / count.clamp(min=1))[now][:, None]
        left &= ~now
    return {"mean of the visible patches": data.losses(mean, tokens, hidden).mean().item(), "mean of the nearest visible patches": data.losses(near, tokens, hidden).mean().item()}


def attended_pairs(config: dict, variant: Variant) -> int: # per head, layer and crop
    "Query-key pairs: the same for all orders."
    n = prod(config["grid"])
    return SegmentPattern(n, n if variant.curve is None else config["segment_size"]).pairs()


def step_times(config: dict) -> list[dict]: # one row per task and variant
    "Median time of a training step, variants in turn, in this process."
    rows = []
    for task, variants in VARIANTS.items():
        if task == "long": continue  # its steps are those of "photos"
        data = DATA[task](config[task])
        batch = data.batch(torch.Generator().manual_seed(0))
        calls = {}
        for variant in variants:
            model, optimizer = new_model(data, variant, 0)
            for group in optimizer.param_groups: group["lr"] = 0.0
            calls[variant.name] = lambda model=model, optimizer=optimizer: train_step(model, optimizer, data, *batch)
        for name, t in measure(calls, config["timing_repeats"]).items(): rows.append(dict(task=task, variant=name, median=t.median, p20=t.p20, p80=t.p80, repeats=t.repeats))
    return rows


def _store(run: dict, folder: str | Path | None) -> Path:
    "Writes a run in place of the one that began at the same time, or after the others; the file is replaced in one step."
    path = Path(folder or results_folder()) / machine_slug(run["environment"]) / "orders.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = [r for r in (json.loads(path.read_text()) if path.exists() else []) if r["environment"]["date"] != run["environment"]["date"]]
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps([*runs, run], indent=None, separators=(",", ":")).replace('{"variant"', '\n{"variant"').replace('{"task"', '\n{"task"') + "\n")
    scratch.replace(path)
    return path


def _unfinished(config: dict, folder: str | Path | None) -> dict | None:
    "The stored run of this machine with these settings; it may have fewer seeds."
    here = machine_slug(environment())
    return next((r for r in load_runs("orders", folder)[::-1] if r["config"] | dict(seeds=None) == config | dict(seeds=None) and machine_slug(r["environment"]) == here), None)


def run_suite(
    config: dict,
    quick: bool = False,
    folder: str | Path | None = None, # None: nbs/results
    store: bool = True, # after each training
    progress: bool | None = None, # show a progress bar; None: on a terminal
    log=None, # told a line after each training
) -> dict: # JSON-ready
    "Trains what is not trained yet: seed after seed, so that an interrupted run has whole seeds."
    run = store and _unfinished(config, folder) or dict(suite="orders", quick=quick, config=config, environment=environment(), **{task: [] for task in VARIANTS}, pairs={}, guesses={}, pictures={}, timing=[])
    run["config"] = config | dict(seeds=sorted({*config["seeds"], *run["config"]["seeds"]}))
    data = {task: make(config[task]) for task, make in DATA.items()}
    run["pairs"] = {task: {v.name: attended_pairs(config[task], v) for v in variants} for task, variants in VARIANTS.items()}
    run["loss"] = {task: d.loss_name for task, d in data.items()}
    run["guesses"] = simple_guesses(data["photos"])
    run["pictures"].setdefault("truth", reconstruct(None, data["photos"]))
    jobs = [(task, v, seed) for task in VARIANTS for seed in config["seeds"] for v in VARIANTS[task] if (v.name, seed) not in {(r["variant"], r["seed"]) for r in run[task]}]
    with progress_bar(sum(config[task]["steps"] for task, *_ in jobs), "training", progress) as bar:
        for task, variant, seed in jobs:
            bar.set_description_str(f"{task}: {variant.name}, seed {seed}")
            result, model = train(data[task], variant, seed, bar.update)
            run[task].append(result)
            if task == "photos" and seed == config["seeds"][0] and variant.name in PICTURED: run["pictures"][variant.name] = reconstruct(model, data["photos"])
            if store: _store(run, folder)
            if log: log(f"{task:7} seed {seed} {variant.name:22} {result['final']:.4f}")
    return run


def add_times(config: dict, folder: str | Path | None = None) -> Path:
    "Measures the time per step and adds it to the stored run of this configuration."
    run = _unfinished(config, folder)
    if run is None: raise RuntimeError("there is no stored run of this configuration on this machine: train first")
    run["timing"], run["timing_environment"] = step_times(config), environment()
    return _store(run, folder)


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262) # 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom


def finals(run: dict, task: str) -> dict[str, dict[int, float]]: # variant -> seed -> final validation loss
    "The figures that everything is judged by."
    return {v.name: {r["seed"]: r["final"] for r in run[task] if r["variant"] == v.name} for v in VARIANTS[task]}


FAMILIES = {"stripes": ("row_major", "snake"), "blocks": ("tile", "morton", "hilbert")}


def _losses(run: dict, task: str, name: str) -> dict[int, float]: # seed -> final validation loss
    "Of a variant, or the mean over a family of orders."
    found, (family, *shift) = finals(run, task), name.split(", ")
    members = [found[", ".join([curve, *shift])] for curve in FAMILIES[family]] if family in FAMILIES else [found[name]]
    return {seed: float(np.mean([x[seed] for x in members])) for seed in set.intersection(*map(set, members))}


def missing(run: dict) -> list[str]: # one line each
    "Trainings of the configuration that a run does not have yet."
    return [f"{task}: {name}, seed {seed}" for task in VARIANTS for name, found in finals(run, task).items() for seed in run["config"]["seeds"] if seed not in found]


@dataclass(frozen=True)
class Comparison:
    "Final validation losses of `a` and `b`, seed by seed. A paired 95 % interval (Student's t), for this one comparison."
    a: str
    b: str
    change: float # mean of a - b as a share of the mean of b
    low: float # ends of its interval
    high: float
    seeds_lower: int # seeds in which a is lower
    seeds: int

    @property
    def verdict(self) -> str: return "lower" if self.high < 0 else "higher" if self.low > 0 else "undecided"

    def __str__(self) -> str:
        figures = f"{100 * self.change:+.1f} % (95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f} %; lower in {self.seeds_lower} of {self.seeds} seeds)"
        return f"`{self.a}` and `{self.b}` cannot be told apart: {figures}" if self.verdict == "undecided" else f"`{self.a}` ends {self.verdict} than `{self.b}`: {figures}"


def compare(run: dict, task: str, a: str, b: str) -> Comparison:
    "Pairs the seeds: weights, data and masks are the same on both sides."
    losses = {name: _losses(run, task, name) for name in (a, b)}
    seeds = sorted(set(losses[a]) & set(losses[b]))
    if len(seeds) < 2: raise ValueError(f"{a} and {b} share {len(seeds)} seeds: an interval needs at least 2")
    difference, base = np.array([losses[a][s] - losses[b][s] for s in seeds]), float(np.mean([losses[b][s] for s in seeds]))
    mean, half = difference.mean() / base, _T95[len(seeds) - 2] * difference.std(ddof=1) / math.sqrt(len(seeds)) / base
    return Comparison(a, b, float(mean), float(mean - half), float(mean + half), int((difference < 0).sum()), len(seeds))


def comparisons(run: dict) -> dict[str, list[Comparison]]: # question -> what speaks to it
    "What the experiment was made to compare."
    both = ("", ", shifted")
    return {
        "Photos: Hilbert against row-major": [compare(run, "photos", f"hilbert{s}", f"row_major{s}") for s in both],
        "Photos: Hilbert against the other orders": [compare(run, "photos", f"hilbert{s}", f"{c}{s}") for s in both for c in ("snake", "tile", "morton")],
        "Photos: with shifts against without": [compare(run, "photos", f"{c}, shifted", c) for c in ("row_major", "snake", "tile", "morton", "hilbert")],
        "Photos: Hilbert against dense attention": [compare(run, "photos", f"hilbert{s}", "dense") for s in both],
        "Photos: blocks against stripes": [compare(run, "photos", f"blocks{s}", f"stripes{s}") for s in both],
        "Short segments: Hilbert against the other orders": [compare(run, "short", f"hilbert{s}", f"{c}{s}") for s in both for c in ("row_major", "morton")],
        "Short segments: with shifts against without": [compare(run, "short", f"{c}, shifted", c) for c in ("row_major", "morton", "hilbert")],
        "Longer training: Hilbert against row-major": [compare(run, "long", f"hilbert{s}", f"row_major{s}") for s in both],
        "Longer training: Hilbert against dense attention": [compare(run, "long", f"hilbert{s}", "dense") for s in both],
        "Text: Hilbert against row-major": [compare(run, "text", "hilbert", "row_major")]}


def _names(found: list[Comparison]) -> str: return ", ".join(f"`{c.b}`" for c in found) or "none"


def conclusions(run: dict) -> list[str]: # sentences
    "The result in words, made from the figures."
    found = comparisons(run)
    rows, rivals, shifts, dense, families, short, short_shifts, long, long_dense, text = found.values()
    def of(cs, verdict): return [c for c in cs if c.verdict == verdict]
    def word(cs): return {("lower", "lower"): "Yes, with shifts and without", ("higher", "higher"): "It does, the wrong way round: Hilbert is worse, with shifts and without", ("undecided", "undecided"): "Not shown by these seeds"}.get(
        tuple(c.verdict for c in cs), "It depends: without shifts Hilbert is " + {"undecided": "not told apart"}.get(cs[0].verdict, cs[0].verdict) + ", with shifts " + {"undecided": "not told apart"}.get(cs[1].verdict, cs[1].verdict))
    lines = [f"**Does Hilbert end below row-major on photos?** {word(rows)}. " + "; ".join(map(str, rows)) + "."]
    lines.append("**Do orders that make 2-D blocks (tile, Morton, Hilbert) end below those that make stripes (row-major, snake), taken together?** " + "; ".join(map(str, families)) + ".")
    near = [c for c in rivals if c.b.startswith(("tile", "morton"))]
    lines.append("**Does it have to be Hilbert?** Among the two other orders that make 2-D blocks, in four comparisons, Hilbert is lower than " + f"{_names(of(near, 'lower'))}; higher than {_names(of(near, 'higher'))}; not told apart from {_names(of(near, 'undecided'))}.")
    lines.append(f"**Do alternating shifts help?** They lower the loss of {', '.join(f'`{c.b}`' for c in of(shifts, 'lower')) or 'no order'}; raise that of {', '.join(f'`{c.b}`' for c in of(shifts, 'higher')) or 'none'}; "
                 f"no effect is shown for {', '.join(f'`{c.b}`' for c in of(shifts, 'undecided')) or 'none'}.")
    pairs = run["pairs"]["photos"]
    lines.append(f"**What does dense attention gain with {pairs['dense'] / pairs['hilbert']:.1f} times the pairs?** " + "; ".join(map(str, dense)) + ".")
    if ms := {r["variant"]: r["median"] for r in run["timing"] if r["task"] == "photos"}:
        lines.append(f"**And time?** A step takes {ms['dense'] / ms['hilbert']:.1f} times as long with dense attention as with Hilbert segments; orders differ by {100 * (max(ms[n] for n in ms if n != 'dense') / min(ms.values()) - 1):.0f} % at most.")
    means = {name: float(np.mean(list(x.values()))) for name, x in finals(run, "photos").items()}
    ranked = sorted((n for n in means if n != "dense"), key=means.get)
    against = [compare(run, "photos", ranked[0], name) for name in ranked[1:]]
    lines.append(f"**Which order has the lowest mean?** `{ranked[0]}` ({means[ranked[0]]:.4f}; picked after the fact), lower than {_names(of(against, 'lower'))}; not told apart from {_names(of(against, 'undecided'))}. "
                 f"The highest is `{ranked[-1]}` ({means[ranked[-1]]:.4f}). Dense attention has {means['dense']:.4f}, the mean of the nearest visible patches {run['guesses']['mean of the nearest visible patches']:.4f}.")
    def sizes(task): return run["config"][task]["segment_size"] if task == "short" else run["config"][task]["steps"]
    lines.append(f"**And with segments of {sizes('short')}?** " + "; ".join(map(str, short)) + ". Shifts: " + "; ".join(map(str, short_shifts)) + ".")
    lines.append(f"**Does it last, over {sizes('long'):,} steps?** " + "; ".join(map(str, long + long_dense)) + ".")
    lines.append("**And on text, where folding has no reason to help?** " + "; ".join(map(str, text)) + ".")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy models, in seconds")
    parser.add_argument("--time", action="store_true", help="only the time per step, added to the stored run")
    parser.add_argument("--out", help="folder of results instead of nbs/results")
    args = parser.parse_args()
    config = QUICK if args.quick else CONFIG
    if args.time:
        for row in json.loads(add_times(config, args.out).read_text())[-1]["timing"]: print(f"{row['task']:7} {row['variant']:22} {1e3 * row['median']:8.1f} ms per step")
    else: run_suite(config, args.quick, args.out, store=bool(args.out) or not args.quick, log=partial(print, flush=True))


if __name__ == "__main__": main()
