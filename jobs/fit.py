"""`fastfill fit`: training pairs, the transformation, and its figures on held-out pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.options import command, console, load, print_json, start_ray

if TYPE_CHECKING:
    from pipeline.selection import Candidate, Selection
    from pipeline.shift import Likeness
    from pipeline.transformation import TransformationInfo


@command("fit")
@click.option("--select", "selecting", is_flag=True, help="Choose loss, offset and order by measurement first.")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool, selecting: bool) -> None:
    """Fit the transformation from old to new embeddings, and measure it on held-out pairs.

    Where the pairs are given as images, both embeddings are computed first, once. With --select, or a `select`
    section in the config, losses, offsets and orders are tried on held-out pairs, or on the probe set, and the best
    ones are taken; `plan.policy: selected` then takes the order.
    """
    from dataclasses import asdict

    from jobs.bars import Bars
    from jobs.prepare import ensure_fit, ensure_probe, open_run
    from pipeline.config import Select
    from pipeline.selection import read_selection
    from pipeline.transformation import has_transformation

    config = load(config_path, overrides)
    if selecting and config.select is None:
        config = config.model_copy(update={"select": Select()})
    start_ray()
    with Bars(console()) as bars:
        run = open_run(config, bars)
        fitted_before = has_transformation(run)
        if config.select is not None and not fitted_before:
            ensure_probe(config, run, bars)
        info = ensure_fit(config, run, bars)
    selection = read_selection(run)
    if as_json:
        print_json(asdict(info) | ({} if selection is None else {"selection": asdict(selection)}))
        return
    if fitted_before and config.select is not None and selection is not None:
        console().print("This run's transformation was there already; this is what it was chosen by:")
    if selection is not None:
        show_selection(selection)
        if config.plan.policy != "selected":
            text = f"plan.policy is {config.plan.policy}: set it to selected to take {selection.chosen.policy}"
            console().print(text, soft_wrap=True)
    elif config.select is not None:
        console().print("This run has a transformation that was not selected; `--set run=` starts another.")
    show(info)


def show_selection(selection: Selection, most: int = 12) -> None:
    """Print the best candidates, the chosen one marked."""
    from rich.table import Table

    counts = " and ".join(selection.metrics)
    names = list(selection.chosen.area)
    what = "the probe set" if selection.measured_on == "probe" else "held-out pairs"
    title = f"{len(selection.candidates)} candidates by the area of {counts} on {what}, {selection.folds} folds"
    table = Table(title=title)
    for name in ("", "loss", "width", "epochs", "offset", "order"):
        table.add_column(name)
    for name in (*names, "start", "to 95 %", "behind"):
        table.add_column(name, justify="right")
    shown = selection.candidates[:most]
    for row in shown if selection.chosen in shown else (*shown, selection.chosen):
        first = selection.metrics[0]
        table.add_row(
            "*" if row == selection.chosen else "",
            loss_of(row),
            str(row.inner_width),
            "" if row.epochs is None else str(row.epochs),
            offset_of(row),
            row.policy,
            *(f"{row.area[name]:.1f} ± {row.area_std[name]:.1f}" for name in names),
            f"{row.start[first]:.1f}",
            f"{row.fraction95[first]:.0%}",
            f"{row.behind:.2f} ± {row.behind_error:.2f}",
        )
    console().print(table)
    console().print(f"Chosen: {describe(selection.chosen)}.", soft_wrap=True, highlight=False)
    show_likeness(selection.likeness, selection.measured_on == "probe")


def show_likeness(found: Likeness | None, known: bool = False) -> None:
    """Warn where the pairs do not look like the gallery; `known` as in `Likeness.warnings`."""
    for sentence in () if found is None else found.warnings(known):
        console().print(sentence, style="bold red", soft_wrap=True, highlight=False)


def describe(chosen: Candidate) -> str:
    """The settings of a candidate in one line, which no terminal is too narrow for."""
    offset = "no offset" if chosen.offset == "none" else f"offset by {offset_of(chosen)}"
    epochs = "" if chosen.epochs is None else f"{chosen.epochs} epochs, "
    settings = f"width {chosen.inner_width}, {epochs}{offset}, in the order {chosen.policy}"
    return f"{loss_of(chosen)}, {settings}"


def loss_of(candidate: Candidate) -> str:
    """The loss, with the weight of its discriminative term where it has one."""
    from training.losses import needs_labels

    return candidate.loss + (f" {candidate.lambda_disc:g}" if needs_labels(candidate.loss) else "")


def offset_of(candidate: Candidate) -> str:
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
    if not info.better_than_old:
        console().print(
            "The transformed gallery is worse than the old one on held-out pairs: "
            "`promote` is blocked while transformed vectors are served.",
            style="bold red",
        )


if __name__ == "__main__":
    main()
