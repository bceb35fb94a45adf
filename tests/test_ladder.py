"""The table of the ladder is of the kernels that the notebook shows."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import ladder_table

STORED = json.loads(ladder_table.STORED.read_text())
COMPILE_ONE = """
import json, sys
sys.path.insert(0, "tools")
import ladder_table
ladder_table.RUNGS = {"9": ladder_table.RUNGS["9 half precision"]}
ladder_table.last_rung = dict
print(json.dumps(ladder_table.measure()["rungs"]["9"]))
"""


def test_the_table_is_of_these_kernels():
    assert STORED["kernels"] == ladder_table.fingerprint(), "run `python tools/ladder_table.py`"
    assert set(STORED["rungs"]) == {*ladder_table.RUNGS, "the package's kernel"}


@pytest.mark.full
def test_a_rung_compiled_now_is_the_stored_one(tmp_path):
    import triton
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= dict(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT))
    ran = subprocess.run([sys.executable, "-c", COMPILE_ONE], cwd=ROOT, env=env,
                         capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found, stored = json.loads(ran.stdout), STORED["rungs"]["9 half precision"]
    assert found["products"] and found["spilled"] == 0
    if triton.__version__ == STORED["triton"]: assert found == stored


def test_what_the_notebook_says_of_the_table():
    rungs = STORED["rungs"]
    def loop(name): return rungs[name]["loop"]
    assert loop("4 dilated") - loop("2 online") == 26
    assert loop("4 dilated") - loop("6 split") == 62
    assert loop("7 causal, naive") - loop("4 dilated") == 115
    assert (loop("2 online"), loop("9 half precision"), loop("11 described")) == (410, 297, 303)
    assert loop("10 overlapped") > loop("9 half precision")
    assert rungs["6 in float32"]["products"] == 4136 and rungs["6 in float32"]["spilled"] > 0
    assert rungs["6 split"]["products"] == 8
    registers = {name: row["registers"] for name, row in rungs.items()}
    assert registers["1 all keys (256)"] == 232 and registers["2 online"] == 120
    assert registers["4 dilated"] == 134 == registers["2 online"] + 14
    assert registers["11 described"] == 108
