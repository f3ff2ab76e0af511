"""The stored files of a segment: the FAISS file and its sidecar, both named by their content.

Storing the same rows again, from anywhere, writes nothing new.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.errors import DataError
from pipeline.run import Run
from pipeline.schema import SIDECAR
from pipeline.storage import interface, objects, parquet

SegmentKind = Literal["transformed", "embedded"]
KINDS: tuple[SegmentKind, SegmentKind] = ("embedded", "transformed")
_REMEDY = "`fastfill repair` makes it again if its sources are whole; `fastfill audit` lists all damaged files"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one segment, in any order."""

    ids: Int64  # (n,), unique
    vectors: Float32  # (n, d)
    kinds: NDArray[np.str_]  # (n,) `transformed` or `embedded`
    uncertainties: Float32  # (n,)
    groups: pa.Array[pa.StringScalar] | pa.ChunkedArray[pa.StringScalar]  # (n,) strings or nulls

    def take(self, mask: NDArray[np.bool_]) -> Rows:
        """The rows for which `mask` (n,) is True."""
        chosen = pa.array(mask)
        return Rows(
            self.ids[mask], self.vectors[mask], self.kinds[mask], self.uncertainties[mask], self.groups.filter(chosen)
        )


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """One segment as a commit names it; paths are relative to the run."""

    shard: int
    wave: int
    # Of all vectors; in an embedded segment of an earlier version, `rejected` of them are still transformed
    kind: SegmentKind
    path: str
    sha256: str
    bytes: int  # size of the file
    vectors: int
    sidecar_path: str
    sidecar_sha256: str
    # Images of an embedded wave that are still transformed: all of a transformed segment of that wave
    rejected: int = 0
    deleted: int = 0  # images of the (shard, wave) that are in no segment, because deleted images are dropped


def sidecar_bytes(
    ids: Int64,
    kinds: NDArray[np.str_],
    uncertainties: Float32,
    groups: pa.Array[pa.StringScalar] | pa.ChunkedArray[pa.StringScalar],
) -> bytes:
    """Id, kind, uncertainty and group of each vector as a SIDECAR Parquet file sorted by id; all arguments are (n,)."""
    columns = [pa.array(ids), pa.array(kinds, pa.string()), pa.array(uncertainties, pa.float32()), groups]
    return parquet.parquet_bytes(SIDECAR, [pa.table(columns, names=SIDECAR.names).sort_by("id")])


def store_segment(run: Run, data: bytes, rows: Rows, shard: int, wave: int, kind: SegmentKind) -> SegmentRef:
    """Store the bytes that `build_segment` made of `rows`, and the sidecar.

    Raises:
        DataError: a row is embedded in a transformed segment, or of no known kind.
    """
    if not np.isin(rows.kinds, ["transformed", kind]).all():
        raise DataError(
            "a row does not belong in this segment",
            expected=f"transformed or {kind}",
            found=sorted(set(rows.kinds.tolist())),
            where=f"shard {shard}, wave {wave}",
        )
    sidecar = sidecar_bytes(rows.ids, rows.kinds, rows.uncertainties, rows.groups)
    path, sha256 = put_by_content(run, "index/segments/{}.faiss", data)
    sidecar_path, sidecar_sha256 = put_by_content(run, "index/segments/{}.parquet", sidecar)
    return SegmentRef(
        shard=shard,
        wave=wave,
        kind=kind,
        path=path,
        sha256=sha256,
        bytes=len(data),
        vectors=len(rows.ids),
        sidecar_path=sidecar_path,
        sidecar_sha256=sidecar_sha256,
        rejected=int((rows.kinds == "transformed").sum()) if kind == "embedded" else 0,
    )


def put_by_content(run: Run, pattern: str, data: bytes) -> tuple[str, str]:
    """Store bytes under a name made of their sha256; returns the path inside the run, and the sha256."""
    sha256 = hashlib.sha256(data).hexdigest()
    path = pattern.format(sha256)
    try:
        objects.put_if_absent(run.path(path), data)
    except interface.AlreadyExists:
        if not _holds(run.path(path), len(data), sha256):
            objects.put(run.path(path), data)  # it was damaged
    return path, sha256


@contextlib.contextmanager
def local_segment(uri: str) -> Iterator[Path]:
    """A segment's file on this machine, for the length of a `with`; raises DataError if it is missing."""
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(objects.local_file(uri))
        except FileNotFoundError:
            raise DataError("a file of the index is missing", where=uri, remedy=_REMEDY) from None
        yield path


def check_digest(uri: str, sha256: str, where: str | None = None) -> None:
    """Check an object's bytes against the committed sha256; `where` names the object if `uri` is a copy.

    Raises:
        DataError: they differ, or the object is missing.
    """
    try:
        found = objects.sha256(uri)
    except FileNotFoundError:
        raise DataError("a file of the index is missing", where=where or uri, remedy=_REMEDY) from None
    if found != sha256:
        raise DataError(
            "a file of the index has changed since it was committed",
            expected=f"sha256 {sha256}",
            found=f"sha256 {found}",
            where=where or uri,
            remedy=_REMEDY,
        )


def _holds(uri: str, num_bytes: int, sha256: str) -> bool:
    try:
        return objects.stat(uri).size_bytes == num_bytes and objects.sha256(uri) == sha256
    except FileNotFoundError:  # removed meanwhile
        return False
