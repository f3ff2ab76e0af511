"""A pass over the parts of the training pairs for a linear fit: one task of Ray per part, row group by row group.

Guarantee: what the tasks give is added up in the order of the parts, so the number of workers changes nothing. A task
holds one row group and the sums; the driver holds the sums of a few parts. It does not know what is summed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pyarrow as pa
import ray

from pipeline import storage
from training import linear
from training.learner import Job, columns_of, unsorted_arrays
from training.linear import Folds
from training.linear_fit import BlockSums, OnePass, inputs_of, sampled

ROWS = 16_384
"""Rows that are in memory at a time, beside the row group that they come from."""


def over_parts(job: Job, on_part: Callable[[], None]) -> OnePass:
    """A pass over `job.data.train_parts`.

    Args:
        job: whose `data` and `normalize` count.
        on_part: called after each part.
    """

    def one_pass(function: BlockSums, share: float) -> Folds:
        stored = ray.put((job, function, share))
        task = ray.remote(num_cpus=1)(_part_sums)
        at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
        running = deque(task.remote(stored, uri) for uri in job.data.train_parts[:at_once])
        found: Folds | None = None
        for number in range(len(job.data.train_parts)):
            part: Folds | None = ray.get(running.popleft())  # in shared memory: not to be added to
            found = linear.added(found, part) if found else part and [fold.copy() for fold in part]
            running.extend(task.remote(stored, uri) for uri in job.data.train_parts[number + at_once :][:1])
            on_part()
        assert found is not None, "checked before the fit: there are pairs"
        return found

    return one_pass


def _part_sums(stored: tuple[Job, BlockSums, float], uri: str) -> Folds | None:
    """The sums of a part's pairs; None if there are none in it."""
    job, function, share = stored
    found: Folds | None = None
    with storage.open_parquet(uri) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns_of(job.data))
            if share < 1:
                table = table.filter(pa.array(sampled(table["index"].to_numpy(), share)))
            for start in range(0, table.num_rows, ROWS):
                rows = table.slice(start, ROWS)
                pairs = unsorted_arrays(rows, job)
                x_ni = inputs_of(pairs.old, pairs.side, job.normalize)
                found = linear.added(found, function(rows["index"].to_numpy(), x_ni, pairs.new))
    return found
