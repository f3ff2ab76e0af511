"""Tars: every range is the image, and what cannot be said exactly is refused with the place."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.manifest import scan_tars
from pipeline.manifest.scan_tars import index_tar
from pipeline.manifest.splits import Options, SourceSplit, SplitResult, SplitWriter
from pipeline.storage import objects, parquet
from pipeline.storage.retry import COUNTS
from tests.support.tars import pack

OPTIONS = Options(suffixes=(".jpg", ".png"))


def index(
    folder: str, data: bytes, name: str = "shard.tar", options: Options = OPTIONS
) -> tuple[pa.Table, SplitResult]:
    """The rows and the ledger of a tar with these bytes."""
    uri = f"{folder}/{name}"
    objects.put(uri, data)
    piece = SourceSplit("tar", (uri,), folder, objects.stat(uri).etag)
    out = SplitWriter(f"{folder}/manifest", piece, options)
    index_tar(piece, options, out)
    ledger = out.finish()
    rows = [parquet.read_parquet(chunk.uri) for chunk in ledger.chunks]
    return (pa.concat_tables(rows) if rows else ledger.arrow_schema.empty_table()), ledger


def contents(rows: pa.Table) -> dict[str, bytes]:
    """What lies where the rows say, by key."""
    return {row["key"]: objects.read_bytes(row["uri"], row["offset"], row["length"]) for row in rows.to_pylist()}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_range_is_the_image(tmp_path: Path, kind: int) -> None:
    long = "deep/" * 18 + "er/" + "n" * 60 + ".png"
    members = [("a.png", b"x"), ("./b/c.JPG", b""), (long, b"y" * 5000), ("d.png", b"z" * 512), ("notes", b"no image")]
    rows, ledger = index(str(tmp_path), pack(members, kind))
    assert contents(rows) == {
        "shard/a.png": b"x",
        "shard/b/c.JPG": b"",
        f"shard/{long}": b"y" * 5000,
        "shard/d.png": b"z" * 512,
    }
    assert rows["size_bytes"].to_pylist() == rows["length"].to_pylist()
    assert set(rows["etag"].to_pylist()) == {objects.stat(f"{tmp_path}/shard.tar").etag}
    assert ledger.notes == {"other_members": 1}


def test_names_that_need_pax_or_gnu_headers_keep_their_offsets(tmp_path: Path) -> None:
    members = [(f"{'ü' * 80}/{number}/{'x' * 120}.png", bytes([number]) * number) for number in range(1, 30)]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        rows, _ = index(str(tmp_path), pack(members, kind))
        assert contents(rows) == {f"shard/{name}": data for name, data in members}


def test_webdataset_siblings_are_labels(tmp_path: Path) -> None:
    members = [
        ("x/1.cls", b" 7\n"),
        ("x/1.jpg", b"one"),
        ("x/1.txt", b"a caption"),
        ("x/2.jpg", b"two"),
        ("x/2.txt", b"cat"),
        ("x/3.json", json.dumps({"label": 3}).encode()),
        ("x/3.jpg", b"three"),
        ("x/3.seg.png", b"mask"),
        ("x/4.jpg", b"four"),
        ("x/4.json", json.dumps({"other": 3}).encode()),
        ("y/1.jpg", b"none"),
        ("z.cls", b"9"),
    ]
    rows, ledger = index(str(tmp_path), pack(members))
    assert dict(zip(rows["key"].to_pylist(), rows["label"].to_pylist(), strict=True)) == {
        "shard/x/1.jpg": "7",
        "shard/x/2.jpg": "cat",
        "shard/x/3.jpg": "3",
        "shard/x/3.seg.png": "3",
        "shard/x/4.jpg": None,
        "shard/y/1.jpg": None,
    }
    assert ledger.notes == {"labels_without_image": 1}


def test_a_label_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name, data in (("1.json", b"{"), ("1.cls", b"\xff\xfe")):
        with pytest.raises(DataError, match=f"a label cannot be read[^$]*member {name}"):
            index(str(tmp_path), pack([("1.jpg", b"x"), (name, data)]))


@pytest.mark.parametrize("size", [2**63, 2**87, -1])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"K"])
def test_index_tar_header_with_a_size_that_no_file_has_is_refused_with_its_offset(
    tmp_path: Path, size: int, kind: bytes
) -> None:
    header = tarfile.TarInfo("a.png")
    header.type = kind
    header.size = size
    data = pack([("b.png", b"x")])[:1024] + header.tobuf(tarfile.GNU_FORMAT) + bytes(2048)
    with pytest.raises(DataError, match=r"shard\.tar: offset 1024"):
        index(str(tmp_path), data)


def test_index_tar_chain_of_long_names_without_an_end_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = b"L", 5
    block = header.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")
    with pytest.raises(DataError, match=r"shard\.tar: offset 0"):
        index(str(tmp_path), block * 3000)


def test_concatenated_tars_are_read_to_the_end(tmp_path: Path) -> None:
    rows, _ = index(str(tmp_path), pack([("a.png", b"first")]) + pack([("b.png", b"second")]))
    assert contents(rows) == {"shard/a.png": b"first", "shard/b.png": b"second"}


@pytest.mark.parametrize("stop", [100, 512, 700, 1024, 1500, 2048, 3000, 4096])
def test_a_tar_that_is_cut_off_anywhere_is_refused_with_its_name_and_offset(tmp_path: Path, stop: int) -> None:
    whole = pack([(f"{number}.png", b"x" * 600) for number in range(3)], tarfile.USTAR_FORMAT)
    with pytest.raises(DataError, match=r"shard\.tar: offset \d+") as caught:
        index(str(tmp_path), whole[:stop])
    assert "cut off" in str(caught.value) or "damaged" in str(caught.value)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    data = bytearray(pack([(f"{number}.png", b"x" * 600) for number in range(3)], tarfile.USTAR_FORMAT))
    data[1536 + 20] ^= 0xFF
    with pytest.raises(DataError, match=r"damaged[^$]*shard\.tar: offset 1536"):
        index(str(tmp_path), bytes(data))


def test_scan_of_a_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"compressed tar[^$]*gzip"):
        index(str(tmp_path), gzip.compress(pack([("a.png", b"x")])))
    for data in (b"", b"not a tar" * 200):
        with pytest.raises(DataError, match=r"not a tar, or a damaged one[^$]*offset 0"):
            index(str(tmp_path), data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": tarfile.LNKTYPE, "linkname": "a.png"}, "is a link[^$]*a link to a.png[^$]*member b.png"),
        ({"type": tarfile.SYMTYPE, "linkname": "a.png"}, "is a link[^$]*--dereference"),
        ({"type": tarfile.FIFOTYPE}, "not stored in one piece"),
    ],
)
def test_images_without_bytes_of_their_own_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
        member = tarfile.TarInfo("b.png")
        for name, value in change.items():
            setattr(member, name, value)
        archive.addfile(member)
    with pytest.raises(DataError, match=message):
        index(str(tmp_path), sink.getvalue())


def test_a_sparse_image_is_refused(tmp_path: Path) -> None:
    """tarfile cannot write one, so the header is made by hand: GNU's old form, one piece of 512 bytes in 2 MiB."""
    member = tarfile.TarInfo("s.png")
    member.size, member.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\x0000000001000\x00"
    header[483:495] = b"00010000000\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\x00 " % sum(header)
    with pytest.raises(DataError, match=r"not stored in one piece[^$]*sparse[^$]*member s.png"):
        index(str(tmp_path), bytes(header) + b"x" * 512 + bytes(1024))


