"""A ring over a slow cable: the tool that measures it, on Linux with namespaces."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import bench_link


def namespaces() -> list[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line.startswith("ring-")]


def can_lay_a_cable() -> bool:
    try:
        with bench_link.cable(100): return True
    except RuntimeError: return False


@pytest.mark.skipif(not can_lay_a_cable(), reason="no network namespaces here, or no right to them")
def test_a_cable_is_as_slow_as_asked_and_taken_away(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "bench_link.py"), "--quick", "--out"]
    out = tmp_path / "link.json"
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(out.read_text())
    names = [bench_link.OURS, bench_link.SERIAL, bench_link.TORCH, bench_link.GATHER]
    assert [cable["rate"] for cable in found["cables"]] == [100]
    for cable in found["cables"]:
        assert sorted(cable["checks"]) == sorted(names)
        assert {row["direction"] for row in cable["rows"]} == {"forward", "forward+backward"}
        assert sorted({row["name"] for row in cable["rows"]}) == sorted(names)
        assert cable["traffic_bytes"]["forward"] == 2 * 2 * 128 * 64 * 4 # K and V, heads, rows, D
    link = found["cables"][0]["link"]
    through = link["bytes"] - 2 ** 17 # the bucket begins full
    assert 8 * through / link["seconds"] < 110e6
    assert not namespaces()


def test_namespaces_go_when_the_inside_fails(monkeypatch):
    calls = []
    monkeypatch.setattr(bench_link, "needs_namespaces", lambda: None)
    monkeypatch.setattr(bench_link, "run", lambda *command: calls.append(command))
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append(tuple(command)))
    with pytest.raises(KeyError), bench_link.cable(500) as inside:
        assert inside(1)[:3] == ["ip", "netns", "exec"]
        raise KeyError
    added = [call[3] for call in calls if call[:3] == ("ip", "netns", "add")]
    taken = [call[3] for call in calls if call[:3] == ("ip", "netns", "del")]
    assert len(added) == 2 and added == taken
    assert sum("500mbit" in call for call in calls) == 2


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="no ip and no tc here: install iproute2"):
        bench_link.needs_namespaces()
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match="need root"), bench_link.cable(None): pass
