"""Tables that more than one command prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.shell.command import console

if TYPE_CHECKING:
    from pipeline.models.transformation import TransformationInfo
    from pipeline.planning.distribution_shift import DistributionShift
    from pipeline.planning.selection_result import Selection


def show_curve(result: dict[str, Any]) -> None:  # Any: JSON, see `evaluation.curve`
    """Print the average quality over the migration, per order, and both ends."""
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
    row("start: all transformed", next(iter(orders.values()))["points"][0])
    for name, order in orders.items():
        row(f"average, {name} order", order["area"], order.get("area_std"))
    row("new / new", result["new_new"])
    console().print(table)


def say_outlook(info: TransformationInfo, selection: Selection | None, first: float = 0.0) -> None:
    """If the transformed gallery is worse than the old one, print when that changes and what would help.

    `first` is the share of the gallery that the first snapshot has embedded, as pairs of the fit.
    """
    if info.better_than_old:
        return
    fraction = None if selection is None else selection.passes_old()
    if fraction is not None and fraction <= first:
        text = "The first snapshot is expected to be about as good as the old system."
        console().print(text, soft_wrap=True, highlight=False)
        return
    if fraction is None:
        when = "no snapshot is expected to be better" if selection is not None else "the time of that is not known"
    else:
        when = f"that is expected at about {fraction:.0%} of the gallery"
    text = (
        "The first snapshot is expected to be worse than the old system. `prod` keeps serving the old system until a "
        f"snapshot is better; {when}."
    )
    console().print(text, style="bold yellow", soft_wrap=True, highlight=False)
    if info.kind != "fastfill":
        console().print(_more_pairs(info), soft_wrap=True, highlight=False)


def _more_pairs(info: TransformationInfo) -> str:
    if info.pairs_to_pass_old is None:
        return "More training pairs alone are not expected to change that."
    return (
        f"With about {info.pairs_to_pass_old:,} training pairs instead of {info.num_train:,}, the first snapshot is "
        "expected to be as good as the old system."
    )


def show_distribution_shift(found: DistributionShift | None, known: bool = False) -> None:
    """Warn if the pairs do not look like the gallery; `known` as in `DistributionShift.warnings`."""
    for sentence in () if found is None else found.warnings(known):
        console().print(sentence, style="bold red", soft_wrap=True, highlight=False)
