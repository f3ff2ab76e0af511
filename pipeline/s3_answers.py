"""What an answer of S3 that is not a success means to the caller; shared by the clients.

Below `s3_client` and `object_fetch`. It knows statuses and codes, and no client's exceptions.
"""

from __future__ import annotations

import errno

from pipeline.object_store import Again, NoBucket, Precondition
from pipeline.store import Unreadable

# Codes that go away by themselves, though they come with a status of 4xx, or for one name of a DELETE of many.
_TRANSIENT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "SlowDown", "Throttling", "ThrottlingException"}
_TRANSIENT_CODES |= {"InternalError", "ServiceUnavailable", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_TRANSIENT_CODES |= {"KMS.ThrottlingException", "KMS.InternalException", "KMS.DependencyTimeoutException"}
_TRANSIENT_STATUSES = {408, 409, 425, 429}
_REFUSED_CODES = {"AccessDenied", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}  # some come with 400
_NOT_IMPLEMENTED = 501  # the one status from 500 on that stays
_PROXY_REFUSES = 407
SLOW_DOWN = {"SlowDown", "Throttling", "ThrottlingException", "ServiceUnavailable", "TooManyRequests", "503", "429"}
"""Causes of `Again` with which a store asks for fewer requests."""


def problem(status: int, code: str, message: str, uri: str) -> Exception:
    """`Again` where the same request may succeed later, else what is wrong with it; the caller raises it."""
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
