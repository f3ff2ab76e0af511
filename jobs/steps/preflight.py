"""Check the settings and a few images before any work, so that a wrong config fails within seconds.

Nothing is written. Problems that only show during the work (the number of damaged images, say) are not checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.method import FitSettings, ProbeSettings
    from pipeline.config.tree import Config, GallerySettings, IndexSettings, ManifestSettings, PairsSettings
    from pipeline.manifest.normalised import Manifest
    from pipeline.run import Run
    from pipeline.sampling.probe_labels import Sample


def check_settings(config: Config, dims: dict[str, int]) -> None:
    """Check columns, widths, waves, training pairs, index, policy and encoders against each other.

    `dims` has the width of each embedding column that has an encoder.

    Raises:
        ConfigError, DataError: one of them cannot be used.
    """
    from pipeline.manifest import normalised
    from pipeline.models.device import resolve_device
    from pipeline.models.encoder import load_encoder
    from pipeline.planning.plan import wave_sizes
    from training.fitting.pairs import num_training

    _check_sources(config)
    given = config.sources
    rows = {name: sum(part.num_rows for part in normalised.scan(item, dims)) for name, item in given.items()}
    images, sample = rows["gallery"], _check_sample(config.probe, config.gallery)
    check_widths(given, {name: normalised.widths(item) for name, item in given.items()})
    sampled = _check_from_gallery(config.pairs, images, rows.get("pairs", 0), sample)
    wave_sizes(config.plan.waves, images - sampled)
    training = num_training(rows.get("pairs", 0) + sampled, config.pairs.held_out_fraction)
    _check_training(config.fit, config.index, images, training, config.encoders.new.dim)
    _check_policy(config)
    _check_selected(config, images, sample)
    resolve_device(config.device)
    for key, encoder in (("encoders.old", config.encoders.old), ("encoders.new", config.encoders.new)):
        if encoder is not None:
            load_encoder(encoder, resolve_device("cpu"), key)


def check_widths(given: dict[str, ManifestSettings], dims: dict[str, dict[str, int]]) -> None:
    """Check that old embeddings and side information have the same width in gallery and pairs, if both are known.

    `dims` has the widths of each manifest's embedding columns.

    Raises:
        DataError: the widths differ.
    """
    from pipeline.errors import DataError

    for role in ("old_embedding", "side"):
        widths = dims["gallery"].get(role), dims.get("pairs", {}).get(role)
        if None not in widths and widths[0] != widths[1]:
            names = [getattr(given[name].columns, role) for name in ("gallery", "pairs")]
            raise DataError(
                f"{role} has another width in the gallery than in the pairs",
                expected="the same width: the transformation is fitted on the pairs and applied to the gallery",
                found=f"{widths[0]} in the gallery (column {names[0]}), {widths[1]} in the pairs (column {names[1]})",
                where=f"gallery.columns.{role}, pairs.columns.{role}",
            )


def check_images(config: Config, run: Run, folder: str, rows: Manifest) -> None:
    """Check that at least one of a few images, spread over a normalised manifest, can be read.

    Raises:
        ConfigError: none can.
        DataError, TransientError: the store refuses the credentials, or kept failing.
    """
    import ray

    from pipeline.embedding.precompute import check_readable
    from pipeline.embedding.stream import StreamSettings
    from pipeline.errors import ConfigError

    encoder = config.encoders.old if folder == "pairs" and "new_embedding" in rows.dims else config.encoders.new
    columns = getattr(config, folder).columns
    if encoder is None or (columns.uri is None and columns.image is None):
        return
    if folder == "pairs" and {"old_embedding", "new_embedding"} <= rows.dims.keys():
        return  # no image will be read
    arguments = run, folder, rows, encoder.preprocess, StreamSettings.of(config)
    tried, bad = ray.get(ray.remote(num_cpus=0.5)(check_readable).remote(*arguments))
    if len(bad) < tried:
        return
    raise ConfigError(
        f"none of {tried} images, spread over the {folder}, can be read",
        found="".join(f"\n    {line}" for line in bad),
        where=f"{folder}.columns, data_root",
        remedy=f"check the uris (relative ones are below {config.data_root}) and the encoder's preprocess section",
    )


def _check_from_gallery(pairs: PairsSettings, images: int, given: int, sample: Sample | None) -> int:
    """The number of pairs that will be drawn from the gallery.

    Raises:
        ConfigError: the gallery has too few images for that.
        DataError: they are too few for a fit, together with the pairs of the manifest.
    """
    from pipeline.errors import ConfigError
    from training.fitting.pairs import check_enough

    probed = 0 if sample is None else len(sample.rows)
    wanted, most = pairs.num_from_gallery(images, probed), min(images // 2, images - probed)
    if wanted > most:
        raise ConfigError(
            "pairs.from_gallery is larger than the gallery allows",
            expected=f"at most {most}: no more than half the gallery, and without the images in probe.manifest",
            found=wanted,
            where="pairs.from_gallery",
        )
    names = [pairs.manifest] if isinstance(pairs.manifest, str) else pairs.manifest or ()
    from_gallery = [f"{wanted} of the gallery's {images} images (pairs.from_gallery)"] if pairs.uses_gallery else []
    check_enough(given + wanted, ", ".join([*names, *from_gallery]))
    return wanted


def _check_training(fit: FitSettings, index: IndexSettings, images: int, training: int, dim: int) -> None:
    """Check workers and index against the number of training pairs, if none of these is rejected."""
    from pipeline.errors import ConfigError
    from pipeline.index.train_codebook import check_trainable
    from training.fitting.pairs import NUM_STRIPES

    if fit.num_workers > NUM_STRIPES:
        raise ConfigError(
            "fit.num_workers is larger than the number of parts of training pairs",
            expected=f"at most {NUM_STRIPES}",
            found=fit.num_workers,
            where="fit.num_workers",
        )
    check_trainable(index.factory, images, min(training, index.train_vectors), dim)


def _check_sample(probe: ProbeSettings, gallery: GallerySettings) -> Sample | None:
    """The images of `probe.manifest`: it can be read, and its ids are of the gallery's kind; None without one."""
    from pipeline.manifest import normalised
    from pipeline.sampling.probe_labels import check_kind, read_sample

    if probe.manifest is None or not probe.images:
        return None
    name, sample = gallery.columns.id, read_sample(probe)
    check_kind(sample, name, name is not None and normalised.ids_are_integers(gallery))
    return sample


