"""`fastfill plan`: transform and score the gallery, cut it into waves, and estimate time, cost and quality."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.shell.command import Seconds, command, console, print_json
from jobs.shell.open_run import load
from jobs.shell.ray_session import start_ray
from jobs.shell.tables import say_outlook, show_distribution_shift

if TYPE_CHECKING:
    from pipeline.backfill.estimate import Estimate
    from pipeline.planning.plan import Plan
    from training.forecast import Outlook


@command("plan")
@click.option(
    "--measure",
    "seconds",
    default=30.0,
    show_default=True,
    type=Seconds(min=0),
    metavar="SECONDS",
    help="Embed a sample for this long to estimate time and cost; 0 skips it.",
)
def main(config_path: str, overrides: tuple[str, ...], as_json: bool, seconds: float) -> None:
    """Plan the waves; estimate time, cost and quality of the backfill.

    The transformation is fitted first if it is not yet. Then the gallery is transformed, scored and cut into waves.

    A sample of the images is read, decoded and embedded by this command, to estimate images, bytes, time, machine
    hours and money, and to recommend settings. These embeddings are not kept. Nothing is published.

    With a probe set, the expected quality during the backfill is estimated too.
    """
    from dataclasses import asdict

    from jobs.shell.progress_bars import Bars
    from jobs.steps.prepare import RunSteps, open_run
    from pipeline.backfill.profile import profile
    from pipeline.planning.selection_result import read_selection
    from training.forecast import distribution_shift_of, expected_curve

    config = load(config_path, overrides)
    start_ray()
    found = None
    with Bars(console()) as bars:
        run = open_run(config, bars)
        steps = RunSteps(config, run, bars)
        steps.embed()
        info, plan = steps.fit(), steps.plan()
        with bars.step("expect"):
            outlook, alike = expected_curve(config, run, plan), distribution_shift_of(config, run, plan)
        if seconds:
            whole = max(1, round(seconds))
            found = profile(
                config,
                run,
                plan,
                seconds,
                lambda done, what: bars.images("measure", min(int(done), whole), whole, what),
            )
            bars.images("measure", whole, whole)
    if as_json:
        expected = {name: curve.to_json() for name, curve in outlook.curves.items()}
        print_json(
            asdict(plan)
            | {"expected": expected, "expected_notes": outlook.notes}
            | {"expected_made_unix_seconds": outlook.made_unix_seconds}
            | {"likeness": asdict(alike) if alike else None}
            | ({"estimate": found.to_json()} if found else {})
        )
        return
    show(plan)
    if found:
        show_estimate(found)
    first = plan.num_from_pairs / plan.num_gallery
    if outlook.curves:
        show_expected(outlook, found, first)
    for note in outlook.notes:
        console().print(note, soft_wrap=True)
    selection = read_selection(run)
    show_distribution_shift(alike, selection is not None and selection.measured_on == "probe")
    say_outlook(info, selection, first)


def show(plan: Plan) -> None:
    """Print the waves as a table."""
    from rich.table import Table

    from pipeline.planning.plan import FROM_PAIRS
    from pipeline.reporting.status import from_pairs_text

    table = Table(title=f"{plan.num_gallery:,} images, order: {plan.policy}, {plan.num_shards} shards")
    for name in ("wave", "images", "units", "fraction"):
        table.add_column(name, justify="right")
    done = 0
    for wave in plan.waves:
        done += wave.images
        name = "pairs" if wave.wave == FROM_PAIRS else str(wave.wave)
        table.add_row(name, f"{wave.images:,}", f"{wave.units:,}", f"{done / plan.num_gallery:.1%}")
    console().print(table)
    if plan.num_from_pairs:
        console().print(from_pairs_text(plan.num_from_pairs, plan.num_gallery), soft_wrap=True)
    if plan.num_rejected:
        console().print(
            f"{plan.num_rejected:,} images are not in the plan, because they could not be read for the old encoder; "
            "`fastfill status` lists the reasons"
        )


def show_estimate(found: Estimate) -> None:
    """Print the estimated time and cost, the measured rates, and the recommended settings."""
    from rich.table import Table

    from pipeline.readable import duration, moment

    rates, out = found.rates, console()
    money = "" if found.money is None else f", {found.money:,.2f} in money"
    table = Table.grid(padding=(0, 2))
    table.add_row("to embed", f"{found.images:,} images, {found.bytes / 1e9:,.2f} GB to fetch")
    table.add_row(
        "time",
        f"{duration(found.seconds)} on this cluster as configured, at {rates.stream:,.0f} images per second",
    )
    hours = f"{found.gpu_hours:,.2f} GPU hours, " if rates.gpus else ""
    table.add_row("cost", f"{hours}{found.node_hours:,.2f} node hours{money}")
    decoder, loads = ("device", "read") if rates.decodes_on_device else ("core", "read and decode")
    each = f"{rates.forward[found.batch_size]:,.0f} images/s per actor on {rates.device}"
    table.add_row(
        "measured",
        f"fetch {rates.fetch:,.0f} images/s per task, decode {rates.decode:,.0f} per {decoder}, forward {each}; "
        f"{rates.images:,} images through {rates.actors} actors, on {moment(found.made_unix_seconds)}",
    )
    table.add_row("bottleneck", found.bottleneck)
    table.add_row(
        "recommended",
        f"backfill.batch_size={found.batch_size} backfill.max_actors={found.max_actors}, and for each actor "
        f"{found.loading_cpus_per_actor:g} cores that {loads}",
    )
    out.print(table)


def show_expected(outlook: Outlook, estimate: Estimate | None, start: float = 0.0) -> None:
    """Print the expected quality at both ends, and the fraction and cost at 95 and 99 % of the final quality.

    Args:
        start: the fraction that is embedded in the first snapshot.
    """
    import numpy as np
    from rich.table import Table

    from pipeline.planning.expected_curve import BAND_SAYS
    from pipeline.readable import duration, moment

    made = "" if outlook.made_unix_seconds is None else f", estimated on {moment(outlook.made_unix_seconds)}"
    table = Table(title=f"expected quality in %, {BAND_SAYS}{made}")
    for name in ("metric", "translated now", "fully re-embedded", "95 % of the final", "99 % of the final"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, curve in outlook.curves.items():
        sides = [
            [np.interp(at, curve.fractions, side) for side in (curve.values, curve.low, curve.high)]
            for at in (start, 1)
        ]
        ends = [f"{value:.1f} ({low:.1f} - {high:.1f})" for value, low, high in sides]
        costs = []
        for reached in curve.reached.values():
            fraction, low, high = (max(start, item) for item in (reached.fraction, reached.low, reached.high))
            cost = f"after {fraction:.0%} ({low:.0%} - {high:.0%})"
            if estimate is not None:
                share = (fraction - start) / (1 - start)  # of the images still to embed
                cost += f", {duration(estimate.seconds * share)}"
                cost += "" if estimate.money is None else f", {estimate.money * share:,.2f} in money"
            costs.append(cost)
        table.add_row(name, *ends, *costs)
    console().print(table)


if __name__ == "__main__":
    main()
