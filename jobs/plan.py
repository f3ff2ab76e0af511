"""`fastfill plan`: transform and score the gallery, cut the waves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.options import command, console, load, print_json, start_ray

if TYPE_CHECKING:
    from pipeline.plan import Plan


@command("plan")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Transform and score the gallery, and cut it into waves; fits the transformation first where needed.

    No image of the gallery is read, but where its old embeddings are not given.
    """
    from dataclasses import asdict

    from jobs.bars import Bars
    from jobs.prepare import ensure_fit, ensure_plan, open_run

    config = load(config_path, overrides)
    start_ray()
    with Bars(console()) as bars:
        run = open_run(config, bars)
        ensure_fit(config, run, bars)
        plan = ensure_plan(config, run, bars)
    print_json(asdict(plan)) if as_json else show(plan)


def show(plan: Plan) -> None:
    """Print the waves as a table."""
    from rich.table import Table

    table = Table(title=f"{plan.num_gallery:,} images, order: {plan.policy}, {plan.num_shards} shards")
    for name in ("wave", "images", "units", "fraction"):
        table.add_column(name, justify="right")
    done = 0
    for wave in plan.waves:
        done += wave.images
        table.add_row(str(wave.wave), f"{wave.images:,}", f"{wave.units:,}", f"{done / plan.num_gallery:.1%}")
    console().print(table)
    if plan.num_rejected:
        console().print(
            f"{plan.num_rejected:,} images are not in the plan: the old encoder cannot read them; see `fastfill status`"
        )


if __name__ == "__main__":
    main()
