"""Storage: what exists is whole, publishing has one winner, and the same rows give the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, DataError
from pipeline.storage import objects, parquet
from pipeline.storage.interface import AlreadyExists, Changed

WRITERS = 16


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A name below a folder that is not there yet."""
    return str(tmp_path / "new" / "object.json")


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Three other processes."""
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        yield pool


def try_to_create(uri: str, data: bytes) -> bool:
    try:
        objects.put_if_absent(uri, data)
    except AlreadyExists:
        return False
    return True


def try_to_swap(uri: str, data: bytes, version: str | None) -> bool:
    try:
        objects.compare_and_swap(uri, data, version)
    except Changed:
        return False
    return True


def everything_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_put_file_can_be_read_and_replaced(uri: str) -> None:
    assert not objects.exists(uri)
    objects.put(uri, b"one")
    assert objects.exists(uri)
    assert objects.read_bytes(uri) == b"one"
    objects.put(uri, b"two")
    assert objects.read_bytes(uri) == b"two"
    assert objects.read_bytes(f"file://{uri}") == b"two"


def test_listing_of_a_uri_with_a_scheme_gives_uris_with_that_scheme(uri: str) -> None:
    objects.put(uri, b"one")
    folder = f"file://{uri.rpartition('/')[0]}"
    assert objects.list_files(folder) == [f"file://{uri}"]
    assert [found for found, _ in objects.iter_stats(folder)] == [f"file://{uri}"]
    assert objects.folders(folder.rpartition("/")[0]) == [folder]


def test_create_by_many_threads_has_one_winner(uri: str) -> None:
    start = threading.Barrier(WRITERS)

    def create(writer: int) -> bool:
        start.wait()
        return try_to_create(uri, str(writer).encode() * 1000)

    with ThreadPoolExecutor(WRITERS) as pool:
        won = list(pool.map(create, range(WRITERS)))
    assert sum(won) == 1
    assert objects.read_bytes(uri) == str(won.index(True)).encode() * 1000


def test_create_by_many_processes_has_one_winner(uri: str, processes: ProcessPoolExecutor) -> None:
    won = list(processes.map(try_to_create, [uri] * 40, [b"%d" % writer for writer in range(40)]))
    assert sum(won) == 1
    assert objects.read_bytes(uri) == b"%d" % won.index(True)


def test_a_name_that_is_taken_keeps_its_content_and_nothing_else_is_left(uri: str) -> None:
    objects.put_if_absent(uri, b"first")
    with pytest.raises(AlreadyExists):
        objects.put_if_absent(uri, b"second")
    assert objects.read_bytes(uri) == b"first"
    assert everything_below(Path(uri).parent) == ["object.json"]


def test_a_swap_wins_only_against_the_version_that_was_read(uri: str) -> None:
    assert objects.read_versioned(uri) is None
    first = objects.compare_and_swap(uri, b"first", None)
    assert objects.read_versioned(uri) == (b"first", first)
    second = objects.compare_and_swap(uri, b"second", first)
    for version in (first, None, "never"):
        with pytest.raises(Changed):
            objects.compare_and_swap(uri, b"third", version)
    assert objects.read_versioned(uri) == (b"second", second)


def test_compare_and_swap_of_a_deleted_file_loses(uri: str) -> None:
    version = objects.compare_and_swap(uri, b"first", None)
    objects.delete(uri)
    with pytest.raises(Changed):
        objects.compare_and_swap(uri, b"second", version)
    assert not objects.exists(uri)


def test_compare_and_swap_from_one_version_has_one_winner(uri: str) -> None:
    start, version = threading.Barrier(WRITERS), objects.compare_and_swap(uri, b"first", None)

    def swap(writer: int) -> bool:
        start.wait()
        return try_to_swap(uri, b"%d" % writer, version)

    with ThreadPoolExecutor(WRITERS) as pool:
        won = list(pool.map(swap, range(WRITERS)))
    assert sum(won) == 1
    assert objects.read_bytes(uri) == b"%d" % won.index(True)


def test_no_increment_is_lost_among_processes_that_swap(uri: str, processes: ProcessPoolExecutor) -> None:
    objects.put(uri, b"0")
    list(processes.map(increment, [uri] * 3))
    assert objects.read_bytes(uri) == b"30"


def increment(uri: str) -> None:
    """Add one ten times, as a driver moves a tag."""
    done = 0
    while done < 10:
        found = objects.read_versioned(uri)
        assert found is not None
        done += try_to_swap(uri, b"%d" % (int(found[0]) + 1), found[1])


_DIES_IN_MID_WRITE = """
import os, signal, sys
from pipeline.storage import objects

write = getattr(objects, sys.argv[1])
found = objects.read_versioned(sys.argv[2])
arguments = (found[1],) if sys.argv[1] == "compare_and_swap" else ()


def die(descriptor):  # the bytes are written but not yet synced, let alone named
    os.kill(os.getpid(), signal.SIGKILL)


