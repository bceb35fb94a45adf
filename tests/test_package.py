"""Importing: cheap, without matplotlib, and without triton. The wheel: what is in it, and that
it works where nothing is installed but what it declares."""
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path
from zipfile import Path as ZipPath
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hilbert_attn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from checkout import checkout_files, copy_checkout


def python(code: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names():
    """A front that a person can remember; what else can be had from there is looked up when it
    is asked for."""
    front, tables = hilbert_attn.__all__, (hilbert_attn._LATER, hilbert_attn._ELSEWHERE)
    later, others = (" ".join(table.values()).split() for table in tables)
    assert len(front) == len(set(front)) <= 45 and not set(front) & set(others)
    assert set(later) <= set(front)
    for name in (*front, *others): assert hasattr(hilbert_attn, name), name
    assert {*front, *others} <= set(dir(hilbert_attn))
    misspelt = "hilbert_atention"
    with pytest.raises(AttributeError, match=f"has no attribute '{misspelt}'"):
        getattr(hilbert_attn, misspelt)


def test_names_from_elsewhere_are_looked_up_late():
    """Nothing is imported of historical names, of the ring, the factory and the integrations,
    until somebody asks; then it is the same thing under both names."""
    code = """
import sys, hilbert_attn as h
def there(): return sum(f"hilbert_attn.{m}" in sys.modules for m in ("compat", *h._LATER))
print(there(), h.ring_attention is sys.modules["hilbert_attn.ring"].ring_attention)
print(h.StandardizedRingConfig is h.AttentionConfig, there() > 3)
"""
    assert python(code) == "0 True\nTrue True"


def test_import_is_cheap():
    """A third of torch's own import at most, best of three processes: everything heavy is
    imported when it is first used."""
    code = """
import time
a = time.perf_counter()
import torch
b = time.perf_counter()
import hilbert_attn
print((time.perf_counter() - b) / (b - a))
"""
    assert min(float(python(code)) for _ in range(3)) < 1 / 3


def test_import_brings_nothing_heavy():
    code = """
import sys, torch
before = set(sys.modules)
import hilbert_attn
print(*sorted(set(sys.modules) - before))
"""
    new = set(python(code).split())
    assert not {
        "matplotlib", "PIL", "pandas", "IPython", "tqdm", "nbdev", "fastcore", "transformers",
        "diffusers", "triton"} & {name.split(".")[0] for name in new}
    assert not {"torch._dynamo", "torch.nn.attention.flex_attention"} & new
    assert "hilbert_attn" in new
    assert not {f"hilbert_attn.{name}" for name in ("bench", "demo", "cli")} & new


def test_import_makes_operators_known_that_a_saved_graph_may_name():
    "All but those of the block-sparse kernels, which come with Triton."
    code = """
import torch, hilbert_attn, importlib, pkgutil
def known():
    names = torch._C._dispatch_get_all_op_names()
    return {name.partition("::")[2] for name in names if name.startswith("hilbert_attn::")}
before = known()
for module in pkgutil.walk_packages(hilbert_attn.__path__, "hilbert_attn."):
    if not module.name.endswith("__main__"): importlib.import_module(module.name)
print("cross_forward" in before, "triton_backward" in before, *sorted(known() - before))
"""
    triton = ["block_triton_backward", "block_triton_forward"]
    assert python(code).split() == ["True", "True", *triton]


@pytest.mark.parametrize("missing", ("triton", "matplotlib tqdm PIL"))
def test_works_without(missing):
    code = f"""
import sys
for name in {missing.split()}: sys.modules[name] = None  # importing it fails
import torch, hilbert_attn
q = torch.randn(1, 2, 30, 8, requires_grad=True)
hilbert_attn.hilbert_attention(q, q, q, segment_size=8).sum().backward()
try: hilbert_attn.hilbert_attention(q, q, q, backend="triton")
except RuntimeError as e: print(e)
"""
    said = python(code)
    if missing == "triton": assert "cannot run on cpu" in said


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Made from the files of the checkout as anybody would: source distribution first, the wheel
    from that."""
    if (paths := checkout_files()) is None: pytest.skip("not a git checkout")
    copy_checkout(source := tmp_path_factory.mktemp("source"), paths)
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def settings(key: str) -> list[str]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return [line.strip() for line in config["DEFAULT"][key].splitlines() if line.strip()]


def metadata(wheel: Path) -> Distribution:
    with ZipFile(wheel) as archive:
        (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    return PathDistribution(ZipPath(wheel, f"{info}/"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    ours = {path for path in checkout_files() if path.startswith("hilbert_attn/")}
    with ZipFile(wheel) as archive:
        packed, infos = {name for name in archive.namelist() if ".dist-info/" not in name}, {
            name.partition("/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        assert packed == ours
        assert "hilbert_attn/py.typed" in packed
        assert all(archive.read(name) == (ROOT / name).read_bytes() for name in packed)
        assert infos.keys() - {"top_level.txt"} == {
            "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
        assert archive.read(infos["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
        assert b"py3-none-any" in archive.read(infos["WHEEL"])
    about = metadata(wheel)
    assert (
        about.version, about.metadata["Requires-Python"], about.metadata["License-Expression"]
    ) == (hilbert_attn.__version__, ">=3.11", "Apache-2.0")
    assert {(point.group, point.name, point.value) for point in about.entry_points} == {
        ("console_scripts", "hilbert-attn", "hilbert_attn.cli:main"),
        ("nbdev", "hilbert_attn", "hilbert_attn._modidx:d")}
    declared = [Requirement(text) for text in about.requires]
    assert {
        str(requirement) for requirement in declared if "extra" not in str(requirement.marker)
    } == {str(Requirement(text)) for text in settings("requirements")}
    extras = {
        extra: {
            requirement.name for requirement in declared if requirement.marker
            and requirement.marker.evaluate({"extra": extra})}
        for extra in about.metadata.get_all("Provides-Extra")}
    assert extras.keys() == {
        "demo", "transformers", "diffusers", "experiments", "docs", "release", "dev", "all"}
    assert {"matplotlib", "pillow"} <= extras["demo"]
    assert extras["all"] == extras["dev"] | extras["docs"] >= extras["demo"]


def closure(requirements: list[str]) -> list[Distribution]:
    "The distributions of this environment that these requirements bring, and what those bring."
    todo, found = list(map(Requirement, requirements)), {}
    for requirement in todo:  # grows as we go
        key = canonicalize_name(requirement.name), *sorted(requirement.extras)
        if key in found: continue
        found[key] = distribution(requirement.name)
        todo += [
            needed for needed in map(Requirement, found[key].requires or ()) if not needed.marker
            or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras))]
    return list(found.values())


@pytest.fixture(scope="module")
def inside(wheel, tmp_path_factory):
    """Runs a program of an environment that holds the wheel and what it declares, and nothing
    else, in a folder outside of the repository."""
    home, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    env = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VIRTUAL_ENV", "TRITON_", "HILBERT_ATTN_"))}
    def run(*command, status: int = 0):
        done = subprocess.run(
            [home / "bin" / command[0], *map(str, command[1:])], cwd=folder, env=env,
            capture_output=True, text=True, timeout=120)
        assert done.returncode == status and not list(folder.iterdir()), done.stdout + done.stderr
        return done.stderr if status else done.stdout

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=60)
    pip = [
        sys.executable, "-m", "pip", "--python", home / "bin" / "python",
        "--disable-pip-version-check"]
    installed = subprocess.run(
        [*pip, "install", "--no-index", "--no-deps", wheel], capture_output=True, text=True,
        timeout=120)
    assert installed.returncode == 0, installed.stderr
    site = Path(
        run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for needed in closure([text for text in metadata(wheel).requires if "extra ==" not in text]):
        for name in {path.parts[0] for path in needed.files} - {"..", "__pycache__"}:
            if not (site / name).exists(): (site / name).symlink_to(needed.locate_file(name))
    checked = subprocess.run([*pip, "check"], capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stdout
    return run


def test_citation_and_changelog_know_the_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == hilbert_attn.__version__
    assert cited["license"] == "Apache-2.0"
    assert cited["cff-version"] == "1.2.0"
    assert cited["title"].startswith("hilbert_attn")
    assert cited["authors"]
    assert cited["message"]
    assert re.search(
        rf"^## {re.escape(hilbert_attn.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert settings("version") == [hilbert_attn.__version__]


def test_wheel_imports_in_an_empty_environment(inside):
    code = """
import importlib, pkgutil, hilbert_attn
for module in pkgutil.walk_packages(hilbert_attn.__path__, "hilbert_attn."):
    if module.name != "hilbert_attn.__main__": importlib.import_module(module.name)
for name in hilbert_attn.__all__: getattr(hilbert_attn, name)
for name in ("matplotlib", "PIL", "transformers", "nbdev", "pytest"):
    assert not importlib.util.find_spec(name), name
print(hilbert_attn.__version__, "site-packages" in hilbert_attn.__file__)
"""
    assert inside("python", "-c", code) == f"{hilbert_attn.__version__} True\n"


def test_wheel_runs_the_quickstart(inside, tmp_path):
    """README.md's own code gives README.md's own output (which backends cannot run, and why,
    depends on the machine); the program says the same."""
    code, promised = re.search(
        r"^## Quickstart\n\n```python\n(.*?)^```\n\n((?:    [^\n]*\n)+)",
        (ROOT / "README.md").read_text(), re.M | re.S).groups()
    (script := tmp_path / "quickstart.py").write_text(code)
    printed = inside("python", script)
    def same_everywhere(text):
        return [line.strip() for line in text.splitlines() if not line.strip().startswith("not ")]
    assert same_everywhere(printed) == same_everywhere(promised) and "pairs" in printed
    explained = inside(
        "hilbert-attn", "explain", "--shape", 1, 8, 4800, 64, "--segment-size", 1024,
        "--dilation-rate", 4, "--memory", 16, "--device", "cpu")
    assert printed.endswith(explained) and explained.startswith("sdpa: ")


def test_program_in_an_empty_environment(inside):
    assert all(
        command in inside("hilbert-attn", "--help")
        for command in ("demo", "bench", "explain", "env"))
    for program in (["hilbert-attn"], ["python", "-m", "hilbert_attn"]):
        assert inside(*program, "--version") == f"hilbert-attn {hilbert_attn.__version__}\n"
    env = json.loads(inside("hilbert-attn", "env", "--json"))
    assert env["hilbert_attn"] == hilbert_attn.__version__
    assert "sdpa" in env["backends"]
    assert "commit" not in env


def test_missing_extras_are_named(inside):
    said = inside("hilbert-attn", "demo", status=2)
    assert said.count("\n") == 1 and "pip install 'hilbert_attn[demo]'" in said
    code = "import torch, hilbert_attn as h; h.use_hilbert_attention(torch.nn.Identity())"
    assert "ImportError: " in (said := inside("python", "-c", code, status=1))
    assert "pip install 'hilbert_attn[transformers]'" in said


PROGRAMS = [
    path for path in (ROOT / "tools").glob("*.py")
    if "__main__" in path.read_text()
]


def test_programs_read_their_arguments():
    "Else `--help` draws or overwrites something."
    unread = [
        path.stem for path in PROGRAMS
        if "parse_args()" not in path.read_text()
    ]
    # run_claims.py alone starts it
    assert unread == ["claim_ring_worker"]


WRONG = {
    "weigh_site.py nowhere": "no site in nowhere",
    "make_overloads.py --chek": "unrecognized",
    "run_stories.py nobody": "some of video_dit",
    "run_study.py --only photos/x --quick --out .":
        "must be a task or one of",
    "mutate.py -k unheard-of":
        "no planted mistake has 'unheard-of'",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_arguments_of_programs(line, tmp_path):
    program, *rest = line.split()
    path = ROOT / "tools" / program
    done = subprocess.run(
        [sys.executable, path, *rest],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode
    assert WRONG[line] in done.stderr
    assert "Traceback" not in done.stderr
