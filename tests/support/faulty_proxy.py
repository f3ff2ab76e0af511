"""A proxy in front of a real S3 server that does to requests what networks and busy stores do.

Bytes pass through as they came, the Host header with them, so signatures made for the proxy's address still verify
upstream. Each client connection has one upstream connection of its own. Random faults are drawn per request from a
seed; with concurrent clients the order of requests, and so which of them is hit, differs from run to run. A fault that
a test needs at one precise place is injected:

    with FaultyProxy(server.endpoint, rate=0) as proxy:
        proxy.inject(Fault.RESET_AFTER, method="PUT", path=r"/tags/latest")  # applied, and the answer is lost

As a process of its own:

    python -m tests.support.faulty_proxy --upstream http://127.0.0.1:8333 --port 9000 --rate 0.05 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self
from urllib.parse import urlsplit

READ_BYTES = 256 * 1024
BURST_CHANCE = 0.25  # that a fault meets the next two to five requests as well
MEAN_BURST = 1 + BURST_CHANCE * 3.5


class Fault(StrEnum):
    ERROR_BEFORE = "error-before"  # 500, nothing was applied
    ERROR_AFTER = "error-after"  # applied, then 500
    HANG_AFTER = "hang-after"  # applied, then silence, then the connection closes
    RESET_AFTER = "reset-after"  # applied, then the connection is reset
    RESET = "reset"  # the connection is reset, nothing was applied
    SLOW_DOWN = "slow-down"  # 503; at random, for everything during one second
    TRUNCATED = "truncated"  # half of the answer that was promised, then the connection closes
    STALL = "stall"  # two seconds of nothing, then as if nothing had happened
    UNREADABLE = "unreadable"  # 400 of one object, for ever: its key for SSE-C is not given
    NO_KEY = "no-key"  # 400 as well: its KMS key is disabled
    OUTAGE = "outage"  # every connection is reset, as long as it lasts


PER_REQUEST = (
    Fault.ERROR_BEFORE,
    Fault.ERROR_AFTER,
    Fault.HANG_AFTER,
    Fault.RESET_AFTER,
    Fault.RESET,
    Fault.TRUNCATED,
    Fault.STALL,
)
ERRORS = {
    Fault.SLOW_DOWN: (503, "Service Unavailable", "SlowDown", "Please reduce your request rate."),
    Fault.UNREADABLE: (400, "Bad Request", "InvalidRequest", "The object was stored using a form of SSE-C."),
    Fault.NO_KEY: (400, "Bad Request", "KMS.DisabledException", "The key is disabled."),
    Fault.ERROR_BEFORE: (500, "Internal Server Error", "InternalError", "We encountered an internal error."),
    Fault.ERROR_AFTER: (500, "Internal Server Error", "InternalError", "We encountered an internal error."),
}


@dataclass
class Injection:
    """One fault for the next `times` requests that match."""

    fault: Fault
    method: str
    path: re.Pattern[str]
    times: int


@dataclass
class Watch:
    """Calls `act` once, when a request matches: before it is passed on, or after it was applied.

    What `act` returns decides what becomes of the request, or of its answer: True lets it pass, False resets the
    connection. It runs in a thread, and everything else goes on meanwhile.
    """

    act: Callable[[str], bool]
    method: str
    path: re.Pattern[str]
    after: bool
    armed: bool = True

    def takes(self, method: str, target: str, after: bool) -> bool:
        """Whether this is the moment; there is only one."""
        if not self.armed or self.after != after or self.method != method or not self.path.search(target):
            return False
        self.armed = False
        return True


class Dice:
    """Which request meets which fault: per request at `rate`, singly and in bursts; SlowDown by the clock.

    A second of SlowDown hits whatever comes in it, so those seconds are `rate` of the time, not of the requests.
    """

    def __init__(self, rate: float, seed: int, now: float) -> None:
        self.rate, self.random = rate, random.Random(seed)
        self.burst: list[Fault] = []
        self.slow_from = now + self._gap()

    def draw(self, method: str, now: float) -> Fault | None:
        if now >= self.slow_from + 1.0:
            self.slow_from = now + self._gap()
        if now >= self.slow_from:
            return Fault.SLOW_DOWN
        if not self.burst and self.random.random() < self.rate / MEAN_BURST:
            num_requests = self.random.randint(3, 6) if self.random.random() < BURST_CHANCE else 1
            self.burst = [self.random.choice(PER_REQUEST)] * num_requests
        fault = self.burst.pop() if self.burst else None
        return Fault.ERROR_BEFORE if fault is Fault.TRUNCATED and method != "GET" else fault

    def _gap(self) -> float:
        return self.random.expovariate(self.rate) if self.rate > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class Head:
    """The first line and the headers of a message, and the bytes that they came as."""

    raw: bytes
    first_line: list[str]
    headers: dict[str, str]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Self:
        raw = await reader.readuntil(b"\r\n\r\n")
        first_line, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return cls(raw, first_line.split(" ", 2), {name.lower(): value.strip() for name, _, value in pairs})

    async def body(self, reader: asyncio.StreamReader, is_request: bool) -> AsyncIterator[bytes]:
        """The body's bytes as they come, with the framing of chunks; a response may end with its connection."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while True:
                line = await reader.readuntil(b"\r\n")
                size = int(line.split(b";")[0], 16)
                if size == 0:
                    yield line
                    break
                yield line + await reader.readexactly(size + 2)
            while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
                yield line
            yield line
        elif "content-length" in self.headers or is_request:
            remaining = int(self.headers.get("content-length", "0"))
            while remaining:
                piece = await reader.read(min(READ_BYTES, remaining))
                if not piece:
                    raise asyncio.IncompleteReadError(b"", remaining)
                remaining -= len(piece)
                yield piece
        else:
            while piece := await reader.read(READ_BYTES):
                yield piece

    @property
    def keeps_alive(self) -> bool:
        return "close" not in self.headers.get("connection", "").lower()


