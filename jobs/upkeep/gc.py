"""`fastfill gc`: remove snapshots and files that are no longer needed."""

from __future__ import annotations

import click

from jobs.shell.command import Seconds, command, console, print_json
from jobs.shell.open_run import load
from pipeline.readable import counted


@command("gc")
@click.option(
    "--keep", default=3, show_default=True, type=click.IntRange(min=1), help="Keep this many of the newest snapshots."
)
@click.option(
    "--grace",
    default=3600.0,
    show_default=True,
    type=Seconds(min=0),
    metavar="SECONDS",
    help="For at least this many seconds, keep snapshots and files that none of the rules above keeps.",
)
@click.option("--dry-run", is_flag=True, help="Remove nothing; print what would be removed.")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool, keep: int, grace: float, dry_run: bool) -> None:
    """Remove snapshots and files that are no longer needed.

    \b
    These snapshots are kept:
    - every snapshot that a tag points to, and the snapshot that prod served
      before, for `rollback`
    - the newest snapshots (--keep)
    - snapshots that were the newest less than --grace seconds ago
    - snapshots that a reader has a lease on
    - all snapshots, as long as none is promoted

    The vector log, the plan and the transformed gallery are never removed. Index files without a snapshot are kept
    until the last wave is published: a running backfill may be about to use them.

    It is safe to run during a backfill, a promotion or a rollback, and while the index is being searched. After gc
    has run, `rollback` and `search` refuse removed snapshots, and `evaluate --curve` leaves them out. Curves in the
    report stay.
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
        out.print(f"commit {number} kept: {', '.join(reasons)}")
    commits = f"commits {', '.join(map(str, found.commits))}" if found.commits else "no commit"
    out.print(
        f"{'would remove' if dry_run else 'removed'} {commits}; {counted(found.files, 'index file')}, "
        f"{counted(found.leftovers, 'left-over file')}, {found.bytes / 1e6:,.1f} MB; "
        f"{counted(found.leases, 'expired lease')}"
    )


if __name__ == "__main__":
    main()
