"""The steps before the backfill, in order; a step that is done already is skipped.

    checks -> gallery, pairs (normalised) -> run.json -> probe set, pairs of the gallery (drawn)
    -> pairs, probe set (embedded) -> fit -> old embeddings -> plan

Cheap checks come first: nothing is embedded or fitted for a gallery that cannot be used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.shell.progress_bars import Bars

if TYPE_CHECKING:
    from pipeline.config.tree import Config
    from pipeline.models.transformation import TransformationInfo
    from pipeline.planning.plan import Plan
    from pipeline.run import Run


def open_run(config: Config, bars: Bars) -> Run:
    """Check inputs and settings, normalise the manifests, and start or resume the run.

    The store is checked first, also for an existing run: this machine may have other credentials than the one that
    started it. Commands that only read do not call this, and need no permission to write.

    Raises:
        ConfigError, DataError: an input cannot be used, or the store of the run cannot.
        IncompatibleRun: the run was started with other settings or inputs.
    """
    from jobs.steps.preflight import check_images, check_settings, check_widths
    from pipeline.config.identity import check_resumable, start, weight_fingerprints
    from pipeline.manifest import normalised
    from pipeline.planning.plan import read_plan
    from pipeline.run import Run
    from pipeline.storage.objects import check

    check(config.run)
    given = config.sources
    fingerprints = weight_fingerprints(config) | {name: normalised.digest(source) for name, source in given.items()}
    check_resumable(config, fingerprints)
    run = Run(config.run)
    encoders = {"old_embedding": config.encoders.old, "new_embedding": config.encoders.new}
    dims = {role: encoder.dim for role, encoder in encoders.items() if encoder is not None}
    planned = read_plan(run) is not None
    if not planned:  # an existing run, too: settings of later stages may have changed
        with bars.step("check the settings"):
            check_settings(config, dims)
    rows = {}
    for name, source in given.items():
        with bars.step(f"check the {name}"):
            rows[name] = normalised.normalise(run, name, source, dims, config.unit_images, config.data_root)
            if not planned:
                check_images(config, run, name, rows[name])
    check_widths(given, {name: item.dims for name, item in rows.items()})
    return start(config, fingerprints)


@dataclass(frozen=True, slots=True)
class RunSteps:
    """The steps of a run that `open_run` has opened; each returns its stored result if it is done already."""

    config: Config
    run: Run
    bars: Bars

    def embed(self) -> None:
        """Compute the embeddings for fit, plan and probe set in one stream; each of these would compute its own.

        If the run is planned already, only the probe set can lack some.
        """
        from pipeline.planning.plan import read_plan

        probe, pairs = self._probe(), self._pairs()
        self._embed_missing(probe if read_plan(self.run) is not None else [*pairs, "gallery", *probe])

    def embed_for_fit(self) -> None:
        """Compute the embeddings of the pairs and the probe set, which a fit needs."""
        self._embed_missing([*self._probe(), *self._pairs()])

    def _embed_missing(self, folders: list[str]) -> None:
        from pipeline.embedding.precompute import embed_missing
        from pipeline.embedding.stream import StreamSettings

        embed_missing(self.run, folders, self.config.encoders, StreamSettings.of(self.config), self.bars.images)

    def _probe(self) -> list[str]:
        """The probe set's folder if its embeddings are still needed; the probe set is drawn if it is not yet."""
        from pipeline.evaluation.probe_set import is_gathered
        from pipeline.run import PROBE_SET
        from pipeline.sampling.probe_draw import draw

        drawn = draw(self.run, self.config.gallery, self.config.pairs, self.config.probe)
        return [] if drawn is None or is_gathered(self.run) else [PROBE_SET]

    def _pairs(self) -> list[str]:
        """The folders of the pairs; the gallery's pairs are drawn if they are not yet."""
        from training.fitting.pairs import pair_folders

        return pair_folders(self.run, self.config.gallery, self.config.pairs, self.config.probe)

    def fit(self) -> TransformationInfo:
        """Embed the pairs and fit the transformation.

        Raises:
            ConfigError, DataError: the pairs cannot be embedded, or do not suit the loss.
        """
        from pipeline.models.transformation import has_transformation, read_info
        from pipeline.reporting import telemetry
        from training.fit import fit
        from training.fitting.pairs import build_pairs, fit_data

        config, run, bars = self.config, self.run, self.bars
        if has_transformation(run):
            return read_info(run)
        pairs = build_pairs(config, run, bars.images)

        def show(epoch: dict[str, float]) -> None:
            telemetry.observe_epoch(epoch)
            bars.images("fit: epochs", int(epoch["epoch"]) + 1, int(epoch["epochs"]), f"loss {epoch['loss']:.4f}")

        if config.fit.transformation != "auto" and config.fit.num_epochs:
            bars.images("fit: epochs", 0, config.fit.num_epochs)
        return fit(config, run, fit_data(config.fit, run, pairs), show, bars.images, self._selection_seconds())

    def _selection_seconds(self) -> float:
        """The time for trial fits: a tenth of the backfill's estimated duration, and at least a minute.

        The estimate uses the rate at which the new encoder has embedded images of this run so far.
        """
        from pipeline.embedding import vector_log
        from pipeline.embedding.precompute import embedding_log
        from pipeline.manifest import normalised
        from pipeline.reporting.throughput import throughput
        from pipeline.run import GALLERY_PAIRS, PROBE_SET
        from training.select import LEAST_SECONDS

        run = self.run
        gallery, moments = normalised.read_manifest(run, "gallery"), list[tuple[float, int]]()
        for folder in ("pairs", GALLERY_PAIRS, PROBE_SET):
            rows = normalised.read_manifest(run, folder)
            if rows is not None:
                images = {(unit.wave, unit.unit): unit.images for unit in normalised.units(run, folder, rows)}
                times = vector_log.part_times(embedding_log(self.config.encoders, run, folder, "new"))
                moments += [(seconds, images.get(unit, 0)) for unit, seconds in times.items()]
        rate = throughput(moments)
        if gallery is None or rate is None:
            return LEAST_SECONDS
        return max(LEAST_SECONDS, 0.1 * gallery.num_rows / rate.per_second)

    def plan(self) -> Plan:
        """Compute the gallery's old embeddings, score the gallery and cut it into waves."""
        from pipeline.planning.build import make_plan
        from pipeline.planning.plan import read_plan

        done = read_plan(self.run)
        if done is not None:
            return done
        self._embed_missing(["gallery"])
        with self.bars.step("plan") as step:
            return make_plan(self.config, self.run, on_step=step.say)
