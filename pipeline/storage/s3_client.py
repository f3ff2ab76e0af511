"""S3 through the client of s3fs, one request per call; its errors become ours.

`retrying_store` repeats requests, not this module, so every retry is counted. One exception: if a kept-open connection
turns out to be closed, aiohttp sends the request again over a new one. So a PUT may arrive twice.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
import s3fs
from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync

from pipeline.errors import ConfigError
from pipeline.storage.interface import Stat
from pipeline.storage.retry import Again, problem
from pipeline.storage.retrying_store import Blob, Page
from pipeline.storage.settings import StorageSettings

T = TypeVar("T")

_SLOWEST_BYTES_PER_SECOND = 2**18  # slower uploads time out

# The client's own errors. botocore's ConnectionError (unknown host, closed port, time-out) is not an HTTPClientError.
_TRANSIENT: tuple[type[Exception], ...] = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    boto.CredentialRetrievalError,
    boto.MetadataRetrievalError,
    ResponseParserError,
    aiohttp.ClientError,
    ConnectionError,
)
_NO_CREDENTIALS: tuple[type[Exception], ...] = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.SSOError,
    boto.TokenRetrievalError,
)


class S3Client:
    """Names are `bucket/key`; an object's version is its etag."""

    def __init__(self, settings: StorageSettings) -> None:
        """Nothing is sent yet; credentials are looked up as the AWS SDKs do.

        Threads may share a client; a forked process needs its own.
        """
        self._answer_seconds = settings.connect_timeout_seconds + settings.read_timeout_seconds
        names = {"endpoint_url": settings.endpoint_url, "region_name": settings.region}
        self._fs = s3fs.S3FileSystem(
            client_kwargs={name: value for name, value in names.items() if value is not None},
            config_kwargs={
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "max_pool_connections": settings.connections,
                "connect_timeout": settings.connect_timeout_seconds,
                "read_timeout": settings.read_timeout_seconds,
            },
            skip_instance_cache=True,
        )

    def head(self, name: str) -> Stat:
        """HEAD."""

        async def call(s3: Any, **where: str) -> Stat:
            found = await s3.head_object(**where)
            return Stat(found["ContentLength"], found["LastModified"].timestamp(), found["ETag"])

        return self._run(name, call)

    def get(self, name: str, start: int | None, stop: int | None, if_match: str | None) -> Blob:
        """GET; optionally only bytes `start` to `stop` (exclusive), or only if the version is still `if_match`."""
        condition = {"IfMatch": if_match} if if_match is not None else {}
        if start is not None:
            condition["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"

        async def call(s3: Any, **where: str) -> Blob:
            found = await s3.get_object(**where, **condition)
            async with found["Body"] as body:
                return Blob(await body.read(), found["ETag"])

        return self._run(name, call)

    def put(self, name: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """PUT, optionally under a condition; returns the etag."""
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match is not None else {}

        async def call(s3: Any, **where: str) -> str:
            # The client's own time-out starts after the body is sent, so it would wait forever for "100 Continue".
            async with asyncio.timeout(self._answer_seconds + len(data) / _SLOWEST_BYTES_PER_SECOND):
                found = await s3.put_object(**where, Body=data, **condition)
            return str(found["ETag"])

        return self._run(name, call)

    def listing(self, prefix: str, token: str | None, deep: bool = True) -> Page:
        """One page of the objects whose names begin with `prefix`; if not deep, those without a further "/"."""
        more = {"ContinuationToken": token} if token is not None else {}
        more |= {} if deep else {"Delimiter": "/"}
        bucket, _, key = prefix.partition("/")

        async def call(s3: Any, **_: str) -> Page:
            found = await s3.list_objects_v2(Bucket=bucket, Prefix=key, **more)
            objects = [
                (f"{bucket}/{item['Key']}", Stat(item["Size"], item["LastModified"].timestamp(), item["ETag"]))
                for item in found.get("Contents", ())
            ]
            folders = [f"{bucket}/{item['Prefix'].rstrip('/')}" for item in found.get("CommonPrefixes", ())]
            return Page(objects, found.get("NextContinuationToken") if found.get("IsTruncated") else None, folders)

        return self._run(prefix, call)

    def delete(self, names: list[str]) -> None:
        """DELETE of up to 1,000 names of one bucket."""
        keys = [{"Key": key} for key in (name.partition("/")[2] for name in names) if key]

        async def call(s3: Any, Bucket: str, **_: str) -> None:  # noqa: N803
            found = await s3.delete_objects(Bucket=Bucket, Delete={"Objects": keys, "Quiet": True})
            for item in found.get("Errors", ()):
                raise ClientError({"Error": item}, "DeleteObjects")

        if keys:
            self._run(names[0], call)

    def _run(self, name: str, call: Callable[..., Awaitable[T]]) -> T:
        """Wait for `call(client, Bucket=, Key=)`, and translate its errors."""
        bucket, _, key = name.partition("/")

        async def connected() -> T:
            try:
                s3 = await self._fs.set_session()
            except ValueError as error:  # about the URL, before anything is sent
                raise ConfigError(
                    "storage.endpoint_url is not a valid address", found=error, where="storage.endpoint_url"
                ) from error
            return await call(s3, Bucket=bucket, Key=key)

        def run() -> T:
            answer: T = sync(self._fs.loop, connected)
            return answer

        return _translated(run, f"s3://{name}")


def _translated(run: Callable[[], T], uri: str) -> T:
    try:
        return run()
    except ClientError as error:
        raise _by_status(error, uri) from error
    except TimeoutError as error:  # of fsspec, which replaces the client's
        cause = error.__cause__ or error
        raise Again(type(cause).__name__, str(cause)) from error
    except boto.ParamValidationError as error:
        raise FileNotFoundError(errno.ENOENT, "not a valid name of a bucket and an object", uri) from error
    except _NO_CREDENTIALS as error:
        raise PermissionError(errno.EACCES, f"no credentials: {error}", uri) from error
    except _TRANSIENT as error:
        if isinstance(getattr(error, "kwargs", {}).get("error"), aiohttp.ClientConnectorCertificateError):
            raise OSError(errno.EPROTO, str(error), uri) from error  # a certificate stays untrusted
        raise Again(type(error).__name__, str(error)) from error
    except BotoCoreError as error:
        raise OSError(errno.EIO, str(error), uri) from error


def _by_status(error: ClientError, uri: str) -> Exception:
    found = error.response.get("Error", {})
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return problem(status, str(found.get("Code", "")), str(found.get("Message", "")), uri)
