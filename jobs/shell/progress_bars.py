"""Progress on stderr: bars on a terminal, else a line every ten seconds (log files, CI, `ray job logs`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_LINE_SECONDS = 10.0
_WIDE = 110  # characters: a terminal this wide has room for a long bar beside the longest status


class _Status(ProgressColumn):
    """The status of a row; the only column that is cut if the terminal is too narrow."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"], style="dim", no_wrap=True, overflow="ellipsis")


@dataclass(slots=True)
class Step:
    """A step whose length is not known."""

    bars: Bars
    name: str
    task: TaskID

    def say(self, text: str) -> None:
        """Show what the step is doing."""
        self.bars.progress.update(self.task, status=text)


@dataclass(slots=True)
class Bars:
    """The progress display of one command."""

    console: Console
    progress: Progress = field(init=False)
    _tasks: dict[str, TaskID] = field(default_factory=dict)
    _last_line: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def stays() -> Column:
            return Column(no_wrap=True)

        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓", table_column=stays()),
            TextColumn("{task.description:<25}", markup=False, table_column=stays()),
            BarColumn(bar_width=30 if self.console.width >= _WIDE else 10, table_column=stays()),
            MofNCompleteColumn(table_column=stays()),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=stays()),
            _Status(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        handler = RichHandler(console=self.console, show_time=False, show_path=False)
        logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def images(self, name: str, done: int, total: int, status: str = "") -> None:
        """Show `done` of `total` under a name, with a status."""
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(name, total=total, completed=done, status=status)
        self.progress.update(self._tasks[name], completed=done, total=total, status=status)
        self._line(name, f"{name}: {done:,} of {total:,} {status}".rstrip(), done == total)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Show a step while it runs, and then its duration."""
        start = time.monotonic()
        task = self.progress.add_task(name, total=None, status="")
        yield Step(self, name, task)
        seconds = time.monotonic() - start
        self.progress.update(task, total=1, completed=1, status="")
        self._line(name, f"{name}: done in {seconds:.1f} s", True)

    def _line(self, name: str, text: str, last: bool) -> None:
        now = time.monotonic()
        if self.console.is_terminal or (not last and now - self._last_line.get(name, 0.0) < _LINE_SECONDS):
            return
        self._last_line[name] = now
        self.console.print(text, soft_wrap=True)
