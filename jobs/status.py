"""`fastfill status`: where a run stands, from storage alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from jobs.options import command, console, load, print_json

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.plan import Plan
    from pipeline.run import Run


class Status(TypedDict):
    """The figures of `status --json` (an interface; CHANGELOG before it changes)."""

    run: str
    gallery: int | None
    embedded: int
    durable: int
    published: int
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


@command("status")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show progress, rate, time left, snapshots and rejects of a run; reads storage alone."""
    from pipeline.run import Run, read_settings

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
    latest = candidate.commit if candidate else None
    measured = quality.read_quality(run, latest) if latest is not None else None
    status = Status(
        run=run_uri,
        gallery=None,
        embedded=0,
        durable=0,
        published=0,
        rejected=0,
        wave=0,
        waves=None,
        fraction=0.0,
        images_per_second=None,
        eta_seconds=None,
        commit=candidate.commit if candidate else None,
        prod=prod.commit if prod else None,
        quality=measured.figures if measured else None,
        refused=list(standing.refused) if standing else [],
        stopped=standing.stopped if standing else None,
    )
    plan = read_plan(run)
    if plan is None:
        return status
    log = plan.log(run)
    parts = vector_log.part_times(log)
    progress = Tracker(plan, log, max_reject_fraction=1.0, parts=parts).progress(status["commit"] or 0)
    rate = recent_rate(plan, parts)
    known = Status(
        run=run_uri,
        commit=status["commit"],
        prod=status["prod"],
        quality=status["quality"],
        refused=status["refused"],
        stopped=status["stopped"],
        gallery=progress.gallery,
        embedded=progress.durable,
        durable=progress.durable,
        published=progress.published,
        rejected=progress.rejected,
        wave=progress.wave,
        waves=progress.waves,
        fraction=progress.published / progress.gallery,
        images_per_second=rate,
        eta_seconds=0.0 if progress.left == 0 else progress.left / rate if rate else None,
    )
    status.update(known)
    return status


def is_complete(config: Config) -> bool:
    """Whether the last wave of the run is published, and this config is the run's."""
    from pipeline import manifest
    from pipeline.run import Run, check_resumable, weight_fingerprints
    from pipeline.storage import exists

    run = Run(config.run)
    if not exists(run.settings):
        return False
    sources = {"gallery": config.gallery, "pairs": config.pairs}
    digests = {name: manifest.digest(source) for name, source in sources.items()}
    check_resumable(config, weight_fingerprints(config) | digests)
    status = read_status(config.run)
    return status["waves"] is not None and status["wave"] == status["waves"]


def show(status: Status, run: Run) -> None:
    """Print the figures for people."""
    from rich.table import Table

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
        table.add_row("rate", _number(status["images_per_second"], "images/s over the last ten minutes of work"))
        table.add_row("time left", _duration(status["eta_seconds"]))
    table.add_row("latest commit", _number(status["commit"], ""))
    table.add_row("prod", _number(status["prod"], ""))
    if status["quality"] is not None:
        table.add_row("on the probe set", ", ".join(f"{name} {value:.3g}" for name, value in status["quality"].items()))
    if status["refused"]:
        table.add_row("not promoted", "\n".join(status["refused"]))
    if status["stopped"] is not None:
        table.add_row("stopped, as asked", status["stopped"])
    console().print(table)
    _show_rejects(run, plan)


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


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown until something was embedded"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


if __name__ == "__main__":
    main()
