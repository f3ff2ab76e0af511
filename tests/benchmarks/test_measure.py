"""What all benchmarks rely on: turns, ratios within a repeat, and the memory of children too."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks.measure import Spread, header, interleave, memory, ratio, table


def test_candidates_take_turns_and_warm_ups_do_not_count() -> None:
    called: list[str] = []
    times = interleave({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=2, warm_up=1)
    assert "".join(called) == "baabba"
    assert [len(seconds) for seconds in times.values()] == [2, 2]


def test_a_candidate_is_timed_by_the_clock() -> None:
    (seconds,) = interleave({"sleep": lambda: time.sleep(0.05)}, repeats=1)["sleep"]
    assert 0.05 <= seconds < 1


def test_a_ratio_is_the_median_of_quotients_within_a_repeat() -> None:
    assert ratio([1, 20, 3], [1, 10, 1]) == Spread(2, 1, 3)
    with pytest.raises(ValueError, match="shorter"):
        ratio([1, 2], [1])


def test_a_spread_names_median_and_both_ends() -> None:
    assert Spread.of([3, 1, 2, 10]).text(".1f") == "2.5 (1.0 - 10.0)"


def test_a_table_is_markdown() -> None:
    assert (
        table(["what", "seconds"], [["a", 1], ["b", "2.5"]]) == "| what | seconds |\n|---|---:|\n| a | 1 |\n| b | 2.5 |"
    )


def test_memory_counts_what_a_child_holds() -> None:
    code = "import time; held = bytearray(range(256)) * (2**28 // 256); print('held', flush=True); time.sleep(30)"
    with memory() as used, subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.6)
        child.kill()
    assert used.peak > 2**28


def test_a_header_says_what_was_run_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/speed/plan.py", "--short"])
    text = header(["hypothesis"])
    assert text.startswith("`python -m benchmarks.speed.plan --short`")
    assert all(word in text for word in ("commit", "CPUs", "numpy", "hypothesis", "Load average"))
