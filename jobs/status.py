"""`fastfill status`: the progress of a run, read from storage alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import load
from pipeline.readable import duration, moment
from pipeline.reporting.status import Pin, Status, damage_of_served, from_pairs_text, read_status

if TYPE_CHECKING:
    from pipeline.planning.plan import Plan
    from pipeline.run import Run


_TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "recall10": "recall of the 10 nearest",
    "negative_flips": "newly wrong answers",
    "group_gap": "gap between groups",
    "own": "stored vectors intact",
    "slot_share": "share of translated images in results (1 = even)",
}


@command("status")
def main(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show progress, rate, time left, quality and rejects of a run.

    It reads storage alone, and so works from any machine, also while a backfill runs.
    """
    from pipeline.config.identity import read_settings
    from pipeline.run import Run

    config = load(config_path, overrides)
    read_settings(Run(config.run))  # raises if there is no run
    status = read_status(config.run)
    print_json(status) if as_json else show(status, Run(config.run))


def show(status: Status, run: Run) -> None:
    """Print the status as a table."""
    from rich.table import Table
    from rich.text import Text

    from pipeline.planning.plan import read_plan

    plan = read_plan(run)
    table = Table(show_header=False, title=status["run"], title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    if status["gallery"] is None:
        table.add_row("plan", "not made yet: run `fastfill backfill`")
    else:
        table.add_row("gallery", f"{status['gallery']:,} images")
        table.add_row("published", f"{status['published']:,} ({status['fraction']:.1%})")
        table.add_row("durable", f"{status['durable']:,}")
        table.add_row("rejected", _rejected(status["rejected"], plan.num_rejected if plan else 0))
        table.add_row("wave", f"{status['wave']} of {status['waves']}")
        table.add_row("rate", _rate(status["images_per_second"]))
        table.add_row("time left", _left(status["eta_seconds"]))
    table.add_row("latest commit", _number(status["commit"], ""))
    table.add_row("prod", _number(status["prod"], "") + _pinned(status["pinned"]))
    damage = damage_of_served(run, status["prod"])
    if damage is not None:
        table.add_row("damaged", Text(damage))
    if status["prod_quality"] is not None:
        table.add_row(f"quality of commit {status['prod']} (prod)", _figures(status["prod_quality"]))
    if status["quality"] is not None and status["commit"] != status["prod"]:
        table.add_row(f"quality of commit {status['commit']} (latest)", _figures(status["quality"]))
    if status["refused"]:
        table.add_row("not promoted", "\n".join(status["refused"]))
    if status["stopped"] is not None:
        table.add_row("stopped by --stop-when", status["stopped"])
    console().print(table)
    if status["gallery"] is not None and status["from_pairs"]:
        console().print(from_pairs_text(status["from_pairs"], status["gallery"]), soft_wrap=True)
    _show_rejects(run, plan)


def _pinned(pin: Pin | None) -> str:
    if pin is None:
        return ""
    since = pin["since_unix_seconds"]
    when = "" if since is None else f" since {moment(since)}"
    return f", pinned by {pin['by']}{when}: later commits are not promoted until `{pin['unpin']}`"


def _figures(quality: dict[str, float]) -> str:
    """Figures on the probe set, in per cent except the ratio `slot_share`."""
    units = {name: f"{value:.2f}" if name == "slot_share" else f"{value:.1f} %" for name, value in quality.items()}
    return ", ".join(f"{_TITLES.get(name, name)} {value}" for name, value in units.items())


def _rejected(count: int, before_plan: int) -> str:
    lost = f", {before_plan:,} of them for the old encoder: these have no vector and are not served"
    return f"{count:,}{lost if before_plan else ''}"


def _show_rejects(run: Run, plan: Plan | None) -> None:
    from collections import Counter

    import pyarrow as pa
    from rich.table import Table

    from pipeline.embedding.reject_rules import read_all, read_of_pairs

    found = pa.concat_tables([read_all(run, plan.log(run) if plan else None), read_of_pairs(run)])
    if not found.num_rows:
        return
    rows = found.select(["stage", "reason", "uri"]).to_pylist()
    counts = Counter((row["stage"], row["reason"].partition(":")[0]) for row in rows)
    examples = {(row["stage"], row["reason"].partition(":")[0]): row for row in rows}
    table = Table("stage", "reason", "images", "for example", title="rejects", title_justify="left")
    for key, count in counts.most_common():
        table.add_row(*key, f"{count:,}", f"{examples[key]['uri']} ({examples[key]['reason']})")
    console().print(table)


def _number(value: float | None, unit: str) -> str:
    return "none yet" if value is None else f"{value:,.0f} {unit}".rstrip()


def _rate(images_per_second: float | None) -> str:
    if images_per_second is None:
        from pipeline.reporting.throughput import SHORTEST_SECONDS

        return f"none: less than {SHORTEST_SECONDS:g} seconds of work"
    return _number(images_per_second, "images/s over the last ten minutes of work")


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "unknown without a rate"
    return duration(seconds) if seconds else "none: no image is left"


if __name__ == "__main__":
    main()
