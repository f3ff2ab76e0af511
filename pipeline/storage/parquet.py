"""Parquet files of a run: written with digests of their content, which each read compares."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.storage.checksums import Content, Digests, Mismatch
from pipeline.storage.objects import open_input

_REMEDY = "restore the file from a copy, or make it again; `fastfill audit` lists all damaged files"


def parquet_bytes(schema: pa.Schema, row_groups: Iterable[pa.Table], with_digests: bool = True) -> bytes:
    """A Parquet file with one row group per table, also for empty tables; the same rows give the same bytes.

    The file has page checksums and digests: see `storage.checksums`. Without them it is byte for byte the file that
    version 0.1 wrote, whose sha256 the commits of that version name.
    """
    sink, digests = io.BytesIO(), Digests(schema)
    options: dict[str, object] = {"use_dictionary": [field.name for field in schema if pa.types.is_string(field.type)]}
    options |= {"compression": "zstd", "compression_level": 1, "write_page_checksum": with_digests}
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for table in row_groups:
            rows = table.select(schema.names).cast(schema)
            digests.add(rows)
            writer.write_table(rows, row_group_size=max(1, rows.num_rows))
        if with_digests:
            writer.add_key_value_metadata(digests.metadata())
    return sink.getvalue()


@contextlib.contextmanager
def open_parquet(uri: str) -> Iterator[Content]:
    """Open a Parquet file for reading; each read is compared with the checksums and digests, if there are some.

    Raises:
        DataError: the file is missing, damaged, or not Parquet.
        PermissionError: the file may not be read.
    """
    try:
        with Content(open_input(uri)) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError("a Parquet file is missing", where=uri) from error
    except PermissionError:
        raise
    except Mismatch as error:
        raise DataError("a file was changed after it was written", found=error, where=uri, remedy=_REMEDY) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # a damaged file raises any of these
        raise DataError("not a readable Parquet file", found=error, where=uri) from error


def read_parquet(uri: str, columns: list[str] | None = None, row_groups: list[int] | None = None) -> pa.Table:
    """Read a Parquet file, or some of its columns and row groups."""
    with open_parquet(uri) as file:
        if row_groups is None:
            return file.read(columns=columns)
        return file.read_row_groups(row_groups, columns=columns)
