"""Reads images from S3 through obstore, which is fast for many small requests (decision 0002).

Each request is limited by its prefix, repeated by `retry.Retry` and counted. obstore itself repeats nothing.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import botocore.session
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from pipeline.errors import ConfigError, DataError, TransientError
from pipeline.storage.interface import Span, Store, TooLarge, Unreadable
from pipeline.storage.rate_limit import RateLimit
from pipeline.storage.retry import COUNTS, SLOW_DOWN, Again, Retry, problem
from pipeline.storage.settings import FetchSettings, StorageSettings

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Credential

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([\w.]+)</Code>")
_MESSAGE = re.compile(r"<Message>(.*?)</Message>", re.DOTALL)
_HTTP_KIND = re.compile(r"kind: (\w+)")
# 403 or 400 that concern all objects.
_BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_BAD_CREDENTIALS |= {"TokenRefreshRequired", "RequestTimeTooSkewed"}
_BAD_CREDENTIALS |= {"IncompleteSignature", "InvalidSecurity", "MissingSecurityHeader", "NotSignedUp"}
_OTHER_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_CREDENTIALS_FOR = timedelta(minutes=5)  # then they are looked up again; botocore renews them before they expire


class _Failed(Again):
    """The store failed (5xx), but did not ask for fewer requests."""


class ObjectReader:
    """A `Reader` of S3; names are `bucket/key`."""

    def __init__(self, storage: StorageSettings, fetch: FetchSettings, plain: Store) -> None:
        """Nothing is sent yet; `plain` reads objects whose names obstore does not support."""
        self._storage, self._fetch, self._plain = storage, fetch, plain
        self._retry = Retry(storage.retry_seconds, storage.max_pause_seconds)
        self._lock = threading.Lock()
        self._buckets: dict[str, S3Store] = {}
        self._paces: dict[str, RateLimit] = {}
        self._given: dict[str, tuple[str, Span | None]] = {}  # bucket -> last object read

    def whole(self, name: str, most_bytes: int) -> tuple[bytes, str]:
        """GET; the size is checked by the headers."""
        if not _has_name(name):
            stat = self._plain.stat(name)
            if stat.size_bytes > most_bytes:
                raise TooLarge(stat.size_bytes, stat.etag)
            return self._plain.read(name, None, None)
        return self._request(name, None, most_bytes)

    def spans(self, name: str, spans: list[Span]) -> Iterator[tuple[bytes, str]]:
        """GET, one request per range."""
        for start, stop in spans:
            yield self._span(name, (start, stop)) if _has_name(name) else self._plain.read(name, start, stop - start)

    def _span(self, name: str, span: Span) -> tuple[bytes, str]:
        try:
            return self._request(name, span, span[1] - span[0])
        except EOFError:  # 416: it begins at or after the end, where the etag is not used
            return b"", ""

    def _request(self, name: str, span: Span | None, most_bytes: int) -> tuple[bytes, str]:
        bucket, _, key = name.partition("/")
        if not key:
            raise FileNotFoundError(errno.ENOENT, "a bucket is not an object", f"s3://{name}")
        store, pace = self._bucket(bucket), self._pace(name)

        throttled = False

        def attempt() -> tuple[bytes, str]:
            nonlocal throttled
            pace.wait()
            try:
                return _get(store, key, span, most_bytes, f"s3://{name}")
            except Again as error:
                if error.cause in SLOW_DOWN:
                    throttled = True
                    pace.slow_down()
                raise

        try:
            data, etag = self._retry.call("image", attempt, f"s3://{name}")
        except TransientError as error:
            last = error.__cause__
            if throttled or not isinstance(last, _Failed) or not self._is_up(bucket, key, span):
                raise
            COUNTS.add("requests:image")
            try:
                data, etag = attempt()  # the store may have recovered just now
            except _Failed:
                code = f"{last.cause} for {self._retry.seconds:g} seconds"
                raise Unreadable(code, str(last), f"s3://{name}") from error
            except Again:
                raise error from None
        with self._lock:
            self._given[bucket] = key, span
        COUNTS.add("bytes:image", len(data))
        return data, etag

    def _is_up(self, bucket: str, key: str, span: Span | None) -> bool:
        """Whether the bucket's last object can be read again, and is not this one.

        If so the store is up and this object is bad; otherwise the store may be down.
        """
        with self._lock:
            other, other_span = self._given.get(bucket, (key, span))
        if (other, other_span) == (key, span):
            return False
        self._pace(f"{bucket}/{other}").wait()
        COUNTS.add("requests:image")
        try:
            _get(self._bucket(bucket), other, (0, 1), 1, f"s3://{bucket}/{other}")
        except (Again, OSError):
            return False
        except EOFError:  # an empty object
            return True
        return True

    def _pace(self, name: str) -> RateLimit:
        prefix = "/".join(name.split("/")[: 2 if name.count("/") > 1 else 1])
        with self._lock:
            if prefix not in self._paces:
                self._paces[prefix] = RateLimit(self._fetch.requests_per_second, self._storage.max_pause_seconds)
            return self._paces[prefix]

    def _bucket(self, bucket: str) -> S3Store:
        with self._lock:
            if bucket not in self._buckets:
                self._buckets[bucket] = self._connect(bucket)
            return self._buckets[bucket]

    def _connect(self, bucket: str) -> S3Store:
        session = botocore.session.get_session()
        endpoint = self._storage.endpoint
        region = self._storage.region or os.environ.get("AWS_REGION") or session.get_config_variable("region")
        config: S3Config = {}
        if endpoint:
            config["endpoint"] = endpoint
        if region:
            config["region"] = region
        return S3Store(
            bucket,
            config=config,
            client_options={
                "allow_http": bool(endpoint and endpoint.startswith("http://")),
                "connect_timeout": timedelta(seconds=self._storage.connect_timeout_seconds),
                "timeout": timedelta(seconds=self._fetch.timeout_seconds),
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},
            credential_provider=_credentials(session),
        )


def _credentials(session: botocore.session.Session) -> Callable[[], S3Credential]:
    found = session.get_credentials()
    if found is None:
        raise _refused("none")

    def current() -> S3Credential:
        keys = found.get_frozen_credentials()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_FOR,
        }

    return current


def _refused(found: str) -> DataError:
    """An error, not a reject, because it concerns every image."""
    return DataError(
        "the images' store refuses these credentials",
        expected="credentials that may read the images",
        found=found,
        remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role",
    )


def _no_bucket(uri: str) -> DataError:
    """An error, not a reject, because it concerns every image."""
    return DataError(
        "the images' bucket does not exist",
        found="NoSuchBucket",
        where="/".join(uri.split("/")[:3]),
        remedy="restore the bucket, or give a manifest of where the images are now",
    )


def _has_name(name: str) -> bool:
    """Whether obstore supports the key: it drops slashes at the ends, and refuses empty parts and dots."""
    return not {"", ".", ".."} & set(name.split("/"))


def _get(store: S3Store, key: str, span: Span | None, most_bytes: int, uri: str) -> tuple[bytes, str]:
    """Send one request.

    Raises:
        Again, EOFError (416), FileNotFoundError, PermissionError, TooLarge, Unreadable (other 4xx).
        DataError: the bucket is missing, or the credentials are refused.
    """
    try:
        answer = obstore.get(store, key, options={"range": span} if span else None)
        size, etag = answer.meta["size"], answer.meta["e_tag"] or ""
        if span is None and size > most_bytes:
            raise TooLarge(size, etag)
        start, stop = answer.range
        data = bytes(answer.bytes())
    except FileNotFoundError as error:
        if (code := _CODE.search(str(error))) is not None and code[1] == "NoSuchBucket":
            raise _no_bucket(uri) from None
        raise FileNotFoundError(errno.ENOENT, _first_line(error), uri) from None
    except BaseError as error:
        raise _translated(error, uri) from error
    if len(data) != stop - start:
        raise Again("TruncatedBody", f"{len(data)} of {stop - start} bytes came")
    return data, etag


def _translated(error: BaseError, uri: str) -> Exception:
    text = str(error)
    status, code, message = _STATUS.search(text), _CODE.search(text), _MESSAGE.search(text)
    if "redirect without LOCATION" in text or (code is not None and code[1] in _OTHER_REGION):
        return ConfigError(
            "the bucket lies in another region", where=uri, remedy="set storage.region or AWS_REGION to its region"
        )
    if "External AWS credential provider" in text:  # not refused: the service that renews them does not answer
        return Again("Credentials", _first_line(error))
    if code is not None and code[1] in _BAD_CREDENTIALS:
        return _refused(code[1])
    if status is not None:
        said = message[1] if message else _first_line(error)
        found = problem(int(status[1]), code[1] if code else "", said, uri)
        failed = isinstance(found, Again) and int(status[1]) >= 500 and found.cause not in SLOW_DOWN
        return _Failed(code[1] if code else status[1], said) if failed else found
    kind = _HTTP_KIND.search(text)
    if kind is not None or "HTTP error" in text:
        return Again(kind[1] if kind else "HTTP", _first_line(error))
    return OSError(errno.EIO, _first_line(error), uri)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
