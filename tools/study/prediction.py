"Does geometry explain the losses? A plane through two tasks, tried on the third."
import numpy as np
import pandas as pd

from .arms import ARMS, Arm
from .mechanism import near_share, receptive_field
from .network import Size
from .plan import TASKS

SPARSE = tuple(arm for arm in ARMS if arm != "dense")


def features(arm: str, task: str) -> tuple[float, float]:
    "Neighbours together in two layers, and pairs connected after all layers of the network."
    made = TASKS[task](0)
    return near_share(Arm(arm), made), receptive_field(Arm(arm), made, Size().layers)[-1]


def observed(rows: pd.DataFrame) -> pd.DataFrame: # a row for each sparse arm and task
    "Mean log ratio of an arm's loss to that of dense attention, and the arm's geometry."
    found = []
    for task in TASKS:
        mine = rows[rows.task == task]
        table = mine.pivot(index=["seed", "picture"], columns="arm", values="loss")
        table = table.reindex(columns=list(ARMS)).dropna()
        if table.empty: continue
        for arm in SPARSE:
            excess = float(np.log(table[arm] / table["dense"]).mean())
            near, connected = features(arm, task)
            found.append(dict(task=task, arm=arm, excess=excess, near=near, connected=connected))
    return pd.DataFrame(found)


def held_out(seen: pd.DataFrame) -> pd.DataFrame: # `seen` with a column `predicted`
    "Each task predicted from a plane fitted to the others, whose losses have a level of their own."
    parts = []
    for task in seen.task.unique():
        fit, mine = seen[seen.task != task], seen[seen.task == task]
        slope = np.linalg.lstsq(_centred(fit, ["near", "connected"]),
                                _centred(fit, ["excess"])[:, 0], rcond=None)[0]
        predicted = _centred(mine, ["near", "connected"]) @ slope
        parts.append(mine.assign(predicted=predicted, relative=_centred(mine, ["excess"])[:, 0]))
    return pd.concat(parts)


def _centred(rows: pd.DataFrame, columns: list[str]) -> np.ndarray:
    "Without the mean of each task."
    values = rows[columns] - rows.groupby("task")[columns].transform("mean")
    return values.to_numpy()


def by_name(predicted: pd.DataFrame) -> pd.DataFrame: # the same, with other predictions
    "Without any geometry: an arm is as good as on average on the other tasks."
    def elsewhere(row):
        others = (predicted.task != row.task) & (predicted.arm == row.arm)
        return predicted.relative[others].mean()

    return predicted.assign(predicted=predicted.apply(elsewhere, axis=1))


def explained(predicted: pd.DataFrame) -> pd.Series: # by task; 1 is all, 0 or less is nothing
    "Share of the differences between arms that was predicted."
    def share(part):
        rest = ((part.relative - part.predicted) ** 2).sum()
        return 1 - rest / (part.relative ** 2).sum()

    return pd.Series({task: share(part) for task, part in predicted.groupby("task")})
