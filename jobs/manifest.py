"""`fastfill manifest`: make a gallery manifest from folders, tars, Parquet and CSV files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.shell.command import console, print_json, print_text, with_errors
from jobs.shell.failures import Command
from jobs.shell.open_run import absolute, load
from jobs.shell.ray_session import start_ray

if TYPE_CHECKING:
    from collections import Counter

    from pipeline.manifest.catalog import Catalog

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm")


@click.command("manifest", Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("sources", nargs=-1, required=True)
@click.option("--to", "folder", required=True, metavar="FOLDER", help="Folder of the manifest; may be s3://.")
@click.option(
    "--suffix",
    "suffixes",
    multiple=True,
    metavar=".EXT",
    help="Suffix of image files, instead of the usual ones; may be repeated.",
)
@click.option("--uri-column", default="uri", show_default=True, help="Column with the image's path or URI.")
@click.option(
    "--key-column", metavar="NAME", help="Column with the image's id. [default: `key` if there is one, else the URI]"
)
@click.option(
    "--stat", is_flag=True, help="For Parquet and CSV files: fetch size and ETag of each image (one request each)."
)
@click.option(
    "--hash", "hashed", is_flag=True, help="Read and hash every image in folders and tars, to find duplicates."
)
@click.option("--replace", is_flag=True, help="Replace an existing manifest, whatever it was made from.")
@click.option("--no-ray", is_flag=True, help="Do all work in this process, without Ray.")
@click.option("--config", "config_path", metavar="FILE", help="A run's YAML config file, for its storage settings.")
@click.option("--print-config", is_flag=True, help="Print the config section for this manifest on stdout.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document on stdout.")
@with_errors
def main(
    sources: tuple[str, ...],
    folder: str,
    suffixes: tuple[str, ...],
    config_path: str | None,
    replace: bool,
    no_ray: bool,
    print_config: bool,
    as_json: bool,
    **columns: str | bool | None,
) -> None:
    """Make a gallery manifest: list the images in SOURCES.

    The manifest has the location, key, size, ETag and label of each image. SOURCES are:

    \b
    - folders or s3:// prefixes of images, and of tars with images
    - tars or WebDataset shards, or globs of them
    - Parquet or CSV files with a column of image paths; other columns are kept

    Run the same command again to continue after an interruption, or to update the manifest.
    """
    from jobs.shell.progress_bars import Bars
    from pipeline.errors import ConfigError
    from pipeline.manifest import catalog
    from pipeline.manifest.splits import Options
    from pipeline.storage import objects

    if print_config and as_json:
        raise ConfigError(
            "--json and --print-config both print on stdout",
            remedy="use --json alone: it has the config section as `gallery`",
        )
    if config_path is not None:
        load(config_path, ())
    options = Options(
        suffixes=tuple(sorted(f".{suffix.lstrip('.').lower()}" for suffix in suffixes or _SUFFIXES)),
        uri_column=str(columns["uri_column"]),
        key_column=str(columns["key_column"]) if columns["key_column"] is not None else None,
        stat=bool(columns["stat"]),
        hash=bool(columns["hashed"]),
    )
    with Bars(console()) as bars:
        target = absolute(folder)
        objects.check(target)
        if replace:
            catalog.forget(target)
        found, pieces = catalog.build_manifest(
            target, [absolute(item) for item in sources], options, bars.images, None if no_ray else start_ray
        )
    _show(found, pieces)
    if as_json:
        print_json(document(found, pieces))
    if print_config:
        print_text(section(found).rstrip())


def document(catalog: Catalog, pieces: Counter[str]) -> dict[str, object]:
    """The result of `--json`: the catalog, and how many splits were listed again (`made`) or reused (`kept`)."""
    from dataclasses import asdict

    return asdict(catalog) | {"pieces": {"made": pieces["made"], "kept": pieces["kept"]}}


def section(catalog: Catalog) -> str:
    """The `gallery:` section of a config that uses the manifest, as YAML."""
    import yaml

    text: str = yaml.safe_dump({"gallery": catalog.gallery}, sort_keys=False, default_flow_style=None, width=110)
    return text


def _show(catalog: Catalog, pieces: Counter[str]) -> None:
    from rich.table import Table

    table = Table("source", "pieces", "images", "bytes", title=catalog.manifest, title_justify="left")
    for kind, counts in catalog.sources.items():
        table.add_row(kind, *(f"{counts[name]:,}" for name in ("pieces", "images", "bytes")))
    out = console()
    out.print(table)
    out.print(f"{catalog.images:,} images, {catalog.bytes:,} bytes, in {catalog.parts:,} parts")
    out.print(f"{pieces['made']:,} pieces listed, {pieces['kept']:,} reused from before")
    if catalog.unknown_sizes:
        out.print(f"{catalog.unknown_sizes:,} images of unknown size (--stat --replace fetches it)")
    for name, count in catalog.notes.items():
        out.print(f"{count:,} {name.replace('_', ' ')}")
    identical = catalog.identical
    if identical["images"]:
        out.print(f"{identical['images']:,} images are duplicates of another, such as {identical['examples']}")


if __name__ == "__main__":
    main()
