"""What pages say is what the package, the stored results and CITATION.cff say."""
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from notebook_runs import run_notebook, said

import hilbert_attn
from hilbert_attn import bench

ROOT = Path(__file__).resolve().parent.parent
GPU_ENVIRONMENT = dict(
    date="2026-01-02T03:04:05+00:00",
    commit="0123456789abcdef",
    python="3.12.1",
    torch="2.11.0",
    triton="3.6.0",
    dry_run=False,
    gpu="NVIDIA X1",
    capability="9.0",
    multiprocessors=99,
    memory_gib=80,
    cuda="13.0",
    cudnn=91000,
    driver="580.1",
)


def gpu_row(name: str, ms: float) -> dict:
    "A line of the file that `make gpu` writes."
    times = dict(ms=ms, p20=ms, p80=ms, repeats=9)
    shares = dict(share_of_matmul=0.5, share_of_copy=0.25, peak_mib=7.0)
    return dict(case=dict(name="N64 w64"), kind="forward", name=name, **times, **shares)


GPU_TARGET = dict(case="N64 w64", kind="forward", target="faster", measured=2.0, needed=1.0)
GPU_RUN = dict(
    environment=GPU_ENVIRONMENT,
    rates=dict(matmul_tflops=600.0, copy_gbs=4000.0),
    skipped=[],
    correctness=dict(cases=321, wrong=["one"]),
    verdicts=[GPU_TARGET | dict(met=True)],
    rows=[gpu_row("triton", 2.0), gpu_row("gather + SDPA", 5.0)],
)


def cells(name: str) -> list:
    return nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells


INVERTED = re.compile(
    r"\b[Dd]ark(er)?(:| what)|\bthe (black|white) (one|ones|line|cells|tiles)\b"
)
UNCHANGED = {"26_study_results", "16b_pictures"}  # photos, which the dark does not turn around


def test_words_about_drawings_hold_on_a_dark_page():
    "There black lines are white, and pale is dark."
    notebooks = {path.stem: cells(path.stem) for path in (ROOT / "nbs").glob("*.ipynb")}
    said = {
        name: match[0]
        for name, shown in notebooks.items()
        for cell in shown
        if cell.cell_type == "markdown" and (match := INVERTED.search(cell.source))
    }
    assert not {name: words for name, words in said.items() if name not in UNCHANGED}


NOTHING_STORED = """
from pathlib import Path
from hilbert_attn.bench import results
results.results_folder = lambda: Path('no results')
"""
SAYS = { # notebook -> what it says without results, at least so often
    "20_claims_on_trial": {
        "**not tried**": 11,
        "no measurement is stored: run `python tools/": 11,
        "run `python tools/run_claims.py papers`": 1,
    },
    "21_which_backend_when": {
        "No run of the suite `crossover` is stored": 4,
        "No run of the suite `gpu` is stored": 1,
    },
    "23_long_sequences": {"No run is stored yet: `python tools/run_long.py`": 1},
    "24_benchmarks": {"No run is stored**: `hilbert-attn bench cpu`": 1},
}
NEVER = { # notebook -> what it says only with results
    "20_claims_on_trial": [
        "**holds", "**does not hold**", "The share reported",
    ],
    "21_which_backend_when": ["the policy agrees", "clearly wins"],
    "23_long_sequences": ["1,048,576"],
    "24_benchmarks": ["GFLOP/s", "## "],
}


@pytest.mark.parametrize("name", SAYS)
def test_pages_say_so_where_nothing_is_stored(name, tmp_path):
    kinds = "text/markdown", "text/plain"
    outputs = [out for cell in cells(name) for out in cell.get("outputs", [])]
    stored = "\n".join(said(outputs, *kinds))
    assert all(words in stored for words in NEVER[name])
    path = ROOT / "nbs" / f"{name}.ipynb"
    text = "\n".join(said(run_notebook(path, tmp_path, NOTHING_STORED), *kinds))
    for words, count in SAYS[name].items():
        assert text.count(words) >= count, words
    assert not [words for words in NEVER[name] if words in text]


