"""Writes a FAISS index of a corpus (Douze et al. 2024, arXiv 2401.08281) with a sentence encoder.

Vectors are appended to a file of the work folder shard by shard, so that memory does not grow with the corpus until FAISS
gathers them at the end. A build that was killed goes on after its last whole shard when it is started again with the same
corpus, encoder and parameters.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from retrievers.base import RetrieverError
from retrievers.dense.encoder import Encoder, EncoderOptions
from retrievers.dense.faiss_index import INDEX_NAME, FaissOptions, import_faiss, write_faiss
from retrievers.index.build import CheckedCorpus, IndexContents, OnProgress
from retrievers.index.corpus import CorpusReader
from retrievers.index.passages import PassageStore, write_passages

_VECTORS, _STATE = "vectors.f32", "state.json"


class DenseBuilder:
    """Builds an index of vectors; see `IndexBuilder`. A passage is encoded with its title, as it stands in `contents`."""

    backend: ClassVar[str] = "dense"
    resumes: ClassVar[bool] = True

    def __init__(
        self,
        encoder: EncoderOptions,
        faiss: FaissOptions | None = None,
        *,
        batch: int = 32,
        shard: int = 2048,
        threads: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        """Nothing is loaded yet.

        Args:
            encoder: the model.
            faiss: the kind of FAISS index; by default flat.
            batch: passages that the model takes at once.
            shard: passages between two savings; within one they are encoded in the order of their length.
            threads: of torch and FAISS; None leaves them as they are.
            device: of torch; None takes a GPU where there is one.
            dtype: what the model computes in, one of `retrievers.models.DTYPES`.

        Raises:
            RetrieverError: if a number is not positive.
        """
        if batch < 1 or shard < 1:
            raise RetrieverError(f"batch {batch} and shard {shard} must be at least 1")
        self._encoder, self._faiss = encoder, faiss or FaissOptions()
        self._batch, self._shard, self._threads, self._device, self._dtype = batch, shard, threads, device, dtype
        self._library: Any
        self._model: Encoder

    def prepare(self) -> None:
        """Load FAISS and the encoder. Raises RetrieverError if one is missing, or an option does not fit the encoder."""
        self._library = import_faiss(self._threads)
        self._model = Encoder(self._encoder, device=self._device, dtype=self._dtype)

    def fit(self, documents: int) -> None:
        """Raise RetrieverError if the kind of FAISS index does not fit so many passages."""
        self._faiss = self._faiss.settled(documents, self._model.dimension)

    def write(self, corpus: CheckedCorpus, work: Path, on_progress: OnProgress) -> IndexContents:
        """See `IndexBuilder.write`."""
        folder = work / "index"
        folder.mkdir(exist_ok=True)
        write_passages(folder, CorpusReader(corpus.path))
        corpus.check_unchanged()
        vectors = _encode_shards(work, corpus, self._model, self._batch, self._shard, on_progress)
        write_faiss(self._library, vectors, self._faiss, folder / INDEX_NAME)
        versions = {
            "faiss": self._library.__version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
        return IndexContents({"encoder": self._model.description(), "faiss": self._faiss.description()}, versions)


def _encode_shards(
    work: Path, corpus: CheckedCorpus, model: Encoder, batch: int, shard: int, on_progress: OnProgress
) -> NDArray[np.float32]:
    """Append the vectors that are missing to the file of vectors; return it, of shape (documents, dimension)."""
    path, row_bytes = work / _VECTORS, 4 * model.dimension
    # The batch decides the last bits of a vector, through padding.
    identity = {"corpus": corpus.sha256, "encoder": model.description(), "batch": batch, "shard": shard}
    done = _finished(work / _STATE, identity)
    if not path.is_file() or path.stat().st_size < done * row_bytes:
        done = 0
    store = PassageStore(work / "index")
    try:
        with path.open("ab") as file:
            file.truncate(done * row_bytes)
            on_progress(done, len(store))
            for start in range(done, len(store), shard):
                end = min(start + shard, len(store))
                texts = [store[row].contents for row in range(start, end)]
                file.write(model.encode_passages(texts, batch).tobytes())
                file.flush()
                os.fsync(file.fileno())
                _save_state(work / _STATE, {"identity": identity, "rows": end})
                on_progress(end, len(store))
    finally:
        store.close()
    return np.memmap(path, np.float32, "r", shape=(corpus.documents, model.dimension))


def _finished(path: Path, identity: dict[str, object]) -> int:
    """How many vectors an earlier try at the same build saved. Raises RetrieverError if what it wrote is damaged."""
    if not path.is_file():
        return 0
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return state["rows"] if state["identity"] == identity else 0
    except (ValueError, KeyError, TypeError) as error:
        raise RetrieverError(f"{path} is damaged ({error!r}); remove {path.parent} and build again") from error


def _save_state(path: Path, state: dict[str, object]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(state), encoding="utf-8")
    new.replace(path)
