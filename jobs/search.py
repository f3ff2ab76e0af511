"""`fastfill search`: queries, as embeddings or as images, against a tag or a commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.shell.command import command, console, print_json
from jobs.shell.open_run import absolute, load, open_run_of

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.arrays import Float32
    from pipeline.config.tree import Config

_TABLES = (".npy", ".parquet")


@command("search")
@click.argument("queries", nargs=-1, required=True)
@click.option("--column", metavar="NAME", help="The column of a Parquet file: embeddings, or images as bytes.")
@click.option(
    "-k",
    default=10,
    show_default=True,
    type=click.IntRange(min=1),
    help="Neighbours per query; of all, if there are fewer.",
)
@click.option("--tag", default="prod", show_default=True, help="The tag to answer from.")
@click.option("--commit", type=int, help="Answer from this commit instead of a tag.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first queries of the file.")
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

    QUERIES are image files; or one Parquet file (with --column) or .npy file of new-model embeddings
    (float32), or one Parquet file of images. Images are embedded by the new encoder, here.
    """
    from pipeline.serving.searcher import Searcher

    config = load(config_path, overrides)
    if len(queries) > 1 and any(path.endswith(_TABLES) for path in queries):
        raise click.UsageError(f"give image files, or one file of queries; these are {len(queries)} files")
    open_run_of(config)
    vectors = _read_queries(config, queries, column, limit)
    with Searcher(config.run, tag=tag, commit=commit, in_memory=False) as searcher:  # for a single call
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


def _read_queries(config: Config, paths: tuple[str, ...], column: str | None, limit: int | None) -> Float32:
    """(Q, d_new) float32 embeddings of the queries.

    Raises:
        DataError: a file is missing or not what it should be, or an image cannot be embedded.
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
            return _embed(config, [objects.read_bytes(absolute(path)) for path in paths[:limit]], list(paths))
    except (OSError, ValueError, EOFError, OverflowError, MemoryError, BadZipFile) as error:
        raise DataError("cannot read a query", found=error, where=paths) from error
    table = parquet.read_parquet(absolute(paths[0]))
    if column is None or table.schema.names.count(column) != 1:
        raise DataError("say which column holds the queries", expected=table.schema.names, found=column, where=paths[0])
    values = table[column] if limit is None else table[column].slice(0, min(limit, table.num_rows))
    if _is_binary(values.type):
        return _embed(config, values.to_pylist(), [f"{paths[0]}: row {row}" for row in range(len(values))])
    try:
        return vectors_from_arrow(values)
    except (AttributeError, ValueError) as error:
        raise DataError(
            "the column holds neither images nor embeddings",
            expected="binary, or fixed-size lists of floats",
            found=values.type,
            where=f"{paths[0]}: column {column}",
        ) from error


def _checked(array: object, where: str) -> Float32:
    """(Q, d) float32 embeddings of a .npy file.

    Raises:
        DataError: the file holds something else.
    """
    import numpy as np

    from pipeline.errors import DataError

    if isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind in "fiu":
        vectors: Float32 = array.astype(np.float32)
        return vectors
    found = f"{array.dtype}, shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
    raise DataError("the file holds no embeddings", expected="numbers of shape (Q, d)", found=found, where=where)


def _embed(config: Config, images: list[bytes], names: list[str]) -> Float32:
    from pipeline.serving.query_embedder import embed_queries

    open_run_of(config, to_embed=True)
    return embed_queries(config.encoders.new, config.backfill, config.device, images, names)


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


if __name__ == "__main__":
    main()
