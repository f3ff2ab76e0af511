"""In CI (CI=true) a test may be skipped only for a reason that is known here: any other skip fails the run.

A skip that nobody expects hides a test that never runs: a tool that is missing, data at another place.
"""

from __future__ import annotations

import os
import re

import pytest

KNOWN = (
    r"needs the CIFAR-100 data and encoders in .*",  # ../shared/data is not a part of the repository
    r"needs `(prometheus|promtool)` .* cannot be installed here",  # neither root nor the package
    r"torch\.compile needs a C\+\+ compiler",
    r"this machine has no other kernels",  # than those of every processor of its kind: not an x86 with AVX
)

_unknown: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that is skipped for an unknown reason."""
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a file that is skipped as a whole."""
    _note(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run in CI."""
    if _unknown and os.environ.get("CI") == "true":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name these tests."""
    if _unknown and os.environ.get("CI") == "true":
        terminalreporter.section("skipped for a reason that tests/support/skips.py does not know: CI fails")
        for line in _unknown:
            terminalreporter.line(line)


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = text.removeprefix("Skipped: ")
    if not any(re.fullmatch(known, reason) for known in KNOWN):
        _unknown.append(f"{report.nodeid}: {reason}")
