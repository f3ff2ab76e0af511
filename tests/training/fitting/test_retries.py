"""Which failures of a fit count, tested without a cluster; `tests/cluster/test_job.py` removes real nodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipeline.errors import DataError, FastfillError, TransientError
from training.fitting.retries import fit_to_the_end, lost_with_its_node

RESET = RuntimeError("Connection closed by peer")  # what the other workers say


def died(message: str, reason: int = NodeDeathInfo.UNSPECIFIED) -> RayActorError:
    """As Ray makes it of what the cluster's head knows."""
    context = ActorDiedErrorContext(error_message=message, actor_id=b"1" * 16)
    context.node_death_info.reason = reason  # type: ignore[assignment]  # an enum of protobuf is an int
    return ActorDiedError(context)


NODE_DIED = died("The actor died because its node has died. Node Id: 12ab")
PREEMPTED = died("The actor died because its node was drained.", NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
OUT_OF_REACH = ActorUnavailableError("RpcError", b"1" * 16)
KILLED = died("Worker unexpectedly exits with a connection error code 2. (1) the process is killed by SIGKILL")


def group(*failures: Exception) -> WorkerGroupError:
    """As Ray Train hands on what it saw of the workers: a dead one is a health check that failed."""
    wrapped = [
        WorkerHealthCheckFailedError("a worker health check failed", failure)
        if isinstance(failure, RayActorError)
        else failure
        for failure in failures
    ]
    return WorkerGroupError("of the workers", dict(enumerate(wrapped)))


class Trainers:
    """Makes trainers of which each fails as it is told, and the last one ends well: a real one takes seconds."""

    def __init__(self, *failures: TrainingFailedError) -> None:
        self.left, self.made = list(failures), 0

    def __call__(self) -> Any:
        self.made += 1
        return SimpleNamespace(fit=self._fit)

    def _fit(self) -> Any:
        if self.left:
            raise self.left.pop(0)
        return SimpleNamespace(checkpoint="the last one")


@pytest.mark.parametrize("loss", [NODE_DIED, PREEMPTED, OUT_OF_REACH], ids=["died", "announced", "unreachable"])
def test_fit_failure_of_a_worker_on_a_lost_node_does_not_count(loss: Exception) -> None:
    assert lost_with_its_node(group(loss))
    assert lost_with_its_node(group(RESET, loss, RESET))
    trainers = Trainers(*[group(RESET, loss)] * 5)
    assert fit_to_the_end(trainers, max_failures=0) == "the last one"
    assert trainers.made == 6


@pytest.mark.parametrize("failure", [RESET, KILLED], ids=["raised", "killed"])
def test_a_failure_on_a_node_that_is_alive_counts(failure: Exception) -> None:
    assert not lost_with_its_node(group(failure))
    assert fit_to_the_end(Trainers(*[group(failure)] * 2), max_failures=2) == "the last one"
    assert fit_to_the_end(Trainers(*[group(failure)] * 9), max_failures=-1) == "the last one"
    with pytest.raises(TransientError, match="run the same command again"):
        fit_to_the_end(Trainers(*[group(failure)] * 3), max_failures=2)


def test_losses_between_failures_neither_count_nor_clear_what_has_counted() -> None:
    trainers = Trainers(group(KILLED), group(NODE_DIED), group(KILLED), group(NODE_DIED), group(KILLED))
    with pytest.raises(TransientError):
        fit_to_the_end(trainers, max_failures=2)
    assert trainers.made == 5


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(group(DataError("the loss is not finite")), DataError), (ControllerError(ValueError("a bug")), TransientError)],
)
def test_fit_failure_that_a_retry_cannot_mend_is_raised_at_once(
    failure: TrainingFailedError, raised: type[FastfillError]
) -> None:
    trainers = Trainers(failure)
    with pytest.raises(raised):
        fit_to_the_end(trainers, max_failures=3)
    assert trainers.made == 1
