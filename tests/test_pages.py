"""What the start page, the API page and the benchmark page say is what the package, the stored results and CITATION.cff say."""
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

import hilbert_attn
from hilbert_attn import bench

ROOT = Path(__file__).resolve().parent.parent
GPU_RUN = dict(
    environment=dict(date="2026-01-02T03:04:05+00:00", commit="0123456789abcdef", python="3.12.1", torch="2.11.0", triton="3.6.0", dry_run=False, gpu="NVIDIA X1", capability="9.0", multiprocessors=99,
                     memory_gib=80, cuda="13.0", cudnn=91000, driver="580.1"),
    rates=dict(matmul_tflops=600.0, copy_gbs=4000.0), skipped=[], correctness=dict(cases=321, wrong=["one"]), verdicts=[dict(target="faster", case="N64 w64", kind="forward", measured=2.0, needed=1.0, met=True)],
    rows=[dict(case=dict(name="N64 w64"), kind="forward", name=name, ms=ms, p20=ms, p80=ms, repeats=9, share_of_matmul=0.5, share_of_copy=0.25, peak_mib=7.0) for name, ms in (("triton", 2.0), ("gather + SDPA", 5.0))])


def cells(name: str) -> list:
    return nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells


def said(notebook: list) -> list[str]:
    "All text that cells show, as Markdown where there is such."
    return ["".join(out["data"].get("text/markdown") or out["data"].get("text/plain", "") if "data" in out else out.get("text", "")) for cell in notebook for out in cell.get("outputs", [])]


@pytest.mark.parametrize("name, says, never", [
    ("20_claims_on_trial", [("**not tried**", 11), ("no measurement is stored: run `python tools/", 11), ("run `python tools/run_claims.py papers`", 1)], "**holds**|**holds only|**does not hold**|The share reported"),
    ("21_which_backend_when", [("No run of the suite `crossover` is stored", 4), ("No run of the suite `gpu` is stored", 1)], "the policy agrees|clearly wins"),
    ("23_long_sequences", [("No run is stored yet: `python tools/run_long.py`", 1)], "1,048,576"),
    ("24_benchmarks", [("No run is stored**: `hilbert-attn bench cpu`", 1)], "GFLOP/s|## ")])
def test_pages_say_so_where_nothing_is_stored(name, says, never, tmp_path):
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    stored = "\n".join(said(notebook.cells))
    assert all(word in stored for word in never.split("|"))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("from pathlib import Path\nfrom hilbert_attn.bench import results\nresults.results_folder = lambda: Path('no results')"))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "\n".join(said(notebook.cells))
    for words, count in says: assert text.count(words) >= count, f"{words!r}: {text.count(words)} times"
    assert not [word for word in never.split("|") if word in text]


def test_readme_cites_as_the_citation_file_says():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    entry = dict(re.findall(r"^  (\w+) = \{(.*)\},$", re.search(r"@software\{hilbert_attn,\n(.*?)^\}", (ROOT / "README.md").read_text(), re.M | re.S)[1], re.M))
    assert entry["title"] == f"{{{cff['title']}}}" and entry["license"] == cff["license"]
    assert entry["version"] == str(cff["version"]) == hilbert_attn.__version__
    assert re.findall(r"\{(.*?)\}", entry["author"]) == [author["name"] for author in cff["authors"]]
    if "date-released" in cff: assert entry["year"] == str(cff["date-released"].year) and "note" not in entry
    else: assert "year" not in entry and "Not released yet" in entry["note"]


def test_headline_numbers_are_those_of_the_results():
    run = [run for run in bench.load_runs("cpu") if not run["quick"]][-1]
    rows = {(row["name"], row["direction"]): row for row in bench.bench_rows(run)}
    along, plain = (
        [rows[name, direction]["over_masked"] for direction in bench.FLOPS_PER_PAIR]
        for name in (bench.OURS_HILBERT, bench.OURS)
    )
    readme = (ROOT / "README.md").read_text()
    headline = "as fast along the Hilbert curve as SDPA with a dense mask"
    assert f"**{along[0]:.0f}x, {along[1]:.0f}x** | {headline}" in readme
    assert f"({plain[0]:.0f}x, {plain[1]:.0f}x without an order)" in readme


