"""`fastfill backfill`: run every step that is not done yet, up to the last wave and the report."""

from __future__ import annotations

import click

from jobs.shell.command import command, console
from jobs.shell.open_run import load
from jobs.shell.ray_session import start_ray
from jobs.steps.finished_run import check_finished_run
from jobs.steps.run_all import print_result, run_all

_STOP_WHEN = """Stop as soon as the condition holds; finished work is kept. top1>=80 (or top5, recall10) is the quality
on the probe set, in per cent. top1>=0.99*full is a share of what the full new model is expected to reach.
fraction>=0.3 is the share of the gallery that is re-embedded. hours>=2 is the time since this command began.
money>=150 is what it has cost since then. Repeat the option for several conditions: the first one met stops the run.
To continue, run the command without it."""


@command("backfill")
@click.option("--retry-rejects", is_flag=True, help="Retry rejected images of waves not yet published.")
@click.option(
    "--new-run",
    is_flag=True,
    help="Start a new run beside the old one, under the path in `run` with -2, -3, ... added.",
)
@click.option("--stop-when", multiple=True, metavar="EXPRESSION", help=_STOP_WHEN)
def main(
    config_path: str,
    overrides: tuple[str, ...],
    as_json: bool,
    retry_rejects: bool,
    new_run: bool,
    stop_when: tuple[str, ...],
) -> None:
    """Run every step that is not done yet, wave by wave.

    The steps are: fit, plan, embed and publish each wave, write the report. It is safe to run the same command again
    at any time, also after a failure.

    Each snapshot is measured on the probe set before it is promoted to prod. If the gate refuses a snapshot, the
    backfill stops with exit code 3 and prod does not move. The exit code is also 3 if the
    command ends with a snapshot that the gate refused.
    """
    from jobs.shell.progress_bars import Bars
    from pipeline.backfill import stop
    from pipeline.reporting.status import is_complete

    config = load(config_path, overrides, new_run=new_run)
    conditions = [stop.parse(text) for text in stop_when]
    stop.check(conditions, config.probe, config.gallery.columns, config.telemetry)
    if new_run:
        console().print(f"New run: pass --set run={config.run} to the other commands.", soft_wrap=True)
    if complete := is_complete(config):
        check_finished_run(config, retry_rejects)
    else:
        start_ray()
        with Bars(console()) as bars:
            run_all(config, bars, retry_rejects, stop.Stop(conditions))
    print_result(config.run, as_json)
    if complete:
        text = "The served files have the right sizes; `fastfill audit` also checks their contents."
        console().print(text, soft_wrap=True)


if __name__ == "__main__":
    main()
