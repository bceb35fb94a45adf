"""Checks of the exercises at the end of the lessons: they say what is wrong, and raise nothing."""
from functools import wraps

import torch

UNSOLVED = "Not solved yet."


class Verdict(str):
    "A sentence that is shown without quotes."
    def __repr__(self): return str(self)


def exercise(check):
    "A check returns what is wrong with an answer, or nothing."
    @wraps(check)
    def verdict(answer=...) -> Verdict:
        if answer is ...: return Verdict(UNSOLVED)
        try: wrong = check(answer)
        except NotImplementedError: return Verdict(UNSOLVED)
        except Exception as error: wrong = f"it raises {type(error).__name__}: {error}"
        return Verdict(f"Not yet: {wrong}" if wrong else "Right.")
    return verdict


def differs(found, expected, case: str, tolerance: float = 1e-9) -> str | None:
    "How a result is not the expected one."
    if found is None: return f"{case}: nothing is returned"
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    if found.shape != expected.shape:
        return f"{case}: the shape is {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        wrong = int((found != expected).sum())
        return f"{case}: {wrong} of {expected.numel()} entries are wrong" if wrong else None
    if found.isnan().any(): return f"{case}: there are NaNs"
    same = (found == expected) | ((found - expected).abs() <= tolerance)
    if same.all(): return None
    return f"{case}: off by {(found - expected)[~same].abs().max():.2g}"


def first(complaints) -> str | None:
    "The first thing that is wrong."
    return next((words for words in complaints if words), None)
