"""Digests in Parquet files: damage is found whatever it hits, and files without digests are read as they are."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.arrays import vectors_to_arrow
from pipeline.errors import DataError
from pipeline.schema import UNITS, embedded_schema, manifest_schema, transformed_schema
from pipeline.storage import checksums, parquet
from pipeline.storage.checksums import Content

DIM, NUM, GROUPS, FLIPS = 16, 64, 8, 300
SCHEMAS = {
    "embedded": embedded_schema(DIM).with_metadata({b"rejects": b"0123456789abcdef"}),
    "transformed": transformed_schema(DIM),
    "units": UNITS,
    "gallery": manifest_schema({"old_embedding": DIM}, traffic=True),
}


def rows_of(schema: pa.Schema, seed: int = 0) -> pa.Table:
    """Random rows; strings have nulls among them, and one in four columns of integers is null as a whole."""
    rng = np.random.default_rng(seed)
    columns = {}
    for name, kind in zip(schema.names, schema.types, strict=True):
        if pa.types.is_fixed_size_list(kind):
            columns[name] = vectors_to_arrow(rng.normal(size=(NUM, DIM)).astype(np.float32))
        elif pa.types.is_string(kind):
            columns[name] = pa.array([f"{name} {row}" if row % 7 else None for row in range(NUM)])
        elif pa.types.is_floating(kind):
            columns[name] = pa.array(rng.normal(size=NUM).astype(np.float32))
        elif name == "offset":
            columns[name] = pa.nulls(NUM, kind)
        else:
            columns[name] = pa.array(rng.integers(0, 10**6, NUM)).cast(kind)
    return pa.table(columns).cast(schema)


def write_parquet(schema: pa.Schema, rows: pa.Table) -> bytes:
    step = NUM // GROUPS
    return parquet.parquet_bytes(schema, (rows.slice(start, step) for start in range(0, NUM, step)))


def read(uri: Path, *what: object) -> pa.Table:
    return parquet.read_parquet(str(uri), *what)  # type: ignore[arg-type]


def read_or_refuse(uri: Path) -> pa.Table | None:
    """The rows of a file; None if it is refused by name."""
    try:
        return read(uri)
    except DataError as error:
        where = error.details["where"]
    assert where == str(uri)
    return None


@pytest.mark.parametrize("kind", SCHEMAS)
def test_read_parquet_of_a_file_with_a_flipped_bit_finds_it_or_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    data, uri = write_parquet(SCHEMAS[kind], rows_of(SCHEMAS[kind])), tmp_path / "part.parquet"
    uri.write_bytes(data)
    whole, found = read(uri), 0
    for bit in np.random.default_rng(1).choice(8 * len(data), FLIPS, replace=False).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        uri.write_bytes(damaged)
        rows = read_or_refuse(uri)
        assert rows is None or rows.equals(whole), f"bit {bit % 8} of byte {bit // 8}"
        found += rows is None
    assert found > FLIPS // 3


@pytest.mark.parametrize("place", ["page header", "footer"])
def test_read_parquet_of_a_file_whose_page_checksums_miss_the_damage_finds_it(tmp_path: Path, place: str) -> None:
    """In a footer the number of a value's bytes; in a page header how values are encoded: no page holds these."""
    schema, uri = pa.schema([pa.field("id", pa.int32())]), tmp_path / "part.parquet"
    data = parquet.parquet_bytes(schema, [pa.table({"id": pa.array([1, 2, 3], pa.int32())})])
    start, stop = (4, len(data) // 4) if place == "page header" else (data.index(b"ARROW:schema") - 200, len(data) - 8)
    missed = 0
    for bit in range(8 * max(4, start), 8 * stop, 3):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        uri.write_bytes(damaged)
        try:
            with pq.ParquetFile(uri, page_checksum_verification=True) as plain:
                others = plain.read()["id"].to_pylist() != [1, 2, 3]
        except (OSError, pa.ArrowException, ValueError, KeyError):
            continue
        if others:
            missed += 1
            with pytest.raises(DataError):
                read(uri)
    assert missed, "nothing is left for the digests: the test tries nothing"


def test_parquet_bytes_pages_have_checksums() -> None:
    data = bytearray(write_parquet(SCHEMAS["embedded"], rows_of(SCHEMAS["embedded"])))
    with Content(pa.BufferReader(bytes(data))) as file:
        column = file.metadata.row_group(0).column(file.schema_arrow.names.index("vector"))
        data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    plain = pq.ParquetFile(pa.BufferReader(bytes(data)), page_checksum_verification=True)
    with pytest.raises(OSError, match=r"(?i)crc"):
        plain.read(columns=["vector"])


def test_read_parquet_reads_files_without_checksums_and_digests(tmp_path: Path) -> None:
    rows = rows_of(SCHEMAS["transformed"])
    pq.write_table(rows, tmp_path / "plain.parquet")
    assert read(tmp_path / "plain.parquet").equals(rows)
    with parquet.open_parquet(str(tmp_path / "plain.parquet")) as file:
        assert file.digest == ""


def test_read_parquet_reads_rows_that_another_program_wrote_with_the_metadata_of_our_file(tmp_path: Path) -> None:
    (tmp_path / "ours.parquet").write_bytes(write_parquet(SCHEMAS["gallery"], rows_of(SCHEMAS["gallery"])))
    some = pq.ParquetFile(tmp_path / "ours.parquet").read().slice(5, 9)
    pq.write_table(some, tmp_path / "theirs.parquet")
    assert checksums.KEY in pq.read_metadata(tmp_path / "theirs.parquet").metadata
    assert read(tmp_path / "theirs.parquet").equals(some)


def test_read_parquet_of_some_columns_and_row_groups_compares_these(tmp_path: Path) -> None:
    schema, uri = SCHEMAS["transformed"], tmp_path / "part.parquet"
    uri.write_bytes(write_parquet(schema, rows_of(schema)))
    found = read(uri, ["id", "vector"], [6, 1])
    step = NUM // GROUPS
    expected = pa.concat_tables([rows_of(schema).slice(6 * step, step), rows_of(schema).slice(step, step)])
    assert found.equals(expected.select(["id", "vector"]))
    assert checksums.KEY not in (found.schema.metadata or {})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.bool_(), [True, None, False]),
        (pa.float16(), [np.float16(0.5), None, np.float16(2)]),
        (pa.uint64(), [2**64 - 1, None, 3]),
        (pa.large_string(), ["", None, "ä"]),
        (pa.binary(), [b"", None, b"\0\1"]),
        (pa.list_(pa.float32()), [[1.0, None], None, []]),
        (pa.list_(pa.int8(), 2), [[1, 2], None, [3, 4]]),
        (pa.null(), [None, None, None]),
        (pa.timestamp("s"), [datetime(2020, 1, 1), None, datetime(2021, 1, 1)]),
        (pa.dictionary(pa.int32(), pa.string()), ["a", None, "b"]),
        (pa.struct([("a", pa.int8())]), [{"a": 1}, None, {"a": 2}]),
    ],
)
def test_read_parquet_gives_back_columns_of_each_type(tmp_path: Path, kind: pa.DataType, values: list[object]) -> None:
    table = pa.table({"column": pa.array(values, kind)})
    (tmp_path / "part.parquet").write_bytes(parquet.parquet_bytes(table.schema, [table, table.slice(0, 0)]))
    assert read(tmp_path / "part.parquet")["column"].to_pylist() == table["column"].to_pylist()


