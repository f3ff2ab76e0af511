"""`fastfill`: every command under one name. The modules it lists import nothing heavy."""

from __future__ import annotations

import click

from jobs import backfill, demo, evaluate, export, fit, manifest, plan, promote, rollback, search, status
from jobs.shell.failures import Group
from jobs.upkeep import audit, gc, repair


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fastfill")
def main() -> None:
    """Move an image-retrieval gallery to a new embedding model, most uncertain images first.

    `backfill` does everything; the other commands are its steps, and what you do with the result.
    """


for module in (
    demo,
    manifest,
    fit,
    plan,
    backfill,
    status,
    search,
    evaluate,
    promote,
    rollback,
    export,
    audit,
    repair,
    gc,
):
    main.add_command(module.main)


if __name__ == "__main__":
    main()
