"""Tasks under a clock: every row is stored when it is measured, and a failure costs its own.

A part is a list of tasks. A worker process does them in turn; the process that started it watches,
and when a task hangs or takes the worker down, notes that and starts another worker. What is stored
is not done again, so a part that was stopped goes on where it was.
"""
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TIME_IS_UP = "stopped: the time of this part was up"
LOST = 17  # exit code of a worker whose GPU context is gone; another one can go on


class ContextLost(RuntimeError):
    "No call on this GPU will succeed in this process any more."


@dataclass(frozen=True)
class Task:
    "Something to measure, as data: what a device does with it, the device knows."
    key: str  # unique in its part
    kind: str  # a method of the device
    seconds: float  # what it should take at most
    case: dict = field(default_factory=dict)


class Store:
    "JSON lines in one or more files, each with all rows: what one has lost another may keep."
    def __init__(self, *paths: Path):
        self.paths = list(dict.fromkeys(paths))
        self.rows = self._read()

    def _read(self) -> list[dict]:
        rows = {}
        for path in self.paths:
            for line in path.read_text().splitlines() if path.exists() else ():
                try: rows[line] = json.loads(line)
                except ValueError: continue  # the line at which a kill came
        return list(rows.values())

    def add(self, row: dict) -> None:
        self.rows.append(row)
        line = json.dumps(row)
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
            with path.open("a") as file: file.write("\n" * bool(torn) + line + "\n")

    def of(self, event: str) -> list[dict]:
        return [row for row in self.rows if row.get("event") == event]

    def done(self) -> set[str]:
        return {row["task"] for row in self.of("done")}

    def began(self, key: str) -> int:
        return sum(row["task"] == key for row in self.of("begun"))

    def measured(self) -> list[dict]:
        return [row for row in self.rows if "event" not in row]


def set_aside(paths: list[Path], stamp: str, again: bool = False) -> None:
    "Rows of other sources, or all, move to files of their own: they are not gone on with."
    line = json.dumps(dict(event="sources", stamp=stamp))
    for path in paths:
        first = path.read_text().partition("\n")[0] if path.exists() else line
        if first == line and not again: continue
        if not path.exists(): continue
        path.rename(path.with_name(f"{path.stem}.{int(path.stat().st_mtime)}.jsonl"))
    for path in paths:
        if path.exists(): continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")


class Clock:
    "Seconds since the start, and how many are left."
    def __init__(self, limit: float, now: Callable[[], float] = time.time,
                 start: float | None = None):
        self.now, self.start = now, now() if start is None else start
        self.limit = limit

    def elapsed(self) -> float: return self.now() - self.start
    def left(self) -> float: return self.limit - self.elapsed()


def first_line(error: BaseException) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:400]


def lost_the_gpu(error: BaseException) -> bool:
    "Errors that stay: illegal addresses, misaligned ones, failed launches."
    return isinstance(error, ContextLost) or "CUDA error" in str(error) and "memory" not in \
        str(error).lower().replace("illegal memory access", "")


def do_task(task: Task, device, store: Store, clock: Clock) -> None:
    "Its rows into the store as they come; an error is a row too."
    store.add(dict(event="begun", task=task.key, at=round(clock.elapsed(), 2)))
    try:
        getattr(device, task.kind)(task.case, lambda row: store.add(dict(task=task.key) | row))
    except Exception as error:
        where = traceback.format_exc(limit=-3)[-1500:]
        store.add(dict(task=task.key, failed=first_line(error), where=where))
        store.add(dict(event="done", task=task.key, at=round(clock.elapsed(), 2)))
        if lost_the_gpu(error): raise ContextLost(task.key) from error
        return
    store.add(dict(event="done", task=task.key, at=round(clock.elapsed(), 2)))


def work(tasks: list[Task], device, store: Store, clock: Clock,
         tell: Callable[[str], None] = print,
         orphaned: Callable[[], bool] = lambda: False) -> list[str]:  # keys without time
    "All tasks that are not done and that the clock still allows, in their order."
    done, left = store.done(), []
    for task in tasks:
        if task.key in done: continue
        if clock.left() < task.seconds or orphaned():
            left.append(task.key)
            continue
        before = len(store.rows)
        do_task(task, device, store, clock)
        rows = [row for row in store.rows[before:] if "event" not in row]
        failed = sum("failed" in row for row in rows)
        tell(f"[{clock.elapsed():4.0f} s] {task.key}: {len(rows)} rows"
             + f", {failed} FAILED" * bool(failed))
    store.add(dict(event="left", tasks=left, at=round(clock.elapsed(), 2)))
    return left


# ---- the watching side

def open_task(store: Store) -> dict | None:
    "The task that a worker began and did not finish."
    done = store.done()
    began = [row for row in store.of("begun") if row["task"] not in done]
    return began[-1] if began else None


def blame(store: Store, why: str) -> str | None:
    "Closes the task that took a worker down, so that the next worker goes past it."
    row = open_task(store)
    if row is None: return None
    store.add(dict(task=row["task"], failed=why))
    store.add(dict(event="done", task=row["task"], at=row["at"]))
    return row["task"]


def overdue(store: Store, clock: Clock, seconds: dict[str, float]) -> bool:
    "Whether the open task has had three times its time, and half a minute."
    row = open_task(store)
    return row is not None and clock.elapsed() - row["at"] > 3 * seconds.get(row["task"], 30) + 30


def end(worker) -> None:
    "With all that it started: compilers and profilers would hold its output open."
    try: os.killpg(worker.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError): worker.kill()  # no group, or none any more
    worker.wait()


def wait_for(worker, paths: list[Path], seconds: dict[str, float], clock: Clock,
             pause: float) -> str:  # why it was stopped, if it was
    "Until a worker has ended, or has to."
    try:
        while worker.poll() is None:
            time.sleep(pause)
            if clock.left() < -10: return TIME_IS_UP
            if overdue(Store(*paths), clock, seconds): return "stopped: it hung"
        return ""
    finally: end(worker)


def watch(start: Callable[[], object], paths: list[Path], seconds: dict[str, float], clock: Clock,
          pause: float = 0.5, restarts: int = 20) -> Iterator[str]:
    "Starts workers until one has gone through all tasks, or time is up; yields what happened."
    for _ in range(restarts):
        before, worker = len(Store(*paths).done()), start()
        why = wait_for(worker, paths, seconds, clock, pause)
        if worker.returncode == 0: return
        if worker.returncode != LOST:
            store, why = Store(*paths), why or f"the worker died with exit code {worker.returncode}"
            key = blame(store, why)
            yield f"{key or 'outside of any task'}: {why}"
            if len(store.done()) == before: return  # the next one would come no further
        if clock.left() < 5: return