def test_readme_cites_as_the_citation_file_says():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"@software\{hilbert_attn,\n(.*?)^\}", readme, re.M | re.S)[1]
    entry = dict(re.findall(r"^  (\w+) = \{(.*)\},$", block, re.M))
    assert entry["title"] == f"{{{cff['title']}}}" and entry["license"] == cff["license"]
    assert entry["version"] == str(cff["version"]) == hilbert_attn.__version__
    names = [author["name"] for author in cff["authors"]]
    assert re.findall(r"\{(.*?)\}", entry["author"]) == names
    if "date-released" in cff:
        assert entry["year"] == str(cff["date-released"].year) and "note" not in entry
    else:
        assert "year" not in entry and "Not released yet" in entry["note"]


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
    by_hand = (bench.RESHAPED, bench.GATHERED)
    rows = [row for row in runs[-1]["rows"] if row["name"] not in by_hand]
    runs[-1]["rows"] = rows
    path.write_text(json.dumps(runs))
    before = start_page()
    missing = "is not measured yet: `hilbert-attn bench cpu` does it"
    assert f"(gather + SDPA + scatter) {missing}" in before
    assert "are not in this stored run yet" in before
    for name, ours in ((bench.RESHAPED, bench.OURS), (bench.GATHERED, bench.OURS_HILBERT)):
        for row in [row for row in rows if row["name"] == ours]:
            rows.append(row | dict(name=name, median=1.25 * row["median"]))
    path.write_text(json.dumps(runs))
    after = start_page()
    by_hand = "the same groups made by hand (gather + SDPA + scatter)"
    assert f"it is 1.25x, 1.25x as fast as {by_hand}" in after
    assert "and 1.25x, 1.25x without an order (reshape + SDPA)" in after
    assert after.count("not measured yet") < before.count("not measured yet")
    assert f"| {bench.GATHERED} |" in after and "are not in this stored run yet" not in after


def start_page() -> str:
    "What the cells of the start page that quote the suite `cpu` show."
    names = dict(Path=Path, json=json, re=re, hilbert_attn=hilbert_attn, said=[])
    names |= {name: getattr(bench, name) for name in dir(bench) if not name.startswith("__")}
    names["Markdown"] = names["said"].append
    for cell in cells("index"):
        quotes = re.search(r'newest\("(cpu|long)"\)|\btable\b|facts|times_of', cell.source)
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
        row = dict(kind="segments", tokens=2**20, errors=dict(out=1e-7))
        row |= dict(rows_with_output=1, rows_checked=9)
        row |= {"forward": seconds, "forward+backward": seconds}
        assert verdict_of(10, dict(rows=[row], config=dict(heads=1, head_dim=64))) == verdict


def test_faster_training_is_a_matter_of_every_task():
    for photos, digits, verdict in (
        ([1.3, 1.4, 0], [1.2, 1.2, 1.2], "holds"),
        ([1.3, 1.4, 0], [1.2, 0, 0], "holds only"),
        ([1.0, 1.0, 1.0], [0, 0, 0], "does not"),
    ):
        assert verdict_of(4, dict(photos=photos, digits=digits)).startswith(verdict)


@pytest.mark.parametrize("verdict, snake", {
    "holds": (3, 6, 10),
    "holds only when …": (3, 18, 18),
    "does not hold": (18, 18, 18),
}.items())
def test_a_snake_may_be_as_good(verdict, snake):
    "Claim 8, at every length, at some, at none."
    spreads = dict(snake=snake, hilbert=(3, 6, 10))
    rows = [
        dict(
            segment=w,
            curve=curve,
            spread=spread,
            tokens_in_another_segment=0,
            neighbors_kept=0.5,
        )
        for curve, all_of in spreads.items()
        for w, spread in zip((64, 256, 512), all_of)
    ]
    assert verdict_of(8, dict(rows=rows)) == verdict


def test_a_slice_by_hand_on_the_start_page():
    runs = bench.load_runs("decode")
    run = [run for run in runs if not run["quick"]][-1]
    seconds = {
        (row["setting"], row["name"]): row["median"]
        for row in run["rows"]
    }
    times = [
        seconds[w, "decode_attention"]
        / seconds[w, "slice + SDPA"]
        for w in (f"window {n:,}" for n in (128, 512, 2048))
    ]
    readme = (ROOT / "README.md").read_text()
    said = re.search(
        r"about 2,000 keys .* (\S+) to (\S+) times",
        readme,
    )
    found = f"{min(times):.1f}", f"{max(times):.0f}"
    assert said.groups() == found


