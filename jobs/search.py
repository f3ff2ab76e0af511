"""`fastfill search`: search a snapshot with embeddings or images as queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import absolute, load, open_run_of

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.arrays import Float32
    from pipeline.config.tree import Config

    Embed = Callable[[list[bytes], list[str]], Float32]

_TABLES = (".npy", ".parquet")


@command("search")
@click.argument("queries", nargs=-1, required=True)
@click.option("--column", metavar="NAME", help="The Parquet column that holds the queries (embeddings or image bytes).")
@click.option(
    "-k",
    default=10,
    show_default=True,
    type=click.IntRange(min=1),
    help="Neighbours per query; fewer if the gallery is smaller.",
)
@click.option("--tag", default="prod", show_default=True, help="Search the snapshot of this tag.")
@click.option("--commit", type=int, help="Number of the snapshot to search; overrides --tag.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only this many queries, from the start of the file.")
def main(
    config_path: str,
    overrides: tuple[str, ...],
    as_json: bool,
    queries: tuple[str, ...],
    column: str | None,
    k: int,
    tag: str,
    commit: int | None,
    limit: int | None,
) -> None:
    """Search for the nearest gallery images of QUERIES.

    QUERIES are either image files, or one .npy or Parquet file. A .npy file holds embeddings of the new model. In a
    Parquet file, --column names embeddings or image bytes. Images are embedded on this machine by the new encoder.
    """
    from pipeline.serving.searcher import Searcher

    config = load(config_path, overrides)
    if len(queries) > 1 and any(path.endswith(_TABLES) for path in queries):
        raise click.UsageError(f"give image files, or a single .npy or Parquet file; these are {len(queries)} files")
    open_run_of(config)
    vectors = _read_queries(partial(_embed, config), queries, column, limit)
    with Searcher(config.run, tag=tag, commit=commit, in_memory=False) as searcher:  # one search: do not load it all
        result = searcher.search(vectors, k)
    there = result.ids >= 0  # fewer than k may be found
    names = result.keys.tolist()
    distances = [
        [value if found else None for value, found in zip(*row, strict=True)]
        for row in zip(result.distances.tolist(), there.tolist(), strict=True)
    ]
    kinds = [[kind or None for kind in row] for row in result.kinds.tolist()]
    if as_json:
        print_json({"commit": result.commit, "ids": names, "distances": distances, "kinds": kinds})
        return
    _show(result.commit, names, distances, kinds)


def _show(
    commit: int,
    names: list[list[int | str | None]],
    distances: list[list[float | None]],
    kinds: list[list[str | None]],
) -> None:
    from rich.table import Table

    table = Table("query", "rank", "id", "distance", "kind", title=f"commit {commit}", title_justify="left")
    for query, hits in enumerate(zip(names, distances, kinds, strict=True)):
        for rank, (name, value, kind) in enumerate(zip(*hits, strict=True), start=1):
            if value is not None:
                table.add_row(str(query) if rank == 1 else "", str(rank), str(name), f"{value:.4f}", kind)
    console().print(table)


def _read_queries(embed: Embed, paths: tuple[str, ...], column: str | None, limit: int | None) -> Float32:
    """(Q, d_new) float32 embeddings of the queries.

    Raises:
        DataError: a file is missing or has the wrong contents, or an image cannot be embedded.
    """
    from zipfile import BadZipFile

    import numpy as np

    from pipeline.arrays import vectors_from_arrow
    from pipeline.errors import DataError
    from pipeline.storage import objects, parquet

    try:
        if paths[0].endswith(".npy"):
            with objects.open_input(absolute(paths[0])) as file:
                array = np.load(file, allow_pickle=False)
            return _checked(array, paths[0])[:limit]
        if not paths[0].endswith(".parquet"):
            return embed([objects.read_bytes(absolute(path)) for path in paths[:limit]], list(paths))
    except (OSError, ValueError, EOFError, OverflowError, MemoryError, BadZipFile) as error:
        raise DataError("cannot read a query", found=error, where=paths) from error
    table = parquet.read_parquet(absolute(paths[0]))
    if column is None or table.schema.names.count(column) != 1:
        raise DataError(
            "--column must name the column of the queries", expected=table.schema.names, found=column, where=paths[0]
        )
    values = table[column] if limit is None else table[column].slice(0, min(limit, table.num_rows))
    if _is_binary(values.type):
        return embed(values.to_pylist(), [f"{paths[0]}: row {row}" for row in range(len(values))])
    try:
        return vectors_from_arrow(values)
    except (AttributeError, ValueError) as error:
        raise DataError(
            "the column has neither image bytes nor embeddings",
            expected="binary, or fixed-size lists of floats",
            found=values.type,
            where=f"{paths[0]}: column {column}",
        ) from error


def _checked(array: object, where: str) -> Float32:
    """(Q, d) float32 embeddings of a .npy file.

    Raises:
        DataError: the file has something else.
    """
    import numpy as np

    from pipeline.errors import DataError

    if isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind in "fiu":
        vectors: Float32 = array.astype(np.float32)
        return vectors
    found = f"{array.dtype}, shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
    raise DataError("the file has no embeddings", expected="numbers of shape (Q, d)", found=found, where=where)


def _embed(config: Config, images: list[bytes], names: list[str]) -> Float32:
    from pipeline.serving.query_embedder import embed_queries

    open_run_of(config, to_embed=True)
    return embed_queries(config.encoders.new, config.backfill, config.device, images, names)


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


if __name__ == "__main__":
    main()
