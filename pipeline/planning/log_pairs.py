"""Wave 0: write the images that were embedded for the fit into the vector log, before the stream starts.

gallery-pairs/new -> embedded/wave-000/unit-*, as the stream would have written them
"""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa

from pipeline import parallel
from pipeline.arrays import Int64
from pipeline.embedding import vector_log
from pipeline.embedding.vector_log import EmbeddedUnit, VectorLog
from pipeline.planning.plan import FROM_PAIRS, Plan
from pipeline.run import Run
from pipeline.sampling import pair_sample
from pipeline.schema import Unit, UnitAck
from pipeline.storage import parquet


def write(run: Run, plan: Plan) -> list[UnitAck]:
    """Write the missing units of wave 0 and return their acknowledgements; safe to repeat, and with two drivers.

    Raises:
        DataError: an embedding of the pairs is missing or damaged.
    """
    if not plan.num_from_pairs:
        return []
    log = plan.log(run)
    done = vector_log.part_files(log.parts_uri, FROM_PAIRS)
    units = [unit for unit in plan.units_of(run, FROM_PAIRS) if (unit.wave, unit.unit) not in done]
    return list(parallel.each(_write_unit, (run, log), units, sum(unit.images for unit in units)))


def _write_unit(run: Run, log: VectorLog, unit: Unit) -> UnitAck:
    start = time.perf_counter()
    ids: Int64 = parquet.read_parquet(unit.rows_uri, ["id"], [unit.row_group])["id"].to_numpy()
    vectors, etags = pair_sample.read_new(run, ids)
    good = pa.array(np.full(len(ids), ""), pa.string())
    size, rejected, digest = vector_log.write_unit(log, unit, EmbeddedUnit(ids, vectors, etags, good, good))
    seconds = time.perf_counter() - start
    return UnitAck(unit.wave, unit.unit, len(ids) - rejected, rejected, size, 0.0, 0.0, seconds, part_digest=digest)
