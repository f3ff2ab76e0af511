"""What a whole run on disk has besides its index: settings, manifest, transformation, plan and units."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.config.identity import STAGES
from pipeline.manifest.normalised import Manifest
from pipeline.models import calibration
from pipeline.models.networks import TransformationNetwork
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.planning.plan import Plan, Wave
from pipeline.run import Run
from pipeline.schema import UNITS, manifest_schema
from pipeline.storage import documents, objects, parquet

if TYPE_CHECKING:
    from tests.support.whole_run import WholeRun

D_OLD = 4


def write_other_inputs(whole: WholeRun, num_units: int, dim: int) -> None:
    """All of them; a unit of the plan holds the images that `WholeRun.write_log` writes into its part."""
    objects.put(whole.run.settings, documents.encode({"config": {}, "fingerprints": {}}))
    for stage in STAGES.values():
        objects.put(whole.run.path(stage.settings), documents.encode({}))
    network = TransformationNetwork(D_OLD, dim, inner_width=8)
    info = TransformationInfo(D_OLD, dim, None, 8, False, "alignment", 0, 1, 10, 2, True)
    parts = {"offset.safetensors": b"any bytes"}
    parts |= {} if whole.calibration is None else {calibration.PART: whole.calibration.to_bytes()}
    save_transformation(whole.run, network, info, parts)
    sizes = [int((whole.waves == wave).sum()) for wave in range(1, whole.num_waves + 1)]
    waves = tuple(Wave(number, size, num_units) for number, size in enumerate(sizes, 1))
    plan = Plan("random", 0, whole.num, 2, whole.num_shards, dim, max(sizes), waves, "synthetic")
    for wave in range(1, whole.num_waves + 1):
        units = np.arange(whole.num) // whole.num_waves % num_units
        ids = [whole.ids[(whole.waves == wave) & (units == unit)] for unit in range(num_units)]
        tables = (_rows(UNITS, group.tolist()) for group in ids)
        objects.put(whole.run.wave_units(wave, 0), parquet.parquet_bytes(UNITS, tables))
    objects.put(whole.run.plan, documents.encode(plan))
    for part in range(2):
        mine = np.arange(whole.num) // 2 % 2 == part
        write_manifest_part(whole.run, part, whole.ids[mine].tolist())


def write_manifest_part(run: Run, part: int, ids: list[int], keys: list[str] | None = None) -> None:
    """A part of the gallery's manifest, with the users' own keys if there are any, and the manifest that names it."""
    rows = _rows(manifest_schema({}), ids)
    if keys is not None:
        rows = rows.set_column(rows.schema.get_field_index("key"), "key", pa.array(keys, pa.string()))
    data = parquet.parquet_bytes(manifest_schema({}), [rows])
    objects.put(run.part("gallery", part), data)
    where = run.path("gallery", "manifest.json")
    counts, parts = [0] * (part + 1), [""] * (part + 1)
    if objects.exists(where):
        before = documents.parse(Manifest, objects.read_bytes(where), where)
        counts[: len(before.rows)], parts[: len(before.rows)] = before.rows, before.parts
    counts[part], parts[part] = len(ids), hashlib.sha256(data).hexdigest()
    found = Manifest(counts, max(counts), {"old_embedding": D_OLD}, "digest", parts=tuple(parts))
    objects.put(where, documents.encode(found))


def _rows(schema: pa.Schema, ids: list[int]) -> pa.Table:
    nothing = {field.name: pa.nulls(len(ids), field.type) for field in schema}
    return pa.table(nothing | {"id": pa.array(ids, pa.int64())}).select(schema.names)