@pytest.mark.parametrize("kind", SCHEMAS)
def test_digest_of_equal_rows_in_other_buffers_is_the_same(kind: str) -> None:
    schema, rows = SCHEMAS[kind], rows_of(SCHEMAS[kind])
    pieces = pa.concat_tables([rows.slice(0, 3), rows.slice(3, 18), rows.slice(21)])
    taken = pa.concat_tables([rows.slice(60), rows]).slice(4)
    assert len({checksums.digest_of(write_parquet(schema, some)) for some in (rows, pieces, taken)}) == 1
    assert checksums.digest_of(write_parquet(schema, rows)) != checksums.digest_of(
        write_parquet(schema, rows_of(schema, seed=1))
    )


def test_digest_of_other_metadata_order_or_row_groups_is_another() -> None:
    rows = rows_of(UNITS)
    variants = [
        write_parquet(UNITS, rows),
        write_parquet(UNITS.with_metadata({b"rejects": b"0"}), rows),
        write_parquet(UNITS, rows.take(pa.array(np.arange(NUM)[::-1]))),
        parquet.parquet_bytes(UNITS, [rows]),
    ]
    assert len(set(map(checksums.digest_of, variants))) == len(variants)


def test_open_parquet_of_a_file_whose_rows_were_exchanged_below_its_digests_is_refused(tmp_path: Path) -> None:
    """As if somebody had put the digests of one file under the rows of another."""
    schema = embedded_schema(DIM)
    ours, sink = Content(pa.BufferReader(write_parquet(schema, rows_of(schema)))), io.BytesIO()
    with pq.ParquetWriter(sink, schema) as writer:
        for group in range(GROUPS):
            writer.write_table(rows_of(schema, seed=1).slice(group * NUM // GROUPS, NUM // GROUPS))
        writer.add_key_value_metadata({checksums.KEY: ours.metadata.metadata[checksums.KEY]})
    (tmp_path / "part.parquet").write_bytes(sink.getvalue())
    with pytest.raises(DataError, match=r"changed after it was written(.|\n)*column id of row group 0"):
        read(tmp_path / "part.parquet")
