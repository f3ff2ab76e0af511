"""Few and fixed names for why a request was repeated and why an image was rejected: labels of metrics.

What a store answers and what is wrong with an image are told in many words; a label has to be one of a
handful, however a run goes. A unit's acknowledgement carries one count per name, in the order of the
tuples here. It knows nothing of metrics, and keeps no text that could hold an id or a URI.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

OTHER = "other"

RETRY_CAUSES = ("slow_down", "server", "timeout", "connection", "truncated", "conflict", "credentials", OTHER)

REJECT_REASONS = (
    ("fetch", "missing"),
    ("fetch", "forbidden"),
    ("fetch", "too large"),
    ("fetch", "truncated"),
    ("fetch", "unreadable"),
    ("fetch", "container changed"),
    ("fetch", "outside data_root"),
    ("fetch", "deleted"),
    ("fetch", "damaged"),
    ("decode", "empty"),
    ("decode", "not an image"),
    ("decode", "truncated"),
    ("decode", "damaged"),
    ("decode", "too large"),
    ("decode", "not 8 or 16 bits a channel"),
    ("preprocess", "wrong shape"),
    ("preprocess", "too large when resized"),
    ("embed", "not finite"),
    (OTHER, OTHER),
)
"""(stage, reason): what `Reject.reason` says before its first colon."""

_RETRIES = "retries:"
_SIGNS = (  # in this order: RequestTimeout is no request, ConnectTimeoutError is a time-out
    ("slow_down", re.compile(r"slow.?down|throttl|toomanyrequests|serviceunavailable|^503$|^429$", re.I)),
    ("timeout", re.compile(r"time.?out|^408$", re.I)),
    ("truncated", re.compile(r"truncated|incomplete|baddigest|mismatch|checksum", re.I)),
    ("conflict", re.compile(r"conflict|^409$", re.I)),
    ("credentials", re.compile(r"credential|token", re.I)),
    ("connection", re.compile(r"connect|endpoint|proxy|ssl|dns|protocol|http|clienterror|serverdisconnected", re.I)),
    ("server", re.compile(r"internal|dependency|^5\d\d$", re.I)),
)


def retry_cause(cause: str) -> str:
    """The one of RETRY_CAUSES that an `object_store.Again` names: a code of the store, a status, or an exception."""
    return next((name for name, sign in _SIGNS if sign.search(cause)), OTHER)


def count_retries(counts: Mapping[str, int]) -> list[int]:
    """How many requests were repeated, by RETRY_CAUSES; of the difference of two `storage.counts()`."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        if name.startswith(_RETRIES):
            found[retry_cause(name.removeprefix(_RETRIES))] += count
    return [found[cause] for cause in RETRY_CAUSES]


def count_rejects(stages: pa.Array, reasons: pa.Array) -> list[int]:
    """How many images were rejected, by REJECT_REASONS; a stage is empty where the image is embedded."""
    is_reject = pc.not_equal(stages, "")
    words = pc.list_element(pc.split_pattern(pc.filter(reasons, is_reject), ":", max_splits=1), 0)
    pairs = pc.binary_join_element_wise(pc.filter(stages, is_reject), words, ":")
    found: Counter[tuple[str, str]] = Counter()
    for pair in pc.value_counts(pairs).to_pylist():
        stage, _, reason = pair["values"].partition(":")
        found[(stage, reason) if (stage, reason) in REJECT_REASONS else (OTHER, OTHER)] += pair["counts"]
    return [found[name] for name in REJECT_REASONS]
