"What the exploratory trainings say: tables without verdicts."
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from .arms import ARMS, AT_RATE_OF_HILBERT, SCHEMES, Arm
from .plan import EXPLORED, SAME_SECONDS, SCALES

COPIED = ("stage", "task", "seed", "loss") # from a run
READ = ("arm", "scheme", "positions", "variant", "guess", "layers")


class Means(NamedTuple):
    "Over the seeds of which every cell of a table is stored."
    losses: pd.DataFrame
    seeds: int
    guesses: pd.DataFrame # the best without learning, for each cell of `losses`

    @property
    def void(self) -> pd.DataFrame: # bool
        "Which cells are no better than a guess: the rule of the protocol."
        return self.losses >= self.guesses


def as_frame(runs: Iterable[dict]) -> pd.DataFrame: # a row for each run
    "Titles taken apart."
    rows = []
    for run in runs:
        arm = Arm.read(run["arm"])
        rows.append({name: run[name] for name in COPIED} | dict(
            arm=arm.name,
            scheme=arm.scheme,
            positions=arm.positions or "grid",
            variant=run.get("variant", ""),
            guess=min(run["guesses"].values()),
            layers=run.get("distances"),
        ))
    return pd.DataFrame(rows, columns=[*COPIED, *READ])


def plain(frame: pd.DataFrame) -> pd.Series: # bool
    "Which runs are of primary arms, trained again or for the first time."
    usual = (frame.scheme == "alternating") & (frame.positions == "grid") & (frame.variant == "")
    return usual & frame.arm.isin(ARMS)


def means(
    frame: pd.DataFrame,
    index: Sequence[str], # names of columns
    columns: str, # name of a column
) -> Means:
    wide = frame.pivot_table(
        index="seed", columns=[*index, columns], values=["loss", "guess"], dropna=False)
    names = [frame[name].unique() for name in (*index, columns)]
    cells = pd.MultiIndex.from_product(map(sorted, names), names=[*index, columns])
    whole = wide.loss.reindex(columns=cells).dropna()
    guesses = wide.guess.reindex(columns=cells).loc[whole.index]
    return Means(whole.mean().unstack(columns), len(whole), guesses.mean().unstack(columns))


def with_primary(
    frame: pd.DataFrame,
    of: pd.Series, # bool, which rows
    same: Sequence[str] = ("task", "arm", "seed"),
) -> pd.DataFrame:
    "Some exploratory runs, and the primary ones that have the same."
    tried = frame[of & (frame.stage == "explore")]
    beside = frame.stage == "primary"
    for name in same: beside &= frame[name].isin(tried[name])
    return pd.concat([frame[beside], tried])


def diversity(frame: pd.DataFrame) -> Means | None:
    "Task and scheme against arm."
    of = frame.arm.isin(EXPLORED["arms"]) & (frame.positions == "grid") & (frame.variant == "")
    of &= frame.task.isin(EXPLORED["tasks"]) & ~plain(frame)
    return means(with_primary(frame, of), ["task", "scheme"], "arm") if of.any() else None


def over_one(table: pd.DataFrame) -> pd.DataFrame: # of `diversity`, in per cent
    "How far each scheme's loss lies above that of the same arm with one order throughout."
    one = table.xs("one", level="scheme")
    base = one.loc[table.index.get_level_values("task")].to_numpy()
    return (100 * (table / base - 1)).drop(index="one", level="scheme")


def hilbert_over_rows(table: pd.DataFrame) -> pd.DataFrame: # of `diversity`, in per cent
    "How far Hilbert's loss lies above that of rows, scheme against task."
    return (100 * (table["hilbert"] / table["row_major"] - 1)).unstack("task")


def each_seed(frame: pd.DataFrame) -> pd.DataFrame: # in per cent, (task, scheme) against the seed
    "`hilbert_over_rows` of each seed of which every cell of `diversity` is stored."
    tried = {seed: diversity(part) for seed, part in frame.groupby("seed")}
    whole = {seed: found.losses for seed, found in tried.items() if found and found.seeds}
    return pd.DataFrame({
        seed: hilbert_over_rows(table).unstack()
        for seed, table in whole.items()
    })


def _span(values: pd.DataFrame) -> str:
    "From the least to the most."
    ends = [f"{x:+.0f}" for x in (values.min(axis=None), values.max(axis=None))]
    return f"{' to '.join(dict.fromkeys(ends))} %"


def not_learned(found: Means | None) -> list[tuple[str, str]]: # of `diversity`: (task, scheme)
    "Where Hilbert or rows, or both, end no better than a guess without learning."
    if found is None: return []
    void = found.void[["hilbert", "row_major"]].any(axis=1)
    return list(void.index[void])


