"""Segments against one FAISS index, and the bytes of a segment as a function of its rows."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.arrays import Float32, Int64
from pipeline.config.tree import IndexSettings, Metric
from pipeline.equality import same_vectors
from pipeline.errors import ConfigError, DataError
from pipeline.index import codebook as codebooks
from pipeline.index import segment as index
from pipeline.index import train_codebook as train
from pipeline.index.codebook import Codebook
from pipeline.index.segment import Segment, as_stored, build_segment, decode_segment, gather_segments, search
from pipeline.index.segment_files import Rows
from pipeline.index.train_codebook import check_trainable, resolve_factory, train_codebook
from pipeline.run import Run
from pipeline.storage import objects

DIM = 16
METRICS: tuple[Metric, ...] = ("l2", "ip", "cosine")
FACTORIES = ("Flat", "IVF16,Flat", "IVF16_HNSW8,Flat", "IVF16,SQ8", "IVF16,SQfp16", "IVF16,PQ4x4", "PCA8,IVF16,SQ8")


@cache
def gallery(num: int = 2000) -> tuple[Int64, Float32]:
    rng = np.random.default_rng(7)
    centres = rng.standard_normal((20, DIM)) * 2
    vectors = centres[rng.integers(0, 20, num)] + rng.standard_normal((num, DIM))
    return rng.permutation(num * 10)[:num].astype(np.int64), vectors.astype(np.float32)


@cache
def codebook_bytes(factory: str, metric: Metric) -> bytes:
    settings = IndexSettings(factory=factory, train_vectors=1000)
    return train_codebook(gallery()[1], settings, metric, 2000, device="cpu", seed=3)


def codebook(factory: str = "IVF16,Flat", metric: Metric = "l2") -> Codebook:
    return Codebook(codebook_bytes(factory, metric))


def opened(tmp_path: Path, book: Codebook, ids: Int64, vectors: Float32) -> Segment:
    data = build_segment(book, ids, vectors)
    path = tmp_path / f"{hashlib.sha256(data).hexdigest()}.faiss"
    path.write_bytes(data)
    return Segment.read(book, str(path))


def split(tmp_path: Path, book: Codebook, ids: Int64, vectors: Float32, parts: int) -> list[Segment]:
    """`parts` segments and an empty one."""
    return [opened(tmp_path, book, ids[p::parts], vectors[p::parts]) for p in range(parts)] + [
        opened(tmp_path, book, ids[:0], vectors[:0])
    ]


def one_faiss_index(factory: str, metric: Metric, nprobe: int) -> faiss.Index:
    """The codebook as FAISS itself would use it: all vectors in one index."""
    whole = faiss.deserialize_index(
        np.frombuffer(codebook_bytes(factory, metric), np.uint8), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
    )
    ids, vectors = gallery()
    whole.add_with_ids(vectors, ids)
    faiss.extract_index_ivf(whole).nprobe = nprobe
    return whole


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_segments_answer_as_one_faiss_index(tmp_path: Path, factory: str, metric: Metric) -> None:
    book = codebook(factory, metric)
    queries = gallery()[1][:50] + 0.1
    expected = one_faiss_index(factory, metric, min(5, book.num_lists)).search(queries, 10)

    distances, ids = search(book, split(tmp_path, book, *gallery(), parts=7), queries, k=10, nprobe=5)

    flips = 0.01 if "PCA" in factory else 0  # other batches are rounded otherwise, which may choose another code
    assert np.isclose(distances, expected[0], rtol=1e-5, atol=1e-5).mean() >= 1 - flips
    same = ids == expected[1]
    gaps = np.abs(np.diff(expected[0], axis=1))
    ties = np.pad(gaps, ((0, 0), (1, 0)), constant_values=1) * np.pad(gaps, ((0, 0), (0, 1)), constant_values=1) == 0
    ties[:, -1] = True  # its equal may be the eleventh
    assert (same | ties).mean() >= 1 - flips
    if factory in ("Flat", "IVF16,Flat"):
        assert same.all()


@pytest.mark.parametrize("metric", METRICS)
def test_search_of_flat_segments_is_exact(tmp_path: Path, metric: Metric) -> None:
    ids, vectors = gallery()
    queries = vectors[:20].astype(np.float64) + 0.05
    wide = vectors.astype(np.float64)
    if metric == "cosine":
        wide, queries = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (wide, queries))
    scores = ((queries[:, None] - wide[None]) ** 2).sum(-1) if metric == "l2" else -(queries @ wide.T)
    order = np.argsort(scores, axis=1)[:, :10]

    book = codebook("Flat", metric)
    distances, found = search(book, split(tmp_path, book, ids, vectors, 3), queries.astype(np.float32), 10, nprobe=1)

    np.testing.assert_array_equal(found, ids[order])
    expected = np.take_along_axis(scores, order, axis=1) * (1 if metric == "l2" else -1)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", ["Flat", "IVF16,SQ8", "IVF16,PQ4x4"])
def test_equal_distances_go_to_the_smaller_id_however_the_gallery_is_cut(
    tmp_path: Path, factory: str, metric: Metric
) -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(2000).astype(np.int64)
    vectors = np.repeat(gallery()[1][:40], [3, 97] * 20, axis=0)  # most best sevens end among 97 equals
    queries = gallery()[1][:40]
    book = codebook(factory, metric)
    everything = search(book, split(tmp_path, book, ids, vectors, 1), queries, 2000, 3)

    for parts in (1, 2, 9):
        distances, found = search(book, split(tmp_path, book, ids, vectors, parts), queries, 7, 3)
        np.testing.assert_array_equal(found, everything[1][:, :7])
        np.testing.assert_array_equal(distances, everything[0][:, :7])
    keys = everything[0] * (1 if metric == "l2" else -1)
    equal = keys[:, 1:] == keys[:, :-1]
    assert equal[:, 6].any()
    assert (everything[1][:, 1:] > everything[1][:, :-1])[equal & (everything[1][:, 1:] >= 0)].all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_segments_gathered_into_one_answer_as_they_do(tmp_path: Path, factory: str, metric: Metric) -> None:
    book = codebook(factory, metric)
    ids, vectors = gallery()
    vectors = np.repeat(vectors[::10], 10, axis=0)  # with equal distances
    segments = split(tmp_path, book, ids, vectors, 9)
    whole = gather_segments(book, segments)
    assert whole.num_vectors == len(ids)
    for k in (1, 7, 500, 2100):
        for expected, found in zip(
            search(book, segments, vectors[:30] + 0.1, k, 5),
            search(book, [whole], vectors[:30] + 0.1, k, 5),
            strict=True,
        ):
            np.testing.assert_array_equal(found, expected)
    del segments  # what was gathered needs them no more
    assert len(decode_segment(book, whole)[0]) == len(ids)


def test_gather_of_empty_segments_answers_without_neighbours(tmp_path: Path) -> None:
    book = codebook()
    whole = gather_segments(book, split(tmp_path, book, *(item[:0] for item in gallery()), parts=2))
    distances, ids = search(book, [whole], gallery()[1][:3], 4, 5)
    assert whole.num_vectors == 0
    assert (ids == -1).all()
    assert np.isinf(distances).all()


@pytest.mark.parametrize("factory", FACTORIES)
def test_order_of_rows_does_not_change_the_bytes(factory: str) -> None:
    ids, vectors = gallery()
    order = np.random.default_rng(1).permutation(len(ids))
    book = codebook(factory)
    assert build_segment(book, ids, vectors) == build_segment(book, ids[order], vectors[order])


def test_bytes_do_not_depend_on_which_process_opened_the_codebook() -> None:
    assert build_segment(codebook(), *gallery()) == build_segment(codebook(), *gallery())


def test_segment_content_does_not_depend_on_threads(tmp_path: Path) -> None:
    first = decode_segment(codebook(), opened(tmp_path, codebook(), *gallery()))
    codebooks.set_threads(2)
    try:
        second = decode_segment(codebook(), opened(tmp_path, codebook(), *gallery()))
    finally:
        codebooks.set_threads(1)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("factory", FACTORIES)
def test_training_is_deterministic_and_writes_an_empty_index(factory: str) -> None:
    settings = IndexSettings(factory=factory, train_vectors=1000)
    again = train_codebook(gallery()[1], settings, "l2", 2000, device="cpu", seed=3)
    assert again == codebook_bytes(factory, "l2")
    assert codebook(factory).ivf.ntotal == 0
    other = train_codebook(gallery()[1], settings, "l2", 2000, device="cpu", seed=4)
    assert other != again


def test_training_prints_no_output(capfd: pytest.CaptureFixture[str]) -> None:
    for factory in ("IVF16,PQ4x4", "OPQ2_8,IVF16,PQ2"):
        train_codebook(gallery()[1][:300], IndexSettings(factory=factory), "l2", 2000, device="cpu", seed=0)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_segment_carries_no_copy_of_the_coarse_quantizer() -> None:
    ids, vectors = gallery()
    overhead = len(build_segment(codebook("IVF16,Flat"), ids[:1], vectors[:1])) - DIM * 4
    assert overhead < 512 < 16 * DIM * 4


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_decode_gives_what_is_stored_sorted_by_id(tmp_path: Path, factory: str, metric: Metric) -> None:
    ids, vectors = gallery()
    book = codebook(factory, metric)
    found_ids, found = decode_segment(book, opened(tmp_path, book, ids, vectors))
    order = np.argsort(ids)
    np.testing.assert_array_equal(found_ids, ids[order])
    wanted = vectors[order]
    assert book.exact == (factory in ("Flat", "IVF16,Flat", "IVF16_HNSW8,Flat") and metric != "cosine")
    if book.exact:
        np.testing.assert_array_equal(found, wanted)
    if metric == "cosine":
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < {"PQ4x4": 0.7, "SQ8": 0.7 if "PCA" in factory else 0.02}.get(factory.split(",")[-1], 1e-3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_some_ids_are_decoded_as_all_are_and_as_they_would_be_stored(
    tmp_path: Path, factory: str, metric: Metric
) -> None:
    ids, vectors = gallery()
    book = codebook(factory, metric)
    segment = opened(tmp_path, book, ids, vectors)
    wanted = np.append(ids[::7], ids.max() + 1)
    found_ids, found = decode_segment(book, segment, wanted)
    every_id, every = decode_segment(book, segment)
    np.testing.assert_array_equal(found_ids, np.sort(ids[::7]))
    assert same_vectors(found, every[np.isin(every_id, wanted)]).all()
    given = vectors[::7][np.argsort(ids[::7])]
    assert_the_same_but_for_codes(found, as_stored(book, given), given, metric)
    assert [part.shape for part in decode_segment(book, segment, ids.max(keepdims=True) + 1)] == [(0,), (0, DIM)]


def assert_the_same_but_for_codes(one: Float32, other: Float32, given: Float32, metric: Metric) -> None:
    """Two encodings of the same vectors: where rounding chose another code, that one is as near to the vector."""
    if metric == "cosine":
        given = given / np.linalg.norm(given, axis=1, keepdims=True)
    same = same_vectors(one, other)
    assert same.mean() > 0.99
    errors = [np.linalg.norm(side - given, axis=1)[~same] for side in (one, other)]
    np.testing.assert_allclose(*errors, rtol=1e-3)


def test_an_empty_segment_is_searched_and_decoded(tmp_path: Path) -> None:
    book = codebook()
    empty = opened(tmp_path, book, np.empty(0, np.int64), np.empty((0, DIM), np.float32))
    distances, ids = search(book, [empty], gallery()[1][:2], k=3, nprobe=4)
    assert (ids == -1).all()
    assert np.isposinf(distances).all()
    assert [part.shape for part in decode_segment(book, empty)] == [(0,), (0, DIM)]
    assert [part.shape for part in decode_segment(book, empty, np.array([3]))] == [(0,), (0, DIM)]


@pytest.mark.parametrize("metric", METRICS)
def test_too_few_neighbours_are_padded(tmp_path: Path, metric: Metric) -> None:
    book = codebook("Flat", metric)
    ids, vectors = gallery()
    distances, found = search(book, split(tmp_path, book, ids[:5], vectors[:5], 2), vectors[:2], k=8, nprobe=1)
    assert (np.sort(found[:, :5]) == np.sort(ids[:5])).all()
    assert (found[:, 5:] == -1).all()
    assert (distances[:, 5:] == (np.inf if metric == "l2" else -np.inf)).all()
    assert search(book, [], vectors[:0], k=3, nprobe=1)[1].shape == (0, 3)


def test_search_of_more_queries_than_one_call_takes_is_split(tmp_path: Path) -> None:
    ids, vectors = gallery()
    book = codebook()
    segments = split(tmp_path, book, ids, vectors, 2)
    _, found = search(book, segments, vectors, k=1, nprobe=16)
    np.testing.assert_array_equal(found[:, 0], ids)


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        ([1, 2, 1], np.zeros((3, DIM)), "repeated or negative"),
        ([1, -2, 3], np.zeros((3, DIM)), "repeated or negative"),
        ([1, 2], np.zeros((3, DIM)), "one id per vector"),
        ([1, 2, 3], np.zeros((3, DIM + 1)), "wrong shape"),
        ([1, 2, 3], np.full((3, DIM), np.nan), "NaN or infinity"),
        ([1, 2, 3], np.full((3, DIM), np.inf), "NaN or infinity"),
    ],
)
def test_bad_rows_are_refused(ids: list[int], vectors: Float32, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_segment(codebook(), np.array(ids, dtype=np.int64), vectors.astype(np.float32))


@pytest.mark.parametrize(
    "factory",
    [
        "HNSW32",
        "IVF16,PQ4x4fs",
        "IVF16,PQ4,RFlat",
        "IVF16,PQ4+8",
        "IDMap,IVF16,Flat",
        "IVF16,FlatDedup",
        "SQ8",
        "nonsense",
        "IVF16,PQ5",
        "L2norm,IVF16,Flat",
        "ITQ8,IVF16,SQ8",
        "PCAW8,IVF16,Flat",
    ],
)
def test_a_factory_that_makes_no_segments_is_refused(factory: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(factory)) as caught:
        resolve_factory(factory, 1000, dim=DIM)
    assert "examples: auto; Flat; IVF1024,SQ8" in str(caught.value)


def test_too_few_training_vectors_are_refused() -> None:
    for factory, needed in (("IVF512,Flat", 512), ("IVF4,PQ4", 256)):
        with pytest.raises(ConfigError, match=f"at least {needed}"):
            train_codebook(gallery()[1][:100], IndexSettings(factory=factory), "l2", 2000, device="cpu", seed=0)


def test_factory_auto_grows_with_the_gallery() -> None:
    assert [resolve_factory("auto", num) for num in (1000, 1_000_000, 10_000_000)] == [
        "IVF1,Flat",
        "IVF4096,Flat",
        "IVF16384,SQ8",
    ]
    assert resolve_factory("auto", 10**9, dim=512) == "OPQ64_256,IVF131072_HNSW32,PQ64"
    assert resolve_factory("auto", 10**9, dim=128) == "OPQ32_128,IVF131072_HNSW32,PQ32"
    assert resolve_factory("auto", 10**6, num_train=10_000, dim=128) == "IVF1024,Flat"
    assert resolve_factory("Flat", 10**9) == "IVF1,Flat"


def rows(num: int = 100, kind: str = "embedded") -> Rows:
    ids, vectors = gallery()
    groups = pa.array(["a", None] * (num // 2))
    return Rows(ids[:num], vectors[:num], np.full(num, kind), np.arange(num, dtype=np.float32), groups)


def test_write_segment_names_files_by_content_and_may_be_repeated(tmp_path: Path) -> None:
    run, book = Run(str(tmp_path)), codebook()
    kinds = np.where(np.arange(100) < 3, "transformed", "embedded")
    content = Rows(rows().ids, rows().vectors, kinds, rows().uncertainties, rows().groups)

    ref = index.write_segment(run, book, content, shard=1, wave=2, kind="embedded")

    assert index.write_segment(run, book, content, shard=1, wave=2, kind="embedded") == ref
    assert (ref.vectors, ref.rejected, ref.kind) == (100, 3, "embedded")
    assert ref.path == f"index/segments/{ref.sha256}.faiss"
    assert ref.bytes == objects.stat(run.path(ref.path)).size_bytes
    assert Segment.open(run, book, ref).num_vectors == 100
    sidecar = pq.read_table(run.path(ref.sidecar_path))
    assert sidecar["id"].to_pylist() == sorted(content.ids.tolist())
    first = sidecar.to_pylist()[int(np.searchsorted(np.sort(content.ids), content.ids[0]))]
    assert first == {"id": int(content.ids[0]), "kind": "transformed", "uncertainty": 0.0, "group": "a"}

    other = index.write_segment(run, book, rows(), shard=1, wave=2, kind="embedded")
    assert other.path == ref.path
    assert other.sidecar_path != ref.sidecar_path


def test_an_embedded_row_does_not_fit_a_transformed_segment(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not belong"):
        index.write_segment(Run(str(tmp_path)), codebook(), rows(), shard=0, wave=1, kind="transformed")


def test_codebook_and_segment_are_verified_when_opened(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    path, sha256 = train.write_codebook(run, codebook_bytes("IVF16,Flat", "l2"))
    book = Codebook.open(run, path, sha256)
    ref = index.write_segment(run, book, rows(), shard=0, wave=1, kind="embedded")
    for uri in (run.path(path), run.path(ref.path)):
        data = bytearray(Path(uri).read_bytes())
        data[len(data) // 2] ^= 1
        Path(uri).write_bytes(data)
    with pytest.raises(DataError, match=sha256):
        Codebook.open(run, path, sha256)
    with pytest.raises(DataError, match=ref.path):
        Segment.open(run, book, ref)
    Path(run.path(ref.path)).unlink()
    with pytest.raises(DataError, match="missing"):
        Segment.open(run, book, ref)


def test_a_segment_of_another_codec_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.faiss").write_bytes(build_segment(codebook("IVF16,SQ8"), *gallery()))
    with pytest.raises(DataError, match="another codec"):
        Segment.read(codebook("IVF16,Flat"), str(tmp_path / "other.faiss"))
    (tmp_path / "junk.faiss").write_bytes(b"junk")
    with pytest.raises(DataError, match="not a readable segment"):
        Segment.read(codebook(), str(tmp_path / "junk.faiss"))


@pytest.mark.parametrize(("factory", "needed"), [("IVF64,Flat", 64), ("IVF4,PQ4", 256), ("OPQ4_8,IVF4,SQ8", 256)])
def test_check_trainable_with_too_few_vectors_is_refused_before_training(factory: str, needed: int) -> None:
    check_trainable(factory, 1000, needed, DIM)
    vectors = np.random.default_rng(0).normal(size=(needed - 1, DIM)).astype(np.float32)
    for refused in (
        lambda: check_trainable(factory, 1000, needed - 1, DIM),
        lambda: train_codebook(vectors, IndexSettings(factory=factory), "l2", 1000, device="cpu", seed=0),
    ):
        with pytest.raises(ConfigError, match=f"more training vectors than there are\n  expected: at least {needed}"):
            refused()


def test_auto_asks_for_no_more_lists_than_the_training_vectors_are_good_for() -> None:
    assert check_trainable("auto", 10**6, 100, DIM) == "IVF8,Flat"
