"Runs on disk: one small JSON a training."
import json
from collections.abc import Iterable
from dataclasses import asdict
from math import isnan
from pathlib import Path

from hilbert_attn.bench import results
from hilbert_attn.bench.machine import environment

from .plan import Cell
from .training import Outcome, Schedule

ENVIRONMENT = ("cpu", "instructions", "threads", "python", "torch", "numpy", "commit", "date")


def study_folder() -> Path:
    return results.results_folder() / "study"


def path_of(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.name}.json"


def rounded(value):
    "Floats with seven digits: what float32 knows."
    if isinstance(value, float): return float(f"{value:.7g}")
    if isinstance(value, dict): return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)): return [rounded(x) for x in value]
    return value


def _kept(env: dict) -> dict: # from `environment`
    return {name: env[name] for name in ENVIRONMENT if name in env}


def as_run(
    cell: Cell,
    schedule: Schedule,
    outcome: Outcome,
    guesses: dict[str, float], # name -> loss over the same test examples
    env: dict, # from `hilbert_attn.bench.machine.environment`
) -> dict: # JSON-ready
    "What is stored of a training."
    found = cell._asdict() | dict(rate=schedule.rate, schedule=asdict(schedule)) | asdict(outcome)
    for name in ("variant", "distances"):
        if not found[name]: del found[name]  # primary trainings have none
    return rounded(found | dict(guesses=guesses, environment=_kept(env)))


def save(run: dict, path: Path) -> None:
    "In one step, so that an interrupted study has whole files only."
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in run.items())
    scratch.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    scratch.replace(path)


def times_file(folder: Path) -> Path: # from `timing.measure`
    return folder / "checks" / "times.json"


def save_times(times: dict, folder: Path) -> None:
    save(rounded(times | dict(environment=_kept(environment()))), times_file(folder))


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def load_stage(
    stage: str, # "tune", "primary" or "explore"
    folder: Path | None = None, # None: nbs/results/study
) -> list[dict]:
    "All stored runs of a stage."
    paths = sorted(((folder or study_folder()) / stage).glob("*/*.json"))
    return [load(path) for path in paths]


def chosen_rates(runs: Iterable[dict]) -> dict[tuple[str, str], float]: # (task, arm) -> rate
    "The learning rate with the lowest loss in tuning, for each task and arm."
    best: dict[tuple[str, str], dict] = {}
    for run in runs:
        key = run["task"], run["arm"]
        if isnan(run["loss"]): continue
        if key not in best or run["loss"] < best[key]["loss"]: best[key] = run
    return {key: run["rate"] for key, run in best.items()}
