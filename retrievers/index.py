"""Builds a Lucene index of a corpus, and says what an index folder was built from.

Anserini's IndexCollection does the work in a child process (`retrievers.indexer`), so that the caller may have threads
and survives a crash of Java. The index grows in a hidden folder beside its destination and is renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import IO

from retrievers.base import RetrieverError
from retrievers.corpus import CorpusReader
from retrievers.jvm import JvmOptions, anserini_jar, java_home

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
ANALYZER = "io.anserini.analysis.DefaultEnglishAnalyzer, Porter stemmer, stop words removed"

Progress = Callable[[int, int | None], None]

_REPORT_EVERY = 1000


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index was built from and with; `manifest.json` of its folder.

    Attributes:
        format_version: of this file.
        backend: the kind of index; "lucene".
        corpus: the corpus file's name.
        corpus_sha256: hex digest of the corpus file.
        documents: passages in the corpus and in the index.
        analyzer: what cuts text and queries into terms.
        pyserini, anserini, lucene: versions.
        built_at: UTC, ISO 8601.
        build_seconds: wall time of validation and indexing.
    """

    format_version: int
    backend: str
    corpus: str
    corpus_sha256: str
    documents: int
    analyzer: str
    pyserini: str
    anserini: str
    lucene: str
    built_at: str
    build_seconds: float


def build_index(
    corpus: Path, out: Path, *, threads: int = 2, heap: str = "1g", progress: Progress = lambda done, total: None
) -> Manifest:
    """Validate a corpus and build its index into the new folder `out`; nothing stays behind if that fails.

    Args:
        corpus: JSON lines, see `retrievers.corpus`.
        out: must not exist.
        threads: of the indexer.
        heap: of its Java, such as "1g".
        progress: called with (passages validated, None), then with (passages indexed, passages in all).

    Raises:
        RetrieverError: if the corpus is not valid, `out` exists, Java is missing or the indexer fails.
    """
    corpus, out = Path(corpus).absolute(), Path(out).absolute()
    options = JvmOptions(heap, threads)
    jar = anserini_jar()
    java_home()
    if os.path.lexists(out):
        raise RetrieverError(f"{out} exists; remove it or choose another folder for the index")
    began = time.monotonic()
    reader = CorpusReader(corpus)
    before = _identity(corpus) if corpus.is_file() else None
    for _ in reader:
        if reader.count % _REPORT_EVERY == 0:
            progress(reader.count, None)
    progress(reader.count, None)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".building", dir=out.parent))
    except OSError as error:
        raise RetrieverError(f"{out.parent} cannot be written: {error.strerror}; choose another folder") from error
    try:
        index = work / "index"
        (work / "corpus").mkdir()
        # IndexCollection reads every file of a folder, so the corpus stands alone in one.
        (work / "corpus" / "corpus.jsonl").symlink_to(corpus)
        end = _run_indexer(work, options, reader.count, progress)
        if end["documents"] != reader.count:
            raise RetrieverError(
                f"the index of {corpus} has {end['documents']} documents and the corpus {reader.count}; "
                f"the indexer counted {end['counters']}"
            )
        if _identity(corpus) != before:
            raise RetrieverError(f"{corpus} changed while it was indexed; build again when nothing writes to it")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            backend="lucene",
            corpus=corpus.name,
            corpus_sha256=reader.sha256,
            documents=reader.count,
            analyzer=ANALYZER,
            pyserini=version("pyserini"),
            anserini=jar.name.removeprefix("anserini-").removesuffix("-fatjar.jar"),
            lucene=str(end["lucene"]),
            built_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            build_seconds=round(time.monotonic() - began, 3),
        )
        (index / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        if os.path.lexists(out):
            raise RetrieverError(f"{out} appeared while its index was built; remove it or choose another folder")
        index.rename(out)
    except OSError as error:
        raise RetrieverError(f"the index of {corpus} could not be written to {out}: {error}") from error
    finally:
        shutil.rmtree(work)
    return manifest


def open_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of an index folder.

    Raises:
        RetrieverError: if the folder is no index, was not finished, or is of another format.
    """
    folder = Path(folder)
    remedy = "build it with `agentrl index build`"
    if not folder.is_dir():
        raise RetrieverError(f"index {folder} is not a folder; {remedy}")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise RetrieverError(f"{folder} has no {MANIFEST_NAME}, so it is not an index of this project; {remedy}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RetrieverError(f"{path} is damaged ({error}); {remedy} again") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        found = record.get("format_version") if isinstance(record, dict) else None
        raise RetrieverError(f"{path}: format_version is {found!r} and must be {FORMAT_VERSION}; {remedy} again")
    types = {"int": int, "str": str, "float": (int, float)}
    for field in fields(Manifest):
        if not isinstance(record.get(field.name), types[str(field.type)]):
            raise RetrieverError(f"{path}: {field.name!r} is missing or not of type {field.type}; {remedy} again")
    if record["backend"] != "lucene":
        raise RetrieverError(f"{path}: backend is {record['backend']!r} and must be 'lucene'; {remedy} again")
    if next(folder.glob("segments_*"), None) is None:
        raise RetrieverError(f"{folder} has a {MANIFEST_NAME} and no Lucene files; {remedy} again")
    return Manifest(**{field.name: record[field.name] for field in fields(Manifest)})


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _run_indexer(work: Path, options: JvmOptions, total: int, progress: Progress) -> dict[str, object]:
    """Run the child to its end and return its last line: documents, counters, lucene. Kills it on the way out."""
    environment = dict(os.environ)
    root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "retrievers.indexer", str(work), options.heap, str(options.processors)]
    end: dict[str, object] | None = None
    with tempfile.TemporaryFile() as log:
        # A session of its own keeps Ctrl-C away from the child: the parent alone decides, and cleans up.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                status = json.loads(line)
                if "lucene" in status:
                    end = status
                progress(status["indexed"], total)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if code != 0 or end is None:
            raise RetrieverError(f"the indexer ended with status {code}; its last words:\n{_tail(log)}")
    return end


def _tail(log: IO[bytes], size: int = 2000) -> str:
    """The last `size` bytes of a file."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - size))
    return log.read().decode("utf-8", "replace").strip() or "(none)"
