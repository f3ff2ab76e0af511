"""Every step of a backfill that is not done yet, in order, up to the last wave and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.shell.command import console, print_json
from jobs.shell.ray_session import start_ray

if TYPE_CHECKING:
    from jobs.shell.progress_bars import Bars
    from pipeline.backfill.stop import Stop
    from pipeline.config.tree import Config
    from pipeline.planning.plan import Plan
    from pipeline.reporting.progress import Progress
    from pipeline.run import Run


def check_served(config: Config) -> None:
    """Every file is there that prod or the last commit names; else `repair` comes first.

    Raises:
        DataError: a file is missing, or has another size.
    """
    from pipeline.index import tags as snapshot
    from pipeline.index.commits import check_files
    from pipeline.run import Run

    run = Run(config.run)
    tags = [snapshot.read_tag(run, name) for name in (snapshot.PROD, snapshot.CANDIDATE)]
    for number in {tag.commit for tag in tags if tag is not None and tag.commit is not None}:
        check_files(run, number)


def say_what_older_commits_lack(config: Config) -> None:
    """Name the commits that nobody serves now, and that lack files: a rollback to them would fail."""
    from pipeline.errors import DataError, Removed
    from pipeline.index import tags as snapshot
    from pipeline.index.commits import check_files, file_sizes
    from pipeline.run import Run

    run, lacking = Run(config.run), []
    sizes = file_sizes(run)  # before the commits are listed: gc may remove some meanwhile
    for number in snapshot.list_commits(run):
        try:
            check_files(run, number, sizes)
        except Removed:
            continue
        except DataError:
            lacking.append(str(number))
    if lacking:
        text = (
            f"But older commits are damaged or lack files: {', '.join(lacking)}; `fastfill repair` mends what it can."
        )
        console().print(text, soft_wrap=True)


def run_all(config: Config, bars: Bars, retry_rejects: bool = False, stop: Stop | None = None) -> Progress:
    """Every step that is missing, in order, its figures on show; Ray is started by the caller."""
    from pipeline.reporting import telemetry

    with telemetry.serving(config.telemetry, config.run) as url:
        bars.console.print(f"run: {config.run}   metrics: {url}", soft_wrap=True)
        return _run_steps(config, bars, retry_rejects, stop)


def _run_steps(config: Config, bars: Bars, retry_rejects: bool, stop: Stop | None) -> Progress:
    from jobs.steps.prepare import ensure_embeddings, ensure_fit, ensure_plan, open_run
    from pipeline.backfill.driver import backfill
    from pipeline.errors import GateRefused
    from pipeline.reporting import telemetry
    from pipeline.reporting.status import from_pairs_text

    run = open_run(config, bars)
    check_served(config)  # else later snapshots would name what is missing, too
    if retry_rejects:
        _retry_before_plan(run)
    ensure_embeddings(config, run, bars)
    telemetry.observe_held_out(ensure_fit(config, run, bars).held_out)
    plan = ensure_plan(config, run, bars)
    if plan.num_from_pairs:
        bars.console.print(from_pairs_text(plan.num_from_pairs, plan.num_gallery), soft_wrap=True)
    if retry_rejects:
        _retry_rejects(run, plan)

    def show(progress: Progress) -> None:
        done = progress.durable + progress.rejected
        rate = f"{progress.images_per_second:,.0f} images/s, " if progress.images_per_second else ""
        retries = f", {progress.reading.retries:,} retries" if progress.reading.retries else ""
        text = f"{rate}wave {progress.wave} of {progress.waves} published{retries}"
        bars.images("backfill", done, progress.gallery, text)

    try:
        progress = backfill(config, run, plan, show, stop)
    except GateRefused:
        write_report(config, run, plan, bars)
        raise
    if progress.stopped is not None:
        bars.console.print(f"stopped, as asked: {progress.stopped}", soft_wrap=True)
    if progress.reading.images:
        bars.console.print(f"images read: {progress.reading}", soft_wrap=True)
    elif progress.reading.retries:
        bars.console.print(f"no image was left to read; {progress.reading.retries:,} retries", soft_wrap=True)
    write_report(config, run, plan, bars)
    return progress


def promote_last(config: Config) -> None:
    """Judge the last commit of a finished run where prod does not serve it: the limits may be others now.

    Raises:
        GateRefused: it is refused again.
    """
    from pipeline.backfill.promotion import Promotion
    from pipeline.index import commits
    from pipeline.index import tags as snapshot
    from pipeline.planning.plan import read_plan
    from pipeline.run import Run

    run = Run(config.run)
    prod, candidate, plan = (
        snapshot.read_tag(run, snapshot.PROD),
        snapshot.read_tag(run, snapshot.CANDIDATE),
        read_plan(run),
    )
    if candidate is None or candidate.commit is None or plan is None or config.publish.promote == "manual":
        return
    if prod is not None and (prod.pinned or prod.commit == candidate.commit):
        return
    start_ray()
    promotion = Promotion(config, run, plan)
    commit = commits.read_commit(run, candidate.commit)
    promotion.settle(commit)
    promotion.finish(commit)


def restore_report(config: Config) -> None:
    """Write the report of a finished run where it is missing, or older than the last commit."""
    from jobs.shell.progress_bars import Bars
    from pipeline.planning.plan import read_plan
    from pipeline.reporting import report
    from pipeline.run import Run

    run = Run(config.run)
    plan = read_plan(run)
    if plan is None or report.is_current(run):
        return
    console().print("But its report: it is missing, or older than the last commit.")
    with Bars(console()) as bars:
        write_report(config, run, plan, bars)


def write_report(config: Config, run: Run, plan: Plan, bars: Bars) -> None:
    """Measure the curve where the gallery has labels, and write the report page."""
    from pipeline.errors import DataError
    from pipeline.evaluation.curve import curve
    from pipeline.evaluation.gallery_arrays import has_labels
    from pipeline.reporting import report, telemetry

    if plan.num_gallery > config.evaluate.max_images:
        limit = f"evaluate.max_images is {config.evaluate.max_images:,}"
        bars.console.print(f"no curve: the gallery has {plan.num_gallery:,} images, {limit}", soft_wrap=True)
    elif has_labels(run):
        try:
            found = curve(config, run, on_progress=lambda done, total: bars.images("evaluate", done, total))
            telemetry.observe_curve(found)
        except DataError as error:
            bars.console.print(f"no curve: {error}", soft_wrap=True)
    with bars.step("report"):
        report.write_report(config, run)


def finish(config: Config, as_json: bool) -> None:
    """Print the result of a finished backfill: its curve's figures and where the report is."""
    from jobs.shell.tables import show_curve
    from pipeline.evaluation.curve import read_curve
    from pipeline.reporting.report import page_uri
    from pipeline.reporting.status import read_status
    from pipeline.run import Run

    if as_json:
        print_json(read_status(config.run))
        return
    run = Run(config.run)
    found = read_curve(run)
    if found is not None:
        show_curve(found)
    console().print(f"report: {page_uri(run)}", soft_wrap=True)


