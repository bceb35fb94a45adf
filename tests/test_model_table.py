"""The table of models: its rows are what a trial gives, and no class is missing."""

import json
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from model_cases import TIMM_NAMES, cases
from model_trial import COLUMNS, EXACT, tried
from sampling import FULL, sampled

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
TABLE = Path(__file__).resolve().parent.parent / "nbs" / "results" / "models.json"
ROWS = {row["model"]: row for row in json.loads(TABLE.read_text())["rows"]}
CASES = {case.name: case for case in cases("transformers", "diffusers")}
SAMPLE = [ # one of each kind of model, of switch, and of refusal
    "LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "Gemma2ForCausalLM", "BertModel",
    "SplinterModel", "T5Model", "ViTModel", "Dinov2Model", "DINOv3ViTModel",
    "DiTTransformer2DModel", "UNet2DConditionModel", "AutoencoderKL", "WanTransformer3DModel",
    "FluxTransformer2DModel"]


@pytest.mark.parametrize("name", sampled(CASES, SAMPLE))
def test_a_row_is_what_a_trial_gives(name):
    columns = COLUMNS if FULL else COLUMNS[:-1]  # a graph takes seconds
    row = tried(CASES[name], columns)
    assert row == {column: ROWS[name][column] for column in row}


@pytest.mark.parametrize("name", sampled(TIMM_NAMES, []))
def test_a_row_of_timm(name):
    try: import_module("timm")
    except (ImportError, RuntimeError) as e: pytest.skip(f"timm cannot be used here: {e}")
    row = tried(next(case for case in cases("timm") if case.name == name))
    assert row == {column: ROWS[name][column] for column in row}


def test_every_class_has_a_row():
    assert ROWS.keys() == {*CASES, *TIMM_NAMES}
    count = Counter(row["package"] for row in ROWS.values())
    assert count["transformers"] >= 60 and count["diffusers"] >= 20 and count["timm"] >= 15


def test_exact_rows_called_each_layer():
    exact = [row for row in ROWS.values() if row["forward"] == EXACT]
    assert len(exact) > 80
    for row in exact: assert row["calls"] >= row["layers"] > 0, row["model"]
    assert not [row["model"] for row in ROWS.values() if "differs" in str(row.values())]
