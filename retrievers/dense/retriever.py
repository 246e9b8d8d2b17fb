"""Dense retrieval (Karpukhin et al. 2020, arXiv 2004.04906): the passages whose vectors are nearest to the query's.

One thread of the process encodes and searches; queries reach it in micro-batches, see `retrievers.batching`.
"""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrievers.base import Hit, RetrieverError
from retrievers.dense.encoder import Encoder, EncoderOptions
from retrievers.dense.faiss_index import INDEX_NAME, import_faiss, read_faiss
from retrievers.index.passages import PassageStore
from retrievers.index.retriever import IndexRetriever

MAX_BATCH = 64

_TIES = 1000


class DenseRetriever(IndexRetriever):
    """Searches an index of vectors; also see `Retriever`.

    Ties of score are broken by id, also where they are cut at `k`, unless more than a thousand passages tie there. Other
    queries of the same batch change only the last bits of a query's scores, because of padding. It can share a process
    with `LuceneRetriever` as long as that process never forks, which the JVM does not survive.
    """

    def __init__(
        self,
        index: str,
        *,
        model: str | None = None,
        threads: int = 2,
        device: str | None = None,
        dtype: str = "float32",
        ef_search: int = 64,
        probes: int = 16,
    ) -> None:
        """Open the index and load its encoder.

        Args:
            index: the index folder.
            model: where the encoder is, if not where the index says; its weights must be the same.
            threads: of torch and FAISS, for the whole process.
            device: of the encoder; None takes a GPU where there is one.
            dtype: of the encoder, one of `retrievers.models.DTYPES`, whatever the index was built with. The last digits of
                scores differ.
            ef_search: candidates of a search in an "hnsw" index, at least as many as the hits that it looks for; more are
                slower and find more.
            probes: lists that a search in an "ivfpq" index looks at; more are slower and find more.

        Raises:
            RetrieverError: if the folder is no sound dense index, or its encoder is not there.
        """
        if ef_search < 1 or probes < 1:
            raise RetrieverError(f"ef_search {ef_search} and probes {probes} must be at least 1")
        folder = Path(index)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dense")
        super().__init__(index, "dense", self._thread.submit, MAX_BATCH)
        settings: Any = self._manifest.parameters
        self._faiss = import_faiss(threads)
        self._encoder = _open_encoder(settings["encoder"], model, device, dtype, index)
        self._vectors = read_faiss(
            self._faiss,
            folder / INDEX_NAME,
            documents=self._manifest.documents,
            dimension=self._encoder.dimension,
        )
        self._kind = settings["faiss"]["kind"]
        self._search_options = {"hnsw": {"ef_search": ef_search}, "ivfpq": {"probes": probes}}.get(self._kind, {})
        self._passages = PassageStore(folder)

    async def read(self, document_id: str) -> Hit | None:
        """Return the whole document with this id, with score 0, or None if there is none.

        Raises:
            RetrieverError: if the retriever is closed.
        """
        self._check_open()
        found = await asyncio.to_thread(self._passages.find, document_id)
        return None if found is None else Hit(found.id, found.contents, 0.0)

    def _count(self) -> int:
        return len(self._passages)

    def _description(self) -> dict[str, object]:
        return {
            "encoder": self._encoder.options.path,
            "kind": self._kind,
            **self._search_options,
            "device": self._encoder.device,
            "dtype": self._encoder.dtype,
        }

    def _release(self) -> None:
        self._thread.shutdown()
        self._passages.close()

    def _faiss_parameters(self, count: int) -> Any:
        """How FAISS searches for `count` hits."""
        if self._kind == "hnsw":
            return self._faiss.SearchParametersHNSW(efSearch=max(self._search_options["ef_search"], count))
        return self._faiss.SearchParametersIVF(nprobe=self._search_options["probes"]) if self._kind == "ivfpq" else None

    def _search_worker(self, queries: list[str], k: int) -> list[list[Hit]]:
        try:
            return self._nearest(self._encoder.encode_queries(queries, MAX_BATCH), k)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise RetrieverError(f"search in {self._index} failed: {error}") from error

    def _nearest(self, vectors: NDArray[np.float32], k: int) -> list[list[Hit]]:
        """The `k` best hits of each vector, of shape (queries, dimension)."""
        # One more shows whether the cut goes through a tie.
        scores, rows = self._look_up(vectors, k + 1)
        found = []
        for position in range(len(vectors)):
            row_scores, row_rows = scores[position], rows[position]
            if len(row_rows) > k and row_rows[k] >= 0 and row_scores[k - 1] == row_scores[k]:
                more_scores, more_rows = self._look_up(vectors[position : position + 1], k + _TIES)
                row_scores, row_rows = more_scores[0], more_rows[0]
            found.append(self._hits(row_scores.tolist(), row_rows.tolist())[:k])
        return found

    def _look_up(self, vectors: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and rows of the passages nearest to each vector, best first, both of shape (queries, at most count)."""
        count = min(count, len(self._passages))
        return self._vectors.search(vectors, count, params=self._faiss_parameters(count))

    def _hits(self, scores: list[float], rows: list[int]) -> list[Hit]:
        hits = []
        for score, row in zip(scores, rows, strict=True):
            # FAISS fills up with row -1 where an approximate search found fewer.
            if row >= 0 and math.isfinite(score):
                passage = self._passages[row]
                hits.append(Hit(passage.id, passage.contents, score))
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))


def _open_encoder(settings: dict[str, Any], model: str | None, device: str | None, dtype: str, index: str) -> Encoder:
    """Load the encoder that a manifest describes. Raises RetrieverError if it is not there, or is another one."""
    known = {name: settings[name] for name in EncoderOptions.__dataclass_fields__}
    encoder = Encoder(EncoderOptions(**(known | ({"path": model} if model else {}))), device=device, dtype=dtype)
    if encoder.sha256 != settings["weights_sha256"]:
        raise RetrieverError(
            f"{encoder.options.path} is not the model that index {index} was built with: its weights' hash is "
            f"{encoder.sha256[:12]}… and must be {settings['weights_sha256'][:12]}…; name the right one or build again"
        )
    return encoder
