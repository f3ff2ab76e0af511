"""The tables of docs/scaling.md: formulas over measured figures, evaluated for units of three sizes.

The formula that is printed is the one that is computed. Its names are the constants below and the figures of
`benchmarks/results/*-scaling.json`; the cost of fetching is in `rates.json`. A test compares the document with the
output.

    python -m benchmarks.scale.arithmetic
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.manifest.normalised import PARTITION_ROWS
from pipeline.planning.plan import UNITS_PER_FILE
from pipeline.storage.objects import PARALLEL_READS

FIGURES = Path(__file__).parents[1] / "results" / "2026-11-24-scaling.json"
RATES = Path(__file__).parent / "rates.json"
UNIT_IMAGES = (256, 2_048, 8_192)
CONSTANTS = {
    "N": 1e9,  # images
    "W": 100.0,  # waves; wave w has a share of w / (1 + ... + W)
    "S": 64.0,  # shards
    "D": 128.0,  # width of the vectors
    "last": 2 / 101,  # the last wave's share: W / (1 + ... + W)
    "F": float(UNITS_PER_FILE),  # units in a units file
    "threads": float(PARALLEL_READS),  # reads that wait for the store at once
    "R": 4_510.0,  # sealing tasks on each side of the run: a wave's shards, together up to 128 MiB of vectors
    "R_log": 57.0,  # sealing tasks of a wave, in the mean over the units
    "latency": 0.1,  # s to the first byte of an object: assumed, see rates.json
    "get": 0.0004 / 1_000,  # US$ of one GET or HEAD, S3 Standard in us-east-1
    "put": 0.005 / 1_000,  # US$ of one PUT or LIST
}
DERIVED = {"U": "N / u", "P": f"N / {PARTITION_ROWS}"}  # units; parts of gallery/ and transformed/

Row = tuple[str, str, str]
TABLES: dict[str, list[Row]] = {
    "Counts and bytes": [
        ("units", "U", ""),
        ("units of the last wave", "last * U", ""),
        ("parts of `transformed/`", "P", ""),
        ("segments of a snapshot", "W * S", ""),
        ("images as fetched, at 100 kB", "N * 1e5", "B"),
        ("`gallery/`, old embeddings of 128 float32, at least", "N * 4 * D", "B"),
        ("`transformed/`", "N * transformed_row_bytes + P * transformed_footer_bytes", "B"),
        ("of which footers", "P * transformed_footer_bytes", "B"),
        ("`plan/`", "N * units_row_bytes + U * units_footer_bytes", "B"),
        ("a units file", "F * (u * units_row_bytes + units_footer_bytes)", "B"),
        ("of which its footer, read for every unit", "F * units_footer_bytes", "B"),
        ("`embedded/`", "N * log_row_bytes", "B"),
        ("segments of one snapshot, PQ32", "N * segment_vector_bytes + W * S * (segment_fixed_bytes + 8 * 28672)", "B"),
        ("written over the run: each segment twice", "2 * (N * (segment_vector_bytes + sidecar_row_bytes))", "B"),
        ("the largest segment, PQ32", "last * N / S * segment_vector_bytes", "B"),
        ("the largest segment, Flat", "last * N / S * (4 * D + 8)", "B"),
        ("sidecars of one snapshot", "N * sidecar_row_bytes", "B"),
        ("a commit", "W * S * commit_segment_bytes", "B"),
        ("all commits", "(W + 1) * W * S * commit_segment_bytes", "B"),
    ],
    "Requests and money": [
        ("GETs of images, one object each", "N", ""),
        ("their price", "N * get", "US$"),
        ("PUTs and HEADs of the log", "U * log_write_requests", ""),
        ("their price, at that of a PUT", "U * log_write_requests * put", "US$"),
        ("requests to units files", "U * units_read_requests", ""),
        ("bytes of footers of units files", "U * F * units_footer_bytes", "B"),
        ("parts opened of `transformed/`, both sealings", "2 * R * P", ""),
        ("their requests, at least", "2 * R * P * transformed_cell_requests", ""),
        ("their price", "2 * R * P * transformed_cell_requests * get", "US$"),
        ("bytes of footers that come with them", "2 * R * P * transformed_footer_bytes", "B"),
        ("parts opened of the log", "R_log * U", ""),
        ("their price, at least", "R_log * U * log_read_requests * get", "US$"),
        ("a listing of the log", "U / 1000", "LISTs"),
        ("how long it takes, 16 waves at once", "U / 1000 * latency / threads", "s"),
    ],
    "Hours": [
        ("GPU hours at 100 images/s per GPU", "N / 100 / 3600", "h"),
        ("GPU hours at 1,000", "N / 1000 / 3600", "h"),
        ("GPU hours at 3,000", "N / 3000 / 3600", "h"),
        ("core hours: fetch, an object of 100 kB each", "N * fetch_cpu_seconds / 3600", "h"),
        ("core hours: decode", "N * decode_seconds / 3600", "h"),
        ("core hours: build segments, twice", "2 * N * segment_build_seconds / 3600", "h"),
        ("core hours: footers of units files", "U * F * units_open_seconds / 3600", "h"),
        ("core hours: footers of `transformed/`", "2 * R * P * transformed_cell_seconds / 3600", "h"),
        ("core hours: read the log", "R_log * U * log_read_seconds / 3600", "h"),
        (
            "to seal the last wave (all shards at once)",
            "(P * (transformed_cell_seconds + latency * transformed_cell_requests / threads)"
            " + last * U * (log_read_seconds + latency * log_read_requests / threads)"
            " + last * N / S * segment_build_seconds) / 3600",
            "h",
        ),
        (
            "to seal all waves, one after the other",
            "(W * P * (transformed_cell_seconds + latency * transformed_cell_requests / threads)"
            " + U * (log_read_seconds + latency * log_read_requests / threads)"
            " + W * 2**18 * segment_build_seconds) / 3600",
            "h",
        ),
        (
            "to look for ids and keys that repeat, in one task",
            "2 * N / 5e7 * P * latency * transformed_cell_requests / 3600",
            "h",
        ),
        (
            "to audit, in one process: the plan's row groups alone",
            "W * S * P * (transformed_cell_seconds + latency * transformed_cell_requests / threads) / 3600",
            "h",
        ),
        (
            "before commit 0: all tasks of all waves at once",
            "P * (transformed_cell_seconds + latency * transformed_cell_requests / threads) / 3600",
            "h",
        ),
    ],
    "The driver": [
        ("CPU for its units: Ray's part", "U * ray_driver_cpu_seconds / 3600", "h"),
        ("CPU for its units: ours", "U * driver_ack_seconds_window_100 / 3600", "h"),
        ("so at most", "u / (ray_driver_cpu_seconds + driver_ack_seconds_window_100)", "images/s"),
        ("pending units and those done", "U * (driver_unit_bytes + driver_done_bytes)", "B"),
        ("the table of units, on every node", "U * units_table_bytes", "B"),
        ("before the first block", "U * ray_block_setup_seconds", "s"),
        ("pixels in flight on a node of 8 GPUs, 224 x 224", "8 * 12 * u * 150528", "B"),
        ("to write a commit's JSON", "commit_write_seconds", "s"),
        ("to read and check it", "commit_read_seconds", "s"),
    ],
}


def names(unit_images: int, figures: dict[str, float]) -> dict[str, float]:
    """The names that a formula may use; the log's figures are those of the nearest measured size."""
    known = CONSTANTS | figures | {"u": float(unit_images)}
    measured = 256 if unit_images <= 256 else 2_048
    for name in ("log_row_bytes", "log_read_seconds", "log_write_seconds"):
        known[name] = figures[f"{name}_{measured}_64"]
    for name, formula in DERIVED.items():
        known[name] = evaluate(formula, known)
    return known


