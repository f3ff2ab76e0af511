"""Make a gallery manifest, once, from wherever images are kept: prefixes, tars, Parquet and CSV with uris.

    sources -> pieces (indexed one by one) -> parts -> duplicates -> catalog.json

Before everything else: what comes out is what `gallery.manifest` reads. Guarantee: when `catalog.json` is
there the manifest is whole, no key and no image is in it twice, and its parts are a function of the sources.
What is done is kept over a stop; after a change only the pieces that changed are indexed again. Nothing is
held per image, only per piece.

    <folder>/part-00000.parquet ...   the manifest
    <folder>/catalog-sources.json     what it is made of; written first
    <folder>/catalog.json             what is in it; written last
    <folder>/pieces/                  see `pieces`
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
from pipeline.manifest.splits import PIECE_NAME, Options, SplitResult
from pipeline.parallel import spread
from pipeline.storage import documents, objects

_ROLES = ("old_embedding", "new_embedding", "side", "group")  # taken for what their names say


@dataclass(frozen=True, slots=True)
class Catalog:
    """What is in a manifest; `catalog.json`.

    Attributes:
        manifest: the folder.
        images: rows.
        bytes: of the images whose size is known.
        unknown_sizes: images whose size is not.
        sources: kind -> pieces, images, bytes.
        parts: number of Parquet files.
        notes: counts of what was left out or looks odd.
        identical: images that have the content of another, with examples; by what that was told.
        gallery: the config section that uses the manifest.
        digest: of all rows.
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
    """Whether the folder is of a manifest that is still being made."""
    return objects.exists(_sources_uri(folder)) and not objects.exists(_catalog_uri(folder))


def build_manifest(
    folder: str,
    sources: Sequence[str],
    options: Options,
    on_progress: OnProgress = lambda step, done, total, status: None,
    start_ray: Callable[[], None] | None = None,
) -> tuple[Catalog, Counter[str]]:
    """Make the manifest of some sources in a folder, or bring it up to date.

    Args:
        folder: a local path, absolute, or s3://.
        sources: folders, and files or globs of .tar, .parquet and .csv; absolute, or s3://.
        options: how they are read.
        on_progress: told of progress.
        start_ray: starts Ray for the case that there is much to do; None to do everything in this process.

    Returns:
        what is in it, and how many pieces were `made` and `kept`.

    Raises:
        DataError: a source is missing, empty or damaged; a key or an image is there twice.
        IncompatibleRun: the folder holds the manifest of other sources.
    """
    _claim(folder, sources, options)
    before = read_catalog(folder)
    ledgers, pieces = index_sources(folder, sources, options, before is not None, on_progress, start_ray)
    digest = hashlib.sha256("".join(chunk.digest for item in ledgers for chunk in item.chunks).encode()).hexdigest()
    if before is not None and before.digest == digest and _num_parts(folder) == before.parts:
        return before, pieces
    objects.delete(_catalog_uri(folder))  # from here to the end a reader is told that it is not whole
    work = assemble.lay_out(folder, ledgers, options)
    infos, rows = dict[str, PartInfo](), 0
    for part, info in spread(assemble.write_part, work, start_ray):
        infos[part.uri] = info
        rows += info.rows
        on_progress("write", len(infos), len(work), f"{rows:,} images")
    parts = [part.uri for part in work]
    _remove_stale(folder, parts, {ledger.name for ledger in ledgers})
    check_unique(parts, rows, folder)
    catalog = _describe(folder, ledgers, [infos[uri] for uri in parts], find_identical(parts, rows, options), digest)
    objects.put(_catalog_uri(folder), documents.encode(catalog))
    return catalog, pieces


def forget(folder: str) -> None:
    """Remove a manifest that `build_manifest` made; other files in the folder stay."""
    if objects.exists(_sources_uri(folder)):
        objects.delete(_catalog_uri(folder))
        _remove_stale(folder, [], set())
        objects.delete(_sources_uri(folder))


def read_catalog(folder: str) -> Catalog | None:
    """What is in a manifest; None if it is not complete.

    Raises:
        DataError: the file is damaged or of another format.
    """
    where = _catalog_uri(folder)
    found = objects.read_versioned(where)
    return documents.parse(Catalog, found[0], where, documents.DELETE) if found else None


def _claim(folder: str, sources: Sequence[str], options: Options) -> None:
    """Say what the folder is for, or find that it is for the same.

    Raises:
        IncompatibleRun, DataError: it is for something else.
    """
    asked, where = {"sources": list(sources), "options": asdict(options)}, _sources_uri(folder)
    found = objects.read_versioned(where)
    before = documents.decode(found[0], where, documents.DELETE) if found else None
    if before is None:
        foreign = next((uri for uri, _ in objects.iter_stats(folder) if uri.endswith(".parquet")), None)
        if foreign is not None:
            raise DataError(
                "the folder has Parquet files already, which would be read with the manifest",
                found=foreign,
                where=folder,
                remedy="give another folder",
            )
    elif before == documents.decode(documents.encode(asked), where):
        return
    elif _is_made(folder):  # else nothing came of those: a source was mistyped, perhaps
        raise IncompatibleRun(
            "this folder holds the manifest of other sources, or is read otherwise:\n" + _changes(before, asked),
            where=folder,
            remedy="give another folder, or --replace to make this one anew",
        )
    objects.put(where, documents.encode(asked))


def _is_made(folder: str) -> bool:
    """Whether anything was made for the sources that the folder is claimed for."""
    return any(uri != _sources_uri(folder) for uri, _ in objects.iter_stats(folder))


def _describe(
    folder: str, ledgers: list[SplitResult], infos: list[PartInfo], identical: dict[str, object], digest: str
) -> Catalog:
    num_bytes = functools.reduce(Counter.__add__, (Counter(info.num_bytes) for info in infos), Counter[str]())
    sources: dict[str, dict[str, int]] = {}
    for ledger in ledgers:
        found = sources.setdefault(ledger.kind, {"pieces": 0, "images": 0, "bytes": num_bytes[ledger.kind]})
        found["pieces"] += 1
        found["images"] += ledger.num_rows
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
        notes=dict(count_notes(ledgers)),
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


def _remove_stale(folder: str, parts: list[str], pieces: set[str]) -> None:
    """Remove parts and pieces of ours but these."""
    for where, ours, keep in (
        (folder, "part-", {uri.rpartition("/")[2].partition(".")[0] for uri in parts}),
        (objects.join(folder, "pieces"), "", pieces),
    ):
        stale = []
        for uri, _ in objects.iter_stats(where, deep=False):
            name = uri.rpartition("/")[2]
            piece = name.partition(".")[0] if ours else name[:PIECE_NAME]
            if name.startswith(ours) and piece not in keep:
                stale.append(uri)
        objects.delete_files(stale)


def _num_parts(folder: str) -> int:
    return sum(uri.endswith(".parquet") for uri, _ in objects.iter_stats(folder, deep=False))


def _sources_uri(folder: str) -> str:
    return objects.join(folder, "catalog-sources.json")


def _catalog_uri(folder: str) -> str:
    return objects.join(folder, "catalog.json")
