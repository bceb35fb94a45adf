"""The rows of all parts as one file, `gpu_run.json`, and what they say about the targets."""
import json
from pathlib import Path

from hilbert_attn.bench.gpu_model import Blocks, Work, gpu_of, is_predicted, predicted_ms

from .cases import FLUX

FORWARD, BOTH = "forward", "forward+backward"
DENSE, GIVEN, GATHER = "cudnn, dense N x N", "cudnn, groups given", "gather + SDPA"
FLEX = "flex", "flex, flash"


def minimal_bytes(case: dict, kind: str, size: int = 2) -> int:
    "The least that has to be moved: each tensor once."
    q = case["h"] * case["n"] * case["d"] * size
    kv = case["kv"] * case["n"] * case["d"] * size
    forward = 2 * q + 2 * kv
    backward = (3 * q + 2 * kv) + (q + 2 * kv)  # q, o, do, k, v in; dq, dk, dv out
    return forward + backward * (kind == BOTH)


def with_shares(row: dict, rates: dict) -> dict:
    "A timed row, with what it reached of the device's own rates."
    case, ms = row["case"], row["ms"]
    flops = row["pairs"] * 4 * case["d"] * (3.5 if row["kind"] == BOTH else 1)
    tflops, gbs = flops / ms / 1e9, minimal_bytes(case, row["kind"]) / ms / 1e6
    return row | dict(
        tflops=tflops, share_of_matmul=tflops / rates["matmul_tflops"], gbs_minimal=gbs,
        share_of_copy=gbs / rates["copy_gbs"])


