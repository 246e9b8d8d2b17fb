"""Builds, opens and describes indexes of every kind: the one place that knows all kinds."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from retrievers.base import RetrieverError
from retrievers.index.build import OnProgress, build, no_progress
from retrievers.index.manifest import MANIFEST_NAME, Manifest, open_manifest
from retrievers.models import model_folder, weights_sha256
from retrievers.names import did_you_mean

if TYPE_CHECKING:
    from retrievers.dense.retriever import DenseRetriever
    from retrievers.lucene.retriever import LuceneRetriever
    from retrievers.stages.hybrid import HybridRetriever
    from retrievers.stages.rerank import RerankingRetriever

PREBUILT_PREFIX = "prebuilt:"

# Options that change how fast an index answers, not what.
_SPEED = ("threads", "heap", "device", "model")

# Named, not imported: neither Java's bridge nor torch may be loaded for an index of the other kind.
_BACKENDS = {
    "lucene": ("retrievers.lucene.retriever", "LuceneRetriever"),
    "dense": ("retrievers.dense.retriever", "DenseRetriever"),
}


def build_index(
    corpus: Path, out: Path, kind: str = "lucene", *, on_progress: OnProgress = no_progress, **options: Any
) -> Manifest:
    """Check a corpus and build its index into the new folder `out`; see `retrievers.index.build.build`.

    Args:
        kind: "lucene" for words; "flat", "fp16", "hnsw" or "ivfpq" for vectors.
        options: of `LuceneBuilder`, or of `DenseBuilder` and `FaissOptions`.

    Raises:
        RetrieverError: if the kind has no such option, or the index cannot be built.
    """
    if kind == "lucene":
        make = importlib.import_module("retrievers.lucene.build").LuceneBuilder
    else:
        dense = importlib.import_module("retrievers.dense.build")
        of_faiss = {
            name: options.pop(name)
            for name in list(options)
            if name in inspect.signature(dense.FaissOptions).parameters
        }
        options["faiss"] = dense.FaissOptions(kind, **of_faiss)
        make = dense.DenseBuilder
    known = inspect.signature(make).parameters
    for name in options:
        if name not in known:
            raise RetrieverError(f"an index of kind {kind} has no option {name!r}{did_you_mean(name, known)}")
    return build(make(**options), corpus, out, on_progress)


def index_folder(source: str) -> Path:
    """The folder of an index: a path, or `prebuilt:NAME`, which is downloaded unless it was before.

    Raises:
        RetrieverError: if there is no prebuilt index of that name, or it cannot be downloaded.
    """
    if source.startswith(PREBUILT_PREFIX):
        prebuilt = importlib.import_module("retrievers.lucene.prebuilt")
        return prebuilt.prebuilt_index(prebuilt.find_prebuilt(source.removeprefix(PREBUILT_PREFIX)))
    return Path(source)


def open_index(source: str, **options: Any) -> LuceneRetriever | DenseRetriever:
    """Open an index for searching: a `LuceneRetriever` or a `DenseRetriever`, whichever it is for.

    Args:
        source: see `index_folder`.
        options: of that retriever's class, such as `k1=1.2` or `ef_search=128`.

    Raises:
        RetrieverError: if the folder is no sound index, or an option is not one of its retriever's, or of another type.
    """
    folder = index_folder(source)
    check_options(folder, options)
    return retriever_class(folder)(str(folder), **options)


def open_stages(
    indexes: Sequence[Mapping[str, Any]], rerank: str | None = None, depth: int = 50
) -> LuceneRetriever | DenseRetriever | HybridRetriever | RerankingRetriever:
    """Open indexes, fuse them if there are several, and rank their hits anew if `rerank` names a cross-encoder.

    All run in this process, which must not fork when one of them is of Lucene. As the target of a
    `retrievers.service.process.ProcessRetriever` they have one of their own.

    Args:
        indexes: for each, the arguments of `open_index`, its source as "source".
        rerank: see `retrievers.stages.rerank.CrossEncoder`.
        depth: of the hits that it ranks.

    Raises:
        RetrieverError: if an index or the cross-encoder cannot be opened.
    """
    opened = [open_index(**index) for index in indexes]
    retriever = opened[0]
    if len(opened) > 1:
        retriever = importlib.import_module("retrievers.stages.hybrid").HybridRetriever(opened)
    if rerank is not None:
        stage = importlib.import_module("retrievers.stages.rerank")
        retriever = stage.RerankingRetriever(retriever, stage.CrossEncoder(rerank), depth=depth)
    return retriever


def check_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Check what `open_index` checks before it starts anything.

    Raises:
        RetrieverError: if the folder is no sound index, its retriever has no option of a name or takes another type, or a
            number is infinite.
    """
    retriever = retriever_class(folder)
    # Not from the signature, whose annotations stay text once Ray has made the class an actor's.
    known = {name: kind for name, kind in get_type_hints(retriever.__init__).items() if name not in ("index", "return")}
    for name, value in options.items():
        if name not in known:
            hint = did_you_mean(name, known)
            raise RetrieverError(f"{retriever.__name__} has no option {name!r}; it has {', '.join(known)}{hint}")
        if not _is_of(value, known[name]):
            wanted = inspect.formatannotation(known[name])
            raise RetrieverError(f"option {name!r} of {retriever.__name__} is {value!r} and must be of type {wanted}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RetrieverError(f"option {name!r} of {retriever.__name__} is {value} and must be a finite number")


def check_one_corpus(sources: Sequence[str]) -> None:
    """Check that indexes can be fused; what a prebuilt index was made from is not known, and taken to be right.

    Raises:
        RetrieverError: if a folder is no sound index, or two were built from different corpora.
    """
    known = [
        (source, manifest) for source in sources if (manifest := open_manifest(index_folder(source))).corpus_sha256
    ]
    for source, manifest in known[1:]:
        first, reference = known[0]
        if manifest.corpus_sha256 != reference.corpus_sha256:
            raise RetrieverError(
                f"index {first} was built from {reference.corpus} ({reference.corpus_sha256[:12]}…) and index {source} from "
                f"{manifest.corpus} ({manifest.corpus_sha256[:12]}…), and passages are fused by their ids; fuse indexes of "
                "one corpus"
            )


def retriever_class(folder: Path) -> Any:
    """The class that searches an index, to be made into a Ray actor for instance.

    Raises:
        RetrieverError: if the folder is no sound index, or of an unknown kind.
    """
    backend = open_manifest(folder).backend
    if backend not in _BACKENDS:
        raise RetrieverError(
            f"{folder / MANIFEST_NAME}: backend is {backend!r} and must be one of {', '.join(_BACKENDS)}; update this "
            "software or build the index again"
        )
    module, name = _BACKENDS[backend]
    return getattr(importlib.import_module(module), name)


def has_encoder(folder: Path) -> bool:
    """Whether an index is one of vectors, whose retriever encodes queries and takes the option `device`.

    Raises:
        RetrieverError: if the folder is no sound index.
    """
    return open_manifest(folder).backend == "dense"


def identify_index(source: str, options: Mapping[str, Any]) -> dict[str, object]:
    """All that decides what an index answers: what is cached or recorded for one such identity holds for no other.

    Raises:
        RetrieverError: if the folder is no sound index.
    """
    manifest = open_manifest(index_folder(source))
    return {
        "backend": manifest.backend,
        "corpus_sha256": manifest.corpus_sha256 or manifest.corpus,
        "parameters": manifest.parameters,
        "options": {name: value for name, value in options.items() if name not in _SPEED},
    }


def identify_search(
    indexes: Sequence[tuple[str, Mapping[str, Any]]], rerank: str | None = None, depth: int = 50
) -> dict[str, object]:
    """All that decides what `open_stages` finds.

    Args:
        indexes: each with its options.
        rerank, depth: as of `open_stages`.

    Raises:
        RetrieverError: if an index or the cross-encoder is missing or damaged, or two indexes are of different corpora.
    """
    check_one_corpus([source for source, _ in indexes])
    parts: dict[str, object] = {"indexes": [identify_index(source, options) for source, options in indexes]}
    return parts if rerank is None else parts | {"rerank": identify_reranker(rerank, depth)}


def identify_reranker(model: str, depth: int = 50) -> dict[str, object]:
    """All that decides how a cross-encoder ranks hits anew, for the same purpose; see `retrievers.models.model_folder`.

    Raises:
        RetrieverError: if there is no such model.
    """
    return {"weights_sha256": weights_sha256(model_folder(model)), "depth": depth}


def describe_index(folder: Path) -> dict[str, object]:
    """What a person wants to know of an index, in the order to print it; the sizes of its files are checked.

    Nested parameters have dotted names, such as "encoder.path".

    Raises:
        RetrieverError: if the folder is no sound index.
    """
    folder = Path(folder)
    manifest = open_manifest(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "index": str(folder),
        "backend": manifest.backend,
        "documents": manifest.documents,
        "corpus": manifest.corpus,
        "corpus_sha256": manifest.corpus_sha256 or "unknown",
        **_flat(manifest.parameters),
        **{f"version of {name}": value for name, value in manifest.versions.items()},
        "size": f"{size / 2**20:.1f} MiB in {sum(1 for _ in folder.iterdir())} files",
        "built_at": manifest.built_at,
        "build_seconds": manifest.build_seconds,
    }


def _is_of(value: object, annotation: Any) -> bool:
    """Whether a value is of a type or one of a union's. bool, which Python takes for int, is not; int does for float."""
    kinds = get_args(annotation) or (annotation,)
    return type(value) in kinds or (type(value) is int and float in kinds)


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
