"""Builds a Lucene index of a corpus.

Anserini's IndexCollection does the work in a child process (`retrievers.lucene.indexer`), so that the caller may have threads
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
from importlib.metadata import version
from pathlib import Path
from typing import IO

from retrievers.base import RetrieverError
from retrievers.index.build import CheckedCorpus, Progress, check_destination, no_progress, publish
from retrievers.index.manifest import Manifest, open_manifest, write_manifest
from retrievers.lucene.jvm import JvmOptions, anserini_jar, java_home

ANALYZER = "io.anserini.analysis.DefaultEnglishAnalyzer, Porter stemmer, stop words removed"

__all__ = ["ANALYZER", "Manifest", "build_index", "open_manifest"]


def build_index(
    corpus: Path, out: Path, *, threads: int = 2, heap: str = "1g", progress: Progress = no_progress
) -> Manifest:
    """Validate a corpus and build its index into the new folder `out`; nothing stays behind if that fails.

    Args:
        corpus: JSON lines, see `retrievers.index.corpus`. The index keeps them, for hits and for query expansion.
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
    check_destination(out)
    began = time.monotonic()
    source = CheckedCorpus(corpus, progress)
    for _ in source.passages():
        pass

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
        end = _run_indexer(work, options, source.documents, progress)
        if end["documents"] != source.documents:
            raise RetrieverError(
                f"the index of {corpus} has {end['documents']} documents and the corpus {source.documents}; "
                f"the indexer counted {end['counters']}"
            )
        source.check_unchanged()
        manifest = write_manifest(
            index,
            backend="lucene",
            corpus=corpus.name,
            corpus_sha256=source.sha256,
            documents=source.documents,
            parameters={"analyzer": ANALYZER},
            versions={
                "pyserini": version("pyserini"),
                "anserini": jar.name.removeprefix("anserini-").removesuffix("-fatjar.jar"),
                "lucene": str(end["lucene"]),
            },
            build_seconds=time.monotonic() - began,
        )
        publish(index, out)
    except OSError as error:
        raise RetrieverError(f"the index of {corpus} could not be written to {out}: {error}") from error
    finally:
        shutil.rmtree(work)
    return manifest


def _run_indexer(work: Path, options: JvmOptions, total: int, progress: Progress) -> dict[str, object]:
    """Run the child to its end and return its last line: documents, counters, lucene. Kills it on the way out."""
    environment = dict(os.environ)
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "retrievers.lucene.indexer", str(work), options.heap, str(options.processors)]
    end: dict[str, object] = {}
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
                end = status
                progress(status["indexed"], total)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if "failure" in end:
            raise RetrieverError(f"the indexer failed in {work.parent}: {end['failure']}")
        if code != 0 or "lucene" not in end:
            raise RetrieverError(f"the indexer ended with status {code}; its last words:\n{_tail(log)}")
    return end


def _tail(log: IO[bytes], size: int = 2000) -> str:
    """The last `size` bytes of a file."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - size))
    return log.read().decode("utf-8", "replace").strip() or "(none)"
