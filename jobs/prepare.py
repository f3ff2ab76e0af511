"""Everything that comes before the backfill, in order, each step only where it is not done yet.

    check inputs -> gallery, pairs (normalised) -> run.json -> pairs (embedded) -> fit -> old embeddings -> plan

The cheap checks come first: nothing is embedded or fitted for a run whose gallery cannot be used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.bars import Bars

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.plan import Plan
    from pipeline.run import Run
    from pipeline.transformation import TransformationInfo


def open_run(config: Config, bars: Bars) -> Run:
    """Check the inputs and the settings, bring the manifests into our form, and start or resume the run.

    Before all else the store is tried out, also where the run is there: this machine may have other credentials
    than the one that started it. Commands that only read do not come through here, and need no right to write.

    Raises:
        ConfigError, DataError: an input cannot be used, or a run cannot live where it is to be.
        IncompatibleRun: the run was started with something else.
    """
    from pipeline import manifest
    from pipeline.config import unit_images
    from pipeline.run import Run, check_resumable, start, weight_fingerprints
    from pipeline.storage import check, exists

    check(config.run)
    sources = {"gallery": config.gallery, "pairs": config.pairs}
    fingerprints = weight_fingerprints(config) | {name: manifest.digest(source) for name, source in sources.items()}
    check_resumable(config, fingerprints)
    run = Run(config.run)
    encoders = {"old_embedding": config.encoders.old, "new_embedding": config.encoders.new}
    dims = {role: encoder.dim for role, encoder in encoders.items() if encoder is not None}
    if not exists(run.settings):
        with bars.step("check the settings"):
            check_settings(config, dims)
    for name, source in sources.items():
        with bars.step(f"check the {name}"):
            manifest.normalise(run, name, source, dims, unit_images(config))
    return start(config, fingerprints)


def check_settings(config: Config, dims: dict[str, int]) -> None:
    """Try out what a run will need, on nothing: the columns, the waves, the index, the policy, the encoders.

    Raises:
        ConfigError, DataError: one of them cannot be used.
    """
    from pipeline import manifest
    from pipeline.codebook import resolve_factory
    from pipeline.encoders import load_encoder
    from pipeline.plan import wave_sizes
    from pipeline.policy import load_policy
    from pipeline.transformation import resolve_device

    _check_sources(config)
    rows = sum(part.num_rows for part in manifest.scan(config.gallery, dims))
    manifest.scan(config.pairs, dims)
    wave_sizes(config.plan.waves, rows)
    resolve_factory(config.index.factory, rows, dim=config.encoders.new.dim)
    load_policy(config.plan.policy, config.seed)
    resolve_device(config.device)
    for encoder in (config.encoders.old, config.encoders.new):
        if encoder is not None:
            load_encoder(encoder, resolve_device("cpu"))


def _check_sources(config: Config) -> None:
    from pipeline.errors import ConfigError
    from training.losses import needs_labels

    gallery, pairs = config.gallery.columns, config.pairs.columns
    if gallery.image is None and gallery.uri is None:
        raise ConfigError("the gallery does not say where its images are", where="gallery.columns.image or .uri")
    for name, columns in (("gallery", gallery), ("pairs", pairs)):
        if columns.old_embedding is None and config.encoders.old is None:
            raise ConfigError(
                f"the {name}'s old embeddings are not given, and there is no old encoder to compute them",
                where=f"{name}.columns.old_embedding, encoders.old",
            )
    if pairs.image is None and pairs.uri is None and (pairs.old_embedding is None or pairs.new_embedding is None):
        raise ConfigError(
            "the pairs have neither images nor both embeddings",
            expected="image or uri, or old_embedding and new_embedding",
            where="pairs.columns",
        )
    if needs_labels(config.fit.loss) and pairs.label is None:
        raise ConfigError(
            f"the loss {config.fit.loss!r} needs labels",
            where="pairs.columns.label",
            remedy="name the label column, or take fit.loss=alignment+uncertainty, which needs none",
        )


def ensure_embeddings(config: Config, run: Run, bars: Bars) -> None:
    """All embeddings that fit and plan will need, in one stream; each of them would do its own part otherwise."""
    from pipeline.embeddings import embed_missing
    from pipeline.plan import read_plan

    if read_plan(run) is None:
        embed_missing(config, run, ["pairs", "gallery"], bars.images)


def ensure_fit(config: Config, run: Run, bars: Bars) -> TransformationInfo:
    """The fitted transformation; pairs are embedded and the fit is run where it is missing.

    Raises:
        ConfigError, DataError: the pairs cannot be embedded, or do not suit the loss.
    """
    from pipeline.transformation import has_transformation, read_info
    from training.fit import fit
    from training.pairs import build_pairs, fit_data

    if has_transformation(run):
        return read_info(run)
    pairs = build_pairs(config, run, bars.images)

    def show(epoch: dict[str, float]) -> None:
        bars.images("fit: epochs", int(epoch["epoch"]) + 1, config.fit.epochs, f"loss {epoch['loss']:.4f}")

    bars.images("fit: epochs", 0, config.fit.epochs)
    return fit(config, run, fit_data(config, run, pairs), show)


def ensure_plan(config: Config, run: Run, bars: Bars) -> Plan:
    """The plan; old embeddings are computed and the gallery is scored where it is missing."""
    from pipeline.embeddings import embed_missing
    from pipeline.plan import read_plan
    from pipeline.planner import make_plan

    done = read_plan(run)
    if done is not None:
        return done
    embed_missing(config, run, ["gallery"], bars.images)
    with bars.step("plan") as step:
        return make_plan(config, run, on_step=step.say)
