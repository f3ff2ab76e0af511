"""Retry a fit: start Ray Train again after a failure; it continues from its last checkpoint.

Only failures on nodes that are still alive count against `fit.max_failures`. Ray Train itself excuses a node whose
loss was announced, but counts one that vanished. So Ray Train is allowed no failure, and the retries are counted here.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.train import Checkpoint, FailureConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer

from pipeline.errors import FastfillError, TransientError

_logger = logging.getLogger(__name__)
_NODE_DIED = "its node has died"  # Ray's text; the error has a field for it only if the loss was announced


def no_failure_but_announced_ones() -> FailureConfig:
    """Ray Train retries by itself only after the announced loss of a node, any number of times."""
    return FailureConfig(max_failures=0, max_preemption_failures=-1)  # type: ignore[call-arg]  # mypy sees Ray Train v1


def fit_to_the_end(make_trainer: Callable[[], TorchTrainer], max_failures: int) -> Checkpoint:
    """Run a trainer, again after each failure, and return its last checkpoint; `max_failures` -1 is any number.

    Raises:
        TransientError: workers failed more often than `max_failures`.
        FastfillError: a worker raised it; only a TransientError is retried.
    """
    failures = 0
    while True:
        try:
            return _fit(make_trainer())
        except TrainingFailedError as error:
            cause, lost = _cause(error), lost_with_its_node(error)
            failures += not lost
            again = isinstance(error, WorkerGroupError) and isinstance(cause, TransientError)
            if not again or 0 <= max_failures < failures:
                raise cause from error
            what = "a worker of the fit was lost with its node" if lost else f"a worker of the fit failed ({failures})"
            _logger.warning("%s: continuing after the last complete epoch", what)


def lost_with_its_node(error: TrainingFailedError) -> bool:
    """True if a worker was lost together with its node; the other workers then fail as a consequence."""
    failures: dict[int, object] = getattr(error, "worker_failures", {})
    return any(_is_loss(getattr(failure, "health_check_failure", failure)) for failure in failures.values())


def _is_loss(failure: object) -> bool:
    if isinstance(failure, ActorDiedError):
        return failure.preempted or _NODE_DIED in str(failure)
    return isinstance(failure, ActorUnavailableError)  # unreachable: a node that is alive would report a death


def _fit(trainer: TorchTrainer) -> Checkpoint:
    """Run a trainer; Ctrl-C raises KeyboardInterrupt, during the fit and after it."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        checkpoint: Checkpoint | None = trainer.fit().checkpoint
    except SystemExit as stopped:  # Ray Train's handler of Ctrl-C would end the program with exit code 0
        raise KeyboardInterrupt from stopped
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
    assert checkpoint is not None, "a finished fit has a checkpoint"
    return checkpoint


def _cause(error: TrainingFailedError) -> FastfillError:
    """The worker's own error if it is a FastfillError, else a TransientError."""
    failures: dict[int, object] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        inner = getattr(failure, "_base_exc", failure)
        if isinstance(inner, FastfillError):
            return inner
    remedy = "run the same command again: the fit continues after the last complete epoch"
    return TransientError("the fit failed", found=error, where="Ray Train", remedy=remedy)
