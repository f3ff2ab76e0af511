"""`fastfill evaluate`: measure a run's snapshots, or its whole backfilling curve."""

from __future__ import annotations

import click

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import load, open_run_of
from jobs.shell.tables import show_curve


@command("evaluate")
@click.option(
    "--curve",
    "whole_curve",
    is_flag=True,
    help="Measure the curve under several orders, and also each published snapshot.",
)
@click.option("--commit", type=int, help="Number of the snapshot to measure; the default is the one that prod serves.")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool, whole_curve: bool, commit: int | None) -> None:
    """Measure the quality of a snapshot, or the whole curve.

    The gallery's images are the queries; a query's own image is removed from its results. Needs labels, and the new
    embedding of each labelled image. So run this command after the backfill has finished, or name a column of existing
    new embeddings (`gallery.columns.new_embedding`) to preview the curve.
    """
    from pipeline.evaluation.curve import curve
    from pipeline.evaluation.snapshot_metrics import published_point

    config = load(config_path, overrides)
    run = open_run_of(config)
    if whole_curve:
        result = curve(config, run)
        print_json(result) if as_json else show_curve(result)
        return
    point = published_point(run, commit)
    print_json(point) if as_json else show_point(point)


def show_point(point: dict[str, int | float]) -> None:
    """Print the figures of one snapshot as a table."""
    from rich.table import Table

    table = Table(
        title=f"commit {point['commit']}, {point['fraction']:.1%} backfilled, {point['num_queries']:,} queries",
        title_justify="left",
    )
    titles = {"top1": "top-1", "top5": "top-5", "map": "mAP", "recall10": "recall of the 10 nearest"}
    for title in titles.values():
        table.add_column(title, justify="right")
    table.add_row(*(f"{point[name]:.1f}" for name in titles))
    console().print(table)


if __name__ == "__main__":
    main()
