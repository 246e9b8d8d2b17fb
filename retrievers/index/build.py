"""Builds an index folder: what builds of every kind share. `retrievers.backends.build_index` picks the kind.

An index grows in a hidden folder beside its destination and is renamed when it is whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from retrievers.base import RetrieverError
from retrievers.index.corpus import CorpusReader
from retrievers.index.manifest import Manifest, write_manifest

OnProgress = Callable[[int, int | None], None]
"""Called with (passages checked, None), then with (passages indexed, passages in all)."""

_REPORT_EVERY = 1000


def no_progress(done: int, total: int | None) -> None:
    """An `OnProgress` that tells nobody."""


@dataclass(frozen=True, slots=True)
class CheckedCorpus:
    """A corpus that was read to its end without a complaint.

    Attributes:
        path: of the file.
        sha256, documents, plain: as of `CorpusReader`.
        state: of the file while it was read, by which a change is seen.
    """

    path: Path
    sha256: str
    documents: int
    plain: bool
    state: tuple[int, int, int]

    def check_unchanged(self) -> None:
        """Raise RetrieverError if the file is no longer the one that was read."""
        if not self.path.is_file() or _file_state(self.path) != self.state:
            raise RetrieverError(f"{self.path} changed while it was indexed; build again when nothing writes to it")


@dataclass(frozen=True, slots=True)
class IndexContents:
    """What a kind of index says of the index that it wrote; see `Manifest`."""

    parameters: dict[str, object]
    versions: dict[str, str]


class IndexBuilder(Protocol):
    """One kind of index. Its options are the arguments of its constructor, which raises RetrieverError if they are invalid.

    Attributes:
        backend: see `Manifest`.
        resumes: whether a later build goes on with what a failed one left in its work folder.
    """

    backend: ClassVar[str]
    resumes: ClassVar[bool]

    def prepare(self) -> None:
        """Check, before the corpus is read, that what builds the index is installed. Raises RetrieverError if it is not."""
        ...

    def fit(self, documents: int) -> None:
        """Check that the options fit so many passages, before the work folder is made. Raises RetrieverError if not."""
        ...

    def write(self, corpus: CheckedCorpus, work: Path, on_progress: OnProgress) -> IndexContents:
        """Write the index into the new folder `work / "index"`.

        It calls `corpus.check_unchanged` after it has read the corpus for the last time.

        Raises:
            RetrieverError: if that fails.
            OSError: if something cannot be written.
        """
        ...


def build(builder: IndexBuilder, corpus: Path, out: Path, on_progress: OnProgress = no_progress) -> Manifest:
    """Check a corpus and build its index into the new folder `out`, which is seen whole or not at all.

    Args:
        corpus: see `retrievers.index.corpus`.
        out: must not exist.

    Raises:
        RetrieverError: if the corpus or an option is invalid, `out` exists, something is not installed, the same build is
            running, or the disk is full. Nothing stays behind, except for what a builder that `resumes` needs.
    """
    corpus, out = Path(corpus).absolute(), Path(out).absolute()
    builder.prepare()
    _check_free(out, "exists")
    began = time.monotonic()
    checked = _check_corpus(corpus, on_progress)
    builder.fit(checked.documents)
    try:
        with _work_folder(out, keep_on_failure=builder.resumes) as work:
            contents = builder.write(checked, work, on_progress)
            manifest = write_manifest(
                work / "index",
                backend=builder.backend,
                corpus=corpus.name,
                corpus_sha256=checked.sha256,
                documents=checked.documents,
                parameters=contents.parameters,
                versions=contents.versions,
                build_seconds=time.monotonic() - began,
            )
            publish(work / "index", out)
    except OSError as error:
        resume = f", which goes on with what is finished, or remove {_resumed(out)}" if builder.resumes else ""
        raise RetrieverError(
            f"the index of {corpus} could not be written to {out}: {error}; make room and build again{resume}"
        ) from error
    return manifest


def publish(folder: Path, out: Path) -> None:
    """Give a finished folder its name, on the same file system.

    Raises:
        RetrieverError: if something has that name by now.
        OSError: if it cannot be renamed.
    """
    _check_free(out, "appeared while its index was built")
    folder.rename(out)


def _check_free(out: Path, what: str) -> None:
    if os.path.lexists(out):
        raise RetrieverError(f"{out} {what}; remove it or choose another folder for the index")


def _check_corpus(path: Path, on_progress: OnProgress) -> CheckedCorpus:
    """Read a corpus. Raises RetrieverError as `CorpusReader` does."""
    reader = CorpusReader(path)
    state = _file_state(path) if path.is_file() else (0, 0, 0)
    for _ in reader:
        if reader.count % _REPORT_EVERY == 0:
            on_progress(reader.count, None)
    on_progress(reader.count, None)
    return CheckedCorpus(path, reader.sha256, reader.count, reader.plain, state)


def _file_state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _resumed(out: Path) -> Path:
    return out.parent / f".{out.name}.building"


@contextmanager
def _work_folder(out: Path, *, keep_on_failure: bool) -> Iterator[Path]:
    """Make a folder beside `out`, and remove it at the end of the block.

    One that is kept has the same name for every build of `out`, and a lock against a second one.

    Raises:
        RetrieverError: if another build holds it.
        OSError: if it cannot be made.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if not keep_on_failure:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".building", dir=out.parent) as work:
            yield Path(work)
        return
    folder = _resumed(out)
    folder.mkdir(exist_ok=True)
    holder = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RetrieverError(f"another build is working in {folder}; wait for it") from error
        yield folder
        shutil.rmtree(folder)
    finally:
        os.close(holder)
