"""`fastfill audit`: check that a run is complete and undamaged."""

from __future__ import annotations

import sys

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import load


@command("audit")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check every file and image of a run for damage and loss.

    It reads all ids, checksums, segments, commits and tags. Exit code 0 if the run is whole, 1 if it is not.
    """
    from dataclasses import asdict

    from rich.text import Text

    from pipeline.reporting.audit import audit

    config = load(config_path, overrides)
    report = audit(config.run)
    if as_json:
        print_json(asdict(report))
    else:
        out = console()
        for problem in report.problems:
            details = f" {problem.where}\n  expected: {problem.expected}\n  found: {problem.found}"
            out.print(Text.assemble((problem.kind, "red"), details), soft_wrap=True)
        checked = ", ".join(f"{count:,} {what}" for what, count in report.checked.items())
        verdict = ("whole", "green") if report.ok else ("not whole", "bold red")
        out.print(Text.assemble(verdict, f": checked {checked}"))
        if not report.ok:
            remedy = "Stop the backfill, then run `fastfill repair`: it rebuilds damaged files from the remaining ones."
            out.print(remedy, soft_wrap=True)
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
