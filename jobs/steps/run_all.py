"""Run every step of a run that is not done yet, in order, up to the last wave and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.shell.command import console, print_json

if TYPE_CHECKING:
    from jobs.shell.progress_bars import Bars
    from pipeline.backfill.stop import Stop
    from pipeline.config.tree import Config
    from pipeline.planning.plan import Plan
    from pipeline.reporting.progress import Progress
    from pipeline.run import Run


def check_served(run: Run) -> None:
    """Check the files of prod's commit and of the last commit: they exist and have the right size.

    Raises:
        DataError: a file is missing, or has another size.
    """
    from pipeline.index import tags
    from pipeline.index.commits import check_files

    served = [tags.read_tag(run, name) for name in (tags.PROD, tags.CANDIDATE)]
    for number in {tag.commit for tag in served if tag is not None and tag.commit is not None}:
        check_files(run, number)


def run_all(config: Config, bars: Bars, retry_rejects: bool = False, stop: Stop | None = None) -> Progress:
    """Run every step that is not done yet, with a metrics endpoint; the caller starts Ray."""
    from pipeline.reporting import telemetry

    with telemetry.serving(config.telemetry, config.run) as url:
        bars.console.print(f"run: {config.run}   metrics: {url}", soft_wrap=True)
        return _run_steps(config, bars, retry_rejects, stop)


def _run_steps(config: Config, bars: Bars, retry_rejects: bool, stop: Stop | None) -> Progress:
    from jobs.steps.prepare import RunSteps, open_run
    from pipeline.backfill.driver import backfill
    from pipeline.errors import GateRefused
    from pipeline.reporting import telemetry
    from pipeline.reporting.status import from_pairs_text

    run = open_run(config, bars)
    steps = RunSteps(config, run, bars)
    check_served(run)  # later snapshots would name a missing file, too
    if retry_rejects:
        _retry_before_plan(run)
    steps.embed()
    telemetry.observe_held_out(steps.fit().held_out)
    plan = steps.plan()
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
        bars.console.print(f"images read: none was left; {progress.reading.retries:,} retries", soft_wrap=True)
    write_report(config, run, plan, bars)
    return progress


def write_report(config: Config, run: Run, plan: Plan, bars: Bars) -> None:
    """Measure the curve if the gallery has labels, and write the report page."""
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


def print_result(run_uri: str, as_json: bool) -> None:
    """Print the curve's figures and the place of the report; with `as_json` the status."""
    from jobs.shell.tables import show_curve
    from pipeline.evaluation.curve import read_curve
    from pipeline.reporting.report import page_uri
    from pipeline.reporting.status import read_status
    from pipeline.run import Run

    if as_json:
        print_json(read_status(run_uri))
        return
    run = Run(run_uri)
    found = read_curve(run)
    if found is not None:
        show_curve(found)
    console().print(f"report: {page_uri(run)}", soft_wrap=True)


def _retry_before_plan(run: Run) -> None:
    """Forget the rejects of pairs that are not fitted yet, and of a gallery that is not planned yet."""
    from pipeline.embedding import vector_log
    from pipeline.embedding.reject_rules import manifest_log
    from pipeline.planning.plan import read_plan
    from pipeline.run import GALLERY_PAIRS
    from training.fitting.pairs import has_pairs

    folders = [] if has_pairs(run) else ["pairs", GALLERY_PAIRS]
    open_folders = [(folder, role) for folder in folders for role in ("old", "new")]
    open_folders += [("gallery", "old")] if read_plan(run) is None else []
    count = sum(vector_log.forget_rejects(manifest_log(run, *item), after_wave=-1) for item in open_folders)
    if count:
        console().print(f"{count} units of the gallery or the pairs have rejects and will be embedded again")


def _retry_rejects(run: Run, plan: Plan) -> None:
    """Forget units with rejects in waves that are not published: they are embedded again.

    The run is taken over first, so that no other driver publishes a forgotten unit. A commit that it has created but
    not announced counts as published.
    """
    from pipeline.embedding import vector_log
    from pipeline.index.writer import Writer

    latest = Writer.acquire(run).latest
    count = vector_log.forget_rejects(plan.log(run), after_wave=latest or 0)
    console().print(f"{count} units have rejects and will be embedded again")