@dataclass(eq=False)
class Connection:
    """One client's connection, with the upstream connection that serves it."""

    client_reader: asyncio.StreamReader
    client: asyncio.StreamWriter
    upstream_reader: asyncio.StreamReader | None = None
    upstream: asyncio.StreamWriter | None = None

    async def connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The upstream connection: the last one, or a new one where the server has closed it meanwhile."""
        if self.upstream_reader is None or self.upstream is None or self.upstream_reader.at_eof():
            if self.upstream is not None:
                self.upstream.close()
            self.upstream_reader, self.upstream = await asyncio.open_connection(host, port)
        return self.upstream_reader, self.upstream

    def close(self) -> None:
        for writer in (self.client, self.upstream):
            if writer is not None:
                writer.close()

    def reset(self) -> None:
        """End the client's connection with RST rather than FIN."""
        raw = self.client.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it may be gone already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.transport.abort()


class GaveUp(Exception):
    """The connection cannot be used for another request."""


@dataclass
class FaultyProxy:
    """Listens in a thread of this process; `enabled` turns the random faults on and off, not the asked-for ones."""

    upstream: str
    port: int = 0  # 0: any free one
    host: str = "127.0.0.1"
    rate: float = 0.05
    seed: int = 0
    enabled: bool = True
    hang_seconds: float = 5.0
    stall_seconds: float = 2.0
    counts: Counter[Fault] = field(default_factory=Counter, init=False)  # faults that happened
    requests: Counter[str] = field(default_factory=Counter, init=False)  # by method, all that came
    injections: list[Injection] = field(default_factory=list, init=False)
    watches: list[Watch] = field(default_factory=list, init=False)
    delays: dict[str, float] = field(default_factory=dict, init=False)  # regex of a GET's target -> seconds
    log: list[tuple[str, str, int]] = field(default_factory=list, init=False)  # method, target, status that was given

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        url = urlsplit(self.upstream)
        self._upstream_host, self._upstream_port = url.hostname or "127.0.0.1", url.port or 80
        self._dice = Dice(self.rate, self.seed, time.monotonic())
        self._until: dict[Fault, float] = {}
        self._connections: set[Connection] = set()
        self._loop, ready = asyncio.new_event_loop(), threading.Event()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=[ready], name="faulty-proxy", daemon=True)
        self._thread.start()
        ready.wait()
        if not self._thread.is_alive():
            raise RuntimeError(f"the proxy could not listen on {self.host}:{self.port}")

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def inject(self, fault: Fault, method: str = "", path: str = "", times: int = 1) -> Injection:
        """Have the next `times` requests meet the fault whose method is this and whose target `path` is found in."""
        injection = Injection(fault, method, re.compile(path), times)
        self.injections.append(injection)
        return injection

    def watch(self, act: Callable[[str], bool], method: str, path: str, *, after: bool = False) -> Watch:
        """Have `act` called with the target of the next request like this; see `Watch`."""
        found = Watch(act, method, re.compile(path), after)
        self.watches.append(found)
        return found

    def outage(self, seconds: float) -> None:
        """Reset all connections and every new one from now on for so long; returns at once."""
        self._until[Fault.OUTAGE] = time.monotonic() + seconds
        self._loop.call_soon_threadsafe(self._reset_all)

    def slow_down(self, seconds: float) -> None:
        """Answer everything with 503 SlowDown from now on for so long; returns at once."""
        self._until[Fault.SLOW_DOWN] = time.monotonic() + seconds

    def _reset_all(self) -> None:
        for connection in self._connections:
            connection.reset()

    def _run(self, ready: threading.Event) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve(ready))
        finally:
            ready.set()

    async def _serve(self, ready: threading.Event) -> None:
        server = await asyncio.start_server(self._accept, self.host, self.port, backlog=512)
        async with server:
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            await self._stopping.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        self._connections.add(connection)
        try:
            while True:
                if time.monotonic() < self._until.get(Fault.OUTAGE, 0.0):
                    self.counts[Fault.OUTAGE] += 1
                    connection.reset()
                    return
                await self._serve_one(connection)
        except (OSError, EOFError, GaveUp, asyncio.CancelledError):
            pass  # either side went away, a fault ended the connection, or the proxy stops
        finally:
            self._connections.discard(connection)
            connection.close()

    def _choose(self, method: str, target: str) -> Fault | None:
        """What a test asked for comes before what the dice say."""
        for injection in self.injections:
            if injection.times > 0 and injection.method in ("", method) and injection.path.search(target):
                injection.times -= 1
                return injection.fault
        if time.monotonic() < self._until.get(Fault.SLOW_DOWN, 0.0):
            return Fault.SLOW_DOWN
        return self._dice.draw(method, time.monotonic()) if self.enabled else None

    async def _serve_one(self, connection: Connection) -> None:
        request = await Head.read(connection.client_reader)
        method, target = request.first_line[:2]
        self.requests[method] += 1
        fault = self._choose(method, target)
        if fault is not None and fault is not Fault.TRUNCATED:  # that one shows only when there is a body
            self.counts[fault] += 1
        if fault is Fault.RESET:
            connection.reset()
            raise GaveUp
        if fault is Fault.STALL:
            await asyncio.sleep(self.stall_seconds)
        for pattern, seconds in self.delays.items():
            if method == "GET" and re.search(pattern, target):
                await asyncio.sleep(seconds)
        await self._act(connection, request, after=False)
        if "expect" in request.headers:
            connection.client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault in (Fault.ERROR_BEFORE, Fault.SLOW_DOWN, Fault.UNREADABLE, Fault.NO_KEY):
            async for _ in request.body(connection.client_reader, is_request=True):
                pass
            await self._answer_error(connection, request, fault)
        else:
            await self._forward(connection, request, fault)

    async def _forward(self, connection: Connection, request: Head, fault: Fault | None) -> None:
        """Pass the request on; the server may answer before it has read all of it, so both ways at the same time."""
        reader, writer = await connection.connect(self._upstream_host, self._upstream_port)

        async def send() -> None:
            writer.write(request.raw)
            try:
                async for piece in request.body(connection.client_reader, is_request=True):
                    writer.write(piece)
                    await writer.drain()
            except EOFError:  # the client is gone: without this the server would wait for the rest
                writer.close()
                raise

        sending = asyncio.create_task(send())
        try:
            response = await Head.read(reader)
            while response.first_line[1].startswith("1"):  # 100 Continue: the client has had its own
                response = await Head.read(reader)
            await self._respond(connection, request, response, fault)
            await asyncio.wait([sending], timeout=0.1)
            if not sending.done():  # answered early: what is still to come of the request has no reader
                raise GaveUp
        finally:
            sending.cancel()
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                await sending
        if not (request.keeps_alive and response.keeps_alive):
            raise GaveUp

    async def _respond(self, connection: Connection, request: Head, response: Head, fault: Fault | None) -> None:
        """Relay the server's answer, or what the fault leaves of it."""
        assert connection.upstream_reader is not None
        bodiless = request.first_line[0] == "HEAD" or response.first_line[1] in ("204", "304")
        body = _nothing() if bodiless else response.body(connection.upstream_reader, is_request=False)
        self.log.append((request.first_line[0], request.first_line[1], int(response.first_line[1])))
        await self._act(connection, request, after=True)
        if fault in (None, Fault.STALL):
            connection.client.write(response.raw)
            async for piece in body:
                connection.client.write(piece)
                await connection.client.drain()
            await connection.client.drain()
            return
        whole = b"".join([piece async for piece in body])
        if fault is Fault.ERROR_AFTER:
            await self._answer_error(connection, request, fault)
            return
        if fault is Fault.RESET_AFTER:
            connection.reset()
        elif fault is Fault.HANG_AFTER:
            await asyncio.sleep(self.hang_seconds)
        else:
            self.counts[Fault.TRUNCATED] += bool(whole)
            connection.client.write(response.raw + whole[: len(whole) // 2])
            await connection.client.drain()
            if not whole:
                return
        raise GaveUp

    async def _act(self, connection: Connection, request: Head, after: bool) -> None:
        """Let the first watch that waits for this moment act."""
        method, target = request.first_line[:2]
        for watch in self.watches:
            if watch.takes(method, target, after):
                if not await asyncio.to_thread(watch.act, target):
                    connection.reset()
                    raise GaveUp
                return

    async def _answer_error(self, connection: Connection, request: Head, fault: Fault) -> None:
        status, reason, code, message = ERRORS[fault]
        xml = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        body = b"" if request.first_line[0] == "HEAD" else xml.encode()
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.client.write(head.encode() + body)
        await connection.client.drain()


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


def main() -> None:
    """Run until SIGTERM or SIGINT, then print the counts as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before the thread starts, so that only sigwait sees them
    with FaultyProxy(**vars(arguments)) as proxy:
        print(proxy.endpoint, flush=True)
        signal.sigwait(signals)
        print(json.dumps({"requests": proxy.requests, "faults": proxy.counts}), flush=True)


if __name__ == "__main__":
    main()
