"Trains what is not stored yet."
import random
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from hilbert_attn.bench.machine import environment
from hilbert_attn.bench.measuring import telling

from .arms import AT_RATE_OF_HILBERT
from .attending import attention_distances
from .plan import SAME_SECONDS, Cell, Plan, arm_of, task_of
from .store import as_run, chosen_rates, load, load_stage, path_of, rounded, save, times_file
from .timing import steps_in_time_of
from .training import Schedule, train

ROOT = Path(__file__).resolve().parents[2]


def needs_clean_code() -> None:
    "A stored commit must be the code that ran."
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "hilbert_attn", "tools/study"]
    changed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if changed: raise RuntimeError(f"commit the code of the study before it runs:\n{changed}")


def wanted(cells: list[Cell], only: str | None) -> list[Cell]:
    "`only` is a task, or task/arm."
    if only is None: return cells
    found = [c for c in cells if only in (c.task, f"{c.task}/{c.arm}")]
    if not found:
        known = sorted({f"{c.task}/{c.arm}" for c in cells})
        raise ValueError(f"only={only!r}: must be a task or one of {', '.join(known)}")
    return found


def missing(cells: list[Cell], folder: Path) -> list[Cell]:
    return [cell for cell in cells if not path_of(cell, folder).exists()]


def rate_of(cell: Cell, plan: Plan, folder: Path) -> float:
    """The cell's own, or the one that tuning chose, once all rates of its arm were tried.

    What is not tuned takes that of Hilbert."""
    if cell.rate is not None: return cell.rate
    arm = arm_of(cell).name
    if arm in AT_RATE_OF_HILBERT: arm = "hilbert"
    runs = [run for run in load_stage("tune", folder)
            if (run["task"], run["arm"]) == (cell.task, arm)]
    if {run["rate"] for run in runs} != set(plan.rates[cell.task]):
        raise RuntimeError(f"{cell.name}: its learning rates are not tuned yet")
    return chosen_rates(runs)[cell.task, arm]


def in_same_seconds(
    schedule: Schedule,
    cell: Cell,
    folder: Path, # of the study
) -> Schedule:
    "As many steps as fit into the time of Hilbert's, by the stored times of a step."
    if not times_file(folder).exists():
        raise RuntimeError(f"{cell.name}: needs times of a step: tools/run_study.py --times")
    times = load(times_file(folder))[cell.task]
    steps = steps_in_time_of(times, cell.arm, "hilbert", schedule.steps)
    return replace(schedule, steps=steps)


def run_cell(
    cell: Cell,
    schedule: Schedule,
    tell: Callable = lambda steps: None, # told of each step
) -> dict: # JSON-ready
    "Trains one cell; exploratory ones are also asked how far they look."
    task, arm = task_of(cell), arm_of(cell)
    outcome, network = train(task, arm, schedule, cell.seed, tell)
    if cell.stage == "explore" and not task.cloud:
        distances = attention_distances(network, task, arm, schedule.size.heads)
        outcome = replace(outcome, distances=distances)
    guesses = {name: x.mean().item() for name, x in task.guesses(task.tests()).items()}
    return as_run(cell, schedule, outcome, guesses, environment())


def run_study(
    plan: Plan,
    folder: Path,
    only: str | None = None, # a task, or task/arm
    show: bool | None = None, # a progress bar; None: on a terminal
    log: Callable = lambda line: None, # told a line after each training
    explore: bool = False, # exploratory trainings too, after all others
) -> int: # trainings made
    "Trains what is not stored yet: tuning first, then seed after seed."
    torch.set_num_threads(1)
    cells = plan.tuning() + plan.primary() + (plan.exploratory() if explore else [])
    left = missing(wanted(cells, only), folder)
    steps = sum(plan.schedule(cell, 0.0).steps for cell in left)
    with telling(steps, show) as tell:
        for done, cell in enumerate(left, 1):
            tell(cell.name, 0)
            schedule = plan.schedule(cell, rate_of(cell, plan, folder))
            if cell.variant == SAME_SECONDS: schedule = in_same_seconds(schedule, cell, folder)
            run = run_cell(cell, schedule, partial(tell, None))
            save(run, path_of(cell, folder))
            log(f"{done} of {len(left)}: {cell.name}: {run['loss']:.4f}, {run['seconds']:.0f} s")
    return len(left)


def reproduce(plan: Plan, folder: Path, count: int, draw: int, log: Callable) -> list[str]:
    "Trains some stored cells again; returns what differs."
    torch.set_num_threads(1)
    cells = plan.tuning() + plan.primary()
    left = set(missing(cells, folder))
    stored = [cell for cell in cells if cell not in left]
    differ = []
    for cell in random.Random(draw).sample(stored, min(count, len(stored))):
        was = load(path_of(cell, folder))
        now = run_cell(cell, plan.schedule(cell, was["rate"]))
        same = rounded(now["curve"]) == was["curve"] and now["groups"] == was["groups"]
        log(f"{cell.name}: {'equal' if same else 'differs'} ({was['loss']}, {now['loss']})")
        if not same: differ.append(cell.name)
    return differ
