"""Checks a torch.export archive before torch loads it.

torch's loader executes some texts of an archive as Python (guards, names of inputs, shapes), and imports modules that a
call signature names (torch 2.14). A checked archive has only plain names there, and shapes of symbols, numbers and
arithmetic. It may still name any operator of torch: a bad archive can give wrong embeddings or use up memory and time.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import torch

_PICKLED = ("custom_obj", "opaque_obj", "aotinductor", "serialized_")  # the last: the format before torch 2.8
_NAME = re.compile(r"[\w.@]*")
_WORD = re.compile(r"[\w.+-]*")
_ANY_TEXT = {"metadata", "as_string", "as_strings", "torch_version"}  # torch never executes these
_SPECS = {"in_spec", "out_spec"}
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
_WRITES_FILES = ("from_file",)  # the operator that maps a file, and can create it
_ARITHMETIC = {
    *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "Abs", "Max", "Min", "floor", "ceiling"),
    *("FloorDiv", "CleanDiv", "CeilDiv", "PythonMod", "ModularIndexing", "Where", "Identity", "PowByNatural"),
    *("CeilToInt", "FloorToInt", "RoundToInt", "TruncToInt", "TruncToFloat", "ToFloat", "IntTrueDiv", "FloatTrueDiv"),
    *("FloatPow", "LShift", "RShift", "Equality", "Unequality", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not"),
    *("LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan"),
}
_NODES = (
    *(ast.Expression, ast.Name, ast.Load, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp),
    *(ast.operator, ast.unaryop, ast.cmpop, ast.boolop),
)


def check(path: Path) -> None:
    """Refuse an archive that would execute code when torch loads it.

    Raises:
        ValueError: it has pickled or compiled objects, guards, or a text in place of a name or a shape.
        RuntimeError: it is not an archive.
    """
    reader = torch._C.PyTorchFileReader(str(path))
    records = reader.get_all_records()
    pickled = [name for name in records if any(word in name.lower() for word in _PICKLED)]
    if pickled:
        raise ValueError(f"it holds pickled or compiled objects: {pickled[:3]}")
    for name in records:
        if name.startswith("models/") or (name.startswith("data/") and name.endswith(".json")):
            _check_item(json.loads(reader.get_record(name).decode()), name, "")


def _check_item(item: object, where: str, key: str) -> None:
    """Check all texts of an item of the archive's JSON; `key` is the item's key."""
    if key == "guards_code" and item:
        raise ValueError(f"it holds guards, which are Python code that torch executes: {str(item)[:80]} ({where})")
    if isinstance(item, dict):
        for name, value in item.items():
            _check_text(name, where, "a key")
            if name not in _ANY_TEXT:
                _check_item(value, where, name)
    elif isinstance(item, list):
        for value in item:
            _check_item(value, where, key)
    elif isinstance(item, str):
        _check_text(item, where, key)


def _check_text(text: str, where: str, key: str) -> None:
    if key == "expr_str":
        fits = _is_arithmetic(text)
    elif key in _SPECS:
        fits = _is_plain_spec(json.loads(text)[1])
    else:
        fits = bool(_NAME.fullmatch(text)) and not any(word in text for word in _WRITES_FILES)
    if not fits:
        raise ValueError(f"{key or 'a text'} could execute code: {text[:80]!r} ({where})")


def _is_arithmetic(text: str) -> bool:
    """Whether an expression has only symbols, numbers, arithmetic, and calls of arithmetic functions."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_allowed(node) for node in ast.walk(tree))


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _ARITHMETIC
    if isinstance(node, ast.Constant):
        is_word = isinstance(node.value, str) and bool(_WORD.fullmatch(node.value))
        return is_word or isinstance(node.value, bool | int | float)
    return isinstance(node, _NODES)


def _is_plain_spec(spec: object) -> bool:
    """Whether a call signature has only tuples, lists, and dicts with plain keys; other types import modules."""
    if not isinstance(spec, dict) or spec.get("type") not in _CONTAINERS:
        return False
    context = json.loads(spec.get("context") or "null")
    keys = context if isinstance(context, list) else [] if context is None else [None]
    plain = all(isinstance(key, str) and key.isidentifier() for key in keys)
    return plain and all(map(_is_plain_spec, spec.get("children_spec", [])))
