"""Checks of the columns of a user's manifest: names, types and widths, from the Parquet footers alone."""

from __future__ import annotations

import pyarrow as pa

from pipeline.config import tree as settings
from pipeline.errors import DataError
from pipeline.manifest.partition import EMBEDDINGS


def check_columns(schema: pa.Schema, columns: settings.ColumnNames, dims: dict[str, int], uri: str) -> None:
    """Check that a file has the named columns, with usable types and widths; raises DataError."""
    for role, name in columns.model_dump().items():
        if name is None:
            continue
        if name not in schema.names and role in columns.place:
            continue
        if name not in schema.names:
            raise DataError(
                f"the manifest has no column for {role}", expected=repr(name), found=schema.names, where=uri
            )
        if schema.names.count(name) > 1:
            raise DataError(
                f"the manifest has more than one column for {role}",
                expected=f"one column {name!r}",
                found=schema.names,
                where=uri,
                remedy="rename or drop all but one of them",
            )
        kind = schema.field(name).type
        if not _fits(role, kind):
            raise DataError(
                f"the manifest's {role} column has a wrong type",
                expected=_EXPECTED.get(role, "anything"),
                found=kind,
                where=f"{uri}: column {name}",
            )
        if role in dims and pa.types.is_fixed_size_list(kind) and kind.list_size != dims[role]:
            raise DataError(
                f"the manifest's {role} has a wrong width",
                expected=f"{dims[role]}, the encoder's dim",
                found=kind.list_size,
                where=f"{uri}: column {name}",
            )


def check_content(schema: pa.Schema, columns: settings.ColumnNames, uri: str) -> None:
    """Check that a file has a column with the place of images, or with embeddings; raises DataError."""
    if columns.place and not {columns.image, columns.uri} & set(schema.names):
        raise DataError(
            "a file of the manifest has no column with images or uris",
            expected=f"a column {columns.image} or {columns.uri}",
            found=schema.names,
            where=uri,
        )
    if (
        columns.image is None
        and columns.uri is None
        and columns.old_embedding is None
        and columns.new_embedding is None
    ):
        raise DataError(
            "the config names no column with images or embeddings", expected="image, uri or *_embedding", where=uri
        )


def check_ids(schema: pa.Schema, name: str | None, kinds: dict[bool, str], uri: str) -> None:
    """Check: ids are integers in all files, or strings in all; `kinds` gets a file of each kind. Raises DataError."""
    if name is None:
        return
    integers = bool(pa.types.is_integer(schema.field(name).type))
    kinds.setdefault(integers, uri)
    if len(kinds) > 1:
        raise DataError(
            "the ids are integers in one file and strings in another",
            expected="one type in all files",
            found=f"integers in {kinds[True]}, strings in {kinds[False]}",
            where=f"column {name}",
        )


_TEXT = (pa.types.is_string, pa.types.is_large_string)
_EXPECTED = {
    "id": "int64, or strings",
    "image": "binary",
    "uri": "string",
    "offset": "an integer",
    "length": "an integer",
    "etag": "string",
    "traffic": "numbers",
    **dict.fromkeys(("label", "group"), "strings, numbers, booleans or dates"),
    **dict.fromkeys(EMBEDDINGS, "a list of float32 or float16, fixed in size"),
}


def _fits(role: str, kind: pa.DataType) -> bool:
    types = pa.types
    checks = {
        "id": (types.is_integer, *_TEXT),
        "image": (types.is_binary, types.is_large_binary),
        "uri": _TEXT,
        "offset": (types.is_integer,),
        "length": (types.is_integer,),
        "etag": _TEXT,
        "traffic": (types.is_integer, types.is_floating),
        **dict.fromkeys(("label", "group"), (_is_name,)),
        **dict.fromkeys(EMBEDDINGS, (_is_vector,)),
    }
    return role not in checks or any(check(kind) for check in checks[role])


def _is_name(kind: pa.DataType) -> bool:
    """Whether different values of the type have different texts."""
    types = pa.types
    if types.is_dictionary(kind):
        return _is_name(kind.value_type)
    if types.is_interval(kind):
        return False
    simple = (types.is_boolean, types.is_integer, types.is_floating, types.is_decimal, types.is_temporal, types.is_null)
    return any(check(kind) for check in (*_TEXT, types.is_string_view, *simple))


def _is_vector(kind: pa.DataType) -> bool:
    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    return any(check(kind) for check in lists) and bool(pa.types.is_floating(kind.value_type))
