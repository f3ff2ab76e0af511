"""`fastfill evaluate`: the quality of a run's snapshots, and its backfilling curve."""

from __future__ import annotations

from typing import Any

import click

from jobs.options import command, console, load, open_run_of, print_json


@command("evaluate")
@click.option("--curve", "whole_curve", is_flag=True, help="The whole curve, per order, and every published snapshot.")
@click.option("--commit", type=int, help="One snapshot; the one that prod serves where neither is given.")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool, whole_curve: bool, commit: int | None) -> None:
    """Measure a snapshot, or the whole backfilling curve, with the gallery as queries (self-match removed).

    Needs labels in the gallery, and the new model's embeddings of all labelled images, for these are the
    queries: a finished backfill, or gallery.columns.new_embedding, which give the curve of a plan before it is run.
    """
    from pipeline.curve import curve, published_point

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


def show_curve(result: dict[str, Any]) -> None:  # Any: the JSON shape of DESIGN section 5
    """Print the areas of each order as a table."""
    from rich.table import Table

    table = Table(title=f"{result['num_queries']:,} queries, {result['num_gallery']:,} images, {result['distance']}")
    for name in ("", "top-1", "top-5", "mAP"):
        table.add_column(name, justify="left" if not name else "right")
    names = ("top1", "top5", "map")

    def row(title: str, figures: dict[str, float], spread: dict[str, float] | None = None) -> None:
        cells = [f"{figures[name]:.1f}" + (f" ± {spread[name]:.1f}" if spread else "") for name in names]
        table.add_row(title, *cells)

    row("old / old", result["old_old"])
    orders = result["orders"]
    row("fraction 0: all transformed", next(iter(orders.values()))["points"][0])
    for name, order in orders.items():
        row(f"area, {name} order", order["area"], order.get("area_std"))
    row("new / new", result["new_new"])
    console().print(table)


if __name__ == "__main__":
    main()
