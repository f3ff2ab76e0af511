"""`fastfill status`: where a run stands, from storage alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from jobs.options import command, console, load, print_json
from pipeline.readable import duration, moment

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.plan import Plan
    from pipeline.run import Run
    from pipeline.snapshot import Tag


class Pin(TypedDict):
    """That prod does not follow later commits, since when (None: not recorded), and the command that ends it."""

    by: str
    since_unix_seconds: float | None
    unpin: str


class Status(TypedDict):
    """The figures of `status --json` (an interface; CHANGELOG before it changes).

    `from_pairs` are the images that were embedded for the fit: of the durable ones, and of the published ones.
    `quality` is that of `quality_commit`, the latest commit; `prod_quality` that of the commit that prod serves.
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


@command("status")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show progress, rate, time left, snapshots and rejects of a run; reads storage alone."""
    from pipeline.identity import read_settings
    from pipeline.run import Run

    config = load(config_path, overrides)
    read_settings(Run(config.run))  # a run that is not there is an error
    status = read_status(config.run)
    print_json(status) if as_json else show(status, Run(config.run))


def read_status(run_uri: str) -> Status:
    """The figures of a run; before its plan is made there is no gallery to count against."""
    from pipeline import quality, snapshot, vector_log
    from pipeline.plan import read_plan
    from pipeline.progress import Tracker, recent_rate
    from pipeline.run import Run
    from pipeline.standing import read_standing

    run = Run(run_uri)
    candidate, prod = snapshot.read_tag(run, "candidate"), snapshot.read_tag(run, "prod")
    standing = read_standing(run)
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
    from pipeline import manifest
    from pipeline.config import sources
    from pipeline.identity import check_resumable, weight_fingerprints
    from pipeline.run import Run
    from pipeline.storage import exists

    run = Run(config.run)
    if not exists(run.settings):
        return False
    digests = {name: manifest.digest(source) for name, source in sources(config).items()}
    check_resumable(config, weight_fingerprints(config) | digests)
    status = read_status(config.run)
    return status["waves"] is not None and status["wave"] == status["waves"]


def show(status: Status, run: Run) -> None:
    """Print the figures for people."""
    from rich.table import Table
    from rich.text import Text

    from pipeline.plan import read_plan

    plan = read_plan(run)
    table = Table(show_header=False, title=status["run"], title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    if status["gallery"] is None:
        table.add_row("plan", "not made yet: `fastfill backfill` goes on")
    else:
        table.add_row("gallery", f"{status['gallery']:,} images")
        table.add_row("published", f"{status['published']:,} ({status['fraction']:.1%})")
        table.add_row("durable", f"{status['durable']:,}")
        table.add_row("rejected", _rejected(status["rejected"], plan.num_rejected if plan else 0))
        table.add_row("wave", f"{status['wave']} of {status['waves']}")
        table.add_row("rate", _rate(status["images_per_second"]))
        table.add_row("time left", _left(status["eta_seconds"]))
    table.add_row("latest commit", _number(status["commit"], ""))
    table.add_row("prod", _number(status["prod"], "") + _pinned(status["pinned"]))
    damage = _damage(run, status["prod"])
    if damage is not None:
        table.add_row("damaged", Text(damage))
    if status["prod_quality"] is not None:
        table.add_row(f"quality of commit {status['prod']} (prod)", _figures(status["prod_quality"]))
    if status["quality"] is not None and status["commit"] != status["prod"]:
        table.add_row(f"quality of commit {status['commit']} (latest)", _figures(status["quality"]))
    if status["refused"]:
        table.add_row("not promoted", "\n".join(status["refused"]))
    if status["stopped"] is not None:
        table.add_row("stopped, as asked", status["stopped"])
    console().print(table)
    if status["gallery"] is not None and status["from_pairs"]:
        console().print(from_pairs_text(status["from_pairs"], status["gallery"]), soft_wrap=True)
    _show_rejects(run, plan)


def from_pairs_text(count: int, gallery: int) -> str:
    """What is embedded of a gallery before its backfill begins."""
    return f"{count:,} of {gallery:,} images are embedded already: the pairs of the fit."


def _damage(run: Run, served: int | None) -> str | None:
    """What is wrong with the commit that prod serves, as far as it shows without reading its files."""
    from pipeline.commits import check_files
    from pipeline.errors import DataError, Removed

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


def _pinned(pin: Pin | None) -> str:
    if pin is None:
        return ""
    since = pin["since_unix_seconds"]
    when = "" if since is None else f" since {moment(since)}"
    return f", pinned by {pin['by']}{when}: later commits do not reach it until `{pin['unpin']}`"


def _figures(quality: dict[str, float]) -> str:
    """On the probe set, in per cent but for the ratio `slot_share`."""
    return ", ".join(f"{name} {value:.3g}" for name, value in quality.items())


def _rejected(count: int, before_plan: int) -> str:
    lost = f", {before_plan:,} of them by the old encoder: they have no vector, and are not served"
    return f"{count:,}{lost if before_plan else ''}"


def _show_rejects(run: Run, plan: Plan | None) -> None:
    from collections import Counter

    import pyarrow as pa
    from rich.table import Table

    from pipeline.rejects import read_all, read_of_pairs

    found = pa.concat_tables([read_all(run, plan), read_of_pairs(run)])
    if not found.num_rows:
        return
    rows = found.select(["stage", "reason", "uri"]).to_pylist()
    counts = Counter((row["stage"], row["reason"].partition(":")[0]) for row in rows)
    examples = {(row["stage"], row["reason"].partition(":")[0]): row for row in rows}
    table = Table("stage", "reason", "images", "for example", title="rejects", title_justify="left")
    for key, count in counts.most_common():
        table.add_row(*key, f"{count:,}", f"{examples[key]['uri']} ({examples[key]['reason']})")
    console().print(table)


def _number(value: float | None, unit: str) -> str:
    return "none yet" if value is None else f"{value:,.0f} {unit}".rstrip()


def _rate(images_per_second: float | None) -> str:
    if images_per_second is None:
        from pipeline.throughput import SHORTEST_SECONDS

        return f"none: fewer than {SHORTEST_SECONDS:g} seconds of work"
    return _number(images_per_second, "images/s over the last stretch of work, at most ten minutes")


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "unknown until there is a rate"
    return duration(seconds) if seconds else "none: no image is left"


if __name__ == "__main__":
    main()
