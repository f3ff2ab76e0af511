"""Measure how fast this cluster fetches, decodes and embeds a sample of the gallery's own images.

Two measurements share the time: one task that does each step alone, and the real stream on real units. The vectors are
thrown away; the run is not changed. `backfill.estimate` computes the estimate from the rates.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray

from pipeline.backfill.estimate import Estimate, Rates, estimate
from pipeline.config.tree import Config, EncoderSettings, PreprocessSettings
from pipeline.embedding.actor_pool import Pool, actor_pool
from pipeline.embedding.decode import Limits, Pixels, decoder
from pipeline.embedding.fetch import Place, Reject
from pipeline.embedding.stream import StreamSettings, Work, embed_stream
from pipeline.embedding.vector_log import VectorLog
from pipeline.errors import DataError
from pipeline.planning.plan import Plan
from pipeline.reporting.throughput import Throughput
from pipeline.run import Run
from pipeline.schema import UNITS, Unit, UnitAck
from pipeline.storage import objects, parquet

if TYPE_CHECKING:
    import torch

_FOLDER = "tuning"
_UNITS = 64  # of the plan, for the sample
_BATCHES = (32, 64, 128, 256, 512, 1024, 2048)
_ALONE = 0.3  # share of the time for the steps alone


@dataclass(frozen=True, slots=True)
class _Setup:
    encoder: EncoderSettings
    stream: StreamSettings
    unit_images: int
    pool: Pool


@dataclass(frozen=True, slots=True)
class _Alone:
    fetch: float
    decode: float
    forward: dict[int, float]
    device: str


def profile(config: Config, run: Run, plan: Plan, seconds: float, on_time: Callable[[float, str], None]) -> Estimate:
    """Measure, estimate the whole backfill, and store the estimate with the plan.

    Args:
        seconds: to measure for, without the start of Ray's actors.
        on_time: called with the seconds spent and the name of the measurement.

    Raises:
        DataError: no image of the sample can be embedded.
        ConfigError: the cluster is too small for the stream, or the device for a batch.
    """
    pool = actor_pool(config.backfill, config.device)
    setup = _Setup(config.encoders.new, StreamSettings.of(config), config.unit_images, pool)
    rows = _sample(run, plan, config.seed)
    on_time(0.0, "each step alone")
    measure = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus)(_measure_alone)
    alone = ray.get(measure.remote(setup, rows[: _UNITS // 8], seconds * _ALONE))
    folder = run.path(_FOLDER, uuid.uuid4().hex)  # another command may measure at the same time
    try:
        rates = _measure_stream(setup, folder, rows, alone, seconds, on_time)
    finally:
        objects.delete(folder)
    room = actor_pool(config.backfill.model_copy(update={"max_actors": None}), config.device).first
    found = estimate(rates, plan.num_gallery - plan.num_from_pairs, plan.last_wave, room, config.telemetry)
    found = replace(found, made_unix_seconds=time.time())
    objects.put(run.estimate, json.dumps(found.to_json(), indent=1).encode())
    return found


def _sample(run: Run, plan: Plan, seed: int) -> list[pa.Table]:
    """Up to 64 random units of the plan, as rows in locality order."""
    units = sum(wave.units for wave in plan.waves)
    chosen = np.random.default_rng(seed).permutation(units)[:_UNITS]
    wanted = set(chosen.tolist())
    found = {number: unit for number, unit in enumerate(plan.units(run)) if number in wanted}
    places = [(found[number].rows_uri, found[number].row_group) for number in chosen]
    return [parquet.read_parquet(uri, UNITS.names, [row_group]) for uri, row_group in places]


def _measure_alone(setup: _Setup, rows: list[pa.Table], seconds: float) -> _Alone:
    from pipeline.embedding.embedder import Embedder
    from pipeline.embedding.fetch import fetch

    backfill, limits = setup.stream.backfill, setup.stream.limits
    embedder = Embedder(setup.encoder, setup.stream.device, backfill.batch_size, backfill.threads_per_actor)
    spent = {"fetch": 0.0, "decode": 0.0}
    count, good = 0, list[Pixels]()
    decode = _decoder(setup.encoder.preprocess, limits, embedder.device)
    deadline = time.perf_counter() + seconds / 2
    for table in rows:
        places = [Place(**row) for row in table.drop_columns(["id"]).to_pylist()]
        start = time.perf_counter()
        encoded = [data for data, _ in fetch(places, limits.max_bytes, setup.stream.fetch, limits.root)]
        spent["fetch"] += time.perf_counter() - start
        count += len(encoded)
        pixels, seconds_taken = decode([data for data in encoded if isinstance(data, bytes)])
        spent["decode"] += seconds_taken
        good += pixels
        if time.perf_counter() > deadline or count >= max(_BATCHES):
            break
    if not good:
        raise DataError(
            "no image of the sample can be embedded",
            expected="images that the new encoder can read",
            found=f"{count} rejects",
            where=f"{rows[0]['uri'][0]} and others of the plan",
        )
    sizes = batch_sizes(embedder.largest_batch(setup.unit_images))
    forward = embedder.rates(np.stack(good), sizes, seconds / 2)
    return _Alone(count / spent["fetch"], count / spent["decode"], forward, str(embedder.device))


def batch_sizes(largest: int) -> list[int]:
    """The batch sizes to measure: none larger than a unit."""
    return [size for size in _BATCHES if size <= largest] or [largest]


def _decoder(
    preprocess: PreprocessSettings, limits: Limits, device: torch.device
) -> Callable[[list[bytes]], tuple[list[Pixels], float]]:
    """The stream's decoder: gives the pixels of good images, and the seconds of a core or of the device."""
    if preprocess.decoder == "device":
        from pipeline.embedding.gpu_decode import DeviceDecoder

        on_device = DeviceDecoder(preprocess, limits, device)

        def decode_there(encoded: list[bytes]) -> tuple[list[Pixels], float]:
            start = time.perf_counter()
            pixels, rejects = on_device.decode(encoded)
            found: Pixels = pixels.cpu().numpy()  # waits for the device
            seconds = time.perf_counter() - start
            return [found[row] for row in range(len(encoded)) if row not in rejects], seconds

        return decode_there
    decode_one = decoder(preprocess, limits)

    def decode_here(encoded: list[bytes]) -> tuple[list[Pixels], float]:
        start, found = time.process_time(), []
        for data in encoded:
            with suppress(Reject):
                found.append(decode_one(data))
        return found, time.process_time() - start

    return decode_here


