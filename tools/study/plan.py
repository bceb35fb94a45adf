"What is run: the cells of the study, in the order in which they are trained."
from dataclasses import dataclass, replace
from typing import NamedTuple

from .arms import ARMS, GRID_ARMS, SCHEMES, Arm
from .digits import Digits
from .network import Size
from .pathfinder import Pathfinder
from .photos import Photos
from .tasks import Task
from .training import Schedule

TASKS: dict[str, type[Task]] = dict(photos=Photos, pathfinder=Pathfinder, digits=Digits)
SEEDS = tuple(range(10))
TUNING_SEED = 900
RATES = dict(
    photos=(1e-3, 2e-3, 4e-3, 8e-3),
    pathfinder=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    digits=(2e-3, 4e-3, 8e-3, 1.6e-2),
)
SCHEDULES = dict(
    photos=Schedule(steps=1200, batch=8, rate=0.0),
    pathfinder=Schedule(steps=1200, batch=8, rate=0.0),
    digits=Schedule(steps=1000, batch=8, rate=0.0),
)
EXPLORED = dict(
    tasks=("photos", "pathfinder"), arms=("row_major", "morton", "hilbert"), seeds=(0, 1, 2)
) # exploratory: diversity of orders over layers, then patterns of the grid
TUNING_SHARE = 4 # trainings that choose a learning rate are this much shorter


class Cell(NamedTuple):
    "One training."
    stage: str # "tune", "primary" or "explore"
    task: str
    arm: str # of "explore" with a scheme, such as "hilbert four"
    seed: int
    rate: float | None = None # None: the one that tuning chose

    @property
    def name(self) -> str: # of its file, without the ending
        last = f"rate {self.rate}" if self.stage == "tune" else f"seed {self.seed}"
        return f"{self.stage}/{self.task}/{self.arm} {last}".replace(" ", "-")


@dataclass(frozen=True)
class Plan:
    "Which cells, and how long each is trained."
    schedules: dict[str, Schedule]
    rates: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...] = SEEDS
    arms: tuple[str, ...] = ARMS

    def tuning(self) -> list[Cell]:
        return [
            Cell("tune", task, arm, TUNING_SEED, rate)
            for task in self.schedules for arm in self.arms for rate in self.rates[task]
        ]

    def primary(self) -> list[Cell]:
        "Seeds outermost: wherever the study stops, its data are balanced."
        return [
            Cell("primary", task, arm, seed)
            for seed in self.seeds for task in self.schedules for arm in self.arms
        ]

    def exploratory(self) -> list[Cell]:
        "Other ways to alternate, and patterns of the grid. No verdict rests on them."
        schemes = [scheme for scheme in SCHEMES if scheme != "alternating"]
        ordered = [f"{arm} {scheme}" for arm in EXPLORED["arms"] for scheme in schemes]
        return [
            Cell("explore", task, arm, seed)
            for arms in (ordered, GRID_ARMS) for seed in EXPLORED["seeds"]
            for task in EXPLORED["tasks"] for arm in arms
        ]

    def schedule(self, cell: Cell, rate: float) -> Schedule:
        found = replace(self.schedules[cell.task], rate=rate)
        if cell.stage != "tune": return found
        steps = max(1, found.steps // TUNING_SHARE)
        return replace(found, steps=steps, points=1)


def task_of(cell: Cell) -> Task:
    "Tuning looks at examples that no result is judged by."
    return TASKS[cell.task](cell.seed, "tune" if cell.stage == "tune" else "test")


def arm_of(cell: Cell) -> Arm:
    name, _, scheme = cell.arm.partition(" ")
    return Arm(name, scheme or "alternating")


FULL = Plan(SCHEDULES, RATES)
_toy = Size(width=16, heads=2, layers=2)
_short = Schedule(steps=6, batch=2, rate=0.0, warmup=2, points=1, size=_toy)
_few = dict.fromkeys(TASKS, (1e-3, 3e-3))
QUICK = Plan(dict.fromkeys(TASKS, _short), _few, (0,), ("dense", "hilbert"))
