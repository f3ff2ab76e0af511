"""A planned run before its first commit, and an encoder whose vectors are known: whole backfills without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from pipeline.arrays import Float32, Int64, vectors_to_arrow
from pipeline.backfill import driver
from pipeline.backfill.stop import Stop
from pipeline.config.identity import fix_settings, stage_settings
from pipeline.config.method import GateSettings
from pipeline.config.tree import Config
from pipeline.embedding import vector_log
from pipeline.embedding.precompute import embedding_log
from pipeline.embedding.stream import StreamSettings, Work
from pipeline.embedding.vector_log import EmbeddedUnit
from pipeline.index import commits, seal
from pipeline.index.codebook import Codebook
from pipeline.index.segment import Segment, decode_segment
from pipeline.manifest import normalised
from pipeline.models.networks import TransformationNetwork
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.planning import build, policy_inputs
from pipeline.planning.plan import Plan
from pipeline.planning.policy_inputs import HeldOutPairs, build_policy_inputs
from pipeline.reporting.progress import Progress
from pipeline.run import GALLERY_PAIRS, Run
from pipeline.schema import UnitAck
from pipeline.storage import objects, parquet
from tests.support.in_process import plan_in_process
from tests.support.sample import draw_pairs, draw_probe
from tests.support.synthetic_run import Known, Options, known, make_run

WAVES = 5
REJECTED = 23  # of the ids, one in so many
_PAIRS = 60


@dataclass
class Encoder:
    """The new encoder's answers, and how often each image was asked for."""

    images: Known
    asked: dict[int, int] = field(default_factory=dict)

    def stream(self, work: list[Work], settings: StreamSettings) -> Iterator[tuple[int, UnitAck]]:
        """As `embed_stream`, unit by unit."""
        rows = {id: row for row, id in enumerate(self.images.ids.tolist())}
        for unit in work[0].units:
            ids: Int64 = parquet.read_parquet(unit.rows_uri, ["id"], [unit.row_group])["id"].to_numpy()
            stages = pa.array(["decode" if id % REJECTED == 0 else "" for id in ids.tolist()])
            vectors = self.images.embedded[[rows[id] for id in ids.tolist()]]
            embedded = EmbeddedUnit(ids, vectors, pa.nulls(len(ids), pa.string()), stages, stages)
            size, rejected, digest = vector_log.write_unit(work[0].log, unit, embedded)
            self.asked |= {id: self.asked.get(id, 0) + 1 for id in ids.tolist()}
            counts = (len(ids) - rejected, rejected, size)
            yield 0, UnitAck(unit.wave, unit.unit, *counts, 0.0, 0.0, 0.0, part_digest=digest)


@dataclass(frozen=True)
class Scene:
    """A run with its plan, and what embeds its images."""

    config: Config
    run: Run
    plan: Plan
    encoder: Encoder

    def go_on(self, look: Callable[[], None] = lambda: None, stop: Stop | None = None) -> Progress:
        """The driver, started or started again; it calls `look` after every unit."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "embed_stream", self.encoder.stream)
            return driver.backfill(self.config, self.run, self.plan, lambda _: look(), stop)


def backfill_in_process(patch: pytest.MonkeyPatch) -> None:
    """Plan and seal in this process and thread."""
    plan_in_process(patch)
    patch.setattr(seal, "_run", lambda function, tasks: [function(*arguments) for _, arguments in tasks])


def begin(folder: Path, from_gallery: int = 0, given: bool = True) -> Scene:
    """Plan the run; its transformation was never fitted.

    Args:
        folder: of the run.
        from_gallery: images that are embedded before the plan, as pairs.
        given: new embeddings came with the gallery; else the encoder embeds these images, and there is no probe set.
    """
    images = known(420)
    options = Options(WAVES, embedded_waves=0, commits=False, transformation=False, new_in_manifest=given)
    config, run = make_run(folder, images, options)
    sampled = config.pairs.model_copy(update={"from_gallery": from_gallery})
    probe = config.probe.model_copy(update={"images": config.probe.images if given else 0})
    config = config.model_copy(update={"pairs": sampled, "probe": probe})
    index = config.index.model_copy(update={"factory": "Flat", "shards": options.shards})
    gate = GateSettings(min_slot_share=None, max_slot_share=None, max_fall=100)
    config = config.model_copy(update={"index": index, "gate": gate, "device": "cpu"})
    pairs = pa.table({"new": vectors_to_arrow(images.embedded[:_PAIRS])})
    objects.put(run.part("pairs/train", 0), parquet.parquet_bytes(pairs.schema, [pairs]))
    _write_transformation(config, run, images)
    objects.delete(run.plan)
    encoder, sample = Encoder(images), draw_pairs(config, run)
    if sample is not None and not given:
        log = embedding_log(config.encoders, run, GALLERY_PAIRS, "new")
        work = Work(config.encoders.new, log, normalised.units(run, GALLERY_PAIRS, sample))
        assert len(list(encoder.stream([work], StreamSettings.of(config)))) == len(work.units)
    plan = build.make_plan(config, run)
    assert (draw_probe(config, run) is not None) == given
    return Scene(config, run, plan, encoder)


def _write_transformation(config: Config, run: Run, images: Known) -> None:
    torch.manual_seed(0)
    widths = images.old.shape[1], images.embedded.shape[1]
    info = TransformationInfo(*widths, None, 16, False, "alignment", 0, 1, _PAIRS, _PAIRS, True)
    held_out = HeldOutPairs(images.old, images.transformed, images.uncertainty, images.embedded)
    known_pairs = build_policy_inputs(held_out, None, "l2", 0)
    fix_settings(run, "fit", stage_settings(config, "fit"))
    network = TransformationNetwork(*widths, 16).eval()
    save_transformation(run, network, info, {policy_inputs.PART: known_pairs.to_bytes()})


def served_vectors(run: Run, number: int) -> dict[int, Float32]:
    """What a commit serves, by id."""
    commit = commits.read_commit(run, number)
    codebook = Codebook.open(run, commit.codebook_path, commit.codebook_sha256)
    found: dict[int, Float32] = {}
    for ref in commit.segments:
        ids, values = decode_segment(codebook, Segment.open(run, codebook, ref))
        assert not found.keys() & set(ids.tolist())
        found |= dict(zip(ids.tolist(), values, strict=True))
    return found
