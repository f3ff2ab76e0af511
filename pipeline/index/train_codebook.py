"""Train the codebook of a run once; choose its factory, and check that it can be trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import faiss
import numpy as np
import pyarrow as pa

from pipeline.arrays import Float32, vectors_from_arrow
from pipeline.config.identity import fix_settings, stage_settings
from pipeline.config.tree import Config, IndexSettings, Metric
from pipeline.errors import ConfigError
from pipeline.index.codebook import check_vectors, make_index, set_threads
from pipeline.index.segment_files import put_by_content
from pipeline.models.offset import PART
from pipeline.models.transformation import read_part
from pipeline.planning.plan import Plan
from pipeline.run import Run
from pipeline.storage import parquet
from pipeline.storage.part_files import list_parts

# `auto` by the size of the gallery: Flat, then IVF with Flat, SQ8 and PQ codes. At 512 dimensions these
# limits mean 0.2, 6 and 26 GB. About 4 sqrt(N) lists, as FAISS's guidelines suggest.
FLAT_UP_TO = 100_000
IVF_FLAT_UP_TO = 3_000_000
SQ8_UP_TO = 50_000_000
TRAIN_VECTORS_PER_LIST = 8
_OPQ_CENTROIDS = 256  # per sub-space of the rotation's own quantizer
_ANY_DIM = 26_880  # stands for an unknown width: every usual number of sub-quantizers divides it


def make_codebook(config: Config, run: Run, plan: Plan) -> tuple[str, str]:
    """Train the codebook of a run and store it; returns its path inside the run, and its sha256.

    Raises:
        ConfigError: the factory is not supported, or needs more training vectors than there are.
        DataError: a file of the pairs or of the plan is missing or damaged.
        IncompatibleRun: another driver has made a codebook with other settings.
    """
    settings = stage_settings(config, "index")
    data = train_for_run(run, plan, config.index, config.gallery.metric, device=config.device, seed=config.seed)
    fix_settings(run, "index", settings)  # not before: if the training fails, they may still be changed
    return write_codebook(run, data)


def train_for_run(run: Run, plan: Plan, index: IndexSettings, metric: Metric, *, device: str, seed: int) -> bytes:
    """The codebook of a run as bytes: the same each time on equal processors."""
    vectors = _training_vectors(run, plan, index.train_vectors)
    return train_codebook(vectors, index, metric, plan.num_gallery, device=device, seed=seed)


def train_codebook(
    vectors: Float32,
    index: IndexSettings,
    metric: Metric,
    num_gallery: int,
    *,
    device: str,
    seed: int,
) -> bytes:
    """Train the coarse quantizer and the codec on (M, d) float32 vectors; returns an empty index as FAISS writes it.

    On the CPU equal vectors and seeds give equal bytes. The coarse k-means runs on GPUs if `device` is not `cpu` and
    FAISS sees any. `num_gallery` is the number of vectors that the index will hold.

    Raises:
        ConfigError: the factory is not supported, or needs more training vectors than there are.
        DataError: `vectors` is not (M, d), or not finite.
    """
    check_vectors(vectors, dim=None)
    if len(vectors) > index.train_vectors:
        drawn = np.random.default_rng(seed).choice(len(vectors), index.train_vectors, replace=False)
        vectors = vectors[np.sort(drawn)]
    factory = check_trainable(index.factory, num_gallery, len(vectors), vectors.shape[1])
    empty, ivf, transforms = make_index(factory, vectors.shape[1], metric)
    borrowed = [*_prepare_clustering(ivf, transforms, seed), _clustering_on_gpu(ivf, device)]
    with _one_thread():
        empty.train(np.ascontiguousarray(vectors, dtype=np.float32))
    del borrowed  # FAISS held bare pointers to these while it trained
    return faiss.serialize_index(empty).tobytes()


def write_codebook(run: Run, data: bytes) -> tuple[str, str]:
    """Store a trained codebook; returns its path inside the run and its sha256."""
    return put_by_content(run, "index/codebook-{}.faiss", data)


def resolve_factory(factory: str, num_vectors: int, num_train: int | None = None, dim: int | None = None) -> str:
    """The FAISS factory string for `index.factory`.

    `Flat` is one list that every query visits: exact, with explicit ids. `auto` takes Flat, or IVF with Flat, SQ8 or
    PQ codes, by the size of the gallery. It takes no more lists than `num_train` vectors suffice for.

    Raises:
        ConfigError: FAISS cannot read the string, its index is not supported, or it does not fit `dim`.
    """
    resolved = {"auto": _automatic(num_vectors, num_train, dim), "Flat": "IVF1,Flat"}.get(factory, factory)
    make_index(resolved, dim or _ANY_DIM, "l2")
    return resolved


def check_trainable(factory: str, num_vectors: int, num_train: int, dim: int) -> str:
    """As `resolve_factory`, and refuse a factory that needs more training vectors; known before there are any.

    Raises:
        ConfigError: as `resolve_factory`, or it needs more training vectors than there are.
    """
    resolved = resolve_factory(factory, num_vectors, num_train, dim)
    _, ivf, transforms = make_index(resolved, dim, "l2")
    needed = max(
        ivf.nlist,
        ivf.pq.ksub if isinstance(ivf, faiss.IndexIVFPQ) else 1,
        _OPQ_CENTROIDS if any(isinstance(transform, faiss.OPQMatrix) for transform in transforms) else 1,
    )
    if num_train < needed:
        raise ConfigError(
            "the index needs more training vectors than there are",
            expected=f"at least {needed}",
            found=num_train,
            where=f"index.factory: {resolved}",
            remedy="use fewer lists, a smaller codec, or more training pairs",
        )
    return resolved


def _training_vectors(run: Run, plan: Plan, wanted: int) -> Float32:
    """New embeddings of the training pairs; with an offset, half of them served vectors of the transformed gallery.

    An offset lies where new embeddings do not vary, so a codebook of these alone would lose it.
    """
    pairs = (parquet.read_parquet(uri, ["new"])["new"] for uri in list_parts(run.path("pairs", "train")).values())
    if read_part(run, PART) is None:
        return _first(pairs, wanted)
    place = plan.laid_out(run)
    parts = (parquet.read_parquet(place.transformed_part(part), ["vector"]) for part in range(plan.num_parts))
    return np.concatenate(
        [_first(pairs, wanted - wanted // 2), _first((part["vector"] for part in parts), wanted // 2)]
    )


def _first(columns: Iterable[pa.ChunkedArray], wanted: int) -> Float32:
    """The first vectors; they are a fair sample, because parts of pairs are stripes by a hash."""
    found: list[Float32] = []
    for column in columns:
        found.append(vectors_from_arrow(column))
        if sum(map(len, found)) >= wanted:
            break
    return np.concatenate(found)[:wanted]


def _automatic(num_vectors: int, num_train: int | None, dim: int | None) -> str:
    if num_vectors <= FLAT_UP_TO:
        return "IVF1,Flat"
    exponent = round(math.log2(4 * math.sqrt(num_vectors)))
    if num_train is not None:
        exponent = min(exponent, int(math.log2(max(1, num_train // TRAIN_VECTORS_PER_LIST))))
    if num_vectors <= IVF_FLAT_UP_TO:
        return f"IVF{2**exponent},Flat"
    if num_vectors <= SQ8_UP_TO:
        return f"IVF{2**exponent},SQ8"
    code_bytes = 2 ** max(0, min(6, int(math.log2((dim or _ANY_DIM) / 4))))
    return f"OPQ{code_bytes}_{4 * code_bytes},IVF{2**exponent}_HNSW32,PQ{code_bytes}"


def _prepare_clustering(ivf: faiss.IndexIVF, transforms: list[faiss.VectorTransform], seed: int) -> list[object]:
    """Seed every k-means, and silence its warnings about few points; returns objects that must live while training."""
    settings, borrowed = [ivf.cp], list[object]()
    if isinstance(ivf, faiss.IndexIVFPQ):
        # Skips half a minute of annealing for a search mode that is not used.
        ivf.do_polysemous_training = False  # type: ignore[attr-defined]  # not in the stubs
        settings.append(ivf.pq.cp)
    for transform in transforms:
        if isinstance(transform, faiss.OPQMatrix):
            transform.pq = faiss.ProductQuantizer(transform.d_out, transform.M, 8)  # 2^8: _OPQ_CENTROIDS
            borrowed.append(transform.pq)
            settings.append(transform.pq.cp)
    for item in settings:
        item.min_points_per_centroid = 1
        item.seed = seed % 2**31
    return borrowed


def _clustering_on_gpu(ivf: faiss.IndexIVF, device: str) -> object:
    """Let the coarse k-means assign on the GPUs, if any; the index itself stays on the CPU."""
    if device == "cpu" or not faiss.get_num_gpus():
        return None
    gpus = [int(device.partition(":")[2])] if ":" in device else None
    ivf.clustering_index = faiss.index_cpu_to_gpus_list(faiss.IndexFlat(ivf.d, ivf.metric_type), gpus=gpus)
    return ivf.clustering_index


@contextmanager
def _one_thread() -> Iterator[None]:
    """The sums of k-means depend on the number of threads."""
    before = faiss.omp_get_max_threads()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)