def _measure_stream(
    setup: _Setup,
    folder: str,
    rows: list[pa.Table],
    alone: _Alone,
    seconds: float,
    on_time: Callable[[float, str], None],
) -> Rates:
    """Send the sample through the real stream, in units small enough that many are done in the time."""
    size = max(setup.stream.backfill.batch_size, 256)
    pieces = [table.slice(start, size) for table in rows for start in range(0, table.num_rows, size)]
    units_uri = objects.join(folder, "units.parquet")
    objects.put(units_uri, parquet.parquet_bytes(UNITS, pieces))
    units = [Unit(1, number, units_uri, number, piece.num_rows) for number, piece in enumerate(pieces)]
    log = VectorLog(objects.join(folder, "parts"), objects.join(folder, "rejects"), setup.encoder.dim, 1)
    begin = time.perf_counter()
    acks: list[tuple[float, UnitAck]] = []
    with closing(_stream(Work(setup.encoder, log, units), setup.stream)) as stream:
        for ack in stream:
            now = time.perf_counter()
            acks.append((now, ack))
            working = now - acks[0][0]
            on_time(seconds * _ALONE + min(working, seconds * (1 - _ALONE)), "the stream")
            if working > seconds * (1 - _ALONE):
                break
    totals = {
        name: sum(getattr(ack, name) for _, ack in acks) for name in ("bytes_needed", "bytes_fetched", "requests")
    }
    images = sum(ack.embedded + ack.rejected for _, ack in acks)
    first = acks[0][1]
    cluster, pool = ray.cluster_resources(), setup.pool
    return Rates(
        images=images,
        bytes_per_image=totals["bytes_needed"] / images,
        bytes_fetched_per_image=totals["bytes_fetched"] / images,
        requests_per_image=totals["requests"] / images,
        fetch=alone.fetch,
        decode=alone.decode,
        forward=alone.forward,
        stream=_rate(acks, pool.first),
        start_seconds=max(0.0, acks[0][0] - begin - first.load_seconds - first.embed_seconds),
        actors=pool.first,
        cpus=cluster.get("CPU", 0.0),
        gpus=cluster.get("GPU", 0.0),
        nodes=sum(node["Alive"] for node in ray.nodes()),
        gpus_per_actor=pool.gpus,
        device=alone.device,
        decodes_on_device=setup.encoder.preprocess.decoder == "device",
    )


def _rate(acks: list[tuple[float, UnitAck]], actors: int) -> float:
    """Images per second after the actors' first round; if there is one unit only, by its own seconds."""
    images = [ack.embedded + ack.rejected for _, ack in acks]
    skipped = min(actors, len(acks) // 2)
    if not skipped:
        ack = acks[0][1]
        return images[0] / (ack.load_seconds + ack.embed_seconds + ack.write_seconds)
    return Throughput(sum(images[skipped:]), acks[-1][0] - acks[skipped - 1][0]).per_second


def _stream(work: Work, settings: StreamSettings) -> Generator[UnitAck, None, None]:
    yield from (ack for _, ack in embed_stream([work], settings))
