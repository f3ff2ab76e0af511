"""The attempts of a fit: Ray Train is started again after a failure, and goes on from its last checkpoint.

Guarantee: only what failed on nodes that live counts for `fit.max_failures`. Ray Train makes that difference for a node
that was announced to go, but charges one that went without a word; so it is let bear no failure by itself. This module
does not know what is fitted.
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

_LOG = logging.getLogger(__name__)
_NODE_DIED = "its node has died"  # in Ray's words: the error has no field for it unless the node was announced to go


def no_failure_but_announced_ones() -> FailureConfig:
    """What a trainer bears by itself: nodes that were announced to go, without end."""
    return FailureConfig(max_failures=0, max_preemption_failures=-1)  # type: ignore[call-arg]  # mypy sees Ray Train v1


def fit_to_the_end(make_trainer: Callable[[], TorchTrainer], max_failures: int) -> Checkpoint:
    """The last checkpoint of a trainer that is made again after each failure.

    Args:
        make_trainer: gives one that goes on from the last checkpoint.
        max_failures: that are borne; -1 for any number.

    Raises:
        TransientError: workers failed more often than that.
        FastfillError: a worker raised it; only a TransientError is tried again.
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
            _LOG.warning("%s: going on after the last whole epoch", what)


def lost_with_its_node(error: TrainingFailedError) -> bool:
    """Whether one of the workers went because its node did; the others then fail in its wake."""
    failures: dict[int, object] = getattr(error, "worker_failures", {})
    return any(_is_loss(getattr(failure, "health_check_failure", failure)) for failure in failures.values())


def _is_loss(failure: object) -> bool:
    if isinstance(failure, ActorDiedError):
        return failure.preempted or _NODE_DIED in str(failure)
    return isinstance(failure, ActorUnavailableError)  # out of reach, and its node does not say that it died


def _fit(trainer: TorchTrainer) -> Checkpoint:
    """Run it; Ctrl-C raises KeyboardInterrupt as anywhere else, and still does so afterwards."""
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
    """The worker's own error where it is one of ours."""
    failures: dict[int, object] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        inner = getattr(failure, "_base_exc", failure)
        if isinstance(inner, FastfillError):
            return inner
    remedy = "run the same command again: it goes on after the last whole epoch"
    return TransientError("the fit failed", found=error, where="Ray Train", remedy=remedy)
