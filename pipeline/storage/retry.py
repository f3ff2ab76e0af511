"""Failed requests: the meaning of a store's errors, repeated requests, and counts of requests and retries."""

from __future__ import annotations

import errno
import logging
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import TransientError
from pipeline.storage.interface import Unreadable

T = TypeVar("T")

logger = logging.getLogger(__name__)

OTHER = "other"
RETRY_CAUSES = ("slow_down", "server", "timeout", "connection", "truncated", "conflict", "credentials", OTHER)
_RETRIES = "retries:"
_SIGNS = (  # in this order: ConnectTimeoutError is a time-out, not a connection
    ("slow_down", re.compile(r"slow.?down|throttl|toomanyrequests|serviceunavailable|^503$|^429$", re.I)),
    ("timeout", re.compile(r"time.?out|^408$", re.I)),
    ("truncated", re.compile(r"truncated|incomplete|baddigest|mismatch|checksum", re.I)),
    ("conflict", re.compile(r"conflict|^409$", re.I)),
    ("credentials", re.compile(r"credential|token", re.I)),
    ("connection", re.compile(r"connect|endpoint|proxy|ssl|dns|protocol|http|clienterror|serverdisconnected", re.I)),
    ("server", re.compile(r"internal|dependency|^5\d\d$", re.I)),
)

# Transient codes that come with a status of 4xx, or for one name of a DELETE of many.
_TRANSIENT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "SlowDown", "Throttling", "ThrottlingException"}
_TRANSIENT_CODES |= {"InternalError", "ServiceUnavailable", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_TRANSIENT_CODES |= {"KMS.ThrottlingException", "KMS.InternalException", "KMS.DependencyTimeoutException"}
_TRANSIENT_STATUSES = {408, 409, 425, 429}
_REFUSED_CODES = {"AccessDenied", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}  # some come with 400
_NOT_IMPLEMENTED = 501  # the only permanent status from 500 on
_PROXY_REFUSES = 407
SLOW_DOWN = {"SlowDown", "Throttling", "ThrottlingException", "ServiceUnavailable", "TooManyRequests", "503", "429"}
"""Causes of `Again` that ask for fewer requests."""

_FIRST_PAUSE_SECONDS = 0.1
_SAY_AFTER_SECONDS = 10.0


class Again(Exception):
    """The same request may succeed later; `cause` is its name in counts."""

    def __init__(self, cause: str, text: str = "") -> None:
        super().__init__(f"{cause}: {text}" if text else cause)
        self.cause = cause


class Precondition(Exception):
    """The condition of a request did not hold (412)."""


class NoBucket(FileNotFoundError):
    """The bucket is missing, not only the object."""


class RequestCounts:
    """Counts of a process's requests, bytes, and retries by cause. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Add to a count."""
        with self._lock:
            self._counts[name] += count

    def snapshot(self) -> Counter[str]:
        """A copy of all counts; the difference of two copies is what happened in between."""
        with self._lock:
            return self._counts.copy()


COUNTS = RequestCounts()
"""`requests:<kind>`, `bytes:get`, `bytes:put` and `retries:<cause>` of this process.

Images are counted separately: `requests:image`, `bytes:image`, and `bytes:needed` (bytes of the images themselves).
"""


@dataclass(frozen=True, slots=True)
class Retry:
    """How long a failing request is repeated, and the longest pause between two attempts."""

    seconds: float = 300.0
    most_pause_seconds: float = 10.0

    def call(self, kind: str, request: Callable[[], T], where: str) -> T:
        """Repeat a request while it raises Again.

        Raises:
            TransientError: the request still failed after `seconds`.
        """
        start, said = time.monotonic(), False
        pause = _FIRST_PAUSE_SECONDS
        while True:
            COUNTS.add(f"requests:{kind}")
            try:
                return request()
            except Again as error:
                COUNTS.add(f"retries:{error.cause}")
                waited = time.monotonic() - start
                if waited >= self.seconds:
                    raise TransientError(
                        "object storage keeps failing",
                        expected=f"an answer within {self.seconds:g} seconds",
                        found=error,
                        where=where,
                        remedy="finished work is kept; run the same command again when the store is back",
                    ) from error
                if waited >= _SAY_AFTER_SECONDS and not said:
                    said = True
                    logger.warning("%s: %s; retrying for up to %g seconds", where, error, self.seconds)
            time.sleep(random.uniform(0, pause))  # full jitter, so that workers do not retry at the same moment
            pause = min(2 * pause, self.most_pause_seconds)


def problem(status: int, code: str, message: str, uri: str) -> Exception:
    """The exception to raise for an answer: `Again` if the same request may succeed later."""
    text = f"{code or status}: {message}"
    if status in (401, 403) or code in _REFUSED_CODES:
        return PermissionError(errno.EACCES, text, uri)
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUSES or (status >= 500 and status != _NOT_IMPLEMENTED):
        return Again(code or str(status), text)
    if status == 412 or code == "PreconditionFailed":
        return Precondition(uri)
    if code == "NoSuchBucket":
        return NoBucket(errno.ENOENT, text, uri)
    if status == 404 or code == "NoSuchKey":
        return FileNotFoundError(errno.ENOENT, text, uri)
    if status == 416:
        return EOFError(uri)
    if 400 <= status < 500 and status != _PROXY_REFUSES:
        return Unreadable(code or str(status), text, uri)
    return OSError(errno.EIO, text, uri)


def retry_cause(cause: str) -> str:
    """The one of RETRY_CAUSES for the `cause` of an `Again`: a code of the store, a status, or an exception's name."""
    return next((name for name, sign in _SIGNS if sign.search(cause)), OTHER)


def count_retries(counts: Mapping[str, int]) -> list[int]:
    """Retries by RETRY_CAUSES, from counts or from the difference of two counts."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        if name.startswith(_RETRIES):
            found[retry_cause(name.removeprefix(_RETRIES))] += count
    return [found[cause] for cause in RETRY_CAUSES]
