"""`fastfill fit`: training pairs, the transformation, and its figures on held-out pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.options import command, console, load, print_json, start_ray

if TYPE_CHECKING:
    from pipeline.transformation import TransformationInfo


@command("fit")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Fit the transformation from old to new embeddings, and measure it on held-out pairs.

    Where the pairs are given as images, both embeddings are computed first, once.
    """
    from dataclasses import asdict

    from jobs.bars import Bars
    from jobs.prepare import ensure_fit, open_run

    config = load(config_path, overrides)
    start_ray()
    with Bars(console()) as bars:
        run = open_run(config, bars)
        info = ensure_fit(config, run, bars)
    print_json(asdict(info)) if as_json else show(info)


def show(info: TransformationInfo) -> None:
    """Print the held-out figures as a table."""
    from rich.table import Table

    table = Table(title=f"{info.loss}, {info.num_train:,} pairs, measured on {info.num_held_out:,} held out")
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
            "[bold red]The transformed gallery is worse than the old one on held-out pairs: "
            "`promote` is blocked while transformed vectors are served.[/]"
        )


if __name__ == "__main__":
    main()
