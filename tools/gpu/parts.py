"""What the three parts do, in which order, and how long each step should take at most."""
from . import cases
from .contenders import FLEX, PEERS
from .session import Task

MINUTES = 9  # a part; the machine takes ten
RESERVE = 15  # seconds of it for Python's start and its end
COMPILE = 4.7  # seconds of one kernel on one core, at worst


def named(kind: str, key: str, seconds: float, **case) -> Task:
    return Task(f"{kind} {key}".strip(), kind, seconds, case)


def checking(chosen: list[dict], seconds: float = 6) -> list[Task]:
    return [Task(f"check {cases.name_of(c)}", "check", seconds, c) for c in chosen]


def precompiling(key: str, small=(), large=(), workers: int = 16) -> list[Task]:
    "In pieces: three kernels a small case at most, every candidate for a large one."
    tasks = []
    for name, found, size, kernels in (("small", small, 24, 3), ("large", large, 6, 12)):
        for start in range(0, len(found), size):
            piece = list(found[start:start + size])
            seconds = 10 + len(piece) * kernels * COMPILE / workers
            label = f"{key}, {name} from {start}"
            tasks.append(named("precompile", label, seconds, **{name: piece}))
    return tasks


def racing(found: list[dict], seconds: float = 8, only: list[str] | None = None) -> list[Task]:
    "One task a contender, so that what one of them does to the GPU is its own affair."
    tasks = []
    for case in found:
        names = only or ["triton", *(name for peer in case["peers"] for name in PEERS[peer])]
        tasks += [Task(f"speed {cases.speed_name(case)}: {name}", "speed", seconds,
                       case | dict(contender=name)) for name in names]
    return tasks


def part_1(workers: int) -> list[Task]:
    "What one wants to know first."
    chosen, sweep = cases.chosen_cases(), cases.sweep_cases()
    tasks = [named("environment", "", 10), named("rates", "", 20)]
    tasks += precompiling("for part 1", [*chosen, cases.SEGMENTS, cases.BLOCKS], sweep, workers)
    tasks += checking(chosen)
    tasks += [named("strides", "", 10), named("graph", "segments", 10, **cases.SEGMENTS)]
    tasks += [named("graph", "blocks", 10, **cases.BLOCKS)]
    tasks += racing(cases.dense_cases(), only=PEERS["groups"])
    tasks += [Task(f"sweep {cases.speed_name(c)}", "sweep", 15, c) for c in sweep]
    tasks += racing(cases.large_cases())
    return tasks + precompiling("for part 2", large=part_2_cases(), workers=workers)


def part_2_cases() -> list[dict]:
    return (cases.hilbert_a_cases() + cases.window_cases() + cases.claim_cases()
            + cases.other_segment_cases() + cases.front_door_cases()
            + cases.small_group_cases())


def part_2(workers: int) -> list[Task]:
    "The patterns, the front door, and what one would use instead."
    tasks = [named("environment", "", 10), named("rates", "", 20)]
    tasks += precompiling("for part 2", large=part_2_cases(), workers=workers)
    tasks += racing(cases.hilbert_a_cases() + cases.window_cases(), 15)
    tasks += racing(cases.claim_cases() + cases.other_segment_cases())
    tasks += [Task(f"front {cases.speed_name(c)}", "front", 8, c) for c in cases.front_door_cases()]
    tasks += racing(cases.small_group_cases())
    tasks += [named("program", f"ncu {name}", 45, program="ncu", cases=[case])
              for name, case in profiled().items()]
    return tasks + racing(cases.flex_cases(), 60, FLEX)


def profiled() -> dict[str, dict]:
    "Cases that between them launch every kernel, each at its usual work."
    large = cases.segments(32768, 4096, 4)
    return {"D64": large, "D128": large | dict(d=128), "D64 order": large | dict(order=True),
            "small groups": large | dict(w=256), "blocks D128": cases.hilbert_a_cases()[0]}


def part_3(workers: int) -> list[Task]:
    "Everything else about correctness, memory checkers, one rank of a ring, long sequences."
    tasks = [named("environment", "", 10), named("ring", "one rank", 60)]
    tasks += [Task(f"long {cases.speed_name(c)}", "long", 30, c) for c in long_cases()]
    tasks += [named("program", f"{tool} {name}", 60, program=tool, cases=found)
              for name, found in sanitized().items() for tool in ("memcheck", "racecheck")]
    rest, done = cases.all_cases(), {cases.name_of(c) for c in cases.chosen_cases()}
    rest = [c for c in rest if cases.name_of(c) not in done]
    for start in range(0, len(rest), 48):
        piece = rest[start:start + 48]
        tasks += [*precompiling(f"cases {start}", piece, workers=workers), *checking(piece, 3)]
    return tasks


def long_cases() -> list[dict]:
    "Up to the memory: 16 heads of 64 take 2 KiB a token and tensor."
    return [cases.segments(n, 4096, 4, order=True) for n in (1 << 20, 1 << 21, 1 << 22)]


def sanitized() -> dict[str, list[dict]]:
    "Six small problems that together launch every kernel."
    order, masked = dict(order=True, n=300, w=300), dict(masked=True, causal=True)
    segments, blocks = cases.SEGMENTS, cases.BLOCKS
    return dict(
        segments=[segments | order, segments | dict(w=32), segments | order | masked,
                  segments | dict(mode="keys", r=2, w=100)],
        blocks=[blocks | dict(registers=3), blocks | masked])


PARTS = {1: part_1, 2: part_2, 3: part_3}


def plan(part: int, workers: int) -> list[Task]:
    "The tasks of a part, each key once."
    tasks = {}
    for task in PARTS[part](workers): tasks.setdefault(task.key, task)
    return list(tasks.values())
