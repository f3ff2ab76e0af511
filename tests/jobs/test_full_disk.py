"""Commands on a full disk: readers work, gc frees space, others end with one message."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from jobs import evaluate, export, rollback
from jobs.cli import main
from jobs.upkeep import gc
from pipeline.index import disk_reserve, tags
from pipeline.index.gc import Rules, collect_garbage
from pipeline.index.leases import Removals
from pipeline.reporting.audit import audit
from pipeline.serving.searcher import Searcher
from pipeline.storage import documents, objects
from pipeline.storage.settings import StorageSettings
from tests.support.published_run import LAST, published_run
from tests.support.synthetic_run import Options, known, make_run

DISK_BYTES = 24 * 2**20
NOW = Rules(keep=1, grace_seconds=0)


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def limit(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A full disk where this machine lets nobody mount one: a write fails when it is synced."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(str(folder)) and os.path.isfile(path) and used(folder) > DISK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    patch.setattr(os, "fsync", fsync)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small file system of its own; a limit on the folder where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        limit(folder, monkeypatch)
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write until nothing more fits."""
    filler = folder / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        for _ in range(2):  # the first write ends where the disk does
            file.write(bytes(DISK_BYTES))
    with pytest.raises(OSError, match="No space"):
        objects.put(str(folder / "more"), bytes(8192))
    return filler


def configured(patch: pytest.MonkeyPatch, uri: str) -> Callable[..., Result]:
    """Commands on a run; a whole config needs encoders, which they do not."""

    def load(*_: object) -> SimpleNamespace:
        objects.configure(StorageSettings())
        return SimpleNamespace(run=uri)

    for module in (gc, rollback, export):
        patch.setattr(module, "load", load)
    return lambda *arguments: CliRunner().invoke(main, [arguments[0], "--config", "run.yaml", *arguments[1:]])


def assert_one_message(result: Result, where: Path | str) -> None:
    assert result.exit_code == 1, result.output
    assert "error: the disk is full" in result.stderr
    assert f"where: {where}" in result.stderr
    assert re.search(r"what to do: (free disk space|delete a file there)", result.stderr)
    assert "Traceback" not in result.output


def test_searcher_full_disk_opens_and_answers_without_a_lease(disk: Path) -> None:
    whole = published_run(disk)
    fill(disk)
    with Searcher(whole.run.uri) as searcher:
        assert searcher.commit.number == LAST
        assert searcher.search(whole.embedded[:2], 3).ids.shape == (2, 3)
        assert objects.list_files(whole.run.path("index", "leases")) == []


def test_searcher_io_error_while_it_objects_to_a_removal_opens_without_a_lease(tmp_path: Path) -> None:
    """The lease fits on the disk, and nothing after it."""
    whole = published_run(tmp_path)
    objects.put(whole.run.collected, documents.encode(Removals(announced=(LAST,))))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if "/leases" not in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with Searcher(whole.run.uri) as searcher:
            assert searcher.commit.number == LAST
    assert objects.list_files(whole.run.path("index", "leases")) == []


def test_gc_full_disk_removes_leftovers_first_and_then_commits(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = published_run(disk)
    old = whole.run.path("index", ".tmp-of-a-driver-that-died")
    Path(old).write_bytes(bytes(100_000))
    os.utime(old, (0, 0))
    fill(disk)
    found = configured(monkeypatch, whole.run.uri)("gc", "--keep", "1", "--grace", "0")
    assert found.exit_code == 0, found.stderr
    assert not Path(old).exists()
    assert tags.list_commits(whole.run) == [1, LAST]
    assert audit(whole.run.uri).ok


def test_gc_full_disk_with_only_commits_to_remove_uses_its_reserve(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = published_run(disk)
    disk_reserve.keep(whole.run)
    fill(disk)
    found = configured(monkeypatch, whole.run.uri)("gc", "--keep", "1", "--grace", "0")
    assert found.exit_code == 0, found.stderr
    assert tags.list_commits(whole.run) == [1, LAST]
    assert audit(whole.run.uri).ok


def test_gc_with_room_writes_its_reserve_for_the_next_time(disk: Path) -> None:
    whole = published_run(disk)
    collect_garbage(whole.run.uri)
    assert Path(whole.run.path("index", "reserve")).stat().st_size == disk_reserve.SIZE_BYTES
    fill(disk)
    collect_garbage(whole.run.uri, NOW)
    assert tags.list_commits(whole.run) == [1, LAST]


def test_gc_full_disk_without_a_reserve_says_to_free_space_by_hand_and_changes_nothing(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in runs of earlier versions."""
    whole = published_run(disk)
    collect_garbage(whole.run.uri, NOW)
    objects.delete(whole.run.path("index", "reserve"))
    objects.put(whole.run.collected, documents.encode(Removals(confirmed=(0, 2, 3), announced=(1,))))
    fill(disk)
    before = sorted(objects.list_files(whole.run.uri))
    result = configured(monkeypatch, whole.run.uri)("gc")
    assert_one_message(result, whole.run.collected)
    assert "delete a file there that is not the run's" in " ".join(result.stderr.split())
    assert "fastfill gc" not in result.stderr
    assert sorted(objects.list_files(whole.run.uri)) == before


def test_rollback_full_disk_is_one_message_with_the_tag_and_what_to_do(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = published_run(disk)
    filler = fill(disk)
    command = configured(monkeypatch, whole.run.uri)
    assert_one_message(command("rollback"), whole.run.tag("prod"))
    filler.unlink()
    assert command("rollback").exit_code == 0


def test_export_full_disk_is_one_message_and_goes_on_once_there_is_space(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = make_run(disk / "run", known(), Options())
    filler = fill(disk)
    command = configured(monkeypatch, run.uri)
    out = disk / "out"
    assert_one_message(command("export", str(out), "--format", "parquet"), out)
    filler.unlink()
    done = command("export", str(out), "--format", "parquet")
    assert done.exit_code == 0, done.stderr


def test_evaluate_full_disk_is_one_message_with_the_file_and_what_to_do(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = make_run(disk / "run", known(), Options())
    monkeypatch.setattr(evaluate, "load", lambda *_: config)
    monkeypatch.setattr(evaluate, "open_run_of", lambda _: run)
    fill(disk)
    result = CliRunner().invoke(main, ["evaluate", "--config", "run.yaml", "--curve"])
    assert_one_message(result, run.path("reports", "curve.json"))
