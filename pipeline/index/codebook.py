"""The codebook: the frozen coarse quantizer and codec that all segments of a run share.

`train_codebook` makes it; it never changes afterwards. It holds the codec. Only this module, `segment` and
`train_codebook` import faiss for the index.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.config.tree import Metric
from pipeline.errors import ConfigError, DataError
from pipeline.index.segment_files import check_digest
from pipeline.run import Run
from pipeline.storage import objects

FACTORIES = (
    "auto, Flat, or IVF with Flat, SQ or PQ, perhaps after OPQ, PCA or RR; examples: auto; Flat; IVF1024,SQ8; "
    "OPQ32_128,IVF4096_HNSW32,PQ32"
)

READ_FLAGS = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE  # a table per segment would not fit into memory
_CODECS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
_TRANSFORMS = (faiss.OPQMatrix, faiss.PCAMatrix, faiss.RandomRotationMatrix)


def set_threads(num_threads: int) -> None:
    """Set the OpenMP threads of all later FAISS calls of this process."""
    faiss.omp_set_num_threads(num_threads)


class Codebook:
    """The coarse quantizer and codec that all segments of a run share; never changed.

    Attributes:
        dim: width of vectors and queries.
        exact: `restore` returns exactly the stored numbers.
        ivf: the empty FAISS index.
    """

    def __init__(self, data: bytes) -> None:
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
            DataError: it is missing, or its bytes have changed.
        """
        if verify:
            check_digest(run.path(path), sha256)
        try:
            return cls(objects.read_bytes(run.path(path)))
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
        """The inverse of `prepare`, except for norms and dropped dimensions."""
        for transform in reversed(self._transforms):
            prepared = transform.reverse_transform(prepared)
        return prepared

    def assign(self, prepared: Float32, nprobe: int) -> tuple[Int64, Float32]:
        """The `nprobe` nearest lists of prepared vectors, and their distances: both (n, nprobe), nearest first."""
        distances, lists = self._quantizer.search(prepared, min(nprobe, self.num_lists))
        return lists, distances

    def borrow(self, ivf: faiss.IndexIVF) -> faiss.IndexIVF:
        """Let an index that was written by `serialize` use this codebook's quantizer, without owning it."""
        # The owner frees the placeholder. Setting `thisown` instead corrupts SWIG's type table (measured on 1.15.1).
        owner = faiss.IndexPreTransform(ivf.quantizer)
        owner.own_fields = True
        ivf.own_fields = False
        ivf.quantizer = self._quantizer
        return ivf

    def new_segment(self) -> faiss.IndexIVF:
        """An empty index with this codec, ready for vectors."""
        return self.borrow(parts(faiss.deserialize_index(self._empty_segment, READ_FLAGS))[0])

    def new_index(self) -> faiss.Index:
        """An empty stand-alone index, with the transforms and its own quantizer."""
        return faiss.deserialize_index(faiss.serialize_index(self._index), READ_FLAGS)

    @property
    def codec(self) -> str:
        """FAISS's names of the steps applied to a vector, in order."""
        return ", ".join(type(step).__name__ for step in (*self._transforms, self.ivf))

    def serialize(self, ivf: faiss.IndexIVF) -> NDArray[np.uint8]:
        """Write an index that uses this codebook's quantizer, with an empty one in its place."""
        ivf.quantizer = placeholder = faiss.IndexFlat(ivf.d, ivf.metric_type)
        try:
            return faiss.serialize_index(ivf)
        finally:
            ivf.quantizer = self._quantizer
            del placeholder


def make_index(
    factory: str, dim: int, metric: Metric
) -> tuple[faiss.Index, faiss.IndexIVF, list[faiss.VectorTransform]]:
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
            f"index.factory {factory} is not supported",
            expected=FACTORIES,
            found=f"for {dim} dimensions: {str(error).rsplit('Error: ', 1)[-1]}",
            where="index.factory",
        ) from error
    return index, ivf, transforms


def parts(index: faiss.Index) -> tuple[faiss.IndexIVF, list[faiss.VectorTransform]]:
    """The inverted file inside an index, and the transforms before it.

    Raises:
        TypeError: its type is not supported.
    """
    transforms = []
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # a C++ vector; the stubs say it is a list
        transforms = [faiss.downcast_VectorTransform(chain.at(position)) for position in range(chain.size())]
        index = faiss.downcast_index(index.index)
    if not isinstance(index, faiss.IndexIVF) or type(index) not in _CODECS:
        raise TypeError(f"it makes a {type(index).__name__}")
    return index, transforms


def check_vectors(vectors: Float32, dim: int | None) -> None:
    """Refuse vectors that are not (n, dim) and finite; any width if `dim` is None.

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
