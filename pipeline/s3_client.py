"""S3, one request per call: what s3fs's client answers, turned into what the caller does next.

Below `object_store`, which retries and settles doubtful writes. Guarantee: a call makes one request, and
raises `Again` where the same request may well succeed later, `Precondition` where its condition did not
hold, FileNotFoundError and PermissionError for 404 and 403. It never retries by itself, so that every
retry is ours, and counted.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
import s3fs
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync

from pipeline.config import Storage
from pipeline.object_store import Again, Blob, Page, Precondition
from pipeline.store import Stat

T = TypeVar("T")

# Codes that come with a status of 4xx and still go away by themselves.
_TRANSIENT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "SlowDown", "Throttling", "ThrottlingException"}
_DELETE_AT_ONCE = 1000


class S3Client:
    """Names are `bucket/key`; an object's version is its etag."""

    def __init__(self, settings: Storage) -> None:
        """Nothing is sent yet; credentials are found as the AWS SDKs find them."""
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
        """GET, maybe of the bytes from `start` to before `stop`, maybe only if it is still that version."""
        condition = {"IfMatch": if_match} if if_match is not None else {}
        if start is not None:
            condition["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"

        async def call(s3: Any, **where: str) -> Blob:
            found = await s3.get_object(**where, **condition)
            async with found["Body"] as body:
                return Blob(await body.read(), found["ETag"])

        return self._run(name, call)

    def put(self, name: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """PUT, maybe under a condition; returns the etag."""
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match is not None else {}

        async def call(s3: Any, **where: str) -> str:
            found = await s3.put_object(**where, Body=data, **condition)
            return str(found["ETag"])

        return self._run(name, call)

    def listing(self, prefix: str, token: str | None, deep: bool = True) -> Page:
        """One page of the objects whose names begin with `prefix`; else only those without a further "/"."""
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
        """DELETE, one request for up to 1,000 names of one bucket."""
        for start in range(0, len(names), _DELETE_AT_ONCE):
            some = names[start : start + _DELETE_AT_ONCE]
            keys = [{"Key": name.partition("/")[2]} for name in some]

            async def call(s3: Any, Bucket: str, Key: str, keys: list[dict[str, str]] = keys) -> None:  # noqa: N803
                found = await s3.delete_objects(Bucket=Bucket, Delete={"Objects": keys, "Quiet": True})
                for problem in found.get("Errors", ()):
                    raise ClientError({"Error": problem}, "DeleteObjects")

            self._run(some[0], call)

    def _run(self, name: str, call: Callable[..., Awaitable[T]]) -> T:
        """Wait for `call(client, Bucket=, Key=)`, and turn its errors into ours."""
        bucket, _, key = name.partition("/")

        async def connected() -> T:
            return await call(await self._fs.set_session(), Bucket=bucket, Key=key)

        def run() -> T:
            answer: T = sync(self._fs.loop, connected)
            return answer

        return _translated(run, f"s3://{name}")


def _translated(run: Callable[[], T], uri: str) -> T:
    try:
        return run()
    except ClientError as error:
        raise _by_status(error, uri) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise PermissionError(errno.EACCES, f"no credentials: {error}", uri) from error
    except (HTTPClientError, IncompleteReadError, ResponseParserError) as error:
        raise Again(type(error).__name__, str(error)) from error
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        raise Again(type(error).__name__, str(error)) from error
    except BotoCoreError as error:
        raise OSError(errno.EIO, str(error), uri) from error


def _by_status(error: ClientError, uri: str) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    text = f"{code or status}: {error.response.get('Error', {}).get('Message', '')}"
    if code in _TRANSIENT_CODES or status in (409, 429) or status >= 500:
        return Again(code or str(status), text)
    if status == 412 or code == "PreconditionFailed":
        return Precondition(uri)
    if status == 404 or code in ("NoSuchKey", "NoSuchBucket"):
        return FileNotFoundError(errno.ENOENT, text, uri)
    if status in (401, 403) or code == "AccessDenied":
        return PermissionError(errno.EACCES, text, uri)
    if status == 416:
        return EOFError(uri)
    return OSError(errno.EIO, text, uri)
