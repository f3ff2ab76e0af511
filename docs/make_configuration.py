"""Write docs/configuration.md: its template, filled with the keys, defaults and docstrings of the config tree.

`make docs` runs this. In the template, `{{ fit }}` stands for the docstring and the keys of the section `fit`, and
`{{ . }}` for the keys of the file itself. A key's text is the docstring below it.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.tree import Config

DOCS = Path(__file__).resolve().parent
TEMPLATE = DOCS / "configuration.template.md"
PAGE = DOCS / "configuration.md"

_UNREACHED = 2**32


def page() -> str:
    """The page as it should be."""
    return re.sub(r"\{\{ (\S+) \}\}", lambda found: _section(found[1]), TEMPLATE.read_text())


def _section(name: str) -> str:
    model: type[BaseModel] = Config
    for part in name.split(".") if name != "." else []:
        model = _model(model.model_fields[part])
    texts = _key_texts(model)
    rows = [
        f"| `{key}` | {_kind(_annotation(field))} | {_default(field)} | {texts[key]} |"
        for key, field in model.model_fields.items()
        if not _is_section(field)
    ]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows] if rows else []
    intro = [inspect.cleandoc(model.__doc__ or ""), ""] if name != "." else []
    return "\n".join([*intro, *table]).strip()


def _key_texts(model: type[BaseModel]) -> dict[str, str]:
    """The docstring below each key, in one line; those of the bases too."""
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base is BaseModel or not issubclass(base, BaseModel):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for key, text in zip(definition.body, definition.body[1:], strict=False):
            if not isinstance(key, ast.AnnAssign) or not isinstance(key.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[key.target.id] = " ".join(str(text.value.value).split())
    return texts


def _is_section(field: FieldInfo) -> bool:
    return any(isinstance(item, type) and issubclass(item, BaseModel) for item in _parts(field.annotation))


def _model(field: FieldInfo) -> type[BaseModel]:
    return next(item for item in _parts(field.annotation) if isinstance(item, type) and issubclass(item, BaseModel))


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _annotation(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _kind(annotation: Any, many: bool = False) -> str:
    """A type in words; `many` for the items of a list."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = {} if many else _bounds(args[1:])
        return _kind(args[0], many) + _range(bounds)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_kind(item, many) for item in args if item is not NoneType))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        items = _kind(args[0], many=True)
        return f"list of {count}{items}"
    names = {bool: "`true`, `false`", int: "integer", float: "number", str: "text"}
    return names[annotation] + ("s" if many else "")


def _bounds(metadata: tuple[Any, ...]) -> dict[str, float]:
    items = [inner for item in metadata for inner in getattr(item, "metadata", [item])]
    return {name: getattr(item, name) for item in items for name in ("gt", "ge", "lt", "le") if hasattr(item, name)}


def _range(bounds: dict[str, float]) -> str:
    """Bounds behind a type, such as ` ≥ 0, ≤ 1`; those that no value reaches are left out."""
    signs = {"gt": "> ", "ge": "≥ ", "lt": "< ", "le": "≤ "}
    told = [f"{signs[name]}{bound:,.0f}" for name, bound in bounds.items() if bound < _UNREACHED]
    return " " + ", ".join(told) if told else ""


def _default(field: FieldInfo) -> str:
    """A default as YAML has it."""
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
