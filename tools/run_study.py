"""Trains what the study has not stored yet: `python tools/run_study.py`.

One JSON a training goes to nbs/results/study; interrupted, it goes on where it stopped. `--only
photos/hilbert` trains one task or one arm of it, `--status` says what is stored, `--check 10`
trains ten stored cells again and compares every digit, `--times` measures the seconds of a step
(on a machine that does nothing else), `--quick` trains toys into `--out`.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from study.plan import FULL, QUICK, TASKS, Plan
from study.runner import missing, needs_clean_code, reproduce, run_study, wanted
from study.store import load_stage, save_times, study_folder
from study.timing import measure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a task, or task/arm")
    parser.add_argument("--status", action="store_true", help="what is stored, and what is left")
    parser.add_argument("--check", type=int, metavar="N", help="train N stored cells again")
    parser.add_argument("--draw", type=int, default=0, help="which cells --check draws")
    parser.add_argument("--explore", action="store_true", help="exploratory trainings too")
    parser.add_argument("--times", action="store_true", help="measure the seconds of a step")
    parser.add_argument("--quick", action="store_true", help="toys; needs --out")
    parser.add_argument("--out", type=Path, help="a folder instead of nbs/results/study")
    found = parser.parse_args()
    if found.quick and not found.out: parser.error("--quick needs --out: toys are no results")
    return found


def stages(plan: Plan) -> list:
    "Names and cells."
    return [("tune", plan.tuning()), ("primary", plan.primary()), ("explore", plan.exploratory())]


def status(plan: Plan, folder: Path) -> str:
    "Runs stored and left, and the seconds that the rest will take on one idle core."
    lines = []
    for stage, cells in stages(plan):
        runs = load_stage(stage, folder)
        mean = sum(run["seconds"] for run in runs) / max(1, len(runs))
        left = len(missing(cells, folder))
        rest = f", about {left * mean / 3600:.1f} hours of one core" if runs else ""
        lines.append(f"{stage}: {len(cells) - left} of {len(cells)} stored{rest}")
    return "\n".join(lines)


def main() -> int:
    "The command."
    options = arguments()
    plan, folder = QUICK if options.quick else FULL, options.out or study_folder()
    log = partial(print, flush=True)
    if options.status:
        log(status(plan, folder))
        return 0
    if not options.quick: needs_clean_code()
    if options.times:
        measured = measure(plan, TASKS, rounds=2 if options.quick else 40)
        save_times(measured, folder)
        return 0
    if options.check is not None:
        return len(reproduce(plan, folder, options.check, options.draw, log))
    cells = [cell for _, some in stages(plan)[:2 + options.explore] for cell in some]
    try: wanted(cells, options.only)
    except ValueError as error: sys.exit(str(error))
    run_study(plan, folder, options.only, log=log, explore=options.explore)
    return 0


if __name__ == "__main__": sys.exit(main())