def test_folders_and_hidden_files_are_no_images(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("folder.png/._a.png"))
        archive.addfile(tarfile.TarInfo("folder.png/a.png"))
    rows, _ = index(str(tmp_path), sink.getvalue())
    assert rows["key"].to_pylist() == ["shard/folder.png/a.png"]


@pytest.mark.parametrize(("size", "most_requests", "most_fraction"), [(700, 1, 1.2), (3 * 2**20, 13, 0.1)])
def test_over_s3_large_images_are_skipped_and_small_ones_streamed(
    bucket: str, size: int, most_requests: int, most_fraction: float
) -> None:
    members = [(f"{number:02d}.{kind}", data) for number in range(12) for kind, data in (("cls", b"1"), ("png", b""))]
    data = pack([(name, bytes([row]) * (size if name.endswith("png") else 1)) for row, (name, _) in enumerate(members)])
    before = COUNTS.snapshot()
    rows, _ = index(bucket, data)
    used = COUNTS.snapshot() - before
    assert used["requests:get"] - 2 <= most_requests  # the rows are read back here by two
    assert used["bytes:get"] <= most_fraction * len(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        local = {f"shard/{member.name}": member for member in archive.getmembers()}
    assert len(rows) == 12
    for row in rows.to_pylist():
        assert (row["offset"], row["length"]) == (local[row["key"]].offset_data, size)
        assert row["etag"] == objects.stat(row["uri"]).etag


def test_a_tar_that_is_replaced_while_it_is_read_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_tars, "_FIRST_READ", 512)
    monkeypatch.setattr(scan_tars, "_LONG_READ", 512)
    first, second = (pack([(f"{n}.png", bytes([n + more]) * 600) for n in range(5)]) for more in (0, 1))
    read = objects.read_with_etag

    def replaced(uri: str, offset: int | None = None, length: int | None = None) -> tuple[bytes, str]:
        found = read(uri, offset, length)
        objects.put(uri, second)
        return found

    monkeypatch.setattr(objects, "read_with_etag", replaced)
    with pytest.raises(DataError, match="replaced while it was read"):
        index(bucket, first)


def test_hashes_are_of_the_image(tmp_path: Path) -> None:
    members = [("a.png", b"same"), ("b.png", b"other"), ("c.png", b"same")]
    rows, _ = index(str(tmp_path), pack(members), options=Options(suffixes=(".png",), hash=True))
    first, second, third = rows["sha256"].to_pylist()
    assert first == third != second
