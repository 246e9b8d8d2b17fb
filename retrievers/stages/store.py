"""Hits in an SQLite file that several processes may read and write; for `retrievers.stages.cache`."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from retrievers.base import Hit, RetrieverError

READ = 0
"""Stands in the place of `k` for a whole document, whose list of hits has one entry or none."""

_FORMAT = 2
_BUSY_SECONDS = 30.0
# Far below the number of variables that SQLite takes in one statement.
_CHUNK = 500
_PAGE_CACHE_KIB = 32 << 10

_Result = TypeVar("_Result")


class HitStore:
    """What was found for (identity, k, query), as JSON; nothing in the file is ever executed or unpickled.

    Reading blocks for microseconds and is meant for the event loop; writing waits for the disk and other writers, up to
    30 s, and is meant for a thread.
    """

    def __init__(
        self,
        path: Path,
        identity: str | None,
        *,
        size_limit: int | None = None,
        read_only: bool = False,
        exclusive: bool = False,
    ) -> None:
        """Open the file, or make it.

        Args:
            path: on a local disk, not on a network file system: processes share its write-ahead log through memory.
            identity: of the index and its parameters, of which the file keeps a digest; only what was found with the same
                is seen. None, with `read_only`, takes the only one that the file holds.
            size_limit: bytes of the file; beyond them what was stored longest ago is thrown away. None keeps everything.
            read_only: refuse a file that is not there, and never write to it.
            exclusive: refuse a file that holds another identity.

        Raises:
            RetrieverError: if the file cannot be opened, is of another kind, or holds what `exclusive` refuses.
        """
        self._path, self._size_limit = path, size_limit
        # A digest: what names an index may hold what nobody should read in a file.
        self._identity = None if identity is None else hashlib.sha256(identity.encode()).hexdigest()
        self._lock = threading.Lock()
        if read_only and not path.is_file():
            raise RetrieverError(f"{path} is not a file; record a run first, or give the path of its recording")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RetrieverError(f"{path.parent} cannot be made: {error.strerror}; choose another folder") from error
        mode = ("mode=ro" + "&immutable=1" * _is_still(path)) if read_only else "mode=rwc"
        with self._explained():
            # Two connections, because a thread that waits to write would otherwise hold up those who read.
            self._reader, self._writer = (
                sqlite3.connect(
                    f"file:{quote(str(path.absolute()))}?{mode}",
                    _BUSY_SECONDS,
                    isolation_level=None,
                    check_same_thread=False,
                    uri=True,
                )
                for _ in range(2)
            )
            try:
                self._prepare(read_only, exclusive)
            except BaseException:
                self.close()
                raise

    def get(self, k: int, queries: Sequence[str]) -> dict[str, str]:
        """What is stored for these queries, as JSON."""
        try:
            return self._get(self._reader, k, queries)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def put(self, k: int, entries: Mapping[str, str]) -> dict[str, str]:
        """Store what was found, unless another was faster; return what is stored now, if it was not thrown away."""

        def store() -> dict[str, str]:
            self._writer.executemany(
                "INSERT OR IGNORE INTO entries (identity, k, query, hits) VALUES (?, ?, ?, ?)",
                [(self._number, k, query, hits) for query, hits in entries.items()],
            )
            stored = self._get(self._writer, k, list(entries))
            self._shrink()
            return stored

        return self._write(store)

    def size(self) -> int:
        """Bytes of the file that hold something."""
        with self._explained():
            return _used(self._reader)

    def close(self) -> None:
        """Close the file; nothing may be under way in another thread."""
        self._reader.close()
        self._writer.close()

    def _get(self, database: sqlite3.Connection, k: int, queries: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for start in range(0, len(queries), _CHUNK):
            chunk = queries[start : start + _CHUNK]
            marks = ",".join("?" * len(chunk))
            sql = f"SELECT query, hits FROM entries WHERE identity = ? AND k = ? AND query IN ({marks})"
            found.update(database.execute(sql, (self._number, k, *chunk)))
        return found

    def _prepare(self, read_only: bool, exclusive: bool) -> None:
        self._reader.execute(f"PRAGMA cache_size = -{_PAGE_CACHE_KIB}")
        # In one transaction, because another process may be making the tables just now.
        self._writer.execute("BEGIN")
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        tables = self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        self._writer.execute("COMMIT")
        if version not in (0, _FORMAT) or (version == 0 and (tables or read_only)):
            what = f"hits in form {version} and not {_FORMAT}" if version else "something else than stored hits"
            raise RetrieverError(f"{self._path} holds {what}; remove it or give another path")
        if not read_only:
            self._use_write_ahead_log()
            # Nothing is lost when the process dies. When the machine dies, the last entries may be lost.
            self._writer.execute("PRAGMA synchronous = NORMAL")
            self._writer.execute(f"PRAGMA journal_size_limit = {16 << 20}")
            self._write(lambda: self._make_tables(exclusive))
        elif exclusive:
            self._check_identity()
        row = self._writer.execute("SELECT id FROM identities WHERE name = ?", (self._identity,)).fetchone()
        self._number: int = -1 if row is None else row[0]

    def _use_write_ahead_log(self) -> None:
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._writer.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                # SQLite does not wait here while another process does the same.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _make_tables(self, exclusive: bool) -> None:
        self._writer.execute("CREATE TABLE IF NOT EXISTS identities (id INTEGER PRIMARY KEY, name TEXT UNIQUE)")
        self._writer.execute(
            "CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY, identity INTEGER, k INTEGER, query TEXT,"
            " hits TEXT, UNIQUE (identity, k, query))"
        )
        if exclusive:
            self._check_identity()
        self._writer.execute("INSERT OR IGNORE INTO identities (name) VALUES (?)", (self._identity,))
        self._writer.execute(f"PRAGMA user_version = {_FORMAT}")

    def _check_identity(self) -> None:
        if self._identity is None:
            names = [name for (name,) in self._writer.execute("SELECT name FROM identities")]
            if len(names) != 1:
                raise RetrieverError(
                    f"{self._path} holds {len(names)} identities and is no recording; give another file"
                )
            self._identity = names[0]
        row = self._writer.execute("SELECT name FROM identities WHERE name != ?", (self._identity,)).fetchone()
        if row is not None:
            what = f"{self._path} records another retriever or other options (identity {row[0][:12]}…, not "
            raise RetrieverError(f"{what}{str(self._identity)[:12]}…); use those that it records, or give another file")

    def _shrink(self) -> None:
        """Throw away the oldest tenth until the rest fits."""
        while self._size_limit is not None and _used(self._writer) > self._size_limit:
            first, last = self._writer.execute("SELECT min(id), max(id) FROM entries").fetchone()
            if first is None:
                return
            self._writer.execute("DELETE FROM entries WHERE id <= ?", (first + (last - first) // 10,))

    def _write(self, work: Callable[[], _Result]) -> _Result:
        """Do something in one transaction. Raises RetrieverError if it cannot be done."""
        with self._lock, self._explained():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                result = work()
                self._writer.execute("COMMIT")
            except BaseException:
                # SQLite has done so itself where the disk is full or broken.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
        return result

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.Error) -> RetrieverError:
        # Only what SQLite itself refused has a code; its low byte is the kind.
        kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if kind == sqlite3.SQLITE_FULL:
            remedy = "make room and try again"
        elif kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            remedy = "make it and its folder writable, or copy it with its -wal file, if it has one, to where they are"
        else:
            remedy = "if it is damaged, remove it with its -wal and -shm files"
        return RetrieverError(f"{self._path} cannot be used ({error}); {remedy}")


def _is_still(path: Path) -> bool:
    """Whether all of a recording is in its file, in a folder where SQLite cannot put what it needs to share it."""
    log = path.with_name(f"{path.name}-wal")
    unread = log.exists() and log.stat().st_size > 0
    return not unread and not os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _used(database: sqlite3.Connection) -> int:
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def encode_hits(hits: Sequence[Hit]) -> str:
    """Hits as JSON, in ASCII, so that halves of surrogate pairs are kept too."""
    return json.dumps([(hit.id, hit.contents, hit.score) for hit in hits], separators=(",", ":"))


def decode_hits(data: str) -> list[Hit]:
    """The hits of `encode_hits`. Raises RetrieverError if it is something else."""
    try:
        return [Hit(*hit) for hit in json.loads(data)]
    except (ValueError, TypeError) as error:
        raise RetrieverError(f"stored hits are damaged ({error}); remove the file that they are in") from error
