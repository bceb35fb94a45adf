"""One model class, switched and tried: what holds of it, in a row of nbs/results/models.json."""

import copy
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from hilbert_attn.curves import curve_order, inverse_order
from hilbert_attn.integrations import caches as of_caches
from hilbert_attn.integrations import dit as of_dit
from hilbert_attn.integrations import settings as of_settings
from hilbert_attn.reference import masked_attention

EXACT, NOT_APPLICABLE = "exact", "not applicable"
COLUMNS = ("switch", "forward", "backward", "second shape", "saved", "checkpointing", "compile")
ONE = dict(segment_size=1 << 20)
SEVERAL = dict(segment_size=5)


@dataclass(frozen=True)
class Case:
    "A model class, and how it is built, switched, called and saved."
    package: str
    name: str
    build: Callable[[], nn.Module] # a small model, made by chance
    switch: Callable[..., object] # (model, **settings)
    call: Callable[[nn.Module, bool], torch.Tensor] # (model, second shape?) -> its output
    reload: Callable[[nn.Module, str, dict], nn.Module] # (model, folder, settings) -> loaded
    checkpoint: Callable[[nn.Module], bool] # turns it on; False where there is none
    kind: str = "text"
    compiled: bool = False # in a few minutes a dozen can be
    reshapes: bool = True # does it take another shape?


class Differs(Exception):
    "The numbers are not those of the model's own attention."


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(case: Case) -> nn.Module:
    "With weights large enough to matter, and nothing that is left to chance in training."
    torch.manual_seed(0)
    model = case.build().eval()
    for i, p in enumerate(model.parameters()):
        if p.is_floating_point(): p.data.add_(0.1 * rand(*p.shape, seed=i))
    for module in model.modules():
        for name in ("p", "attention_dropout", "dropout", "dropout_prob", "drop_prob", "layerdrop"):
            if isinstance(vars(module).get(name), float): setattr(module, name, 0.0)
    return model


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5):
    "Raises `Differs` beyond a share of the largest value."
    if ours.shape != expected.shape: raise Differs(f"shape {ours.shape}, not {expected.shape}")
    error = (ours - expected).abs().max() / expected.abs().max()
    if not error <= tolerance: raise Differs(f"off by {error:.1e}")


def gradient(model: nn.Module, out: torch.Tensor) -> torch.Tensor:
    leaves = [p for p in model.parameters() if p.requires_grad]
    loss = (out * rand(*out.shape, seed=3)).sum()
    found = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def by_mask(call, settings):
    "`prefix_attention` of a checked call by the dense mask of its definition."
    call = call.hidden()
    counts = settings.counts(*call.sizes, causal=call.causal)[None].to(call.q.device)
    if call.key_mask is not None: counts = counts * call.key_mask[:, None, None]
    out, lse = masked_attention(call.q, call.k, call.v, counts, call.scale)
    return out.to(call.q.dtype), lse


def joint_by_mask(q, k, v, settings, grid, *, text_first, offset, key_mask, dropout_p, scale):
    "`joint_attention` in segments by the dense mask of its definition."
    segment = inverse_order(curve_order(grid, settings.curve)) // settings.segment_size
    n, cells = q.shape[2], len(segment)
    own = slice(n - cells, n) if text_first else slice(0, cells)
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[own, own] = segment[:, None] == segment
    if key_mask is not None: mask = mask & key_mask[:, None, None]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return masked_attention(q, k, v, mask.long(), scale)[0].to(q.dtype)


SEAMS = {
    "attend_settled": (of_caches, of_settings),
    "joint_attention": (of_dit,)}
BY_MASK = dict(attend_settled=by_mask, joint_attention=joint_by_mask)


