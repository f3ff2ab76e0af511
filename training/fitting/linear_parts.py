"""A pass over the training pairs' parts for a linear fit: one Ray task per part, row group by row group.

Sums are added up in the order of the parts, so the number of workers changes nothing. A task holds one row group and
its sums; the driver holds the sums of a few parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import ray

from pipeline.arrays import Float32
from pipeline.storage import parquet
from training.fitting import linear
from training.fitting.learner import Job, columns_of, unsorted_arrays
from training.fitting.linear import Folds
from training.fitting.linear_fit import BlockSums, LinearFit, OnePass, inputs_of, out_of_fold, sampled

ROWS = 8192
"""Rows of a block; a task holds one block beside its row group."""


def over_parts(job: Job, on_part: Callable[[], None]) -> OnePass:
    """A pass over `job.data.train_parts`; `on_part` is called after each part."""

    def one_pass(function: BlockSums, share: float) -> Folds:
        stored = ray.put((job, function, share))
        task = ray.remote(num_cpus=1)(_part_sums)
        at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
        running = deque(task.remote(stored, uri) for uri in job.data.train_parts[:at_once])
        found: Folds | None = None
        for number in range(len(job.data.train_parts)):
            part: Folds | None = ray.get(running.popleft())  # in shared memory, so read-only
            found = linear.added(found, part) if found else part and [fold.copy() for fold in part]
            running.extend(task.remote(stored, uri) for uri in job.data.train_parts[number + at_once :][:1])
            on_part()
        assert found is not None, "checked before the fit: there are pairs"
        return found

    return one_pass


def out_of_fold_pairs(job: Job, fit: LinearFit, most: int) -> tuple[Float32, Float32]:
    """The first `most` training pairs, each transformed by the map of `fit` that was fitted without its fold.

    Returns:
        z (N, d_new), of length 1 with `job.normalize`, and new (N, d_new), both float32.
    """
    found: list[tuple[Float32, Float32]] = []
    for table in _blocks(job, most):
        pairs = unsorted_arrays(table, job)
        x_ni = inputs_of(pairs.old, pairs.side, job.normalize)
        z_no = out_of_fold(fit.without, linear.folds_of(table["index"].to_numpy()), x_ni)
        if job.normalize:
            z_no /= np.maximum(np.linalg.norm(z_no, axis=1, keepdims=True), np.float32(1e-12))
        found.append((z_no, pairs.new))
    return np.concatenate([z for z, _ in found]), np.concatenate([new for _, new in found])


def _blocks(job: Job, most: int) -> Iterator[pa.Table]:
    left = most
    for uri in job.data.train_parts:
        with parquet.open_parquet(uri) as file:
            for group in range(file.num_row_groups):
                if left <= 0:
                    return
                rows = file.read_row_group(group, columns=columns_of(job.data)).slice(0, min(left, ROWS))
                left -= rows.num_rows
                if rows.num_rows:
                    yield rows


def _part_sums(stored: tuple[Job, BlockSums, float], uri: str) -> Folds | None:
    job, function, share = stored
    found: Folds | None = None
    with parquet.open_parquet(uri) as file:
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
