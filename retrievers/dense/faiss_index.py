"""The FAISS part of a dense index (Douze et al. 2024, arXiv 2401.08281): which kinds there are, and how they are made."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrievers.base import RetrieverError

INDEX_NAME = "index.faiss"
KINDS = ("flat", "fp16", "hnsw", "ivfpq")

_ROWS_AT_ONCE = 65536
_WRITE_BYTES = 1 << 20
# FAISS's k-means warns below 39 vectors a centroid; a byte of a compressed vector names one of 256 centroids.
_VECTORS_A_CENTROID = 39
_CENTROIDS_OF_A_BYTE = 256
_SEED = 1234


@dataclass(frozen=True, slots=True)
class FaissOptions:
    """Which FAISS index; all rank by inner product.

    Attributes:
        kind: "flat" compares with every vector; "fp16" does so too, with numbers of two bytes in place of four; "hnsw"
            (Malkov and Yashunin 2016, arXiv 1603.09320) walks a graph of neighbours; "ivfpq" (Jégou et al. 2011,
            doi:10.1109/TPAMI.2010.57) looks at compressed vectors near the query.
        hnsw_links: neighbours of a vector in the graph.
        hnsw_effort: candidates while the graph is built.
        ivf_lists: cells of vectors; None makes 4 √documents of them, with at least 39 vectors each on average.
        pq_bytes: size of a compressed vector; it must divide the dimension.
    """

    kind: str = "flat"
    hnsw_links: int = 32
    hnsw_effort: int = 200
    ivf_lists: int | None = None
    pq_bytes: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RetrieverError(f"kind is {self.kind!r} and must be one of {', '.join(KINDS)}")
        numbers = (self.hnsw_links, self.hnsw_effort, self.pq_bytes, 1 if self.ivf_lists is None else self.ivf_lists)
        if min(numbers) < 1:
            raise RetrieverError("hnsw_links, hnsw_effort, ivf_lists and pq_bytes must be at least 1")

    def settled(self, documents: int, dimension: int) -> FaissOptions:
        """Fill in what is left open. Raises RetrieverError if the kind does not fit so many vectors of this dimension."""
        if self.kind != "ivfpq":
            return self
        if dimension % self.pq_bytes:
            raise RetrieverError(f"pq_bytes is {self.pq_bytes} and must divide the encoder's dimension {dimension}")
        lists = self.ivf_lists
        if lists is None:
            lists = max(1, min(round(4 * math.sqrt(documents)), documents // _VECTORS_A_CENTROID))
        needed = _VECTORS_A_CENTROID * max(lists, _CENTROIDS_OF_A_BYTE)
        if documents < needed:
            raise RetrieverError(
                f"{documents} passages are too few for ivfpq with {lists} lists, which needs {needed}; use flat or hnsw"
            )
        return FaissOptions(self.kind, self.hnsw_links, self.hnsw_effort, lists, self.pq_bytes)

    def description(self) -> dict[str, object]:
        """What matters to this kind, for a manifest."""
        prefix = {"flat": ("-",), "fp16": ("-",), "hnsw": ("hnsw_",), "ivfpq": ("ivf_", "pq_")}[self.kind]
        return {name: value for name, value in asdict(self).items() if name == "kind" or name.startswith(prefix)}


def import_faiss(threads: int | None) -> Any:
    """The FAISS library, with FAISS and torch set to a number of threads, or left as they are.

    Raises:
        RetrieverError: if it is missing, or the number is invalid.
    """
    if importlib.util.find_spec("faiss") is None:
        raise RetrieverError("faiss is not installed; pip install faiss-cpu")
    if threads is not None and threads < 1:
        raise RetrieverError(f"{threads} threads cannot work; give at least 1")
    library = importlib.import_module("faiss")
    if threads is not None:
        library.omp_set_num_threads(threads)
        importlib.import_module("torch").set_num_threads(threads)
    return library


def write_faiss(library: Any, vectors: NDArray[np.float32], options: FaissOptions, path: Path) -> None:
    """Make the index of settled `options` over `vectors`, of shape (documents, dimension), and write it.

    It is held in memory while it is made, as it is when it is searched.

    Raises:
        OSError: if it cannot be written.
    """
    documents, dimension = vectors.shape
    metric = library.METRIC_INNER_PRODUCT
    if options.kind == "flat":
        index = library.IndexFlatIP(dimension)
    elif options.kind == "fp16":
        index = library.IndexScalarQuantizer(dimension, library.ScalarQuantizer.QT_fp16, metric)
    elif options.kind == "hnsw":
        index = library.IndexHNSWFlat(dimension, options.hnsw_links, metric)
        index.hnsw.efConstruction = options.hnsw_effort
    else:
        index = library.IndexIVFPQ(
            library.IndexFlatIP(dimension), dimension, options.ivf_lists, options.pq_bytes, 8, metric
        )
        # More is not used: FAISS takes at most 256 vectors a centroid.
        wanted = 256 * max(options.ivf_lists or 1, _CENTROIDS_OF_A_BYTE)
        rows = np.random.default_rng(_SEED).choice(documents, min(documents, wanted), replace=False)
        index.train(np.ascontiguousarray(vectors[np.sort(rows)]))
    for start in range(0, documents, _ROWS_AT_ONCE):
        index.add(np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE]))
    # FAISS's own file writer does not notice when the last bytes find no room.
    with path.open("wb") as file:
        library.write_index(index, library.PyCallbackIOWriter(file.write, _WRITE_BYTES))
        file.flush()
        os.fsync(file.fileno())


def read_faiss(library: Any, path: Path, *, documents: int, dimension: int) -> Any:
    """Read an index. Raises RetrieverError if it is damaged, or not of this size."""
    try:
        index = library.read_index(str(path))
    except RuntimeError as error:
        raise RetrieverError(f"{path} cannot be read: {error}; build the index again") from error
    if (index.ntotal, index.d) != (documents, dimension):
        raise RetrieverError(
            f"{path} has {index.ntotal} vectors of {index.d} numbers and the manifest says {documents} of {dimension}; "
            "build the index again"
        )
    return index
