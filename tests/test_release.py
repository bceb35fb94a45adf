"""A release: what it asks for before it is built, and the notes that it carries."""
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import release

VERSION = release.VERSION
CITATION = f"cff-version: 1.2.0\nversion: {VERSION}\nlicense: x\n"


def changelog(date):
    return f"# Changelog\n\n## {VERSION}, {date}\n\n- New.\n- Old.\n\n## 0.0.1, x\n\n- No.\n"


def test_notes_are_the_section_of_the_version():
    assert release.notes(changelog("2026-01-31")) == ("2026-01-31", "- New.\n- Old.")
    with pytest.raises(SystemExit, match="has no section"):
        release.notes("# Changelog\n\n## 9.9.9, 2026-01-31\n\n- New.\n")
    whole = release.notes((release.ROOT / "CHANGELOG.md").read_text())[1]
    assert re.findall(r"^### (.+)", whole, re.M) and not re.search(r"^## ", whole, re.M)


@pytest.mark.parametrize("date, citation, changes, told", [
    ("2026-01-31", CITATION, "", None),
    ("not released yet", CITATION, "", "give it a date"),
    ("2026-01-31", CITATION.replace(VERSION, "9.9.9"), "", "another version"),
    ("2026-01-31", CITATION, " M README.md\n", "has changes"),
])
def test_what_is_missing_is_told(date, citation, changes, told):
    faults = release.unready(changelog(date), citation, changes)
    assert [told in fault for fault in faults] == ([] if told is None else [True])


def test_pythons_that_do_not_run_are_not_here(tmp_path):
    (shim := tmp_path / "python").write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    found = [release.runs(str(x)) for x in (sys.executable, shim, tmp_path / "none")]
    assert found == [True, False, False]


def test_a_command_that_fails_ends_it(tmp_path):
    with pytest.raises(SystemExit, match="failed"):
        release.run(sys.executable, "-c", "raise ValueError", cwd=tmp_path)
