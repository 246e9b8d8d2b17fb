"""What an index folder says about itself: its `manifest.json`, the same for every kind of index."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from retrievers.base import RetrieverError

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"

_REMEDY = "build it with `agentrl index build`"
_TYPES = {"int": int, "str": str, "float": (int, float), "dict": dict}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index was built from and with.

    Attributes:
        backend: the kind of index: "lucene" or "dense".
        corpus: the corpus file's name, or the name of a prebuilt index.
        corpus_sha256: hex digest of the corpus file; empty if it was never seen, as with a prebuilt index.
        documents: passages in the corpus and in the index.
        parameters: all that decides what is found: the analyser, or the encoder, its weights' hash and the FAISS index.
        versions: of the libraries that built it.
        files: every other file of the folder, and its size in bytes.
        built_at: UTC, ISO 8601.
        build_seconds: wall time of validation and indexing.
        format_version: of this file.
    """

    backend: str
    corpus: str
    corpus_sha256: str
    documents: int
    parameters: dict[str, object]
    versions: dict[str, str]
    files: dict[str, int]
    built_at: str
    build_seconds: float
    format_version: int = FORMAT_VERSION


def write_manifest(
    folder: Path,
    *,
    backend: str,
    corpus: str,
    corpus_sha256: str,
    documents: int,
    parameters: dict[str, object],
    versions: dict[str, str],
    build_seconds: float,
) -> Manifest:
    """Describe the files of a finished folder and write its manifest. Raises OSError if that cannot be written."""
    manifest = Manifest(
        backend=backend,
        corpus=corpus,
        corpus_sha256=corpus_sha256,
        documents=documents,
        parameters=parameters,
        versions=versions,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != MANIFEST_NAME},
        built_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        build_seconds=round(build_seconds, 3),
    )
    (folder / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def open_manifest(folder: Path, backend: str | None = None) -> Manifest:
    """Read the manifest of an index folder and check that its files are there, each of its size.

    Args:
        folder: the index folder.
        backend: the kind that it must be of, or any.

    Raises:
        RetrieverError: if the folder is no index, was not finished, is damaged or of another kind or format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RetrieverError(f"index {folder} is not a folder; {_REMEDY}")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise RetrieverError(f"{folder} has no {MANIFEST_NAME}, so it is not an index of this project; {_REMEDY}")
    manifest = _parse(path)
    if backend is not None and manifest.backend != backend:
        raise RetrieverError(f"{path}: backend is {manifest.backend!r} and must be {backend!r}; name another index")
    for name, size in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise RetrieverError(f"{file} is missing, which {path} names; {_REMEDY} again")
        if file.stat().st_size != size:
            raise RetrieverError(f"{file} has {file.stat().st_size} bytes and {path} says {size}; {_REMEDY} again")
    return manifest


def _parse(path: Path) -> Manifest:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RetrieverError(f"{path} is damaged ({error}); {_REMEDY} again") from error
    found = record.get("format_version") if isinstance(record, dict) else None
    if found == 1:
        record = _from_version_1(record)
    elif found != FORMAT_VERSION:
        raise RetrieverError(f"{path}: format_version is {found!r} and must be {FORMAT_VERSION}; {_REMEDY} again")
    for field in fields(Manifest):
        if not isinstance(record.get(field.name), _TYPES[str(field.type).partition("[")[0]]):
            raise RetrieverError(f"{path}: {field.name!r} is missing or not of type {field.type}; {_REMEDY} again")
    return Manifest(**{field.name: record[field.name] for field in fields(Manifest)})


def _from_version_1(record: dict[str, object]) -> dict[str, object]:
    """Version 1 knew Lucene alone, and no sizes of files."""
    return record | {
        "format_version": FORMAT_VERSION,
        "parameters": {"analyzer": record.get("analyzer")},
        "versions": {name: record[name] for name in ("pyserini", "anserini", "lucene") if name in record},
        "files": {},
    }
