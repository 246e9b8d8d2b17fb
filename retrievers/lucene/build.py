"""Writes a Lucene index of a corpus.

Anserini's IndexCollection does the work in a child process (`retrievers.lucene.indexer`), so that the caller may have threads
and survives a crash of Java.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, ClassVar

from retrievers.base import RetrieverError
from retrievers.index.build import CheckedCorpus, IndexContents, OnProgress
from retrievers.index.corpus import CorpusReader
from retrievers.lucene.jvm import JvmOptions, anserini_jar, java_home

ANALYZER = "io.anserini.analysis.DefaultEnglishAnalyzer, Porter stemmer, stop words removed"


class LuceneBuilder:
    """Builds an index of words; see `IndexBuilder`. The index keeps the passages, for hits and for query expansion."""

    backend: ClassVar[str] = "lucene"
    resumes: ClassVar[bool] = False

    def __init__(self, *, threads: int = 2, heap: str = "1g") -> None:
        """Nothing is started yet.

        Args:
            threads: of the indexer.
            heap: of its Java, such as "1g".

        Raises:
            RetrieverError: if Java cannot have so many threads or such a heap.
        """
        self._java = JvmOptions(heap, threads)

    def prepare(self) -> None:
        """Raise RetrieverError if Anserini or Java is missing."""
        anserini_jar()
        java_home()

    def fit(self, documents: int) -> None:
        """Any number of passages fits."""

    def write(self, corpus: CheckedCorpus, work: Path, on_progress: OnProgress) -> IndexContents:
        """See `IndexBuilder.write`."""
        # IndexCollection reads every file of a folder, so the corpus stands alone in one.
        source = work / "corpus" / "corpus.jsonl"
        source.parent.mkdir()
        if corpus.plain:
            source.symlink_to(corpus.path)
        else:
            _write_plain(corpus.path, source)
        end = _run_indexer(work, self._java, corpus.documents, on_progress)
        if end["documents"] != corpus.documents:
            raise RetrieverError(
                f"the index of {corpus.path} has {end['documents']} documents and the corpus {corpus.documents}; "
                f"the indexer counted {end['counters']}"
            )
        corpus.check_unchanged()
        versions = {
            "pyserini": version("pyserini"),
            "anserini": anserini_jar().name.removeprefix("anserini-").removesuffix("-fatjar.jar"),
            "lucene": str(end["lucene"]),
        }
        return IndexContents({"analyzer": ANALYZER}, versions)


def _write_plain(corpus: Path, out: Path) -> None:
    """Write a corpus as `JsonCollection` reads it. Raises OSError if it cannot be written."""
    with out.open("w", encoding="utf-8") as file:
        for passage in CorpusReader(corpus):
            file.write(json.dumps(asdict(passage), ensure_ascii=False) + "\n")


def _run_indexer(work: Path, options: JvmOptions, total: int, on_progress: OnProgress) -> dict[str, object]:
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
                on_progress(status["indexed"], total)
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
