"What the exploratory trainings say: tables without verdicts."
from collections.abc import Iterable, Sequence

import pandas as pd

from .arms import ARMS, AT_RATE_OF_HILBERT, SCHEMES, Arm
from .plan import EXPLORED, SAME_SECONDS, SCALES

COPIED = ("stage", "task", "seed", "loss") # from a run
READ = ("arm", "scheme", "positions", "variant", "guess", "layers")


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
) -> tuple[pd.DataFrame, int]: # losses, and the seeds that they are means of
    "Mean loss over the seeds of which every cell of the table is stored."
    wide = frame.pivot_table(index="seed", columns=[*index, columns], values="loss")
    cells = pd.MultiIndex.from_product(wide.columns.levels, names=wide.columns.names)
    whole = wide.reindex(columns=cells).dropna()
    return whole.mean().unstack(columns), len(whole)


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


def diversity(frame: pd.DataFrame) -> tuple[pd.DataFrame, int] | None:
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
    whole = {seed: found[0] for seed, found in tried.items() if found and found[1]}
    return pd.DataFrame({
        seed: hilbert_over_rows(table).unstack()
        for seed, table in whole.items()
    })


def _span(values: pd.DataFrame) -> str:
    "From the least to the most."
    ends = [f"{x:+.0f}" for x in (values.min(axis=None), values.max(axis=None))]
    return f"{' to '.join(dict.fromkeys(ends))} %"


def in_words(rows: pd.DataFrame) -> str: # of `each_seed`
    "Figures without a verdict."
    turning = [name for name, steps in SCHEMES.items() if any(walk for walk, _ in steps)]
    return "; ".join(
        f"{task}: {_span(of.loc[['one']])} with one order throughout, "
        f"{_span(of.loc[['shifted']])} where it is only shifted, "
        f"{_span(of.loc[turning])} where layers take turns with transposed walks"
        for task, of in ((task, rows.loc[task]) for task in EXPLORED["tasks"]))


def where_no_layer_turns(frame: pd.DataFrame) -> str: # empty: no run, or not all agree
    "A sentence on Hilbert and rows, if Hilbert ends lower wherever no layer is transposed."
    rows = each_seed(frame)
    if rows.empty: return ""
    kept = rows.loc[(slice(None), ["one", "shifted"]), :]
    if not (kept < 0).all(axis=None): return ""
    least, most, seeds = -kept.max(axis=None), -kept.min(axis=None), len(rows.columns)
    return (f"Where no layer is transposed Hilbert ended {least:.0f} to {most:.0f} % below rows, "
            f"in {seeds} exploratory training{'s' * (seeds > 1)} of each kind.")


def other_patterns(frame: pd.DataFrame) -> tuple[pd.DataFrame, int] | None:
    "What is no segment, and Moore's curve, beside all primary arms."
    of = frame.arm.isin(AT_RATE_OF_HILBERT) & frame.task.isin(EXPLORED["tasks"])
    if not of.any(): return None
    return means(with_primary(frame, of, ("task", "seed")), ["task"], "arm")


def positions(frame: pd.DataFrame) -> tuple[pd.DataFrame, int] | None:
    "Task and arm against what the rotary embedding turns by."
    of = frame.positions != "grid"
    if not of.any(): return None
    return means(with_primary(frame, of), ["task", "arm"], "positions")


def other_task(frame: pd.DataFrame, name: str) -> tuple[pd.DataFrame, int] | None:
    "Losses of a task that is no primary one, and of the best guess."
    tried = frame[frame.task == name]
    if tried.empty: return None
    scheme = tried.scheme.where(tried.scheme != "alternating", "")
    titled = tried.assign(title=(tried.arm + " " + scheme).str.strip())
    guess = tried.assign(loss=tried.guess, title="(no learning)")
    found = pd.concat([titled, guess.drop_duplicates("seed")])
    return means(found, ["task"], "title")


def scales(frame: pd.DataFrame) -> tuple[pd.DataFrame, int] | None:
    "Task and what is larger, against the arm; `(primary)` is the primary size."
    of = frame.variant.isin(SCALES)
    if not of.any(): return None
    found = with_primary(frame, of)
    found = found.assign(variant=found.variant.replace("", "(primary)"))
    return means(found, ["task", "variant"], "arm")


def same_seconds(frame: pd.DataFrame) -> tuple[pd.DataFrame, int] | None:
    "Dense in Hilbert's time, beside both with equal steps."
    of = frame.variant == SAME_SECONDS
    if not of.any(): return None
    found = with_primary(frame, of, ("task", "seed"))
    found = found[found.arm.isin(["dense", "hilbert"])]
    arm = found.arm.where(found.variant == "", f"dense, {SAME_SECONDS}")
    return means(found.assign(arm=arm), ["task"], "arm")


def looks(frame: pd.DataFrame) -> tuple[pd.DataFrame, int] | None:
    "Distance to what is attended, over that of equal weights: task and arm against the layer."
    again = (frame.stage == "explore") & plain(frame) & frame.task.isin(EXPLORED["tasks"])
    tried = frame[again].dropna(subset="layers")
    if tried.empty: return None
    long = tried.explode("layers")
    layer = long.groupby(["task", "arm", "seed"]).cumcount() + 1
    distance = long.layers.map(lambda pair: pair[0] / pair[1])
    found = long.assign(loss=distance, layer=layer)
    return means(found, ["task", "arm"], "layer")


def trained_again(frame: pd.DataFrame) -> tuple[int, int]: # equal, of how many
    "Primary cells that were trained once more: are the losses the same to the last digit?"
    key = ["task", "arm", "seed"]
    usual = frame[plain(frame)].pivot_table(index=key, columns="stage", values="loss")
    if not {"primary", "explore"} <= set(usual): return 0, 0
    both = usual.dropna()
    return int((both.primary == both.explore).sum()), len(both)
