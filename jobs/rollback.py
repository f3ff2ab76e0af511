"""`fastfill rollback`: move `prod` back to an earlier snapshot."""

from __future__ import annotations

import click

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import load


@command("rollback")
@click.option(
    "--to", type=int, help="Number of the snapshot to go back to; the default is the one that prod served before."
)
def main(config_path: str, overrides: tuple[str, ...], as_json: bool, to: int | None) -> None:
    """Move prod back to an earlier snapshot, and pin it there.

    No backfill moves prod until `fastfill promote`. A running backfill continues to publish snapshots.
    """
    from pipeline.config.identity import read_settings
    from pipeline.index import tags
    from pipeline.run import Run

    run = Run(load(config_path, overrides).run)
    read_settings(run)
    tag = tags.rollback(run, to)
    print_json({"prod": tag.commit, "pinned": tag.pinned}) if as_json else console().print(
        f"prod now serves commit {tag.commit} and is pinned to it until `fastfill promote`"
    )


if __name__ == "__main__":
    main()
