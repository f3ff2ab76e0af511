"""Start Ray for a command, quietly, and end it when the command is interrupted."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

_stopping = threading.Event()


_STOP_SECONDS = 20.0
RAY_NOISE = "worker processes have been started on node"  # fractional CPUs and kept idle workers are meant here


def start_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names (a submitted job has it), or start Ray on this machine."""
    import logging

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the other processes
    os.environ.setdefault("RAY_num_workers_soft_limit", "8")  # else few cores end idle workers, which import anew
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ log repeats what is handled (ray#53727)
    import ray
    import ray.data

    from pipeline.storage import objects

    # Ray Data's own wrapper loses the error of ours that it wraps, once it is pickled on its way here.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":  # to stderr; the session's log file keeps everything
            handler.setLevel(logging.CRITICAL)  # an error comes to the user as an exception, once
    if ray.is_initialized():
        return
    for name in ("ray", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    init = functools.partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
    with _quiet():
        if os.environ.get("RAY_ADDRESS"):
            init(runtime_env={"env_vars": objects.environment()})
        else:
            init(address="local", num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False)
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray's own, which would end the driver without a word
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """End: Ctrl-C, `ray job stop`, a pod that is deleted, a machine that shuts down.

    Whoever sends SIGTERM waits half a minute and kills, and an interrupt may be lost in a library's callback; so what
    has not ended by then is not waited for, nor is anything the second time: nothing that is durable depends on it.
    """
    if _stopping.is_set():
        os._exit(130)
    _stopping.set()
    timer = threading.Timer(_STOP_SECONDS, os._exit, [130])
    timer.daemon = True
    timer.start()
    with suppress(OSError):  # not through sys.stderr, which may be in the middle of a write
        os.write(2, f"stopping: {signal.Signals(number).name}; once more ends it at once\n".encode())
    raise KeyboardInterrupt


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep native code's start-up chatter off the user's terminal; errors come as exceptions all the same."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
