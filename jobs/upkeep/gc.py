"""`fastfill gc`: remove the snapshots and files that nobody needs."""

from __future__ import annotations

import click

from jobs.shell.command import Seconds, command, console, print_json
from jobs.shell.open_run import load
from pipeline.readable import counted


@command("gc")
@click.option("--keep", default=3, show_default=True, type=click.IntRange(min=1), help="The last snapshots to keep.")
@click.option(
    "--grace",
    default=3600.0,
    show_default=True,
    type=Seconds(min=0),
    metavar="SECONDS",
    help="How long what nobody needs stays: snapshots that were the latest, files without a snapshot, temporary files.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing; print what would be removed now.")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool, keep: int, grace: float, dry_run: bool) -> None:
    """Remove snapshots that no tag, no reader and no rule keeps, and the files that only they name.

    Kept are: what every tag points to, and what prod pointed to before (for `rollback`); the last --keep
    snapshots; those that a live reader has a lease on; and, while nothing is promoted, all of them. The vector
    log, the run's plan and its transformed gallery are never touched. Files that no snapshot ever named are left
    alone until the last wave is published: the backfill may be about to use them.

    Safe beside a running backfill, promote, rollback and readers, and safe to run again. `rollback` and
    `search` refuse a snapshot that is gone, and `evaluate --curve` measures only those that are left; a curve
    that is in the report already stays there.
    """
    from dataclasses import asdict

    from pipeline.config.identity import read_settings
    from pipeline.index.gc import Rules, collect_garbage
    from pipeline.run import Run

    config = load(config_path, overrides)
    read_settings(Run(config.run))
    found = collect_garbage(config.run, Rules(keep, grace), dry_run)
    if as_json:
        print_json(asdict(found))
        return
    out = console()
    for number, reasons in found.kept.items():
        out.print(f"commit {number} stays: {', '.join(reasons)}")
    commits = f"commits {', '.join(map(str, found.commits))}" if found.commits else "no commit"
    out.print(
        f"{'would remove' if dry_run else 'removed'} {commits}; {counted(found.files, 'index file')}, "
        f"{counted(found.leftovers, 'left-over file')}, {found.bytes / 1e6:,.1f} MB; "
        f"{counted(found.leases, 'expired lease')}"
    )


if __name__ == "__main__":
    main()
