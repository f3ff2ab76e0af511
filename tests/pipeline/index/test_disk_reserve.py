"""The file that gc deletes to make room on a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.errors import FastfillError
from pipeline.index import disk_reserve
from pipeline.run import Run


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there")


def test_with_room_disk_full_even_without_the_reserve_is_an_error_and_the_reserve_stays(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    disk_reserve.keep(run)
    with pytest.raises(FastfillError, match="the disk is full") as found:
        disk_reserve.with_room(run, full)
    assert found.value.details["where"] == "/there"
    assert (tmp_path / "index/reserve").stat().st_size == disk_reserve.SIZE_BYTES


def test_with_room_other_error_leaves_the_reserve_alone(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    disk_reserve.keep(run)
    before = (tmp_path / "index/reserve").stat().st_ino

    def refused() -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with pytest.raises(PermissionError):
        disk_reserve.with_room(run, refused)
    assert (tmp_path / "index/reserve").stat().st_ino == before