def test_the_headline_names_the_contender_that_users_write_themselves(results):
    "Stored or not yet stored: in either case it is in the headline and in the table."
    path = next(results.glob("*/cpu.json"))
    runs = json.loads(path.read_text())
    for row in [row for row in runs[-1]["rows"] if row["name"] in (bench.RESHAPED, bench.GATHERED)]:
        runs[-1]["rows"].remove(row)
    path.write_text(json.dumps(runs))
    before = start_page()
    assert "(gather + SDPA + scatter) is not measured yet: `hilbert-attn bench cpu` does it" in before
    assert "are not in this stored run yet" in before
    for name, ours in ((bench.RESHAPED, bench.OURS), (bench.GATHERED, bench.OURS_HILBERT)):
        found = [row for row in runs[-1]["rows"] if row["name"] == ours]
        runs[-1]["rows"] += [row | dict(name=name, median=1.25 * row["median"]) for row in found]
    path.write_text(json.dumps(runs))
    after = start_page()
    assert "it is 1.25x, 1.25x as fast as the same groups made by hand (gather + SDPA + scatter)" in after
    assert "and 1.25x, 1.25x without an order (reshape + SDPA)" in after
    assert after.count("not measured yet") < before.count("not measured yet")
    assert f"| {bench.GATHERED} |" in after and "are not in this stored run yet" not in after


def start_page() -> str:
    "What the cells of the start page that quote the suite `cpu` show."
    names = dict(Path=Path, json=json, re=re, hilbert_attn=hilbert_attn, said=[])
    names |= {name: getattr(bench, name) for name in dir(bench) if not name.startswith("__")}
    names["Markdown"] = names["said"].append
    for cell in cells("index"):
        quotes = re.search(r'newest\("cpu"\)|\btable\b|facts|times_of', cell.source)
        if cell.cell_type == "code" and quotes: exec(cell.source, names)
    return "\n".join(names["said"])


def verdict_of(number: int, figures: dict) -> str:
    "The verdict that 20_claims_on_trial gives to these figures."
    names = page("20_claims_on_trial", "verdict on a CPU")
    judge = next(entry[4] for entry in names["CLAIMS"] if entry[0] == number)
    return judge(figures)[0]


def test_a_claim_holds_only_where_its_figure_is_reached():
    timing = dict(median=1.0, p20=1.0, p80=1.0, repeats=3)
    times = dict(manual=timing, SDPA=timing)
    for warm, cold, verdict in ((1.2, 4.9, "does not"), (1.2, 41, "holds only"), (40, 41, "holds")):
        figures = dict(times=times, ratio=warm, cold=dict(first=dict(manual=cold, sdpa=1)))
        assert verdict_of(1, figures).startswith(verdict)
    for rate, verdict in ((359e3, "does not hold"), (823e3, "holds")):
        seconds = dict(median=2**20 / rate, peak_extra_bytes=1)
        row = dict(kind="segments", tokens=2**20, errors=dict(out=1e-7), rows_with_output=1, rows_checked=9)
        row |= {"forward": seconds, "forward+backward": seconds}
        assert verdict_of(10, dict(rows=[row], config=dict(heads=1, head_dim=64))) == verdict


def test_the_verdict_on_lengths_follows_from_what_ran(monkeypatch):
    "Claim 9, with runs in which masks win to 8K, and nothing longer than was claimed was ever run."
    crossover = bench.load_runs("crossover")[-1]
    assert verdict_of(9, crossover) == "does not hold"
    wins = [dict(row, tokens=8192 * (row["tokens"] == 64) + row["tokens"]) for row in crossover["rows"] if row["tokens"] <= 64]
    longer = crossover | dict(rows=wins, config=crossover["config"] | dict(tokens=[16, 32, 48, 8256]))
    assert verdict_of(9, longer).startswith("holds only")
    shorter = {"long": [], "memory": []}
    stored = bench.load_runs
    monkeypatch.setattr(bench, "load_runs", lambda suite, *rest: shorter.get(suite, stored(suite, *rest)))
    assert verdict_of(9, longer) == "holds"


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    "A folder of results that holds a GPU's file as `make gpu` writes it, and two suites of a CPU."
    for machine in sorted((ROOT / "nbs" / "results").iterdir()):
        if not (machine / "cpu.json").exists(): continue
        (tmp_path / machine.name).mkdir()
        for suite in ("cpu", "long"): shutil.copy(machine / f"{suite}.json", tmp_path / machine.name)
        break
    (tmp_path / "nvidia-x1").mkdir()
    (tmp_path / "nvidia-x1" / "gpu_run.json").write_text(json.dumps(GPU_RUN))
    monkeypatch.setattr(bench.results, "results_folder", lambda: tmp_path)
    return tmp_path


