"""Text for people: durations, moments and counts."""

from __future__ import annotations

import time


def duration(seconds: float) -> str:
    """A duration in its two largest units: `0.4 s`, `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(unix_seconds: float) -> str:
    """A moment in UTC: `2026-11-29 21:05:40 UTC`."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_seconds))


def counted(number: int, what: str) -> str:
    """A count with its noun: `1 file`, `2,000 files`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
