"""The codebook: the frozen coarse quantizer and codec that all segments of a run share.

Before the segments (`index`); with that module the only importer of faiss for the index. Guarantee: the same vectors,
seed and number of threads give the same bytes on equal processors (`equality`), and a codebook never changes once it
is made. Knows nothing of segments on disk, commits or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.arrays import Float32, Int64
from pipeline.config import Index, Metric
from pipeline.errors import ConfigError, DataError
from pipeline.run import Run
from pipeline.segments import check_digest, put_by_content

# `auto` by the size of the gallery: Flat, then IVF with Flat, SQ8 and PQ codes. At 512 dimensions these
# end at 0.2, 6 and 26 GB. About 4 sqrt(N) lists, as FAISS's guidelines have it.
FLAT_UP_TO = 100_000
IVF_FLAT_UP_TO = 3_000_000
SQ8_UP_TO = 50_000_000
TRAIN_VECTORS_PER_LIST = 8
FACTORIES = (
    "auto, Flat, or IVF<lists>[_HNSW<m>], then Flat, SQ<bits> or PQ<bytes>, maybe after OPQ<m>_<d>, PCA<d> or RR<d>"
)

READ_FLAGS = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE  # one such table per segment would not fit into memory
_CODECS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
_TRANSFORMS = (faiss.OPQMatrix, faiss.PCAMatrix, faiss.RandomRotationMatrix)
_OPQ_CENTROIDS = 256  # per sub-space of the rotation's own quantizer
_ANY_DIM = 26_880  # stands for an unknown width: every usual number of sub-quantizers divides it


def set_threads(num_threads: int) -> None:
    """Set the OpenMP threads of all later FAISS calls of this process."""
    faiss.omp_set_num_threads(num_threads)


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
    _make(resolved, dim or _ANY_DIM, "l2")
    return resolved


def check_trainable(factory: str, num_vectors: int, num_train: int, dim: int) -> str:
    """As `resolve_factory`, refusing also what cannot be trained on so few vectors; known before there are any.

    Raises:
        ConfigError: as `resolve_factory`, or it needs more training vectors than there are.
    """
    resolved = resolve_factory(factory, num_vectors, num_train, dim)
    _, ivf, transforms = _make(resolved, dim, "l2")
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
    vectors: Float32, index: Index, metric: Metric, num_gallery: int, *, device: str, seed: int, num_threads: int = 1
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
    empty, ivf, transforms = _make(factory, vectors.shape[1], metric)
    borrowed = [*_prepare_clustering(ivf, transforms, seed), _clustering_on_gpu(ivf, device)]
    with _threads(num_threads):
        empty.train(np.ascontiguousarray(vectors, dtype=np.float32))
    del borrowed  # FAISS held bare pointers to these while it trained
    return faiss.serialize_index(empty).tobytes()


def write_codebook(run: Run, data: bytes) -> tuple[str, str]:
    """Store what `train_codebook` made; returns its path inside the run and its sha256."""
    return put_by_content(run, "index/codebook-{}.faiss", data)


class Codebook:
    """The coarse quantizer and codec that all segments of a run share; it does not change.

    Attributes:
        dim: width of vectors and queries.
        num_lists: inverted lists.
        metric: what distances mean.
        exact: whether `decode` gives back the very numbers that were stored.
        ivf: the empty FAISS index.
    """

    def __init__(self, data: bytes) -> None:
        """Take what `train_codebook` made."""
        self._index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8), READ_FLAGS)
        self.ivf, self._transforms = parts(self._index)
        self._quantizer = self.ivf.quantizer
        self._empty_segment = self.serialize(self.ivf)
        self.dim = self._index.d
        self.num_lists = self.ivf.nlist
        self.metric: Metric = "l2" if self.ivf.metric_type == faiss.METRIC_L2 else "ip"
        if self._transforms and isinstance(self._transforms[0], faiss.NormalizationTransform):
            self.metric = "cosine"
        self.exact = isinstance(self.ivf, faiss.IndexIVFFlat) and not self._transforms

    @classmethod
    def open(cls, run: Run, path: str, sha256: str, verify: bool = True) -> Codebook:
        """Read a codebook by its path inside the run.

        Raises:
            DataError: it is missing, or its bytes are not those that were written.
        """
        if verify:
            check_digest(run.path(path), sha256)
        try:
            return cls(storage.read_bytes(run.path(path)))
        except (FileNotFoundError, RuntimeError, TypeError) as error:
            raise DataError("not a readable codebook", found=error, where=run.path(path)) from error

    def prepare(self, vectors: Float32) -> Float32:
        """(n, d) float32 as the lists hold it, (n, d') float32: normalised for cosine, then OPQ or PCA.

        Raises:
            DataError: the shape is wrong, or a number is not finite.
        """
        check_vectors(vectors, self.dim)
        prepared = np.ascontiguousarray(vectors, dtype=np.float32)
        for transform in self._transforms if len(prepared) else []:
            prepared = transform.apply(prepared)
        return prepared.reshape(len(prepared), self.ivf.d)

    def restore(self, prepared: Float32) -> Float32:
        """The inverse of `prepare` as far as there is one: a norm or a dropped dimension does not come back."""
        for transform in reversed(self._transforms):
            prepared = transform.reverse_transform(prepared)
        return prepared

    def assign(self, prepared: Float32, nprobe: int) -> tuple[Int64, Float32]:
        """The `nprobe` nearest lists of prepared vectors, and their distances: both (n, nprobe), nearest first."""
        distances, lists = self._quantizer.search(prepared, min(nprobe, self.num_lists))
        return lists, distances

    def borrow(self, ivf: faiss.IndexIVF) -> faiss.IndexIVF:
        """Let an index that was written by `serialize` use this codebook's quantizer, which it does not own."""
        # Frees the placeholder when it goes. Setting `thisown` instead corrupts SWIG's type table (m: 1.15.1).
        owner = faiss.IndexPreTransform(ivf.quantizer)
        owner.own_fields = True
        ivf.own_fields = False
        ivf.quantizer = self._quantizer
        return ivf

    def new_segment(self) -> faiss.IndexIVF:
        """An empty index with this codec, ready for vectors."""
        return self.borrow(parts(faiss.deserialize_index(self._empty_segment, READ_FLAGS))[0])

    def new_index(self) -> faiss.Index:
        """An empty index that needs nothing else: with the transforms, and a quantizer of its own."""
        return faiss.deserialize_index(faiss.serialize_index(self._index), READ_FLAGS)

    @property
    def codec(self) -> str:
        """What FAISS calls what is done to a vector, in order."""
        return ", ".join(type(step).__name__ for step in (*self._transforms, self.ivf))

    def serialize(self, ivf: faiss.IndexIVF) -> NDArray[np.uint8]:
        """Write an index that uses this codebook's quantizer, with an empty one in its place."""
        ivf.quantizer = placeholder = faiss.IndexFlat(ivf.d, ivf.metric_type)
        try:
            return faiss.serialize_index(ivf)
        finally:
            ivf.quantizer = self._quantizer
            del placeholder


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


def _make(factory: str, dim: int, metric: Metric) -> tuple[faiss.Index, faiss.IndexIVF, list[faiss.VectorTransform]]:
    """An untrained index and its parts.

    Raises:
        ConfigError: FAISS cannot read the factory, or it is none of FACTORIES.
    """
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        index = faiss.index_factory(dim, f"L2norm,{factory}" if metric == "cosine" else factory, kind)
        ivf, transforms = parts(index)
        for transform in transforms[metric == "cosine" :]:
            if type(transform) not in _TRANSFORMS or getattr(transform, "eigen_power", False):
                raise TypeError(f"it uses a {type(transform).__name__}, which cannot be undone")
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            "this index cannot be cut into segments",
            expected=FACTORIES,
            found=f"for {dim} dimensions: {str(error).rsplit('Error: ', 1)[-1]}",
            where=f"index.factory: {factory}",
        ) from error
    return index, ivf, transforms


def parts(index: faiss.Index) -> tuple[faiss.IndexIVF, list[faiss.VectorTransform]]:
    """The inverted file inside an index, and what is done to vectors before it.

    Raises:
        TypeError: it is no index that can be cut into segments.
    """
    transforms = []
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # a C++ vector; the stubs say it is a list
        transforms = [faiss.downcast_VectorTransform(chain.at(position)) for position in range(chain.size())]
        index = faiss.downcast_index(index.index)
    if not isinstance(index, faiss.IndexIVF) or type(index) not in _CODECS:
        raise TypeError(f"it makes a {type(index).__name__}")
    return index, transforms


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


def check_vectors(vectors: Float32, dim: int | None) -> None:
    """Refuse what is not (n, dim) and finite; any width where `dim` is None.

    Raises:
        DataError: with the first bad row.
    """
    if vectors.ndim != 2 or (dim is not None and vectors.shape[1] != dim):
        raise DataError("vectors have the wrong shape", expected=f"(n, {dim or 'd'})", found=vectors.shape)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise DataError(
            "vectors hold NaN or infinity",
            expected="finite numbers",
            found=f"{int((~finite).sum())} bad rows, the first is row {int(np.argmin(finite))}",
        )