os.fsync = die
write(sys.argv[2], b"new" * 100_000, *arguments)
"""


@pytest.mark.parametrize("function", ["put", "put_if_absent", "compare_and_swap"])
def test_a_writer_killed_in_mid_write_leaves_nothing_to_be_seen(tmp_path: Path, function: str) -> None:
    uri = str(tmp_path / "object.json")
    before = [] if function == "put_if_absent" else [uri]
    if before:
        objects.put(uri, b"old")
    # A replaced fsync, because a kill from outside cannot be timed to fall inside a write.
    killed = subprocess.run([sys.executable, "-c", _DIES_IN_MID_WRITE, function, uri], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(everything_below(tmp_path)) > len(before)  # its half-written file is there, under no name of ours
    assert objects.list_files(str(tmp_path)) == before
    assert objects.expand(f"{tmp_path}/*", "") == before
    assert objects.exists(uri) == bool(before)
    if before:
        assert objects.read_bytes(uri) == b"old"
    found = objects.read_versioned(uri)
    assert try_to_swap(uri, b"next", found[1] if found else None)  # its lock died with it


def test_a_reader_beside_a_writer_sees_whole_objects_only(uri: str) -> None:
    contents = [bytes([letter]) * 200_000 for letter in range(20)]
    objects.put(uri, contents[0])
    stop = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(objects.read_bytes(uri))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        objects.put(uri, content)
    stop.set()
    reader.join()
    assert seen <= set(contents)


def test_a_failed_write_leaves_no_temporary_file(uri: str) -> None:
    with pytest.raises(TypeError):
        objects.put(uri, "text")  # type: ignore[arg-type] - the point of the test
    assert everything_below(Path(uri).parent) == []


def test_a_listing_has_whole_objects_at_any_depth_sorted(tmp_path: Path) -> None:
    for name in ("b/2.parquet", "b/1.parquet", "a.json", "c/d/3.parquet"):
        objects.put(str(tmp_path / name), b"")
    for name in (".tmp-123", "b/.tmp-456.parquet", "b/.lock-1.parquet"):
        (tmp_path / name).touch()
    assert objects.list_files(str(tmp_path), ".parquet") == [
        str(tmp_path / name) for name in ("b/1.parquet", "b/2.parquet", "c/d/3.parquet")
    ]
    assert objects.list_files(str(tmp_path / "nowhere")) == []


def test_a_lock_is_not_listed(uri: str) -> None:
    objects.compare_and_swap(uri, b"first", None)
    assert objects.list_files(str(Path(uri).parent)) == [uri]


def test_a_file_a_folder_and_a_glob_stand_for_their_files(tmp_path: Path) -> None:
    names = ["x/a.parquet", "x/b.parquet", "y/a.parquet", "x/notes.txt", "odd[1].parquet"]
    for name in [*names, "x/.hidden.parquet"]:
        objects.put(str(tmp_path / name), b"")

    def expanded(pattern: str) -> list[str]:
        return [os.path.relpath(found, tmp_path) for found in objects.expand(f"{tmp_path}/{pattern}", ".parquet")]

    assert expanded("x/a.parquet") == ["x/a.parquet"]
    assert expanded("x") == ["x/a.parquet", "x/b.parquet"]
    assert expanded("*/a.parquet") == ["x/a.parquet", "y/a.parquet"]
    assert expanded("x/*.parquet") == ["x/a.parquet", "x/b.parquet"]
    assert expanded("odd[1].parquet") == ["odd[1].parquet"]
    assert expanded("nowhere") == expanded("no*where") == []


@given(st.binary(max_size=200), st.integers(0, 250), st.integers(0, 250))
def test_a_range_is_that_slice_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int, length: int
) -> None:
    uri = str(tmp_path_factory.mktemp("range") / "object")
    Path(uri).write_bytes(data)
    assert objects.read_bytes(uri, offset, length) == data[offset : offset + length]
    assert objects.read_bytes(uri, offset) == data[offset:]


def test_an_etag_and_a_digest_change_with_the_content(uri: str) -> None:
    objects.put(uri, b"one")
    stat, digest = objects.stat(uri), objects.sha256(uri)
    objects.put(uri, b"two")
    assert stat.size_bytes == 3
    assert objects.stat(uri).etag != stat.etag
    assert objects.sha256(uri) != digest


def test_read_of_a_missing_file_is_an_error(uri: str) -> None:
    for read in (objects.read_bytes, objects.stat, objects.sha256):
        with pytest.raises(FileNotFoundError):
            read(uri)
    with pytest.raises(DataError, match="missing"):
        parquet.read_parquet(uri)


def test_read_parquet_of_another_file_is_an_error(uri: str) -> None:
    objects.put(uri, b"PAR1 but not really")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        parquet.read_parquet(uri)


def test_a_delete_of_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    objects.put(str(tmp_path / "kept" / "file"), b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    objects.delete(str(tmp_path / "link"))
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "kept" / "file").read_bytes() == b"precious"


def test_a_delete_takes_an_object_or_all_below_a_folder_and_may_be_repeated(tmp_path: Path) -> None:
    for name in ("a/1", "a/b/2", "a/b/c/3", "ab"):
        objects.put(str(tmp_path / name), b"")
    objects.delete(str(tmp_path / "a" / "1"))
    objects.delete(str(tmp_path / "a" / "1"))
    assert everything_below(tmp_path / "a") == ["2", "3"]
    objects.delete(str(tmp_path / "a"))
    objects.delete(str(tmp_path / "a"))
    assert everything_below(tmp_path) == ["ab"]
    assert not objects.exists(str(tmp_path / "a"))


def test_a_store_that_is_not_supported_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="gopher://"):
        objects.read_bytes("gopher://somewhere/object")


def rows(count: int) -> pa.Table:
    texts = [f"text {i % 7}" if i % 3 else None for i in range(count)]
    return pa.table({"id": pa.array(range(count), pa.int64()), "text": pa.array(texts, pa.string())})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=6))
def test_a_parquet_file_has_the_row_groups_it_was_given_empty_ones_too(sizes: list[int]) -> None:
    whole, starts = rows(sum(sizes)), [sum(sizes[:i]) for i in range(len(sizes))]
    groups = [whole.slice(start, size) for start, size in zip(starts, sizes, strict=True)]
    data = parquet.parquet_bytes(whole.schema, groups)
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == sizes
        for index, group in enumerate(groups):
            assert file.read_row_group(index).equals(group)


def test_the_same_rows_give_the_same_bytes_however_they_lie_in_memory() -> None:
    whole = rows(50)
    pieces = pa.concat_tables([whole.slice(0, 7), whole.slice(7, 20), whole.slice(27)])
    mixed = whole.select(["text", "id"])  # the schema says the order of the columns
    wide = whole.set_column(1, "text", whole["text"].cast(pa.large_string()))
    expected = parquet.parquet_bytes(whole.schema, [whole])
    for same in (pieces, mixed, wide, pieces.combine_chunks()):
        assert parquet.parquet_bytes(whole.schema, [same]) == expected


def test_the_same_rows_give_the_same_bytes_in_another_process(processes: ProcessPoolExecutor) -> None:
    other = processes.submit(parquet.parquet_bytes, rows(50).schema, [rows(50)]).result()
    assert other == parquet.parquet_bytes(rows(50).schema, [rows(50)])


def test_a_folder_is_listed_deep_or_not_in_an_order_that_stays(tmp_path: Path) -> None:
    for name in ("b/2", "b/1", "a/c/3", "z", "y"):
        objects.put(str(tmp_path / name), b"x")
    deep = [uri.removeprefix(f"{tmp_path}/") for uri, _ in objects.iter_stats(str(tmp_path))]
    assert deep == ["y", "z", "a/c/3", "b/1", "b/2"]
    assert [uri for uri, _ in objects.iter_stats(str(tmp_path), deep=False)] == [f"{tmp_path}/y", f"{tmp_path}/z"]
    assert objects.folders(str(tmp_path)) == [f"{tmp_path}/a", f"{tmp_path}/b"]


def test_an_s3_folder_is_listed_deep_or_not(bucket: str) -> None:
    for name in ("b/2", "b/1", "a/c/3", "z"):
        objects.put(f"{bucket}/top/{name}", b"x")
    deep = [uri.removeprefix(f"{bucket}/top/") for uri, _ in objects.iter_stats(f"{bucket}/top")]
    assert deep == ["a/c/3", "b/1", "b/2", "z"]
    assert [uri for uri, _ in objects.iter_stats(f"{bucket}/top/", deep=False)] == [f"{bucket}/top/z"]
    assert objects.folders(f"{bucket}/top") == [f"{bucket}/top/a", f"{bucket}/top/b"]


@pytest.mark.parametrize("write", ["put", "put_if_absent", "compare_and_swap"])
def test_write_into_new_folders_syncs_each_of_them_in_its_parent_before_the_name_appears(
    tmp_path: Path, write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of the system are recorded, and made: only a power cut would show what was not synced."""
    calls: list[tuple[str, str]] = []

    def record(name: str, path_of: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            result = real(*arguments, **named)
            calls.append((name, path_of(*arguments)))
            return result

        monkeypatch.setattr(os, name, call)

    record("mkdir", lambda path, *_: os.fspath(path))
    record("fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    record("link", lambda _, target: os.fspath(target))
    record("rename", lambda _, target: os.fspath(target))
    uri = str(tmp_path / "run" / "index" / "commits" / "0.json")
    getattr(objects, write)(uri, b"data", *([None] if write == "compare_and_swap" else []))
    made = [path for name, path in calls if name == "mkdir"]
    assert made == [str(tmp_path / name) for name in ("run", "run/index", "run/index/commits")]
    appeared = next(at for at, (name, path) in enumerate(calls) if name in ("link", "rename") and path == uri)
    for path in made:
        synced = ("fsync", os.path.dirname(path))
        assert synced in calls[calls.index(("mkdir", path)) : appeared], f"{path} is not synced in time"
    assert ("fsync", os.path.dirname(uri)) in calls[appeared:]
