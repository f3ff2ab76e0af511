"""Start Ray for a command without its start-up messages, and stop it when the command is interrupted."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

RAY_NOISE = "worker processes have been started on node"  # a warning; fractional CPUs and idle workers are intended
_STOP_SECONDS = 20.0
_stopping = threading.Event()


def start_ray() -> None:
    """Connect to the cluster in RAY_ADDRESS (set for a submitted job), or start Ray on this machine."""
    import logging

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow down other processes
    os.environ.setdefault("RAY_num_workers_soft_limit", "8")  # keeps idle workers: a new one imports everything again
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ log repeats handled errors (ray#53727)
    import ray
    import ray.data

    from pipeline.storage import objects

    # Ray Data's own exception loses the FastfillError that it wraps when it is pickled.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":  # stderr; the session's log file is complete
            handler.setLevel(logging.CRITICAL)  # errors are raised as exceptions anyway
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
    for number in (signal.SIGINT, signal.SIGTERM):  # replaces Ray's handlers, which end the driver silently
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Stop on Ctrl-C, `ray job stop`, the deletion of a pod or the shutdown of a machine.

    SIGTERM is usually followed by SIGKILL after 30 s, and a library's callback may swallow the KeyboardInterrupt. So
    the process exits after 20 s, or at once on a second signal. Finished work is on storage already.
    """
    if _stopping.is_set():
        os._exit(130)
    _stopping.set()
    timer = threading.Timer(_STOP_SECONDS, os._exit, [130])
    timer.daemon = True
    timer.start()
    with suppress(OSError):  # not sys.stderr: it may be in the middle of a write
        os.write(2, f"stopping: {signal.Signals(number).name}; send it again to stop at once\n".encode())
    raise KeyboardInterrupt


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the start-up messages of native code; errors are still raised as exceptions."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
