"""The program `hilbert-attn`: exit codes, messages, and that its commands do what functions do."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hilbert_attn.backends import explain_backend
from hilbert_attn.bench import contenders, results
from hilbert_attn.bench.cpu import CPU_CONFIG
from hilbert_attn.bench.machine import FLOPS_PER_PAIR, environment
from hilbert_attn.bench.results import load_runs
from hilbert_attn.bench.suites import SUITES
from hilbert_attn.cli import _SUITES, main

COMMANDS = ("demo", "bench", "explain", "env")


def run(capsys, *argv):
    "Exit code, stdout and stderr; a string is split into words."
    words = [word for part in argv for word in str(part).split()]
    return run_words(capsys, *words)


def run_words(capsys, *argv):
    try:
        code = main(list(map(str, argv)))
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    for command in COMMANDS:
        code, out, _ = run(capsys, command, "--help")
        assert code == 0 and f"hilbert-attn {command}" in out
        assert max(map(len, out.splitlines())) <= 100


SMALL = "explain --shape 1 2 64 64"
BRANCHES = f"{SMALL} --segment-lengths 8 16"
LARGE = "segment_size=5000: must be at least 1 and at most the 4,800 patches"
MISTAKES = {
    "": "COMMAND",
    "benchmark": "invalid choice: 'benchmark'",
    "bench disk": "invalid choice: 'disk'",
    "bench cpu --against nothing.json": "nothing.json",
    "demo none.jpg": "photo='none.jpg': there is no such file",
    "demo --patch 80 3": "patch=(80, 3): rows are 0 to 74 and columns 0 to 63",
    "demo --patch 80": "--patch",
    "demo --segment-size 5000": LARGE,
    "explain": "--shape",
    "explain --shape 1 12 many 64": "invalid int value: 'many'",
    "explain --shape 1 0 64 64": "shape=(1, 0, 64, 64)",
    f"{SMALL} --segment-size 8 --dilation-rate 9": "dilation_rate=9: must not exceed",
    "explain --shape 1 4 64 64 --kv-heads 3": "4 heads",
    "explain --shape 1 4 64 64 --kv-heads -4": "kv_heads=-4: must be at least 1",
    f"{SMALL} --backend cudnn": "'cudnn'",
    f"{SMALL} --combine lse": "--combine is for several branches",
    f"{SMALL} --dilation-rates 1 2": "--dilation-rates is for several branches",
    f"{BRANCHES} --segment-size 8": "--segment-size is for one branch",
    f"{BRANCHES} --dilation-rate 2": "--dilation-rate is for one branch",
    f"{BRANCHES} --dilation-rates 1": "expected as many of each",
    f"{BRANCHES} --combine mean": "combine='mean'",
    f"{SMALL} --layers 0": "layers=0: must be at least 1",
    f"{SMALL} --ranks 0": "ranks=0: must be at least 1",
    f"{SMALL} --memory -1": "memory=-1.0: must be positive",
    f"{SMALL} --dilation-mode every": "dilation_mode='every'",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, line)
    assert code == 2 and not out
    assert err.startswith("hilbert-attn") and MISTAKES[line] in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_explain(capsys):
    call = "explain --shape 1 12 4096 64 --segment-size 1024 --dilation-rate 4"
    code, out, _ = run(capsys, call, "--device cpu")
    assert code == 0 and out.startswith("sdpa: ")
    assert "12,582,912 pairs (6.25% of dense)" in out and "not sdpa_mask:" in out


@pytest.mark.parametrize("ranks, strategy", [(1, "checkpoint"), (8, "ring")])
def test_explain_says_how_to_train(capsys, ranks, strategy):
    lengths, rates = [2048, 65536], [1, 32]
    branches = "--segment-lengths 2048 65536 --dilation-rates 1 32"
    model = f"--layers 12 --memory 16 --device cpu --ranks {ranks}"
    code, out, _ = run(capsys, "explain --shape 1 12 1048576 64", branches, model)
    expected = explain_backend(
        (1, 12, 2 ** 20, 64),
        segment_lengths=lengths,
        dilation_rates=rates,
        layers=12,
        memory=16 * 10 ** 9,
        ranks=ranks,
    )
    assert code == 0 and out == f"{expected}\n"
    assert f"to train: {strategy}, " in out and "at hand: 16 GB" in out


def test_memory_is_in_gigabytes(capsys):
    assert "at hand: 0.5 GB" in run(capsys, SMALL, "--memory 0.5")[1]


@pytest.mark.parametrize("combine", ["lse", "heads"])
def test_explain_several_branches(capsys, combine):
    call = "explain --shape 1 4 256 64 --segment-lengths 64 128 --memory 1 --device cpu"
    how = f"--combine {combine} --dilation-mode residue"
    expected = explain_backend(
        (1, 4, 256, 64),
        segment_lengths=[64, 128],
        dilation_rates=[1, 1],
        combine=combine,
        dilation_mode="residue",
        memory=10 ** 9,
    )
    assert run(capsys, call, how)[1] == f"{expected}\n"


def test_env(capsys):
    code, out, _ = run(capsys, "env --json")
    assert code == 0 and {"cpu", "torch", "backends"} <= set(json.loads(out))
    assert run(capsys, "env")[1].startswith("cpu  ")


def test_demo(capsys, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    photo, folder = tmp_path / "gradient.png", tmp_path / "out"
    Image.linear_gradient("L").resize((90, 50)).save(photo)
    options = "--segment-size 16 --patch 2 3 --seed 5".split()
    code, out, _ = run_words(capsys, "demo", photo, "--out", folder, *options)
    assert code == 0 and out.startswith("gradient.png: 6 x 11 = 66 patches")
    assert "report.html" in out
    pictures = ["attention.png", "curve.png", "report.html", "segments.png"]
    assert sorted(path.name for path in folder.iterdir()) == pictures


def test_the_suites_are_those_of_the_module():
    assert _SUITES == tuple(SUITES)


NAMES = [
    contenders.NAIVE,
    contenders.MASKED,
    contenders.MASKED_HILBERT,
    contenders.DENSE,
    contenders.OURS,
    contenders.OURS_HILBERT,
    contenders.OURS_LSE,
    contenders.OURS_HILBERT_LSE,
    contenders.MATMUL,
]


def made_up(quick=False) -> dict:
    "A run of the suite `cpu`; the suite itself is run in test_bench_suites."
    spread = dict(median=0.5, p20=0.25, p80=1.0, repeats=3, pairs=8)
    return dict(
        suite="cpu",
        quick=quick,
        config=CPU_CONFIG,
        environment=environment(),
        limits=dict(matmul_flops_per_s=1e9),
        rows=[
            dict(name=name, direction=direction, **spread)
            for name in NAMES for direction in FLOPS_PER_PAIR
        ],
        sweep=[],
        memory=[],
    )


@pytest.fixture
def instead(monkeypatch, tmp_path):
    "The suite `cpu` is made up, and results have a folder of their own."
    suite = replace(SUITES["cpu"], run=made_up)
    monkeypatch.setitem(SUITES, "cpu", suite)
    monkeypatch.setattr(results, "results_folder", lambda: tmp_path / "default")


def test_bench_stores_and_prints_the_same(capsys, tmp_path, instead):
    code, out, err = run_words(capsys, "bench", "cpu", "--json", "--out", tmp_path)
    assert code == 0 and "appended to" in err
    printed, (stored,) = json.loads(out), load_runs("cpu", tmp_path)
    assert {name: printed[name] for name in stored} == stored
    assert len(printed["tables"]["forward"]) == 9 and printed["tables"]["target"]


def test_bench_keeps_no_toy(capsys, tmp_path, instead):
    code, out, err = run(capsys, "bench --quick")  # cpu is the default
    assert code == 0 and "a toy size" in out and "500.00" in out and not err
    assert not load_runs("cpu")
    run(capsys, "bench cpu")
    assert len(load_runs("cpu")) == 1


def test_bench_against_an_earlier_run(capsys, tmp_path, instead):
    run_words(capsys, "bench", "cpu", "--out", tmp_path)
    file, (stored,) = next(tmp_path.glob("*/cpu.json")), load_runs("cpu", tmp_path)
    stored["rows"][0] |= dict(median=0.1, p20=0.1, p80=0.1)
    file.write_text(json.dumps([stored]))
    against = ("--against", file)
    # compares with what was there before
    code, out, _ = run_words(capsys, "bench", "cpu", "--out", tmp_path, *against)
    assert code == 0 and "slower" in out and "5.00" in out
    assert f"{stored['rows'][0]['name']}, forward" in out
    assert len(load_runs("cpu", tmp_path)) == 2
    file.write_text(json.dumps([stored]))
    _, out, _ = run_words(capsys, "bench", "cpu", "--quick", "--json", *against)
    changes = [row["change"] for row in json.loads(out)["against"]["changes"]]
    assert changes == ["slower", *["within the spread"] * 17]


def test_bench_looks_for_its_folder_first(capsys, tmp_path, monkeypatch):
    never = replace(SUITES["cpu"], run=lambda quick: pytest.fail("measured"))
    monkeypatch.setitem(SUITES, "cpu", never)
    (tmp_path / "file").touch()
    code, _, err = run_words(capsys, "bench", "--out", tmp_path / "file")
    assert code == 2 and "File exists" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_gpu_without_one(capsys):
    code, out, err = run(capsys, "bench gpu")
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith("hilbert-attn: the suite gpu needs an NVIDIA GPU")


PROGRAM = "import sys; from hilbert_attn.cli import main; sys.exit(main(sys.argv[1:]))"


def test_as_a_program():
    command = [sys.executable, "-c", PROGRAM, "demo", "x.jpg"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = "hilbert-attn: photo='x.jpg': there is no such file\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_results_reach_a_terminal_of_few_letters(tmp_path, encoding):
    Image = pytest.importorskip("PIL.Image")
    photo = tmp_path / "日.png"
    Image.linear_gradient("L").resize((16, 16)).save(photo)
    program = [sys.executable, "-m", "hilbert_attn"]
    env = os.environ | dict(
        PYTHONIOENCODING=encoding,
    )
    done = subprocess.run(
        [*program, "demo", photo, "--out", tmp_path],
        capture_output=True,
        env=env,
    )
    assert done.returncode == 0
    assert not done.stderr
    first = "日.png: 2 x 2 = 4"
    how = encoding, "backslashreplace"
    assert done.stdout.startswith(first.encode(*how))
