"Pictures of the results page."
from math import log1p

import numpy as np

from hilbert_attn.plots import new_figure

from .analysis import MARGIN, OTHERS, Contrast, log_ratios
from .arms import ARMS, Arm
from .mechanism import neighbours_together, receptive_field
from .plan import SEEDS, TASKS
from .tasks import Task

COLORS = dict(zip(ARMS, ("#212529", "#ff725c", "#868e96", "#efb118", "#3ca951", "#4269d0")))


TICKS = (-60, -40, -20, -10, 0, 10, 20, 40, 100, 200, 400) # per cent


def forest(rows, contrasts: list[Contrast]):
    "Hilbert against each arm: an interval where there is one, and a dot for each seed."
    tasks = list(dict.fromkeys(c.task for c in contrasts))
    fig, axes = new_figure(1, len(tasks), panel=(3.1, 2.6), titles=tasks)
    for ax, task in zip(axes, tasks):
        ax.axvspan(-MARGIN, MARGIN, color="#dee2e6", lw=0)
        ax.axvline(0, color="#495057", lw=0.8)
        for y, c in enumerate(c for c in contrasts if c.task == task):
            _forest_row(ax, y, rows, c)
        ax.set_yticks(range(len(OTHERS)), OTHERS)
        ax.set_ylim(len(OTHERS) - 0.5, -0.5)
        ax.set_xlabel("Hilbert's loss against its (%, log scale)")
        _percent_ticks(ax)
    for ax in axes[1:]: ax.set_yticklabels([])


def _percent_ticks(ax) -> None:
    "The axis is the log of a ratio; its ticks say per cent, as many as have room."
    low, high = ax.get_xlim()
    room, shown = (high - low) / 8, []
    for percent in sorted(TICKS, key=abs):
        at = log1p(percent / 100)
        free = all(abs(at - log1p(other / 100)) > room for other in shown)
        if low <= at <= high and free: shown.append(percent)
    words = [f"{percent:+d}" if percent else "0" for percent in shown]
    ax.set_xticks([log1p(percent / 100) for percent in shown], words)


def _forest_row(ax, y: int, rows, c: Contrast) -> None:
    seeds = log_ratios(rows, c.task, c.a, c.b).groupby("seed").d.mean()
    ax.plot(seeds, np.full(len(seeds), y + 0.2), ".", color="#adb5bd", ms=4)
    if np.isnan(c.error): return
    ax.plot(c.interval, [y, y], color=COLORS["hilbert"], lw=2)
    inside = "white" if c.void else COLORS["hilbert"]
    ax.plot(c.mean, y, "D", color=COLORS["hilbert"], mfc=inside, ms=5)


def curves(runs: list[dict]):
    "Test loss against steps: the mean over seeds, and the best guess without learning."
    fig, axes = new_figure(1, len(TASKS), panel=(3.1, 2.8))
    for ax, task in zip(axes, TASKS):
        mine = [run for run in runs if run["task"] == task]
        _curves_of(ax, mine)
        ax.set_title(f"{task}, seeds stored: {_seeds_by_arm(mine)}")
        ax.set_xlabel("steps")
    axes[0].set_ylabel("test loss")
    _legend_below(fig, axes[0])


def _curves_of(ax, runs: list[dict]) -> None: # of one task
    for arm in ARMS:
        found = [run["curve"] for run in runs if run["arm"] == arm]
        if not found: continue
        steps, _, losses = np.array(found).mean(0).T
        ax.plot(steps, losses, color=COLORS[arm], label=arm)
    guesses = [min(run["guesses"].values()) for run in runs]
    if guesses: ax.axhline(np.mean(guesses), color="#e03131", lw=1, ls=":")


def _seeds_by_arm(runs: list[dict]) -> str:
    "How many seeds an arm has: one number, or the fewest and the most."
    counts = [sum(run["arm"] == arm for run in runs) for arm in ARMS]
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def _legend_below(fig, ax) -> None:
    "One legend for all panels, where it covers no line."
    handles, labels = ax.get_legend_handles_labels()
    if not handles: return
    look = dict(frameon=False, fontsize=8, ncols=len(labels))
    fig.legend(handles, labels, loc="outside lower center", **look)


def neighbours(task: Task, reach: int = 6):
    "How often a cell and the one at an offset share a segment in two layers, for each arm."
    names = [arm for arm in ARMS if arm != "dense"]
    fig, axes = new_figure(1, len(names), panel=(1.9, 1.9), pictures=True, titles=names)
    for ax, name in zip(axes, names):
        share = neighbours_together(Arm(name), task, reach)
        ax.imshow(share, vmin=0, vmax=1, cmap="magma")


def growth(tasks: list[Task], layers: int = 12):
    "Share of pairs that attention connects after some layers, in two schemes."
    fig, axes = new_figure(1, len(tasks), panel=(3.4, 2.8), titles=[
        f"{task.name}, segments of {task.segment_size}" for task in tasks])
    for ax, task in zip(axes, tasks):
        for name in ARMS:
            for scheme, style in (("alternating", "-"), ("one", ":")):
                shares = receptive_field(Arm(name, scheme), task, layers)
                label = name if style == "-" else None
                ax.plot(range(1, layers + 1), shares, style, color=COLORS[name], label=label)
        ax.set_xlabel("layers (dotted: one order, no shift)")
        ax.set_xticks(range(1, layers + 1))
    axes[0].set_ylabel("pairs connected")
    _legend_below(fig, axes[0])


def progress(runs: list[dict]) -> str:
    "How far the study is, in words."
    done = {task: sum(run["task"] == task for run in runs) for task in TASKS}
    total = len(ARMS) * len(SEEDS)
    return "; ".join(f"{task}: {n} of {total} trainings" for task, n in done.items())
