"What the stored runs say: differences of arms with seeds and pictures crossed, and verdicts."
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import exp, log

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from scipy import stats
from statsmodels.stats.multitest import multipletests

from .arms import ARMS
from .plan import SEEDS, TASKS

MARGIN = log(1.02) # of the log of a ratio of losses: a tie is less than 2 %
LEVEL = 0.05 # of the family
OTHERS = tuple(arm for arm in ARMS if arm != "hilbert")
LEAST_SEEDS = 3 # below, no interval is computed


@dataclass(frozen=True)
class Contrast:
    "Log of the ratio of losses of `a` and `b`; negative: `a` is lower."
    task: str
    a: str
    b: str
    stored: int # seeds of which both arms are stored
    seeds: int # of these, without those in which a training ended in NaN
    pictures: int
    mean: float = np.nan
    error: float = np.nan # standard error, from the mixed model
    p_differ: float = np.nan
    p_equal: float = np.nan # the larger one of two one-sided tests
    holm_differ: float = np.nan
    holm_equal: float = np.nan
    void: tuple[str, ...] = () # arms that do not beat the guess without learning
    whole: bool = False # is every contrast of the family complete?

    @property
    def freedom(self) -> int: # degrees, of Student's t
        return min(self.seeds, self.pictures) - 1

    @property
    def interval(self) -> tuple[float, float]:
        "95 %, for this contrast alone."
        half = stats.t.ppf(0.975, self.freedom) * self.error
        return self.mean - half, self.mean + half

    @property
    def complete(self) -> bool:
        return self.stored == len(SEEDS)

    @property
    def verdict(self) -> str:
        "What the protocol lets one say, once all that is corrected together is there."
        if not self.complete: return f"{self.stored} of {len(SEEDS)} seeds done"
        if not self.whole: return "waits for the rest of the family"
        if self.void: return "void"
        tied = self.holm_equal < LEVEL
        if self.holm_differ < LEVEL:
            found = "lower" if self.mean < 0 else "higher"
            return f"{found}, by less than the margin" if tied else found
        return "equal within the margin" if tied else "undecided"


def as_rows(runs: Iterable[dict]) -> pd.DataFrame: # a row for each run and picture
    "Losses of the primary runs."
    names = ("task", "arm", "seed", "picture", "loss")
    rows = [
        (run["task"], run["arm"], run["seed"], picture, loss)
        for run in runs for picture, loss in run["groups"].items()
    ]
    return pd.DataFrame(rows, columns=names)


def log_ratios(rows: pd.DataFrame, task: str, a: str, b: str) -> pd.DataFrame:
    "One row for each seed and picture that both arms have: seed, picture, d."
    table = rows[rows.task == task].pivot(index=["seed", "picture"], columns="arm", values="loss")
    both = table.reindex(columns=[a, b]).dropna()
    return np.log(both[a] / both[b]).rename("d").reset_index()


def seeds_of_both(
    rows: pd.DataFrame, # from `as_rows`
    task: str,
    a: str, # an arm
    b: str, # another one
) -> int:
    "Of which both arms are stored, however they ended."
    mine = rows[rows.task == task]
    return len(set(mine.seed[mine.arm == a]) & set(mine.seed[mine.arm == b]))


def mixed_mean(ratios: pd.DataFrame) -> tuple[float, float]: # mean, standard error
    """By restricted maximum likelihood: a mean, random effects of seed and of picture, the rest.
    Nelder-Mead: methods by gradients stop short of the maximum where a variance is nearly zero."""
    crossed = {"seed": "0 + C(seed)", "picture": "0 + C(picture)"}
    everyone = np.ones(len(ratios))
    model = smf.mixedlm("d ~ 1", ratios, groups=everyone, vc_formula=crossed)
    with warnings.catch_warnings():  # a variance of zero, on the boundary, is an answer
        warnings.simplefilter("ignore")
        fitted = model.fit(reml=True, method="nm")
    if not fitted.converged: raise ArithmeticError("the mixed model did not converge")
    return float(fitted.fe_params.iloc[0]), float(fitted.bse_fe.iloc[0])