def _check_policy(config: Config) -> None:
    """Check that the policy exists and that its inputs will; what `selected` means is known after the fit."""
    from pipeline.errors import ConfigError
    from pipeline.planning.policies import POLICIES, load_policy
    from training.fitting.losses import needs_classifier

    plan, gallery, pairs = config.plan, config.gallery.columns, config.pair_roles
    columns = _columns_of_pairs(config.pairs)
    boosted = plan.group_boost > 0
    needs = POLICIES[plan.policy].needs if plan.policy in POLICIES else frozenset[str]()
    if ":" in plan.policy:
        load_policy(plan.policy, config.seed)
    fit, labelled = config.fit, "label" in pairs
    fits_one = fit.transformation == "auto" or needs_classifier(fit.resolved(labelled))
    classifier = fit.classifier is not None or (labelled and fits_one)
    for wanted, there, where in (
        ("classifier" in needs, classifier, f"fit.classifier, or {columns}.label and a loss that fits one"),
        ("labels" in needs, "label" in pairs, f"{columns}.label"),
        ("gallery_labels" in needs, gallery.label is not None, "gallery.columns.label"),
        (plan.traffic, gallery.traffic is not None, "gallery.columns.traffic"),
        (boosted, {"group", "label"} <= pairs, f"{columns}.group and .label"),
        (boosted, gallery.group is not None, "gallery.columns.group"),
    ):
        if wanted and not there:
            found = f"plan.policy {plan.policy}, traffic {plan.traffic}, group_boost {plan.group_boost:g}"
            raise ConfigError(
                "plan.policy or its options need a column or classifier that is not configured",
                expected=where,
                found=found,
                where="plan",
            )


