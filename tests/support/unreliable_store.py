"""A store in memory that fails as networks do, and programs that go through it one request at a time.

The store is a fake, because the point is to decide for each single request what becomes of it and who comes next. Its
versions are digests of the content, as those of S3 are: a content that comes back brings its version back.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from pipeline.storage.interface import Stat
from pipeline.storage.retry import Again, Precondition
from pipeline.storage.retrying_store import Blob, Page

T = TypeVar("T")


class Fault(StrEnum):
    """What becomes of a request."""

    NONE = "none"
    FAILED = "failed"  # not applied
    BUSY = "busy"  # 409, not applied
    LOST = "lost"  # applied, and the answer is lost
    DELAYED = "delayed"  # not applied yet; the client sees a time-out
    DUPLICATED = "duplicated"  # applied, and once more later
    STALE = "stale"  # a listing without what is new
    GONE = "gone"  # not applied, and nothing else is until the program gives up
    LOST_AND_GONE = "lost and gone"
    DELAYED_AND_GONE = "delayed and gone"
    CRASH = "crash"  # the program dies before it asks
    CRASH_AFTER = "crash after"  # or before it hears the answer


class Crash(BaseException):
    """A program is killed: nothing may catch it."""


@dataclass
class Program:
    """Runs in a thread of its own, but only when it is told to: from one request to the next.

    Attributes:
        kind: what it does, for those who judge its writes.
        gone: it cannot reach the store any more; whoever gives up and starts again sets this back.
    """

    kind: str
    main: Callable[[Program], None]
    done: bool = False
    gone: bool = False
    error: BaseException | None = None
    fault: Fault = Fault.NONE
    _turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self) -> None:
        """Up to the first request."""
        threading.Thread(target=self._run, daemon=True).start()
        self._give_turn()

    def step(self, fault: Fault) -> None:
        """Let the waiting request meet a fault, and go on up to the next one; raises what the program raised."""
        self.fault = fault
        self._give_turn()

    def next_fault(self) -> Fault:
        """Called in the program's thread, before each request: wait for the turn."""
        if self.gone:
            return Fault.FAILED
        self._back.release()
        self._turn.acquire()
        self.gone = self.fault in (Fault.GONE, Fault.LOST_AND_GONE, Fault.DELAYED_AND_GONE)
        return self.fault

    def _give_turn(self) -> None:
        self._turn.release()
        self._back.acquire()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _run(self) -> None:
        self._turn.acquire()
        _here.program = self
        try:
            self.main(self)
        except Crash:
            pass
        except BaseException as error:  # noqa: BLE001 (raised again in the thread that gives the turns)
            self.error = error
        self.done = True
        self._back.release()


class _Here(threading.local):
    program: Program | None = None


_here = _Here()

Watch = Callable[[str, bytes | None, bytes, Program | None], None]


class UnreliableStore:
    """An `retrying_store.Client`. Requests of threads that are no programs are done at once, and rightly.

    Attributes:
        objects: name -> content.
        delayed: puts that are still under way.
        watch: told of each write that is done: name, content before and after, and whose it was.
    """

    def __init__(self, honours_conditions: bool = True) -> None:
        self.objects: dict[str, bytes] = {}
        self.delayed: list[Callable[[], str]] = []
        self.watch: Watch = lambda *_: None
        self._honours = honours_conditions

    def head(self, name: str) -> Stat:
        return self._request(lambda: _stat(self._content(name)))

    def get(self, name: str, start: int | None, stop: int | None, if_match: str | None) -> Blob:
        def apply() -> Blob:
            data = self._content(name)
            if if_match not in (None, _etag(data)):
                raise Precondition(name)
            if start and start >= len(data):
                raise EOFError(name)
            return Blob(data[start:stop], _etag(data))

        return self._request(apply)

    def put(self, name: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        program = _here.program

        def apply() -> str:
            before = self.objects.get(name)
            if self._honours:
                if if_absent and before is not None:
                    raise Precondition(name)
                if if_match is not None and before is None:
                    raise FileNotFoundError(name)  # as S3
                if if_match is not None and if_match != _etag(before or b""):
                    raise Precondition(name)
            self.objects[name] = data
            self.watch(name, before, data, program)
            return _etag(data)

        return self._request(apply, is_put=True)

    def listing(self, prefix: str, token: str | None, deep: bool = True) -> Page:
        names = list(self.objects)  # in the order in which they were made
        stale = names[: len(names) // 2]
        found, less = ([(n, _stat(self.objects[n])) for n in some if n.startswith(prefix)] for some in (names, stale))
        return self._request(lambda: Page(found, None), stale=Page(less, None))

    def delete(self, names: list[str]) -> None:
        self._request(lambda: [self.objects.pop(name, None) for name in names])

    def deliver(self, number: int) -> None:
        """Let a delayed put arrive now; nobody waits for its answer."""
        with contextlib.suppress(Precondition, FileNotFoundError):
            self.delayed.pop(number)()

    def _content(self, name: str) -> bytes:
        if name not in self.objects:
            raise FileNotFoundError(name)
        return self.objects[name]

    def _request(self, apply: Callable[[], T], *, is_put: bool = False, stale: T | None = None) -> T:
        fault = _here.program.next_fault() if _here.program else Fault.NONE
        if fault is Fault.CRASH:
            raise Crash
        if fault in (Fault.DELAYED, Fault.DELAYED_AND_GONE) and is_put:
            self.delayed.append(apply)  # type: ignore[arg-type]  # a put gives its etag
        if fault in (Fault.FAILED, Fault.BUSY, Fault.GONE, Fault.DELAYED, Fault.DELAYED_AND_GONE):
            raise Again(fault)
        if fault is Fault.STALE and stale is not None:
            return stale
        answer = apply()
        if fault is Fault.DUPLICATED and is_put:
            self.delayed.append(apply)  # type: ignore[arg-type]
        if fault is Fault.CRASH_AFTER:
            raise Crash
        if fault in (Fault.LOST, Fault.LOST_AND_GONE):
            raise Again(fault)
        return answer


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _stat(data: bytes) -> Stat:
    return Stat(len(data), 0.0, _etag(data))


class FakeTime:
    """In place of the module `time`, where pauses are made: each is one second, and takes none."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += 1.0
