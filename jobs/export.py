"""`fastfill export`: a snapshot as plain FAISS indexes or as Parquet, for those who serve from something else."""

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
@click.option("--format", "form", required=True, type=click.Choice(["faiss", "parquet"]), help="Of the files.")
@click.option("--tag", default="prod", show_default=True, help="The tag whose snapshot is written.")
@click.option("--commit", type=int, help="Write this commit instead of a tag's.")
def main(
    config_path: str,
    overrides: tuple[str, ...],
    as_json: bool,
    out: str,
    form: Format,
    tag: str,
    commit: int | None,
) -> None:
    """Write a snapshot to OUT, a local folder or s3://, one file per shard.

    faiss: each file is one index that faiss.read_index opens, with the gallery's ids. If your ids are strings,
    FAISS has row numbers instead, and shard-*.ids.parquet beside each file has the columns id and key (your own
    id). parquet: the columns id, key (your own id, if that is a string), vector and kind (transformed or
    embedded); where the index is lossy the vectors are the decoded ones, which the file's metadata says.

    export.json is written last, with the checksum of every file. An export that was stopped goes on when the
    same command is given again; OUT must not hold anything else (exit code 3).
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