def contrast(
    rows: pd.DataFrame,
    task: str,
    a: str,
    b: str,
    void: Collection[tuple[str, str]] = (), # from `void_arms`
) -> Contrast:
    "Without correction for the family."
    ratios = log_ratios(rows, task, a, b)
    counts = ratios.seed.nunique(), ratios.picture.nunique()
    stored = seeds_of_both(rows, task, a, b)
    no_better = tuple(arm for arm in (a, b) if (task, arm) in void)
    found = Contrast(task, a, b, stored, *counts, void=no_better)
    if found.seeds < LEAST_SEEDS: return found
    mean, error = mixed_mean(ratios)
    t = stats.t(found.freedom)
    equal = t.sf((MARGIN - abs(mean)) / error)
    differ = 2 * t.sf(abs(mean) / error)
    return replace(found, mean=mean, error=error, p_differ=differ, p_equal=equal)


def family(
    rows: pd.DataFrame,
    void: Collection[tuple[str, str]] = (), # from `void_arms`
) -> list[Contrast]:
    "Hilbert against each other arm on each task, with Holm's correction over all of them."
    found = [contrast(rows, task, "hilbert", arm, void) for task in TASKS for arm in OTHERS]
    known = [c for c in found if not np.isnan(c.mean)]
    if not known: return found
    differ = multipletests([c.p_differ for c in known], method="holm")[1]
    equal = multipletests([c.p_equal for c in known], method="holm")[1]
    whole = all(c.complete for c in found)
    corrected = {
        c: replace(c, holm_differ=x, holm_equal=y, whole=whole)
        for c, x, y in zip(known, differ, equal)
    }
    return [corrected.get(c, c) for c in found]


def error_for_a_tie(
    freedom: int, # degrees, of Student's t
    tests: int = 1, # corrected together
) -> float:
    "Below which standard error arms that do not differ at all count as equal, in so many tests."
    return MARGIN / stats.t.isf(LEVEL / tests, freedom)


def percent(value: float) -> str:
    "Of a log of a ratio."
    return f"{100 * (exp(value) - 1):+.1f} %"


def sentence(c: Contrast) -> str:
    "What a contrast says, in words."
    if not c.whole:
        return f"{c.task}: `{c.a}` against `{c.b}`: {c.verdict}, no verdict."
    if c.void:
        guessing = " and ".join(f"`{arm}`" for arm in c.void)
        return (f"{c.task}: `{c.a}` against `{c.b}` is **void**: {guessing} ended no better than "
                "a guess without learning.")
    low, high = c.interval
    figures = f"{percent(c.mean)} ({percent(low)} to {percent(high)})"
    return f"{c.task}: `{c.a}` against `{c.b}` is **{c.verdict}**, {figures}."


HYPOTHESES = { # of the protocol -> arms, and what Hilbert's verdict against each has to be
    "an order matters: lower than random": (("random",), "lower"),
    "blocks, not stripes: lower than row-major": (("row_major",), "lower"),
    "Hilbert, not any blocks: lower than tile and Morton": (("tile", "morton"), "lower"),
    "sparsity costs nothing: within the margin of dense": (("dense",), "the margin"),
}


def hypotheses(contrasts: Iterable[Contrast]) -> pd.DataFrame: # hypothesis against task
    "Verdicts against each arm that a hypothesis names, and in how many tasks it holds."
    known = {(c.task, c.b): c.verdict for c in contrasts}
    table = {}
    for words, (arms, expected) in HYPOTHESES.items():
        found = {
            task: [known[task, arm] for arm in arms]
            for task in TASKS
        }
        held = sum(
            all(expected in verdict for verdict in said)
            for said in found.values()
        )
        told = {
            task: "; ".join(dict.fromkeys(said))
            for task, said in found.items()
        }
        told["holds in"] = f"{held} of {len(TASKS)}"
        table[words] = told
    return pd.DataFrame(table).T


def in_one_sentence(contrasts: Iterable[Contrast], task: str) -> str:
    "Which arms Hilbert is lower than, higher than, equal to; or that it is too early."
    mine = [c for c in contrasts if c.task == task]
    done = min(c.stored for c in mine)
    if done < len(SEEDS):
        return f"**{task}**: too early, {done} of {len(SEEDS)} seeds done."
    if not all(c.whole for c in mine):
        return f"**{task}**: {done} seeds done, verdicts wait for the other tasks."
    said: dict[str, list[str]] = {}
    for c in mine: said.setdefault(c.verdict, []).append(f"`{c.b}`")
    parts = [f"{verdict}: {', '.join(arms)}" for verdict, arms in said.items()]
    return f"**{task}**: Hilbert's loss against the other arms is " + "; ".join(parts) + "."


