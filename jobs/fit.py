"""`fastfill fit`: fit the transformation on training pairs and measure it on held-out pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import load
from jobs.shell.ray_session import start_ray
from jobs.shell.tables import say_outlook, show_distribution_shift

if TYPE_CHECKING:
    from pipeline.models.transformation import TransformationInfo
    from pipeline.planning.selection_result import Selection, TrialResult
    from pipeline.run import Run


@command("fit")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Fit the transformation from old to new embeddings.

    It is measured on held-out pairs. If the pairs are images, their old and new embeddings are
    computed first and stored.

    With `fit.transformation: auto`, the default, the simplest transformation is tried first, and others while time is
    left (`select.minutes`). A less simple one is chosen only if it is better by more than one standard error. The
    order of the backfill (`plan.policy: auto`) is chosen in the same way.
    """
    from dataclasses import asdict

    from jobs.shell.progress_bars import Bars
    from jobs.steps.prepare import RunSteps, open_run
    from pipeline.models.transformation import has_transformation
    from pipeline.planning.selection_result import read_selection

    config = load(config_path, overrides)
    start_ray()
    with Bars(console()) as bars:
        run = open_run(config, bars)
        steps = RunSteps(config, run, bars)
        if config.fit.transformation == "auto" and not has_transformation(run):
            steps.embed_for_fit()
        info = steps.fit()
    selection = read_selection(run)
    if as_json:
        print_json(asdict(info) | ({} if selection is None else {"selection": asdict(selection)}))
        return
    if selection is not None:
        show_selection(selection)
    show(info)
    say_outlook(info, selection, first_share(run))


def first_share(run: Run) -> float:
    """The share of the gallery whose new embeddings were computed as pairs of the fit."""
    from pipeline.manifest import normalised
    from pipeline.run import GALLERY_PAIRS

    gallery, sample = normalised.read_manifest(run, "gallery"), normalised.read_manifest(run, GALLERY_PAIRS)
    return 0.0 if gallery is None or sample is None else sample.num_rows / gallery.num_rows


def show_selection(selection: Selection, most: int = 8) -> None:
    """Print the best trial of each recipe in at most 80 columns, the chosen one marked; then the choice in words."""
    from rich.table import Table

    from pipeline.planning.selection_result import describe, recipe_name

    counts = " and ".join(selection.metrics)
    what = "the probe set" if selection.measured_on == "probe" else "held-out pairs"
    metrics = list(selection.chosen.area)
    shown_metrics = [name for name in ("top1", "map", "recall10") if name in metrics]
    table = Table(title=f"average over the migration, by {counts} on {what}, {selection.folds} folds, %")
    table.add_column("")
    for name in ("fit", "order"):
        table.add_column(name, overflow="fold")
    for name in (*shown_metrics, "start", "lowest", "behind"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in selection.best_of_each_recipe()[:most]:
        first = selection.metrics[0]
        table.add_row(
            "*" if row == selection.chosen else "",
            ", ".join([recipe_name(row.transformation, row.loss, row.lambda_disc), *ranked(row)]),
            row.policy,
            *(f"{row.area[name]:.1f}" for name in shown_metrics),
            f"{row.start[first]:.1f}",
            f"{row.lowest[first]:.1f}" if row.lowest else "",
            f"{row.behind:.1f} ± {row.behind_error:.1f}",
        )
    console().print(table)
    console().print(describe(selection), soft_wrap=True, highlight=False)
    show_distribution_shift(selection.likeness, selection.measured_on == "probe")


def ranked(candidate: TrialResult) -> list[str]:
    """How transformed vectors are ranked, if not in the usual way (calibrated, no offset)."""
    words = [] if candidate.calibrate else ["not calibrated"]
    return words + ([] if candidate.offset == "none" else [f"offset by {offset_of(candidate)}"])


def offset_of(candidate: TrialResult) -> str:
    """The offset with its strength, or `none`."""
    return candidate.offset + (f" {candidate.offset_strength:g}" if candidate.offset != "none" else "")


def show(info: TransformationInfo) -> None:
    """Print the held-out figures as a table."""
    from rich.table import Table

    kind = info.loss if info.kind == "fastfill" else f"{info.kind}, {info.loss}"
    table = Table(title=f"{kind}, {info.num_train:,} pairs, measured on {info.num_held_out:,} held out")
    for name in ("queries / gallery", "top-1", "top-5", "mAP"):
        table.add_column(name, justify="left" if name.startswith("queries") else "right")
    names = {"old_old": "old / old", "transformed": "new / transformed", "new_new": "new / new"}
    for key, title in names.items():
        figures = info.held_out.get(key)
        if isinstance(figures, dict) and "top1" in figures:
            table.add_row(title, *(f"{figures[name]:.1f}" for name in ("top1", "top5", "map")))
    console().print(table)


if __name__ == "__main__":
    main()
