"""What every command shares: its options, its errors and exit codes, and where it prints.

People read stderr; with `--json` a program reads one JSON document from stdout. Exit codes: 0 done,
1 failed, 2 bad config or input, 3 refused. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

import click

from jobs.failures import CLOSED_PIPE, Command, discard_unwritten, in_one_message
from pipeline.errors import ConfigError, FastfillError
from pipeline.uris import holds_user

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config import Config
    from pipeline.run import Run


_STDOUT = "jobs.stdout"
_STOP_SECONDS = 20.0
_RAY_NOISE = "worker processes have been started on node"  # fractional CPUs and kept idle workers are meant here
_stopping = threading.Event()


class Seconds(click.FloatRange):
    """Seconds from 0 on, without NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # Any: click's own
        """The number, or a usage error."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A click command with `--config`, `--set` and `--json`; its docstring is its help."""
    options = [
        click.option("--config", "config_path", required=True, metavar="FILE", help="The run's YAML file."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: a.b=value."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document on stdout."),
    ]

    def decorate(function: Callable[..., None]) -> click.Command:
        wrapped = with_errors(function)
        for option in reversed(options):
            wrapped = option(wrapped)
        return click.command(name, Command, context_settings={"help_option_names": ["-h", "--help"]})(wrapped)

    return decorate


def with_errors(function: Callable[..., None]) -> Callable[..., None]:
    """Turn every error into a clear message and an exit code, wherever it was raised."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:  # Any: click decides what a command is called with
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _RAY_NOISE)  # Ray reads it when it is imported
        try:
            with in_one_message(), _results_alone() as stdout:
                click.get_current_context().meta[_STDOUT] = stdout
                function(*args, **kwargs)
        except KeyboardInterrupt:
            click.secho("stopped; what is durable is kept, the same command goes on from there", err=True)
            if ray := sys.modules.get("ray"):
                ray.shutdown()  # what other threads wait for ends, and so do they
            sys.exit(130)

    return run


def load(config_path: str, overrides: tuple[str, ...], *, new_run: bool = False) -> Config:
    """The config, with the overrides; object storage is used by its settings from now on.

    Args:
        config_path: the YAML file.
        overrides: of `--set`.
        new_run: take the first free place beside the run that is there.
    """
    from pipeline import storage
    from pipeline.config_file import load_config
    from pipeline.identity import free_uri
    from pipeline.resumed import as_started

    config = load_config(config_path, overrides)
    storage.configure(config.storage)
    if new_run:
        config = config.model_copy(update={"run": free_uri(config.run)})
    return as_started(config)


def absolute(place: str) -> str:
    """A file or folder as the user means it: a URI as it is, a path from where the command was given.

    Raises:
        ConfigError: the URI holds a user or password, which messages and files would show.
    """
    if holds_user(place):
        raise ConfigError(
            "a URL must not hold a user or password",
            where=place.rpartition("@")[2],
            remedy="give credentials through the environment, such as AWS_PROFILE",
        )
    return place.rstrip("/") if "://" in place else os.path.abspath(place)


def console() -> Console:
    """Where people read: stderr. Strings are data, in which `[a]` and `:b:` mean nothing; style comes as Text."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def open_run_of(config: Config, *, to_embed: bool = False) -> Run:
    """The run that is there, of which this config must be the config; the manifests are not read for that.

    Args:
        config: what the user gave.
        to_embed: compare the new encoder's file as well, for its embeddings are to be searched with.

    Raises:
        DataError: there is no run, or the encoder's file is missing.
        IncompatibleRun: it was started with other settings, or with other weights.
    """
    from pipeline.identity import check_resumable, encoder_fingerprint, read_settings
    from pipeline.run import Run

    run = Run(config.run)
    read_settings(run)  # a run that is not there is an error
    fingerprints = encoder_fingerprint("encoders.new", config.encoders.new) if to_embed else {}
    check_resumable(config, fingerprints, all_inputs=False)
    return run


def print_json(document: object) -> None:
    """Where programs read: one JSON document on stdout.

    Raises:
        ValueError: a number is not finite, which JSON cannot say; a result says null there.
    """
    print_text(json.dumps(document, indent=1, allow_nan=False))


def print_text(text: str) -> None:
    """To stdout, which belongs to what was asked for; silent if its reader has gone.

    Raises:
        FastfillError: stdout is closed or full.
    """
    stdout: IO[str] | None = click.get_current_context().meta[_STDOUT]
    try:
        if stdout is None:
            raise OSError(errno.EBADF, "stdout is closed")
        click.echo(text, file=stdout)
        stdout.flush()
    except OSError as error:
        discard_unwritten(stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(CLOSED_PIPE)
        raise FastfillError(
            "the result cannot be written",
            found=error.strerror,
            where="stdout",
            remedy="the work itself is done: run the same command again with stdout where it can be written",
        ) from error


def start_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names (a submitted job has it), or start Ray on this machine."""
    import logging

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the other processes
    os.environ.setdefault("RAY_num_workers_soft_limit", "8")  # else few cores end idle workers, which import anew
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ log repeats what is handled (ray#53727)
    import ray
    import ray.data

    from pipeline import storage

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
            init(runtime_env={"env_vars": storage.environment()})
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


def _open_missing_streams() -> None:
    """Take the places of stdin, stdout and stderr if the caller closed them.

    Else the next file that is opened gets the place, and what is printed is written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free place


@contextmanager
def _results_alone() -> Iterator[IO[str] | None]:
    """stdout for results; whatever else is written there meanwhile, by native code as well, goes to stderr."""
    _open_missing_streams()
    stdout = sys.stdout
    try:
        number, stderr = stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError):  # not a file: a test's buffer, a notebook
        with redirect_stdout(sys.stderr):
            yield stdout
        return
    stdout.flush()
    kept = os.dup(number)
    os.dup2(stderr, number)
    try:
        with redirect_stdout(sys.stderr), os.fdopen(os.dup(kept), "w", encoding="utf-8") as results:
            yield results
    finally:
        ctypes.CDLL(None).fflush(None)  # what native code has in its own buffer
        os.dup2(kept, number)
        os.close(kept)


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