def arm_table(runs: list[dict], task: str) -> pd.DataFrame: # a row for each arm
    "Seeds stored, losses, rates, and whether learning beats the best guess on average."
    found = []
    for arm in ARMS:
        mine = [run for run in runs if (run["task"], run["arm"]) == (task, arm)]
        if not mine: continue
        losses = np.array([run["loss"] for run in mine])
        guess = np.array([min(run["guesses"].values()) for run in mine])
        beats = "yes" if losses.mean() < guess.mean() else "no: void"
        found.append({
            "arm": arm, "seeds": len(mine), "rate": mine[0]["rate"], "loss": losses.mean(),
            "lowest": losses.min(), "highest": losses.max(), "best guess": guess.mean(),
            "beats it": beats, "seconds": np.median([run["seconds"] for run in mine]),
        })
    return pd.DataFrame(found).set_index("arm") if found else pd.DataFrame()


def void_arms(runs: list[dict]) -> set[tuple[str, str]]: # (task, arm)
    "Arms whose mean loss does not beat the best guess: their rows carry no verdict."
    tables = {task: arm_table(runs, task) for task in TASKS}
    return {
        (task, arm) for task, table in tables.items() for arm, row in table.iterrows()
        if row["beats it"] != "yes"
    }


def steps_to(curve: list[list[float]], loss: float) -> float: # NaN: never
    "Training steps until the test loss is as low as this, between two points on a line."
    before = None
    for step, _, now in curve:
        if now <= loss:
            if before is None: return float(step)
            share = (before[1] - loss) / (before[1] - now)
            return before[0] + share * (step - before[0])
        before = step, now
    return np.nan


def seeds_done(runs: list[dict], task: str) -> int:
    "Seeds of which all arms are stored."
    have = {(run["arm"], run["seed"]) for run in runs if run["task"] == task}
    return sum(all((arm, seed) in have for arm in ARMS) for seed in SEEDS)


def speed_table(runs: list[dict], task: str, goal: str = "row_major") -> pd.DataFrame:
    "Steps and CPU seconds of one thread until the loss at which `goal` ends, seed by seed."
    mine = [run for run in runs if run["task"] == task]
    ends = {run["seed"]: run["curve"][-1][2] for run in mine if run["arm"] == goal}
    found: dict[str, list[tuple[float, float]]] = {}
    for run in mine:
        if run["seed"] not in ends: continue
        steps = steps_to(run["curve"], ends[run["seed"]])
        seconds = steps * run["seconds"] / run["schedule"]["steps"]
        found.setdefault(run["arm"], []).append((steps, seconds))
    return pd.DataFrame([
        {"arm": arm, "seeds": len(found[arm]), "seeds that get there": int(n),
         "median steps": steps, "median seconds": seconds}
        for arm in ARMS if arm in found
        for n, (steps, seconds) in [_reached(np.array(found[arm]))]
    ]).set_index("arm") if found else pd.DataFrame()


def _reached(pairs: np.ndarray) -> tuple[int, np.ndarray]: # how many, median steps and seconds
    "NaN where at least half of the seeds never get there."
    there = ~np.isnan(pairs[:, 0])
    middle = np.median(np.where(there[:, None], pairs, np.inf), 0)
    return int(there.sum()), np.where(np.isfinite(middle), middle, np.nan)


def times_as_fast(
    runs: list[dict],
    times: dict, # of a step: arm -> median in seconds, from `timing.measure`
    task: str,
    arm: str = "hilbert",
    goal: str = "row_major",
) -> list[float]: # for each seed; 0 where the arm never gets there
    "How many times as fast an arm is at the loss at which another one ends."
    curves = {(r["seed"], r["arm"]): r["curve"] for r in runs if r["task"] == task}
    found = []
    seeds = sorted({seed for seed, name in curves if name == goal})
    for seed in seeds:
        if (seed, arm) not in curves: continue
        end = curves[seed, goal][-1][2]
        mine, its = (
            steps_to(curves[seed, name], end) * times[name]["median"]
            for name in (arm, goal)
        )
        found.append(0.0 if np.isnan(mine) else its / mine)
    return found


def by_picture(rows: pd.DataFrame, task: str, a: str, b: str) -> pd.DataFrame:
    "Mean log ratio of each picture, and of how many seeds."
    ratios = log_ratios(rows, task, a, b)
    return ratios.groupby("picture").d.agg(["mean", "count"]).sort_values("mean")