def test_what_make_gpu_stored_is_a_run(results):
    (run,) = bench.load_runs("gpu")
    assert run["environment"] == dict(date="2026-01-02 03:04 UTC", commit="0123456789", python="3.12.1", torch="2.11.0", triton="3.6.0", gpu="NVIDIA X1", capability="9.0", multiprocessors=99, gpu_memory_gib=80,
                                      cuda="13.0", cudnn=91000, driver="580.1")  # its own machine, not this one
    assert bench.machine_slug(run["environment"]) == "nvidia-x1"
    assert bench.describe_environment(run["environment"]) == "NVIDIA X1, torch 2.11.0, Python 3.12.1, hilbert_attn at 0123456789, 2026-01-02 03:04 UTC"
    assert [row["relative"] for row in bench.race_rows(run, "triton")] == [1.0, 2.5]
    assert bench.latest_runs("gpu") == [run] and "gpu" not in bench.load_runs("cpu")[0]["environment"]


def page(name: str, until: str) -> dict:
    "The names that a notebook's code cells define, up to the one that shows `until`."
    names = {}
    for cell in cells(name):
        if cell.cell_type != "code": continue
        if until in cell.source: return names
        exec(compile("\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")), name, "exec"), names)
    raise AssertionError(f"no cell of {name} has {until!r}")


def test_the_benchmark_page_takes_up_a_new_machine(results):
    parts = list(page("24_benchmarks", "for part in sections()")["sections"]())
    text = [part if isinstance(part, str) else f"<{part['suite']}>" for part in parts]
    heads = [part for part in text if part.startswith("## ")]
    assert heads[0] == "## NVIDIA X1" and len(heads) == 2
    gpu, cpu = "\n".join(text).split(heads[1])
    assert "80 GiB on the GPU" in gpu and "600,000 GFLOP/s" in gpu and "driver 580.1" in gpu and "321 cases against the oracle, 1 outside the tolerance" in gpu and "<gpu>" in gpu
    assert "| N64 w64 | forward | gather + SDPA | 5.00 | 5.00 | 5.00 | 2.50 |" in gpu
    assert "<cpu>" in cpu and "[23_long_sequences](23_long_sequences.ipynb)" in cpu
    missing = {head: {*re.findall("`(\\w+)`", part.rpartition("Not measured on this machine:")[2])} for head, part in (("gpu", gpu), ("cpu", cpu))}
    assert missing == dict(gpu={*bench.SUITES} - {"gpu"}, cpu={*bench.SUITES} - {"cpu"})


def test_the_start_page_takes_up_a_gpu(results):
    (cell,) = (cell for cell in cells("index") if "def on_gpu" in cell.source)
    names = dict(latest_runs=bench.latest_runs, race_rows=bench.race_rows, Markdown=str)
    exec(cell.source.replace("\nMarkdown(", "\nsaid = Markdown("), names)
    assert names["said"] == "On NVIDIA X1, the fused kernels are 2.5 to 2.5 times as fast as gathering and calling SDPA, forward, over 1 settings ([24_benchmarks](24_benchmarks.ipynb))."


def test_the_benchmark_page_without_results(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.results, "results_folder", lambda: tmp_path)
    assert list(page("24_benchmarks", "for part in sections()")["sections"]()) == ["**No run is stored**: `hilbert-attn bench cpu` measures this machine."]