def in_words(
    rows: pd.DataFrame, # of `each_seed`
    void: Collection[tuple[str, str]] = (), # of `not_learned`
) -> str:
    "Figures without a verdict."
    turning = [name for name, steps in SCHEMES.items() if any(walk for walk, _ in steps)]
    parts = {
        "with one order throughout": ["one"],
        "where it is only shifted": ["shifted"],
        "where layers take turns with transposed walks": turning,
    }
    def part(task: str, words: str, schemes: Sequence[str]) -> str:
        mark = " (void)" * any((task, scheme) in void for scheme in schemes)
        return f"{_span(rows.loc[task].loc[schemes])} {words}{mark}"
    return "; ".join(
        f"{task}: {', '.join(part(task, *x) for x in parts.items())}"
        for task in EXPLORED["tasks"])


def where_no_layer_turns(frame: pd.DataFrame) -> str: # empty: no run, or not all agree
    "A sentence on Hilbert and rows, if Hilbert ends lower wherever both have learned."
    rows, void = each_seed(frame), not_learned(diversity(frame))
    if rows.empty: return ""
    still = rows.loc[(slice(None), ["one", "shifted"]), :]
    kept = still.drop(index=[setting for setting in still.index if setting in void])
    if kept.empty or not (kept < 0).all(axis=None): return ""
    least, most, seeds = -kept.max(axis=None), -kept.min(axis=None), len(rows.columns)
    names = "; ".join(map(", ".join, kept.index))
    return (f"Without transposed layers both learn more than a guess knows in {len(kept)} of "
            f"{len(still)} settings ({names}): there Hilbert ended {least:.0f} to {most:.0f} % "
            f"below rows, in {seeds} exploratory training{'s' * (seeds > 1)} of each kind.")


def other_patterns(frame: pd.DataFrame) -> Means | None:
    "What is no segment, and Moore's curve, beside all primary arms."
    of = frame.arm.isin(AT_RATE_OF_HILBERT) & frame.task.isin(EXPLORED["tasks"])
    if not of.any(): return None
    return means(with_primary(frame, of, ("task", "seed")), ["task"], "arm")


def positions(frame: pd.DataFrame) -> Means | None:
    "Task and arm against what the rotary embedding turns by."
    of = frame.positions != "grid"
    if not of.any(): return None
    return means(with_primary(frame, of), ["task", "arm"], "positions")


def other_task(frame: pd.DataFrame, name: str) -> Means | None:
    "Losses of a task that is no primary one, and of the best guess."
    tried = frame[frame.task == name]
    if tried.empty: return None
    scheme = tried.scheme.where(tried.scheme != "alternating", "")
    titled = tried.assign(title=(tried.arm + " " + scheme).str.strip())
    guess = tried.assign(loss=tried.guess, guess=np.inf, title="(no learning)")
    found = pd.concat([titled, guess.drop_duplicates("seed")])
    return means(found, ["task"], "title")


def scales(frame: pd.DataFrame) -> Means | None:
    "Task and what is larger, against the arm; `(primary)` is the primary size."
    of = frame.variant.isin(SCALES)
    if not of.any(): return None
    found = with_primary(frame, of)
    found = found.assign(variant=found.variant.replace("", "(primary)"))
    return means(found, ["task", "variant"], "arm")


def same_seconds(frame: pd.DataFrame) -> Means | None:
    "Dense in Hilbert's time, beside both with equal steps."
    of = frame.variant == SAME_SECONDS
    if not of.any(): return None
    found = with_primary(frame, of, ("task", "seed"))
    found = found[found.arm.isin(["dense", "hilbert"])]
    arm = found.arm.where(found.variant == "", f"dense, {SAME_SECONDS}")
    return means(found.assign(arm=arm), ["task"], "arm")


def looks(frame: pd.DataFrame) -> Means | None:
    "Distance to what is attended, over that of equal weights: task and arm against the layer."
    again = (frame.stage == "explore") & plain(frame) & frame.task.isin(EXPLORED["tasks"])
    tried = frame[again].dropna(subset="layers")
    if tried.empty: return None
    long = tried.explode("layers")
    layer = long.groupby(["task", "arm", "seed"]).cumcount() + 1
    distance = long.layers.map(lambda pair: pair[0] / pair[1])
    found = long.assign(loss=distance, guess=np.inf, layer=layer)
    return means(found, ["task", "arm"], "layer")


def trained_again(frame: pd.DataFrame) -> tuple[int, int]: # equal, of how many
    "Primary cells that were trained once more: are the losses the same to the last digit?"
    key = ["task", "arm", "seed"]
    usual = frame[plain(frame)].pivot_table(index=key, columns="stage", values="loss")
    if not {"primary", "explore"} <= set(usual): return 0, 0
    both = usual.dropna()
    return int((both.primary == both.explore).sum()), len(both)
