"""`fastfill`: every command, in groups. Importing the commands imports nothing heavy."""

from __future__ import annotations

import click

from jobs import backfill, demo, evaluate, export, fit, manifest, plan, promote, rollback, search, status
from jobs.shell.failures import Group
from jobs.upkeep import audit, gc, repair


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fastfill")
def main() -> None:
    """Migrate an image-retrieval gallery to a new embedding model, most uncertain images first.

    `fastfill backfill` runs every step; the other commands run single steps, or use the result.
    """


main.add_section("Start", demo.main, manifest.main)
main.add_section("Run", backfill.main, fit.main, plan.main)
main.add_section("Look", status.main, evaluate.main)
main.add_section("Serve", search.main, promote.main, rollback.main, export.main)
main.add_section("Keep house", audit.main, repair.main, gc.main)


if __name__ == "__main__":
    main()