def work_of(row: dict) -> Work | None:
    "What the model is told of a row; nothing where the row doesn't say what was walked."
    case = row["case"]
    shape = case["n"], case["h"], case["kv"], case["d"]
    if "pattern" not in case:
        return Work(*shape, case["w"] // case["r"], row["pairs"], case["order"])
    if "walked" not in row: return None
    numbers = dict(row["walked"])
    order, size = numbers.pop("order"), tuple(numbers.pop("size"))
    return Work(*shape, 0, row["pairs"], order, Blocks(size=size, **numbers))


def with_prediction(row: dict, device_name: str) -> dict:
    "A timed row of our kernels, with what paper says; other rows as they are."
    gpu = gpu_of(device_name)
    work = work_of(row) if gpu and row["name"] == "triton" else None
    if work is None or not is_predicted(gpu, work): return row
    return row | dict(predicted_ms=predicted_ms(gpu, work, row["kind"]))


def beside(row: dict) -> str:
    "Prediction and measurement in a line."
    return (f"{row['case']['name']:40} {row['kind']:17} predicted {row['predicted_ms']:.3f} ms, "
            f"measured {row['ms']:.3f}")


class Times:
    "Milliseconds by case, kind and name."
    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.known = {(r["case"]["name"], r["kind"], r["name"]): r for r in rows}

    def row(self, case: str, kind: str, name: str) -> dict | None:
        return self.known.get((case, kind, name))

    def ms(self, case: str, kind: str, name: str) -> float | None:
        row = self.row(case, kind, name)
        return row and row["ms"]

    def least(self, case: str, kind: str, names: tuple[str, ...]) -> float | None:
        return min((r["ms"] for r in (self.row(case, kind, n) for n in names) if r), default=None)

    def backward(self, case: str, name: str) -> float | None:
        both, forward = (self.ms(case, kind, name) for kind in (BOTH, FORWARD))
        return both - forward if both and forward else None


def judged(row: dict, target: str, value: float | None, needed: float) -> list[dict]:
    if value is None: return []
    return [dict(target=target, case=row["case"]["name"], kind=row["kind"], measured=value,
                 needed=needed, met=value >= needed)]


def ratio(a: float | None, b: float | None) -> float | None: return a / b if a and b else None


def segment_verdicts(row: dict, times: Times) -> list[dict]:
    "The targets for segments, as set for an H200."
    case, kind, ms = row["case"], row["kind"], row["ms"]
    name, keys = case["name"], case["w"] // case["r"]
    found = []
    if keys >= 1024 and kind == FORWARD:
        found += judged(row, "share of cuDNN's rate on given groups, forward",
                        ratio(times.ms(name, kind, GIVEN), ms), 0.9)
    if keys >= 1024 and kind == BOTH:
        share = ratio(times.backward(name, GIVEN), times.backward(name, "triton"))
        found += judged(row, "share of cuDNN's rate on given groups, backward", share, 0.75)
    if keys <= 512:
        found += judged(row, "times faster than gather + SDPA",
                        ratio(times.ms(name, kind, GATHER), ms), 1.0)
    if keys <= 128:
        found += judged(row, "share of the copy rate on minimal bytes", row["share_of_copy"], 0.7)
    if case["n"] == 8192 and kind == BOTH:
        found += judged(row, "times faster than sdpa_mask",
                        ratio(times.ms(name, kind, "sdpa_mask"), ms), 40)
    return found + flex_verdict(row, times)


def flex_verdict(row: dict, times: Times) -> list[dict]:
    "Never behind FlexAttention; both move tokens, where they do, within the time."
    best = times.least(row["case"]["name"], row["kind"], FLEX)
    return judged(row, f"times faster than FlexAttention, {row['name']}",
                  ratio(best, row["ms"]), 1.0)


def block_verdicts(row: dict, times: Times) -> list[dict]:
    "The targets for blocks: a share of what the number of pairs allows over dense attention."
    case, kind = row["case"], row["kind"]
    ceiling = case["n"] ** 2 * case["h"] / row["pairs"]
    if kind == FORWARD:
        faster = ratio(times.ms(case["name"], kind, DENSE), row["ms"])
        needed = 0.95 if "around" in case else 0.9
    else:
        dense, ours = (times.backward(case["name"], name) for name in (DENSE, row["name"]))
        faster, needed = ratio(dense, ours), 0.8
    target = f"share of the pair-count ceiling, {row['name']}"
    found = judged(row, target, faster and faster / ceiling, needed) + flex_verdict(row, times)
    if kind == FORWARD and case["name"].startswith(FLUX):
        found += judged(row, f"times faster than dense attention, {row['name']}", faster, 5.2)
    return found


def verdicts(rows: list[dict]) -> list[dict]:
    times, found = Times(rows), []
    for row in rows:
        case = row["case"]
        if not row["name"].startswith("triton") or row["name"].endswith("laid out"): continue
        if case["kv"] != case["h"] or case.get("causal"): continue
        found += block_verdicts(row, times) if "pattern" in case else segment_verdicts(row, times)
    return found


def gather(rows: list[dict], left: list[str]) -> dict:
    "What the benchmark page reads."
    newest = {}
    for row in rows:
        if "ms" in row and "kind" in row:
            newest[row["case"]["name"], row["kind"], row["name"]] = row
    rates = next((row["rates"] for row in reversed(rows) if "rates" in row), None)
    environment = next(row["environment"] for row in rows if "environment" in row)
    timed = [with_shares(row, rates) for row in newest.values()] if rates else []
    timed = [with_prediction(row, environment.get("gpu", "")) for row in timed]
    checks = [row for row in rows if "wrong" in row]
    wrong = [f"{row['case']}: {row.get('report', '')}" for row in checks
             if row["wrong"] or row.get("inexact")]
    failed = [f"{row['task']}: {row['failed']}" for row in rows if "failed" in row]
    return dict(environment=environment, rates=rates, rows=timed, verdicts=verdicts(timed),
                skipped=failed + left, correctness=dict(cases=len(checks), wrong=wrong))


def write(rows: list[dict], left: list[str], folder: Path) -> Path | None:
    "The file, once device rates and an environment are known."
    if not any("rates" in row for row in rows): return None
    if not any("environment" in row for row in rows): return None
    path = folder / "gpu_run.json"
    path.write_text(json.dumps(gather(rows, left), indent=1) + "\n")
    return path
