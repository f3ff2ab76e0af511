"""`fastfill backfill`: everything that is not done yet, up to the last wave and the report."""

from __future__ import annotations

import click

from jobs.shell.command import command, console
from jobs.shell.open_run import load
from jobs.shell.ray_session import start_ray
from jobs.steps.run_all import (
    check_served,
    finish,
    promote_last,
    restore_report,
    run_all,
    say_what_older_commits_lack,
    say_what_stays,
)

_STOP_WHEN = """Stop once this is so, and keep all; may be given more than once, and any suffices. top1, top5 or
recall10 on the probe set, in per cent or as a share of the full new model's (top1>=0.99*full); fraction>=0.3 of the
gallery; hours>=2 or money>=150 since the command began. The same command without it goes on."""


@command("backfill")
@click.option("--retry-rejects", is_flag=True, help="Embed again what was rejected in waves not yet published.")
@click.option("--new-run", is_flag=True, help="Start a run beside the one that is there, under RUN-2, RUN-3, ...")
@click.option("--stop-when", multiple=True, metavar="EXPRESSION", help=_STOP_WHEN)
def main(
    config_path: str,
    overrides: tuple[str, ...],
    as_json: bool,
    retry_rejects: bool,
    new_run: bool,
    stop_when: tuple[str, ...],
) -> None:
    """Do everything that is not done yet: fit, plan, embed and publish wave by wave, write the report.

    Safe to run again at any time, after any failure, with the same config. Each snapshot is measured on the probe set
    before prod moves; one that the gate refuses ends the backfill with exit code 3, and prod stays where it is. So does
    one that later waves may mend, where it is the last one or --stop-when ends the backfill there.
    """
    from jobs.shell.progress_bars import Bars
    from pipeline.backfill import stop
    from pipeline.reporting.status import is_complete

    config = load(config_path, overrides, new_run=new_run)
    conditions = [stop.parse(text) for text in stop_when]
    stop.check(conditions, config.probe, config.gallery.columns, config.telemetry)
    if new_run:
        console().print(f"A new run; every other command finds it with --set run={config.run}", soft_wrap=True)
    if complete := is_complete(config):
        check_served(config)
        console().print(f"Nothing to do: every wave of {config.run} is published.", soft_wrap=True)
        say_what_older_commits_lack(config)
        if retry_rejects:
            say_what_stays(config)
        restore_report(config)
        promote_last(config)
    else:
        start_ray()
        with Bars(console()) as bars:
            run_all(config, bars, retry_rejects, stop.Stop(conditions))
    finish(config, as_json)
    if complete:
        console().print("The sizes of the served files are right; `fastfill audit` proves the files.", soft_wrap=True)


if __name__ == "__main__":
    main()
