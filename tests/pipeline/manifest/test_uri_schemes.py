"""URIs of images are checked with the manifest: file and row of the first that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.manifest.scan_tables import manifest_rows
from pipeline.manifest.splits import Options
from pipeline.manifest.uri_schemes import check_schemes


@pytest.mark.parametrize("uri", ["http://host/a.png", "ftp://host/a.png", "S3://bucket/a.png", "://", "x s3://b/c"])
def test_check_schemes_unknown_scheme_is_refused_with_file_and_row(uri: str) -> None:
    uris = pa.chunked_array([["/a.png", None], ["b.png", uri, "http://later"]])
    with pytest.raises(DataError, match=r"/m\.parquet: row 13, column place") as caught:
        check_schemes(uris, "/m.parquet", 10, "place")
    assert caught.value.details["found"] == uri


@pytest.mark.parametrize("uri", ["s3://user:secret@bucket/a.png", "ftp://user:secret@host/a.png"])
def test_check_schemes_uri_with_a_password_is_refused_with_file_and_row_and_without_it(uri: str) -> None:
    with pytest.raises(DataError, match=r"user or password\n.*/m\.parquet: row 11, column place") as caught:
        check_schemes(pa.array(["s3://bucket/a@b.png", uri]), "/m.parquet", 10, "place")
    assert "secret" not in str(caught.value)


def test_check_schemes_paths_and_stores_pass(tmp_path: Path) -> None:
    check_schemes(pa.array(["/a.png", "a.png", "file:///a", "s3://b/c", None, "a:/b"]), str(tmp_path), 0, "place")


def test_manifest_rows_unknown_scheme_is_refused_with_file_and_row() -> None:
    table = pa.table({"uri": ["/a.png", "gs://b/c.png"]})
    with pytest.raises(DataError, match="row 8, column uri"):
        manifest_rows(table, "/images.csv", 7, Options(suffixes=(".png",)))
