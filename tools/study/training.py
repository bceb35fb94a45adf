"One training, the same to the last bit whenever it is run on the same type of machine."
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import process_time

import torch
from torch import Tensor, nn

from .arms import Arm
from .clouds import CloudNetwork
from .network import Network, Size
from .tasks import Task, Tests


@dataclass(frozen=True)
class Schedule:
    "How long, how fast, how often judged."
    steps: int
    batch: int
    rate: float
    warmup: int = 40
    weight_decay: float = 0.01
    points: int = 10 # of the curve
    size: Size = field(default_factory=Size)

    @property
    def every(self) -> int:
        return max(1, self.steps // self.points)


@dataclass(frozen=True)
class Outcome:
    "What a training ends with."
    loss: float # mean over the test examples
    groups: dict[str, float] # the same by group
    curve: list[list[float]] # step, training loss so far, test loss
    parameters: int
    seconds: float
    distances: list | None = None # from `attention_distances`; exploratory trainings


def rate_at(step: int, schedule: Schedule) -> float:
    "A linear rise, then half a cosine down to zero."
    if step < schedule.warmup: return schedule.rate * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.rate * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def judge(network: nn.Module, task: Task, tests: Tests) -> Tensor: # (examples,)
    "The loss of each test example."
    parts = tests.batch.split(16)
    return torch.cat([task.loss(network(part.tokens), part) for part in parts])


def new_network(task: Task, arm: Arm, schedule: Schedule, seed: int):
    "Initial weights depend on the seed alone, not on the arm."
    torch.manual_seed(seed)
    kind = CloudNetwork if task.cloud else Network
    network = kind(task, arm, schedule.size)
    settings = dict(lr=schedule.rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
    return network, torch.optim.AdamW(network.parameters(), **settings)


def step(network, optimizer, task: Task, batch, rate: float) -> float:
    "One step; the loss before it."
    for group in optimizer.param_groups: group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss = task.loss(network(batch.tokens), batch).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(
    task: Task,
    arm: Arm,
    schedule: Schedule,
    seed: int, # of weights and data
    tell: Callable = lambda steps: None, # told of each step
) -> tuple[Outcome, Network]:
    "Trains an arm."
    torch.use_deterministic_algorithms(True)
    began = process_time()
    draw = torch.Generator().manual_seed(1000 + seed)
    tests = task.tests()
    network, optimizer = new_network(task, arm, schedule, seed)
    curve, seen = [], []
    for i in range(schedule.steps):
        batch = task.batch(schedule.batch, draw)
        seen.append(step(network, optimizer, task, batch, rate_at(i, schedule)))
        if (i + 1) % schedule.every == 0 or i + 1 == schedule.steps:
            losses = judge(network, task, tests)
            curve.append([i + 1, sum(seen) / len(seen), losses.mean().item()])
            seen = []
        tell(1)
    count = sum(p.numel() for p in network.parameters())
    seconds = process_time() - began
    outcome = Outcome(losses.mean().item(), tests.means(losses), curve, count, seconds)
    return outcome, network