def _columns_of_pairs(pairs: PairsSettings) -> str:
    """The config section with the columns of the pairs."""
    return "gallery.columns" if pairs.manifest is None else "pairs.columns"


def _check_selected(config: Config, images: int, sample: Sample | None) -> None:
    """Check that `plan.policy: selected` refers to a selection, and that it has enough images to measure."""
    from pipeline.errors import ConfigError
    from pipeline.models.transformation import has_transformation
    from pipeline.planning.selection_result import resolve_policy
    from pipeline.run import Run
    from pipeline.sampling.probe_draw import size
    from training.select import LEAST_SHARE, too_few

    run = Run(config.run)
    if has_transformation(run):
        resolve_policy(run, config.plan.policy)
        return
    selects = config.fit.transformation == "auto"
    if config.plan.policy == "selected" and not selects:
        raise ConfigError(
            "plan.policy is `selected`, and this run makes no selection",
            expected="fit.transformation: auto",
            found=config.fit.transformation,
            where="plan.policy: selected",
            remedy="set plan.policy to auto or to a policy, or set fit.transformation=auto",
        )
    if not selects or config.select.measured_on == "pairs":
        return
    count, what = size(config.probe.images, images) if config.probe.images else 0, "images"
    if sample is not None:
        labels = sample.rows["label"]
        known = len(labels) - labels.null_count
        count, what = (known, "images with a label") if known else (len(labels), what)
    if count < config.select.folds * LEAST_SHARE:
        raise too_few(count, what, config.select)


def _check_sources(config: Config) -> None:
    """Check that images, embeddings, side information and labels are given as the settings need them."""
    from pipeline.errors import ConfigError
    from training.fitting.losses import needs_labels

    gallery, pairs, roles = config.gallery.columns, config.pairs.columns, config.pair_roles
    if gallery.image is None and gallery.uri is None:
        raise ConfigError(
            "the gallery has no column of images",
            expected="image (bytes) or uri",
            where="gallery.columns",
        )
    for name, source in config.sources.items():
        if source.columns.old_embedding is None and config.encoders.old is None:
            raise ConfigError(
                f"the {name} has no old embeddings, and there is no old encoder to compute them",
                where=f"{name}.columns.old_embedding, encoders.old",
                remedy="give one of the two",
            )
    has_manifest = config.pairs.manifest is not None
    embedded = {"old_embedding", "new_embedding"} <= pairs.model_dump(exclude_none=True).keys()
    if has_manifest and pairs.image is None and pairs.uri is None and not embedded:
        raise ConfigError(
            "the pairs have neither images nor both embeddings",
            expected="image or uri, or old_embedding and new_embedding",
            where="pairs.columns",
        )
    if has_manifest and (gallery.side is None) != (pairs.side is None):
        given, missing = ("pairs", "gallery") if gallery.side is None else ("gallery", "pairs")
        raise ConfigError(
            f"side information is given for the {given} and not for the {missing}",
            expected="for both, or for neither",
            where=f"{missing}.columns.side",
        )
    if config.fit.offset != "none" and config.gallery.metric == "ip":
        raise ConfigError(
            "fit.offset has no effect with gallery.metric ip",
            expected="none",
            found=config.fit.offset,
            where="fit.offset, gallery.metric",
            remedy="set fit.offset=none, or gallery.metric to l2 or cosine",
        )
    if config.fit.offset == "confidence" and "label" not in roles and config.fit.classifier is None:
        raise ConfigError(
            "fit.offset=confidence needs a classifier, or labels to fit one on",
            where=f"fit.classifier, {_columns_of_pairs(config.pairs)}.label",
            remedy="set one of these, or fit.offset=uncertainty, which needs neither",
        )
    if config.fit.loss != "auto" and needs_labels(config.fit.loss) and "label" not in roles:
        raise ConfigError(
            f"the loss {config.fit.loss!r} needs labels",
            where=f"{_columns_of_pairs(config.pairs)}.label",
            remedy="name a label column, or set fit.loss=alignment+uncertainty, which needs no labels",
        )
