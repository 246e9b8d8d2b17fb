"""The child process of `retrievers.lucene.build`: runs Anserini's IndexCollection and reports on standard output.

Started as `python -m retrievers.lucene.indexer WORK HEAP THREADS`; reads WORK/corpus, writes WORK/index. Each line of its
output is a JSON object with `indexed`, the number of documents so far; the last one also has `documents`, `counters`
and `lucene`, or `failure`, what Java says went wrong, with status 1.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import IO, Any

from retrievers.lucene import jvm

_POLL_SECONDS = 0.2
_COUNTERS = ("indexed", "unindexable", "empty", "skipped", "errors")


def main() -> None:
    """Run on the arguments of the command line; see the module's text."""
    work, heap, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    # Java prints to descriptor 1 too, and the parent must get the status lines alone.
    status = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    jvm.start(jvm.JvmOptions(heap, threads))
    try:
        jvm.submit(_index, work, threads, status).result()
    except BrokenPipeError:
        # Nobody reads the status: the parent was killed and cannot clean up.
        _remove(work)
        os._exit(1)


def _index(work: Path, threads: int, status: IO[str]) -> None:
    arguments = jvm.autoclass("io.anserini.index.IndexCollection$Args")()
    arguments.collectionClass = "JsonCollection"
    arguments.generatorClass = "DefaultLuceneDocumentGenerator"
    arguments.input = str(work / "corpus")
    arguments.index = str(work / "index")
    arguments.threads = threads
    arguments.storeRaw = True
    indexer = jvm.autoclass("io.anserini.index.IndexCollection")(arguments)
    counters = indexer.getCounters()
    # Java indexes on a thread of its own, so that the one Python thread can read the counters meanwhile.
    run = jvm.autoclass("java.util.concurrent.CompletableFuture").runAsync(indexer)
    while not run.isDone():
        print(json.dumps({"indexed": counters.indexed.get()}), file=status)
        time.sleep(_POLL_SECONDS)
    if run.isCompletedExceptionally():
        print(json.dumps({"indexed": counters.indexed.get(), "failure": _root(run.exceptionNow())}), file=status)
        os._exit(1)
    reader = jvm.autoclass("io.anserini.index.IndexReaderUtils").getReader(str(work / "index"))
    end = {
        "indexed": counters.indexed.get(),
        "documents": reader.numDocs(),
        "counters": {name: getattr(counters, name).get() for name in _COUNTERS},
        "lucene": jvm.autoclass("org.apache.lucene.util.Version").LATEST.toString(),
    }
    print(json.dumps(end), file=status)


def _root(failure: Any) -> str:
    """What the first of a chain of Java's exceptions says."""
    while (cause := failure.getCause()) is not None:
        failure = cause
    return failure.toString()


def _remove(work: Path) -> None:
    """Remove the folder under the hands of Java, which may create one more file between two steps of a removal."""
    for _ in range(50):
        shutil.rmtree(work, ignore_errors=True)
        if not work.exists():
            return
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    main()
