"""`fastfill audit`: prove that a run is whole."""

from __future__ import annotations

import sys

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import load


@command("audit")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check every id, checksum, segment, commit and tag of a run; exit code 1 where something is wrong."""
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
            remedy = (
                "`fastfill repair` makes again what is damaged, as far as what is left allows; stop the backfill first"
            )
            out.print(remedy, soft_wrap=True)
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
