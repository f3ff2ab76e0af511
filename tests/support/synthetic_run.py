"""A run's files, written without running it: known embeddings in, the layout of DESIGN section 3 out.

It stands in for fit, plan and backfill, which need minutes and Ray; what it writes goes through the
same schemas, plan cuts, segments and commits as theirs.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.arrays import Float32, Int64, vectors_to_arrow
from pipeline.config.load import validate
from pipeline.config.tree import Config, GallerySettings, IndexSettings
from pipeline.evaluation.simulated_curve import order_by_priority
from pipeline.hashing import shard_of
from pipeline.index import codebook as codebooks
from pipeline.index import commits, segment, segment_files, tags, train_codebook
from pipeline.index.writer import Writer
from pipeline.manifest.normalised import Manifest
from pipeline.models import calibration as calibrations
from pipeline.models.calibration import Calibration
from pipeline.models.networks import TransformationNetwork
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.planning.plan import Plan, Wave, wave_sizes
from pipeline.run import Run
from pipeline.schema import embedded_schema, manifest_schema, transformed_schema
from pipeline.storage import documents, objects, parquet
from tests.support.whole_run import put_rejects

CONTAINER = "/data/images.parquet#image"


@dataclass(frozen=True)
class Known:
    """The embeddings that a synthetic run is made of; row i is one image."""

    ids: Int64
    labels: list[str] | None
    groups: list[str] | None
    old: Float32
    transformed: Float32
    embedded: Float32
    uncertainty: Float32


def known(num: int = 300, num_labels: int = 12, seed: int = 0) -> Known:
    """Random clusters: the old space is poor, the transformed one better, the embedded one good."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_labels, num)
    embedded = rng.normal(size=(num_labels, 16))[labels] + 1.5 * rng.normal(size=(num, 16))
    noise = rng.uniform(0.1, 2.0, (num, 1))
    transformed = embedded + noise * rng.normal(size=(num, 16))
    old = embedded[:, :8] + 2 * rng.normal(size=(num, 8))
    return Known(
        ids=rng.permutation(10 * num)[:num].astype(np.int64),
        labels=[f"label {label}" for label in labels],
        groups=[f"group {label % 3}" for label in labels],
        old=old.astype(np.float32),
        transformed=transformed.astype(np.float32),
        embedded=embedded.astype(np.float32),
        uncertainty=(np.log(noise[:, 0]) + 0.3 * rng.normal(size=num)).astype(np.float32),
    )


@dataclass(frozen=True)
class Options:
    """What the run is like; `embedded_waves` None means all of them, `rejects` are spread over the gallery.

    The segments of `swapped_wave` hold each image's embedded vector under the id of another image of the wave;
    `imprecision` is by how much of itself each number of an embedded vector in the segments is off. With `keys` the
    user's ids are strings, `image <id>`.
    """

    waves: int = 4
    shards: int = 2
    unit_images: int = 40
    embedded_waves: int | None = None
    rejects: int = 0
    old_in_log: bool = False
    new_in_manifest: bool = False
    policy: str = "uncertainty"
    metric: str = "l2"
    factory: str = "Flat"
    nprobe: int = 1
    commits: bool = True
    transformation: bool = True
    seconds_per_unit: float = 2.0
    swapped_wave: int | None = None
    imprecision: float = 0.0
    keys: bool = False
    calibration: Calibration | None = None


@dataclass(frozen=True)
class _Layout:
    """Where each image goes: its wave (N,) from 1, and whether it is rejected (N,)."""

    run: Run
    images: Known
    options: Options
    waves: Int64
    rejected: np.ndarray

    @property
    def done(self) -> int:
        """The last wave that is embedded."""
        return self.options.waves if self.options.embedded_waves is None else self.options.embedded_waves


def make_run(folder: Path, images: Known, options: Options | None = None) -> tuple[Config, Run]:
    """Write a run below `folder`; gives the config it was made with."""
    options = options or Options()
    config = _config(folder, images, options)
    run = Run(config.run)
    settings = {"format_version": 1, "config": config.model_dump(mode="json"), "fingerprints": {}}
    objects.put(run.settings, json.dumps(settings).encode())
    rejected = np.isin(np.arange(len(images.ids)), np.arange(options.rejects) * 7)
    layout = _Layout(run, images, options, _waves(images, options, config.seed), rejected)
    _write_gallery(layout)
    for wave in range(1, layout.done + 1):
        _write_wave(layout, wave)
    _write_plan(layout)
    if options.transformation:
        _write_transformation(run, images, options.calibration)
    if options.commits:
        _publish(layout)
    return config, run


def _config(folder: Path, images: Known, options: Options) -> Config:
    tree = {
        "run": str(folder),
        "encoders": {"new": {"function": "my:encoder", "dim": images.embedded.shape[1], "preprocess": {"size": 32}}},
        "gallery": {"manifest": "gallery.parquet", "metric": options.metric, "columns": {"label": "label"}},
        "pairs": {"manifest": "pairs.parquet", "columns": {}},
        "plan": {"policy": options.policy, "waves": options.waves, "unit_images": options.unit_images},
        "evaluate": {"points": 6, "random_seeds": 2},
    }
    return validate(tree, "synthetic run")


