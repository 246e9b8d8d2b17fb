"""What every build of an index does alike: check the corpus, work in a folder beside the destination, rename it at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from retrievers.base import RetrieverError
from retrievers.index.corpus import CorpusReader, Passage

Progress = Callable[[int, int | None], None]
"""Called with (passages checked, None), then with (passages indexed, passages in all)."""

_REPORT_EVERY = 1000


def no_progress(done: int, total: int | None) -> None:
    """A Progress that tells nobody."""


def check_destination(out: Path) -> None:
    """Raise RetrieverError if the destination of a build exists."""
    if os.path.lexists(out):
        raise RetrieverError(f"{out} exists; remove it or choose another folder for the index")


def publish(folder: Path, out: Path) -> None:
    """Give a finished folder its name, on the same file system; it is seen whole or not at all.

    Raises:
        RetrieverError: if something has that name by now.
        OSError: if it cannot be renamed.
    """
    if os.path.lexists(out):
        raise RetrieverError(f"{out} appeared while its index was built; remove it or choose another folder")
    folder.rename(out)


@dataclass(slots=True)
class CheckedCorpus:
    """Reads a corpus once, checking every line, and knows afterwards what was read.

    Attributes:
        sha256, documents: of the corpus; empty and 0 until it was read to its end.
    """

    path: Path
    progress: Progress
    sha256: str = ""
    documents: int = 0
    _identity: tuple[int, int, int] | None = None

    def passages(self) -> Iterator[Passage]:
        """Yield the passages in the file's order. Raises RetrieverError as `CorpusReader` does."""
        self._identity = _identity(self.path)
        reader = CorpusReader(self.path)
        for passage in reader:
            if reader.count % _REPORT_EVERY == 0:
                self.progress(reader.count, None)
            yield passage
        self.progress(reader.count, None)
        self.sha256, self.documents = reader.sha256, reader.count

    def check_unchanged(self) -> None:
        """Raise RetrieverError if the file is no longer the one that was read."""
        if _identity(self.path) != self._identity:
            raise RetrieverError(f"{self.path} changed while it was indexed; build again when nothing writes to it")


def _identity(path: Path) -> tuple[int, int, int] | None:
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
