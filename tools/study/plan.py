"What is run: the cells of the study, in the order in which they are trained."
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from .arms import ARMS, DILATED_ARMS, GRID_ARMS, POSITIONS, SCHEMES, Arm
from .cluttered import Cluttered
from .digits import Digits
from .faces import Faces
from .listops import ListOps
from .network import Size
from .pathfinder import Pathfinder
from .photos import Photos
from .scene import Scene
from .tasks import Task
from .text import Text
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
# exploratory tasks, with the schedule of photos: pictures, clouds of points, sequences
PICTURES: dict[str, Callable[[int], Task]] = dict(cluttered=Cluttered, faces=Faces)
CLOUDS: dict[str, Callable[[int], Task]] = dict(scene=Scene)
SEQUENCES: dict[str, Callable[[int], Task]] = dict(text=Text, listops=ListOps)
OTHER_RATE = 4e-3 # of all arms, not tuned
SEQUENCE_ARMS = ("random", "row_major", "row_major shifted", "hilbert")
PICTURE_ARMS = (
    "dense",
    "random",
    "row_major",
    "row_major shifted",
    "hilbert",
    "hilbert shifted",
    "windows",
)
CLOUD_ARMS = (*PICTURE_ARMS[:-1], "morton", "morton shifted")
SCALES: dict[str, dict] = { # exploratory: what is larger than in the primary trainings
    "width 128": dict(size=dict(width=128, heads=4)),
    "layers 8": dict(size=dict(layers=8)),
    "segment 64": dict(task=dict(segment_size=64, tile=8)),
    "tokens 1296": dict( # patches of half the side
        photos=dict(grid=(36, 36), side=2, inputs=5, outputs=4),
        pathfinder=dict(grid=(36, 36), side=1, inputs=2)),
}
SAME_SECONDS = "seconds of hilbert" # a variant: as many steps as fit into its time
TUNING_SHARE = 4 # trainings that choose a learning rate are this much shorter


class Cell(NamedTuple):
    "One training."
    stage: str # "tune", "primary" or "explore"
    task: str
    arm: str # of "explore" with a scheme or positions, such as "hilbert four", see `Arm.read`
    seed: int
    rate: float | None = None # None: the one that tuning chose
    variant: str = "" # one of `SCALES`, or `SAME_SECONDS`

    @property
    def name(self) -> str: # of its file, without the ending
        last = f"rate {self.rate}" if self.stage == "tune" else f"seed {self.seed}"
        what = f"{self.arm} {self.variant}".rstrip()
        return f"{self.stage}/{self.task}/{what} {last}".replace(" ", "-")


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
        "No verdict rests on them. Seeds outermost, then in the order of the protocol."
        return [cell for seed in EXPLORED["seeds"] for cell in explored(seed)]

    def schedule(self, cell: Cell, rate: float) -> Schedule:
        same = cell.task if cell.task in TASKS else "photos"
        found = replace(self.schedules[same], rate=rate)
        if cell.variant in SCALES:
            size = replace(found.size, **SCALES[cell.variant].get("size", {}))
            return replace(found, size=size)
        if cell.stage != "tune": return found
        steps = max(1, found.steps // TUNING_SHARE)
        return replace(found, steps=steps, points=1)


def explored(seed: int) -> list[Cell]:
    "Exploratory cells of a seed."
    schemes = [scheme for scheme in SCHEMES if scheme != "alternating"]
    groups = dict(
        diversity=[f"{arm} {scheme}" for arm in EXPLORED["arms"] for scheme in schemes],
        grid=GRID_ARMS,
        dilated=DILATED_ARMS,
        again=ARMS, # the primary cells once more, to see how far trained networks look
        positions=[f"{arm} positions {name}" for arm in ("row_major", "hilbert")
                   for name in POSITIONS if name != "grid"],
    )
    make = partial(Cell, "explore", seed=seed)
    cells = [
        make(task, arm)
        for arms in groups.values() for task in EXPLORED["tasks"] for arm in arms
    ]
    other = partial(make, rate=OTHER_RATE)
    cells += [other("text", arm) for arm in SEQUENCE_ARMS]
    cells += [
        make(task, arm, variant=scale)
        for task in EXPLORED["tasks"] for scale in SCALES for arm in ("row_major", "hilbert")
    ]
    cells += [make(task, "dense", variant=SAME_SECONDS) for task in TASKS]
    cells += [other(task, arm) for task in PICTURES for arm in PICTURE_ARMS]
    cells += [other(task, arm) for task in CLOUDS for arm in CLOUD_ARMS]
    cells += [other("listops", arm) for arm in SEQUENCE_ARMS]
    return cells + [make(task, "moore") for task in EXPLORED["tasks"]]


def task_of(cell: Cell) -> Task:
    "Tuning looks at examples that no result is judged by."
    if cell.task in TASKS:
        task = TASKS[cell.task](cell.seed, "tune" if cell.stage == "tune" else "test")
    else:
        task = (PICTURES | CLOUDS | SEQUENCES)[cell.task](cell.seed)
    scale = SCALES.get(cell.variant, {})
    vars(task).update(scale.get("task", {}) | scale.get(cell.task, {}))
    return task


def arm_of(cell: Cell) -> Arm:
    return Arm.read(cell.arm)


FULL = Plan(SCHEDULES, RATES)
_toy = Size(width=16, heads=2, layers=2)
_short = Schedule(steps=6, batch=2, rate=0.0, warmup=2, points=1, size=_toy)
_few = dict.fromkeys(TASKS, (1e-3, 3e-3))
QUICK = Plan(dict.fromkeys(TASKS, _short), _few, (0,), ("dense", "hilbert"))
