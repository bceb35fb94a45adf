"""Does the order of tokens matter for learning? `python tools/train_orders.py` trains along each.

The same small masked transformer, one order after the other. Photos: patches of real photos on
a grid, most of them hidden, and the hidden pixels are to be predicted; validation on photos that
training never sees. Text: bytes of the standard library's own sources, some of them hidden.
One seed fixes the initial weights, the order of the data and the masks, so that two runs of a
seed differ in one thing only: which tokens may look at each other. Two more tasks on photos ask
what depends on the setting: segments a quarter as long, and four times the steps.

Results go to `nbs/results/<machine>/orders.json` after each training, and a run that was
interrupted goes on where it stopped; with more seeds in `CONFIG` it gets those. `--time` measures
the time per step, on a machine that does nothing else, and adds it to that run. `--quick` trains
toy models in seconds and writes nothing unless `--out` names a folder.
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

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from study.photos import load_photos
from torch import Generator, Tensor
from torch.optim import AdamW, Optimizer

from hilbert_attn.bench import (
    environment,
    load_runs,
    machine_slug,
    measure,
    results_folder,
    telling,
)
from hilbert_attn.curves import curve_order, inverse_order
from hilbert_attn.modules import HilbertAttentionCore, TransformerBlock, rotary_embedding
from hilbert_attn.patterns import SegmentPattern

PHOTOS = dict(
    grid=[28, 28], patch=4, segment_size=64, hidden_share=0.75, crops_per_photo=5,
    width=64, heads=2, layers=3, mlp_ratio=2, rope_base=100.0,
    batch=2, steps=300, warmup=20, rate=4e-3, weight_decay=0.01, evaluate_every=25,
)
SHORT = PHOTOS | dict(segment_size=16)
LONG = PHOTOS | dict(steps=1200, evaluate_every=100)
TEXT = PHOTOS | dict(
    grid=[784], patch=None, hidden_share=0.2, crops_per_photo=None,
    steps=200, validation_sequences=16,
)
CONFIG = dict(
    photos=PHOTOS, short=SHORT, long=LONG, text=TEXT,
    seeds=[0, 1, 2, 3, 4], timing_repeats=9,
)

_SMALL = dict(width=32, heads=2, layers=2, batch=2, steps=6, warmup=2, evaluate_every=3)
_SMALL_PHOTOS = PHOTOS | _SMALL | dict(grid=[14, 14], segment_size=16, crops_per_photo=1)
_SMALL_TEXT = TEXT | _SMALL | dict(grid=[196], segment_size=16, validation_sequences=2)
QUICK = dict(
    photos=_SMALL_PHOTOS,
    short=_SMALL_PHOTOS | dict(segment_size=4),
    long=_SMALL_PHOTOS | dict(steps=9),
    text=_SMALL_TEXT,
    seeds=[0], timing_repeats=1,
)

TRAINING_PHOTOS = (
    "astronaut", "rocket", "camera", "motorcycle", "retina", "hubble", "coins",
    "moon", "brick", "grass", "gravel", "flower", "hopper",
)
HELD_OUT_PHOTOS = ("chelsea", "coffee", "china")
PICTURED = ("row_major", "row_major, shifted", "hilbert", "hilbert, shifted", "dense")


@dataclass(frozen=True)
class Variant:
    "Who may look at whom."
    curve: str | None # a name in `CURVES`; None is dense attention
    shifted: bool = False # every other layer has its borders half a segment further on

    @property
    def name(self) -> str:
        return "dense" if self.curve is None else self.curve + ", shifted" * self.shifted


def _with_and_without_shifts(*curves: str) -> list[Variant]:
    return [Variant(curve, shifted) for shifted in (False, True) for curve in curves]


CURVES = ("row_major", "snake", "tile", "morton", "hilbert")
PHOTO_VARIANTS = [*_with_and_without_shifts(*CURVES), Variant(None)]
VARIANTS = dict(
    photos=PHOTO_VARIANTS,
    short=_with_and_without_shifts("row_major", "morton", "hilbert"),
    long=[*_with_and_without_shifts("row_major", "hilbert"), Variant(None)],
    text=[Variant("row_major"), Variant("hilbert")],
)


def layer_orders(
    grid: tuple[int, ...], # of the tokens
    segment_size: int, # positions per segment
    layers: int, # number of layers
    variant: Variant,
) -> list[Tensor]: # int64 (N,) each: the token at each position, layer by layer
    """The order of each layer.

    Shifted: odd layers have it rolled by half a segment, so that the last segment joins the
    curve's end to its beginning."""
    order = curve_order(grid, variant.curve or "row_major")
    odd = order.roll(-(segment_size // 2)) if variant.shifted else order
    return [odd if layer % 2 else order for layer in range(layers)]


class MaskedTransformer(nn.Module):
    "Tokens (B, N, inputs), what is hidden (B, N) to predictions (B, N, outputs), in token order."

    def __init__(self, config: dict, variant: Variant, inputs: int, outputs: int):
        super().__init__()
        width = config["width"]
        self.embed = nn.Linear(inputs, width)
        self.hidden = nn.Parameter(0.02 * torch.randn(width))
        layers = range(config["layers"])
        self.blocks = nn.ModuleList(self._block(config, variant) for _ in layers)
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, outputs)
        self._lay_out(config, variant)

    def _block(self, config: dict, variant: Variant) -> nn.Module:
        width = config["width"]
        segment_size = None if variant.curve is None else config["segment_size"]
        settings = dict(curve=None, backend="sdpa")
        attention = HilbertAttentionCore(width, config["heads"], segment_size, **settings)
        return TransformerBlock(attention, width, mlp_ratio=config["mlp_ratio"])

    def _lay_out(self, config: dict, variant: Variant):
        """From the order of one layer straight to that of the next, and home at the end.

        Rotary embeddings are of the true coordinates, whatever the order."""
        grid, head_dim = tuple(config["grid"]), config["width"] // config["heads"]
        rope = rotary_embedding(grid, head_dim, base=config["rope_base"])
        home = torch.arange(prod(grid))
        now, self.moves, self.ropes = home, [], []
        orders = layer_orders(grid, config["segment_size"], config["layers"], variant)
        for order in [*orders, home]:
            stays = torch.equal(now, order)
            self.moves.append(None if stays else inverse_order(now)[order])
            self.ropes.append(tuple(part[order] for part in rope))
            now = order

    def forward(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        x = torch.where(hidden[..., None], self.hidden, self.embed(tokens))
        for i, move in enumerate(self.moves):
            if move is not None: x = x[:, move]
            if i < len(self.blocks): x = self.blocks[i](x, rope=self.ropes[i])
        return self.predict(self.norm(x))


def hide(
    config: dict,
    batch: int, # B
    draw: Generator,
) -> Tensor: # bool (B, N)
    "The same share of each example, at random."
    n = prod(config["grid"])
    hidden = round(config["hidden_share"] * n)
    return torch.rand(batch, n, generator=draw).argsort(1) < hidden


def mean_of_hidden(error: Tensor, hidden: Tensor) -> Tensor: # both (B, N), to (B,)
    return (error * hidden).sum(1) / hidden.sum(1)


class Photos:
    """Crops of photos as tokens: pixels (B, N, patch * patch).

    They are standardised with the mean and spread of the training photos."""
    loss_name = "mean squared error of hidden pixels, in units of the pixels' variance"

    def __init__(self, config: dict):
        self.config = config
        photos = {name: photo.numpy() for name, photo in load_photos().items()}
        known = np.concatenate([photos[name].ravel() for name in TRAINING_PHOTOS])
        self.mean, self.std = float(known.mean()), float(known.std())
        chosen = (*TRAINING_PHOTOS, *HELD_OUT_PHOTOS)
        self.photos = {name: (photos[name] - self.mean) / self.std for name in chosen}
        self.inputs = self.outputs = config["patch"] ** 2
        draw = Generator().manual_seed(12345)
        self.names = [n for n in HELD_OUT_PHOTOS for _ in range(config["crops_per_photo"])]
        self.validation = self._examples(self.names, draw)

    def _crop(self, name: str, draw: Generator) -> np.ndarray:
        photo = self.photos[name]
        height, width = (n * self.config["patch"] for n in self.config["grid"])
        choices = photo.shape[0] - height + 1, photo.shape[1] - width + 1, 2
        y, x, flip = (int(torch.randint(n, (), generator=draw)) for n in choices)
        crop = photo[y:y + height, x:x + width]
        return crop[:, ::-1] if flip else crop

    def _examples(self, names: list[str], draw: Generator) -> tuple[Tensor, Tensor]:
        crops = np.stack([self._crop(name, draw) for name in names])
        p, (height, width) = self.config["patch"], self.config["grid"]
        patches = crops.reshape(len(names), height, p, width, p).swapaxes(2, 3)
        tokens = patches.reshape(len(names), height * width, p * p).copy()
        return torch.from_numpy(tokens), hide(self.config, len(names), draw)

    def batch(self, draw: Generator) -> tuple[Tensor, Tensor]: # tokens, hidden
        size = (self.config["batch"],)
        chosen = torch.randint(len(TRAINING_PHOTOS), size, generator=draw).tolist()
        return self._examples([TRAINING_PHOTOS[i] for i in chosen], draw)

    def predict(self, model: nn.Module, tokens: Tensor, hidden: Tensor) -> Tensor:
        return model(tokens, hidden)

    def losses(self, predicted: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor: # (B,)
        return mean_of_hidden((predicted - tokens).square().mean(-1), hidden)

    def picture(self, tokens: Tensor) -> np.ndarray: # uint8 (height, B * width)
        p, (height, width) = self.config["patch"], self.config["grid"]
        patches = tokens.view(-1, height, width, p, p).permute(1, 3, 0, 2, 4)
        pixels = patches.reshape(height * p, -1) * self.std + self.mean
        return (pixels.clamp(0, 1) * 255).round().byte().numpy()


def load_sources() -> tuple[bytes, bytes]: # for training, held out
    "The standard library's own modules, every tenth file held out."
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    contents = [file.read_bytes() for file in files]
    training = [content for i, content in enumerate(contents) if i % 10]
    return b"".join(training), b"".join(contents[::10])


class Text:
    "Stretches of text as tokens: bytes, int64 (B, N)."
    loss_name = "cross-entropy of hidden bytes, in nats"

    def __init__(self, config: dict):
        self.config = config
        self.training, held_out = (
            torch.frombuffer(bytearray(source), dtype=torch.uint8).long()
            for source in load_sources()
        )
        self.inputs = self.outputs = 256
        draw = Generator().manual_seed(12345)
        count = config["validation_sequences"]
        self.names = ["held-out modules"] * count
        self.validation = self._examples(held_out, count, draw)

    def _examples(self, text: Tensor, count: int, draw: Generator) -> tuple[Tensor, Tensor]:
        n = prod(self.config["grid"])
        start = torch.randint(len(text) - n, (count, 1), generator=draw)
        return text[start + torch.arange(n)], hide(self.config, count, draw)

    def batch(self, draw: Generator) -> tuple[Tensor, Tensor]: # tokens, hidden
        return self._examples(self.training, self.config["batch"], draw)

    def predict(self, model: nn.Module, tokens: Tensor, hidden: Tensor) -> Tensor:
        return model(F.one_hot(tokens, 256).float(), hidden)

    def losses(self, predicted: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor: # (B,)
        error = F.cross_entropy(predicted.transpose(1, 2), tokens, reduction="none")
        return mean_of_hidden(error, hidden)


DATA = dict(photos=Photos, short=Photos, long=Photos, text=Text)


def rate_at(step: int, config: dict) -> float:
    "Learning rate: a linear rise, then half a cosine down to zero."
    rate, warmup = config["rate"], config["warmup"]
    if step < warmup: return rate * ((step + 1) / (warmup + 1))
    done = (step - warmup) / max(1, config["steps"] - warmup)
    return rate * (0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def validate(model: nn.Module, data) -> Tensor: # loss of each validation crop
    parts = zip(*(x.split(data.config["batch"]) for x in data.validation))
    return torch.cat([data.losses(data.predict(model, *part), *part) for part in parts])


def new_model(data, variant: Variant, seed: int) -> tuple[nn.Module, Optimizer]:
    config = data.config
    torch.manual_seed(seed)
    model = MaskedTransformer(config, variant, data.inputs, data.outputs)
    settings = dict(lr=config["rate"], betas=(0.9, 0.95), weight_decay=config["weight_decay"])
    return model, AdamW(model.parameters(), **settings)


def train_step(
    model: nn.Module, optimizer: Optimizer, data, tokens: Tensor, hidden: Tensor
) -> float: # the loss before it
    optimizer.zero_grad(set_to_none=True)
    loss = data.losses(data.predict(model, tokens, hidden), tokens, hidden).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _mean(values) -> float:
    return round(float(np.mean(values)), 5)


def train(
    data,
    variant: Variant,
    seed: int,
    tell=None, # called after each step
) -> tuple[dict, nn.Module]: # JSON-ready: losses, and the model
    "One training. The seed fixes weights, data and masks, whatever the variant."
    config, draw = data.config, Generator().manual_seed(1000 + seed)
    model, optimizer = new_model(data, variant, seed)
    losses, validation, every = [], [], config["evaluate_every"]
    for step in range(config["steps"]):
        if step % every == 0:
            validation.append([step, round(validate(model, data).mean().item(), 5)])
        for group in optimizer.param_groups: group["lr"] = rate_at(step, config)
        losses.append(train_step(model, optimizer, data, *data.batch(draw)))
        if tell: tell()
    last = validate(model, data)
    final = round(last.mean().item(), 5)
    return dict(
        variant=variant.name,
        seed=seed,
        training=[[i + every, _mean(losses[i:i + every])] for i in range(0, len(losses), every)],
        validation=[*validation, [config["steps"], final]],
        final=final,
        final_by_name=_by_name(data.names, last.tolist()),
        parameters=sum(p.numel() for p in model.parameters()),
    ), model


def _by_name(names: list[str], losses: list[float]) -> dict[str, float]:
    found = {name: [] for name in names}
    for name, loss in zip(names, losses): found[name].append(loss)
    return {name: _mean(values) for name, values in found.items()}


def _as_text(picture: np.ndarray) -> str: # base64 of a WebP
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "webp", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


@torch.no_grad()
def reconstruct(
    model: nn.Module | None, # None: the photos themselves
    data: Photos,
) -> str: # one picture, base64 of a WebP
    "What the model makes of the first validation crop of each held-out photo."
    first = [data.names.index(name) for name in HELD_OUT_PHOTOS]
    tokens, hidden = (x[first] for x in data.validation)
    if model is not None:
        tokens = torch.where(hidden[..., None], model(tokens, hidden), tokens)
    return _as_text(data.picture(tokens))


def _mean_nearby(
    tokens: Tensor, # (B, N, P)
    shown: Tensor, # (B, N, 1), 0 or 1
    grid: tuple[int, int],
) -> Tensor: # (B, N, 1)
    "Of the visible patches in the smallest square around each hidden patch that has any."
    values = (tokens * shown).mean(-1), shown[..., 0]
    planes = [x.view(-1, 1, *grid) for x in values]
    near = torch.zeros_like(shown)
    left = shown[..., 0] == 0
    for reach in range(1, max(grid)):
        square = torch.ones(1, 1, 2 * reach + 1, 2 * reach + 1)
        total, count = (F.conv2d(x, square, padding=reach).flatten(1) for x in planes)
        now = left & (count > 0)
        near[now] = (total / count.clamp(min=1))[now][:, None]
        left &= ~now
    return near


def simple_guesses(data: Photos) -> dict[str, float]: # name -> validation loss
    "What one gets without learning: means of what is visible, in the crop and nearby."
    tokens, hidden = data.validation
    shown = (~hidden).float()[..., None]
    mean = (tokens * shown).sum(1, keepdim=True) / shown.sum(1, keepdim=True)
    guesses = {
        "mean of the visible patches": mean.mean(-1, keepdim=True),
        "mean of the nearest visible patches": _mean_nearby(tokens, shown, data.config["grid"]),
    }
    return {
        name: data.losses(guess.expand_as(tokens), tokens, hidden).mean().item()
        for name, guess in guesses.items()
    }


def attended_pairs(config: dict, variant: Variant) -> int: # per head, layer and crop
    "Query-key pairs: the same for all orders."
    n = prod(config["grid"])
    return SegmentPattern(n, n if variant.curve is None else config["segment_size"]).pairs()


def _timed_step(data, variant: Variant):
    "A training step that changes no weight."
    batch = data.batch(Generator().manual_seed(0))
    model, optimizer = new_model(data, variant, 0)
    for group in optimizer.param_groups: group["lr"] = 0.0
    return lambda: train_step(model, optimizer, data, *batch)


def step_times(config: dict) -> list[dict]: # one row per task and variant
    "Median time of a training step, variants in turn, in this process."
    rows = []
    for task, variants in VARIANTS.items():
        if task == "long": continue  # its steps are those of "photos"
        data = DATA[task](config[task])
        calls = {variant.name: _timed_step(data, variant) for variant in variants}
        for name, t in measure(calls, config["timing_repeats"]).items():
            times = dict(median=t.median, p20=t.p20, p80=t.p80, repeats=t.repeats)
            rows.append(dict(task=task, variant=name) | times)
    return rows


def _store(run: dict, folder: str | Path | None) -> Path:
    "Replaces the run that began at the same time, or adds one; the file changes in one step."
    here = run["environment"]
    path = Path(folder or results_folder()) / machine_slug(here) / "orders.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(path.read_text()) if path.exists() else []
    others = [r for r in stored if r["environment"]["date"] != here["date"]]
    text = json.dumps([*others, run], indent=None, separators=(",", ":"))
    for first in ('{"variant"', '{"task"'): text = text.replace(first, f"\n{first}")
    scratch = path.with_suffix(".part")
    scratch.write_text(text + "\n")
    scratch.replace(path)
    return path


def _unfinished(config: dict, folder: str | Path | None) -> dict | None:
    "The last stored run of this machine with these settings; it may have fewer seeds."
    here, settings = machine_slug(environment()), config | dict(seeds=None)
    for run in reversed(load_runs("orders", folder)):
        same = run["config"] | dict(seeds=None) == settings
        if same and machine_slug(run["environment"]) == here: return run
    return None


def _new_run(config: dict, quick: bool) -> dict:
    run = dict(suite="orders", quick=quick, config=config, environment=environment())
    trainings = {task: [] for task in VARIANTS}
    return run | trainings | dict(pairs={}, guesses={}, pictures={}, timing=[])


def _describe(run: dict, config: dict, data: dict):
    "Adds to a run what needs no training."
    seeds = {*config["seeds"], *run["config"]["seeds"]}
    run["config"] = config | dict(seeds=sorted(seeds))
    run["pairs"] = {
        task: {v.name: attended_pairs(config[task], v) for v in variants}
        for task, variants in VARIANTS.items()
    }
    run["loss"] = {task: d.loss_name for task, d in data.items()}
    run["guesses"] = simple_guesses(data["photos"])
    run["pictures"].setdefault("truth", reconstruct(None, data["photos"]))


def _jobs(run: dict, seeds: list[int]) -> list[tuple[str, Variant, int]]:
    "What is not trained yet: seed after seed, so that an interrupted run has whole seeds."
    done = {(task, r["variant"], r["seed"]) for task in VARIANTS for r in run[task]}
    jobs = [(task, v, seed) for task in VARIANTS for seed in seeds for v in VARIANTS[task]]
    return [(task, v, seed) for task, v, seed in jobs if (task, v.name, seed) not in done]


def run_suite(
    config: dict,
    quick: bool = False,
    folder: str | Path | None = None, # None: nbs/results
    store: bool = True, # after each training
    progress: bool | None = None, # show a progress bar; None: on a terminal
    log=None, # told a line after each training
) -> dict: # JSON-ready
    "Trains what is not trained yet."
    run = (_unfinished(config, folder) if store else None) or _new_run(config, quick)
    data = {task: make(config[task]) for task, make in DATA.items()}
    _describe(run, config, data)
    jobs = _jobs(run, config["seeds"])
    steps = sum(config[task]["steps"] for task, *_ in jobs)
    with telling(steps, progress) as tell:
        for task, variant, seed in jobs:
            tell(f"{task}: {variant.name}, seed {seed}", 0)
            result, model = train(data[task], variant, seed, partial(tell, None))
            run[task].append(result)
            first = task == "photos" and seed == config["seeds"][0]
            if first and variant.name in PICTURED:
                run["pictures"][variant.name] = reconstruct(model, data["photos"])
            if store: _store(run, folder)
            if log: log(f"{task:7} seed {seed} {variant.name:22} {result['final']:.4f}")
    return run


def add_times(config: dict, folder: str | Path | None = None) -> Path:
    "Measures the time per step and adds it to the stored run of this configuration."
    run = _unfinished(config, folder)
    if run is None:
        raise RuntimeError("no stored run of this configuration on this machine: train first")
    run["timing"], run["timing_environment"] = step_times(config), environment()
    return _store(run, folder)


def finals(run: dict, task: str) -> dict[str, dict[int, float]]: # variant -> seed -> loss
    "The final validation losses, which everything is judged by."
    found = {variant.name: {} for variant in VARIANTS[task]}
    for r in run[task]: found[r["variant"]][r["seed"]] = r["final"]
    return found


FAMILIES = {"stripes": ("row_major", "snake"), "blocks": ("tile", "morton", "hilbert")}


def _losses(run: dict, task: str, name: str) -> dict[int, float]: # seed -> final loss
    "Of a variant, or the mean over a family of orders."
    found, (family, *shift) = finals(run, task), name.split(", ")
    curves = FAMILIES.get(family, [family])
    members = [found[", ".join([curve, *shift])] for curve in curves]
    seeds = set.intersection(*map(set, members))
    return {seed: float(np.mean([x[seed] for x in members])) for seed in seeds}


def missing(run: dict) -> list[str]: # one line each
    "Trainings of the configuration that a run does not have yet."
    return [
        f"{task}: {name}, seed {seed}"
        for task in VARIANTS
        for name, found in finals(run, task).items()
        for seed in run["config"]["seeds"] if seed not in found
    ]


@dataclass(frozen=True)
class Comparison:
    """Final validation losses of `a` and `b`, seed by seed.

    With a paired 95 % interval (Student's t), for this one comparison."""
    a: str
    b: str
    change: float # mean of a - b as a share of the mean of b
    low: float # ends of its interval
    high: float
    seeds_lower: int # seeds in which a is lower
    seeds: int

    @property
    def verdict(self) -> str:
        if self.high < 0: return "lower"
        return "higher" if self.low > 0 else "undecided"

    def __str__(self) -> str:
        interval = f"95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f} %"
        seeds = f"lower in {self.seeds_lower} of {self.seeds} seeds"
        figures = f"{100 * self.change:+.1f} % ({interval}; {seeds})"
        if self.verdict == "undecided":
            return f"`{self.a}` and `{self.b}` cannot be told apart: {figures}"
        return f"`{self.a}` ends {self.verdict} than `{self.b}`: {figures}"


# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def compare(run: dict, task: str, a: str, b: str) -> Comparison:
    "Pairs the seeds: weights, data and masks are the same on both sides."
    first, second = _losses(run, task, a), _losses(run, task, b)
    seeds = sorted(set(first) & set(second))
    if len(seeds) < 2:
        raise ValueError(f"{a} and {b} share {len(seeds)} seeds: an interval needs at least 2")
    difference = np.array([first[seed] - second[seed] for seed in seeds])
    base = float(np.mean([second[seed] for seed in seeds]))
    error = difference.std(ddof=1) / math.sqrt(len(seeds))
    mean, half = difference.mean() / base, _T95[len(seeds) - 2] * error / base
    change, low, high = float(mean), float(mean - half), float(mean + half)
    return Comparison(a, b, change, low, high, int((difference < 0).sum()), len(seeds))


SHIFTS = ("", ", shifted")


def _against(run: dict, task: str, name: str, *others: str) -> list[Comparison]:
    "Both without shifts, then both with them."
    pairs = [(f"{name}{shift}", f"{other}{shift}") for shift in SHIFTS for other in others]
    return [compare(run, task, a, b) for a, b in pairs]


def _shifted(run: dict, task: str, *curves: str) -> list[Comparison]:
    return [compare(run, task, f"{curve}, shifted", curve) for curve in curves]


def _against_dense(run: dict, task: str) -> list[Comparison]:
    return [compare(run, task, f"hilbert{shift}", "dense") for shift in SHIFTS]


def comparisons(run: dict) -> dict[str, list[Comparison]]: # question -> what speaks to it
    "What the experiment was made to compare."
    rivals = "snake", "tile", "morton"
    short = "row_major", "morton"
    return {
        "Photos: Hilbert against row-major": _against(run, "photos", "hilbert", "row_major"),
        "Photos: Hilbert against the other orders": _against(run, "photos", "hilbert", *rivals),
        "Photos: with shifts against without": _shifted(run, "photos", *CURVES),
        "Photos: Hilbert against dense attention": _against_dense(run, "photos"),
        "Photos: blocks against stripes": _against(run, "photos", "blocks", "stripes"),
        "Short segments: Hilbert against the other orders":
            _against(run, "short", "hilbert", *short),
        "Short segments: with shifts against without": _shifted(run, "short", *short, "hilbert"),
        "Longer training: Hilbert against row-major": _against(run, "long", "hilbert", "row_major"),
        "Longer training: Hilbert against dense attention": _against_dense(run, "long"),
        "Text: Hilbert against row-major": [compare(run, "text", "hilbert", "row_major")],
    }


def _said(found: list[Comparison]) -> str:
    return "; ".join(map(str, found)) + "."


def _names(found: list[Comparison], verdict: str, nobody: str = "none") -> str:
    "What was compared with, where that was the verdict."
    return ", ".join(f"`{c.b}`" for c in found if c.verdict == verdict) or nobody


_ANSWERS = {
    ("lower", "lower"): "Yes, with shifts and without",
    ("higher", "higher"):
        "It does, the wrong way round: Hilbert is worse, with shifts and without",
    ("undecided", "undecided"): "Not shown by these seeds",
}


def _answer(found: list[Comparison]) -> str: # without shifts, with them
    verdicts = tuple(c.verdict for c in found)
    if verdicts in _ANSWERS: return _ANSWERS[verdicts]
    without, shifted = ("not told apart" if v == "undecided" else v for v in verdicts)
    return f"It depends: without shifts Hilbert is {without}, with shifts {shifted}"


def _on_rivals(found: list[Comparison]) -> str:
    near = [c for c in found if c.b.startswith(("tile", "morton"))]
    return (
        "**Does it have to be Hilbert?** Among the two other orders that make 2-D blocks, in four "
        f"comparisons, Hilbert is lower than {_names(near, 'lower')}; "
        f"higher than {_names(near, 'higher')}; not told apart from {_names(near, 'undecided')}."
    )


def _on_shifts(found: list[Comparison]) -> str:
    return (
        "**Do alternating shifts help?** They lower the loss of "
        f"{_names(found, 'lower', 'no order')}; raise that of {_names(found, 'higher')}; "
        f"no effect is shown for {_names(found, 'undecided')}."
    )


def _on_dense(run: dict, found: list[Comparison]) -> str:
    pairs = run["pairs"]["photos"]
    times = f"{pairs['dense'] / pairs['hilbert']:.1f} times the pairs"
    return f"**What does dense attention gain with {times}?** {_said(found)}"


def _on_time(run: dict) -> list[str]: # nothing where it was not measured
    times = {r["variant"]: r["median"] for r in run["timing"] if r["task"] == "photos"}
    if not times: return []
    orders = [time for name, time in times.items() if name != "dense"]
    spread = 100 * (max(orders) / min(times.values()) - 1)
    return [
        f"**And time?** A step takes {times['dense'] / times['hilbert']:.1f} times as long with "
        f"dense attention as with Hilbert segments; orders differ by {spread:.0f} % at most."
    ]


def _on_means(run: dict) -> str:
    losses = finals(run, "photos")
    means = {name: float(np.mean(list(found.values()))) for name, found in losses.items()}
    dense, guess = means.pop("dense"), run["guesses"]["mean of the nearest visible patches"]
    best, *others = sorted(means, key=means.get)
    found = [compare(run, "photos", best, other) for other in others]
    return (
        f"**Which order has the lowest mean?** `{best}` ({means[best]:.4f}; picked after the "
        f"fact), lower than {_names(found, 'lower')}; "
        f"not told apart from {_names(found, 'undecided')}. "
        f"The highest is `{others[-1]}` ({means[others[-1]]:.4f}). Dense attention has "
        f"{dense:.4f}, the mean of the nearest visible patches {guess:.4f}."
    )


def conclusions(run: dict) -> list[str]: # sentences
    "The result in words, made from the figures."
    found = comparisons(run).values()
    rows, rivals, shifts, dense, families, short, short_shifts, long, long_dense, text = found
    config = run["config"]
    return [
        f"**Does Hilbert end below row-major on photos?** {_answer(rows)}. {_said(rows)}",
        "**Do orders that make 2-D blocks (tile, Morton, Hilbert) end below those that make "
        f"stripes (row-major, snake), taken together?** {_said(families)}",
        _on_rivals(rivals),
        _on_shifts(shifts),
        _on_dense(run, dense),
        *_on_time(run),
        _on_means(run),
        f"**And with segments of {config['short']['segment_size']}?** {_said(short)} "
        f"Shifts: {_said(short_shifts)}",
        f"**Does it last, over {config['long']['steps']:,} steps?** {_said(long + long_dense)}",
        f"**And on text, where folding has no reason to help?** {_said(text)}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy models, in seconds")
    parser.add_argument("--time", action="store_true", help="only add the time per step")
    parser.add_argument("--out", help="folder of results instead of nbs/results")
    args = parser.parse_args()
    config = QUICK if args.quick else CONFIG
    if not args.time:
        store = bool(args.out) or not args.quick
        run_suite(config, args.quick, args.out, store=store, log=partial(print, flush=True))
        return
    run = json.loads(add_times(config, args.out).read_text())[-1]
    for row in run["timing"]:
        ms = 1e3 * row["median"]
        print(f"{row['task']:7} {row['variant']:22} {ms:8.1f} ms per step")


if __name__ == "__main__":
    main()
