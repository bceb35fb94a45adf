"""The program `hilbert-attn`: exit codes, messages, and that its commands do what the functions do."""
import json
import subprocess
import sys

import pytest
import torch

from hilbert_attn import bench
from hilbert_attn.backends import explain_backend
from hilbert_attn.cli import _SUITES, main


def run(capsys, *argv):
    "Exit code, stdout and stderr."
    try: code = main(list(map(str, argv)))
    except SystemExit as stop: code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(name in out for name in ("demo", "bench", "explain", "env"))
    for command in ("demo", "bench", "explain", "env"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0 and f"hilbert-attn {command}" in out and max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("argv, message", [
    ((), "COMMAND"),
    (("benchmark",), "invalid choice: 'benchmark'"),
    (("bench", "disk"), "invalid choice: 'disk'"),
    (("bench", "cpu", "--against", "nothing.json"), "nothing.json"),
    (("demo", "no such photo.jpg"), "photo='no such photo.jpg': there is no such file"),
    (("demo", "--patch", 80, 3), "patch=(80, 3): rows are 0 to 74 and columns 0 to 63"),
    (("demo", "--patch", 80), "--patch"),
    (("demo", "--segment-size", 5000), "segment_size=5000: must be at least 1 and at most the 4,800 patches"),
    (("explain",), "--shape"),
    (("explain", "--shape", 1, 12, "many", 64), "invalid int value: 'many'"),
    (("explain", "--shape", 1, 0, 64, 64), "shape=(1, 0, 64, 64)"),
    (("explain", "--shape", 1, 2, 64, 64, "--segment-size", 8, "--dilation-rate", 9), "dilation_rate=9: must not exceed segment_size=8"),
    (("explain", "--shape", 1, 4, 64, 64, "--kv-heads", 3), "4 heads"),
    (("explain", "--shape", 1, 2, 64, 64, "--backend", "cudnn"), "'cudnn'"),
    (("explain", "--shape", 1, 2, 64, 64, "--combine", "lse"), "--combine is for several branches"),
    (("explain", "--shape", 1, 2, 64, 64, "--dilation-rates", 1, 2), "--dilation-rates is for several branches"),
    (("explain", "--shape", 1, 2, 64, 64, "--segment-lengths", 8, 16, "--segment-size", 8), "--segment-size is for one branch"),
    (("explain", "--shape", 1, 2, 64, 64, "--segment-lengths", 8, 16, "--dilation-rate", 2), "--dilation-rate is for one branch"),
    (("explain", "--shape", 1, 2, 64, 64, "--segment-lengths", 8, 16, "--dilation-rates", 1), "expected as many of each"),
    (("explain", "--shape", 1, 2, 64, 64, "--segment-lengths", 8, 16, "--combine", "mean"), "combine='mean'"),
    (("explain", "--shape", 1, 2, 64, 64, "--layers", 0), "layers=0: must be at least 1"),
    (("explain", "--shape", 1, 2, 64, 64, "--ranks", 0), "ranks=0: must be at least 1"),
    (("explain", "--shape", 1, 2, 64, 64, "--memory", -1), "memory=-1.0: must be positive"),
    (("explain", "--shape", 1, 2, 64, 64, "--dilation-mode", "every"), "dilation_mode='every'"),
])
def test_mistakes_get_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2 and not out
    assert err.startswith("hilbert-attn") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_explain(capsys):
    code, out, _ = run(capsys, "explain", "--shape", 1, 12, 4096, 64, "--segment-size", 1024, "--dilation-rate", 4, "--device", "cpu")
    assert code == 0 and out.startswith("sdpa: ") and "12,582,912 pairs (6.25% of dense)" in out and "not sdpa_mask:" in out


def test_explain_with_several_branches_and_how_to_train(capsys):
    argv = ("explain", "--shape", 1, 12, 2 ** 20, 64, "--segment-lengths", 2048, 65536, "--dilation-rates", 1, 32, "--layers", 12, "--memory", 16, "--device", "cpu")
    for ranks, strategy in ((1, "checkpoint"), (8, "ring")):
        code, out, _ = run(capsys, *argv, "--ranks", ranks)
        expected = explain_backend((1, 12, 2 ** 20, 64), segment_lengths=[2048, 65536], dilation_rates=[1, 32], layers=12, memory=16 * 10 ** 9, ranks=ranks)
        assert code == 0 and out == f"{expected}\n" and f"to train: {strategy}, " in out and "at hand: 16 GB" in out
    assert "at hand: 0.5 GB" in run(capsys, "explain", "--shape", 1, 2, 64, 64, "--memory", 0.5)[1]
    for combine in ("lse", "heads"):
        out = run(capsys, "explain", "--shape", 1, 4, 256, 64, "--segment-lengths", 64, 128, "--combine", combine, "--dilation-mode", "residue", "--memory", 1, "--device", "cpu")[1]
        assert out == f"{explain_backend((1, 4, 256, 64), segment_lengths=[64, 128], dilation_rates=[1, 1], combine=combine, dilation_mode='residue', memory=10 ** 9)}\n"


def test_env(capsys):
    code, out, _ = run(capsys, "env", "--json")
    assert code == 0 and {"cpu", "torch", "backends"} <= set(json.loads(out))
    assert run(capsys, "env")[1].startswith("cpu  ")


def test_demo(capsys, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.linear_gradient("L").resize((90, 50)).save(tmp_path / "gradient.png")
    code, out, _ = run(capsys, "demo", tmp_path / "gradient.png", "--out", tmp_path / "out", "--segment-size", 16, "--patch", 2, 3, "--seed", 5)
    assert code == 0 and out.startswith("gradient.png: 6 x 11 = 66 patches") and "report.html" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["attention.png", "curve.png", "report.html", "segments.png"]


def test_the_suites_are_those_of_the_module(): assert _SUITES == tuple(bench.SUITES)


def test_bench(capsys, tmp_path, monkeypatch):
    def instead(quick=False, progress=None):  # the suite itself is run in test_bench
        names = (bench.NAIVE, bench.MASKED, bench.MASKED_HILBERT, bench.DENSE, bench.OURS, bench.OURS_HILBERT, bench.OURS_LSE, bench.OURS_HILBERT_LSE, bench.MATMUL)
        rows = [dict(name=name, direction=direction, median=0.5, p20=0.25, p80=1.0, repeats=3, pairs=8) for name in names for direction in bench.FLOPS_PER_PAIR]
        return dict(suite="cpu", quick=quick, config=bench.CPU_CONFIG, environment=bench.environment(), limits=dict(matmul_flops_per_s=1e9), rows=rows, sweep=[], memory=[])
    monkeypatch.setattr(bench, "bench_cpu", instead)
    monkeypatch.setattr(bench, "results_folder", lambda: tmp_path / "default")
    code, out, err = run(capsys, "bench", "cpu", "--json", "--out", tmp_path)
    assert code == 0 and "appended to" in err
    printed, (stored,) = json.loads(out), bench.load_runs("cpu", tmp_path)
    assert {name: printed[name] for name in stored} == stored and len(printed["tables"]["forward"]) == 9 and printed["tables"]["target"]
    code, out, err = run(capsys, "bench", "--quick")  # cpu is the default
    assert code == 0 and "a toy size" in out and "500.00" in out and not err  # not stored
    run(capsys, "bench", "cpu")
    assert len(bench.load_runs("cpu")) == 1
    file = next(tmp_path.glob("*/cpu.json"))
    stored["rows"][0] |= dict(median=0.1, p20=0.1, p80=0.1)
    file.write_text(json.dumps([stored]))
    code, out, err = run(capsys, "bench", "cpu", "--out", tmp_path, "--against", file)  # compares with what was there before
    assert code == 0 and "slower" in out and f"{stored['rows'][0]['name']}, forward" in out and "5.00" in out and len(bench.load_runs("cpu", tmp_path)) == 2
    file.write_text(json.dumps([stored]))
    report = json.loads(run(capsys, "bench", "cpu", "--quick", "--json", "--against", file)[1])
    assert [row["change"] for row in report["against"]["changes"]] == ["slower", *["within the spread"] * 17]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_gpu_without_one(capsys):
    code, out, err = run(capsys, "bench", "gpu")
    assert code == 2 and not out and err.startswith("hilbert-attn: the suite gpu needs an NVIDIA GPU") and err.count("\n") == 1


def test_as_a_program():
    done = subprocess.run([sys.executable, "-c", "import sys; from hilbert_attn.cli import main; sys.exit(main(sys.argv[1:]))", "demo", "x.jpg"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "hilbert-attn: photo='x.jpg': there is no such file\n")