def test_the_verdict_on_lengths_follows_from_what_ran(monkeypatch):
    "Claim 9, with runs in which masks win to 8K, and nothing longer than was claimed was ever run."
    crossover = bench.load_runs("crossover")[-1]
    assert verdict_of(9, crossover) == "does not hold"
    short = [row for row in crossover["rows"] if row["tokens"] <= 64]
    wins = [row | dict(tokens={64: 8192}.get(row["tokens"], row["tokens"])) for row in short]
    config = crossover["config"] | dict(tokens=[16, 32, 48, 8192])
    longer = crossover | dict(rows=wins, config=config)
    assert verdict_of(9, longer).startswith("holds only")
    stored = bench.load_runs

    def nothing_longer(suite, *rest):
        return [] if suite in ("long", "memory") else stored(suite, *rest)

    monkeypatch.setattr(bench, "load_runs", nothing_longer)
    assert verdict_of(9, longer) == "holds"


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    "A folder of results with a GPU's file as `make gpu` writes it, and two suites of a CPU."
    for machine in sorted((ROOT / "nbs" / "results").iterdir()):
        if not (machine / "cpu.json").exists():
            continue
        (tmp_path / machine.name).mkdir()
        for suite in ("cpu", "long"):
            shutil.copy(machine / f"{suite}.json", tmp_path / machine.name)
        break
    (tmp_path / "nvidia-x1").mkdir()
    (tmp_path / "nvidia-x1" / "gpu_run.json").write_text(json.dumps(GPU_RUN))
    monkeypatch.setattr(bench.results, "results_folder", lambda: tmp_path)
    return tmp_path


X1 = "NVIDIA X1, torch 2.11.0, Python 3.12.1, hilbert_attn at 0123456789, 2026-01-02 03:04 UTC"


def test_what_make_gpu_stored_is_a_run(results):
    (run,) = bench.load_runs("gpu")
    own = {key: GPU_ENVIRONMENT[key] for key in ("python", "torch", "triton", "gpu", "cuda")}
    own |= {key: GPU_ENVIRONMENT[key] for key in ("capability", "multiprocessors", "driver")}
    own |= dict(cudnn=91000, gpu_memory_gib=80, commit="0123456789")
    assert run["environment"] == own | dict(date="2026-01-02 03:04 UTC")  # not this machine
    assert bench.machine_slug(run["environment"]) == "nvidia-x1"
    assert bench.describe_environment(run["environment"]) == X1
    assert [row["relative"] for row in bench.race_rows(run, "triton")] == [1.0, 2.5]
    assert bench.latest_runs("gpu") == [run]
    assert "gpu" not in bench.load_runs("cpu")[0]["environment"]


def page(name: str, until: str) -> dict:
    "The names that a notebook's code cells define, up to the one that shows `until`."
    names = {}
    for cell in cells(name):
        if cell.cell_type != "code":
            continue
        if until in cell.source:
            return names
        lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
        exec(compile("\n".join(lines), name, "exec"), names)
    raise AssertionError(f"no cell of {name} has {until!r}")


def missing_suites(text: str) -> set[str]:
    "Those that a section says were not measured."
    rest = text.rpartition("Not measured on this machine:")[2]
    return {*re.findall("`(\\w+)`", rest)}


ON_GPU = [
    "80 GiB on the GPU",
    "600,000 GFLOP/s",
    "driver 580.1",
    "321 cases against the oracle, 1 outside the tolerance",
    "<gpu>",
    "| N64 w64 | forward | gather + SDPA | 5.00 | 5.00 | 5.00 | 2.50 |",
]


def test_the_benchmark_page_takes_up_a_new_machine(results):
    parts = list(page("24_benchmarks", "for part in sections()")["sections"]())
    text = [part if isinstance(part, str) else f"<{part['suite']}>" for part in parts]
    heads = [part for part in text if part.startswith("## ")]
    assert heads[0] == "## NVIDIA X1" and len(heads) == 2
    gpu, cpu = "\n".join(text).split(heads[1])
    assert not [words for words in ON_GPU if words not in gpu]
    assert "<cpu>" in cpu and "[23_long_sequences](23_long_sequences.ipynb)" in cpu
    assert missing_suites(gpu) == {*bench.SUITES} - {"gpu"}
    assert missing_suites(cpu) == {*bench.SUITES} - {"cpu"}


FASTER = """\
On NVIDIA X1, the fused kernels are 2.5 to 2.5 times as fast as gathering and calling SDPA, \
forward, over 1 settings ([24_benchmarks](24_benchmarks.ipynb))."""


def test_the_start_page_takes_up_a_gpu(results):
    (cell,) = (cell for cell in cells("index") if "def on_gpu" in cell.source)
    names = dict(latest_runs=bench.latest_runs, race_rows=bench.race_rows, Markdown=str)
    exec(cell.source.replace("\nMarkdown(", "\nsaid = Markdown("), names)
    assert names["said"] == FASTER


def test_the_benchmark_page_without_results(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.results, "results_folder", lambda: tmp_path)
    parts = page("24_benchmarks", "for part in sections()")["sections"]()
    measures = "`hilbert-attn bench cpu` measures this machine."
    assert list(parts) == [f"**No run is stored**: {measures}"]