@contextmanager
def attention_by(functions: dict[str, Callable], seen: list):
    "Calls into the package are seen, and answered by other functions where they are given."
    before = [(module, name, getattr(module, name)) for name in SEAMS for module in SEAMS[name]]

    def seeing(own):
        def call(*args, **options):
            seen.append(own)
            return own(*args, **options)
        return call

    for module, name, own in before: setattr(module, name, seeing(functions.get(name, own)))
    try: yield
    finally:
        for module, name, own in before: setattr(module, name, own)


def sites(model: nn.Module) -> int:
    "Layers that have to call the package."
    return sum("hilbert_site" in module.__dict__ for module in model.modules())


class Trial:
    "A model, its switched twins, and the tries that make the columns."

    def __init__(self, case: Case):
        self.case, self.own = case, built(case)
        self.one, self.several = copy.deepcopy(self.own), copy.deepcopy(self.own)
        self.calls = self.layers = 0

    def switch(self):
        for model, settings in ((self.one, ONE), (self.several, SEVERAL)):
            self.case.switch(model, **settings)
        self.layers = sites(self.one)

    def compared(self, second: bool):
        "One segment is the model's own attention, several are a mask."
        seen = []
        with torch.no_grad():
            expected = self.case.call(self.own, second)
            with attention_by({}, seen): close(self.case.call(self.one, second), expected)
            ours = self.case.call(self.several, second)
            with attention_by(BY_MASK, []): masked = self.case.call(self.several, second)
        close(ours, masked)
        if (ours - expected).abs().max() < 1e-4 * expected.abs().max():
            raise Differs("segments change nothing")
        if not seen or len(seen) % self.layers:
            raise Differs(f"{len(seen)} calls, {self.layers} layers")
        self.calls = len(seen)

    def forward(self): self.compared(False)

    def second_shape(self):
        return self.compared(True) if self.case.reshapes else NOT_APPLICABLE

    def backward(self):
        for model, attention, yardstick in ((self.one, {}, self.own),
                                            (self.several, BY_MASK, self.several)):
            ours = gradient(model, self.case.call(model, False))
            with attention_by(attention, []):
                expected = gradient(yardstick, self.case.call(yardstick, False))
            close(ours.norm(), expected.norm(), 1e-4)
            close((ours - expected).norm() + expected.norm(), expected.norm(), 1e-4)

    def saved(self):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            again = self.case.reload(self.several, folder, SEVERAL).eval()
            close(self.case.call(again, False), self.case.call(self.several, False))

    def checkpointing(self):
        model = copy.deepcopy(self.own)
        self.case.switch(model, **SEVERAL)
        found = []
        for checkpointed in (False, True):
            if checkpointed and not self.case.checkpoint(model): return NOT_APPLICABLE
            torch.manual_seed(0)
            np.random.seed(0)
            found.append(gradient(model, self.case.call(model.train(), False)))
        expected, ours = found
        close((ours - expected).norm() + expected.norm(), expected.norm(), 1e-4)

    def compile(self):
        if not self.case.compiled: return "not tried"
        torch._dynamo.reset()
        graph = torch.compile(self.several, backend="eager")
        with torch.no_grad():
            close(self.case.call(graph, False), self.case.call(self.several, False))


def outcome(step: Callable) -> str:
    "What a try came to, in a few words."
    try: return step() or EXACT
    except Exception as e:
        text = " ".join(str(e).split())
        return f"error: {text[:200]}" if not isinstance(e, Differs) else f"differs: {text}"


def tried(case: Case, columns=COLUMNS) -> dict[str, object]:
    "The row of a model class; what comes behind a refused switch is not applicable."
    row: dict[str, object] = dict(package=case.package, model=case.name, kind=case.kind)
    row |= dict.fromkeys(columns, NOT_APPLICABLE)
    trial = Trial(case)
    row["switch"] = outcome(trial.switch)
    if row["switch"] == EXACT:
        row["switch"] = "switched"
        for column in columns[1:]:
            row[column] = outcome(getattr(trial, column.replace(" ", "_")))
    return row | dict(layers=trial.layers, calls=trial.calls)
