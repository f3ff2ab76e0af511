"""A million objects and a million members of tars: listed, indexed and planned on one machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROWS = 1_000_000
MOST_MIB = 4096
STEPS = 4  # objects, tars, normalise, plan


def test_a_million_rows_are_listed_indexed_and_planned_within_four_gigabytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [sys.executable, "-m", "benchmarks.speed.manifest", "--rows", str(ROWS), "--local"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}")
    most = [
        int(value.replace(",", "")) for value in re.findall(r"^\| [^|]+ \| [\d.]+ \| ([\d,]+) \|", done.stdout, re.M)
    ]
    assert len(most) == STEPS
    assert max(most) < MOST_MIB
