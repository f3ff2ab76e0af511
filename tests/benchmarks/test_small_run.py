"""Stages are timed by files, whenever these come, and snapshot 0 is served only where `prod` points to it."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from pathlib import Path, PosixPath
from typing import Self

import pytest

from benchmarks import small_run
from benchmarks.measure import Spread
from benchmarks.small_run import STAGES, VISIBLE, Job
from benchmarks.speed import first_benefit

WAITS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
file = pathlib.Path({file!r})
file.parent.mkdir(parents=True)
file.with_suffix(".new").write_text({text!r})
file.with_suffix(".new").rename(file)  # whole or not at all, and when the signal is heard
time.sleep(60)
"""


class Late(PosixPath):
    """A folder whose file is written just after someone looked for it: the moment that real runs seldom hit."""

    def glob(self, pattern: str) -> Generator[Self, None, None]:
        found = list(super().glob(pattern))
        if pattern == STAGES["planned"]:
            write(self, pattern)
        yield from found


def write(folder: Path, name: str, text: str = "") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def instead_of_a_backfill(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(small_run, "command", lambda *_: [sys.executable, "-c", program])


def test_a_file_that_comes_between_two_looks_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = '{"commit": 0}'
    instead_of_a_backfill(monkeypatch, WAITS.format(file=str(tmp_path / STAGES[VISIBLE]), text=text))
    assert "planned" in Job(Late(tmp_path), tmp_path).backfill(until=STAGES["planned"])


def test_stage_finished_since_the_last_look_is_timed_when_the_command_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / STAGES["planned"]
    file.parent.mkdir()
    instead_of_a_backfill(monkeypatch, f"open({str(file)!r}, 'w')")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda _: sleep(1.0))  # the command ends before the next look
    found = Job(tmp_path, tmp_path).backfill()
    assert {"planned", "report written, command ended"} == set(found)


@pytest.mark.parametrize("commit", [0, 3])
def test_snapshot_0_is_visible_only_where_prod_points_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commit: int
) -> None:
    text = f'{{"commit": {commit}}}'
    instead_of_a_backfill(monkeypatch, WAITS.format(file=str(tmp_path / STAGES[VISIBLE]), text=text))
    assert (VISIBLE in Job(tmp_path, tmp_path).backfill(until=STAGES[VISIBLE])) == (commit == 0)


def test_a_snapshot_0_that_the_gate_refused_is_said_and_not_counted() -> None:
    whole = {name: float(number) for number, name in enumerate(STAGES, start=1)}
    refused = {name: seconds for name, seconds in whole.items() if name != VISIBLE}
    loop = Spread(10.0, 10.0, 10.0)
    some = first_benefit.measured([whole, refused], 100, loop)
    assert f"| {VISIBLE} | 6.0 (6.0 - 6.0); refused by the gate in 1 of 2 runs |" in some
    assert "after 600 (600 - 600) %" in some
    none = first_benefit.measured([refused], 100, loop)
    assert f"| {VISIBLE} | refused by the gate in 1 of 1 runs |" in none
    assert "no share" in none
    assert "Nothing computed" in first_benefit.computed([refused], {1: 1.0, 2: 2.0}, {"loop": loop})
