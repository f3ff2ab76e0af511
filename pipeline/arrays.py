"""Array types, and vectors as Arrow columns."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Labels = NDArray[np.generic]

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

NO_LABEL = -1
"""Stands for no label where labels are numbers."""


def vector_type(dim: int) -> pa.DataType:
    """The Arrow type of a float32 vector of `dim` numbers."""
    return pa.list_(pa.float32(), dim)


def vectors_to_arrow(vectors: Float32) -> pa.FixedSizeListArray:
    """(N, d) float32 as an Arrow column, without a copy if the rows are contiguous."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def vectors_from_arrow(column: pa.ChunkedArray | pa.Array) -> Float32:
    """A fixed-size-list column as (N, d) float32; the inverse of `vectors_to_arrow`, float16 widened.

    Raises:
        ValueError: a vector is null.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        raise ValueError(f"{array.null_count} of {len(array)} vectors are null")
    flat = array.flatten().to_numpy(zero_copy_only=False)
    vectors: Float32 = flat.astype(np.float32, copy=False).reshape(len(array), array.type.list_size)
    return vectors


def tensor_metadata(data: bytes, key: str) -> Any:
    """A JSON value from the metadata of a safetensors file, which `safetensors.numpy.load` does not return.

    Raises:
        ValueError, KeyError: the value is missing.
    """
    length = int.from_bytes(data[:8], "little")  # of the header, which is JSON too
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"][key])
