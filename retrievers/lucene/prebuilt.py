"""Downloads the Lucene indexes that Anserini's authors publish, by the names and checksums that its jar carries."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from retrievers.base import RetrieverError
from retrievers.index.build import publish
from retrievers.index.manifest import MANIFEST_NAME, open_manifest, write_manifest
from retrievers.lucene.build import ANALYZER
from retrievers.lucene.jvm import anserini_jar
from retrievers.names import did_you_mean

_TIMEOUT_SECONDS = 30.0
_MEMBERS = "prebuilt-indexes/"


@dataclass(frozen=True, slots=True)
class Prebuilt:
    """An index that can be downloaded.

    Attributes:
        name: such as "msmarco-v1-passage".
        url: of its archive, a tar.gz.
        md5: hex digest of the archive.
        archive_bytes: its size.
        documents: in the index.
    """

    name: str
    url: str
    md5: str
    archive_bytes: int
    documents: int


def find_prebuilt(name: str) -> Prebuilt:
    """Look an index up in the installed Anserini. Raises RetrieverError if it knows none of this name."""
    known: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(anserini_jar()) as jar:
        for member in jar.namelist():
            if member.startswith(_MEMBERS) and member.endswith(".json") and "-inverted" in member:
                known.update((entry["name"], entry) for entry in json.loads(jar.read(member)))
    if name not in known:
        near = did_you_mean(name, known, most=5)
        raise RetrieverError(f"Anserini has no index {name!r} among the {len(known)} it publishes{near}")
    entry = known[name]
    return Prebuilt(name, entry["urls"][0], entry["md5"], entry["compressed_size"], entry["documents"])


def cache_folder() -> Path:
    """Where downloaded indexes are kept: $RETRIEVERS_CACHE, by default ~/.cache/retrievers."""
    return Path(os.environ.get("RETRIEVERS_CACHE", "~/.cache/retrievers")).expanduser()


def prebuilt_index(
    wanted: Prebuilt,
    cache: Path | None = None,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    transport: httpx.BaseTransport | None = None,
) -> Path:
    """Return the folder of a prebuilt index, downloading it if it is not in the cache.

    Its manifest is written after the archive's checksum was found right. It says what the archive was; `corpus_sha256`
    is empty, because the corpus was never here.

    Args:
        wanted: see `find_prebuilt`.
        cache: where indexes are kept; by default `cache_folder()`.
        on_progress: called with (bytes downloaded, bytes in all).
        transport: replaces the network, for tests.

    Raises:
        RetrieverError: if it cannot be downloaded, is not what its checksum says, or the disk is full.
    """
    folder = (cache or cache_folder()) / "indexes" / wanted.name
    if (folder / MANIFEST_NAME).is_file():
        open_manifest(folder, "lucene")
        return folder
    began = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{wanted.name}.", dir=folder.parent) as work:
            archive = Path(work) / "archive.tar.gz"
            _download(wanted, archive, on_progress, transport)
            with tarfile.open(archive) as packed:
                packed.extractall(Path(work) / "unpacked", filter="data")
            roots = [path.parent for path in (Path(work) / "unpacked").rglob("segments_*")]
            if len(roots) != 1:
                raise RetrieverError(f"{wanted.url} holds {len(roots)} Lucene indexes instead of one")
            write_manifest(
                roots[0],
                backend="lucene",
                corpus=wanted.name,
                corpus_sha256="",
                documents=wanted.documents,
                parameters={"analyzer": ANALYZER, "source": wanted.url, "archive_md5": wanted.md5},
                versions={},
                build_seconds=time.monotonic() - began,
            )
            publish(roots[0], folder)
    except (OSError, tarfile.TarError) as error:
        raise RetrieverError(f"index prebuilt:{wanted.name} could not be written to {folder}: {error}") from error
    return folder


def _download(
    wanted: Prebuilt, archive: Path, on_progress: Callable[[int, int], None], transport: httpx.BaseTransport | None
) -> None:
    digest, done = hashlib.md5(usedforsecurity=False), 0
    try:
        with (
            httpx.Client(timeout=_TIMEOUT_SECONDS, follow_redirects=True, transport=transport) as client,
            client.stream("GET", wanted.url) as answer,
            archive.open("wb") as file,
        ):
            answer.raise_for_status()
            for piece in answer.iter_raw():
                file.write(piece)
                digest.update(piece)
                done += len(piece)
                on_progress(done, wanted.archive_bytes)
    except httpx.HTTPError as error:
        raise RetrieverError(
            f"index prebuilt:{wanted.name} cannot be downloaded ({type(error).__name__}: {error}); try again where "
            f"{wanted.url} can be reached, or build an index of your own with `agentrl index build`"
        ) from error
    if digest.hexdigest() != wanted.md5:
        raise RetrieverError(
            f"{wanted.url}: what came has MD5 {digest.hexdigest()} and must have {wanted.md5}; try again"
        )
