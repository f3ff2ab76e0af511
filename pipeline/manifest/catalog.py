"""Builds a gallery manifest (the Parquet files of `gallery.manifest`) from folders, tars, and Parquet and CSV lists.

    sources -> splits (scanned one by one) -> parts -> check for duplicates -> catalog.json

If `catalog.json` exists, the manifest is complete and has no key and no image twice. A stopped build continues where it
was; after a change of a source, only its changed splits are scanned again. Memory grows with splits, not with images.

    <folder>/part-00000.parquet ...   the manifest
    <folder>/catalog-sources.json     its sources and options; written first
    <folder>/catalog.json             its summary; written last
    <folder>/pieces/                  the splits; see `manifest.splits`
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from pipeline.errors import DataError, IncompatibleRun
from pipeline.manifest import assemble
from pipeline.manifest.assemble import PartInfo
from pipeline.manifest.duplicates import check_unique, find_identical
from pipeline.manifest.scan import OnProgress, count_notes, index_sources
from pipeline.manifest.splits import SPLIT_NAME, Options, SplitResult
from pipeline.parallel import spread
from pipeline.storage import documents, objects

_ROLES = ("old_embedding", "new_embedding", "side", "group")  # columns that are used by their names


@dataclass(frozen=True, slots=True)
class Catalog:
    """The summary of a manifest, as in `catalog.json`.

    Attributes:
        manifest: the folder.
        images: number of rows.
        bytes: bytes of the images whose size is known.
        unknown_sizes: number of images whose size is unknown.
        sources: kind -> number of splits (`pieces`), images, bytes.
        parts: number of Parquet files.
        notes: counts of skipped or odd objects.
        identical: number of images with the content of another one, examples, and the columns that were compared.
        gallery: the config section that uses the manifest.
        digest: digest of all rows.
    """

    manifest: str
    images: int
    bytes: int
    unknown_sizes: int
    sources: dict[str, dict[str, int]]
    parts: int
    notes: dict[str, int]
    identical: dict[str, object]
    gallery: dict[str, object]
    digest: str


def is_incomplete(folder: str) -> bool:
    """Whether the folder holds an unfinished manifest."""
    return objects.exists(_sources_uri(folder)) and not objects.exists(_catalog_uri(folder))


def build_manifest(
    folder: str,
    sources: Sequence[str],
    options: Options,
    on_progress: OnProgress = lambda step, done, total, status: None,
    start_ray: Callable[[], None] | None = None,
) -> tuple[Catalog, Counter[str]]:
    """Build the manifest of some sources in a folder, or update it.

    Args:
        folder: an absolute local path, or s3://.
        sources: folders, and files or globs of .tar, .parquet and .csv; absolute, or s3://.
        options: how they are read.
        on_progress: called with the progress.
        start_ray: starts Ray if there is much to do; None to do everything in this process.

    Returns:
        the summary, and how many splits were `made` and `kept`.

    Raises:
        DataError: a source is missing, empty or damaged, or a key or an image occurs twice.
        IncompatibleRun: the folder holds the manifest of other sources.
    """
    _claim(folder, sources, options)
    before = read_catalog(folder)
    results, splits = index_sources(folder, sources, options, before is not None, on_progress, start_ray)
    digest = hashlib.sha256("".join(chunk.digest for item in results for chunk in item.chunks).encode()).hexdigest()
    if before is not None and before.digest == digest and _num_parts(folder) == before.parts:
        return before, splits
    objects.delete(_catalog_uri(folder))  # until the end, readers see that the manifest is incomplete
    work = assemble.lay_out(folder, results, options)
    infos, rows = dict[str, PartInfo](), 0
    for part, info in spread(assemble.write_part, work, start_ray):
        infos[part.uri] = info
        rows += info.rows
        on_progress("write", len(infos), len(work), f"{rows:,} images")
    parts = [part.uri for part in work]
    _remove_stale(folder, parts, {result.name for result in results})
    check_unique(parts, rows, folder)
    catalog = _describe(folder, results, [infos[uri] for uri in parts], find_identical(parts, rows, options), digest)
    objects.put(_catalog_uri(folder), documents.encode(catalog))
    return catalog, splits


def forget(folder: str) -> None:
    """Remove a manifest that `build_manifest` made, and no other files."""
    if objects.exists(_sources_uri(folder)):
        objects.delete(_catalog_uri(folder))
        _remove_stale(folder, [], set())
        objects.delete(_sources_uri(folder))


def read_catalog(folder: str) -> Catalog | None:
    """The summary of a manifest; None if the manifest is incomplete."""
    where = _catalog_uri(folder)
    found = objects.read_versioned(where)
    return documents.parse(Catalog, found[0], where, documents.DELETE) if found else None


def _claim(folder: str, sources: Sequence[str], options: Options) -> None:
    """Record the sources and options in the folder, or check that they are the recorded ones.

    Raises:
        IncompatibleRun: the folder has a manifest of other sources or options.
        DataError: the folder has other Parquet files.
    """
    asked, where = {"sources": list(sources), "options": asdict(options)}, _sources_uri(folder)
    found = objects.read_versioned(where)
    before = documents.decode(found[0], where, documents.DELETE) if found else None
    if before is None:
        foreign = next((uri for uri, _ in objects.iter_stats(folder) if uri.endswith(".parquet")), None)
        if foreign is not None:
            raise DataError(
                "the folder has other Parquet files, which would be read as part of the manifest",
                found=foreign,
                where=folder,
                remedy="give another folder",
            )
    elif before == documents.decode(documents.encode(asked), where):
        return
    elif _is_made(folder):  # else nothing was made yet, perhaps because a source was mistyped
        raise IncompatibleRun(
            "this folder already has a manifest, built from other sources or options:\n" + _changes(before, asked),
            where=folder,
            remedy="give another folder, or --replace to build this one again",
        )
    objects.put(where, documents.encode(asked))


def _is_made(folder: str) -> bool:
    """Whether the folder has any file beside the record of its sources."""
    return any(uri != _sources_uri(folder) for uri, _ in objects.iter_stats(folder))


def _describe(
    folder: str, results: list[SplitResult], infos: list[PartInfo], identical: dict[str, object], digest: str
) -> Catalog:
    num_bytes = functools.reduce(Counter.__add__, (Counter(info.num_bytes) for info in infos), Counter[str]())
    sources: dict[str, dict[str, int]] = {}
    for result in results:
        found = sources.setdefault(result.kind, {"pieces": 0, "images": 0, "bytes": num_bytes[result.kind]})
        found["pieces"] += 1
        found["images"] += result.num_rows
    filled = {name for info in infos for name in info.filled}
    columns = {"id": "key", "uri": "uri"}
    columns |= {name: name for name in ("offset", "length", "etag", "label", *_ROLES) if name in filled}
    return Catalog(
        manifest=folder,
        images=sum(info.rows for info in infos),
        bytes=sum(num_bytes.values()),
        unknown_sizes=sum(info.unknown_sizes for info in infos),
        sources=sources,
        parts=len(infos),
        notes=dict(count_notes(results)),
        identical=identical,
        gallery={"manifest": folder, "columns": columns},
        digest=digest,
    )


def _changes(old: documents.Tree, new: documents.Tree) -> str:
    lines = [f"was: {source}" for source in old["sources"] if source not in new["sources"]]
    lines += [f"is now: {source}" for source in new["sources"] if source not in old["sources"]]
    differing = (name for name, value in new["options"].items() if value != old["options"].get(name))
    lines += [f"{name}: was {old['options'].get(name)}, is now {new['options'][name]}" for name in differing]
    return "\n".join(f"  - {line}" for line in lines or ["the order of the sources"])


def _remove_stale(folder: str, parts: list[str], splits: set[str]) -> None:
    """Remove all parts and splits of ours except these."""
    for where, ours, keep in (
        (folder, "part-", {uri.rpartition("/")[2].partition(".")[0] for uri in parts}),
        (objects.join(folder, "pieces"), "", splits),
    ):
        stale = []
        for uri, _ in objects.iter_stats(where, deep=False):
            name = uri.rpartition("/")[2]
            split = name.partition(".")[0] if ours else name[:SPLIT_NAME]
            if name.startswith(ours) and split not in keep:
                stale.append(uri)
        objects.delete_files(stale)


def _num_parts(folder: str) -> int:
    return sum(uri.endswith(".parquet") for uri, _ in objects.iter_stats(folder, deep=False))


def _sources_uri(folder: str) -> str:
    return objects.join(folder, "catalog-sources.json")


def _catalog_uri(folder: str) -> str:
    return objects.join(folder, "catalog.json")
