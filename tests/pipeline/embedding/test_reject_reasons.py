"""Causes are of a few fixed names, whatever stores and images come up with."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.embedding.reject_rules import REJECT_REASONS, count_rejects
from pipeline.storage.retry import _TRANSIENT_CODES, RETRY_CAUSES, SLOW_DOWN, count_retries, retry_cause

PIPELINE = Path(__file__).resolve().parents[3] / "pipeline"


@pytest.mark.parametrize(
    ("cause", "name"),
    [
        *((cause, "slow_down") for cause in sorted(SLOW_DOWN)),
        ("InternalError", "server"),
        ("500", "server"),
        ("502", "server"),
        ("KMS.InternalException", "server"),
        ("RequestTimeout", "timeout"),
        ("ReadTimeoutError", "timeout"),
        ("ConnectTimeoutError", "timeout"),
        ("TimeoutError", "timeout"),
        ("IncompleteBody", "truncated"),
        ("TruncatedBody", "truncated"),
        ("BadDigest", "truncated"),
        ("409", "conflict"),
        ("ConditionalRequestConflict", "conflict"),
        ("Credentials", "credentials"),
        ("EndpointConnectionError", "connection"),
        ("ClientConnectorError", "connection"),
        ("ServerDisconnectedError", "connection"),
        ("HTTP", "connection"),
        ("whatever comes next", "other"),
    ],
)
def test_retry_cause_has_a_known_name(cause: str, name: str) -> None:
    assert retry_cause(cause) == name
    assert name in RETRY_CAUSES


def test_no_code_that_is_known_to_pass_is_called_other() -> None:
    assert {retry_cause(code) for code in _TRANSIENT_CODES} <= set(RETRY_CAUSES) - {"other", "connection"}


def test_count_retries_counts_by_cause_and_leaves_out_requests() -> None:
    asked = Counter({"retries:SlowDown": 2, "retries:503": 1, "retries:Odd": 4, "requests:get": 9})
    found = dict(zip(RETRY_CAUSES, count_retries(asked), strict=True))
    assert {name: count for name, count in found.items() if count} == {"slow_down": 3, "other": 4}


def test_rejects_are_counted_by_the_words_before_the_colon() -> None:
    stages = pa.array(["", "decode", "fetch", "decode", "odd", "fetch", ""], pa.string())
    reasons = pa.array(["", "damaged: a: b", "missing", "damaged", "s3://b/7", "missing: x", ""], pa.string())
    found = dict(zip(REJECT_REASONS, count_rejects(stages, reasons), strict=True))
    counts = {name: count for name, count in found.items() if count}
    assert counts == {("decode", "damaged"): 2, ("fetch", "missing"): 2, ("other", "other"): 1}


def test_without_rejects_all_counts_are_zero() -> None:
    nothing = pa.array(["", ""], pa.string())
    assert set(count_rejects(nothing, nothing)) == {0}


def test_every_reject_of_the_source_is_known() -> None:
    """Each `Reject("stage", "reason...")` that is written there as text; a new one must get its name here."""
    found = set()
    for path in (PIPELINE / "embedding" / "fetch.py", PIPELINE / "embedding" / "decode.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Reject" and len(node.args) == 2:
                stage, reason = (words_of(argument) for argument in node.args)
                if reason:  # else it begins with a variable
                    found.add((stage, reason.partition(":")[0]))
    assert len(found) > 10
    assert found <= set(REJECT_REASONS)


def words_of(node: ast.expr) -> str:
    """What a literal begins with; nothing where that is not written in the source."""
    if isinstance(node, ast.JoinedStr):
        return words_of(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
