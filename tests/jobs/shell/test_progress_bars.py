"""The progress display: counts and times stay on the screen, and names are shown as they are."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from jobs.shell.progress_bars import Bars


def terminal(width: int) -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, width=width, force_terminal=True, color_system=None, markup=False), screen


def rows(bars: Bars, width: int) -> list[str]:
    """The display as lines of text."""
    console, screen = terminal(width)
    console.print(bars.progress.get_renderable())
    return [line.rstrip() for line in screen.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 100, 132])
def test_bars_with_a_long_status_keep_counts_and_times(width: int) -> None:
    bars = Bars(terminal(width)[0])
    status = "347 images/s, wave 3 of 8 published, 12 retries, and so on"
    bars.images("probe-set: old embeddings", 450, 900, status)
    bars.images("fit: epochs", 150, 150, "loss 0.9812")
    bars.images("gallery: old embeddings", 123_456_789, 1_000_000_000, "9,876 images/s")
    lines = rows(bars, width)
    assert len(lines) == 3
    for line, count in zip(lines, ["450/900", "150/150", "123456789/1000000000"], strict=True):
        assert len(line) <= width
        assert re.search(rf"{count} +(\d:\d\d:\d\d|-:--:--)", line), line
    assert "347 ima" in lines[0]
    assert "loss 0.9812" in lines[1]


def test_bars_show_brackets_in_names_and_states_as_they_are() -> None:
    bars = Bars(terminal(132)[0])
    bars.images("check [/a] [b]", 1, 2, "img [/2019] x.png")
    assert re.search(r"check \[/a\] \[b\] .*img \[/2019\] x.png", rows(bars, 132)[0])


def test_bars_without_a_terminal_print_brackets_as_they_are() -> None:
    screen = io.StringIO()
    Bars(Console(file=screen, markup=False)).images("run [a]", 1, 1, "[/b]")
    assert screen.getvalue() == "run [a]: 1 of 1 [/b]\n"
