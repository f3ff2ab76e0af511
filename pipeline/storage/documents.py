"""JSON files of a run: how they are written, and how they are checked when they are read again.

Every file that this version writes names its format and has a digest of its content. Guarantee: a file that was
changed, cut off or taken from another place is a DataError with the name of the file and a remedy, never a
traceback and never other values. Files of versions that wrote no digest are read without one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import DataError
from pipeline.schema import FORMAT_VERSION

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Tree = dict[str, Any]

REMEDY = "restore the file from a copy of the run; `fastfill audit` lists all that is damaged"
REDO = "move the file out of the run, and run the same command again: the file is made again"
DELETE = "delete the file, and run the same command again: the file is made again"

_VERSION, _DIGEST, _CHECKED = "format_version", "sha256", "checked_by"


def encode(content: DataclassInstance | Mapping[str, object]) -> bytes:
    """The content as the bytes of its file; equal content gives equal bytes.

    The key `checked_by` says that the file has a digest, so a file that lost its digest is not taken for an old one.
    """
    tree = dict(content) if isinstance(content, Mapping) else asdict(content)
    plain = json.loads(json.dumps(tree, allow_nan=False))
    content_only = {key: value for key, value in plain.items() if key not in (_VERSION, _CHECKED, _DIGEST)}
    tree = {_VERSION: FORMAT_VERSION, _CHECKED: _DIGEST} | content_only
    return json.dumps(tree | {_DIGEST: digest(tree)}, indent=1).encode()


def digest(tree: Tree) -> str:
    """The digest of a file's content, which is all but the digest itself."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def decode(data: bytes, where: str, remedy: str = REMEDY, must_be_checked: bool = False) -> Tree:
    """The inverse of `encode`, as a tree.

    Args:
        data: the bytes of the file.
        where: its name, for messages.
        remedy: what to do if it is damaged.
        must_be_checked: whether every version wrote a digest and the format into this kind of file.

    Raises:
        DataError: the file is not JSON, was changed after it was written, or has another format.
    """
    tree = _parse(data, where, remedy)
    checked = must_be_checked or _DIGEST in tree or _CHECKED in tree
    version = tree.get(_VERSION, None if checked else FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise DataError(
            "the file has another format",
            expected=f"{_VERSION} {FORMAT_VERSION}",
            found=f"no {_VERSION}" if version is None else f"{_VERSION} {version}",
            where=where,
            remedy=f"{remedy}; or use the version of fastfill that wrote it",
        )
    found = tree.pop(_DIGEST, None)
    if checked and found != digest(tree):
        expected = f"sha256 {digest(tree)}"
        raise DataError("the file was changed", expected=expected, found=found, where=where, remedy=remedy)
    return {key: value for key, value in tree.items() if key not in (_VERSION, _CHECKED)}


def parse(kind: type[T], data: bytes, where: str, remedy: str = REMEDY, must_be_checked: bool = False) -> T:
    """The inverse of `encode`, as an object; every field without a default has to be there with its type.

    Raises:
        DataError: as `decode`; or a field is missing, or has another type.
    """
    return build(kind, decode(data, where, remedy, must_be_checked), where, remedy)


def build(kind: type[T], tree: Tree, where: str, remedy: str = REMEDY) -> T:
    """An object of a tree that was decoded.

    Raises:
        DataError: a field is missing, or has another type.
    """
    try:
        item = _adapter(kind).validate_json(json.dumps(tree), strict=True)  # type: ignore[arg-type]  # is hashable
    except ValidationError as error:
        problem = error.errors()[0]
        found = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__.strip("_")).lower()
        raise DataError(f"not a {name} file", expected=f"a {name}", found=found, where=where, remedy=remedy) from error
    assert isinstance(item, kind)
    return item


def _parse(data: bytes, where: str, remedy: str) -> Tree:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        found = error if data else "an empty file"
        raise DataError("not a JSON file", expected="JSON", found=found, where=where, remedy=remedy) from error
    if not isinstance(tree, dict):
        found = type(tree).__name__
        raise DataError("not a JSON object", expected="keys and values", found=found, where=where, remedy=remedy)
    return tree


@functools.cache  # making one takes milliseconds
def _adapter(kind: type[object]) -> TypeAdapter[object]:
    return TypeAdapter(kind)
