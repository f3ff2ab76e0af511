"""The codec of a run's JSON files: `encode` writes them, `decode` and `parse` read and check them.

Each file has a format version and a digest of its content. A file that was changed, cut off or taken from elsewhere is
a DataError. Files of older versions without a digest are read unchecked.
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

REMEDY = "restore the file from a copy of the run; `fastfill audit` lists all damaged files"
REDO = "move the file out of the run and run the same command again; it makes the file again"
DELETE = "delete the file and run the same command again; it makes the file again"

_VERSION, _DIGEST, _CHECKED = "format_version", "sha256", "checked_by"


def encode(content: DataclassInstance | Mapping[str, object]) -> bytes:
    """The bytes of a file; equal content gives equal bytes.

    The key `checked_by` says that the file has a digest, so a file that lost its digest is not read as an old one.
    """
    tree = dict(content) if isinstance(content, Mapping) else asdict(content)
    plain = json.loads(json.dumps(tree, allow_nan=False))
    content_only = {key: value for key, value in plain.items() if key not in (_VERSION, _CHECKED, _DIGEST)}
    tree = {_VERSION: FORMAT_VERSION, _CHECKED: _DIGEST} | content_only
    return json.dumps(tree | {_DIGEST: digest(tree)}, indent=1).encode()


def digest(tree: Tree) -> str:
    """The digest of a file's content: all keys but the digest itself."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def decode(data: bytes, where: str, remedy: str = REMEDY, must_be_checked: bool = False) -> Tree:
    """Read what `encode` wrote, as a tree.

    Args:
        data: the bytes of the file.
        where: its name, for messages.
        remedy: what to do if it is damaged.
        must_be_checked: every version wrote a digest and the format into this kind of file, so it must have them.

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
        raise DataError(
            "the file was changed after it was written", expected=expected, found=found, where=where, remedy=remedy
        )
    return {key: value for key, value in tree.items() if key not in (_VERSION, _CHECKED)}


def parse(kind: type[T], data: bytes, where: str, remedy: str = REMEDY, must_be_checked: bool = False) -> T:
    """Read what `encode` wrote, as an object.

    Raises:
        DataError: as `decode`; or a field is missing or has another type.
    """
    return build(kind, decode(data, where, remedy, must_be_checked), where, remedy)


def build(kind: type[T], tree: Tree, where: str, remedy: str = REMEDY) -> T:
    """An object from a decoded tree.

    Raises:
        DataError: a field is missing or has another type.
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
