"""CI and the skips that it knows, with pytest as CI starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KNOWN = "needs the CIFAR-100 data and encoders in /work/shared/data/cifar100"


def run_skipped(folder: Path, code: str, ci: str) -> subprocess.CompletedProcess[str]:
    """A run of one file of tests."""
    file = folder / "test_it.py"
    file.write_text(f"import pytest\n\n{code}\n\ndef test_good() -> None:\n    assert True\n")
    words = [sys.executable, "-m", "pytest", "-p", "tests.support.skips", "--rootdir", str(folder), "-q", str(file)]
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def skip(reason: str) -> str:
    return f"def test_skipped() -> None:\n    pytest.skip({reason!r})"


@pytest.mark.parametrize(
    ("code", "ci", "exit_code"),
    [
        (skip("no such tool"), "true", 1),
        (skip("no such tool"), "", 0),
        (skip(KNOWN), "true", 0),
        ("pytest.skip('no such tool', allow_module_level=True)", "true", 1),
        ("@pytest.mark.skipif(True, reason='no such tool')\ndef test_skipped() -> None:\n    assert True", "true", 1),
        ("@pytest.mark.xfail\ndef test_known_to_fail() -> None:\n    assert not KNOWN", "true", 0),
    ],
)
def test_run_with_a_skipped_test_fails_in_ci_if_the_reason_is_unknown(
    tmp_path: Path, code: str, ci: str, exit_code: int
) -> None:
    done = run_skipped(tmp_path, code, ci)
    assert done.returncode == exit_code, done.stdout
    assert ("no such tool" in done.stdout and "CI fails" in done.stdout) == bool(exit_code)