def _retry_before_plan(run: Run) -> None:
    """Forget what could not be embedded for the fit and the plan, where these are not made yet."""
    from pipeline.embedding import vector_log
    from pipeline.embedding.rejects import manifest_log
    from pipeline.planning.plan import read_plan
    from pipeline.run import GALLERY_PAIRS
    from training.fitting.pairs import has_pairs

    folders = [] if has_pairs(run) else ["pairs", GALLERY_PAIRS]
    open_folders = [(folder, role) for folder in folders for role in ("old", "new")]
    open_folders += [("gallery", "old")] if read_plan(run) is None else []
    count = sum(vector_log.forget_rejects(manifest_log(run, *item), after_wave=-1) for item in open_folders)
    if count:
        console().print(f"{count} units with rejects of the gallery or the pairs will be embedded again")


def _retry_rejects(run: Run, plan: Plan) -> None:
    """Take the run over, then forget the units with rejects in waves that are not published; they are embedded again.

    Whoever wrote to the run before cannot publish any more what is taken away here. A commit that it created and
    did not announce counts as published.
    """
    from pipeline.embedding import vector_log
    from pipeline.index.writer import Writer

    latest = Writer.acquire(run).latest
    count = vector_log.forget_rejects(plan.log(run), after_wave=latest or 0)
    console().print(f"{count} units with rejects will be embedded again")


def say_what_stays(config: Config) -> None:
    """Tell why rejects of published waves are not retried."""
    from pipeline.reporting.status import read_status

    rejected = read_status(config.run)["rejected"]
    if rejected:
        console().print(
            f"The {rejected:,} rejects stay: their waves are published, and a published wave does not change. "
            "Mend the images and start beside it with `fastfill backfill --new-run`; `fastfill status` shows them.",
            soft_wrap=True,
        )
