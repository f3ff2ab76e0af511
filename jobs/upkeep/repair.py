"""`fastfill repair`: rebuild files that `audit` finds damaged or missing."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import load
from jobs.shell.ray_session import start_ray

if TYPE_CHECKING:
    from pipeline.backfill.repair import Repair
    from pipeline.config.tree import EncodersSettings
    from pipeline.embedding.stream import StreamSettings
    from pipeline.planning.plan import Plan
    from pipeline.run import Run


@command("repair")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Rebuild files that `audit` finds damaged or missing.

    Stop the backfill first. Segments, sidecars and the codebook are rebuilt and compared with their commit's
    checksums. Damaged parts of the vector log are moved to `damaged/` in the run, and images of published waves are
    embedded again. Images of later waves are embedded by the next `fastfill backfill`. If a file cannot be rebuilt,
    a message says what to do.

    Exit code 0 if the run is whole, 1 if something is still damaged.
    """
    from pipeline.backfill.repair import Repair, repair
    from pipeline.config.identity import check_resumable, weight_fingerprints
    from pipeline.embedding.stream import StreamSettings
    from pipeline.index.train_codebook import train_for_run
    from pipeline.planning.plan import read_plan
    from pipeline.reporting.audit import audit
    from pipeline.run import Run

    config = load(config_path, overrides)
    run, done = Run(config.run), Repair()
    report = audit(config.run)
    if not report.ok:
        plan = None if any(item.where == run.plan for item in report.problems) else read_plan(run)
        if plan is not None:
            check_resumable(
                config, weight_fingerprints(config), all_inputs=False
            )  # images are embedded by the same weights

            def train() -> bytes:
                return train_for_run(
                    run, plan, config.index, config.gallery.metric, device=config.device, seed=config.seed
                )

            done = repair(run, plan, report.problems, train)
            _embed(run, plan, done, config.encoders, StreamSettings.of(config))
            report = audit(config.run)
    if as_json:
        print_json({"ok": report.ok, **asdict(done), "problems": [asdict(item) for item in report.problems]})
    else:
        _show(done, [f"{item.where}: expected {item.expected}, found {item.found}" for item in report.problems])
    sys.exit(0 if report.ok else 1)


def _embed(run: Run, plan: Plan, done: Repair, encoders: EncodersSettings, settings: StreamSettings) -> None:
    """Embed images of moved parts again: units of published waves, and images of manifests."""
    from jobs.shell.progress_bars import Bars
    from pipeline.backfill.repair import units_of
    from pipeline.embedding.precompute import embed_missing
    from pipeline.embedding.stream import Work, embed_stream
    from pipeline.index.tags import list_commits
    from pipeline.planning import log_pairs
    from pipeline.planning.plan import FROM_PAIRS

    published = max(list_commits(run), default=0)
    units = [unit for unit in units_of(run, plan, done) if FROM_PAIRS < unit.wave <= published]
    copied = any(wave == FROM_PAIRS for wave, _ in done.embed_again)
    if not units and not done.folders and not copied:
        return
    start_ray()
    with Bars(console()) as bars:
        total, count = sum(unit.images for unit in units), 0
        for _, ack in embed_stream([Work(encoders.new, plan.log(run), units)], settings):
            count += ack.embedded + ack.rejected
            bars.images("embed again", count, total)
        embed_missing(run, done.folders, encoders, settings, bars.images)
    log_pairs.write(run, plan)


def _show(done: Repair, problems: list[str]) -> None:
    out = console()
    for title, lines in (
        ("rebuilt", done.rebuilt),
        ("moved to damaged/", done.moved),
        ("embedded again, or by the next backfill", [_unit(*unit) for unit in done.embed_again]),
        ("not repaired", [f"{item.where}: {item.why}" for item in done.left]),
        ("still damaged", problems),
    ):
        for line in lines:
            out.print(f"{title}: {line}", soft_wrap=True, markup=False)
    out.print("the run is not whole" if problems else "the run is whole", markup=False)


def _unit(wave: int, unit: int) -> str:
    pairs = "" if wave else " (pairs of the fit: their embeddings are copied)"
    return f"wave {wave}, unit {unit}{pairs}"


if __name__ == "__main__":
    main()