def _waves(images: Known, options: Options, seed: int) -> Int64:
    """(N,) the wave of each image, from 1."""
    priority = _priority(images, options)
    sizes = wave_sizes(options.waves, len(images.ids))
    waves = np.empty(len(images.ids), np.int64)
    waves[order_by_priority(priority, images.ids, seed)] = np.repeat(np.arange(1, options.waves + 1), sizes)
    return waves


def _priority(images: Known, options: Options) -> Float32:
    return images.uncertainty if options.policy == "uncertainty" else images.old[:, 0]


def _location(num: int) -> dict[str, pa.Array]:
    nothing = pa.nulls(num, pa.int64())
    return {
        "uri": pa.array([CONTAINER] * num),
        "offset": nothing,
        "length": nothing,
        "row": pa.array(np.arange(num)),
        "etag": pa.nulls(num, pa.string()),
    }


def _write_gallery(layout: _Layout) -> None:
    """Two parts of the manifest and of the scored gallery, in another order than the ids."""
    run, images, options = layout.run, layout.images, layout.options
    num = len(images.ids)
    names = {
        "label": pa.array(images.labels or [None] * num, pa.string()),
        "group": pa.array(images.groups or [None] * num, pa.string()),
    }
    keys = pa.array([f"image {image}" if options.keys else None for image in images.ids], pa.string())
    place = {"id": images.ids, "key": keys, **_location(num), **names}
    dims = {} if options.old_in_log else {"old_embedding": images.old.shape[1]}
    dims |= {"new_embedding": images.embedded.shape[1]} if options.new_in_manifest else {}
    embeddings = {"old_embedding": images.old, "new_embedding": images.embedded}
    manifest = pa.table({**place, **{name: vectors_to_arrow(values) for name, values in embeddings.items()}})
    scored = pa.table(
        {
            **{name: column for name, column in place.items() if name != "key"},
            "wave": pa.array(layout.waves, pa.int32()),
            "shard": shard_of(images.ids, options.shards),
            "priority": _priority(images, options),
            "uncertainty": images.uncertainty,
            "vector": vectors_to_arrow(images.transformed),
        }
    )
    described = Manifest([num // 2, num - num // 2], options.unit_images, dims, "synthetic")
    objects.put(run.path("gallery", "manifest.json"), json.dumps(asdict(described)).encode())
    halves = [slice(0, num // 2), slice(num // 2, num)]
    for part, half in enumerate(halves):
        rows = np.arange(num)[half]
        data = parquet.parquet_bytes(manifest_schema(dims), [manifest.take(rows)])
        objects.put(run.part("gallery", part), data)
        shuffled = rows[::-1].copy()
        schema = transformed_schema(images.transformed.shape[1])
        cells = [(wave, shard) for wave in range(1, options.waves + 1) for shard in range(options.shards)]
        place_of = np.stack([layout.waves[shuffled], shard_of(images.ids[shuffled], options.shards)], axis=1)
        groups = (scored.take(shuffled[(place_of == cell).all(axis=1)]) for cell in cells)
        objects.put(run.part("transformed", part), parquet.parquet_bytes(schema, groups))
        if options.old_in_log:
            old = _log_rows(images.ids[half], images.old[half], options.shards)
            objects.put(run.path("gallery", "old", f"wave-{part:03d}", "unit-00000.parquet"), old)


def _log_rows(ids: Int64, vectors: Float32, shards: int, schema: pa.Schema | None = None) -> bytes:
    columns = {"id": ids, "shard": shard_of(ids, shards), "source_etag": pa.nulls(len(ids), pa.string())}
    table = pa.table({**columns, "vector": vectors_to_arrow(vectors)})
    return parquet.parquet_bytes(schema or embedded_schema(vectors.shape[1]), [table])


def _write_wave(layout: _Layout, wave: int) -> None:
    """The units of a wave, as if one became durable every `seconds_per_unit`."""
    run, images, options, rejected = layout.run, layout.images, layout.options, layout.rejected
    rows = np.flatnonzero(layout.waves == wave)
    before = sum(-(-int((layout.waves == earlier).sum()) // options.unit_images) for earlier in range(1, wave))
    for unit, start in enumerate(range(0, len(rows), options.unit_images)):
        members = rows[start : start + options.unit_images]
        name = f"unit-{unit:05d}.parquet"
        good, bad = members[~rejected[members]], members[rejected[members]]
        uri = run.path("embedded", f"wave-{wave:03d}", name)
        schema = embedded_schema(images.embedded.shape[1])
        if len(bad):
            reasons = {"stage": ["decode"] * len(bad), "reason": ["truncated: 812 of 2,048 bytes"] * len(bad)}
            table = pa.table({"id": images.ids[bad], **_location(len(bad)), **reasons})
            schema = put_rejects(run.path("rejects"), wave, unit, table, schema)
        objects.put(uri, _log_rows(images.ids[good], images.embedded[good], options.shards, schema))
        moment = 1_700_000_000 + (before + unit) * options.seconds_per_unit
        os.utime(uri, (moment, moment))


def _write_plan(layout: _Layout) -> None:
    images, options = layout.images, layout.options
    sizes = wave_sizes(options.waves, len(images.ids))
    plan = Plan(
        policy=options.policy,
        seed=0,
        num_gallery=len(images.ids),
        num_parts=2,
        num_shards=options.shards,
        dim=images.transformed.shape[1],
        unit_images=options.unit_images,
        waves=tuple(Wave(wave + 1, size, -(-size // options.unit_images)) for wave, size in enumerate(sizes)),
        fingerprint="synthetic",
    )
    objects.put(layout.run.plan, json.dumps(asdict(plan)).encode())


def _write_transformation(run: Run, images: Known, calibration: Calibration | None) -> None:
    figures = {"top1": 41.2, "top5": 70.9, "map": 22.1}
    info = TransformationInfo(
        d_old=images.old.shape[1],
        d_new=images.embedded.shape[1],
        d_side=None,
        inner_width=512,
        normalize=False,
        loss="alignment+uncertainty",
        seed=0,
        epochs=80,
        num_train=45_000,
        num_held_out=5_000,
        better_than_old=True,
        held_out={
            "alignment": 0.193,
            "spearman": 0.61,
            "transformed": figures,
            "old_old": {"top1": 28.3, "top5": 55.0, "map": 12.9},
            "new_new": {"top1": 52.6, "top5": 75.8, "map": 30.2},
        },
    )
    if calibration is None:
        objects.put(objects.join(run.transformation, "transformation.json"), documents.encode(info))
    else:
        network = TransformationNetwork(info.d_old, info.d_new, info.inner_width)
        save_transformation(run, network, info, {calibrations.PART: calibration.to_bytes()})


def _publish(layout: _Layout) -> None:
    """Commits 0..done with real segments, the last one in `prod`."""
    run, images, options = layout.run, layout.images, layout.options
    metric = GallerySettings.model_validate({"manifest": "x", "metric": options.metric, "columns": {}}).metric
    settings = IndexSettings(factory=options.factory, shards=options.shards)
    data = train_codebook.train_codebook(images.embedded, settings, metric, len(images.ids), device="cpu", seed=0)
    path, sha256 = train_codebook.write_codebook(run, data)
    codebook = codebooks.Codebook.open(run, path, sha256)
    writer = Writer.acquire(run)
    cells = [(wave, shard) for wave in range(1, options.waves + 1) for shard in range(options.shards)]
    for number in range(layout.done + 1):
        refs = tuple(ref for wave, shard in cells for ref in _segments(layout, codebook, number, wave, shard))
        commit = commits.Commit(
            number=number,
            parent=number - 1 if number else None,
            codebook_path=path,
            codebook_sha256=sha256,
            metric=metric,
            nprobe=options.nprobe,
            dim=images.embedded.shape[1],
            num_waves=options.waves,
            num_shards=options.shards,
            segments=refs,
            counts=commits.SegmentCounts.of(refs),
            calibration=options.calibration,
        )
        writer.publish(commit)
        tags.auto_promote(run, number)


def _segments(
    layout: _Layout, codebook: codebooks.Codebook, number: int, wave: int, shard: int
) -> list[segment_files.SegmentRef]:
    """Of a (shard, wave): one, and one for its rejects if the wave is embedded and has some."""
    images = layout.images
    rows = np.flatnonzero((layout.waves == wave) & (shard_of(images.ids, layout.options.shards) == shard))
    is_embedded = ~layout.rejected[rows] & (wave <= number)
    noise = np.random.default_rng((wave, shard)).normal(size=(len(rows), images.embedded.shape[1]))
    embedded = images.embedded[rows] * (1 + layout.options.imprecision * noise.astype(np.float32))
    if wave == layout.options.swapped_wave:
        embedded = np.roll(embedded, 1, axis=0)
    members = segment_files.Rows(
        ids=images.ids[rows],
        vectors=np.where(is_embedded[:, None], embedded, images.transformed[rows]),
        kinds=np.where(is_embedded, "embedded", "transformed"),
        uncertainties=images.uncertainty[rows],
        groups=pa.array([images.groups[row] if images.groups else None for row in rows], pa.string()),
    )
    where = (layout.run, codebook)
    if wave > number:
        return [segment.write_segment(*where, members, shard, wave, "transformed")]
    refs = [segment.write_segment(*where, members.take(is_embedded), shard, wave, "embedded")]
    if not is_embedded.all():
        left = segment.write_segment(*where, members.take(~is_embedded), shard, wave, "transformed")
        refs.append(replace(left, rejected=left.vectors))
    return refs


def storage_waves(run: Run) -> np.ndarray[Any, Any]:
    """The wave of each image, by ascending id."""
    tables = [parquet.read_parquet(uri, ["id", "wave"]) for uri in objects.list_files(run.path("transformed"))]
    ids, waves = (np.concatenate([table[name].to_numpy() for table in tables]) for name in ("id", "wave"))
    return np.asarray(waves[np.argsort(ids)])
