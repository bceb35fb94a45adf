"Seconds of a step, arms in turn: to be measured on a machine that does nothing else."
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Generator

from .arms import ARMS, GRID_ARMS, Arm
from .plan import Plan
from .tasks import Task
from .training import Schedule, new_network, step


def _stepper(
    task: Task,
    arm: str,
    schedule: Schedule,
):
    "A function that makes one step, always on the same examples."
    network, optimizer = new_network(task, Arm(arm), schedule, 0)
    batch = task.batch(schedule.batch, Generator().manual_seed(0))
    return lambda: step(network, optimizer, task, batch, 1e-3)


def times_per_step(
    task: Task,
    schedule: Schedule,
    rounds: int = 40,
    warmup: int = 3, # rounds that do not count
) -> dict[str, dict[str, float]]: # arm -> median, p20, p80, in seconds
    "Every arm makes one step in each round."
    torch.set_num_threads(1)
    steps = {arm: _stepper(task, arm, schedule) for arm in (*ARMS, *GRID_ARMS)}
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    for _ in range(warmup + rounds):
        for arm, make in steps.items():
            began = perf_counter()
            make()
            seconds[arm].append(perf_counter() - began)
    return {arm: _spread(x[warmup:]) for arm, x in seconds.items()}


def _spread(seconds: list[float]) -> dict[str, float]:
    fifths = quantiles(seconds, n=5)
    return dict(median=median(seconds), p20=fifths[0], p80=fifths[3])


def measure(
    plan: Plan,
    tasks: dict[str, type[Task]],
    rounds: int = 40,
) -> dict:
    "Of all tasks. JSON-ready, but for the environment."
    return {name: times_per_step(make(0), plan.schedules[name], rounds)
            for name, make in tasks.items()}


def steps_in_time_of(
    times: dict, # of one task, from `measure`
    arm: str,
    other: str, # whose time is given
    steps: int, # of `other`
) -> int:
    "How many steps of an arm take as long."
    return max(1, round(steps * times[other]["median"] / times[arm]["median"]))
