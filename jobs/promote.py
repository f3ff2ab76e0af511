"""`fastfill promote`: make `prod` serve another snapshot."""

from __future__ import annotations

import click

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import load


@command("promote")
@click.option("--commit", type=int, help="Number of the snapshot to serve; the default is the latest one.")
@click.option("--force", is_flag=True, help="Serve it even if the gate refuses it.")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool, commit: int | None, force: bool) -> None:
    """Make prod serve a snapshot, and unpin prod.

    A rollback pins prod. After `promote`, a running backfill promotes its next snapshots again.

    \b
    The command is refused (exit code 3) if
    - the gate refuses the snapshot by its figures on the probe set,
    - the snapshot has not been measured on the probe set yet, or
    - it still serves transformed vectors, and these are worse than the old
      model on held-out pairs.
    """
    from pipeline.config.identity import read_settings
    from pipeline.evaluation import quality
    from pipeline.evaluation.gate import blockers
    from pipeline.index import commits, tags
    from pipeline.run import Run

    config = load(config_path, overrides)
    run = Run(config.run)
    read_settings(run)
    candidate = tags.read_tag(run, tags.CANDIDATE)
    number = commit if commit is not None or candidate is None else candidate.commit
    reasons = (
        blockers(run, commits.read_commit(run, number), config.gate, probed=config.probe.images > 0)
        if number is not None
        else []
    )
    before = tags.read_tag(run, tags.PROD)
    tag = tags.promote(run, number, blockers=reasons, force=force)
    if tag.commit is not None:
        quality.keep_best(run, tag.commit, before.commit if before else None, anew=bool(reasons))
    if as_json:
        print_json({"prod": tag.commit, "previous": tag.previous})
    elif before is not None and before.commit == tag.commit:
        console().print(f"prod already serves commit {tag.commit}")
    else:
        previous = "none" if tag.previous is None else tag.previous
        console().print(f"prod now serves commit {tag.commit} (before: {previous})")


if __name__ == "__main__":
    main()
