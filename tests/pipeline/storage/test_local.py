"""Images from local files: regular files alone, and none that a link brings in from outside."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path

import pytest

from pipeline.storage.interface import Outside, TooLarge, Unreadable
from pipeline.storage.local import LocalReader, LocalStore

MOST = 1000


def special(folder: Path, kind: str) -> str:
    """The path of something that is no regular file; tests of devices need none of their own."""
    path = folder / kind
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        return "/dev/zero"
    return str(path)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_reader_no_regular_file_is_unreadable_at_once(tmp_path: Path, kind: str) -> None:
    name, start = special(tmp_path, kind), time.monotonic()
    with pytest.raises(Unreadable) as whole:
        LocalReader().whole(name, MOST)
    with pytest.raises(Unreadable):
        list(LocalReader().spans(name, [(0, 10)]))
    with pytest.raises(Unreadable):
        LocalStore().open(name)
    assert kind in whole.value.code
    assert time.monotonic() - start < 5


def test_reader_file_of_proc_that_says_it_is_empty_is_not_read() -> None:
    assert LocalReader().whole("/proc/self/environ", MOST)[0] == b""


def test_reader_file_above_the_limit_is_too_large_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(MOST + 1))
    with pytest.raises(TooLarge):
        LocalReader().whole(f"{tmp_path}/a", MOST)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a file, links of its own, and links out of it."""
    folder = tmp_path / "root"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"outside")
    (tmp_path / "root-beside").write_bytes(b"outside")
    (folder / "file").write_bytes(b"inside")
    (folder / "inner").symlink_to("file")
    (folder / "link").symlink_to("../outside")
    (folder / "beside").symlink_to("../root-beside")
    (folder / "up").symlink_to("..")
    return folder


@pytest.mark.parametrize("name", ["link", "beside", "up/outside", "../outside"])
def test_reader_link_or_dots_out_of_the_root_is_outside_unless_there_is_no_root(root: Path, name: str) -> None:
    reader = LocalReader(str(root))
    with pytest.raises(Outside) as caught:
        reader.whole(f"{root}/{name}", MOST)
    assert caught.value.found in (f"{root.parent}/outside", f"{root.parent}/root-beside")
    with pytest.raises(Outside):
        list(reader.spans(f"{root}/{name}", [(0, 3)]))
    assert LocalReader().whole(f"{root}/{name}", MOST)[0] == b"outside"


def test_reader_file_in_the_root_or_at_an_absolute_uri_is_read(root: Path) -> None:
    reader = LocalReader(f"{root}/")
    for name in ("file", "inner"):
        assert reader.whole(f"{root}/{name}", MOST)[0] == b"inside"
    assert reader.whole(f"{root.parent}/outside", MOST)[0] == b"outside"


def test_reader_root_that_is_a_link_itself_holds_what_lies_behind_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    reader = LocalReader(f"{tmp_path}/alias")
    assert reader.whole(f"{tmp_path}/alias/inner", MOST)[0] == b"inside"
    with pytest.raises(Outside):
        reader.whole(f"{tmp_path}/alias/link", MOST)


@pytest.mark.parametrize("how", ["put", "put_if_absent", "compare_and_swap"])
def test_write_that_the_file_system_refuses_names_the_target_and_not_the_temporary_file(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*paths: object, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), *paths[:1], None, *paths[1:2])

    target, store = str(tmp_path / "tag.json"), LocalStore()
    calls = {
        "put": ("rename", lambda: store.put(target, b"1")),
        "put_if_absent": ("link", lambda: store.put_if_absent(target, b"1")),
        "compare_and_swap": ("rename", lambda: store.compare_and_swap(target, b"1", None)),
    }
    name, call = calls[how]
    monkeypatch.setattr(os, name, refused)
    with pytest.raises(OSError, match="Read-only") as caught:
        call()
    assert (str(caught.value.filename), caught.value.filename2) == (target, None)


def test_write_over_a_folder_names_the_target_alone(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        LocalStore().put(str(target), b"1")
    assert str(caught.value.filename) == str(target)
    assert caught.value.filename2 is None
