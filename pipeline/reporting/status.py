"""The status of a run, from storage alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from pipeline.config.tree import Config
    from pipeline.index.tags import Tag
    from pipeline.run import Run


class Pin(TypedDict):
    """prod does not follow later commits: since when (None if not recorded), and the command that ends it."""

    by: str
    since_unix_seconds: float | None
    unpin: str


class Status(TypedDict):
    """The figures of `status --json` (an interface; CHANGELOG before it changes).

    `from_pairs` counts images that were embedded for the fit; they are also in `durable` and `published`. `quality` is
    that of the latest commit, `quality_commit`; `prod_quality` is that of the commit that prod serves.
    """

    run: str
    gallery: int | None
    embedded: int
    durable: int
    published: int
    from_pairs: int
    rejected: int
    wave: int
    waves: int | None
    fraction: float
    images_per_second: float | None
    eta_seconds: float | None
    commit: int | None
    prod: int | None
    quality: dict[str, float] | None
    refused: list[str]
    stopped: str | None
    quality_commit: int | None
    prod_quality: dict[str, float] | None
    pinned: Pin | None


def read_status(run_uri: str) -> Status:
    """The figures of a run; before it has a plan, `gallery` and `waves` are None."""
    from pipeline.embedding import vector_log
    from pipeline.evaluation import quality
    from pipeline.evaluation.quality import read_promotion_status
    from pipeline.index import tags
    from pipeline.planning.plan import read_plan
    from pipeline.reporting.progress import Tracker, recent_rate
    from pipeline.run import Run

    run = Run(run_uri)
    candidate, prod = tags.read_tag(run, "candidate"), tags.read_tag(run, "prod")
    standing = read_promotion_status(run)
    latest, served = (tag.commit if tag else None for tag in (candidate, prod))
    measured = quality.read_quality(run, latest) if latest is not None else None
    of_prod = quality.read_quality(run, served) if served is not None else None
    status = Status(
        run=run_uri,
        gallery=None,
        embedded=0,
        durable=0,
        published=0,
        from_pairs=0,
        rejected=0,
        wave=0,
        waves=None,
        fraction=0.0,
        images_per_second=None,
        eta_seconds=None,
        commit=latest,
        prod=served,
        quality=measured.figures if measured else None,
        refused=list(standing.refused) if standing else [],
        stopped=standing.stopped if standing else None,
        quality_commit=latest if measured else None,
        prod_quality=of_prod.figures if of_prod else None,
        pinned=_pin(prod),
    )
    plan = read_plan(run)
    if plan is None:
        return status
    log = plan.log(run)
    parts = vector_log.part_times(log)
    progress = Tracker(plan, log, max_reject_fraction=1.0, parts=parts).progress(-1 if latest is None else latest)
    rate = recent_rate(plan, parts)
    status["gallery"] = progress.gallery
    status["embedded"] = status["durable"] = progress.durable
    status["published"], status["rejected"] = progress.published, progress.rejected
    status["wave"], status["waves"] = progress.wave, progress.waves
    status["fraction"] = progress.published / progress.gallery
    status["from_pairs"] = progress.from_pairs
    status["images_per_second"] = rate
    status["eta_seconds"] = 0.0 if progress.left == 0 else progress.left / rate if rate else None
    return status


def is_complete(config: Config) -> bool:
    """Whether the last wave of the run is published, and this config is the run's."""
    from pipeline.config.identity import check_resumable, weight_fingerprints
    from pipeline.manifest import normalised
    from pipeline.run import Run
    from pipeline.storage.objects import exists

    run = Run(config.run)
    if not exists(run.settings):
        return False
    digests = {name: normalised.digest(source) for name, source in config.sources.items()}
    check_resumable(config, weight_fingerprints(config) | digests)
    status = read_status(config.run)
    return status["waves"] is not None and status["wave"] == status["waves"]


def from_pairs_text(count: int, gallery: int) -> str:
    """How many images are embedded before the backfill begins."""
    return f"{count:,} of {gallery:,} images are embedded already: the pairs of the fit."


def damage_of_served(run: Run, served: int | None) -> str | None:
    """The damage of the commit that prod serves, found by the names and sizes of its files; None if there is none."""
    from pipeline.errors import DataError, Removed
    from pipeline.index.commits import check_files

    if served is None:
        return None
    try:
        check_files(run, served)
    except (DataError, Removed) as error:
        return f"{error.summary}: {error.details['where']}; {error.details['remedy']}"
    return None


def _pin(prod: Tag | None) -> Pin | None:
    if prod is None or not prod.pinned:
        return None
    return Pin(by="rollback", since_unix_seconds=prod.pinned_unix_seconds, unpin="fastfill promote")