def evaluate(formula: str, known: dict[str, float]) -> float:
    """The value of one of our own formulas."""
    return float(eval(formula, {"__builtins__": {}}, known))


def text(value: float, unit: str) -> str:
    """With a prefix, three digits."""
    if unit in ("B", "") and value >= 1e4:
        prefixes = ("", "k", "M", "G", "T", "P") if unit else ("", " thousand", " million", " billion")
        step = min(len(prefixes) - 1, (len(f"{value:.0f}") - 1) // 3)
        number = f"{value / 1000**step:.3g}" if value / 1000**step < 1000 else f"{value / 1000**step:,.0f}"
        return f"{number} {prefixes[step]}{unit}" if unit else f"{number}{prefixes[step]}"
    number = f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    return f"{number} {unit}".strip()


def tables() -> dict[str, list[str]]:
    """The lines of each table in Markdown."""
    entries = json.loads(FIGURES.read_text())["figures"]
    figures = {name: float(entry["value"]) for name, entry in entries.items()}
    figures["fetch_cpu_seconds"] = float(json.loads(RATES.read_text())["fetch_cpu_seconds"]["value"])
    known = [names(size, figures) for size in UNIT_IMAGES]
    found = {}
    for title, rows in TABLES.items():
        lines = ["| what | formula | u = 256 | u = 2,048 | u = 8,192 |", "|---|---|---|---|---|"]
        for what, formula, unit in rows:
            values = [text(evaluate(formula, each), unit) for each in known]
            values = [*values[:1], "", ""] if len(set(values)) == 1 else values
            lines.append(f"| {what} | `{formula}` | {' | '.join(values)} |")
        found[title] = lines
    return found


def main() -> None:
    """Print all tables."""
    for title, lines in tables().items():
        print("\n".join([f"### {title}", "", *lines, ""]))


if __name__ == "__main__":
    main()
