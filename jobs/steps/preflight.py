"""What is tried out before any work, so that a run fails in its first seconds or not for its settings.

Guarantee: nothing is written. What can only be known later (how many images are damaged) is not looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.tree import Config
    from pipeline.manifest.normalised import Manifest
    from pipeline.run import Run
    from pipeline.sampling.probe_labels import Sample


def check_settings(config: Config, dims: dict[str, int]) -> None:
    """Try out what a run will need, on nothing: columns, widths, waves, batch, index, policy, encoders.

    Args:
        config: the run's config.
        dims: embedding column -> the width of its encoder, where there is one.

    Raises:
        ConfigError, DataError: one of them cannot be used.
    """
    from pipeline.config.tree import sources
    from pipeline.manifest import normalised
    from pipeline.models.device import resolve_device
    from pipeline.models.encoder import load_encoder
    from pipeline.planning.plan import wave_sizes

    _check_sources(config)
    given = sources(config)
    rows = {name: sum(part.num_rows for part in normalised.scan(item, dims)) for name, item in given.items()}
    images, sample = rows["gallery"], _check_sample(config)
    check_widths(config, {name: normalised.widths(item) for name, item in given.items()})
    sampled = _check_from_gallery(config, images, rows.get("pairs", 0), sample)
    wave_sizes(config.plan.waves, images - sampled)
    _check_training(config, images, rows.get("pairs", 0) + sampled)
    _check_policy(config)
    _check_selected(config, images, sample)
    resolve_device(config.device)
    for key, encoder in (("encoders.old", config.encoders.old), ("encoders.new", config.encoders.new)):
        if encoder is not None:
            load_encoder(encoder, resolve_device("cpu"), key)


def check_widths(config: Config, dims: dict[str, dict[str, int]]) -> None:
    """The gallery's old embeddings and side information are of the pairs' width, as far as both are known.

    Args:
        config: the run's config.
        dims: of each manifest that is given, embedding column -> width.

    Raises:
        DataError: they are not.
    """
    from pipeline.errors import DataError

    for role in ("old_embedding", "side"):
        widths = dims["gallery"].get(role), dims.get("pairs", {}).get(role)
        if None not in widths and widths[0] != widths[1]:
            names = [getattr(item.columns, role) for item in (config.gallery, config.pairs)]
            raise DataError(
                f"the gallery's {role} has another width than the pairs'",
                expected="one width: the transformation is fitted on the pairs and applied to the gallery",
                found=f"{widths[0]} in the gallery (column {names[0]}), {widths[1]} in the pairs (column {names[1]})",
                where=f"gallery.columns.{role}, pairs.columns.{role}",
            )


def check_images(config: Config, run: Run, folder: str, rows: Manifest) -> None:
    """Of a few images, spread over a normalised manifest, one at least can be read.

    Raises:
        ConfigError: none can.
        DataError, TransientError: the store refuses the credentials, or kept failing.
    """
    import ray

    from pipeline.embedding.precompute import check_readable
    from pipeline.errors import ConfigError

    encoder = config.encoders.old if folder == "pairs" and "new_embedding" in rows.dims else config.encoders.new
    columns = getattr(config, folder).columns
    if encoder is None or (columns.uri is None and columns.image is None):
        return
    if folder == "pairs" and {"old_embedding", "new_embedding"} <= rows.dims.keys():
        return  # nothing will be read
    tried, bad = ray.get(ray.remote(num_cpus=0.5)(check_readable).remote(config, run, folder, rows, encoder.preprocess))
    if len(bad) < tried:
        return
    raise ConfigError(
        f"none of {tried} images, spread over the {folder}, can be read",
        found="".join(f"\n    {line}" for line in bad),
        where=f"{folder}.columns, data_root",
        remedy=f"check the uris (relative ones start at {config.data_root}) and the encoder's preprocess",
    )


def _check_from_gallery(config: Config, images: int, given: int, sample: Sample | None) -> int:
    """How many pairs will come from the gallery itself: it has so many, and with those of the manifest they are enough.

    Raises:
        ConfigError: it does not have so many.
        DataError: they are too few.
    """
    from pipeline.config.tree import num_from_gallery
    from pipeline.errors import ConfigError
    from training.fitting.pairs import check_enough

    probed = 0 if sample is None else len(sample.rows)
    wanted, most = num_from_gallery(config, images, probed), min(images // 2, images - probed)
    if wanted > most:
        raise ConfigError(
            "more pairs are to come from the gallery than it can give",
            expected=f"at most {most}: half of its {images} images, and none of the probe set's sample",
            found=wanted,
            where="pairs.from_gallery",
        )
    names = [config.pairs.manifest] if isinstance(config.pairs.manifest, str) else config.pairs.manifest or ()
    from_gallery = (
        [f"{wanted} of the gallery's {images} images (pairs.from_gallery)"] if config.pairs.uses_gallery else []
    )
    check_enough(given + wanted, ", ".join([*names, *from_gallery]))
    return wanted


def _check_training(config: Config, images: int, pairs: int) -> None:
    """The workers and the index fit the number of pairs that will train, if none of them is rejected."""
    from pipeline.errors import ConfigError
    from pipeline.index.train import check_trainable
    from training.fitting.pairs import NUM_STRIPES, num_training

    if config.fit.num_workers > NUM_STRIPES:
        raise ConfigError(
            "there are more workers than parts of training pairs",
            expected=f"at most {NUM_STRIPES}",
            found=config.fit.num_workers,
            where="fit.num_workers",
        )
    training = num_training(pairs, config.pairs.held_out_fraction)
    vectors = min(training, config.index.train_vectors)
    check_trainable(config.index.factory, images, vectors, config.encoders.new.dim)


def _check_sample(config: Config) -> Sample | None:
    """The probe set's sample, where one is given: it can be read, and names images as the gallery does.

    Whether they are there, `draw` sees.
    """
    from pipeline.manifest import normalised
    from pipeline.sampling.probe_labels import check_kind, read_sample

    if config.probe.manifest is None or not config.probe.images:
        return None
    name, sample = config.gallery.columns.id, read_sample(config.probe)
    check_kind(sample, name, name is not None and normalised.ids_are_integers(config.gallery))
    return sample


def _check_policy(config: Config) -> None:
    """A function of the user's own can be found; what one of ours needs will be there. What `selected` stands for is
    known once the transformation is fitted, of policies that had what they need."""
    from pipeline.config.tree import pair_roles
    from pipeline.errors import ConfigError
    from pipeline.planning.policies import POLICIES, load_policy
    from training.fitting.losses import needs_classifier

    plan, gallery, pairs = config.plan, config.gallery.columns, pair_roles(config)
    columns = _columns_of_pairs(config)
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
            raise ConfigError("the plan's order needs what is not given", expected=where, found=found, where="plan")


def _columns_of_pairs(config: Config) -> str:
    """Where the columns of pairs are named."""
    return "gallery.columns" if config.pairs.manifest is None else "pairs.columns"


def _check_selected(config: Config, images: int, sample: Sample | None) -> None:
    """What is to be `selected` was, or will be; and what the selection is to measure will be there."""
    from pipeline.errors import ConfigError
    from pipeline.models.transformation import has_transformation
    from pipeline.planning.selection import resolve_policy
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
            "nothing is selected in this run",
            expected="fit.transformation: auto",
            found=config.fit.transformation,
            where="plan.policy: selected",
            remedy="set plan.policy to auto or to a name, or fit.transformation to auto",
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
    from pipeline.config.tree import pair_roles, sources
    from pipeline.errors import ConfigError
    from training.fitting.losses import needs_labels

    gallery, pairs, roles = config.gallery.columns, config.pairs.columns, pair_roles(config)
    if gallery.image is None and gallery.uri is None:
        raise ConfigError("the gallery does not say where its images are", where="gallery.columns.image or .uri")
    for name, source in sources(config).items():
        if source.columns.old_embedding is None and config.encoders.old is None:
            raise ConfigError(
                f"the {name}'s old embeddings are not given, and there is no old encoder to compute them",
                where=f"{name}.columns.old_embedding, encoders.old",
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
            "an inner product does not see an offset",
            expected="none",
            found=config.fit.offset,
            where="fit.offset, gallery.metric",
        )
    if config.fit.offset == "confidence" and "label" not in roles and config.fit.classifier is None:
        raise ConfigError(
            "an offset by confidence needs a classifier, or labels to fit one on",
            where=f"fit.classifier, {_columns_of_pairs(config)}.label",
            remedy="set fit.offset to uncertainty, which needs neither",
        )
    if config.fit.loss != "auto" and needs_labels(config.fit.loss) and "label" not in roles:
        raise ConfigError(
            f"the loss {config.fit.loss!r} needs labels",
            where=f"{_columns_of_pairs(config)}.label",
            remedy="name the label column, or take fit.loss=alignment+uncertainty, which needs none",
        )
