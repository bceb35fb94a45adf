"""Correctness, then speed, on this machine's NVIDIA GPU: `make gpu PART=1`, then 2, then 3.

Needs python3 with torch, triton and numpy, nothing else; git, ncu and compute-sanitizer are used
where they are found. A part takes at most nine minutes and stops by itself: each row is stored when
it is measured, and the same command goes on with what is left. Rows go to `$OUT` if that is set,
else to `nbs/results/<gpu>/`, as `gpu_part1.jsonl` and so on, and together as `gpu_run.json`.

`--dry-run` goes through the motions on a CPU, in Triton's interpreter, at toy sizes; without OUT it
leaves nothing behind.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
if "--dry-run" in sys.argv: os.environ["TRITON_INTERPRET"] = "1"

from gpu.session import LOST, Clock, ContextLost, Store, set_aside, watch, work


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--minutes", type=float, default=9, help="of this part, at most")
    parser.add_argument("--again", action="store_true", help="not going on with stored rows")
    parser.add_argument("--only", default="", help="tasks whose names hold this")
    parser.add_argument("--launch", nargs=2, metavar=("SIZE", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=3, type=float, metavar=("START", "LIMIT", "PARENT"),
                        help=argparse.SUPPRESS)
    return parser.parse_args()


def slug() -> str:
    "The GPU's name as a folder's; asked without loading torch."
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try: said = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except OSError: said = ""
    if said.strip(): return "-".join(said.splitlines()[0].lower().split())
    import torch
    if not torch.cuda.is_available(): sys.exit(
        "no NVIDIA GPU here: `python3 tools/gpu_run.py --dry-run` goes through the motions")
    return "-".join(torch.cuda.get_device_name(0).lower().split())


def folders(dry: bool) -> tuple[Path, Path]:
    "Where results go, and where state is kept between parts: compiled kernels, tuned tiles, rows."
    if dry:
        chosen = os.environ.get("OUT") or os.environ.get("GPU_DRY_STATE")
        folder = Path(chosen or tempfile.mkdtemp(prefix="gpu_dry_"))
        os.environ["GPU_DRY_STATE"] = str(folder)
        return folder, folder / "state"
    name = slug()
    results = Path(os.environ.get("OUT") or ROOT / "nbs" / "results" / name)
    return results, ROOT / "out" / "gpu" / name


def paths(part: int, results: Path, state: Path) -> list[Path]:
    return [folder / f"gpu_part{part}.jsonl" for folder in (results, state)]


def sources() -> str:
    "A name for the code that is measured: rows of other code are not gone on with."
    files = [*(ROOT / "hilbert_attn").rglob("*.py"), *(ROOT / "tools" / "gpu").glob("*.py")]
    return sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def planned(options: argparse.Namespace) -> list:
    from gpu.parts import plan
    from gpu.toys import small_version
    tasks = plan(options.part, os.cpu_count() or 2)
    if options.dry_run: tasks = small_version(tasks)
    return [task for task in tasks if options.only in task.key]


def be_worker(options: argparse.Namespace, results: Path, state: Path) -> int:
    "Does the tasks."
    os.environ.setdefault("TRITON_CACHE_DIR", str(state / "triton"))
    from gpu.machine import Machine
    start, limit, parent = options.worker
    store = Store(*paths(options.part, results, state))
    earlier = [row for part in (1, 2, 3) if part != options.part
               for row in Store(*paths(part, results, state)).rows]
    device = Machine(store, state, os.cpu_count() or 2, earlier)
    try:
        left = work(planned(options), device, store, Clock(limit, start=start),
                    lambda text: print(text, flush=True), lambda: os.getppid() != parent)
    except ContextLost as lost:
        print(f"the GPU was lost in {lost}; another process goes on", flush=True)
        device.stop()
        os._exit(LOST)  # what still lies on that GPU could not be freed without an abort
    finally:
        device.stop()
    if left: print(f"{len(left)} tasks left for another run: {', '.join(left)}", flush=True)
    return 0


def summarise(results: Path, state: Path, dry: bool) -> int:
    "Writes gpu_run.json, prints what one wants to see last."
    from gpu.report import beside, write
    stores = [Store(*paths(part, results, state)) for part in (1, 2, 3)]
    rows = [row for store in stores for row in store.measured()]
    left = [f"not measured: {key}" for store in stores for key in (store.of("left") or [{}])[-1]
            .get("tasks", ())]
    path = write(rows, left, results)
    failed = [row for row in rows if "failed" in row]
    wrong = [row for row in rows if row.get("wrong")]
    for row in failed[-20:]: print("FAILED", row["task"], row["failed"][:160])
    for row in wrong: print("WRONG", row["case"], row["wrong"])
    if path:
        told = json.loads(path.read_text())
        for row in told["rows"]:
            if "predicted_ms" in row: print(beside(row))
        for v in () if dry else told["verdicts"]:
            words = f"{v['case']:40} {v['kind']:17} {v['target']}"
            met = "met   " if v["met"] else "MISSED"
            print(met, words, f"{v['measured']:.2f} of {v['needed']}")
    print(f"{len(rows)} rows, {len(failed)} failed, {len(wrong)} wrong, in {path or results}")
    return 1 if wrong else 0


def main() -> int:
    options = arguments()
    if options.launch:
        from gpu.outside import launch
        launch(*options.launch)
        return 0
    if options.dry_run and not options.worker:
        from gpu.toys import why_not
        if why := why_not():
            print(f"no dry run: {why}")
            return 0
    results, state = folders(options.dry_run)
    if options.worker: return be_worker(options, results, state)
    clock, tasks = Clock(options.minutes * 60 - 15), planned(options)
    worker = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    worker += ["--worker", str(clock.start), str(clock.limit), str(os.getpid())]
    files, stamp = paths(options.part, results, state), sources()
    set_aside(files, stamp, options.again)
    for part in {1, 2, 3} - {options.part}:
        set_aside([path for path in paths(part, results, state) if path.exists()], stamp)
    seconds = {task.key: task.seconds for task in tasks}
    for news in watch(lambda: subprocess.Popen(worker, process_group=0), files, seconds, clock):
        print(news, flush=True)
    print(f"part {options.part} took {clock.elapsed():.0f} s", flush=True)
    return summarise(results, state, options.dry_run)


if __name__ == "__main__": sys.exit(main())
