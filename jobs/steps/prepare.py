"""Everything that comes before the backfill, in order, each step only where it is not done yet.

    checks -> gallery, pairs (normalised) -> run.json -> probe set, pairs of the gallery (drawn)
    -> pairs, probe set (embedded) -> fit -> old embeddings -> plan

The cheap checks come first: nothing is embedded or fitted for a run whose gallery cannot be used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.shell.progress_bars import Bars

if TYPE_CHECKING:
    from pipeline.config.tree import Config
    from pipeline.models.transformation import TransformationInfo
    from pipeline.planning.plan import Plan
    from pipeline.run import Run


def open_run(config: Config, bars: Bars) -> Run:
    """Check the inputs and the settings, bring the manifests into our form, and start or resume the run.

    Before all else the store is tried out, also where the run is there: this machine may have other credentials
    than the one that started it. Commands that only read do not come through here, and need no right to write.

    Raises:
        ConfigError, DataError: an input cannot be used, or a run cannot live where it is to be.
        IncompatibleRun: the run was started with something else.
    """
    from jobs.steps.preflight import check_images, check_settings, check_widths
    from pipeline.config.identity import check_resumable, start, weight_fingerprints
    from pipeline.config.tree import sources, unit_images
    from pipeline.manifest import normalised
    from pipeline.planning.plan import read_plan
    from pipeline.run import Run
    from pipeline.storage.objects import check

    check(config.run)
    given = sources(config)
    fingerprints = weight_fingerprints(config) | {name: normalised.digest(source) for name, source in given.items()}
    check_resumable(config, fingerprints)
    run = Run(config.run)
    encoders = {"old_embedding": config.encoders.old, "new_embedding": config.encoders.new}
    dims = {role: encoder.dim for role, encoder in encoders.items() if encoder is not None}
    planned = read_plan(run) is not None
    if not planned:  # also of a run that is there: settings of the stages to come may have changed
        with bars.step("check the settings"):
            check_settings(config, dims)
    rows = {}
    for name, source in given.items():
        with bars.step(f"check the {name}"):
            rows[name] = normalised.normalise(run, name, source, dims, unit_images(config), config.data_root)
            if not planned:
                check_images(config, run, name, rows[name])
    check_widths(config, {name: item.dims for name, item in rows.items()})
    return start(config, fingerprints)


def ensure_embeddings(config: Config, run: Run, bars: Bars) -> None:
    """All embeddings that fit, plan and the probe set will need, in one stream; each of these would do its own part
    otherwise. Of a run that is planned already only the probe set can be missing."""
    from pipeline.embedding.precompute import embed_missing
    from pipeline.planning.plan import read_plan
    from training.fitting.pairs import pair_folders

    probe, pairs = _probe(config, run), pair_folders(config, run)
    embed_missing(config, run, probe if read_plan(run) is not None else [*pairs, "gallery", *probe], bars.images)


def ensure_probe(config: Config, run: Run, bars: Bars) -> None:
    """The probe set with its embeddings, and those of the pairs: what a fit looks at, and no more."""
    from pipeline.embedding.precompute import embed_missing
    from training.fitting.pairs import pair_folders

    embed_missing(config, run, [*_probe(config, run), *pair_folders(config, run)], bars.images)


def _probe(config: Config, run: Run) -> list[str]:
    """The probe set's folder where its embeddings are still asked for; it is drawn where it is not yet."""
    from pipeline.evaluation.probe_set import is_gathered
    from pipeline.run import PROBE_SET
    from pipeline.sampling.probe_draw import draw

    return [] if draw(config, run) is None or is_gathered(run) else [PROBE_SET]


def ensure_fit(config: Config, run: Run, bars: Bars) -> TransformationInfo:
    """The fitted transformation; pairs are embedded and the fit is run where it is missing.

    Raises:
        ConfigError, DataError: the pairs cannot be embedded, or do not suit the loss.
    """
    from pipeline.models.transformation import has_transformation, read_info
    from pipeline.reporting import telemetry
    from training.fit import fit
    from training.fitting.pairs import build_pairs, fit_data

    if has_transformation(run):
        return read_info(run)
    pairs = build_pairs(config, run, bars.images)

    def show(epoch: dict[str, float]) -> None:
        telemetry.observe_epoch(epoch)
        bars.images("fit: epochs", int(epoch["epoch"]) + 1, int(epoch["epochs"]), f"loss {epoch['loss']:.4f}")

    if config.fit.transformation != "auto" and config.fit.num_epochs:
        bars.images("fit: epochs", 0, config.fit.num_epochs)
    return fit(config, run, fit_data(config, run, pairs), show, bars.images, selection_seconds(config, run))


def selection_seconds(config: Config, run: Run) -> float:
    """The time for fits that are only tried: a tenth of what the backfill is estimated to take, and a minute at least.

    The estimate is by the rate at which the new encoder has embedded images of this run so far.
    """
    from pipeline.embedding import vector_log
    from pipeline.embedding.precompute import embedding_log
    from pipeline.manifest import normalised
    from pipeline.reporting.throughput import throughput
    from pipeline.run import GALLERY_PAIRS, PROBE_SET
    from training.select import LEAST_SECONDS

    gallery, moments = normalised.read_manifest(run, "gallery"), list[tuple[float, int]]()
    for folder in ("pairs", GALLERY_PAIRS, PROBE_SET):
        rows = normalised.read_manifest(run, folder)
        if rows is not None:
            images = {(unit.wave, unit.unit): unit.images for unit in normalised.units(run, folder, rows)}
            times = vector_log.part_times(embedding_log(config.encoders, run, folder, "new"))
            moments += [(seconds, images.get(unit, 0)) for unit, seconds in times.items()]
    rate = throughput(moments)
    if gallery is None or rate is None:
        return LEAST_SECONDS
    return max(LEAST_SECONDS, 0.1 * gallery.num_rows / rate.per_second)


def ensure_plan(config: Config, run: Run, bars: Bars) -> Plan:
    """The plan; old embeddings are computed and the gallery is scored where it is missing."""
    from pipeline.embedding.precompute import embed_missing
    from pipeline.planning.build import make_plan
    from pipeline.planning.plan import read_plan

    done = read_plan(run)
    if done is not None:
        return done
    embed_missing(config, run, ["gallery"], bars.images)
    with bars.step("plan") as step:
        return make_plan(config, run, on_step=step.say)
