"""Train the codebook of a run, once, and choose its factory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import faiss
import numpy as np
import pyarrow as pa

from pipeline.arrays import Float32, vectors_from_arrow
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
# end at 0.2, 6 and 26 GB. About 4 sqrt(N) lists, as FAISS's guidelines have it.
FLAT_UP_TO = 100_000
IVF_FLAT_UP_TO = 3_000_000
SQ8_UP_TO = 50_000_000
TRAIN_VECTORS_PER_LIST = 8
_OPQ_CENTROIDS = 256  # per sub-space of the rotation's own quantizer
_ANY_DIM = 26_880  # stands for an unknown width: every usual number of sub-quantizers divides it


def resolve_factory(factory: str, num_vectors: int, num_train: int | None = None, dim: int | None = None) -> str:
    """The FAISS factory string that `index.factory` stands for.

    `Flat` is one list that every query visits, which is exact and has explicit ids. `auto` takes Flat,
    IVF,Flat, SQ8 or PQ by the size of the gallery (FLAT_UP_TO, IVF_FLAT_UP_TO, SQ8_UP_TO).

    Args:
        factory: `index.factory`.
        num_vectors: size of the gallery.
        num_train: training vectors there will be; `auto` takes no more lists than they are good for.
        dim: width of the vectors; a factory that does not fit it is refused.

    Raises:
        ConfigError: FAISS cannot read the string, or the index it makes cannot be cut into segments.
    """
    resolved = {"auto": _automatic(num_vectors, num_train, dim), "Flat": "IVF1,Flat"}.get(factory, factory)
    make_index(resolved, dim or _ANY_DIM, "l2")
    return resolved


def check_trainable(factory: str, num_vectors: int, num_train: int, dim: int) -> str:
    """As `resolve_factory`, refusing also what cannot be trained on so few vectors; known before there are any.

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
            remedy="fewer lists, a smaller codec, or more training pairs",
        )
    return resolved


def train_codebook(
    vectors: Float32,
    index: IndexSettings,
    metric: Metric,
    num_gallery: int,
    *,
    device: str,
    seed: int,
    num_threads: int = 1,
) -> bytes:
    """Train the coarse quantizer and the codec; the result is an empty index as FAISS writes it.

    The same vectors, seed and number of threads give the same bytes (on the CPU). The coarse k-means runs
    on the GPUs where `device` is not `cpu` and FAISS sees any.

    Args:
        vectors: (M, d) float32 in the new space; `index.train_vectors` of them are drawn.
        index: the factory and the number of training vectors.
        metric: what the index is to measure.
        num_gallery: vectors that the index will hold, for `auto`.
        device: the config's `device`.
        seed: of the draw and of k-means.
        num_threads: OpenMP threads while training.

    Raises:
        ConfigError: the factory is not usable, or needs more training vectors than there are.
        DataError: `vectors` is not (M, d), or not finite.
    """
    check_vectors(vectors, dim=None)
    if len(vectors) > index.train_vectors:
        drawn = np.random.default_rng(seed).choice(len(vectors), index.train_vectors, replace=False)
        vectors = vectors[np.sort(drawn)]
    factory = check_trainable(index.factory, num_gallery, len(vectors), vectors.shape[1])
    empty, ivf, transforms = make_index(factory, vectors.shape[1], metric)
    borrowed = [*_prepare_clustering(ivf, transforms, seed), _clustering_on_gpu(ivf, device)]
    with _threads(num_threads):
        empty.train(np.ascontiguousarray(vectors, dtype=np.float32))
    del borrowed  # FAISS held bare pointers to these while it trained
    return faiss.serialize_index(empty).tobytes()


def write_codebook(run: Run, data: bytes) -> tuple[str, str]:
    """Store what `train_codebook` made; returns its path inside the run and its sha256."""
    return put_by_content(run, "index/codebook-{}.faiss", data)


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
    """Seed every k-means, and silence its advice about few points; returns what must live while training."""
    settings, borrowed = [ivf.cp], list[object]()
    if isinstance(ivf, faiss.IndexIVFPQ):
        # Half a minute of annealing for a search mode that is not used.
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
def _threads(num_threads: int) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    set_threads(num_threads)
    try:
        yield
    finally:
        set_threads(before)


def train_for_run(config: Config, run: Run, plan: Plan) -> bytes:
    """The codebook of a run; on equal processors the same bytes each time."""
    return train_codebook(
        _training_vectors(run, plan, config.index.train_vectors),
        config.index,
        config.gallery.metric,
        plan.num_gallery,
        device=config.device,
        seed=config.seed,
    )


def _training_vectors(run: Run, plan: Plan, wanted: int) -> Float32:
    """What a codebook has to know: new embeddings, of the training pairs; and what is served with an offset.

    An offset lies where new embeddings do not vary, so a codebook of these alone would not keep it.
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
    """The first vectors; parts of pairs are stripes, and those of the gallery as the manifest has them."""
    found: list[Float32] = []
    for column in columns:
        found.append(vectors_from_arrow(column))
        if sum(map(len, found)) >= wanted:
            break
    return np.concatenate(found)[:wanted]
