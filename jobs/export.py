"""`fastfill export`: write a snapshot as FAISS indexes or Parquet files, for other serving systems."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import absolute, load
from pipeline.readable import counted

if TYPE_CHECKING:
    from pipeline.serving.export import Format


@command("export")
@click.argument("out")
@click.option("--format", "form", required=True, type=click.Choice(["faiss", "parquet"]), help="Format of the files.")
@click.option("--tag", default="prod", show_default=True, help="Write the snapshot of this tag.")
@click.option("--commit", type=int, help="Number of the snapshot to write; overrides --tag.")
def main(
    config_path: str,
    overrides: tuple[str, ...],
    as_json: bool,
    out: str,
    form: Format,
    tag: str,
    commit: int | None,
) -> None:
    """Write a snapshot to OUT as FAISS or Parquet files.

    OUT is a local folder or an s3:// prefix; it gets one file per shard.

    faiss: each file is an index for faiss.read_index, with the gallery's ids. If your ids are strings, the index has
    row numbers instead, and shard-*.ids.parquet beside it maps `id` (row number) to `key` (your id).

    parquet: the columns are `id`, `key` (your id, if it is a string), `vector` and `kind` (transformed or embedded).
    If the index compresses vectors, you get the decompressed ones, and the file's metadata notes it.

    export.json is written last, with the checksum of every file. Run the same command again to continue an interrupted
    export. If OUT has files of anything else, the command is refused (exit code 3).
    """
    from pipeline.config.identity import read_settings
    from pipeline.run import Run
    from pipeline.serving.export import export
    from pipeline.storage import objects

    config = load(config_path, overrides)
    read_settings(Run(config.run))
    out_uri = absolute(out)
    objects.check(out_uri)
    screen = console()

    def tell(done: int, total: int) -> None:
        screen.print(f"shard {done} of {total}")

    marker = export(config.run, out_uri, form, tag=tag, commit=commit, on_progress=None if as_json else tell)
    if as_json:
        print_json(marker)
        return
    size = sum(file["bytes"] for file in marker["files"]) / 1e6
    screen.print(
        f"commit {marker['commit']} is in {out_uri}: {sum(file['vectors'] for file in marker['files']):,} "
        f"{marker['vectors']} vectors in {counted(len(marker['files']), 'file')}, {size:,.1f} MB",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
