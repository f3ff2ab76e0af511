"""`fastfill backfill` on a finished run: check its files, restore its report, and judge its last snapshot again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.shell.command import console
from jobs.shell.ray_session import start_ray
from jobs.steps.run_all import check_served, write_report

if TYPE_CHECKING:
    from pipeline.config.tree import Config
    from pipeline.run import Run


def check_finished_run(config: Config, retry_rejects: bool) -> None:
    """Check the served files; write a missing report; try again to promote the last snapshot.

    Raises:
        DataError: a served file is missing, or has another size.
        GateRefused: the last snapshot is refused again.
    """
    from pipeline.run import Run

    run, out = Run(config.run), console()
    check_served(run)
    out.print(f"Nothing to do: every wave of {config.run} is published.", soft_wrap=True)
    _name_damaged_commits(run)
    if retry_rejects:
        _explain_rejects(run)
    _restore_report(config, run)
    _promote_last(config, run)


def _name_damaged_commits(run: Run) -> None:
    """Print the older commits that lack files: a rollback to them would fail."""
    from pipeline.errors import DataError, Removed
    from pipeline.index import tags
    from pipeline.index.commits import check_files, file_sizes

    damaged = []
    sizes = file_sizes(run)  # before the commits are listed: gc may remove some in the meantime
    for number in tags.list_commits(run):
        try:
            check_files(run, number, sizes)
        except Removed:
            continue
        except DataError:
            damaged.append(str(number))
    if damaged:
        names = ", ".join(damaged)
        text = f"But older commits are damaged or lack files: {names}; `fastfill repair` rebuilds what it can."
        console().print(text, soft_wrap=True)


def _explain_rejects(run: Run) -> None:
    """Print why rejects of published waves are not retried."""
    from pipeline.reporting.status import read_status

    rejected = read_status(run.uri)["rejected"]
    if rejected:
        console().print(
            f"The {rejected:,} rejects are not retried: their waves are published, and a published wave does not "
            "change. Correct the images and start a new run with `fastfill backfill --new-run`; `fastfill status` "
            "lists the rejects.",
            soft_wrap=True,
        )


def _restore_report(config: Config, run: Run) -> None:
    """Write the report if it is missing, or older than the last commit."""
    from jobs.shell.progress_bars import Bars
    from pipeline.planning.plan import read_plan
    from pipeline.reporting import report

    plan = read_plan(run)
    if plan is None or report.is_current(run):
        return
    console().print("But its report is missing, or older than the last commit: it is written again.")
    with Bars(console()) as bars:
        write_report(config, run, plan, bars)


def _promote_last(config: Config, run: Run) -> None:
    """Judge the last commit again if prod does not serve it: the gate's limits may have been changed.

    Raises:
        GateRefused: it is refused again.
    """
    from pipeline.backfill.promotion import Promotion
    from pipeline.index import commits, tags
    from pipeline.planning.plan import read_plan

    prod, candidate, plan = tags.read_tag(run, tags.PROD), tags.read_tag(run, tags.CANDIDATE), read_plan(run)
    if candidate is None or candidate.commit is None or plan is None or config.publish.promote == "manual":
        return
    if prod is not None and (prod.pinned or prod.commit == candidate.commit):
        return
    start_ray()
    promotion = Promotion(config, run, plan)
    commit = commits.read_commit(run, candidate.commit)
    promotion.settle(commit)
    promotion.finish(commit)
