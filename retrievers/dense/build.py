"""Builds a FAISS index of a corpus (Douze et al. 2024, arXiv 2401.08281) with a sentence encoder.

The build works in the hidden folder `.NAME.building` beside its destination. Vectors are appended there shard by shard,
so that memory does not grow with the corpus until FAISS gathers them at the end. A build that was killed goes on after
its last whole shard when it is started again with the same corpus, encoder and parameters.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers.base import RetrieverError
from retrievers.dense.encoder import Encoder, EncoderOptions
from retrievers.dense.faiss_index import INDEX_NAME, FaissOptions, import_faiss, write_faiss
from retrievers.index.build import CheckedCorpus, Progress, check_destination, no_progress, publish
from retrievers.index.manifest import Manifest, write_manifest
from retrievers.index.passages import PassageStore, write_passages

_VECTORS, _STATE = "vectors.f32", "state.json"


def build_dense_index(
    corpus: Path,
    out: Path,
    encoder: EncoderOptions,
    faiss: FaissOptions | None = None,
    *,
    batch: int = 32,
    shard: int = 2048,
    threads: int | None = None,
    device: str | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Validate a corpus, encode it and build its index into the new folder `out`.

    Args:
        corpus: JSON lines, see `retrievers.index.corpus`. A passage is encoded with its title, as it stands in `contents`.
        out: must not exist.
        encoder: the model.
        faiss: the kind of index; by default flat.
        batch: passages that the model takes at once.
        shard: passages between two savings; within one they are encoded in the order of their length.
        threads: of torch and FAISS; None leaves them as they are.
        device: of torch; None takes a GPU where there is one.
        progress: called with (passages checked, None), then with (passages encoded, passages in all).

    Raises:
        RetrieverError: if the corpus, the encoder or an option is not valid, `out` exists, the same build is running, or
            the disk is full. Shards that were finished are kept for the next try.
    """
    corpus, out, options = Path(corpus).absolute(), Path(out).absolute(), faiss or FaissOptions()
    if batch < 1 or shard < 1:
        raise RetrieverError(f"batch {batch} and shard {shard} must be at least 1")
    library = import_faiss(threads)
    check_destination(out)
    began = time.monotonic()
    # All that can be wrong is found before the folder is made, so that it leaves nothing.
    documents = sum(1 for _ in CheckedCorpus(corpus, progress).passages())
    model = Encoder(encoder, device=device)
    options = options.settled(documents, model.dimension)
    work = out.parent / f".{out.name}.building"
    try:
        with _locked(work):
            source = CheckedCorpus(corpus, no_progress)
            folder = work / "index"
            folder.mkdir(exist_ok=True)
            write_passages(folder, source.passages())
            vectors = _encode_shards(work, source, model, batch, shard, progress)
            write_faiss(library, vectors, options, folder / INDEX_NAME)
            manifest = write_manifest(
                folder,
                backend="dense",
                corpus=corpus.name,
                corpus_sha256=source.sha256,
                documents=source.documents,
                parameters={"encoder": model.description(), "faiss": options.description()},
                versions={
                    "faiss": library.__version__,
                    "torch": version("torch"),
                    "transformers": version("transformers"),
                },
                build_seconds=time.monotonic() - began,
            )
            publish(folder, out)
            shutil.rmtree(work)
    except OSError as error:
        raise RetrieverError(
            f"the index of {corpus} could not be written to {out}: {error}; make room and build again, which goes on with "
            f"what is finished, or remove {work}"
        ) from error
    return manifest


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Make the working folder, and keep it from any other process. Raises RetrieverError if one has it."""
    work.mkdir(parents=True, exist_ok=True)
    holder = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise RetrieverError(f"another build is working in {work}; wait for it") from error
    finally:
        os.close(holder)


def _encode_shards(
    work: Path, source: CheckedCorpus, model: Encoder, batch: int, shard: int, progress: Progress
) -> NDArray[np.float32]:
    """Append the vectors that are missing to the file of vectors; return it, of shape (documents, dimension)."""
    path, row_bytes = work / _VECTORS, 4 * model.dimension
    # The batch decides the last bits of a vector, through padding.
    identity = {"corpus": source.sha256, "encoder": model.description(), "batch": batch, "shard": shard}
    done = _finished(work / _STATE, identity)
    if not path.is_file() or path.stat().st_size < done * row_bytes:
        done = 0
    store = PassageStore(work / "index")
    try:
        with path.open("ab") as file:
            file.truncate(done * row_bytes)
            progress(done, len(store))
            for start in range(done, len(store), shard):
                end = min(start + shard, len(store))
                texts = [store[row].contents for row in range(start, end)]
                file.write(model.encode_passages(texts, batch).tobytes())
                file.flush()
                os.fsync(file.fileno())
                _save_state(work / _STATE, {"identity": identity, "rows": end})
                progress(end, len(store))
    finally:
        store.close()
    return np.memmap(path, np.float32, "r", shape=(source.documents, model.dimension))


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
